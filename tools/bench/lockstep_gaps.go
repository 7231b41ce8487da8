package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/ftvmm/ftvmm/integration/guests/ledger"
	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/vmm/event"
)

const (
	gapClients   = 2
	killTrials   = 34 // a run: three runs make more than 100
	freezeTrials = 4
	cutTrials    = 4
	returnTrials = 4
	// answersBetween is how many answers each client has before the next trial, and answersAfter how many from the one side that is left.
	answersBetween, answersAfter = 100, 20
	returnMemory                 = "256M"
)

// faults counts what must never happen, and says what it was.
type faults struct {
	n   int
	log func(format string, args ...any)
}

func (f *faults) found(format string, args ...any) {
	f.n++
	f.log("FAULT: "+format, args...)
}

// gapFigures are those of one kind of loss; most are the bounds of the median and the longest, in milliseconds, 0 for none.
func gapFigures(name, what string, half, most float64) []figure {
	gap := figure{what: what + ": the longest time without an answer that a client sees", unit: "ms", scale: perMilli}
	p50, longest := alone(gap), alone(gap)
	p50.name, p50.target, p50.plot, p50.series = name, half, "takeover", "pair, "+what
	p50.shown = half == 0
	longest.name, longest.target, longest.quantile, longest.what = name+"-max", most, 1, gap.what+", of all trials"
	return []figure{p50, longest, alone(figure{name: name + "-faults", unit: "", scale: 1, quantile: 1,
		what: what + ": answers lost or given twice, connections broken, two sides live, disks that differ"})}
}

// killGaps measures the loss of the primary's host by the end of its process. A request that goes to a dead host is sent again
// by the client's TCP after rtoMin at the earliest, 200 ms if nobody says otherwise (0).
func killGaps(rtoMin time.Duration) group {
	name, what, g := "lockstep-kill", "host killed", ledgerGuest()
	if g.rtoMin = rtoMin; rtoMin != 0 {
		name, what = name+"-rto", fmt.Sprintf("%s, clients that ask again after %v", what, rtoMin)
	}
	return group{
		figures: append(gapFigures(name, what, 10, 100),
			shownFigure(figure{name: name + "-notice", what: what + ": until the other side knows (its link has ended)", unit: "ms", scale: perMilli}),
			shownFigure(figure{name: name + "-live", what: what + ": until the other side is live", unit: "ms", scale: perMilli}),
			shownFigure(figure{name: name + "-rejoin", what: what + " and started again: the longest time without an answer until the pair is complete", unit: "ms", scale: perMilli})),
		lockstep: true,
		spread: func(ctx context.Context, b *bench, _ vm) ([][]float64, error) {
			var notice, live, rejoin []float64
			values, err := b.gaps(ctx, g, killTrials, func(p *pairRun, l *ledgerLoad, f *faults) (gap time.Duration, err error) {
				victim, at := p.primary, time.Now()
				p.Sides[victim].Kill()
				if gap, err = l.gap(ctx, at); err != nil {
					return gap, err
				}
				lost, alone := p.steps(1-victim, at)
				notice, live = append(notice, lost.Sub(at).Seconds()), append(live, alone.Sub(at).Seconds())
				at = time.Now()
				if err := p.Sides[victim].Start(); err != nil {
					return gap, err
				}
				if err := p.taken(ctx, victim, f); err != nil {
					return gap, err
				}
				back, err := l.gap(ctx, at)
				rejoin = append(rejoin, back.Seconds())
				return gap, err
			})
			return append(values, notice, live, rejoin), err
		},
	}
}

// steps returns when a side, after a moment, had lost its link, and when it was live.
func (p *pairRun) steps(side int, after time.Time) (lost, live time.Time) {
	lost, live = after, after
	for _, e := range p.Sides[side].Events() {
		text, _ := e.Attrs["text"].(string)
		switch {
		case e.Time.Before(after):
		case e.Kind == event.PairLinkLost && lost == after:
			lost = e.Time
		case e.Kind == event.PairPhase && strings.HasSuffix(text, "-> alone") && live == after:
			live = e.Time
		}
	}
	return lost, live
}

