/*
 * spin: interrupts into a loop that makes no exit. At CPL 0, the PIT's ticks find the guest
 * wherever it is: in a loop of arithmetic, in a function's prologue, in the middle of a REP
 * string instruction. Each tick folds in where that was, so that the hash that is printed tells two
 * runs apart if one of them was interrupted an instruction earlier.
 *
 *	n=50     ticks
 *	hz=200   of them a second
 *	masked=N the loop does N of its rounds with interrupts off, in turns (default 0)
 *
 * It needs a VMM that can interrupt a guest between two exits, else it never ends.
 */
#include "rt.h"

#define PIT_IRQ 0

static volatile u64 hash = FNV_START, rounds;
static char from[512], to[512];

static void tick(struct regs *r)
{
	u64 where[] = { r->rip, r->rcx, r->rax, r->rflags & ~0x10000ul, r->rsp, rounds };

	hash = fnv1a(hash, where, sizeof where);
}

static __attribute__((noinline)) u64 step(u64 x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

static void copy(void)
{
	char *d = to, *s = from;
	u64 n = sizeof to;

	__asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
}

static u64 loop(void *arg)
{
	u64 until = *(u64 *)arg, masked = arg_number("masked", 0), x = 88172645463325252ul;

	__asm__ volatile("sti" : : : "memory");
	while (irq_count[PIC_VECTOR + PIT_IRQ] < until) {
		if (masked) {
			__asm__ volatile("cli" : : : "memory");
			for (u64 i = 0; i < masked; i++)
				x = step(x);
			__asm__ volatile("sti" : : : "memory");
		}
		for (int i = 0; i < 32; i++)
			x = step(x);
		from[x % sizeof from] ^= x;
		copy();
		rounds++;
	}
	__asm__ volatile("cli" : : : "memory");
	return x;
}

int main(struct boot *boot)
{
	u64 n = arg_number("n", 50), x;

	(void)boot;
	pic_init();
	lapic_init();
	pic_wire();
	irq_handle(PIC_VECTOR + PIT_IRQ, tick, EOI_PIC);
	pit_periodic(arg_number("hz", 200));
	pic_mask(PIT_IRQ, false);
	x = rt_cpl0(loop, &n);
	pic_mask(PIT_IRQ, true);
	printf("# rounds %lu x %016lx hash %016lx\n", rounds, x, hash);
	check(irq_count[PIC_VECTOR + PIT_IRQ] >= n, "spin", "%lu ticks", n);
	return finish();
}
