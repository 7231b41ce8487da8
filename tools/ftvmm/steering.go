package main

import (
	"context"
	"errors"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/ftvmm/ftvmm/lockstep/pair"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/console"
	"github.com/ftvmm/ftvmm/vmm/control"
	"github.com/ftvmm/ftvmm/vmm/event"
)

// steering is the machine as the control socket sees it.
type steering struct {
	r *runner
	m *vmm.Machine
}

var _ control.Machine = (*steering)(nil)

// explain gives the machine's errors their code.
func (s *steering) explain(err error) error {
	switch {
	case errors.Is(err, vmm.ErrEnded):
		return control.ErrEnded()
	case errors.Is(err, vmm.ErrStandby):
		return s.standby()
	}
	return err
}

// Times of a side's answers.
const (
	// standbyPatience bounds the wait for the machine of a standby, which may be busy taking a copy.
	standbyPatience = 500 * time.Millisecond
	// failoverPatience bounds the wait for a moment at which the guest can be handed over: between two copies of its state.
	failoverPatience = 5 * time.Second
	failoverRetry    = time.Millisecond
)

// Texts about the two sides.
const (
	guestUnpaired = "this guest runs alone"
	pairRemedy    = "run it as one side of a pair: ftvmm run --pair"
)

func unpaired() *control.Error {
	return &control.Error{Code: control.CodeNotPaired, Status: http.StatusConflict, Message: guestUnpaired, Remedy: pairRemedy}
}

// standby refuses what only the side can do that runs the guest.
func (s *steering) standby() *control.Error {
	name, here := s.r.guest.Name, s.r.twin.Load().name()
	return &control.Error{
		Code: control.CodeStandby, Status: http.StatusConflict,
		Message: "side " + here + " is the standby: the guest runs on side " + otherSide(here) + ", or nowhere",
		Remedy:  "ask side " + otherSide(here) + " on its host: its name there is " + name + "-" + otherSide(here),
	}
}

func otherSide(side string) string {
	if side == "a" {
		return "b"
	}
	return "a"
}

// onStandby reports whether this is a side of a pair on which the guest does not run.
func (s *steering) onStandby() bool {
	t := s.r.twin.Load()
	return t != nil && !t.Live()
}

// status asks the machine. That of a standby may be busy with a copy: its answer is not waited for.
func (s *steering) status(ctx context.Context) (vmm.Status, error) {
	if !s.onStandby() {
		return s.m.Status(ctx)
	}
	short, cancel := context.WithTimeout(ctx, standbyPatience)
	defer cancel()
	st, err := s.m.Status(short)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return vmm.Status{Name: s.r.guest.Name, State: string(control.Paused), MemoryBytes: uint64(s.r.guest.Memory)}, nil
	}
	return st, err
}

func (s *steering) Status(ctx context.Context) (control.Status, error) {
	st, err := s.status(ctx)
	if err != nil {
		return control.Status{}, s.explain(err)
	}
	out := control.Status{
		Name: st.Name, State: control.State(st.State), Position: st.Position, VirtualTimeMS: st.VirtualTime.Milliseconds(),
		UptimeMS: time.Since(s.r.started).Milliseconds(), MemoryBytes: st.MemoryBytes, CPUs: s.r.guest.CPUs, PID: os.Getpid(), Version: version,
		Consoles: []string{},
	}
	for _, c := range s.r.ports.all {
		out.Consoles = append(out.Consoles, c.Name())
	}
	if t := s.r.twin.Load(); t != nil {
		out.Side, out.Role = t.name(), role(t.Live())
	}
	return out, nil
}

func role(live bool) control.Role {
	if live {
		return control.Primary
	}
	return control.Standby
}

// Pair describes this side.
func (s *steering) Pair(ctx context.Context) (control.Pair, error) {
	t := s.r.twin.Load()
	if t == nil {
		return control.Pair{}, unpaired()
	}
	st, err := t.Status(ctx)
	if err != nil {
		return control.Pair{}, s.explain(err)
	}
	p := control.Pair{
		Name: s.r.guest.Name, Side: st.Side, Role: role(st.Live), Phase: st.Phase, Term: st.Term, Linked: st.Linked,
		Protected: st.Linked && st.Record.InSync == protocol.Both && (st.Live || st.Phase == protocol.Backup.String()),
		Record:    control.PairRecord{Epoch: st.Record.Epoch, InSync: []string{}}, HeldOutputs: st.Held, Cuts: st.Cuts,
		Paths: []control.PairPath{},
	}
	for _, side := range []protocol.Side{protocol.A, protocol.B} {
		if st.Record.InSync.Has(side) {
			p.Record.InSync = append(p.Record.InSync, strings.ToLower(side.String()))
		}
	}
	if st.Record.Primary != protocol.None {
		p.Record.Primary = strings.ToLower(st.Record.Primary.String())
	}
	for i, path := range st.Paths {
		if path.Up {
			p.Paths = append(p.Paths, control.PairPath{Path: i, Quiet: path.Quiet, RTT: path.RTT.Microseconds(), Log: path.Log, Bulk: path.Bulk})
		}
	}
	return p, nil
}