// freezeGaps measures a primary whose host stands still, and goes on when the other side is live.
func freezeGaps() group {
	return group{
		figures: append(gapFigures("lockstep-freeze", "host frozen", 0, 600),
			shownFigure(figure{name: "lockstep-freeze-late", what: "host frozen: frames that it lets out when it wakes; the other side has sent the same", unit: "", scale: 1, quantile: 1})),
		lockstep: true,
		spread: func(ctx context.Context, b *bench, _ vm) ([][]float64, error) {
			var late []float64
			values, err := b.gaps(ctx, ledgerGuest(), freezeTrials, func(p *pairRun, l *ledgerLoad, f *faults) (gap time.Duration, err error) {
				victim, at := p.primary, time.Now()
				if err := p.Sides[victim].Signal(syscall.SIGSTOP); err != nil {
					return 0, err
				}
				if gap, err = l.gap(ctx, at); err != nil {
					return gap, err
				}
				before, err := p.sent(victim)
				if err != nil {
					return gap, err
				}
				if err := p.Sides[victim].Signal(syscall.SIGCONT); err != nil {
					return gap, err
				}
				if err := p.Sides[victim].Await(ctx, "joining", "backup"); err != nil {
					return gap, err
				}
				if err := p.taken(ctx, victim, f); err != nil {
					return gap, err
				}
				after, err := p.sent(victim)
				late = append(late, float64(after-before))
				return gap, err
			})
			return append(values, late), err
		},
	}
}

// cutGaps measures a pair whose link loses everything; the arbiter decides which side goes on.
func cutGaps() group {
	g := ledgerGuest()
	g.apart = true
	return group{
		figures: gapFigures("lockstep-cut", "link cut", 0, 600), lockstep: true,
		spread: func(ctx context.Context, b *bench, _ vm) ([][]float64, error) {
			return b.gaps(ctx, g, cutTrials, func(p *pairRun, l *ledgerLoad, _ *faults) (gap time.Duration, err error) {
				at := time.Now()
				if err := errors.Join(p.Cut(0), p.Cut(1)); err != nil {
					return 0, err
				}
				if err := waitUntil(ctx, "a side goes on alone", func() bool {
					return p.Sides[0].Phase() == "alone" || p.Sides[1].Phase() == "alone"
				}); err != nil {
					return 0, err
				}
				if gap, err = l.gap(ctx, at); err != nil {
					return gap, err
				}
				if err := errors.Join(p.Heal(0), p.Heal(1)); err != nil {
					return gap, err
				}
				return gap, p.complete(ctx)
			})
		},
	}
}

// taken waits until the pair is complete, of which a side that was primary must be the backup.
func (p *pairRun) taken(ctx context.Context, was int, f *faults) error {
	if err := p.complete(ctx); err != nil {
		return err
	}
	if p.primary == was {
		f.found("side %s is live again", twins.Sides[was])
	}
	return nil
}

// sent returns how many frames have come out of a side's tap.
func (p *pairRun) sent(side int) (n uint64, err error) {
	err = p.Enter(func() error {
		l, err := netlink.LinkByName("tap-" + twins.Sides[side])
		if err == nil {
			n = l.Attrs().Statistics.RxPackets // the host's view
		}
		return err
	})
	return n, err
}

// gap waits for some more answers to each client, and returns the longest time that any was without one that ended after
// a moment.
func (l *ledgerLoad) gap(ctx context.Context, after time.Time) (longest time.Duration, err error) {
	if err := l.more(ctx, answersAfter); err != nil {
		return 0, err
	}
	for _, c := range l.clients {
		longest = max(longest, c.gap(after))
	}
	return longest, nil
}

// gaps makes trials with a ledger under load. Each loses a side, returns what the clients noticed, and has it come back.
func (b *bench) gaps(ctx context.Context, g pairGuest, trials int, trial func(p *pairRun, l *ledgerLoad, f *faults) (time.Duration, error)) (values [][]float64, err error) {
	f := &faults{log: b.logf}
	var gaps []float64
	err = b.withTwins(ctx, g, func(p *pairRun) error {
		if err := p.askAgainAfter(g.rtoMin); err != nil {
			return err
		}
		watch, err := p.Watch()
		if err != nil {
			return err
		}
		defer watch.Close()
		l := startLedger(ctx, gapClients, ledgerDial(p.Twins, twins.GuestAddress))
		defer l.stop()
		for n := range trials {
			if err := l.more(ctx, answersBetween); err != nil {
				return err
			}
			gap, err := trial(p, l, f)
			if err != nil {
				return fmt.Errorf("trial %d: %w", n+1, err)
			}
			gaps = append(gaps, gap.Seconds())
		}
		answers, broken := l.stop()
		if _, conflicts := watch.Close(); len(conflicts) > 0 {
			f.found("the guest has sent different bytes in the same place: %s", conflicts[0])
		}
		if broken > 0 {
			f.found("%d connections broke", broken)
		}
		return p.verify(ctx, answers, f)
	})
	return [][]float64{gaps, gaps, {float64(f.n)}}, err
}

