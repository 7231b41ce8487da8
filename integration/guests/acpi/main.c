/*
 * acpi: the tables, and the fixed hardware that they describe.
 *
 *	dump          every table in hexadecimal, for a host program to compare:
 *	              "hex NAME OFFSET BYTES", 32 bytes a line
 *	timer         wait for the PM timer's status bit: up to 2.4 s with a timer
 *	              of 24 bits (QEMU), 10 minutes with one of 32 (ftvmm)
 *	wait=power    print "waiting for the power button", wait for it by SCI
 *	off           end by S5 rather than by the debug exit
 *	reset=cf9|kbd|triple
 *	              reset once, by the port, the keyboard controller or a triple
 *	              fault; the second time round is told by a byte of CMOS
 */
#include "rt.h"

static struct acpi_fadt *fadt;

/* ---- tables ---- */

static void dump(const char *signature, const void *data, u32 length)
{
	const u8 *p = data;
	char name[5] = { signature[0], signature[1], signature[2], signature[3] };

	for (u32 i = 0; i < length; i += 32) {
		printf("hex %s %04x ", name, i);
		for (u32 j = i; j < i + 32 && j < length; j++)
			printf("%02x", p[j]);
		printf("\n");
	}
}

/* Tables lie in memory that the map does not call RAM. */
static bool reserved(u64 address, u64 size)
{
	for (u32 i = 0; i < rt_boot.mem_count; i++) {
		struct mem_range *m = &rt_boot.mem[i];

		if (m->type == MEM_RAM && address < m->start + m->size && m->start < address + size)
			return false;
	}
	return true;
}

static void table(struct acpi_header *t, u32 index)
{
	char name[24];

	snprintf(name, sizeof name, "table-%c%c%c%c", t->signature[0], t->signature[1], t->signature[2], t->signature[3]);
	check(byte_sum(t, t->length) == 0, name, "sum");
	check(reserved((u64)t, t->length), name, "outside of RAM that is free");
	printf("# table %u %s length %u revision %u\n", index, name + 6, t->length, t->revision);
	if (arg("dump"))
		dump(t->signature, t, t->length);
}

static bool tables(void)
{
	u8 *rsdp = acpi_rsdp();
	struct acpi_header *root, *dsdt, *facs;
	const char *which;
	u32 entry;

	if (!check(rsdp != NULL, "rsdp", "found"))
		return false;
	check(byte_sum(rsdp, 20) == 0, "rsdp-sum", "first 20 bytes");
	if (rsdp[15] >= 2)
		check(byte_sum(rsdp, 36) == 0, "rsdp-extended-sum", "all 36 bytes");
	if (arg("dump"))
		dump("RSDP", rsdp, rsdp[15] >= 2 ? 36 : 20);
	which = acpi_table("XSDT") ? "XSDT" : "RSDT";
	entry = which[0] == 'X' ? 8 : 4;
	root = acpi_table(which);
	table(root, 0);
	for (u32 i = 0; i < (root->length - sizeof *root) / entry; i++) {
		u64 at = 0;

		memcpy(&at, (u8 *)(root + 1) + i * entry, entry);
		table((void *)at, i + 1);
	}
	fadt = (void *)acpi_table("FACP");
	dsdt = acpi_table("DSDT");
	facs = acpi_table("FACS");
	if (!check(fadt && dsdt && facs && acpi_table("APIC"), "tables", "FADT, DSDT, FACS and MADT"))
		return false;
	table(dsdt, 0);
	check(!memcmp(facs->signature, "FACS", 4) && facs->length >= 64 && ((u64)facs & 63) == 0, "facs",
	      "length %u, aligned", facs->length);
	if (arg("dump"))
		dump("FACS", facs, facs->length);
	return true;
}

/* ---- MADT ---- */

static void madt(void)
{
	struct acpi_header *t = acpi_table("APIC");
	u8 *p = (u8 *)(t + 1) + 8, *end = (u8 *)t + t->length;
	u32 cpus = 0, ioapics = 0;
	bool pit = false, sane = true;

	while (sane && p + 2 <= end) {
		sane = p[1] >= 2 && p + p[1] <= end;
		if (p[0] == 0 && (p[4] & 1))
			cpus++;
		if (p[0] == 1)
			ioapics += *(u32 *)(p + 4) == IOAPIC_BASE;
		if (p[0] == 2 && p[3] == 0)
			pit = *(u32 *)(p + 4) == 2;
		p += p[1];
	}
	check(sane && p == end, "madt", "entries fill the table");
	check(cpus >= 1, "madt-cpus", "%u", cpus);
	check(ioapics == 1, "madt-ioapic", "at %#lx", IOAPIC_BASE);
	check(pit, "madt-override", "IRQ 0 is pin 2");
	check(*(u32 *)(t + 1) == LAPIC_BASE, "madt-lapic", "at %#lx", LAPIC_BASE);
}

