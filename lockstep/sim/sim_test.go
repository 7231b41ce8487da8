package sim

import (
	"testing"
	"time"
)

func TestQuick(t *testing.T) {
	var total Stats
	start := time.Now()
	n := 0
	bad := 0
	for seed := uint64(1); time.Since(start) < 10*time.Second && bad < 8; seed++ {
		s, err := Run(Options{Seed: seed})
		total.Add(s)
		n++
		if err != nil {
			bad++
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	t.Logf("%d seeds %+v", n, total)
}
