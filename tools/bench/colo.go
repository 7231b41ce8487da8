package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// COLO is QEMU's fault tolerance: both guests run, and the secondary is set to the primary's state at checkpoints,
// when output differs or after x-checkpoint-delay at the latest. Without a network card nothing is
// compared, and the delay alone makes checkpoints.
const (
	coloMemoryMiB = 64
	// coloWritten is what the guest writes between two checkpoints, in bytes: little, to COLO's good.
	coloWritten = 1 << 20
	coloAlone   = 3 * time.Second // of the guest without protection
	coloRun     = 6 * time.Second // of the guest with it
)

// colo measures COLO with a checkpoint after each delay, in milliseconds. Two hosts have TCP; a UNIX socket shows what
// of a pause is the checkpoint's own, and what is waiting for TCP.
func colo(over channel, delay int) group {
	name, series := fmt.Sprintf("colo-%d", delay), fmt.Sprintf("COLO each %d ms", delay)
	if over != overTCP {
		name, series = fmt.Sprintf("colo-unix-%d", delay), series+fmt.Sprintf(" (%s socket)", over)
	}
	return group{
		figures: []figure{
			peerFigure(figure{name: name + "-progress", what: series + ": progress of the guest, of an unprotected one's", unit: "%", scale: perCent, more: true}),
			peerFigure(figure{name: name + "-pause", what: series + ": a pause of the guest", unit: "ms", scale: perMilli, plot: "pauses", series: series}),
			peerFigure(figure{name: name + "-pause-max", what: series + ": the longest pause of a run", unit: "ms", scale: perMilli}),
			peerFigure(figure{name: name + "-takeover", what: series + ": from x-colo-lost-heartbeat until the secondary goes on", unit: "ms", scale: perMilli, plot: "takeover", series: "COLO, once told of the loss"}),
		},
		lockstep: true,
		spread: func(ctx context.Context, b *bench, v vm) ([][]float64, error) {
			var r coloResult
			err := b.withPair(ctx, v, coloMemoryMiB, coloWritten, func(primary, secondary *member) (err error) {
				r, err = measureCOLO(ctx, over, delay, primary, secondary)
				return err
			})
			if err != nil {
				return nil, err
			}
			pauses := seconds(r.pauses)
			return [][]float64{{r.progress}, pauses, {slices.Max(pauses)}, {r.takeover.Seconds()}}, nil
		},
	}
}

type coloResult struct {
	progress float64 // share of an unprotected guest's
	pauses   []time.Duration
	takeover time.Duration
}

func measureCOLO(ctx context.Context, over channel, delay int, primary, secondary *member) (r coloResult, err error) {
	alone, _, _, err := primary.run(ctx, coloAlone)
	if err != nil {
		return r, err
	}
	for _, m := range []*member{primary, secondary} {
		on := map[string]any{"capabilities": []any{map[string]any{"capability": "x-colo", "state": true}}}
		if err := m.monitor.execute(ctx, "migrate-set-capabilities", on, nil); err != nil {
			return r, err
		}
	}
	parameters := map[string]any{"x-checkpoint-delay": delay}
	if err := primary.monitor.execute(ctx, "migrate-set-parameters", parameters, nil); err != nil {
		return r, err
	}
	if _, err := primary.migrateTo(ctx, secondary, over, "colo"); err != nil {
		return r, err
	}
	protected, from, to, err := primary.run(ctx, coloRun)
	if err != nil {
		return r, err
	}
	// The answer comes after all events so far.
	if err := primary.monitor.execute(ctx, "query-status", nil, nil); err != nil {
		return r, err
	}
	if alone == 0 {
		return r, errors.New("the unprotected guest has not reported")
	}
	r.progress = protected / alone
	if r.pauses = pauses(primary.times(), primary.monitor.events, from, to); len(r.pauses) == 0 {
		return r, fmt.Errorf("no checkpoint in %v", coloRun)
	}

	primary.end()
	asked := time.Now()
	if err := secondary.monitor.execute(ctx, "x-colo-lost-heartbeat", nil, nil); err != nil {
		return r, err
	}
	resumed, err := secondary.monitor.wait(ctx, "RESUME", asked)
	if err != nil {
		return r, err
	}
	goesOn, err := secondary.firstSince(ctx, resumed)
	r.takeover = goesOn.Sub(asked)
	return r, err
}

// pauses returns how long the guest stood still for the checkpoints between from and to: of each pair of events
// STOP and RESUME, the longest time without a report that falls, in part at least, between them. A
// guest that does not come as far as its next report between two checkpoints has one pause for both.
func pauses(reports []time.Time, events []qmpEvent, from, to time.Time) (all []time.Duration) {
	var stop time.Time
	last := -1 // where the longest gap of the checkpoint before ends
	for _, e := range events {
		switch {
		case e.name == "STOP":
			stop = e.at
		case e.name == "RESUME" && !stop.Before(from) && e.at.Before(to):
			var longest time.Duration
			end := 0
			i, _ := slices.BinarySearchFunc(reports, stop, time.Time.Compare)
			for i = max(i, 1); i < len(reports); i++ {
				if gap := reports[i].Sub(reports[i-1]); gap > longest {
					longest, end = gap, i
				}
				if reports[i].After(e.at) {
					break
				}
			}
			if end != 0 && end != last {
				all, last = append(all, longest), end
			}
		}
	}
	return all
}

func seconds(all []time.Duration) []float64 {
	s := make([]float64, len(all))
	for i, d := range all {
		s[i] = d.Seconds()
	}
	return s
}
