/*
 * irq: the interrupt controllers, told as ordered traces.
 *
 * Each test raises interrupts while they are off, opens a window in which they may be
 * taken, and compares the trace that the handlers wrote with what the datasheets
 * (8259A, 82093AA, Intel SDM vol. 3 chapter 11) ask for. A trace names the vectors
 * in order of delivery; "24{ 20 24}" is a handler for 0x24 that was interrupted by
 * 0x20. No line depends on time: the output is the same each run.
 *
 * Sources. COM1's transmitter-empty interrupt is a level that the guest raises and
 * drops at will (IRQ 4). The PIT in mode 0 and the RTC's periodic interrupt are
 * waited for in the IRR before the window opens (IRQ 0 and 8). The local APIC
 * sends to itself.
 *
 *	only=NAME	one test
 */
#include "rt.h"

/* ---- trace ---- */

static char trace[256];
static u32 trace_length;

static void trace_clear(void) { trace_length = trace[0] = 0; }

static void note(const char *format, u32 v)
{
	if (trace_length && trace_length < sizeof trace - 16)
		trace[trace_length++] = ' ';
	if (trace_length < sizeof trace - 16)
		trace_length += snprintf(trace + trace_length, 16, format, v);
}

static void expect(const char *name, const char *want)
{
	if (!strcmp(trace, want))
		check(true, name, "%s", trace[0] ? trace : "(nothing)");
	else
		check(false, name, "%s, want %s", trace[0] ? trace : "(nothing)", want[0] ? want : "(nothing)");
}

/* ---- windows ---- */

#define POST_PORT 0x80
#define WINDOW_EXITS 12

/* window lets interrupts in, at CPL 0. A VMM may deliver only at an exit, so it
 * makes some; more than any test has interrupts. */
static void window(void)
{
	__asm__ volatile("sti" : : : "memory");
	for (int i = 0; i < WINDOW_EXITS; i++)
		inb(POST_PORT);
	__asm__ volatile("cli" : : : "memory");
}

static u64 window_at_cpl0(void *unused)
{
	(void)unused;
	window();
	return 0;
}

/* From CPL 3. */
static void open_window(void) { rt_cpl0(window_at_cpl0, NULL); }

/* ---- sources ---- */

#define COM1 0x3f8
enum { COM_IER = 1, COM_IIR = 2 };
#define IER_THRI 2
#define IRQ_PIT 0
#define IRQ_COM 4
#define IRQ_RTC 8

/* The transmitter is empty while nothing is printed, so enabling its interrupt raises
 * the line and disabling drops it; it must be off when a test prints. */
static void com_raise(void) { outb(COM1 + COM_IER, IER_THRI); }
static void com_drop(void) { outb(COM1 + COM_IER, 0); }

static void wait_irr(int irq)
{
	while (!(pic_irr() & 1 << irq))
		;
}

static void pit_raise(void)
{
	pit_one_shot(100);
	wait_irr(IRQ_PIT);
}

/* Mode 0 with no count: the output goes low. */
static void pit_drop(void) { outb(0x43, 0x30); }

static u8 rtc(u8 reg)
{
	outb(0x70, reg);
	return inb(0x71);
}

static void rtc_set(u8 reg, u8 v)
{
	outb(0x70, reg);
	outb(0x71, v);
}

static void rtc_raise(void)
{
	rtc_set(0xa, 0x26); /* 1024 Hz */
	rtc(0xc);
	rtc_set(0xb, 0x42); /* periodic interrupt, 24 h */
	wait_irr(IRQ_RTC);
	rtc_set(0xa, 0x20); /* no more: QEMU takes each for an edge, though the line is up */
}

static void rtc_drop(void)
{
	rtc_set(0xb, 0x02);
	rtc(0xc);
}

/* ---- PIC ---- */

#define PIC1 0x20
#define PIC2 0xa0
#define ELCR1 0x4d0
enum {
	OCW2_EOI = 0x20, OCW2_SPECIFIC_EOI = 0x60, OCW2_ROTATE_EOI = 0xa0, OCW2_SET_PRIORITY = 0xc0,
	OCW3_POLL = 0x0c,
};
#define V(irq) (PIC_VECTOR + (irq))

