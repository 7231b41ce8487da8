/*
 * blk: tests a virtio-blk disk.
 *
 *	mode=verify [seed=N] [n=OPS] [sectors=N] [serial=TEXT]
 *	    random requests of every kind, and every sector checked against what it must hold
 *	mode=bench op=read|write [qd=N] [n=OPS] [bs=BYTES] [sectors=N] [seed=N]
 *	    random requests as fast as they go
 *	mode=hostile
 *	    requests that break the rules: the device must refuse them, and work after a reset
 *
 * and the words of virtio.h. Modes but bench write to a disk that is not read-only.
 */
#include "blk/blk.h"

struct block disk;
u64 area;
static u64 state;

u64 random(void)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return state * 0x2545f4914f6cdd1d;
}

u64 below(u64 n) { return (random() >> 32) * n >> 32; }

int main(struct boot *boot)
{
	(void)boot;
	state = arg_number("seed", 1) * 0x9e3779b97f4a7c15 | 1;
	if (!check(block_find(&disk, 0) && block_start(&disk, 0), "start", "disk found and started"))
		return finish();
	area = arg_number("sectors", 16384);
	if (area > disk.sectors)
		area = disk.sectors;
	printf("# disk: %lu sectors, features %#lx of %#lx, queue %u, %s %s%s\n", disk.sectors, disk.dev.features,
	       disk.dev.offered, disk.q.size, disk.dev.legacy ? "legacy" : "modern",
	       disk.dev.irq == IRQ_MSIX ? "msix" : disk.dev.irq == IRQ_INTX ? "intx" : "poll",
	       disk.read_only ? " read-only" : "");
	if (arg_is("mode", "bench"))
		bench();
	else if (arg_is("mode", "hostile"))
		hostile();
	else
		verify();
	return finish();
}
