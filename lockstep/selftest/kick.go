package selftest

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/ftvmm/ftvmm/vmm"
)

// Kicks come up to maxPause apart; one in pauseOneIn also stops the guest's time.
const (
	maxPause   = 300 * time.Microsecond
	pauseOneIn = 32
)

// kick stops the machine for nothing at random moments until stop is called. A kick must have no effect on
// the guest (docs/determinism.md, "Positions").
func kick(m *vmm.Machine, seed, stream uint64) (stop func()) {
	rng := rand.New(rand.NewPCG(seed, stream))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTimer(0)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			// An error only says that the machine has ended.
			if rng.IntN(pauseOneIn) == 0 {
				_ = m.Pause(ctx)
				_ = m.Resume(context.Background())
			} else {
				_, _ = m.Status(ctx)
			}
			t.Reset(time.Duration(rng.Int64N(int64(maxPause))))
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}
