/* A virtio-blk disk (virtio 1.2, 5.2) over the queues of virtio.h. */
#ifndef VIRTIO_BLOCK_H
#define VIRTIO_BLOCK_H

#include "virtio/virtio.h"

enum { SECTOR = 512, BLOCK_SEGMENTS = VIRTQ_SEGMENTS - 2, BLOCK_ID_SIZE = 20 };

enum block_op { BLOCK_READ = 0, BLOCK_WRITE = 1, BLOCK_FLUSH = 4, BLOCK_GET_ID = 8, BLOCK_DISCARD = 11,
		BLOCK_WRITE_ZEROES = 13 };
enum block_status { BLOCK_OK = 0, BLOCK_IOERR = 1, BLOCK_UNSUPPORTED = 2, BLOCK_PENDING = 0xff };

#define BLOCK_F_SEG_MAX (1ul << 2)
#define BLOCK_F_RO (1ul << 5)
#define BLOCK_F_FLUSH (1ul << 9)
#define BLOCK_F_DISCARD (1ul << 13)
#define BLOCK_F_WRITE_ZEROES (1ul << 14)

struct block {
	struct virtio dev;
	struct virtq q;
	u64 sectors;
	u32 max_segments; /* of data in one request */
	u32 max_discard, max_zeroes; /* sectors in one request */
	bool read_only;
};

/* One request. It and its data stay where they are until block_pop returns it. */
struct block_request {
	struct {
		u32 op, reserved;
		u64 sector;
	} header;
	struct {
		u64 sector;
		u32 sectors, flags;
	} range; /* of discard and write zeroes */
	volatile u8 status;
	u32 written; /* what the used ring said */
};

/* block_find finds the nth disk; block_start (again) brings it up with a queue of at most
 * `queue_size` entries, 0 for the device's own. */
bool block_find(struct block *, int nth);
bool block_start(struct block *, u16 queue_size);
/* block_submit makes a request available, without a kick; false while the queue is full. */
bool block_submit(struct block *, struct block_request *, enum block_op, u64 sector, const struct segment *data, int n);
/* block_submit_range is for discard and write zeroes. */
bool block_submit_range(struct block *, struct block_request *, enum block_op, u64 sector, u32 sectors, u32 flags);
struct block_request *block_pop(struct block *);
/* block_run submits one request and sleeps until it is done. */
u8 block_run(struct block *, enum block_op, u64 sector, void *data, u32 len);

#endif
