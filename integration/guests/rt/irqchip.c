/* 8259A pair, local APIC, I/O APIC, and the clocks that need no interrupt. */
#include "rt.h"

#define PIC1 0x20
#define PIC2 0xa0
#define ELCR1 0x4d0
#define ELCR2 0x4d1
#define ICW1_INIT_ICW4 0x11
#define ICW4_8086 0x01
#define OCW2_EOI 0x20
#define OCW3_READ_IRR 0x0a
#define OCW3_READ_ISR 0x0b
#define CASCADE 2

void pic_init(void)
{
	outb(PIC1, ICW1_INIT_ICW4);
	outb(PIC1 + 1, PIC_VECTOR);
	outb(PIC1 + 1, 1 << CASCADE);
	outb(PIC1 + 1, ICW4_8086);
	outb(PIC2, ICW1_INIT_ICW4);
	outb(PIC2 + 1, PIC_VECTOR + 8);
	outb(PIC2 + 1, CASCADE);
	outb(PIC2 + 1, ICW4_8086);
	outb(PIC1 + 1, (u8)~(1 << CASCADE));
	outb(PIC2 + 1, 0xff);
	outb(ELCR1, 0);
	outb(ELCR2, 0);
}

void pic_mask(int irq, bool masked)
{
	u16 port = (irq < 8 ? PIC1 : PIC2) + 1;
	u8 bit = 1 << (irq & 7), imr = inb(port);

	outb(port, masked ? imr | bit : imr & ~bit);
}

void pic_eoi(int irq)
{
	if (irq >= 8)
		outb(PIC2, OCW2_EOI);
	outb(PIC1, OCW2_EOI);
}

static u16 pic_register(u8 ocw3)
{
	outb(PIC1, ocw3);
	outb(PIC2, ocw3);
	return inb(PIC2) << 8 | inb(PIC1);
}

u16 pic_irr(void) { return pic_register(OCW3_READ_IRR); }
u16 pic_isr(void) { return pic_register(OCW3_READ_ISR); }

#define SVR_ENABLE 0x100

/* The 8259A is silent meanwhile: an interrupt of firmware's that is pending by LINT0
 * when that is masked makes QEMU deliver vector -1. */
void lapic_init(void)
{
	u8 imr = inb(PIC1 + 1);

	outb(PIC1 + 1, 0xff);
	irq_handle(LAPIC_SPURIOUS, NULL, EOI_NONE);
	lapic_write(LAPIC_DFR, 0xffffffff);
	lapic_write(LAPIC_LDR, 1u << 24);
	lapic_write(LAPIC_TPR, 0);
	lapic_write(LAPIC_SVR, SVR_ENABLE | LAPIC_SPURIOUS);
	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
	lapic_write(LAPIC_LVT_LINT0, LVT_MASKED);
	lapic_write(LAPIC_LVT_LINT1, LVT_MASKED);
	lapic_write(LAPIC_LVT_ERROR, LVT_MASKED);
	outb(PIC1 + 1, imr);
}

void pic_wire(void) { lapic_write(LAPIC_LVT_LINT0, LVT_EXTINT); }

bool lapic_bit(u32 reg, u8 vector)
{
	return lapic_read(reg + vector / 32 * 0x10) >> (vector % 32) & 1;
}

#define IOREGSEL 0x00
#define IOWIN 0x10
#define REDIR_FIRST 0x10

u32 ioapic_read(u8 index)
{
	mmio_write32(IOAPIC_BASE + IOREGSEL, index);
	return mmio_read32(IOAPIC_BASE + IOWIN);
}

void ioapic_write(u8 index, u32 v)
{
	mmio_write32(IOAPIC_BASE + IOREGSEL, index);
	mmio_write32(IOAPIC_BASE + IOWIN, v);
}

/* Masked while its two halves do not belong together. */
void ioapic_route(int pin, u32 entry)
{
	ioapic_write(REDIR_FIRST + 2 * pin, REDIR_MASKED);
	ioapic_write(REDIR_FIRST + 2 * pin + 1, 0);
	ioapic_write(REDIR_FIRST + 2 * pin, entry);
}

u32 ioapic_entry(int pin) { return ioapic_read(REDIR_FIRST + 2 * pin); }

/* ---- PIT and PM timer ---- */

#define PIT_CHANNEL0 0x40
#define PIT_MODE 0x43
#define PIT_LOW_HIGH 0x30
#define PORT61 0x61
#define PORT61_GATE2 0x01
#define PORT61_SPEAKER 0x02
#define PORT61_OUT2 0x20

void pit_periodic(u32 hz)
{
	u32 count = PIT_HZ / hz;

	outb(PIT_MODE, PIT_LOW_HIGH | 2 << 1);
	outb(PIT_CHANNEL0, count);
	outb(PIT_CHANNEL0, count >> 8);
}

void pit_one_shot(u16 ticks)
{
	outb(PIT_MODE, PIT_LOW_HIGH);
	outb(PIT_CHANNEL0, ticks);
	outb(PIT_CHANNEL0, ticks >> 8);
}

u16 pit_read(int channel)
{
	u8 low;

	outb(PIT_MODE, channel << 6);
	low = inb(PIT_CHANNEL0 + channel);
	return inb(PIT_CHANNEL0 + channel) << 8 | low;
}

/* Channel 2 in mode 0: OUT goes high when the count has run out. */
static void pit_delay(u16 ticks)
{
	outb(PORT61, (inb(PORT61) & ~PORT61_SPEAKER) | PORT61_GATE2);
	outb(PIT_MODE, 2 << 6 | PIT_LOW_HIGH);
	outb(PIT_CHANNEL0 + 2, ticks);
	outb(PIT_CHANNEL0 + 2, ticks >> 8);
	while (!(inb(PORT61) & PORT61_OUT2))
		;
}

#define PIIX4_PM 0x7113
#define PIIX4_PMBASE 0x40
#define PIIX4_PMREGMISC 0x80
#define PM_TMR 8

u16 pmtimer_port(void)
{
	static u16 port;
	struct acpi_fadt *fadt;
	struct pci pm;

	if (port)
		return port;
	fadt = (void *)acpi_table("FACP");
	if (fadt)
		return port = fadt->pm_tmr;
	if (!pci_find(0x8086, PIIX4_PM, 0, &pm))
		return 0;
	if (!(pci_read8(&pm, PIIX4_PMREGMISC) & 1)) {
		pci_write32(&pm, PIIX4_PMBASE, 0x601);
		pci_write8(&pm, PIIX4_PMREGMISC, 1);
	}
	return port = (pci_read32(&pm, PIIX4_PMBASE) & 0xffc0) + PM_TMR;
}

u32 pmtimer_read(void) { return inl(pmtimer_port()) & 0xffffff; }

void delay_us(u32 us)
{
	u64 left;
	u32 last;

	if (!pmtimer_port()) {
		for (; us > 10000; us -= 10000)
			pit_delay(PIT_HZ / 100);
		pit_delay((u64)us * PIT_HZ / 1000000 + 1);
		return;
	}
	left = (u64)us * PMTIMER_HZ / 1000000 + 1;
	last = pmtimer_read();
	for (;;) {
		u32 now = pmtimer_read(), passed = (now - last) & 0xffffff;

		if (passed >= left)
			return;
		left -= passed;
		last = now;
	}
}
