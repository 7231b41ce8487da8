/*
 * timers: the clocks of a PC measured against each other.
 *
 * The PM timer is the reference. Reading two clocks takes two exits, between
 * which any time may pass on a busy host; so every reading of another clock is
 * bracketed by two of the PM timer, and a claim is that an interval lies within
 * its bracket, plus SLACK for rounding. Such a claim holds however slow the host
 * is, and is exact to an exit's time on a fast one.
 *
 *	strict     also claim what QEMU does not promise: that no periodic interrupt
 *	           is lost (which takes a host with time to spare), that the PIT has a null
 *	           count, and a gate in mode 0
 *	ms=50      length of each measurement, 10 to 1000
 *	no=rtc     leave out the parts that need whole seconds
 *
 * Lines with "# " carry the figures; the claims are the same each run.
 */
#include "rt.h"

#define SLACK 12 /* PM timer ticks: 3.4 us */

/* ---- the reference: the PM timer, extended to 64 bits ---- */

static u64 extended;

static u64 pm_now(void)
{
	extended += (pmtimer_read() - extended) & 0xffffff;
	return extended;
}

struct bracket {
	u64 before, after;
};

/* The shortest and longest time, in PM ticks, between two bracketed moments. */
static u64 shortest(struct bracket a, struct bracket b) { return b.before > a.after ? b.before - a.after : 0; }
static u64 longest(struct bracket a, struct bracket b) { return b.after - a.before; }

static bool within(struct bracket a, struct bracket b, u64 ticks)
{
	return ticks + SLACK >= shortest(a, b) && ticks <= longest(a, b) + SLACK;
}

static u64 ms_ticks(u64 ms) { return ms * PMTIMER_HZ / 1000; }

static void wait_ticks(u64 ticks)
{
	u64 start = pm_now();

	while (pm_now() - start < ticks)
		;
}

/* ---- PM timer ---- */

#define FADT_TMR_VAL_EXT (1u << 8)

static void test_pm(void)
{
	struct acpi_fadt *fadt = (void *)acpi_table("FACP");
	u64 last = pm_now(), distinct = 0;
	bool monotonic = true;

	for (int i = 0; i < 2000; i++) {
		u32 raw = pmtimer_read();
		u64 step = (raw - last) & 0xffffff;

		monotonic &= step < 0x800000;
		distinct += step != 0;
		last = raw;
	}
	check(monotonic, "pm-monotonic", "2000 readings");
	check(distinct > 0, "pm-runs", "it moves");
	check((fadt && fadt->flags & FADT_TMR_VAL_EXT) || inl(pmtimer_port()) >> 24 == 0, "pm-width",
	      "32 bits, or the upper byte zero");
}

/* ---- PIT ---- */

#define PIT0 0x40
#define PIT2 0x42
#define PIT_MODE 0x43
#define READBACK_STATUS(channel) (0xe0 | 2 << (channel))
#define PORT61 0x61

static struct bracket read_pit(u16 *count)
{
	struct bracket b;

	b.before = pm_now();
	*count = pit_read(0);
	b.after = pm_now();
	return b;
}

static void test_pit_rate(u64 ms)
{
	struct bracket first, last;
	u16 from, now, then;
	u64 ticks = 0;

	outb(PIT_MODE, 0x34); /* channel 0, mode 2, reload 65536 */
	outb(PIT0, 0);
	outb(PIT0, 0);
	wait_ticks(ms_ticks(2)); /* reload happens at the next tick */
	first = last = read_pit(&from);
	then = from;
	while (shortest(first, last) < ms_ticks(ms)) {
		last = read_pit(&now);
		ticks += (u16)(then - now);
		then = now;
	}
	printf("# pit %lu ticks, pm %lu..%lu\n", ticks, shortest(first, last), longest(first, last));
	check(within(first, last, ticks * 3), "pit-rate", "a third of the PM timer's");
}