static void plain(struct regs *r) { note("%x", r->vector); }

/* COM1's handler that also drops the line. */
static void plain_com(struct regs *r)
{
	note("%x", r->vector);
	com_drop();
}

static void plain_rtc(struct regs *r)
{
	note("%x", r->vector);
	rtc_drop();
}

static void pic_reset(void)
{
	com_drop();
	pit_drop();
	rtc_drop();
	pic_init();
	pic_wire();
	for (int irq = 0; irq < 16; irq++)
		irq_handle(V(irq), plain, EOI_PIC);
	irq_handle(V(IRQ_COM), plain_com, EOI_PIC);
	irq_handle(V(IRQ_RTC), plain_rtc, EOI_PIC);
	trace_clear();
}

static void unmask3(void)
{
	pic_mask(IRQ_PIT, false);
	pic_mask(IRQ_COM, false);
	pic_mask(IRQ_RTC, false);
}

static void pic_priority(void)
{
	com_raise();
	rtc_raise();
	pit_raise();
	unmask3();
	open_window();
	expect("pic-priority", "20 28 24");
}

static void nested_com(struct regs *r)
{
	note("%x{", r->vector);
	com_drop();
	pit_raise();
	window();
	note("%x}", r->vector);
}

static void pic_nested(void)
{
	irq_handle(V(IRQ_COM), nested_com, EOI_PIC);
	unmask3();
	com_raise();
	open_window();
	expect("pic-nested", "24{ 20 24}");
}

static void blocking_pit(struct regs *r)
{
	note("%x{", r->vector);
	com_raise();
	wait_irr(IRQ_COM);
	note("isr=%x", pic_isr());
	window();
	note("%x}", r->vector);
}

static void pic_blocked(void)
{
	irq_handle(V(IRQ_PIT), blocking_pit, EOI_PIC);
	unmask3();
	pit_raise();
	open_window();
	expect("pic-blocked", "20{ isr=1 20} 24");
}

static void isr_rtc(struct regs *r)
{
	note("%x", r->vector);
	note("isr=%x", pic_isr());
	rtc_drop();
}

static void pic_cascade(void)
{
	irq_handle(V(IRQ_RTC), isr_rtc, EOI_PIC);
	unmask3();
	rtc_raise();
	open_window();
	note("isr=%x", pic_isr());
	expect("pic-cascade", "28 isr=104 isr=0");
}

static void pic_masking(void)
{
	com_raise();
	note("irr=%x", pic_irr() & 0x10);
	open_window();
	note("imr=%x", inb(PIC1 + 1));
	pic_mask(IRQ_COM, false);
	open_window();
	note("irr=%x", pic_irr() & 0x10);
	expect("pic-mask", "irr=10 imr=fb 24 irr=0");
}

static void pic_edge(void)
{
	irq_handle(V(IRQ_COM), plain, EOI_PIC); /* leaves the line up */
	unmask3();
	com_raise();
	open_window();
	open_window();
	note("%c", '|');
	com_drop();
	com_raise();
	open_window();
	com_drop();
	expect("pic-edge", "24 | 24");
}

static int rounds;

static void third_time(struct regs *r)
{
	note("%x", r->vector);
	if (++rounds == 3)
		com_drop();
}

static void pic_level(void)
{
	rounds = 0;
	irq_handle(V(IRQ_COM), third_time, EOI_PIC);
	outb(ELCR1, 1 << IRQ_COM);
	unmask3();
	com_raise();
	open_window();
	note("elcr=%x", inb(ELCR1));
	expect("pic-level", "24 24 24 elcr=10");
}

static void pic_level_dropped(void)
{
	outb(ELCR1, 1 << IRQ_COM);
	unmask3();
	com_raise();
	note("irr=%x", pic_irr() & 0x10);
	com_drop();
	note("irr=%x", pic_irr() & 0x10);
	open_window();
	expect("pic-level-dropped", "irr=10 irr=0");
}

