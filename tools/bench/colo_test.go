package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestPauses(t *testing.T) {
	ms := func(n int) time.Time { return time.UnixMilli(int64(n)) }
	reports := func(at ...int) (all []time.Time) {
		for _, n := range at {
			all = append(all, ms(n))
		}
		return all
	}
	checkpoint := func(stop, resume int) []qmpEvent { return []qmpEvent{{"STOP", ms(stop)}, {"RESUME", ms(resume)}} }
	for _, tt := range []struct {
		name    string
		reports []time.Time
		events  []qmpEvent
		want    []time.Duration
	}{
		{"the gap around", reports(1, 2, 3, 50, 51), checkpoint(4, 49), []time.Duration{47 * time.Millisecond}},
		{"a report that was read late", reports(1, 2, 6, 50, 51), checkpoint(4, 49), []time.Duration{44 * time.Millisecond}},
		{"no report between two checkpoints", reports(1, 90, 91), append(checkpoint(2, 40), checkpoint(42, 88)...), []time.Duration{89 * time.Millisecond}},
		{"two", reports(1, 20, 21, 90), append(checkpoint(2, 19), checkpoint(22, 88)...), []time.Duration{19 * time.Millisecond, 69 * time.Millisecond}},
		{"a gap without checkpoint", reports(1, 30, 31, 40), checkpoint(32, 39), []time.Duration{9 * time.Millisecond}},
		{"before it begins and after it ends", reports(-50, -10, 1, 900, 1200), append(checkpoint(-40, -20), checkpoint(950, 1100)...), nil},
		{"one that does not end", reports(1, 2, 90), checkpoint(3, 80)[:1], nil},
		{"no report", nil, checkpoint(3, 80), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.Equal(t, tt.want, pauses(tt.reports, tt.events, ms(0), ms(1000)))
		})
	}
}
