package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"

	"github.com/ftvmm/ftvmm/vmm/event"
)

// cutHertz is how often a timer interrupts the guest that makes no exits. Where the host counts nothing that could name the place, each
// of these interrupts is a cut: the guest stands while what it has written is copied.
const cutHertz = 100

// reportWordsEach is about how many words the guest writes between two reports, 200 ms of work: their own exits are few.
const reportWordsEach = 50_000_000

// cuts measures a guest that computes without exits under a timer, and writes so many pages between two interrupts.
func cuts(pages int) group {
	name, what := fmt.Sprintf("lockstep-cuts-%d", pages), fmt.Sprintf("a guest without exits, %d Hz timer, %d pages written a tick", cutHertz, pages)
	least := 0.0
	pause := shownFigure(figure{name: name + "-pause", what: what + ": a pause", unit: "ms", scale: perMilli})
	ack := shownFigure(figure{name: name + "-ack", what: what + ": from a cut's begin until the backup has it", unit: "ms", scale: perMilli})
	switch pages {
	case 20:
		least = 80
	case 1000:
		pause.shown, pause.target = false, 2.5
		ack.shown, ack.target = false, 8
	}
	if pages != 100 { // a picture has room for so many
		pause.plot, pause.series = "pauses", fmt.Sprintf("cuts of %d pages", pages)
	}
	words := pages * 4096 / wordSize
	g := pairGuest{name: "compute", append: fmt.Sprintf("size=%d rounds=1000000000 hz=%d report=%d", words*wordSize, cutHertz, max(reportWordsEach/words, 1))}
	return group{
		figures: []figure{
			share(name, what, least), pause, ack,
			shownFigure(figure{name: name + "-pages", what: what + ": pages of a cut", unit: "", scale: 1}),
			shownFigure(figure{name: name + "-each-second", what: what + ": cuts a second", unit: "/s", scale: 1, more: true}),
		},
		lockstep: true,
		spread: func(ctx context.Context, b *bench, _ vm) (values [][]float64, err error) {
			var rate, each float64
			var pauses, acks, sizes []float64
			err = b.withTwins(ctx, g, func(p *pairRun) error {
				if err := pass(ctx, pairSettle); err != nil {
					return err
				}
				events, log := len(p.Sides[p.primary].Events()), sizeOf(p.Log(p.primary))
				r, err := rates(ctx, roundsOf(p.Console(p.primary)))
				if err != nil {
					return err
				}
				rate = r[0]
				seen := p.Sides[p.primary].Events()[events:]
				for _, e := range seen {
					if e.Kind == event.PairCutTaken {
						pauses, sizes = append(pauses, number(e, "pause_us")/1e6), append(sizes, number(e, "pages"))
					}
				}
				if acks, err = ackTimes(p.Log(p.primary), log); err != nil {
					return err
				}
				if len(pauses) == 0 || len(acks) == 0 {
					return errors.New("there was no cut: this host counts the guest's instructions")
				}
				each = float64(len(pauses)) / seen[len(seen)-1].Time.Sub(seen[0].Time).Seconds()
				return nil
			})
			if err != nil {
				return nil, err
			}
			base, err := b.unprotected(ctx, g, func(c *copies, i int) progress { return roundsOf(c.console(i)) })
			if err != nil {
				return nil, err
			}
			return [][]float64{{rate / base}, pauses, acks, sizes, {each}}, nil
		},
	}
}

// number returns an event's attribute, 0 if it is none.
func number(e event.Event, key string) float64 {
	v, _ := e.Attrs[key].(float64)
	return v
}

func sizeOf(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.Size()
}

// ackLine is what a primary logs when the backup has a cut.
var ackLine = regexp.MustCompile(`msg="cut acknowledged" us=(\d+)`)

// ackTimes returns, in seconds, how long cuts took that a side's log tells of from an offset on.
func ackTimes(path string, from int64) (seconds []float64, err error) {
	p, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for _, m := range ackLine.FindAllSubmatch(p[min(from, int64(len(p))):], -1) {
		us, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil {
			return nil, err
		}
		seconds = append(seconds, us/1e6)
	}
	return seconds, nil
}
