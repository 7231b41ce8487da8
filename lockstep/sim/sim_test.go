package sim

import (
	"bytes"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// seedsPerTest is what takes about 20 seconds of one processor.
const seedsPerTest = 1000

// TestSeeds runs the protocol through many histories. ./build.sh sim --seeds N runs more.
func TestSeeds(t *testing.T) {
	n := uint64(seedsPerTest)
	if testing.Short() {
		n = 100
	}
	var (
		wg    sync.WaitGroup
		next  atomic.Uint64
		mu    sync.Mutex
		total Stats
	)
	for range runtime.NumCPU() {
		wg.Go(func() {
			for seed := next.Add(1); seed <= n; seed = next.Add(1) {
				s, err := Run(Options{Seed: seed})
				mu.Lock()
				total.Add(s)
				mu.Unlock()
				if err != nil {
					t.Errorf("%v; to repeat: ./build.sh sim --seed %d --trace", err, seed)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d seeds: %v", n, total)
	// The histories are worth something only if all of this happens in them.
	for name, count := range map[string]int{
		"outputs": total.Released, "acknowledgements": total.Acked, "crashes": total.Crashes, "pauses": total.Pauses,
		"partitions": total.Partitions, "broken links": total.Breaks, "cold starts": total.ColdStarts,
		"take-overs": total.TakeOvers, "joins": total.Joins, "cuts": total.Cuts, "memory errors": total.Injected,
		"hand-overs": total.SwitchOvers, "divergences": total.Divergences,
	} {
		require.NotZero(t, count, name)
	}
}

func TestSeedRepeats(t *testing.T) {
	run := func() (string, Stats) {
		var b bytes.Buffer
		s, err := Run(Options{Seed: 7, Trace: &b})
		require.NoError(t, err)
		return b.String(), s
	}
	text, stats := run()
	again, same := run()
	require.NotEmpty(t, text)
	require.Equal(t, text, again)
	require.Equal(t, stats, same)
}
