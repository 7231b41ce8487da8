/*
 * mode=verify. Each sector holds either zeros or a stream that its number, a generation and
 * the seed determine, so one word a sector remembers what the disk must return.
 */
#include "blk/blk.h"

enum {
	DEPTH_MAX = 64,
	REQUEST_SECTORS = 128,
	ZERO = 0,                 /* generation of a zeroed sector */
	MAYBE_ZERO = 1u << 31,    /* discarded: zeros or the old content (5.2.6.2) */
	FLAG_UNMAP = 1,
};

struct slot {
	struct block_request r;
	bool busy;
	enum block_op op;
	u64 sector;
	u32 sectors, generation;
	u8 *data;
};

static struct slot slots[DEPTH_MAX];
static u32 *generations, generation;
static u64 bad_sectors, first_bad, bad_status, bad_length, done[16], digest;

static u64 sector_start(u64 sector, u32 g)
{
	u64 x = (sector + 1) * 0x9e3779b97f4a7c15 ^ (u64)g << 32 ^ arg_number("seed", 1);

	return x ? x : 1;
}

static u64 next_word(u64 x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

static void fill(u8 *to, u64 sector, u32 g)
{
	u64 x = sector_start(sector, g);

	for (u64 *p = (u64 *)to; p < (u64 *)(to + SECTOR); p++)
		*p = x = next_word(x);
}

static bool holds(const u8 *data, u64 sector, u32 g)
{
	u64 x = g == ZERO ? 0 : sector_start(sector, g);

	for (const u64 *p = (const u64 *)data; p < (const u64 *)(data + SECTOR); p++) {
		if (g != ZERO)
			x = next_word(x);
		if (*p != x)
			return false;
	}
	return true;
}

static void compare(const u8 *data, u64 sector)
{
	u32 g = generations[sector];

	if (holds(data, sector, g & ~MAYBE_ZERO) || (g & MAYBE_ZERO && holds(data, sector, ZERO)))
		return;
	if (!bad_sectors++)
		first_bad = sector;
}

static void complete(struct slot *s)
{
	u32 bytes = s->sectors * SECTOR;

	s->busy = false;
	done[s->op]++;
	bad_status += s->r.status != BLOCK_OK;
	bad_length += s->r.written != 1 + (s->op == BLOCK_READ ? bytes : s->op == BLOCK_GET_ID ? BLOCK_ID_SIZE : 0);
	for (u32 i = 0; i < s->sectors; i++) {
		u32 *g = &generations[s->sector + i];

		if (s->op == BLOCK_READ)
			compare(s->data + i * SECTOR, s->sector + i);
		else if (s->op == BLOCK_WRITE)
			*g = s->generation;
		else if (s->op == BLOCK_WRITE_ZEROES)
			*g = ZERO;
		else if (s->op == BLOCK_DISCARD)
			*g |= MAYBE_ZERO;
	}
}

/* drain takes completions until at most `left` requests are in flight. */
static void drain(u32 left)
{
	u32 busy = 0;

	for (struct slot *s = slots; s < slots + DEPTH_MAX; s++)
		busy += s->busy;
	virtq_kick(&disk.q);
	while (busy > left) {
		virtq_sleep(&disk.q);
		complete((struct slot *)block_pop(&disk));
		busy--;
	}
}

static bool overlaps(u64 sector, u32 sectors)
{
	for (struct slot *s = slots; s < slots + DEPTH_MAX; s++)
		if (s->busy && sector < s->sector + s->sectors && s->sector < sector + sectors)
			return true;
	return false;
}

/* split cuts data into up to n segments of at least a byte, anywhere. */
static int split(struct segment *to, u8 *data, u32 len, int n)
{
	int made = 0;

	while (made < n - 1 && len > 1) {
		u32 part = 1 + below(below(2) ? len - 1 : len < 600 ? len - 1 : 600);

		to[made++] = (struct segment){ data, part };
		data += part;
		len -= part;
	}
	to[made++] = (struct segment){ data, len };
	return made;
}

static bool submit(struct slot *s, enum block_op op, u64 sector, u32 sectors, int pieces)
{
	struct segment data[BLOCK_SEGMENTS];
	int n = 0;

	s->op = op;
	s->sector = sector;
	s->sectors = sectors;
	if (op == BLOCK_WRITE) {
		s->generation = ++generation;
		for (u32 i = 0; i < sectors; i++)
			fill(s->data + i * SECTOR, sector + i, s->generation);
	}
	if (op == BLOCK_READ)
		memset(s->data, 0xa5, sectors * SECTOR);
	if (op == BLOCK_READ || op == BLOCK_WRITE)
		n = split(data, s->data, sectors * SECTOR, pieces);
	if (op == BLOCK_GET_ID) {
		data[0] = (struct segment){ s->data, BLOCK_ID_SIZE };
		n = 1;
	}
	if (op == BLOCK_DISCARD || op == BLOCK_WRITE_ZEROES)
		s->busy = block_submit_range(&disk, &s->r, op, sector, sectors,
					     op == BLOCK_WRITE_ZEROES && below(2) ? FLAG_UNMAP : 0);
	else
		s->busy = block_submit(&disk, &s->r, op, sector, data, n);
	return s->busy;
}

static struct slot *free_slot(void)
{
	for (struct slot *s = slots; s < slots + DEPTH_MAX; s++)
		if (!s->busy)
			return s;
	return NULL;
}

/* submit_now waits for room. */
static void submit_now(enum block_op op, u64 sector, u32 sectors, int pieces, u32 depth)
{
	drain(depth - 1);
	while (!submit(free_slot(), op, sector, sectors, pieces))
		drain(0);
}

static void one_random(u32 depth)
{
	u32 dice = below(100), sectors = 1 + below(below(8) ? 16 : REQUEST_SECTORS);
	enum block_op op = dice < 42 ? BLOCK_READ : dice < 80 ? BLOCK_WRITE : dice < 86 ? BLOCK_FLUSH :
		dice < 88 ? BLOCK_GET_ID : dice < 94 ? BLOCK_DISCARD : BLOCK_WRITE_ZEROES;
	u64 sector;

	if ((op == BLOCK_DISCARD && !disk.max_discard) || (op == BLOCK_WRITE_ZEROES && !disk.max_zeroes))
		op = BLOCK_WRITE;
	if (op == BLOCK_DISCARD && sectors > disk.max_discard)
		sectors = disk.max_discard;
	if (op == BLOCK_FLUSH || op == BLOCK_GET_ID) {
		submit_now(op, 0, 0, 0, depth);
		return;
	}
	if (sectors > area)
		sectors = area;
	sector = below(area - sectors + 1);
	if (overlaps(sector, sectors)) /* the order of overlapping requests is the device's own */
		drain(0);
	submit_now(op, sector, sectors, 1 + below(disk.max_segments), depth);
}

/* good reports whether everything since the last call was right. */
static bool good(const char *name, const char *how, u32 depth)
{
	bool ok = !bad_sectors && !bad_status && !bad_length;

	if (ok)
		check(true, name, "%s, %u in flight", how, depth);
	else
		check(false, name, "%s, %u in flight: %lu sectors wrong (first %lu), %lu bad statuses, %lu bad lengths",
		      how, depth, bad_sectors, first_bad, bad_status, bad_length);
	bad_sectors = bad_status = bad_length = 0;
	return ok;
}

static void mix(const char *how, u32 depth, u64 n)
{
	while (n--)
		one_random(depth);
	drain(0);
	good("mix", how, depth);
}

static void restart(u16 queue_size)
{
	if (!block_start(&disk, queue_size)) {
		check(false, "restart", "queue size %u refused", queue_size);
		rt_exit(RT_STATUS_FAILED);
	}
}

/* Any way to cut a request into buffers is allowed (2.7.4.1), the header and the status included. */
static void layouts(void)
{
	static struct slot *s = slots;
	static u8 joined[SECTOR + 1];
	struct block_request *r = &s->r;
	struct segment pieces[] = { { &r->header, 3 }, { (u8 *)&r->header + 3, 13 }, { joined, 100 }, { joined + 100, SECTOR - 100 + 1 } };

	r->header.op = BLOCK_READ;
	r->header.sector = 7 % area;
	joined[SECTOR] = BLOCK_PENDING;
	virtq_add(&disk.q, pieces, 2, 2, r);
	virtq_kick(&disk.q);
	virtq_sleep(&disk.q);
	block_pop(&disk);
	compare(joined, 7 % area);
	bad_status += joined[SECTOR] != BLOCK_OK;
	good("layout", "split header, status joined to data", 1);
}

static void refusals(void)
{
	static u8 data[2 * SECTOR];
	static struct block_request r;
	struct segment odd = { data, SECTOR + 1 };
	struct { const char *name; enum block_op op; u64 sector; u32 len; u8 status; } cases[] = {
		{ "read-past-end", BLOCK_READ, disk.sectors, SECTOR, BLOCK_IOERR },
		{ "read-across-end", BLOCK_READ, disk.sectors - 1, 2 * SECTOR, BLOCK_IOERR },
		{ "read-far-out", BLOCK_READ, 1ul << 55, SECTOR, BLOCK_IOERR },
		{ "read-wraps", BLOCK_READ, ~0ul, 2 * SECTOR, BLOCK_IOERR },
		{ "write-past-end", BLOCK_WRITE, disk.sectors, SECTOR, BLOCK_IOERR },
		{ "write-across-end", BLOCK_WRITE, disk.sectors - 1, 2 * SECTOR, BLOCK_IOERR },
		{ "write-wraps", BLOCK_WRITE, ~0ul, 2 * SECTOR, BLOCK_IOERR },
		{ "unknown-operation", 0x77, 0, SECTOR, BLOCK_UNSUPPORTED },
	};

	for (u32 i = 0; i < ARRAY_LEN(cases); i++) {
		u8 status = block_run(&disk, cases[i].op, cases[i].sector, data, cases[i].len);

		check(status == cases[i].status, cases[i].name, "status %u, want %u", status, cases[i].status);
	}
	block_submit(&disk, &r, BLOCK_READ, 0, &odd, 1);
	virtq_kick(&disk.q);
	virtq_sleep(&disk.q);
	block_pop(&disk);
	check(r.status == BLOCK_IOERR, "read-odd-length", "status %u, want %u", r.status, BLOCK_IOERR);
	if (disk.max_zeroes) {
		block_submit_range(&disk, &r, BLOCK_WRITE_ZEROES, disk.sectors - 1, 2, 0);
		virtq_kick(&disk.q);
		virtq_sleep(&disk.q);
		block_pop(&disk);
		check(r.status == BLOCK_IOERR, "zeroes-across-end", "status %u, want %u", r.status, BLOCK_IOERR);
		block_submit_range(&disk, &r, BLOCK_WRITE_ZEROES, 0, 1, 0x80);
		virtq_kick(&disk.q);
		virtq_sleep(&disk.q);
		block_pop(&disk);
		check(r.status == BLOCK_UNSUPPORTED, "zeroes-unknown-flag", "status %u, want %u", r.status, BLOCK_UNSUPPORTED);
	}
}

/* A read-only disk refuses every change (5.2.6.2) and goes on to be readable. */
static void read_only(void)
{
	static u8 before[SECTOR], after[SECTOR];
	static struct block_request r;
	u8 status = block_run(&disk, BLOCK_READ, 0, before, SECTOR);

	check(status == BLOCK_OK, "read", "status %u", status);
	memset(after, 0x5a, SECTOR);
	status = block_run(&disk, BLOCK_WRITE, 0, after, SECTOR);
	check(status == BLOCK_IOERR, "write-refused", "status %u, want %u", status, BLOCK_IOERR);
	for (int zeroes = 0; zeroes < 2; zeroes++) {
		if (!(zeroes ? disk.max_zeroes : disk.max_discard))
			continue;
		block_submit_range(&disk, &r, zeroes ? BLOCK_WRITE_ZEROES : BLOCK_DISCARD, 0, 1, 0);
		virtq_kick(&disk.q);
		virtq_sleep(&disk.q);
		block_pop(&disk);
		if (zeroes)
			check(r.status == BLOCK_IOERR, "zeroes-refused", "status %u, want %u", r.status, BLOCK_IOERR);
		else /* some devices take the hint and do nothing */
			printf("# discard: status %u\n", r.status);
	}
	block_run(&disk, BLOCK_READ, 0, after, SECTOR);
	check(!memcmp(before, after, SECTOR), "unchanged", "sector 0 reads as before");
}

static void identity(void)
{
	static char id[BLOCK_ID_SIZE + 1];
	u8 status = block_run(&disk, BLOCK_GET_ID, 0, id, BLOCK_ID_SIZE);
	const char *want = arg("serial");

	check(status == BLOCK_OK && (!want || !strcmp(id, want)), "get-id", "status %u, \"%s\"", status, id);
}

void verify(void)
{
	static const u16 queue_sizes[] = { 4, 8, 32, 128 };
	static const u32 depths[] = { 1, 4, 32, DEPTH_MAX };
	static char how[48];
	u64 n = arg_number("n", 300);

	identity();
	if (disk.read_only) {
		read_only();
		return;
	}
	generations = page_alloc((area * sizeof *generations + PAGE_SIZE - 1) / PAGE_SIZE);
	for (struct slot *s = slots; s < slots + DEPTH_MAX; s++)
		s->data = page_alloc(REQUEST_SECTORS * SECTOR / PAGE_SIZE);
	for (u64 at = 0; at < area; at += REQUEST_SECTORS)
		submit_now(BLOCK_WRITE, at, area - at < REQUEST_SECTORS ? area - at : REQUEST_SECTORS, 1, 32);
	drain(0);
	good("fill", "every sector", 32);
	for (u32 i = 0; i < ARRAY_LEN(depths); i++)
		mix(disk.q.indirect ? "indirect" : "chained", depths[i], n);
	if (disk.q.indirect) {
		disk.q.indirect = false;
		for (u32 i = 0; i < ARRAY_LEN(depths); i++)
			mix("chained", depths[i], n);
	}
	if (!disk.dev.legacy) {
		layouts();
		for (u32 i = 0; i < ARRAY_LEN(queue_sizes); i++) {
			restart(queue_sizes[i]);
			snprintf(how, sizeof how, "queue of %u", disk.q.size);
			mix(how, 8, n);
			disk.q.indirect = false;
			snprintf(how, sizeof how, "queue of %u, chained", disk.q.size);
			mix(how, 8, n);
		}
	}
	restart(0);
	refusals();
	digest = FNV_START;
	for (u64 at = 0; at < area; at += slots[0].sectors) {
		submit_now(BLOCK_READ, at, area - at < REQUEST_SECTORS ? area - at : REQUEST_SECTORS, 1, 1);
		drain(0);
		digest = fnv1a(digest, slots[0].data, slots[0].sectors * SECTOR);
	}
	good("reread", "every sector", 1);
	check(block_run(&disk, BLOCK_FLUSH, 0, NULL, 0) == BLOCK_OK, "flush", "at the end");
	printf("requests: %lu reads, %lu writes, %lu flushes, %lu discards, %lu write zeroes, %lu get id\n",
	       done[BLOCK_READ], done[BLOCK_WRITE], done[BLOCK_FLUSH], done[BLOCK_DISCARD],
	       done[BLOCK_WRITE_ZEROES], done[BLOCK_GET_ID]);
	printf("digest: %016lx of %lu sectors\n", digest, area);
}