// Failover begins to hand the guest over. A copy of the state that is under way is waited for.
func (s *steering) Failover(ctx context.Context) error {
	t := s.r.twin.Load()
	if t == nil {
		return unpaired()
	}
	for limit := time.Now().Add(failoverPatience); ; {
		err := t.SwitchOver(ctx)
		if !errors.Is(err, pair.ErrNotNow) {
			return s.explain(err)
		}
		st, err := t.Status(ctx)
		switch {
		case err != nil:
			return s.explain(err)
		case st.Phase == protocol.Switching.String():
			return nil
		case !st.Live:
			return s.standby()
		case st.Phase != protocol.Protected.String():
			return &control.Error{
				Code: control.CodeNotProtected, Status: http.StatusConflict, Message: "the pair is not complete: side " + st.Side + " is " + st.Phase,
				Remedy: "start the other side, and wait until ftvmm pair status says protected",
			}
		case time.Now().After(limit):
			return &control.Error{
				Code: control.CodeNotNow, Status: http.StatusConflict, Message: "the state is being copied without a pause",
				Remedy: "try again",
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(failoverRetry):
		}
	}
}

// Force makes this side live against the record.
func (s *steering) Force(ctx context.Context) error {
	t := s.r.twin.Load()
	if t == nil {
		return unpaired()
	}
	err := t.Force(ctx)
	if !errors.Is(err, pair.ErrNotNow) {
		return s.explain(err)
	}
	st, err := t.Status(ctx)
	if err != nil {
		return s.explain(err)
	}
	refused := &control.Error{Code: control.CodeNotNow, Status: http.StatusConflict}
	switch {
	case st.Live:
		refused.Message, refused.Remedy = "side "+st.Side+" runs the guest already", "nothing"
	case st.Phase != protocol.Waiting.String():
		refused.Message, refused.Remedy = "side "+st.Side+" is "+st.Phase+": only one that waits can be forced", "wait; if the other side is lost, it goes on by itself"
	default:
		refused.Message, refused.Remedy = "the disks of side "+st.Side+" are not a whole copy: it has nothing to start from", "start the other side"
	}
	return refused
}

func (s *steering) Stats(ctx context.Context) (control.Stats, error) {
	st, err := s.status(ctx)
	if err != nil {
		return control.Stats{}, s.explain(err)
	}
	n := st.Stats
	out := control.Stats{Consoles: map[string]console.Stats{}, Counters: map[string]uint64{
		"exits": n.Exits, "interrupted": n.Interrupted, "windows": n.Windows, "interrupts": n.Interrupts, "inputs": n.Inputs,
		"emulated": n.Emulated, "unknown_msrs": n.UnknownMSRs, "resets": n.Resets,
	}}
	for _, c := range s.r.ports.all {
		out.Consoles[c.Name()] = c.Stats()
	}
	if err := s.pairStats(ctx, out.Counters); err != nil {
		return control.Stats{}, s.explain(err)
	}
	return out, nil
}

// pairStats adds the counters of this side of a pair, if it is one.
func (s *steering) pairStats(ctx context.Context, to map[string]uint64) error {
	twin := s.r.twin.Load()
	if twin == nil {
		return nil
	}
	st, err := twin.Status(ctx)
	if err != nil {
		return err
	}
	to["pair_cuts"], to["pair_log_bytes"], to["pair_sent_bytes"], to["pair_outputs_held"] = st.Cuts, st.LogBytes, st.SentBytes, uint64(st.Held)
	for _, p := range st.Paths {
		if p.Log {
			to["link_rtt_ns"] = uint64(p.RTT)
		}
	}
	return nil
}

func (s *steering) Pause(ctx context.Context) error {
	return s.live(func() error { return s.m.Pause(ctx) })
}
func (s *steering) Resume(ctx context.Context) error {
	return s.live(func() error { return s.m.Resume(ctx) })
}
func (s *steering) Reset(ctx context.Context) error {
	return s.live(func() error { return s.m.Reset(ctx) })
}

// live has f do what a standby cannot.
func (s *steering) live(f func() error) error {
	if s.onStandby() {
		return s.standby()
	}
	return s.explain(f())
}

func (s *steering) Save(ctx context.Context, path string) error {
	if s.onStandby() {
		return s.standby()
	}
	err := s.m.Save(ctx, path)
	if err == nil || errors.Is(err, vmm.ErrEnded) || errors.Is(err, vmm.ErrStandby) {
		return s.explain(err)
	}
	s.r.events.Emit(event.SaveFailed, event.Attrs{"path": path, "error": err.Error()})
	return &control.Error{Code: "save-failed", Status: http.StatusInternalServerError, Message: err.Error(),
		Remedy: "check the directory's permissions and free space; the guest goes on"}
}

func (s *steering) PowerButton() error {
	return s.live(func() error {
		s.r.stopping.Store(true)
		return s.m.PowerButton()
	})
}

func (s *steering) Quit() { s.r.quit() }

func (s *steering) Console(name string) *console.Console { return s.r.ports.named(name) }
