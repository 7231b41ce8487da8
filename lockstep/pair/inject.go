package pair

import (
	"context"
	"fmt"
	"time"

	"github.com/ftvmm/ftvmm/lockstep/pages"
)

// Fault is something that goes wrong in a guest on one side, for tests of what the pair does about it.
type Fault string

// The faults.
const (
	FaultMemory   Fault = "memory"   // a bit of memory flips, at the end of the guest's first region, where little is
	FaultRegister Fault = "register" // a bit of a register flips
	FaultClock    Fault = "clock"    // the virtual clock is a millisecond fast from now on
)

// Inject makes a fault happen on the side that follows. It returns when it has.
func (p *Pair) Inject(ctx context.Context, f Fault) error {
	w := p.world
	if !w.is(following) {
		return fmt.Errorf("%w: faults are for the side that follows", ErrNotNow)
	}
	done := make(chan error, 1)
	w.order(func() error {
		done <- p.inject(f)
		return nil
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return ErrNotNow
	}
}

// inject makes a fault happen. On the vCPU loop.
func (p *Pair) inject(f Fault) error {
	switch f {
	case FaultMemory:
		r := p.m.Memory().Regions()[0]
		r.Bytes[len(r.Bytes)-pages.Size] ^= 1 // behind the dirty log's back, as a fault would
	case FaultRegister:
		return p.m.FlipRegister()
	case FaultClock:
		p.world.skew += int64(time.Millisecond)
	default:
		return fmt.Errorf("pair: there is no fault %q", f)
	}
	return nil
}