static void pic_poll(void)
{
	unmask3();
	com_raise();
	outb(PIC1, OCW3_POLL);
	note("poll=%x", inb(PIC1));
	note("isr=%x", pic_isr());
	open_window();
	com_drop();
	outb(PIC1, OCW2_SPECIFIC_EOI | IRQ_COM);
	note("isr=%x", pic_isr());
	expect("pic-poll", "poll=84 isr=10 isr=0");
}

static void pic_rotate(void)
{
	outb(PIC1, OCW2_SET_PRIORITY | 3); /* IRQ 3 lowest, so 4 highest */
	unmask3();
	com_raise();
	pit_raise();
	open_window();
	expect("pic-rotate", "24 20");
}

static void rotating_pit(struct regs *r)
{
	note("%x", r->vector);
	outb(PIC1, OCW2_ROTATE_EOI);
}

static void pic_rotate_eoi(void)
{
	irq_handle(V(IRQ_PIT), rotating_pit, EOI_NONE); /* makes IRQ 0 the lowest */
	unmask3();
	pit_raise();
	open_window();
	irq_handle(V(IRQ_PIT), plain, EOI_PIC);
	com_raise();
	pit_raise();
	open_window();
	expect("pic-rotate-eoi", "20 24 20");
}

static void isr_com(struct regs *r)
{
	note("%x", r->vector);
	note("isr=%x", pic_isr());
	com_drop();
}

static void pic_auto_eoi(void)
{
	outb(PIC1, 0x11);
	outb(PIC1 + 1, PIC_VECTOR);
	outb(PIC1 + 1, 4);
	outb(PIC1 + 1, 3); /* 8086, automatic EOI */
	outb(PIC1 + 1, 0xff & ~(1 << IRQ_COM));
	irq_handle(V(IRQ_COM), isr_com, EOI_NONE);
	com_raise();
	open_window();
	expect("pic-auto-eoi", "24 isr=0");
}

static void pic_vector_base(void)
{
	outb(PIC1, 0x11);
	outb(PIC1 + 1, 0x6b); /* the low three bits do not count */
	outb(PIC1 + 1, 4);
	outb(PIC1 + 1, 1);
	outb(PIC1 + 1, 0xff & ~(1 << IRQ_COM));
	irq_handle(0x6c, plain_com, EOI_NONE);
	com_raise();
	open_window();
	outb(PIC1, OCW2_EOI);
	expect("pic-vector-base", "6c");
}

static void pic_special_mask_com(struct regs *r)
{
	note("%x{", r->vector);
	com_drop();
	outb(PIC1, 0x68); /* special mask mode */
	pic_mask(IRQ_COM, true);
	outb(PIC1, 0x0a);
	window(); /* lower levels may come now */
	outb(PIC1, 0x48);
	pic_mask(IRQ_COM, false);
	note("%x}", r->vector);
}

static void pic_special_mask(void)
{
	/* IRQ 0 is the lower level here: IRQ 4 is made the highest. */
	outb(PIC1, OCW2_SET_PRIORITY | 3);
	irq_handle(V(IRQ_COM), pic_special_mask_com, EOI_NONE);
	unmask3();
	com_raise();
	pit_raise();
	open_window();
	outb(PIC1, OCW2_SPECIFIC_EOI | IRQ_COM);
	outb(PIC1, OCW2_SPECIFIC_EOI | IRQ_PIT);
	expect("pic-special-mask", "24{ 20 24}");
}

/* ---- ExtINT ---- */

static void extint(void)
{
	lapic_write(LAPIC_LVT_LINT0, LVT_MASKED | LVT_EXTINT);
	unmask3();
	com_raise();
	open_window();
	note("%c", '|');
	pic_wire();
	open_window();
	expect("extint", "| 24");
}

static void extint_lapic_state(struct regs *r)
{
	note("%x", r->vector);
	note("isr=%x", lapic_bit(LAPIC_ISR, r->vector));
	note("ppr=%x", lapic_read(LAPIC_PPR));
	com_drop();
}