// askAgainAfter sets the least time after which the clients' TCP sends again what was not acknowledged; 0 leaves it.
func (p *pairRun) askAgainAfter(d time.Duration) error {
	if d == 0 {
		return nil
	}
	return p.Enter(func() error {
		routes, err := netlink.RouteGet(net.ParseIP(twins.GuestAddress))
		if err != nil {
			return err
		}
		_, to, err := net.ParseCIDR(twins.GuestAddress + "/32")
		if err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{LinkIndex: routes[0].LinkIndex, Dst: to, Scope: netlink.SCOPE_LINK, RtoMin: int(d.Milliseconds()), RtoMinLock: true})
	})
}

// verify ends the guest and compares what clients were told with the disks, and the disks with each other.
func (p *pairRun) verify(ctx context.Context, answers []ledger.Answer, f *faults) error {
	ctx, cancel := context.WithTimeout(ctx, pairPatience)
	defer cancel()
	if err := p.Sides[p.primary].Signal(syscall.SIGTERM); err != nil {
		return err
	}
	var disks [2][]byte
	for i, s := range p.Sides {
		if code, err := s.Wait(ctx); err != nil {
			return err
		} else if code != 0 {
			f.found("side %s ends with code %d", twins.Sides[i], code)
		}
		var err error
		if disks[i], err = os.ReadFile(p.Disk(i)); err != nil {
			return err
		}
		j, err := ledger.ReadJournal(bytes.NewReader(disks[i]))
		if err == nil {
			err = j.Covers(answers)
		}
		if err != nil {
			f.found("disk %s: %v", twins.Sides[i], err)
		}
	}
	if !bytes.Equal(disks[0], disks[1]) {
		f.found("the disks differ")
	}
	return nil
}

// backupReturns measures what the return of a lost backup costs a guest of 256 MiB under load.
func backupReturns() group {
	what := "a backup comes back, guest of " + returnMemory
	pause := alone(figure{name: "lockstep-return", what: what + ": the guest's pause", unit: "ms", scale: perMilli, target: 100})
	longest := pause
	longest.name, longest.what, longest.quantile = "lockstep-return-max", pause.what+", the longest", 1
	return group{
		figures: []figure{
			pause, longest,
			shownFigure(figure{name: "lockstep-return-gap", what: what + ": the longest time without an answer that a client sees", unit: "ms", scale: perMilli}),
			shownFigure(figure{name: "lockstep-return-time", what: what + ": from the start of its process until it protects the guest", unit: "s", scale: 1}),
		},
		lockstep: true,
		spread: func(ctx context.Context, b *bench, _ vm) (values [][]float64, err error) {
			g := ledgerGuest()
			g.memory = returnMemory
			var pauses, gaps, times []float64
			err = b.withTwins(ctx, g, func(p *pairRun) error {
				l := startLedger(ctx, ledgerClients, ledgerDial(p.Twins, twins.GuestAddress))
				defer l.stop()
				primary, backup := p.Sides[p.primary], p.Sides[1-p.primary]
				for range returnTrials {
					if err := l.more(ctx, answersBetween); err != nil {
						return err
					}
					backup.Kill()
					if err := l.more(ctx, answersAfter); err != nil {
						return err
					}
					before, begun := len(primary.Events()), time.Now()
					if err := backup.Start(); err != nil {
						return err
					}
					if err := p.complete(ctx); err != nil {
						return err
					}
					times = append(times, time.Since(begun).Seconds())
					for _, e := range primary.Events()[before:] {
						if full, _ := e.Attrs["full"].(bool); full && e.Kind == event.PairCutTaken {
							pauses = append(pauses, number(e, "pause_us")/1e6)
						}
					}
					gap, err := l.gap(ctx, begun)
					if err != nil {
						return err
					}
					gaps = append(gaps, gap.Seconds())
				}
				return nil
			})
			return [][]float64{pauses, pauses, gaps, times}, err
		},
	}
}
