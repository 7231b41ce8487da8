/*
 * mode=hostile: a driver that breaks the rules. What the device does about a broken request
 * is its own affair (2.1.2 suggests DEVICE_NEEDS_RESET), as long as the request has no
 * effect and the device works again after a reset.
 */
#include "blk/blk.h"

enum { LIMIT_US = 200000, TABLE = 512 };

enum outcome { NOTHING = 1, NEEDS_RESET = 2, REFUSED = 4, DONE = 8 };
static const char *const outcome_names[] = { [NOTHING] = "nothing", [NEEDS_RESET] = "needs reset",
					     [REFUSED] = "refused", [DONE] = "done" };

static struct {
	u32 op, reserved;
	u64 sector;
} header;
static u8 data[PAGE_SIZE] __attribute__((aligned(4096)));
static volatile u8 status;
static struct desc table[TABLE] __attribute__((aligned(16)));

#define NOWHERE 0x0000100000000000ul /* 16 TiB up: no memory there */

static void set(u16 i, u64 addr, u32 len, u16 flags, u16 next)
{
	disk.q.desc[i].addr = addr;
	disk.q.desc[i].len = len;
	disk.q.desc[i].flags = flags;
	disk.q.desc[i].next = next;
}

/* good_chain makes descriptors 0 to 2 a proper read of sector 0; the cases spoil it. */
static void good_chain(void)
{
	set(0, (u64)&header, 16, DESC_NEXT, 1);
	set(1, (u64)data, SECTOR, DESC_NEXT | DESC_WRITE, 2);
	set(2, (u64)&status, 1, DESC_WRITE, 0);
}

static void indirect(u64 addr, u32 len, u16 flags) { set(0, addr, len, DESC_INDIRECT | flags, 1); }

static void copy_to_table(void)
{
	for (int i = 0; i < 3; i++)
		table[i] = (struct desc){ disk.q.desc[i].addr, disk.q.desc[i].len, disk.q.desc[i].flags, disk.q.desc[i].next };
}

static void loop(void) { set(0, (u64)&header, 16, DESC_NEXT, 1); set(1, (u64)data, 16, DESC_NEXT, 0); }
static void self_loop(void) { set(2, (u64)&status, 1, DESC_WRITE | DESC_NEXT, 2); }
static void next_outside(void) { set(0, (u64)&header, 16, DESC_NEXT, disk.q.size + 5); }
static void data_outside(void) { set(1, NOWHERE, SECTOR, DESC_NEXT | DESC_WRITE, 2); }
static void data_wraps(void) { set(1, -(u64)SECTOR, 2 * SECTOR, DESC_NEXT | DESC_WRITE, 2); }
static void header_outside(void) { set(0, NOWHERE, 16, DESC_NEXT, 1); }
static void status_outside(void) { set(2, NOWHERE, 1, DESC_WRITE, 0); }
static void data_empty(void) { set(1, (u64)data, 0, DESC_NEXT | DESC_WRITE, 2); }
static void data_huge(void) { set(1, (u64)data, 0xfffffe00, DESC_NEXT | DESC_WRITE, 2); }
static void header_short(void) { set(0, (u64)&header, 8, DESC_NEXT, 1); }
static void header_missing(void) { set(0, (u64)&status, 1, DESC_WRITE, 0); }
static void status_missing(void) { set(0, (u64)&header, 16, 0, 0); }
static void status_read_only(void) { set(2, (u64)&status, 1, 0, 0); }
static void wrong_order(void) { set(0, (u64)data, SECTOR, DESC_NEXT | DESC_WRITE, 1); set(1, (u64)&header, 16, DESC_NEXT, 2); }
static void table_outside(void) { indirect(NOWHERE, 48, 0); }
static void table_ragged(void) { copy_to_table(); indirect((u64)table, 47, 0); }
static void table_empty(void) { indirect((u64)table, 0, 0); }
static void table_huge(void) { copy_to_table(); indirect((u64)table, 0xfffffff0, 0); }
static void table_and_next(void) { copy_to_table(); indirect((u64)table, 48, DESC_NEXT); }
static void table_next_outside(void) { copy_to_table(); table[0].next = 9; indirect((u64)table, 48, 0); }
static void table_loop(void) { copy_to_table(); table[1].flags = DESC_NEXT; table[1].next = 0; indirect((u64)table, 48, 0); }
static void table_nested(void)
{
	copy_to_table();
	table[1] = (struct desc){ (u64)&table[8], 16, DESC_INDIRECT | DESC_NEXT, 2 };
	table[8] = (struct desc){ (u64)data, SECTOR, DESC_WRITE, 0 };
	indirect((u64)table, 48, 0);
}

/* More descriptors than the queue has, though each is fine. */
static void table_long(void)
{
	copy_to_table();
	for (int i = 1; i < TABLE - 1; i++)
		table[i] = (struct desc){ (u64)data + i, 1, DESC_NEXT | DESC_WRITE, i + 1 };
	table[TABLE - 1] = (struct desc){ (u64)&status, 1, DESC_WRITE, 0 };
	indirect((u64)table, sizeof table, 0);
}

static enum outcome outcome(void)
{
	if (virtq_poll_us(&disk.q, LIMIT_US))
		return status == BLOCK_OK ? DONE : REFUSED;
	return !disk.dev.legacy && virtio_status(&disk.dev) & STATUS_NEEDS_RESET ? NEEDS_RESET : NOTHING;
}

