package vmm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/kvm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// This file is what a pair needs of a machine beyond running it: to copy its state while it runs, to replace
// it while it runs, to stop it and let it go on (docs/lockstep.md).

// ErrStandby reports a command to a machine that follows another's log.
var ErrStandby = errors.New("vmm: this machine follows another one: ask that one")

// readOnlyData is the type of a data segment that is accessed and cannot be written (Intel SDM volume 3, 3.4.5.1).
const readOnlyData = 1

// Misser is an [InputSource] that can go on when a landing fails.
type Misser interface {
	// Missed is told of an error that is ErrLanding. If it returns true the loop goes on from where the guest is; the
	// source sees to it that it comes no further.
	Missed(err error) bool
}

// Ender is an [InputSource] that has a say in the guest's end.
type Ender interface {
	// Ended is called on the vCPU loop when the guest has ended, and may wait. If it returns false the machine
	// has been given another state ([Machine.Replace]) or a command waits, and it is asked again if the guest has
	// ended in that state, too.
	Ended(e Exit) bool
}

// Stucker is an [InputSource] that wants to know of inputs and interrupts that cannot reach the
// guest.
type Stucker interface {
	// Stuck is called on the vCPU loop at a stop without a name, while inputs or an interrupt
	// wait for one that has, and at each such stop again.
	Stuck(pos Position)
}

// Go has the vCPU loop run f at its next stop, with the last exit complete, and does not wait. Functions run in the
// order in which they were posted. An error ends the machine. If the queue is full (64 wait) or the machine has ended, f is not run and
// Go returns false.
func (m *Machine) Go(f func() error) bool {
	select {
	case m.queue <- command{f: f}:
		m.bell.Ring()
		return true
	default:
		return false
	}
}

// Freeze stops the guest where it is, like Pause, but for those who use Go and Thaw. Called on the vCPU loop.
func (m *Machine) Freeze() {
	m.frozen = true
	m.source.Pause()
}

// Thaw ends a Freeze. Called on the vCPU loop.
func (m *Machine) Thaw() {
	m.frozen = false
	m.source.Resume()
}

// Serve answers the commands that wait, for a source that keeps the vCPU loop waiting in one of its methods: those that may
// run at any time are run, others are refused with [ErrStandby]. It reports whether the user has asked for the end.
func (m *Machine) Serve() (ending bool) {
	for {
		select {
		case c := <-m.queue:
			if !c.raw && c.done != nil {
				c.done <- ErrStandby
				continue
			}
			err := c.f()
			if c.done != nil {
				c.done <- err
			}
		default:
			return m.quitting
		}
	}
}

// Complete completes the last exit. Called on the vCPU loop, between two stops.
func (m *Machine) Complete() error { return m.completeAll() }

// NewTerm makes the present stop position 0, at which the loop takes inputs before it goes on. Called on the vCPU loop with the last exit complete.
func (m *Machine) NewTerm() error {
	m.pos, m.named, m.noWindow, m.fresh = Position{}, true, false, true
	if m.counter != nil {
		return m.counter.Restart()
	}
	return nil
}

// EncodeState returns the canonical encoding of the machine's state but memory. Called on the vCPU loop with
// the last exit complete.
func (m *Machine) EncodeState() ([]byte, error) {
	s, err := m.state()
	if err != nil {
		return nil, err
	}
	b, err := encMode.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("vmm: encode state: %w", err)
	}
	if len(b) > maxState {
		return nil, fmt.Errorf("vmm: state of %d bytes is over the limit of %d", len(b), maxState)
	}
	return b, nil
}

// DecodeState decodes what EncodeState has encoded, and says whether this machine can take it.
func (m *Machine) DecodeState(b []byte) (*State, error) {
	if len(b) > maxState {
		return nil, fmt.Errorf("vmm: state of %d bytes is over the limit of %d", len(b), maxState)
	}
	s := new(State)
	if err := decMode.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("vmm: decode state: %w", err)
	}
	return s, m.fingerprint().match(s.Machine)
}

