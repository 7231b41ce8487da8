package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// CounterKind says how stops between two synchronous exits get their names (docs/determinism.md, "Positions").
type CounterKind string

// The kinds of counter.
const (
	// CounterNone: only synchronous exits are positions.
	CounterNone CounterKind = "none"
	// CounterEmulated counts the instructions that the host's KVM emulates. It names stops
	// in guest kernel code on hosts that emulate all of that (KVM-PVM).
	CounterEmulated CounterKind = "emulated"
	// CounterBranches counts the guest's conditional branches with the processor's performance counters.
	CounterBranches CounterKind = "branches"
)

// Stop is what tells an asynchronous stop from others in its segment, the guest's run from one
// synchronous exit to the next.
type Stop struct {
	Count uint64 // of the counter's events since the exit
	RIP   uint64 // as a linear address
	RCX   uint64 // the progress of a REP instruction
	Regs  uint64 // hash of the general registers and RFLAGS
}

// AsyncSource is an [InputSource] of a machine with a counter: it decides where the guest is
// stopped between two synchronous exits. Its methods are called from the vCPU loop.
type AsyncSource interface {
	InputSource
	// Due is asked at a stop that has no name yet, when the bell has rung or the guest can take
	// an interrupt that waits: shall it get one? pos is that of the exit before.
	Due(pos Position) bool
	// Stopped tells that the guest is at an asynchronous stop. Take at the same position follows.
	Stopped(pos Position, s Stop)
	// Next returns the next asynchronous stop after pos in its segment, on which the machine then lands.
	Next(pos Position) (Stop, bool)
}

// A Counter names stops between synchronous exits.
type Counter interface {
	// Restart begins to count anew, at a synchronous exit.
	Restart() error
	// Locate names the present stop, false if it cannot: the guest runs code that the counter does not
	// count, or an event is on its way into it.
	Locate() (s Stop, ok bool, err error)
	// Approach moves the guest towards the stop, by one entry. It returns true when it is there.
	Approach(to Stop) (bool, error)
	// Busy says that Approach must be called again before End: the guest is in the middle of something.
	Busy() bool
	// End gives back what Approach has taken, at the end of a landing.
	End() error
	Close() error
}

// ErrLanding reports that a guest does not come to an asynchronous stop where its
// recording did.
var ErrLanding = errors.New("vmm: the guest does not reach the stop")

const (
	resumeFlag = 1 << 16 // RFLAGS.RF comes and goes at asynchronous stops, without a meaning for the guest

	statInsnEmulation = "insn_emulation"

	// A landing runs the guest until landMargin instructions before the stop, in pieces that a
	// timer of the kernel ends, and to a breakpoint at the stop's RIP from there on. A piece is a
	// quarter of what is left at `fastest` an instruction, several times the speed of any emulator: a
	// late timer then still ends it in time.
	landMargin = 256
	fastest    = 250 * time.Nanosecond
	minPiece   = 50 * time.Microsecond
)

// emulated is the counter of [CounterEmulated].
type emulated struct {
	vcpu  *kvm.VCPU
	run   *kvm.Run
	stat  *kvm.Statistic
	base  uint64
	timer *threadTimer

	// Of a landing:
	debug debugMode
	hit   bool // the guest is at the breakpoint, too early
}

// debugMode is what the vCPU's debugging is set to.
type debugMode uint8

const (
	debugOff debugMode = iota
	debugStep
	debugBreak
)

func newEmulated(vcpu *kvm.VCPU) (*emulated, error) {
	stat, err := vcpu.Statistic(statInsnEmulation)
	if err != nil {
		return nil, err
	}
	return &emulated{vcpu: vcpu, run: vcpu.RunPage(), stat: stat}, nil
}

func (c *emulated) Close() error {
	if c.timer != nil {
		c.timer.close()
	}
	return c.stat.Close()
}

func (c *emulated) Restart() (err error) {
	c.base, err = c.stat.Value()
	return err
}

