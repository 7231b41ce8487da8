package vmm

import (
	"errors"
	"fmt"
	"time"
)

// This file is the counter of [CounterBranches], over an interface to the hardware: the same code runs on a processor
// (branches_cpu.go) and on the model of one that its tests use, which skids, miscounts and kicks without reason.
//
// The counter counts conditional branches that the guest has retired: unlike instructions, of which an interrupt can add
// one, they are the same in each run. A stop is named by that count, its address, RCX and a hash of the registers.
//
// A landing has two parts. Far from the stop the guest runs freely; the counter's overflow stops it some way before, because
// the signal comes late: the skid. Near the stop it runs to a breakpoint at the stop's address, again and again, until
// all of the name is right. In both parts the overflow is set so that a guest which passes the stop is caught.
//
// Leaving a breakpoint. The trap flag would be seen by the guest: PUSHF, SYSCALL and the frames of
// exceptions copy it. The resume flag is not: with RF set an instruction breakpoint does not fire, the processor clears RF at
// the start of the instruction, before anything can read it, and PUSHF never shows it (Intel SDM vol. 3 §18.3.1.1, vol. 2 PUSHF; AMD
// APM vol. 2 §3.1.6). A fault's frame has RF set anyway. Only an external interrupt that is taken before the
// instruction would save it, and none is on its way at a breakpoint: nobody injects one during a landing. RF must be
// set by hand: a fault at an instruction breakpoint is the one fault that leaves it clear, and KVM does not set it.
// KVM's own emulator ignores RF for such breakpoints (there the limit of hits ends the landing), but what KVM emulates on
// VT-x and SVM is accesses to devices, and those are exits, before which a landing has ended.
//
// What cannot be named, because no breakpoint could stop there: the middle of a REP instruction (the processor looks for breakpoints before
// its first iteration only), an instruction that is being retried after a fault or an EPT violation (in both cases RF is set: SDM vol. 3 §28.3.3), one
// after MOV SS or STI, any in a guest that uses the debug registers or the trap flag itself.

// ErrGuestDebug reports a landing that is impossible because the guest uses the processor's debugging itself: it
// needs a cut. It is an [ErrLanding], though no divergence.
var ErrGuestDebug = fmt.Errorf("%w: the guest uses breakpoints or single steps of its own", ErrLanding)

// Limits of a landing.
const (
	// maxBreakpointHits bounds how often a landing comes to the stop's address too early. A loop that makes no
	// conditional branch could go through it for ever.
	maxBreakpointHits = 1 << 16
	// maxIdle is how long the guest may run without a branch or a breakpoint.
	maxIdle = 10 * time.Second
)

// noOverflow is a number of branches that no guest makes.
const noOverflow = 1<<63 - 1

// branchHardware is a processor that runs a guest and counts its branches. All but Close is called from the thread of the vCPU loop.
type branchHardware interface {
	// Skid is how many branches a guest makes at most from an overflow to its stop; more is possible, and rare.
	Skid() uint64
	// Count returns the branches that the guest has retired so far. An error that is errNoCount means that they are not known,
	// also not those to come until Count returns none.
	Count() (uint64, error)
	// SetOverflow has Enter return soon after n more branches; late rather than early.
	SetOverflow(n uint64) error
	// State describes where the guest is.
	State() (branchState, error)
	// SetBreakpoint stops the guest before it executes the instruction at the linear address.
	SetBreakpoint(addr uint64) error
	ClearBreakpoint() error
	// SetResume sets or clears RFLAGS.RF: with it, the breakpoint does not stop the next instruction.
	SetResume(on bool) error
	// Enter runs the guest until something ends it, for a second at most.
	Enter() (branchReturn, error)
	Close() error
}

// errNoCount reports that the branches of this thread's guest have not all been counted.
var errNoCount = errors.New("vmm: the branches are not counted")

// branchState is where a guest is.
type branchState struct {
	RIP, RCX, Regs uint64 // as in a Stop
	Resume         bool   // RFLAGS.RF is set
	Busy           bool   // an event is on its way into the guest, or it is in an interrupt's shadow
	Debugs         bool   // the guest uses debug registers or the trap flag
}

// branchReturn is why Enter has returned.
type branchReturn struct {
	kind branchReturnKind
	exit uint32        // for branchExit: KVM's exit reason
	ran  time.Duration // how long it took
}

type branchReturnKind uint8

const (
	branchKick       branchReturnKind = iota // an overflow, the bell, time, or nothing at all
	branchBreakpoint                         // the breakpoint, before its instruction
	branchDebug                              // another debug exception, which was the guest's own
	branchExit                               // a synchronous exit
)

// branches is the counter of [CounterBranches].
type branches struct {
	hw     branchHardware
	base   uint64
	counts bool // base is the count at the last synchronous exit

	// Of a landing:
	near    bool // the breakpoint is set
	hit     bool // the guest is at the breakpoint, too early
	over    bool // the overflow is set
	hits    uint
	idle    time.Duration // that the guest has run without a branch
	seen    uint64        // count at the last entry
	resumed branchState   // where RF was set, if Resume says that it was
}