/* ExtINT leaves the local APIC's registers alone and does not heed the TPR. */
static void extint_tpr(void)
{
	irq_handle(V(IRQ_COM), extint_lapic_state, EOI_PIC);
	unmask3();
	lapic_write(LAPIC_TPR, 0xf0);
	com_raise();
	open_window();
	lapic_write(LAPIC_TPR, 0);
	expect("extint-tpr", "24 isr=0 ppr=f0");
}

/* ---- local APIC ---- */

#define ICR_SELF 0x40000u
#define ICR_ALL 0x80000u
#define ICR_LOGICAL 0x800u
#define ICR_PENDING 0x1000u

static void self(u8 vector) { lapic_write(LAPIC_ICR, ICR_SELF | vector); }

static void apic_reset(void)
{
	pic_reset();
	lapic_init();
	for (int v = 0x40; v < LAPIC_SPURIOUS; v++)
		irq_handle(v, plain, EOI_LAPIC);
	for (int pin = 0; pin < IOAPIC_PINS; pin++)
		ioapic_route(pin, REDIR_MASKED);
	trace_clear();
}

static void apic_priority(void)
{
	self(0x60);
	self(0x80);
	self(0x40);
	self(0x81);
	note("irr=%x", lapic_read(LAPIC_IRR + 0x40)); /* vectors 0x80 to 0x9f */
	open_window();
	note("irr=%x", lapic_read(LAPIC_IRR + 0x40));
	expect("apic-priority", "irr=3 81 80 60 40 irr=0");
}

/* Two of one vector before the first is taken are one. */
static void apic_merge(void)
{
	self(0x50);
	self(0x50);
	open_window();
	expect("apic-merge", "50");
}

static void apic_tpr(void)
{
	self(0x60);
	self(0x80);
	self(0x7f);
	lapic_write(LAPIC_TPR, 0x70);
	note("ppr=%x", lapic_read(LAPIC_PPR));
	open_window();
	note("%c", '|');
	lapic_write(LAPIC_TPR, 0x60);
	open_window();
	note("%c", '|');
	lapic_write(LAPIC_TPR, 0);
	open_window();
	expect("apic-tpr", "ppr=70 80 | 7f | 60");
}

static void apic_cr8(void)
{
	write_cr8(7);
	note("tpr=%x", lapic_read(LAPIC_TPR));
	self(0x60);
	open_window();
	note("%c", '|');
	write_cr8(5);
	open_window();
	lapic_write(LAPIC_TPR, 0x34);
	note("cr8=%x", read_cr8());
	write_cr8(0);
	note("tpr=%x", lapic_read(LAPIC_TPR));
	expect("apic-cr8", "tpr=70 | 60 cr8=3 tpr=0");
}

static void nesting(struct regs *r)
{
	note("%x{", r->vector);
	note("ppr=%x", lapic_read(LAPIC_PPR));
	self(0x62); /* of the same class: waits */
	self(0x80);
	window();
	note("%x}", r->vector);
}

static void apic_nested(void)
{
	irq_handle(0x60, nesting, EOI_LAPIC);
	self(0x60);
	open_window();
	expect("apic-nested", "60{ ppr=60 80 60} 62");
}

static void isr_apic(struct regs *r)
{
	note("%x", r->vector);
	note("isr=%x", lapic_bit(LAPIC_ISR, r->vector));
	note("irr=%x", lapic_bit(LAPIC_IRR, r->vector));
	note("tmr=%x", lapic_bit(LAPIC_TMR, r->vector));
	lapic_write(LAPIC_EOI, 0);
	note("isr=%x", lapic_bit(LAPIC_ISR, r->vector));
}

static void apic_eoi(void)
{
	irq_handle(0x70, isr_apic, EOI_NONE);
	self(0x70);
	open_window();
	expect("apic-eoi", "70 isr=1 irr=0 tmr=0 isr=0");
}

/* Set again while in service: delivered after the EOI. */
static void again(struct regs *r)
{
	note("%x", r->vector);
	if (++rounds < 3)
		self(r->vector);
}