func (c *emulated) Locate() (s Stop, ok bool, err error) {
	v, err := c.stat.Value()
	if err != nil {
		return s, false, err
	}
	sregs, err := c.vcpu.Sregs()
	if err != nil || sregs.SS.DPL != 0 {
		return s, false, err // native code, which is not counted
	}
	e, err := c.vcpu.Events()
	if err != nil || e.E.Inject|e.E.Pending|e.I.Inject|e.N.Inject|e.N.Pending != 0 {
		return s, false, err
	}
	regs, err := c.vcpu.Regs()
	if err != nil {
		return s, false, err
	}
	return Stop{Count: v - c.base, RIP: sregs.CS.Base + regs.RIP, RCX: regs.RCX, Regs: hashRegs(&regs)}, true, nil
}

// hashRegs hashes the registers of an asynchronous stop.
func hashRegs(r *kvm.Regs) uint64 {
	var b [18 * 8]byte
	for i, v := range [...]uint64{
		r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RSP, r.RBP,
		r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15, r.RIP, r.RFLAGS &^ resumeFlag,
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return xxh3.Hash(b[:])
}

func (c *emulated) Approach(to Stop) (bool, error) {
	v, err := c.stat.Value()
	if err != nil {
		return false, err
	}
	count := v - c.base
	if count > to.Count {
		return false, fmt.Errorf("%w: %d instructions after the exit it is elsewhere than at %#x", ErrLanding, to.Count, to.RIP)
	}
	if count == to.Count && c.debug != debugStep {
		// The same count holds before and after native code and an interrupt's delivery, and
		// within a REP instruction.
		if s, ok, err := c.Locate(); err != nil || ok && s == to {
			return err == nil, err
		}
	}
	switch {
	case c.debug == debugStep: // a signal came before the step
	case c.hit:
		// Off the breakpoint. More than one step would be seen by the guest: the trap flag gets into
		// the frames of interrupts and exceptions.
		if err := c.vcpu.SetSingleStep(true); err != nil {
			return false, err
		}
		c.debug, c.hit = debugStep, false
	case c.debug == debugOff && to.Count-count > landMargin:
		return false, c.approach(time.Duration(to.Count-count-landMargin) * fastest / 4)
	case c.debug == debugOff:
		if err := c.arm(to); err != nil {
			return false, err
		}
	}
	debugged, err := c.enter()
	if err != nil || !debugged {
		return false, err
	}
	if c.debug == debugStep {
		return false, c.arm(to)
	}
	c.hit = true
	return false, nil
}

// arm sets the breakpoint at the stop.
func (c *emulated) arm(to Stop) error {
	c.debug = debugBreak
	return c.vcpu.SetBreakpoint(to.RIP)
}

// approach runs the guest for about d.
func (c *emulated) approach(d time.Duration) (err error) {
	if c.timer == nil {
		if c.timer, err = newThreadTimer(); err != nil {
			return err
		}
	}
	if err := c.timer.set(max(d, minPiece)); err != nil {
		return err
	}
	_, err = c.enter()
	return errors.Join(err, c.timer.set(0))
}

// enter runs the guest to the breakpoint, a step's end (which it tells apart from others) or a
// kick. A synchronous exit has no place before the stop.
func (c *emulated) enter() (debugged bool, err error) {
	switch errno := c.vcpu.Run(); errno {
	case unix.EINTR:
		c.run.SetImmediateExit(false)
		return false, nil
	case unix.EAGAIN:
		return false, nil
	case 0:
	default:
		return false, fmt.Errorf("vmm: run vCPU: %w", errno)
	}
	switch c.run.ExitReason {
	case kvm.ExitDebug:
		return true, nil
	case kvm.ExitIRQWindowOpen, kvm.ExitIntr:
		return false, nil
	}
	v, err := c.stat.Value()
	return false, errors.Join(fmt.Errorf("%w: it makes an exit (KVM reason %d) %d instructions after the last", ErrLanding, c.run.ExitReason, v-c.base), err)
}

// Busy says whether a step has begun and not ended: then the landing must go on.
func (c *emulated) Busy() bool { return c.debug == debugStep }

func (c *emulated) End() error {
	c.hit = false
	if c.debug == debugOff {
		return nil
	}
	c.debug = debugOff
	return c.vcpu.SetSingleStep(false)
}

// threadTimer is a POSIX timer that sends the kick signal to the thread that made it,
// again and again: one that arrives just before KVM_RUN does nothing, the next one does. The kernel
// fires it by itself, however busy the host's processors are with other threads.
type threadTimer struct{ id int32 }

// sigevent is struct sigevent of <asm-generic/siginfo.h>.
type sigevent struct {
	value         uint64
	signo, notify int32
	tid           int32
	_             [11]int32
}

const sigevThreadID = 4

func newThreadTimer() (*threadTimer, error) {
	ev := sigevent{signo: int32(kickSignal), notify: sigevThreadID, tid: int32(unix.Gettid())}
	t := &threadTimer{}
	_, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&ev)), uintptr(unsafe.Pointer(&t.id)))
	if errno != 0 {
		return nil, fmt.Errorf("vmm: create timer: %w", errno)
	}
	return t, nil
}

