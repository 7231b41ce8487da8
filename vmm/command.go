package vmm

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// ErrEnded reports a command to a machine that no longer runs.
var ErrEnded = errors.New("vmm: the machine has ended")

// maxCommands bounds the commands that wait for the loop.
const maxCommands = 64

// command is a function that the vCPU loop runs at a stop, with the last exit complete.
type command struct {
	f    func() error
	done chan error // nil: nobody waits, and an error ends the machine
	raw  bool       // may run at any stop, also where the last exit cannot be completed
}

// do has the vCPU loop run f, with the vCPU stopped and the last exit complete, and
// returns its error.
func (m *Machine) do(ctx context.Context, f func() error) error {
	return m.order(ctx, command{f: f, done: make(chan error, 1)})
}

func (m *Machine) order(ctx context.Context, c command) error {
	select {
	case m.queue <- c:
	case <-m.done:
		return ErrEnded
	case <-ctx.Done():
		return ctx.Err()
	}
	m.bell.Ring()
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-m.done:
		select {
		case err := <-c.done:
			return err
		default:
			return ErrEnded
		}
	}
}

// commands runs what waits in the queue, and stays while the machine is paused.
func (m *Machine) commands() error {
	for m.exit == nil {
		select {
		case c := <-m.queue:
			if !c.raw {
				if err := m.completeAll(); err != nil {
					if c.done != nil {
						c.done <- err
					}
					return err
				}
			}
			err := c.f()
			if c.done != nil {
				c.done <- err
			} else if err != nil {
				return err
			}
			continue
		default:
		}
		if !m.paused.Load() && !m.frozen {
			break
		}
		m.bell.Sleep(-1)
		m.bell.answer()
	}
	// Whatever rang meanwhile is looked at by the caller, who takes inputs next.
	m.inputsRung = true
	return nil
}

// queued runs the commands of a guest that has ended.
func (m *Machine) queued() error {
	for {
		select {
		case c := <-m.queue:
			err := c.f()
			if c.done != nil {
				c.done <- err
			} else if err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

// Pause stops the guest and its time until Resume. Pausing a paused machine does nothing.
func (m *Machine) Pause(ctx context.Context) error {
	return m.do(ctx, func() error {
		if !m.paused.Load() {
			m.paused.Store(true)
			m.source.Pause()
			m.event("paused", nil)
		}
		return nil
	})
}

// Resume lets a paused guest go on.
func (m *Machine) Resume(ctx context.Context) error {
	return m.do(ctx, func() error {
		if m.paused.Load() {
			m.paused.Store(false)
			m.source.Resume()
			m.event("resumed", nil)
		}
		return nil
	})
}

// Reset resets the machine as its reset button would: memory keeps its content, and the
// firmware or kernel is loaded anew.
func (m *Machine) Reset(ctx context.Context) error {
	if !m.source.Anywhere() {
		// A reset is an input of a guest that is recorded.
		return m.press("reset button", func(b buttons) { b.PressReset() })
	}
	return m.do(ctx, m.reset)
}

// Quit ends the machine at once, as pulling the plug would. It does not wait.
func (m *Machine) Quit() {
	go func() {
		_ = m.order(context.Background(), command{raw: true, done: make(chan error, 1), f: func() error {
			m.quitting = true
			m.end(Exit{Reason: ExitQuit})
			return nil
		}})
	}()
}

// PowerButton presses the guest's power button: an operating system shuts down.
func (m *Machine) PowerButton() error {
	err := m.press("power button", func(b buttons) { b.PressPowerButton() })
	if err == nil {
		m.event("power-button", nil)
	}
	return err
}

// buttons are what an input source offers to press.
type buttons interface {
	PressPowerButton()
	PressReset()
}

func (m *Machine) press(what string, f func(buttons)) error {
	b, ok := m.source.(buttons)
	if !ok {
		return fmt.Errorf("vmm: this input source has no %s", what)
	}
	select {
	case <-m.done:
		return ErrEnded
	default:
	}
	f(b)
	return nil
}

// Stats counts what a machine has done.
type Stats struct {
	Exits       uint64 `json:"exits"`       // synchronous exits
	Interrupted uint64 `json:"interrupted"` // returns of KVM_RUN that the host caused
	Windows     uint64 `json:"windows"`     // interrupt windows
	Interrupts  uint64 `json:"interrupts"`  // vectors injected
	Inputs      uint64 `json:"inputs"`      // inputs applied
	Emulated    uint64 `json:"emulated"`    // instructions that KVM could not emulate and we did
	UnknownMSRs uint64 `json:"unknown_msrs"`
	Resets      uint64 `json:"resets"`
	Landings    uint64 `json:"landings"` // asynchronous stops of a recording that were reached
}

// Stats returns the counts of a machine that does not run.
func (m *Machine) Stats() Stats { return m.stats }

// Position returns the last stop of a machine that does not run.
func (m *Machine) Position() Position { return m.pos }

// Status is a machine's state at a glance.
type Status struct {
	Name        string        `json:"name"`
	State       string        `json:"state"` // created, running, paused, halted, ended
	Position    string        `json:"position"`
	VirtualTime time.Duration `json:"virtual_time_ns"`
	MemoryBytes uint64        `json:"memory_bytes"`
	Stats       Stats         `json:"stats"`
}

// Status returns the machine's state. It stops the guest for a moment.
func (m *Machine) Status(ctx context.Context) (Status, error) {
	s := Status{Name: m.cfg.Name, MemoryBytes: m.cfg.Memory}
	select {
	case <-m.done:
		s.State = "ended"
		return s, nil
	default:
	}
	if !m.started.Load() {
		s.State = "created"
		return s, nil
	}
	err := m.order(ctx, command{raw: true, done: make(chan error, 1), f: func() error {
		switch {
		case m.paused.Load():
			s.State = "paused"
		case m.halted:
			s.State = "halted"
		default:
			s.State = "running"
		}
		s.Position = m.pos.String()
		s.VirtualTime = time.Duration(m.clock.Now())
		s.Stats = m.stats
		return nil
	}})
	if errors.Is(err, ErrEnded) {
		s.State = "ended"
		return s, nil
	}
	return s, err
}

// end sets how the machine ends; the first call counts.
func (m *Machine) end(e Exit) {
	if m.exit == nil {
		m.exit = &e
	}
}

// crash ends a guest that cannot go on.
func (m *Machine) crash(what string) {
	regs, err := m.vcpu.Regs()
	if err == nil {
		what += fmt.Sprintf(" (rip %#x, rsp %#x, exit %v)", regs.RIP, regs.RSP, m.pos)
	}
	m.end(Exit{Reason: ExitCrash, Detail: what})
}
