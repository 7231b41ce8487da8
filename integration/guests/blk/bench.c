/* mode=bench: a number of random requests, always qd of them in flight. */
#include "blk/blk.h"

enum { MAX_DEPTH = 256, MAX_BYTES = 1 << 20, CLOCK_EVERY = 256 /* requests; the timer wraps after 4.6 s */ };

void bench(void)
{
	static struct block_request requests[MAX_DEPTH], *r;
	u64 n = arg_number("n", 1000), depth = arg_number("qd", 1), bytes = arg_number("bs", 4096);
	bool write = arg_is("op", "write");
	u64 blocks, issued = 0, done = 0, failed = 0, ticks = 0, interrupts = irq_count[disk.q.vector];
	u32 last;
	u8 *data;

	area = arg_number("sectors", disk.sectors);
	if (!check(depth >= 1 && depth <= MAX_DEPTH && bytes % SECTOR == 0 && bytes >= SECTOR && bytes <= MAX_BYTES &&
		   area * SECTOR >= bytes && area <= disk.sectors, "arguments", "qd=%lu bs=%lu sectors=%lu", depth, bytes, area))
		return;
	blocks = area * SECTOR / bytes;
	data = page_alloc((depth * bytes + PAGE_SIZE - 1) / PAGE_SIZE);
	for (u64 i = 0; i < depth * bytes; i += 8)
		*(u64 *)(data + i) = random();
	printf("bench start\n");
	last = pmtimer_read();
	while (done < n) {
		while (issued < n && issued - done < depth) {
			u64 slot = issued < depth ? issued : (u64)(r - requests);
			struct segment s = { data + slot * bytes, bytes };

			if (!block_submit(&disk, &requests[slot], write ? BLOCK_WRITE : BLOCK_READ,
					  below(blocks) * (bytes / SECTOR), &s, 1))
				break;
			issued++;
		}
		if (!virtq_pending(&disk.q)) {
			virtq_kick(&disk.q);
			virtq_sleep(&disk.q);
		}
		r = block_pop(&disk);
		failed += r->status != BLOCK_OK;
		if (++done % CLOCK_EVERY == 0 || done == n) {
			u32 now = pmtimer_read();

			ticks += (now - last) & 0xffffff;
			last = now;
		}
	}
	printf("bench done op=%s qd=%lu bs=%lu ops=%lu\n", write ? "write" : "read", depth, bytes, done);
	printf("# bench us=%lu kicks=%lu interrupts=%lu\n", ticks * 1000000 / PMTIMER_HZ, disk.q.kicks,
	       irq_count[disk.q.vector] - interrupts);
	check(!failed, "bench", "%lu requests failed", failed);
}
