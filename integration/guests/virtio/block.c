#include "virtio/block.h"

/* struct virtio_blk_config (5.2.4). */
enum { CONFIG_CAPACITY = 0, CONFIG_SEG_MAX = 12, CONFIG_MAX_DISCARD = 36, CONFIG_MAX_ZEROES = 48 };

bool block_find(struct block *b, int nth)
{
	memset(b, 0, sizeof *b);
	return virtio_find(&b->dev, VIRTIO_BLK, nth);
}

bool block_start(struct block *b, u16 queue_size)
{
	struct virtio *d = &b->dev;

	if (!virtio_begin(d, BLOCK_F_SEG_MAX | BLOCK_F_RO | BLOCK_F_FLUSH | BLOCK_F_DISCARD | BLOCK_F_WRITE_ZEROES) ||
	    !virtq_setup(&b->q, d, 0, queue_size))
		return false;
	b->sectors = virtio_read64(d, CONFIG_CAPACITY);
	b->max_segments = d->features & BLOCK_F_SEG_MAX ? virtio_read32(d, CONFIG_SEG_MAX) : 1;
	if (b->max_segments > BLOCK_SEGMENTS)
		b->max_segments = BLOCK_SEGMENTS;
	if (b->max_segments + 2 > b->q.size) /* 2.7.5.3.1: no chain is longer than the queue */
		b->max_segments = b->q.size - 2;
	b->max_discard = d->features & BLOCK_F_DISCARD ? virtio_read32(d, CONFIG_MAX_DISCARD) : 0;
	b->max_zeroes = d->features & BLOCK_F_WRITE_ZEROES ? virtio_read32(d, CONFIG_MAX_ZEROES) : 0;
	b->read_only = d->features & BLOCK_F_RO;
	virtio_go(d);
	return true;
}

bool block_submit(struct block *b, struct block_request *r, enum block_op op, u64 sector, const struct segment *data, int n)
{
	struct segment s[BLOCK_SEGMENTS + 2];
	bool in = op == BLOCK_READ || op == BLOCK_GET_ID;

	if (n > BLOCK_SEGMENTS)
		return false;
	r->header.op = op;
	r->header.reserved = 0;
	r->header.sector = sector;
	r->status = BLOCK_PENDING;
	s[0] = (struct segment){ &r->header, sizeof r->header };
	for (int i = 0; i < n; i++)
		s[i + 1] = data[i];
	s[n + 1] = (struct segment){ (void *)&r->status, 1 };
	return virtq_add(&b->q, s, in ? 1 : n + 1, in ? n + 1 : 1, r);
}

bool block_submit_range(struct block *b, struct block_request *r, enum block_op op, u64 sector, u32 sectors, u32 flags)
{
	struct segment s = { &r->range, sizeof r->range };

	r->range.sector = sector;
	r->range.sectors = sectors;
	r->range.flags = flags;
	return block_submit(b, r, op, 0, &s, 1);
}

struct block_request *block_pop(struct block *b)
{
	u32 len;
	struct block_request *r = virtq_pop(&b->q, &len);

	if (r)
		r->written = len;
	return r;
}

u8 block_run(struct block *b, enum block_op op, u64 sector, void *data, u32 len)
{
	static struct block_request r;
	struct segment s = { data, len };

	if (!block_submit(b, &r, op, sector, &s, len > 0))
		return BLOCK_PENDING;
	virtq_kick(&b->q);
	virtq_sleep(&b->q);
	block_pop(b);
	return r.status;
}
