/*
 * compute: a long run at CPL 3 that writes much memory and makes few exits.
 *
 *	size=16m      bytes of memory, all written in each round
 *	rounds=4      rounds
 *	exit_every=N  an OUT to the POST port after each N words (default 0: none)
 *	report=K      a line with the running checksum after each K rounds (default
 *	              0: none)
 *	hz=N          the PIT interrupts the run N times a second, N from 19 (default 0: not
 *	              at all)
 *
 * The checksum depends on each word of each round. A second sum is kept in an XMM
 * register only, which nothing else uses: vector state that was lost on the way to another
 * host shows as a difference between the two.
 */
#include "rt.h"

#define POST_PORT 0x80
#define PIT_IRQ 0

/* -mgeneral-regs-only keeps the compiler away from XMM15. */
static void vector_clear(void) { __asm__ volatile("pxor %xmm15, %xmm15"); }
static void vector_add(u64 v) { __asm__ volatile("movq %0, %%xmm14; paddq %%xmm14, %%xmm15" : : "r"(v)); }
static u64 vector_sum(void) { u64 v; __asm__ volatile("movq %%xmm15, %0" : "=r"(v)); return v; }

static void tick_at(u32 hz)
{
	pic_init();
	lapic_init();
	pic_wire();
	irq_handle(PIC_VECTOR + PIT_IRQ, NULL, EOI_PIC);
	pit_periodic(hz);
	pic_mask(PIT_IRQ, false);
	rt_interrupts(true);
}

static u64 mix(u64 x)
{
	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9ul;
	return x ^ x >> 32;
}

int main(struct boot *boot)
{
	u64 size = arg_number("size", 16 << 20), rounds = arg_number("rounds", 4);
	u64 every = arg_number("exit_every", 0), report = arg_number("report", 0);
	u64 pages = (size + PAGE_SIZE - 1) / PAGE_SIZE, words = pages * PAGE_SIZE / sizeof(u64);
	u64 *memory = page_alloc(pages), sum = 0, carry = 1, until_exit = every;

	(void)boot;
	if (arg("hz"))
		tick_at(arg_number("hz", 0));
	vector_clear();
	for (u64 round = 1; round <= rounds; round++) {
		for (u64 i = 0; i < words; i++) {
			carry = mix(memory[i] ^ carry ^ (round << 32 | i));
			memory[i] = carry;
			sum += carry;
			vector_add(carry);
			if (every && --until_exit == 0) {
				outb(POST_PORT, carry);
				until_exit = every;
			}
		}
		if (report && round % report == 0)
			printf("round %lu sum %016lx\n", round, sum);
	}
	rt_interrupts(false);
	check(vector_sum() == sum, "vector", "%016lx", vector_sum());
	check(true, "compute", "pages %lu rounds %lu sum %016lx memory %016lx", pages, rounds, sum,
	      fnv1a(FNV_START, memory, words * sizeof(u64) > 1 << 20 ? 1 << 20 : words * sizeof(u64)));
	return finish();
}
