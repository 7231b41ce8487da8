package link

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestEachClassTakesThePathThatSuitsIt(t *testing.T) {
	type state struct {
		missing, quiet bool
		rtt            time.Duration
	}
	const ms = time.Millisecond
	for _, c := range []struct {
		name      string
		from      int // where the log is
		paths     [MaxPaths]state
		ticks     int
		log, bulk int
	}{
		{"two good ones are shared", 0, [MaxPaths]state{{rtt: ms}, {rtt: ms}}, 100, 0, 1},
		{"a clearly better one is taken when it has been so for a while", 0, [MaxPaths]state{{rtt: 2 * ms}, {rtt: ms}}, betterTicks, 1, 0},
		{"and not before", 0, [MaxPaths]state{{rtt: 2 * ms}, {rtt: ms}}, betterTicks - 1, 0, 1},
		{"a little better is not enough", 0, [MaxPaths]state{{rtt: 10 * ms}, {rtt: 9 * ms}}, 100, 0, 1},
		{"nor is half of next to nothing", 0, [MaxPaths]state{{rtt: 40_000}, {rtt: 20_000}}, 100, 0, 1},
		{"nor what has not been measured", 0, [MaxPaths]state{{rtt: ms}, {}}, 100, 0, 1},
		{"silence moves both at once", 0, [MaxPaths]state{{rtt: ms, quiet: true}, {rtt: 9 * ms}}, 1, 1, 1},
		{"a missing path too", 1, [MaxPaths]state{{rtt: 9 * ms}, {missing: true}}, 1, 0, 0},
		{"silence everywhere moves nothing", 1, [MaxPaths]state{{quiet: true}, {quiet: true}}, 1, 1, 1},
		{"silence on what is left", 1, [MaxPaths]state{{quiet: true}, {missing: true}}, 1, 0, 0},
		{"nothing is left", 0, [MaxPaths]state{{missing: true}, {missing: true}}, 1, -1, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, err := Config{Keys: &Keys{}}.complete()
			require.NoError(t, err)
			s := newSession(cfg, nonce{1}, true)
			s.tx[Log].move(c.from)
			for i, st := range c.paths {
				if !st.missing {
					s.paths[i] = &path{index: i, quiet: st.quiet}
					s.paths[i].rtt.Store(int64(st.rtt))
				}
			}
			for range c.ticks {
				s.choose()
			}
			require.Equal(t, []int{c.log, c.bulk}, []int{s.tx[Log].path(), s.tx[Bulk].path()})
		})
	}
}