static void test_pit_latch(void)
{
	u16 latched, fresh;
	u8 low, status;

	outb(PIT_MODE, 0x00); /* latch channel 0 */
	wait_ticks(ms_ticks(1));
	outb(PIT_MODE, 0x00); /* ignored: already latched */
	low = inb(PIT0);
	latched = inb(PIT0) << 8 | low;
	fresh = pit_read(0);
	check((u16)(latched - fresh) >= 1100, "pit-latch", "keeps the first of two latches");

	outb(PIT_MODE, READBACK_STATUS(0));
	status = inb(PIT0);
	check((status & 0x3f) == 0x34, "pit-status", "mode 2, both bytes: %#02x", status & 0x3f);

	if (!arg("strict"))
		return;
	outb(PIT_MODE, 0x30); /* mode 0: output low, null count until loaded */
	outb(PIT_MODE, READBACK_STATUS(0));
	status = inb(PIT0);
	check((status & 0xff) == 0x70, "pit-null-count", "%#02x before a count is written", status);
}

static void test_pit_one_shot(u64 ms)
{
	u16 count = ms * PIT_HZ / 1000 > 60000 ? 60000 : ms * PIT_HZ / 1000;
	struct bracket start, end;

	outb(PORT61, (inb(PORT61) & ~2) | 1);
	outb(PIT_MODE, 0xb0); /* channel 2, mode 0 */
	outb(PIT2, count);
	start.before = pm_now();
	outb(PIT2, count >> 8);
	start.after = pm_now();
	check(!(inb(PORT61) & 0x20), "pit2-low", "output low while counting");
	do {
		end.before = pm_now();
	} while (!(inb(PORT61) & 0x20));
	end.after = pm_now();
	/* The output of the last look but one was still low. */
	printf("# pit2 %u ticks, pm %lu..%lu\n", count, shortest(start, end), longest(start, end));
	check((u64)count * 3 <= longest(start, end) + SLACK, "pit2-not-early", "output high after the count");
	outb(PORT61, inb(PORT61) & ~1);
}

static void test_pit_gate(void)
{
	u8 low;
	u16 a, b;

	outb(PIT_MODE, 0xb0);
	outb(PIT2, 0xff);
	outb(PIT2, 0xff);
	outb(PORT61, inb(PORT61) & ~3);
	outb(PIT_MODE, 0x80);
	low = inb(PIT2);
	a = inb(PIT2) << 8 | low;
	wait_ticks(ms_ticks(1));
	outb(PIT_MODE, 0x80);
	low = inb(PIT2);
	b = inb(PIT2) << 8 | low;
	check(a == b, "pit2-gate", "gate low stops the count");
}

/* Interrupts of a periodic source while interrupts are on for ms milliseconds, or
 * longer until the first has come: QEMU may be slow to run its timers. */
static u64 count_interrupts(u8 vector, u64 ms, struct bracket *start, struct bracket *end)
{
	u64 before, n;

	start->before = pm_now();
	rt_interrupts(true);
	before = irq_count[vector];
	start->after = pm_now();
	wait_ticks(ms_ticks(ms));
	while (irq_count[vector] == before && pm_now() - start->before < 10 * PMTIMER_HZ)
		;
	end->before = pm_now();
	n = irq_count[vector] - before;
	rt_interrupts(false);
	end->after = pm_now();
	return n;
}

static void test_pit_interrupts(u64 ms)
{
	const u32 hz = 200, period = PIT_HZ / 200 * 3;
	struct bracket start, end;
	u64 n;

	irq_handle(PIC_VECTOR, NULL, EOI_PIC);
	pit_periodic(hz);
	pic_mask(0, false);
	n = count_interrupts(PIC_VECTOR, 2 * ms, &start, &end);
	pic_mask(0, true);
	printf("# pit %lu interrupts of %u ticks, pm %lu..%lu\n", n, period, shortest(start, end), longest(start, end));
	/* One may have been pending at the start. */
	check(n >= 1, "pit-interrupts", "they come");
	check(n <= longest(start, end) / period + 2, "pit-interrupts-not-many", "no more than time allows");
	if (arg("strict"))
		check(n + 2 >= shortest(start, end) / period, "pit-interrupts-not-few", "none lost");
	/* Leave nothing behind that other tests could take for theirs. */
	outb(PIT_MODE, 0x30);
}

/* ---- RTC ---- */

#define RTC_INDEX 0x70
#define RTC_DATA 0x71
enum { RTC_SECONDS = 0, RTC_A = 0xa, RTC_B = 0xb, RTC_C = 0xc, RTC_D = 0xd };
enum { B_PIE = 0x40, B_24H = 2, C_PF = 0x40, C_UF = 0x10, D_VRT = 0x80 };
#define RTC_IRQ 8

