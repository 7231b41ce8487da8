package main

import (
	"context"
	"errors"
	"net/http"
	"os"
	"time"

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
func explain(err error) error {
	if errors.Is(err, vmm.ErrEnded) {
		return control.ErrEnded()
	}
	return err
}

func (s *steering) Status(ctx context.Context) (control.Status, error) {
	st, err := s.m.Status(ctx)
	if err != nil {
		return control.Status{}, explain(err)
	}
	out := control.Status{
		Name: st.Name, State: control.State(st.State), Position: st.Position, VirtualTimeMS: st.VirtualTime.Milliseconds(),
		UptimeMS: time.Since(s.r.started).Milliseconds(), MemoryBytes: st.MemoryBytes, CPUs: s.r.guest.CPUs, PID: os.Getpid(), Version: version,
		Consoles: []string{},
	}
	for _, c := range s.r.ports.all {
		out.Consoles = append(out.Consoles, c.Name())
	}
	return out, nil
}

func (s *steering) Stats(ctx context.Context) (control.Stats, error) {
	st, err := s.m.Status(ctx)
	if err != nil {
		return control.Stats{}, explain(err)
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
		return control.Stats{}, explain(err)
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

func (s *steering) Pause(ctx context.Context) error  { return explain(s.m.Pause(ctx)) }
func (s *steering) Resume(ctx context.Context) error { return explain(s.m.Resume(ctx)) }
func (s *steering) Reset(ctx context.Context) error  { return explain(s.m.Reset(ctx)) }

func (s *steering) Save(ctx context.Context, path string) error {
	err := s.m.Save(ctx, path)
	if err == nil || errors.Is(err, vmm.ErrEnded) {
		return explain(err)
	}
	s.r.events.Emit(event.SaveFailed, event.Attrs{"path": path, "error": err.Error()})
	return &control.Error{Code: "save-failed", Status: http.StatusInternalServerError, Message: err.Error(),
		Remedy: "check the directory's permissions and free space; the guest goes on"}
}

func (s *steering) PowerButton() error {
	s.r.stopping.Store(true)
	return explain(s.m.PowerButton())
}

func (s *steering) Quit() { s.r.quit() }

func (s *steering) Console(name string) *console.Console { return s.r.ports.named(name) }
