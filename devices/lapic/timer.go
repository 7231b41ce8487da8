package lapic

import "github.com/ftvmm/ftvmm/devices"

const (
	// BusHz is the frequency of the timer before its divider: one tick a nanosecond.
	BusHz = 1_000_000_000

	// MinPeriod is the shortest time between two interrupts of a periodic timer, in
	// nanoseconds: a guest that asks for more gets several periods counted as one. (The
	// count register shows the true period.) It bounds the work that a guest's timer can
	// make for its host.
	MinPeriod = 50_000

	divideWritable = 0x0b // of the divide configuration register
)

// divider returns what the bus clock is divided by (SDM figure 11-10).
func (a *APIC) divider() int64 {
	code := a.s.Divide&3 | a.s.Divide>>1&4
	return 1 << ((code + 1) & 7)
}

// period returns the time that the initial count takes, in nanoseconds.
func (a *APIC) period() int64 { return int64(a.s.Initial) * a.divider() }

func (a *APIC) periodic() bool { return a.s.LVT[lvtTimer]&timerPeriodic != 0 }

// remaining returns the nanoseconds until the count reaches zero; 0 when it stands.
func (a *APIC) remaining() int64 {
	if !a.s.Running {
		return 0
	}
	rest := a.s.Deadline - a.clock.Now()
	if !a.periodic() {
		return max(rest, 0)
	}
	period := a.period()
	if rest %= period; rest <= 0 {
		rest += period
	}
	return rest
}

// count returns the current count register.
func (a *APIC) count() uint32 {
	d := a.divider()
	return uint32((a.remaining() + d - 1) / d)
}

// start loads the count (SDM 11.5.4): the initial count was written. Zero stops the timer.
func (a *APIC) start(initial uint32) {
	a.s.Initial = initial
	a.s.Running = initial != 0
	a.s.Deadline = 0
	if a.s.Running {
		a.s.Deadline = a.clock.Now() + a.period()
	}
	a.arm()
}

// rebase makes the deadline the time at which the present count reaches zero, before
// or after a change of what it is derived from. rest is what remaining returned before.
func (a *APIC) rebase(rest int64) {
	a.s.Running = rest > 0
	a.s.Deadline = 0
	if a.s.Running {
		a.s.Deadline = a.clock.Now() + rest
	}
	a.arm()
}

// setDivide changes the divider of a count that goes on from where it is.
func (a *APIC) setDivide(v uint32) {
	count := int64(a.count())
	a.s.Divide = v & divideWritable
	a.rebase(count * a.divider())
}

// setTimerVector writes the timer's local vector, with its mode and mask.
func (a *APIC) setTimerVector(lvt uint32) {
	rest := a.remaining()
	a.s.LVT[lvtTimer] = lvt
	a.rebase(rest)
}

// arm sets the clock's timer. A masked timer counts, but nobody need be woken.
func (a *APIC) arm() {
	if a.s.Running && a.s.LVT[lvtTimer]&lvtMasked == 0 {
		a.timer.Arm(a.s.Deadline)
	} else {
		a.timer.Disarm()
	}
}

// fired runs when the count of an unmasked timer reaches zero.
func (a *APIC) fired() {
	if !a.s.Running {
		return
	}
	if a.periodic() {
		step := a.period()
		step *= (MinPeriod + step - 1) / step
		a.s.Deadline, _ = devices.NextPeriod(a.s.Deadline, step, a.clock.Horizon())
	} else {
		a.s.Running, a.s.Deadline = false, 0
	}
	a.arm()
	a.accept(uint8(a.s.LVT[lvtTimer]), false)
}