func (c *branches) Close() error { return c.hw.Close() }

// Restart does not fail for want of a count: until the next exit stops have no names then.
func (c *branches) Restart() error {
	v, err := c.hw.Count()
	c.base, c.counts = v, err == nil
	if errors.Is(err, errNoCount) {
		return nil
	}
	return err
}

// count returns the branches since the last synchronous exit.
func (c *branches) count() (uint64, error) {
	if !c.counts {
		return 0, errNoCount
	}
	v, err := c.hw.Count()
	if errors.Is(err, errNoCount) {
		c.counts = false
	}
	return v - c.base, err
}

func (c *branches) Locate() (s Stop, ok bool, err error) {
	count, err := c.count()
	if errors.Is(err, errNoCount) {
		return s, false, nil
	}
	if err != nil {
		return s, false, err
	}
	st, err := c.hw.State()
	if err != nil || !st.nameable() {
		return s, false, err
	}
	return st.stop(count), true, nil
}

// nameable says whether a landing could stop here.
func (st *branchState) nameable() bool { return !st.Resume && !st.Busy && !st.Debugs }

func (st *branchState) stop(count uint64) Stop {
	return Stop{Count: count, RIP: st.RIP, RCX: st.RCX, Regs: st.Regs}
}

func (c *branches) Approach(to Stop) (bool, error) {
	count, err := c.count()
	switch {
	case errors.Is(err, errNoCount):
		return false, fmt.Errorf("%w: %w", ErrLanding, err)
	case err != nil:
		return false, err
	case count > to.Count:
		return false, fmt.Errorf("%w: %d branches after the exit it has passed the stop at %#x after %d", ErrLanding, count, to.RIP, to.Count)
	}
	left := to.Count - count
	if c.near || left <= c.hw.Skid() {
		there, err := c.look(to, count)
		if err != nil || there {
			return there, err
		}
		return false, c.enter(to, count)
	}
	if err := c.hw.SetOverflow(left - c.hw.Skid()); err != nil {
		return false, err
	}
	c.over = true
	return false, c.enter(to, count)
}

// look says whether the guest is at the stop. If it is not, look has it run to the stop's address.
func (c *branches) look(to Stop, count uint64) (there bool, err error) {
	st, err := c.hw.State()
	if err != nil {
		return false, err
	}
	if st.Debugs {
		return false, ErrGuestDebug
	}
	if st.nameable() && st.stop(count) == to {
		return true, nil
	}
	if !c.near {
		if err := c.hw.SetBreakpoint(to.RIP); err != nil {
			return false, err
		}
		c.near, c.over = true, true
		// From here on the overflow catches a guest that passes the stop.
		if err := c.hw.SetOverflow(to.Count - count + 1); err != nil {
			return false, err
		}
	}
	if c.hit {
		if c.hits++; c.hits > maxBreakpointHits {
			return false, fmt.Errorf("%w: it comes to %#x again and again, %d branches after the exit", ErrLanding, to.RIP, count)
		}
		if err := c.hw.SetResume(true); err != nil {
			return false, err
		}
		c.hit, c.resumed = false, st
		c.resumed.Resume = true
	}
	return false, nil
}

// enter runs the guest once.
func (c *branches) enter(to Stop, count uint64) error {
	r, err := c.hw.Enter()
	if err != nil {
		return err
	}
	if r.kind != branchKick || count != c.seen {
		c.idle = 0
	}
	c.seen, c.idle = count, c.idle+r.ran
	switch r.kind {
	case branchKick:
		if c.idle >= maxIdle {
			return fmt.Errorf("%w: it makes no branch any more, %d after the exit; the stop at %#x comes after %d", ErrLanding, count, to.RIP, to.Count)
		}
	case branchBreakpoint:
		c.hit, c.resumed = true, branchState{} // the instruction that RF was set for has been executed
	case branchDebug:
		return ErrGuestDebug
	case branchExit:
		return fmt.Errorf("%w: it makes an exit (KVM reason %d) %d or more branches after the last; the stop at %#x comes after %d",
			ErrLanding, r.exit, count, to.RIP, to.Count)
	}
	return nil
}

// Busy is false: a landing may end at any time, for End takes back what it has set.
func (c *branches) Busy() bool { return false }

func (c *branches) End() error {
	var errs [3]error
	if c.resumed.Resume {
		// A frame that an interrupt makes here must not have the flag.
		st, err := c.hw.State()
		if errs[0] = err; err == nil && st == c.resumed {
			errs[0] = c.hw.SetResume(false)
		}
	}
	if c.near {
		errs[1] = c.hw.ClearBreakpoint()
	}
	if c.over {
		errs[2] = c.hw.SetOverflow(noOverflow)
	}
	*c = branches{hw: c.hw, base: c.base, counts: c.counts}
	return errors.Join(errs[:]...)
}