// Replace gives a machine whose loop waits in a method of its source another state: first write writes what changes of
// memory, then s is set. The stop at which the source was called is void: when the source returns,
// the loop begins anew from the new state. It returns the pages that KVM wrote to get rid of an instruction that was half done;
// there should be none but those that write has written. After an error the machine cannot be used.
func (m *Machine) Replace(s *State, write func() error) error {
	if err := m.abandon(); err != nil {
		return err
	}
	if err := write(); err != nil {
		return err
	}
	if err := m.setState(s); err != nil {
		return err
	}
	m.fresh, m.resetWanted, m.stopWanted, m.inputsRung = true, false, false, false
	m.exit = s.Exit
	m.run.SetInterruptWindow(false)
	if m.counter != nil {
		if err := m.counter.Restart(); err != nil {
			return err
		}
	}
	m.source.SetTime(m.clock.Now())
	m.reissue()
	return nil
}

// abandon ends an instruction that is half done (KVM waits for the result of its access to a device) without
// letting it do anything. KVM has no call for that; the instruction is finished where it cannot store: in long mode in an address
// space in which nothing is mapped, else in segments that end at once. Registers, events and all else are overwritten
// afterwards.
func (m *Machine) abandon() error {
	if !m.dangling {
		return nil
	}
	before, err := m.vcpu.Sregs()
	if err != nil {
		return err
	}
	s := before
	if s.EFER&eferLMA != 0 {
		s.CR3 = mmioLAPIC // no memory: the page walk finds nothing present
	} else {
		for _, seg := range []*kvm.Segment{&s.DS, &s.ES, &s.FS, &s.GS, &s.SS} {
			seg.Limit, seg.G, seg.Typ = 0, 0, readOnlyData
		}
	}
	if err := m.vcpu.SetSregs(&s); err != nil {
		return err
	}
	for i := 0; ; i++ {
		m.run.SetImmediateExit(true)
		errno := m.vcpu.Run()
		m.run.SetImmediateExit(false)
		switch {
		case errno == unix.EINTR || errno == unix.EAGAIN:
			m.incomplete, m.dangling = false, false
			return m.vcpu.SetSregs(&before)
		case errno != 0:
			return fmt.Errorf("vmm: abandon an instruction: %w", errno)
		case i == maxCompletions:
			return fmt.Errorf("vmm: an instruction at exit %v does not end", m.pos)
		}
	}
}

// TakeDirty calls f with the page frame number (address / 4096) of every page that the guest or this program has written
// since the last call, some perhaps twice, and begins anew. Config.DirtyLog must be set. Called on the vCPU loop.
func (m *Machine) TakeDirty(f func(pfn uint64)) error {
	for i, r := range m.mem.Regions() {
		bitmap := make([]uint64, (len(r.Bytes)/memory.PageSize+63)/64)
		if err := m.vm.DirtyLog(uint32(i), bitmap); err != nil {
			return err
		}
		kvm.Pages(bitmap, func(page uint64) { f(r.Base/memory.PageSize + page) })
	}
	m.mem.TakeDirty(func(gpa uint64) { f(gpa / memory.PageSize) })
	return nil
}

// PowerCycle brings a machine that has no guest running to its power-on state, with empty memory. Called on the vCPU loop, by
// a source that keeps it waiting.
func (m *Machine) PowerCycle() error {
	if err := m.abandon(); err != nil {
		return err
	}
	if err := m.mem.Clear(); err != nil {
		return err
	}
	for i := range m.components {
		if r := m.components[i].reset; r != nil {
			r()
		}
	}
	m.halted, m.nmi, m.resetWanted, m.exit = false, false, false, nil
	if err := m.NewTerm(); err != nil {
		return err
	}
	return m.powerOn()
}

// FlipRegister changes a bit of the guest's R12: a fault, for tests. Called on the vCPU loop, at a stop.
func (m *Machine) FlipRegister() error {
	r, err := m.vcpu.Regs()
	if err != nil {
		return err
	}
	r.R12 ^= 1
	return m.vcpu.SetRegs(&r)
}

// Components returns how many devices have a state of their own.
func (m *Machine) Components() int { return len(m.components) }

// EncodeComponent returns the name and the canonical encoding of a device's state. Called on the vCPU loop, at a stop.
func (m *Machine) EncodeComponent(i int) (name string, state []byte, err error) {
	c := &m.components[i]
	b, err := encMode.Marshal(c.save())
	return c.name, b, err
}

// Quitting says whether the user has asked for the end. Called on the vCPU loop.
func (m *Machine) Quitting() bool { return m.quitting }

// Fresh says whether a term has begun at this stop and its inputs have not been asked for. Called on the vCPU loop.
func (m *Machine) Fresh() bool { return m.fresh }

// Halted says whether the guest is in a HLT. Called on the vCPU loop.
func (m *Machine) Halted() bool { return m.halted }