static u8 rtc_read(u8 reg)
{
	outb(RTC_INDEX, reg);
	return inb(RTC_DATA);
}

static void rtc_write(u8 reg, u8 v)
{
	outb(RTC_INDEX, reg);
	outb(RTC_DATA, v);
}

/* The moment at which a flag of register C came up, which clears it: after the
 * look before, which began at b.before, and before b.after. */
static struct bracket flag(u8 bit)
{
	struct bracket b = { .after = pm_now() };

	do {
		b.before = b.after;
		b.after = pm_now();
	} while (!(rtc_read(RTC_C) & bit));
	b.after = pm_now();
	return b;
}

static void test_rtc_periodic(void)
{
	/* Rate 10: 64 Hz; 2 s of PM timer ticks are 128 periods. */
	struct bracket start, end;
	u64 k;

	rtc_write(RTC_A, 0x20 | 10);
	rtc_write(RTC_B, B_24H | B_PIE); /* QEMU has no PF without PIE; masked in the PIC */
	rtc_read(RTC_C);
	flag(C_PF);
	start = flag(C_PF);
	for (int i = 0; i < 5; i++)
		end = flag(C_PF);
	k = (longest(start, end) * 64 + SLACK * 64) / PMTIMER_HZ;
	printf("# rtc 5 periods of 64 Hz, pm %lu..%lu, %lu fit\n", shortest(start, end), longest(start, end), k);
	/* QEMU sets the flag from a timer of the host, which may be late once. */
	check(k + !arg("strict") >= 5, "rtc-periodic", "five periods take five periods' time");
}

static void test_rtc_interrupts(u64 ms)
{
	struct bracket start, end;
	u64 n;

	rtc_write(RTC_A, 0x20 | 8); /* 256 Hz */
	rtc_write(RTC_B, B_24H | B_PIE);
	rtc_read(RTC_C);
	pic_mask(RTC_IRQ, false);
	n = count_interrupts(PIC_VECTOR + RTC_IRQ, 2 * ms, &start, &end);
	pic_mask(RTC_IRQ, true);
	rtc_write(RTC_B, B_24H);
	rtc_read(RTC_C);
	printf("# rtc %lu interrupts at 256 Hz, pm %lu..%lu\n", n, shortest(start, end), longest(start, end));
	check(n >= 1, "rtc-interrupts", "they come");
	check(n <= longest(start, end) * 256 / PMTIMER_HZ + 2, "rtc-interrupts-not-many", "no more than time allows");
	if (arg("strict"))
		check(n + 2 >= shortest(start, end) * 256 / PMTIMER_HZ, "rtc-interrupts-not-few", "none lost");
}

static u8 from_bcd(u8 v) { return (v >> 4) * 10 + (v & 15); }

static void test_rtc_seconds(void)
{
	struct bracket start, end;
	u8 first, second;
	u64 took;

	check(rtc_read(RTC_D) & D_VRT, "rtc-valid", "battery good");
	rtc_read(RTC_C);
	start = flag(C_UF);
	first = from_bcd(rtc_read(RTC_SECONDS));
	end = flag(C_UF);
	second = from_bcd(rtc_read(RTC_SECONDS));
	took = (longest(start, end) + PMTIMER_HZ / 2) / PMTIMER_HZ;
	printf("# rtc update to update, pm %lu..%lu\n", shortest(start, end), longest(start, end));
	if (!arg("strict")) { /* as above */
		end.before -= PMTIMER_HZ / 4;
		end.after += PMTIMER_HZ / 4;
	}
	check(within(start, end, took * PMTIMER_HZ), "rtc-second", "an update each second of the PM timer");
	check((u64)(second + 60 - first) % 60 == took, "rtc-seconds", "count the updates");
}

static void rtc_irq(struct regs *r)
{
	(void)r;
	outb(RTC_INDEX, RTC_C);
	inb(RTC_DATA);
}

/* ---- local APIC timer ---- */

#define APIC_VECTOR 0x50

struct rate {
	u64 low, high; /* ticks a second */
};

static struct rate measure_apic(u64 ms)
{
	struct bracket start, end;
	struct rate r;
	u32 count;