/* ---- fixed hardware ---- */

enum { PM1_TMR = 1 << 0, PM1_GBL = 1 << 5, PM1_PWRBTN = 1 << 8, PM1_SLPBTN = 1 << 9, PM1_RTC = 1 << 10 };
#define SCI_EN 1
#define SCI_VECTOR 0x60

static u16 status(void) { return inw(fadt->pm1a_evt); }
static void clear(u16 bits) { outw(fadt->pm1a_evt, bits); }
static void enable(u16 bits) { outw(fadt->pm1a_evt + fadt->pm1_evt_len / 2, bits); }

static void acpi_mode(void)
{
	if (fadt->smi_cmd) {
		outb(fadt->smi_cmd, fadt->acpi_disable);
		check((inw(fadt->pm1a_cnt) & SCI_EN) == 0, "acpi-disable", "SCI_EN clear");
		outb(fadt->smi_cmd, fadt->acpi_enable);
	}
	check(inw(fadt->pm1a_cnt) & SCI_EN, "acpi-enable", "SCI_EN set");
}

/* An interrupt by the I/O APIC, level, so that it comes again until its cause is gone. */
static volatile u16 sci_status;

static void sci(struct regs *r)
{
	(void)r;
	sci_status |= status();
	clear(sci_status);
}

static void sci_init(void)
{
	lapic_init();
	irq_handle(SCI_VECTOR, sci, EOI_LAPIC);
	ioapic_route(fadt->sci_int, REDIR_LEVEL | SCI_VECTOR);
}

static void events(void)
{
	enable(0);
	clear(0xffff);
	check((status() & (PM1_PWRBTN | PM1_SLPBTN | PM1_RTC | PM1_GBL)) == 0, "pm1-status", "clear after writing ones");
	enable(PM1_PWRBTN);
	check(inw(fadt->pm1a_evt + fadt->pm1_evt_len / 2) == PM1_PWRBTN, "pm1-enable", "reads back");
	enable(0);
	check(fadt->pm_tmr && fadt->pm_tmr_len == 4, "pm-timer", "4 bytes");
	check(pmtimer_read() != 0 || pmtimer_read() != 0, "pm-timer-runs", "not stuck at 0");
	if (arg("timer")) {
		sci_init();
		sci_status = 0;
		enable(PM1_TMR);
		while (!(sci_status & PM1_TMR))
			rt_wait();
		enable(0);
		check(true, "pm1-timer", "SCI when the highest bit changed");
	}
}

static void power_button(void)
{
	sci_init();
	sci_status = 0;
	enable(PM1_PWRBTN);
	printf("waiting for the power button\n");
	while (!(sci_status & PM1_PWRBTN))
		rt_wait();
	enable(0);
	check(true, "power-button", "pressed");
	check((status() & PM1_PWRBTN) == 0, "power-button-status", "cleared");
}

/* ---- reset ---- */

#define CMOS_MARK 0x70 /* a byte that firmware leaves alone */
#define MARK 0xa5

static u8 cmos(void)
{
	outb(0x70, CMOS_MARK);
	return inb(0x71);
}

static void cmos_set(u8 v)
{
	outb(0x70, CMOS_MARK);
	outb(0x71, v);
}

static u64 triple_fault(void *unused)
{
	static const struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) empty;

	(void)unused;
	__asm__ volatile("lidt %0; ud2" : : "m"(empty));
	return 0;
}

static void reset(const char *how)
{
	if (cmos() == MARK) {
		cmos_set(0);
		check(true, "reset", "%s: started again", how);
		return;
	}
	cmos_set(MARK);
	printf("resetting by %s\n", how);
	if (!strcmp(how, "cf9")) {
		outb(0xcf9, 0x02);
		outb(0xcf9, 0x06);
	} else if (!strcmp(how, "kbd")) {
		outb(0x64, 0xfe);
	} else if (!strcmp(how, "triple")) {
		rt_cpl0(triple_fault, NULL);
	}
	delay_us(1000000);
	cmos_set(0);
	check(false, "reset", "%s: still here", how);
}

int main(struct boot *boot)
{
	(void)boot;
	if (arg("reset")) {
		reset(arg("reset"));
		return finish();
	}
	if (!tables())
		return finish();
	madt();
	acpi_mode();
	events();
	if (arg_is("wait", "power"))
		power_button();
	if (arg("off") && finish() == 0) {
		printf("off\n");
		power_off();
		delay_us(1000000);
		check(false, "off", "still on");
	}
	return finish();
}
