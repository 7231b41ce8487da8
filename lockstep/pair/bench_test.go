package pair

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// noArbiter is there to be had, and never asked.
type noArbiter struct{}

func (noArbiter) Read(context.Context) (protocol.Record, error) { panic("nobody asks") }
func (noArbiter) Swap(context.Context, protocol.Record) (bool, protocol.Record, error) {
	panic("nobody asks")
}

// liveWorld is the world of a live machine that is never entered. Its events go to a shell that forgets them.
func liveWorld(b *testing.B, logging bool) *world {
	cfg := vmm.Config{Memory: 4 << 20, Kernel: []byte{0xf4}, KernelKind: boot.Flat} // HLT
	p, err := New(&cfg, Options{Keys: &link.Keys{}, Arbiter: noArbiter{}, Peer: []string{"nobody"}})
	require.NoError(b, err)
	m, err := vmm.New(cfg)
	require.NoError(b, err)
	w := p.world
	w.m = m
	w.scrub.plan(m, p.opts.ScrubPeriod)
	p.begun(logging)
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		var ring []event
		for {
			select {
			case <-p.kick:
				ring = w.events(ring)
			case <-end:
				return
			}
		}
	}()
	b.Cleanup(func() {
		close(end)
		<-ended
		require.NoError(b, m.Close())
	})
	return w
}

// BenchmarkRecording measures what a live guest's side of a pair does on the vCPU thread for an exit: with
// logging all that recording adds, without it the same calls of a guest that is alone.
func BenchmarkRecording(b *testing.B) {
	for _, exit := range []struct {
		name  string
		clock bool
	}{{"out", false}, {"clock", true}} {
		for _, logging := range []bool{true, false} {
			name := exit.name + "/alone"
			if logging {
				name = exit.name + "/logged"
			}
			b.Run(name, func(b *testing.B) {
				w := liveWorld(b, logging)
				regs := kvm.Regs{RIP: 0x100000}
				r := vmm.ExitRecord{Kind: vmm.KindOut, Addr: 0x80, Size: 1, Regs: &regs}
				b.ReportAllocs()
				for b.Loop() {
					r.Pos.Exit++
					regs.RAX++
					w.EveryStop()
					if exit.clock {
						w.Sample(r.Pos)
					}
					w.observe(&r)
					w.Arm(1 << 62)
				}
			})
		}
	}
}
