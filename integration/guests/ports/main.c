/*
 * ports: a hostile guest. It touches every I/O port in every size, string I/O with
 * awkward memory operands, and memory addresses where nothing or something odd
 * is, and claims only that the VM is still there and sane afterwards.
 *
 *	from=0 to=0xffff  the ports
 *	cpl=0|3           where the port loops run (default 3)
 *	value=V           only this value is written, rather than 0 and all ones
 *
 * Left out are the ports whose effect is to end the machine or this guest's view of it:
 * see skipped[].
 */
#include "rt.h"

static struct {
	u16 first, last;
	const char *why;
} skipped[] = {
	{ 0x60, 0x60, "the keyboard controller's output port has the reset line" },
	{ 0x64, 0x64, "the same, and the pulse commands" },
	{ 0x92, 0x92, "fast reset" },
	{ 0xb2, 0xb3, "SMI command: ACPI mode" },
	{ 0xf4, 0xf7, "debug exit" },
	{ 0x3f8, 0x3ff, "our console" },
	{ 0x402, 0x402, "the debug console" },
	{ 0x514, 0x51b, "fw_cfg DMA: writes guest memory" },
	{ 0xcf9, 0xcf9, "reset control" },
	{ 0, 0, "PM1 control, filled in by main" },
};

/* An access past port 0xffff wraps at CPL 0 and is #GP at CPL 3: left out too. */
static bool skip(u32 port, u32 size)
{
	if (port + size > 0x10000)
		return true;
	for (u32 i = 0; i < ARRAY_LEN(skipped); i++)
		if (port <= skipped[i].last && port + size > skipped[i].first)
			return true;
	return false;
}

struct sweep {
	u32 from, to, write, accesses;
};

static u64 read_all(void *p)
{
	struct sweep *s = p;

	for (u32 port = s->from; port <= s->to; port++) {
		if (!skip(port, 1))
			inb(port), s->accesses++;
		if (!skip(port, 2))
			inw(port), s->accesses++;
		if (!skip(port, 4))
			inl(port), s->accesses++;
	}
	return 0;
}

static u64 write_all(void *p)
{
	struct sweep *s = p;

	for (u32 port = s->from; port <= s->to; port++) {
		if (!skip(port, 1))
			outb(port, s->write), s->accesses++;
		if (!skip(port, 2))
			outw(port, s->write), s->accesses++;
		if (!skip(port, 4))
			outl(port, s->write), s->accesses++;
	}
	return 0;
}

static void sweep(const char *name, u64 (*fn)(void *), u32 value)
{
	struct sweep s = { arg_number("from", 0), arg_number("to", 0xffff), value, 0 };

	if (arg_number("cpl", 3) == 0)
		rt_cpl0(fn, &s);
	else
		fn(&s);
	check(true, name, "%u accesses", s.accesses);
}

/* ---- string I/O ---- */

#define POST_PORT 0x80
#define EMPTY_PORT 0x0e80 /* nobody's */

static void strings(void)
{
	u8 *pages = page_alloc(3);
	bool ones = true, kept = true;

	memset(pages, 0x55, 3 * PAGE_SIZE);
	insb(EMPTY_PORT, pages + PAGE_SIZE - 5, 10); /* across a page */
	insw(EMPTY_PORT, pages + 2 * PAGE_SIZE - 5, 5);
	insl(EMPTY_PORT, pages + 100, 7);
	for (u32 i = 0; i < 10; i++) {
		ones &= pages[PAGE_SIZE - 5 + i] == 0xff;
		ones &= pages[2 * PAGE_SIZE - 5 + i] == 0xff;
	}
	for (u32 i = 0; i < 28; i++)
		ones &= pages[100 + i] == 0xff;
	kept &= pages[PAGE_SIZE - 6] == 0x55 && pages[PAGE_SIZE + 5] == 0x55;
	kept &= pages[2 * PAGE_SIZE - 6] == 0x55 && pages[2 * PAGE_SIZE + 5] == 0x55;
	kept &= pages[99] == 0x55 && pages[128] == 0x55;
	check(ones, "string-in", "an empty port reads all ones, across pages");
	check(kept, "string-in-bounds", "no byte more");
	insb(EMPTY_PORT, pages, 0);
	outsb(POST_PORT, pages, 0);
	outsb(POST_PORT, pages + PAGE_SIZE - 500, 1000);
	outsw(POST_PORT, pages + PAGE_SIZE - 501, 500);
	outsl(POST_PORT, pages + PAGE_SIZE - 502, 250);
	check(true, "string-out", "across pages");

	/* Downwards. */
	memset(pages, 0x55, PAGE_SIZE);
	{
		void *to = pages + 15;
		u64 n = 8;

		__asm__ volatile("std; rep insb; cld" : "+D"(to), "+c"(n) : "d"(EMPTY_PORT) : "memory");
	}
	check(pages[7] == 0x55 && pages[8] == 0xff && pages[15] == 0xff && pages[16] == 0x55, "string-down", "8 bytes");
}