static void apic_again(void)
{
	rounds = 0;
	irq_handle(0x70, again, EOI_LAPIC);
	self(0x70);
	open_window();
	expect("apic-again", "70 70 70");
}

static void apic_destinations(void)
{
	u32 id = lapic_read(LAPIC_ID);

	lapic_write(LAPIC_ICR_HIGH, id);
	lapic_write(LAPIC_ICR, 0x41); /* fixed, physical */
	open_window();
	lapic_write(LAPIC_ICR_HIGH, 1u << 24);
	lapic_write(LAPIC_ICR, ICR_LOGICAL | 0x42);
	open_window();
	lapic_write(LAPIC_ICR_HIGH, 2u << 24);
	lapic_write(LAPIC_ICR, ICR_LOGICAL | 0x43); /* nobody */
	open_window();
	lapic_write(LAPIC_ICR, ICR_ALL | 0x44);
	open_window();
	lapic_write(LAPIC_ICR_HIGH, 0xff000000u);
	lapic_write(LAPIC_ICR, 0x45); /* broadcast */
	open_window();
	note("busy=%x", lapic_read(LAPIC_ICR) & ICR_PENDING);
	expect("apic-destinations", "41 42 44 45 busy=0");
}

static void apic_timer(void)
{
	lapic_write(LAPIC_TIMER_DIVIDE, 0xb); /* by 1 */
	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED | 0x90);
	lapic_write(LAPIC_TIMER_INITIAL, 1000);
	while (lapic_read(LAPIC_TIMER_CURRENT))
		;
	open_window();
	note("%c", '|'); /* expired while masked: lost */
	lapic_write(LAPIC_LVT_TIMER, 0x90);
	open_window();
	note("%c", '|');
	lapic_write(LAPIC_TIMER_INITIAL, 1000);
	while (!lapic_bit(LAPIC_IRR, 0x90))
		;
	open_window();
	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
	expect("apic-timer", "| | 90");
}

/* ---- I/O APIC ---- */

static void ioapic_edge(void)
{
	irq_handle(0x51, plain, EOI_LAPIC); /* leaves the line up */
	ioapic_route(IRQ_COM, 0x51);
	com_raise();
	open_window();
	open_window();
	note("%c", '|');
	com_drop();
	com_raise();
	open_window();
	note("rirr=%x", ioapic_entry(IRQ_COM) & REDIR_REMOTE_IRR);
	com_drop();
	expect("ioapic-edge", "51 | 51 rirr=0");
}

static void ioapic_masked_edge(void)
{
	ioapic_route(IRQ_COM, REDIR_MASKED | 0x51);
	com_raise();
	open_window();
	ioapic_write(0x10 + 2 * IRQ_COM, 0x51);
	open_window();
	note("%c", '|');
	com_drop();
	com_raise();
	open_window();
	com_drop();
	expect("ioapic-masked-edge", "| 51");
}

static void level_pin(struct regs *r)
{
	note("%x", r->vector);
	note("rirr=%x", ioapic_entry(IRQ_COM) & REDIR_REMOTE_IRR);
	note("tmr=%x", lapic_bit(LAPIC_TMR, r->vector));
	if (++rounds == 2)
		com_drop();
}

static void ioapic_level(void)
{
	rounds = 0;
	irq_handle(0x52, level_pin, EOI_LAPIC);
	ioapic_route(IRQ_COM, REDIR_LEVEL | 0x52);
	com_raise();
	open_window();
	note("rirr=%x", ioapic_entry(IRQ_COM) & REDIR_REMOTE_IRR);
	expect("ioapic-level", "52 rirr=4000 tmr=1 52 rirr=4000 tmr=1 rirr=0");
}

static void ioapic_masked_level(void)
{
	irq_handle(0x52, plain_com, EOI_LAPIC);
	ioapic_route(IRQ_COM, REDIR_MASKED | REDIR_LEVEL | 0x52);
	com_raise();
	open_window();
	note("%c", '|');
	ioapic_write(0x10 + 2 * IRQ_COM, REDIR_LEVEL | 0x52);
	open_window();
	expect("ioapic-masked-level", "| 52");
}

