/*
 * storm: exits as fast as they come.
 *
 *	mode=pio    OUT and IN on the POST port, alternating
 *	mode=mmio   reads of the local and I/O APIC's version registers, and writes
 *	            of the I/O APIC's index register
 *	mode=msr    RDMSR of IA32_APIC_BASE; always at CPL 0
 *	mode=hlt    HLT until the next PIT interrupt (hz=1000 of them a second)
 *	mode=all    all of these (default)
 *	mode=clock  reads of the PM timer, whose values differ from run to run
 *	mode=first  nothing but exit status 0, as soon as main runs
 *	n=N         accesses, each of which is one exit (default 1000); for hlt,
 *	            halts
 *	cpl=0|3     where the loop runs (default 3)
 *
 * Every value read is folded into a hash, so that a lost or repeated access
 * shows in the line that is printed. The remark before a loop tells whoever takes
 * the time when it begins.
 */
#include "rt.h"

#define POST_PORT 0x80
#define IA32_APIC_BASE 0x1b
#define IOAPIC_INDEX_VERSION 1

struct storm {
	u64 n, hash;
};

static u64 pio(void *p)
{
	struct storm *s = p;

	for (u64 i = 0; i < s->n; i++)
		if (i & 1)
			s->hash = (s->hash ^ inb(POST_PORT)) * 31;
		else
			outb(POST_PORT, i >> 1);
	return 0;
}

static u64 mmio(void *p)
{
	struct storm *s = p;

	for (u64 i = 0; i < s->n; i++)
		switch (i % 3) {
		case 0:
			s->hash = (s->hash ^ lapic_read(LAPIC_VERSION)) * 31;
			break;
		case 1:
			mmio_write32(IOAPIC_BASE, IOAPIC_INDEX_VERSION);
			break;
		case 2:
			s->hash = (s->hash ^ mmio_read32(IOAPIC_BASE + 0x10)) * 31;
			break;
		}
	return 0;
}

static u64 msr(void *p)
{
	struct storm *s = p;

	for (u64 i = 0; i < s->n; i++) {
		u32 low, high;

		__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(IA32_APIC_BASE));
		s->hash = (s->hash ^ low ^ high) * 31;
	}
	return 0;
}

static u64 clock(void *p)
{
	struct storm *s = p;
	u16 port = pmtimer_port();

	for (u64 i = 0; i < s->n; i++)
		s->hash = (s->hash ^ inl(port)) * 31;
	return 0;
}

static u64 hlt(void *p)
{
	struct storm *s = p;

	pic_init();
	lapic_init();
	pic_wire();
	irq_handle(PIC_VECTOR, NULL, EOI_PIC);
	pit_periodic(arg_number("hz", 1000));
	pic_mask(0, false);
	for (u64 i = 0; i < s->n; i++) {
		u64 before = irq_count[PIC_VECTOR];

		irq_wait(PIC_VECTOR, before + 1);
		s->hash = (s->hash ^ (irq_count[PIC_VECTOR] != before)) * 31;
	}
	pic_mask(0, true);
	return 0;
}

static const struct {
	const char *name;
	u64 (*fn)(void *);
	int cpl; /* where it must run, or -1 */
	bool alone; /* not one of "all" */
} modes[] = {
	{ "pio", pio, -1, false },
	{ "mmio", mmio, -1, false },
	{ "msr", msr, 0, false },
	{ "hlt", hlt, 3, false },
	{ "clock", clock, -1, true },
};

int main(struct boot *boot)
{
	const char *mode = arg("mode");
	u64 cpl = arg_number("cpl", 3);
	bool all = !mode || !strcmp(mode, "all"), any = false;

	(void)boot;
	if (mode && !strcmp(mode, "first"))
		return 0;
	for (u32 i = 0; i < ARRAY_LEN(modes); i++) {
		struct storm s = { .n = arg_number("n", 1000), .hash = FNV_START };
		u64 level = modes[i].cpl < 0 ? cpl : (u64)modes[i].cpl;

		if (all ? modes[i].alone : strcmp(mode, modes[i].name) != 0)
			continue;
		any = true;
		printf("# storm %s\n", modes[i].name);
		if (level == 0)
			rt_cpl0(modes[i].fn, &s);
		else
			modes[i].fn(&s);
		check(true, modes[i].name, "n %lu cpl %lu hash %016lx", s.n, level, s.hash);
	}
	if (!any)
		check(false, "mode", "%s: no such mode", mode);
	return finish();
}