/* recovers resets the device and checks that it serves a write and a read. */
static void recovers(const char *name, enum outcome got, int allowed)
{
	static u8 wrote[SECTOR], read[SECTOR];
	bool ok;

	for (u32 i = 0; i < SECTOR; i++)
		wrote[i] = random();
	ok = block_start(&disk, 0) && (disk.read_only || block_run(&disk, BLOCK_WRITE, 1, wrote, SECTOR) == BLOCK_OK) &&
	     block_run(&disk, BLOCK_READ, 1, read, SECTOR) == BLOCK_OK && (disk.read_only || !memcmp(wrote, read, SECTOR));
	printf("# %s: %s\n", name, outcome_names[got]);
	check(ok && got & allowed, name, "%s, %s after a reset", got & allowed ? "as allowed" : outcome_names[got],
	      ok ? "works" : "does not work");
}

struct hostile_case {
	const char *name;
	void (*spoil)(void);
	int allowed;
};

/* DONE is allowed where a device may take what is wrong for something harmless: an address
 * without memory for one that reads as anything, a nested table for an ordinary buffer. */
static const struct hostile_case cases[] = {
	{ "descriptor-loop", loop, NEEDS_RESET | REFUSED },
	{ "descriptor-self-loop", self_loop, NEEDS_RESET | REFUSED },
	{ "next-outside", next_outside, NEEDS_RESET | REFUSED },
	{ "data-outside", data_outside, NEEDS_RESET | REFUSED | DONE },
	{ "data-wraps", data_wraps, NEEDS_RESET | REFUSED | DONE },
	{ "header-outside", header_outside, NEEDS_RESET | REFUSED | DONE },
	{ "status-outside", status_outside, NEEDS_RESET | REFUSED },
	{ "data-empty", data_empty, NEEDS_RESET | REFUSED | DONE },
	{ "data-huge", data_huge, NEEDS_RESET | REFUSED },
	{ "header-short", header_short, NEEDS_RESET | REFUSED },
	{ "header-missing", header_missing, NEEDS_RESET | REFUSED },
	{ "status-missing", status_missing, NEEDS_RESET | REFUSED },
	{ "status-read-only", status_read_only, NEEDS_RESET | REFUSED },
	{ "wrong-order", wrong_order, NEEDS_RESET | REFUSED },
	{ "table-outside", table_outside, NEEDS_RESET | REFUSED },
	{ "table-ragged", table_ragged, NEEDS_RESET | REFUSED },
	{ "table-empty", table_empty, NEEDS_RESET | REFUSED },
	{ "table-huge", table_huge, NEEDS_RESET | REFUSED | DONE },
	{ "table-and-next", table_and_next, NEEDS_RESET | REFUSED | DONE },
	{ "table-next-outside", table_next_outside, NEEDS_RESET | REFUSED },
	{ "table-loop", table_loop, NEEDS_RESET | REFUSED },
	{ "table-nested", table_nested, NEEDS_RESET | REFUSED | DONE },
	{ "table-long", table_long, NEEDS_RESET | REFUSED | DONE },
};

/* The legacy interface has no DEVICE_NEEDS_RESET: a broken device just stops there. */
static int allowed(int outcomes) { return outcomes | (disk.dev.legacy ? NOTHING : 0); }

static void prepare(void)
{
	header.op = BLOCK_READ;
	header.sector = 0;
	status = BLOCK_PENDING;
	good_chain();
}

static void try_head(u16 head)
{
	virtq_publish(&disk.q, head);
	virtq_notify(&disk.q);
}

void hostile(void)
{
	u64 ring;

	for (u32 i = 0; i < ARRAY_LEN(cases); i++) {
		if (!disk.q.indirect && !memcmp(cases[i].name, "table", 5))
			continue;
		prepare();
		cases[i].spoil();
		try_head(0);
		recovers(cases[i].name, outcome(), allowed(cases[i].allowed));
	}

	prepare();
	try_head(0xffff);
	recovers("head-outside", outcome(), allowed(NEEDS_RESET | REFUSED));

	prepare(); /* more entries available than the ring has */
	disk.q.avail->idx = disk.q.next_avail + disk.q.size + 1;
	virtq_notify(&disk.q);
	recovers("index-runs-away", outcome(), allowed(NEEDS_RESET));

	prepare(); /* the ring's own address */
	if (!disk.dev.legacy) {
		ring = disk.dev.common;
		virtio_begin(&disk.dev, 0);
		mmio_write16(ring + 22, 0);
		for (u32 reg = 32; reg < 56; reg += 8) {
			mmio_write32(ring + reg, 0);
			mmio_write32(ring + reg + 4, NOWHERE >> 32);
		}
		mmio_write16(ring + 28, 1);
		virtio_go(&disk.dev);
		virtq_notify(&disk.q);
		recovers("rings-outside", outcome(), NEEDS_RESET | NOTHING);

		virtio_begin(&disk.dev, 0); /* a size that is no power of two, then no queue at all */
		mmio_write16(ring + 22, 0);
		mmio_write16(ring + 24, 3);
		mmio_write16(ring + 28, 1);
		virtio_go(&disk.dev);
		virtq_notify(&disk.q);
		recovers("odd-queue-size", outcome(), NEEDS_RESET | NOTHING);

		mmio_write16(disk.q.notify, 77);
		recovers("notify-no-queue", outcome(), NOTHING);
	}

	virtio_reset(&disk.dev);
	virtq_notify(&disk.q);
	recovers("notify-after-reset", outcome(), NOTHING);
}