/* Two pins with one class: the higher vector first, whatever the pin. */
static void ioapic_two_pins(void)
{
	irq_handle(0x61, plain_com, EOI_LAPIC);
	irq_handle(0x65, plain_rtc, EOI_LAPIC);
	ioapic_route(IRQ_COM, 0x61);
	ioapic_route(IRQ_RTC, 0x65);
	com_raise();
	rtc_raise();
	open_window();
	expect("ioapic-two-pins", "65 61");
}

/* The PIT is wired to pin 2. */
static void ioapic_pit(void)
{
	ioapic_route(2, 0x53);
	pit_one_shot(100);
	while (!lapic_bit(LAPIC_IRR, 0x53))
		;
	open_window();
	expect("ioapic-pit", "53");
}

static void ioapic_registers(void)
{
	note("pins=%x", (ioapic_read(1) >> 16 & 0xff) + 1);
	ioapic_write(0x10 + 2 * 5, 0xfffeffff & ~REDIR_REMOTE_IRR); /* unmasked; nothing there */
	note("%x", ioapic_entry(5) & 0x1ffff); /* what QEMU keeps above is reserved */
	ioapic_route(5, REDIR_MASKED);
	note("%x", ioapic_entry(5));
	ioapic_write(0x10 + 2 * 5 + 1, 0xffffffff);
	note("%x", ioapic_read(0x10 + 2 * 5 + 1) >> 24);
	ioapic_write(0x10 + 2 * 5 + 1, 0);
	expect("ioapic-registers", "pins=18 afff 10000 ff");
}

static const struct {
	const char *name;
	void (*reset)(void);
	void (*run)(void);
} tests[] = {
	{ "pic-priority", pic_reset, pic_priority },
	{ "pic-nested", pic_reset, pic_nested },
	{ "pic-blocked", pic_reset, pic_blocked },
	{ "pic-cascade", pic_reset, pic_cascade },
	{ "pic-mask", pic_reset, pic_masking },
	{ "pic-edge", pic_reset, pic_edge },
	{ "pic-level", pic_reset, pic_level },
	{ "pic-level-dropped", pic_reset, pic_level_dropped },
	{ "pic-poll", pic_reset, pic_poll },
	{ "pic-rotate", pic_reset, pic_rotate },
	{ "pic-rotate-eoi", pic_reset, pic_rotate_eoi },
	{ "pic-auto-eoi", pic_reset, pic_auto_eoi },
	{ "pic-vector-base", pic_reset, pic_vector_base },
	{ "pic-special-mask", pic_reset, pic_special_mask },
	{ "extint", pic_reset, extint },
	{ "extint-tpr", pic_reset, extint_tpr },
	{ "apic-priority", apic_reset, apic_priority },
	{ "apic-merge", apic_reset, apic_merge },
	{ "apic-tpr", apic_reset, apic_tpr },
	{ "apic-cr8", apic_reset, apic_cr8 },
	{ "apic-nested", apic_reset, apic_nested },
	{ "apic-eoi", apic_reset, apic_eoi },
	{ "apic-again", apic_reset, apic_again },
	{ "apic-destinations", apic_reset, apic_destinations },
	{ "apic-timer", apic_reset, apic_timer },
	{ "ioapic-edge", apic_reset, ioapic_edge },
	{ "ioapic-masked-edge", apic_reset, ioapic_masked_edge },
	{ "ioapic-level", apic_reset, ioapic_level },
	{ "ioapic-masked-level", apic_reset, ioapic_masked_level },
	{ "ioapic-two-pins", apic_reset, ioapic_two_pins },
	{ "ioapic-pit", apic_reset, ioapic_pit },
	{ "ioapic-registers", apic_reset, ioapic_registers },
};

int main(struct boot *boot)
{
	(void)boot;
	console_flush(); /* COM1 programmed, OUT2 on */
	lapic_init();
	for (u32 i = 0; i < ARRAY_LEN(tests); i++)
		if (!arg("only") || arg_is("only", tests[i].name)) {
			tests[i].reset();
			tests[i].run();
		}
	return finish();
}
