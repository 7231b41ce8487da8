package vmm

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"time"
)

// This file is the arithmetic of a frozen time stamp counter (docs/determinism.md, "Time"). Nothing lets user space trap
// RDTSC; but where KVM can scale the guest's counter, it can be made to tick once a millisecond of the host's, and
// its value be set before each entry. The guest then reads one value for the whole of a slice, its run from an
// entry to the next return, unless the slice goes across a tick. Whether it did is decided from the host's counter before and after, exactly:
//
//	guest = (host*ratio >> frac) + offset
//
// The scaled counter never goes back, so equal values before and after prove that no RDTSC between can have read another. A slice
// that fails this test is tainted: the guest may have read what the other side's guest did not. A timer kicks the
// guest shortly before a tick, so that few are; the next entry waits until the tick is over and moves the offset back by it. Neither is
// a stop, and the guest cannot tell.
//
// What the guest reads moves by Set alone, at stops, by virtual time.

// Fraction bits of the ratio (Intel SDM vol. 3 §25.6.5, "TSC multiplier"; AMD APM vol. 2 §15.30.5, TSC_RATIO).
const (
	vmxTSCFraction = 48
	svmTSCFraction = 32
	svmTSCMaxRatio = 1<<40 - 1 // 8 integer bits
)

// frozenKHz is the rate of a frozen counter, the lowest that KVM takes.
const frozenKHz = 1

// tscGuard is how long before a tick the guest is no longer entered. It is kicked a quarter of that later than this,
// so that a kick which comes too early, by a clock that NTP has slowed down, does not find the guest allowed to run again. A kick takes some
// 10 µs.
const tscGuard = 40 * time.Microsecond

// TSCScale is how a host makes a guest's time stamp counter from its own.
type TSCScale struct {
	ratio uint64 // guest ticks in a host tick, with frac fraction bits
	frac  uint
}

// NewTSCScale returns what KVM uses on a host with a counter of hostKHz to give the guest one of guestKHz. frac is
// the number of fraction bits of the processor's multiplier, 48 on VMX and 32 on SVM.
func NewTSCScale(hostKHz, guestKHz uint32, frac uint) (TSCScale, error) {
	if frac != vmxTSCFraction && frac != svmTSCFraction {
		return TSCScale{}, fmt.Errorf("vmm: a TSC multiplier with %d fraction bits", frac)
	}
	most := uint64(math.MaxUint64)
	if frac == svmTSCFraction {
		most = svmTSCMaxRatio
	}
	hi, lo := bits.Mul64(1<<frac, uint64(guestKHz))
	if hi >= uint64(hostKHz) { // also hostKHz 0
		return TSCScale{}, fmt.Errorf("vmm: a guest's TSC of %d kHz on a host's of %d kHz", guestKHz, hostKHz)
	}
	ratio, _ := bits.Div64(hi, lo, uint64(hostKHz))
	if ratio == 0 || ratio >= most {
		return TSCScale{}, fmt.Errorf("vmm: a guest's TSC of %d kHz on a host's of %d kHz", guestKHz, hostKHz)
	}
	return TSCScale{ratio: ratio, frac: frac}, nil
}

// Scale returns the guest's counter less its offset when the host's is host. It never decreases in host as long as it does
// not wrap, which takes a frozen one 500 million years.
func (s TSCScale) Scale(host uint64) uint64 {
	hi, lo := bits.Mul64(host, s.ratio)
	return hi<<(64-s.frac) | lo>>s.frac
}

// NextTick returns the first value of the host's counter after host at which the scaled one is greater, or
// the greatest there is if it never is.
func (s TSCScale) NextTick(host uint64) uint64 {
	k := s.Scale(host) + 1
	if k == 0 {
		return math.MaxUint64
	}
	// The least h with h*ratio >= k<<frac.
	hi, lo := k>>(64-s.frac), k<<s.frac
	if hi >= s.ratio {
		return math.MaxUint64
	}
	h, rest := bits.Div64(hi, lo, s.ratio)
	if rest != 0 {
		h++ // no overflow: the quotient of a division with a rest is less than the greatest
	}
	return h
}

// FrozenTSC decides what the guest's time stamp counter is to be for each slice, and whether it was. Its methods
// belong to the vCPU loop. It does not touch the hardware: see guestTSC.
type FrozenTSC struct {
	scale TSCScale
	guard uint64 // host ticks before a tick in which no slice begins

	value   uint64 // what the guest is to read
	low     uint64 // no less than anything that it has read
	base    uint64 // the scaled counter that this slice's offset was made with
	tainted uint64 // slices
}

