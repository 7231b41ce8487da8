//go:build sabotage

package sim

import (
	"testing"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// limit is the number of seeds within which each broken rule must be noticed.
const limit = 1000

func caught(t *testing.T, name string, o Options) {
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		for o.Seed = 1; o.Seed <= limit; o.Seed++ {
			if _, err := Run(o); err != nil {
				t.Logf("noticed at seed %d: %v", o.Seed, err)
				return
			}
		}
		t.Errorf("not noticed in %d seeds", limit)
	})
}

// TestBrokenRules breaks one rule after the other: the simulator must notice each.
func TestBrokenRules(t *testing.T) {
	for _, r := range protocol.Rules {
		caught(t, string(r), Options{Prepare: func(n *protocol.Node) { n.Break(r) }})
	}
	for _, r := range ShellRules {
		caught(t, string(r), Options{Break: r})
	}
}