/* ---- memory ---- */

#define HOLE 0xd8000000ul   /* between RAM and devices, nobody's */

static void hole_access(void *p)
{
	u64 a = (u64)p;

	mmio_write8(a, 0xff);
	mmio_write16(a, 0);
	mmio_write32(a, 0xffffffff);
	mmio_write64(a, -1ul);
	mmio_read8(a);
	mmio_read16(a);
	mmio_read32(a);
	mmio_read64(a);
}

static void holes(void)
{
	static const u64 edges[] = {
		HOLE, HOLE + 1, HOLE + 0xfff, HOLE + 0xffd, IOAPIC_BASE - 8, IOAPIC_BASE + 0x100, IOAPIC_BASE + 0xffc,
		0xfed00000, 0xfed40000, LAPIC_BASE - 8, LAPIC_BASE + 0x1000, 0xfffffff0, 0xfffffffc,
	};
	u64 a = HOLE;
	int faults = 0;

	printf("# hole reads %#x\n", mmio_read32(HOLE)); /* all ones on a PC; QEMU says 0 */
	for (u32 i = 0; i < ARRAY_LEN(edges); i++)
		faults += rt_try(hole_access, (void *)(edges[i] & ~7ul)) >= 0;
	for (u32 i = 0; i < 64; i++, a += 0x10c1)
		faults += rt_try(hole_access, (void *)a) >= 0;
	check(faults == 0, "hole-accesses", "all sizes, aligned or not");
	memset((void *)(HOLE + 100), 0, 64); /* REP STOS to nowhere */
	insb(EMPTY_PORT, (void *)HOLE, 16);  /* port to device memory */
	outsb(POST_PORT, (void *)HOLE, 16);
	check(true, "hole-strings", "REP STOS, INS and OUTS");
}

/* Reads of the interrupt controllers in sizes that they do not have; the answer is
 * nobody's promise. */
static void odd_sizes(void)
{
	u32 version = lapic_read(LAPIC_VERSION), io = ioapic_read(1);

	for (u32 reg = 0; reg < 0x400; reg += 0x10) {
		lapic_read(reg);
		mmio_read8(LAPIC_BASE + reg);
		mmio_read16(LAPIC_BASE + reg + 1);
		mmio_read64(LAPIC_BASE + reg);
	}
	for (u32 reg = 0; reg < 256; reg++) {
		ioapic_read(reg);
		mmio_read8(IOAPIC_BASE + reg);
		mmio_read64(IOAPIC_BASE + (reg & ~7u));
	}
	mmio_write8(IOAPIC_BASE, 1);
	for (u32 reg = 0x400; reg < 0x1000; reg += 0x10)
		mmio_write32(LAPIC_BASE + reg, 0xffffffff);
	check(lapic_read(LAPIC_VERSION) == version, "lapic", "still there");
	check(ioapic_read(1) == io, "ioapic", "still there");
}

/* What a fault leaves behind: nothing. */
static void bad_instruction(void *unused)
{
	(void)unused;
	__asm__ volatile("movq %0, %%cr3" : : "r"(0ul));
}

static void bad_address(void *unused)
{
	(void)unused;
	outsb(POST_PORT, (void *)0x7f0000000000, 4); /* not mapped */
}

int main(struct boot *boot)
{
	struct acpi_fadt *fadt = (void *)acpi_table("FACP");
	/* PM1 control lies before the PM timer in PIIX4's block. */
	u16 pm1 = fadt ? fadt->pm1a_cnt : pmtimer_port() - 4u;

	(void)boot;
	skipped[ARRAY_LEN(skipped) - 1].first = pm1;
	skipped[ARRAY_LEN(skipped) - 1].last = pm1 + 1;
	lapic_init();
	strings();
	holes();
	odd_sizes();
	check(rt_try(bad_instruction, NULL) == 13, "cpl3", "loading CR3 is #GP");
	check(rt_try(bad_address, NULL) == 14, "string-fault", "OUTS from nowhere is #PF");
	sweep("in", read_all, 0);
	if (arg("value")) {
		sweep("out", write_all, arg_number("value", 0));
	} else {
		sweep("out-zeros", write_all, 0);
		sweep("out-ones", write_all, 0xffffffff);
	}
	check(inb(EMPTY_PORT) == 0xff, "alive", "the last line");
	return finish();
}
