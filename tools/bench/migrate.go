package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// migrate measures QEMU's live migration: what moving a guest costs it that is still there to be moved. The guest
// writes three quarters of its memory over and over, and loopback is as fast as it is:
// the bandwidth is not limited, else such a guest never arrives.
func migrate(memoryMiB int) group {
	name, series := fmt.Sprintf("migrate-%d", memoryMiB), fmt.Sprintf("live migration, %d MiB", memoryMiB)
	return group{
		figures: []figure{
			peerFigure(figure{name: name + "-downtime", what: series + ": downtime, by QEMU's account", unit: "ms", scale: perMilli}),
			peerFigure(figure{name: name + "-gap", what: series + ": from the last report here to the first one there", unit: "ms", scale: perMilli, plot: "takeover", series: series}),
		},
		lockstep: true,
		spread: func(ctx context.Context, b *bench, v vm) (values [][]float64, err error) {
			err = b.withPair(ctx, v, memoryMiB, memoryMiB<<20/4*3, func(primary, secondary *member) error {
				downtime, gap, err := measureMigration(ctx, primary, secondary)
				values = [][]float64{{downtime.Seconds()}, {gap.Seconds()}}
				return err
			})
			return values, err
		},
	}
}

func measureMigration(ctx context.Context, primary, secondary *member) (downtime, gap time.Duration, err error) {
	// 0 is for no limit.
	if err := primary.monitor.execute(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": 0}, nil); err != nil {
		return 0, 0, err
	}
	state, err := primary.migrateTo(ctx, secondary, overTCP, "completed")
	if err != nil {
		return 0, 0, err
	}
	if err := secondary.reports(ctx, 1, goOnTimeout); err != nil {
		return 0, 0, err
	}
	here, there := primary.times(), secondary.times()
	if gap = there[0].Sub(here[len(here)-1]); gap <= 0 {
		return 0, 0, errors.New("both guests ran")
	}
	return time.Duration(state.Downtime) * time.Millisecond, gap, nil
}
