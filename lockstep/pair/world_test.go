package pair

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
)

// The log of a stop between two exits may arrive in pieces: a guest that follows waits there until it knows that it has all.
func TestAStopBetweenExitsWaitsForAllOfItsLog(t *testing.T) {
	w := &world{bell: new(vmm.Bell), m: new(vmm.Machine)}
	w.become(following)
	pos := vmm.Position{Exit: 97, Count: 49}
	entry := func(kind log.Kind) []log.Entry {
		return []log.Entry{{Pos: pos, Kind: kind, Input: vmm.Input{Kind: vmm.InputLink, Up: true}}}
	}
	require.NoError(t, w.feed(entry(log.Stop), nil, protocol.Point{Exit: 97}, true))
	_, ok := w.Next(vmm.Position{Exit: 97})
	require.True(t, ok)
	w.Stopped(pos, vmm.Stop{})
	taken := make(chan int)
	go func() {
		inputs, _ := w.follow(pos, nil)
		taken <- len(inputs)
	}()
	stands := func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.waits
	}
	for n := 1; n <= 3; n++ {
		require.Eventually(t, stands, time.Minute, time.Millisecond, "the guest goes on with %d of 3 inputs", n-1)
		require.NoError(t, w.feed(entry(log.Input), nil, protocol.Point{}, false))
		require.Eventually(t, func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.peek() == nil && w.waits
		}, time.Minute, time.Millisecond)
	}
	require.NoError(t, w.feed(nil, nil, protocol.Point{Exit: 98}, true))
	require.Equal(t, 3, <-taken)
}