// set has the timer fire each d from now on; 0 stops it.
func (t *threadTimer) set(d time.Duration) error {
	spec := unix.ItimerSpec{Interval: unix.NsecToTimespec(int64(d)), Value: unix.NsecToTimespec(int64(d))}
	if _, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(t.id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("vmm: set timer: %w", errno)
	}
	return nil
}

func (t *threadTimer) close() { _, _, _ = unix.Syscall(unix.SYS_TIMER_DELETE, uintptr(t.id), 0, 0) }

// name gives the present stop a name, if it can have one.
func (m *Machine) name() (bool, error) {
	s, ok, err := m.counter.Locate()
	// Count 0 is the exit itself, whose inputs have been taken.
	if err != nil || !ok || s.Count <= m.pos.Count {
		return false, err
	}
	m.pos.Count, m.named = s.Count, true
	m.async.Stopped(m.pos, s)
	return true, nil
}

// land brings the guest to the next asynchronous stop of its recording, and takes the inputs there.
// It returns early when the bell rings.
func (m *Machine) land(to Stop) (err error) {
	m.run.SetInterruptWindow(false)
	m.named = false
	defer func() { err = errors.Join(err, m.counter.End()) }()
	for {
		if !m.bell.enter() && !m.counter.Busy() {
			return nil
		}
		there, err := m.counter.Approach(to)
		m.bell.left()
		m.incomplete, m.dangling = false, false
		m.syncTPR()
		if err != nil {
			return fmt.Errorf("%w (after %v)", err, m.pos)
		}
		if there {
			break
		}
	}
	m.stats.Landings++
	m.pos.Count, m.named = to.Count, true
	m.async.Stopped(m.pos, to)
	m.takeInputs()
	return nil
}

// ProbeCounter says which counter this host offers for stops between synchronous exits, by running loops of
// known length; [Counters] tells more.
func ProbeCounter(device string) (CounterKind, error) {
	if probeBranches(device) == nil {
		return CounterBranches, nil
	}
	ok, err := probeEmulated(device)
	if err != nil || !ok {
		return CounterNone, err
	}
	return CounterEmulated, nil
}

func probeEmulated(device string) (bool, error) {
	g, err := newProbeGuest(device, probe)
	if err != nil {
		return false, err
	}
	defer g.close()
	n, err := g.emulated()
	if errors.Is(err, kvm.ErrFeature) {
		return false, nil
	}
	return n == probeCount, err
}

// The probe: mov ecx, probeLoops; 1: dec ecx; jnz 1b; hlt, in flat 32-bit code at CPL 0.
const (
	probeMemory = 2 << 20
	probeCode   = 0x1000
	probeLoops  = 1000
	probeCount  = 1 + 2*probeLoops + 1
)

var probe = []byte{0xb9, probeLoops & 0xff, probeLoops >> 8, 0, 0, 0x49, 0x75, 0xfd, 0xf4}

// emulated returns how many instructions KVM has emulated of the probe.
func (g *probeGuest) emulated() (uint64, error) {
	c, err := newEmulated(g.vcpu)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := g.restart(); err != nil {
		return 0, err
	}
	if err := c.Restart(); err != nil {
		return 0, err
	}
	if _, err := g.enter(); err != nil {
		return 0, err
	}
	v, err := c.stat.Value()
	return v - c.base, err
}