// NewFrozenTSC returns a counter at value. guard is how many host ticks before a tick slices end; it must
// be less than half the distance of two ticks.
func NewFrozenTSC(scale TSCScale, guard, value uint64) (*FrozenTSC, error) {
	if tick := scale.NextTick(0); guard >= tick/2 {
		return nil, fmt.Errorf("vmm: a guard of %d before ticks that are %d apart", guard, tick)
	}
	f := &FrozenTSC{scale: scale, guard: guard}
	f.Load(value)
	return f, nil
}

// Load sets the value of a guest whose state is being replaced; it may go back. No slice of the new state is tainted.
func (f *FrozenTSC) Load(value uint64) { f.value, f.low, f.tainted = value, value, 0 }

// Set sets the value that the guest reads from its next slice on. One below what the guest has read already, or after a
// tainted slice may have read, is raised to that.
func (f *FrozenTSC) Set(value uint64) {
	f.low = max(f.low, value)
	f.value = f.low
}

// Value returns what the guest reads.
func (f *FrozenTSC) Value() uint64 { return f.value }

// TSCEntry says what to do before an entry.
type TSCEntry struct {
	Offset uint64 // to set, modulo 2^64
	Kick   uint64 // host counter at which the guest must be kicked
}

// Before is called before each entry with the host's counter. If ok is false a tick is too near: call it again. What it reads
// must be read before the offset is set.
func (f *FrozenTSC) Before(host uint64) (e TSCEntry, ok bool) {
	tick := f.scale.NextTick(host)
	if tick-host <= f.guard {
		return e, false
	}
	f.base = f.scale.Scale(host)
	return TSCEntry{Offset: f.value - f.base, Kick: tick - f.guard*3/4}, true
}

// After is called after each return from the guest, with the host's counter read then. It says whether the slice is
// tainted.
func (f *FrozenTSC) After(host uint64) (tainted bool) {
	ticks := f.scale.Scale(host) - f.base
	if ticks == 0 {
		return false
	}
	f.tainted++
	// The guest may have seen them, and must not see them taken back.
	f.low = max(f.low, f.value+ticks)
	f.value = f.low
	return true
}

// Tainted returns how many slices since Load or Clean were tainted. While it is not 0 the guest may differ from that of the
// other side: no output may be released but by a cut.
func (f *FrozenTSC) Tainted() uint64 { return f.tainted }

// Clean forgets the taints: both sides have the same state again, after a cut, or the guest does not read its counter.
func (f *FrozenTSC) Clean() { f.tainted = 0 }

// tscHost is the hardware of a guestTSC. It is called from the vCPU loop's thread.
type tscHost interface {
	Now() uint64                   // the host's counter
	SetOffset(offset uint64) error // of the guest's
	KickIn(ticks uint64) error     // sends the thread a kick once, after so many ticks of the host's counter
}

// guestTSC is a [FrozenTSC] at its vCPU. The loop calls enter right before KVM_RUN and left right after it.
type guestTSC struct {
	*FrozenTSC
	host   tscHost
	offset uint64 // that the hardware has, if set
	set    bool
	kick   uint64 // host counter of the kick that is to come or has come; 0: none was asked for
}

// enter makes the guest read value in the slice that begins, or what it has read last if that is more. It may wait for a tick, for
// the guard's length at most.
func (g *guestTSC) enter(value uint64) error {
	g.Set(value)
	now := g.host.Now()
	e, ok := g.Before(now)
	for !ok {
		now = g.host.Now()
		e, ok = g.Before(now)
	}
	if !g.set || e.Offset != g.offset {
		if err := g.host.SetOffset(e.Offset); err != nil {
			return err
		}
		g.offset, g.set = e.Offset, true
	}
	if e.Kick != g.kick {
		if err := g.host.KickIn(e.Kick - now); err != nil {
			return err
		}
		g.kick = e.Kick
	}
	return nil
}

// left says whether the slice that has ended is tainted.
func (g *guestTSC) left() bool { return g.After(g.host.Now()) }

// errTSC reports that a host's counter is not what it should be.
var errTSC = errors.New("vmm: the guest's time stamp counter is not what KVM was told")

// verifyScale compares the guest's counter, read through KVM, with what the scale makes of the host's, over some ticks.
func verifyScale(s TSCScale, offset uint64, now func() uint64, guest func() (uint64, error)) error {
	const ticks = 4
	samples := 0
	for end := s.Scale(now()) + ticks; ; samples++ {
		before := now()
		v, err := guest()
		if err != nil {
			return err
		}
		after := now()
		lo, hi := s.Scale(before), s.Scale(after)
		if v-offset-lo > hi-lo { // modulo 2^64
			return fmt.Errorf("%w: it is %d where %d to %d is right", errTSC, v, lo+offset, hi+offset)
		}
		if hi >= end {
			return nil
		}
	}
}
