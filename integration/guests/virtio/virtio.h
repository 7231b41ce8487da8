/*
 * virtio: a driver for virtio-pci devices with split rings (virtio 1.2, 2.7 and 4.1),
 * through the modern capabilities or through the legacy I/O BAR (4.1.4.10).
 *
 * The command line chooses, for every device of a guest:
 *
 *	legacy=1             the legacy interface, of a device that has both
 *	irq=msix|intx|poll   how completions are learnt (default msix)
 *	indirect=0           no indirect descriptors
 *	event_idx=0          no event indices
 *
 * A queue gives and takes requests; the caller sleeps by virtq_sleep, which loses no
 * completion. The rings are visible, because some guests exist to break the rules.
 */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "rt.h"

enum { VIRTIO_NET = 1, VIRTIO_BLK = 2, VIRTIO_CONSOLE = 3, VIRTIO_RNG = 4 };

/* Feature bits of every device (virtio 1.2, 6). */
#define VIRTIO_F_INDIRECT_DESC (1ul << 28)
#define VIRTIO_F_EVENT_IDX (1ul << 29)
#define VIRTIO_F_VERSION_1 (1ul << 32)

enum { STATUS_ACKNOWLEDGE = 1, STATUS_DRIVER = 2, STATUS_DRIVER_OK = 4, STATUS_FEATURES_OK = 8,
       STATUS_NEEDS_RESET = 64, STATUS_FAILED = 128 };

enum virtio_irq { IRQ_MSIX, IRQ_INTX, IRQ_POLL };

struct virtio {
	struct pci pci;
	bool legacy;
	enum virtio_irq irq;
	u8 line, first_vector;   /* of INTx; the vector of queue 0 with MSI-X */
	u16 io;                  /* legacy */
	u64 common, notify, isr, config;
	u32 notify_step;
	u64 msix_table;
	u64 offered, features;   /* what the device has, what was negotiated */
	volatile u32 isr_seen;   /* ISR bits that the INTx handler has read */
};

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
struct desc {
	u64 addr;
	u32 len;
	u16 flags, next;
};
struct avail {
	volatile u16 flags, idx;
	volatile u16 ring[]; /* and after them used_event */
};
struct used {
	volatile u16 flags, idx;
	volatile struct {
		u32 id, len;
	} ring[]; /* and after them avail_event */
};

enum { VIRTQ_MAX = 1024, VIRTQ_SEGMENTS = 16 /* in an indirect table of ours */ };

struct virtq {
	struct virtio *dev;
	u16 index, size;
	u8 vector;
	bool indirect, event_idx;
	volatile struct desc *desc;
	struct avail *avail;
	struct used *used;
	struct desc (*tables)[VIRTQ_SEGMENTS]; /* one for each descriptor */
	u64 notify;
	u16 free_head, free_count, next_avail, next_used, kicked;
	void **tokens;     /* by head descriptor */
	u64 kicks;         /* notifications sent */
	u16 memory_size;   /* the queue size that the memory below was made for */
};

struct segment {
	const void *addr;
	u32 len;
};

/* virtio_find fills in the nth device of a type and enables it on the bus. */
bool virtio_find(struct virtio *, int type, int nth);
/* virtio_begin resets the device and negotiates the wanted features that it offers, up
 * to FEATURES_OK; false if the device refuses. */
bool virtio_begin(struct virtio *, u64 wanted);
/* virtq_setup makes a queue of at most `size` entries (0: what the device offers; the
 * legacy interface cannot choose). False if the device has no such queue. */
bool virtq_setup(struct virtq *, struct virtio *, u16 index, u16 size);
/* virtio_go sets DRIVER_OK. */
void virtio_go(struct virtio *);
u8 virtio_status(struct virtio *);
void virtio_reset(struct virtio *);
u8 virtio_read8(struct virtio *, u32 at); /* device configuration */
u16 virtio_read16(struct virtio *, u32 at);
u32 virtio_read32(struct virtio *, u32 at);
u64 virtio_read64(struct virtio *, u32 at);

/* virtq_add makes a request of `out` segments that the device reads and `in` that it
 * writes available, in an indirect table if the queue has them and it fits one. False if
 * too few descriptors are free. token must not be NULL. */
bool virtq_add(struct virtq *, const struct segment *, int out, int in, void *token);
/* virtq_publish makes a hand-made chain available. */
void virtq_publish(struct virtq *, u16 head);
/* virtq_kick notifies the device if it asks for it. */
void virtq_kick(struct virtq *);
void virtq_notify(struct virtq *);
/* virtq_pop returns the token of a completed request, or NULL. */
void *virtq_pop(struct virtq *, u32 *len);
bool virtq_pending(struct virtq *);
/* virtq_arm asks for an interrupt on the next completion, virtq_disarm for none (a
 * hint). Between arming and sleeping look once more at virtq_pending. */
void virtq_arm(struct virtq *);
/* virtq_arm_after asks for an interrupt once `n` more requests have completed. */
void virtq_arm_after(struct virtq *, u16 n);
void virtq_disarm(struct virtq *);
/* virtq_sleep waits until virtq_pending. virtq_poll_us polls for a limited time instead and
 * returns virtq_pending. */
void virtq_sleep(struct virtq *);
bool virtq_poll_us(struct virtq *, u32 limit_us);

#endif