	start.before = pm_now();
	lapic_write(LAPIC_TIMER_INITIAL, 0xffffffff);
	start.after = pm_now();
	wait_ticks(ms_ticks(ms));
	end.before = pm_now();
	count = 0xffffffff - lapic_read(LAPIC_TIMER_CURRENT);
	end.after = pm_now();
	lapic_write(LAPIC_TIMER_INITIAL, 0);
	r.low = (u64)count * PMTIMER_HZ / (longest(start, end) + SLACK);
	r.high = ((u64)count + 1) * PMTIMER_HZ / (shortest(start, end) - SLACK);
	return r;
}

static void test_apic(u64 ms)
{
	struct rate one, two;
	struct bracket start, end;
	u32 last = 0xffffffff, ticks;
	bool falls = true;
	u64 n;

	lapic_write(LAPIC_TIMER_DIVIDE, 3); /* by 16 */
	one = measure_apic(ms);
	two = measure_apic(2 * ms);
	printf("# apic timer %lu..%lu, %lu..%lu Hz by 16\n", one.low, one.high, two.low, two.high);
	check(one.low <= two.high && two.low <= one.high, "apic-rate", "the same over two intervals");

	lapic_write(LAPIC_TIMER_INITIAL, last);
	for (int i = 0; i < 500; i++) {
		u32 now = lapic_read(LAPIC_TIMER_CURRENT);

		falls &= now <= last;
		last = now;
	}
	check(falls, "apic-monotonic", "500 readings");

	ticks = two.low / 1000; /* 1 ms */
	lapic_write(LAPIC_TIMER_INITIAL, ticks);
	while (lapic_read(LAPIC_TIMER_CURRENT))
		;
	wait_ticks(ms_ticks(2));
	check(lapic_read(LAPIC_TIMER_CURRENT) == 0, "apic-one-shot-ends", "stays at zero");

	irq_handle(APIC_VECTOR, NULL, EOI_LAPIC);
	ticks = two.low / 100; /* 10 ms */
	lapic_write(LAPIC_LVT_TIMER, APIC_VECTOR);
	start.before = pm_now();
	lapic_write(LAPIC_TIMER_INITIAL, ticks);
	start.after = pm_now();
	irq_wait(APIC_VECTOR, 1);
	end.before = end.after = pm_now();
	printf("# apic one-shot of 10 ms, pm %lu..%lu\n", shortest(start, end), longest(start, end));
	check(longest(start, end) + SLACK >= (u64)ticks * PMTIMER_HZ / two.high, "apic-one-shot", "not early");

	irq_handle(APIC_VECTOR, NULL, EOI_LAPIC);
	lapic_write(LAPIC_LVT_TIMER, LVT_PERIODIC | APIC_VECTOR);
	lapic_write(LAPIC_TIMER_INITIAL, ticks / 2); /* 5 ms */
	n = count_interrupts(APIC_VECTOR, 2 * ms, &start, &end);
	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
	lapic_write(LAPIC_TIMER_INITIAL, 0);
	printf("# apic %lu interrupts of 5 ms, pm %lu..%lu\n", n, shortest(start, end), longest(start, end));
	check(n >= 1, "apic-periodic", "they come");
	check(n <= longest(start, end) / (PMTIMER_HZ / 200) + 2, "apic-periodic-not-many", "no more than time allows");
	if (arg("strict"))
		check(n + 2 >= shortest(start, end) / (PMTIMER_HZ / 200 + 1), "apic-periodic-not-few", "none lost");
}

int main(struct boot *boot)
{
	u64 ms = arg_number("ms", 50);

	(void)boot;
	if (!check(pmtimer_port() != 0, "pm-timer", "port found"))
		return finish();
	if (ms < 10)
		ms = 10;
	pic_init();
	lapic_init();
	pic_wire();
	irq_handle(PIC_VECTOR + RTC_IRQ, rtc_irq, EOI_PIC);
	rtc_write(RTC_B, B_24H);
	test_pm();
	test_pit_rate(ms);
	test_pit_latch();
	test_pit_one_shot(ms);
	if (arg("strict"))
		test_pit_gate();
	test_pit_interrupts(ms);
	test_rtc_periodic();
	test_rtc_interrupts(ms);
	if (!arg_is("no", "rtc"))
		test_rtc_seconds();
	test_apic(ms);
	return finish();
}
