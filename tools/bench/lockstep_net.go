package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/ftvmm/ftvmm/integration/guests/ledger"
	"github.com/ftvmm/ftvmm/integration/twins"
)

const (
	ledgerPort    = 7000
	ledgerDisk    = 64 << 20 // a journal that does not fill meanwhile
	ledgerWords   = "journal=77"
	ledgerClients = 4 // of each guest
	delayClients  = 4 // of each guest, where it is under load
)

// ledgerLoad is clients that deposit without a pause.
type ledgerLoad struct {
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	clients []*ledgerClient
}

// ledgerClient is one client and what it was told.
type ledgerClient struct {
	*ledger.Client
	mu      sync.Mutex
	answers []ledger.Answer
	times   []time.Time // of the answers
	err     error
}

// startLedger starts n clients of a ledger.
func startLedger(ctx context.Context, n int, dial func(context.Context) (net.Conn, error)) *ledgerLoad {
	ctx, cancel := context.WithCancel(ctx)
	l := &ledgerLoad{cancel: cancel}
	for i := range n {
		c := &ledgerClient{Client: ledger.NewClient(uint32(i+1), dial)}
		c.Timeout = 0 // a connection that breaks is a finding, a late answer is a gap
		l.clients = append(l.clients, c)
		l.wg.Go(func() { c.run(ctx, uint16(i)) })
	}
	return l
}

func (c *ledgerClient) run(ctx context.Context, account uint16) {
	defer c.Close()
	for ctx.Err() == nil {
		a, err := c.Deposit(ctx, account, 1)
		now := time.Now()
		c.mu.Lock()
		if err == nil {
			c.answers, c.times = append(c.answers, a), append(c.times, now)
		} else if ctx.Err() == nil {
			c.err = err
		}
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// count returns how many answers there were.
func (c *ledgerClient) count() (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.answers), c.err
}

// gap returns the longest time without an answer that ended after a moment.
func (c *ledgerClient) gap(after time.Time) (longest time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := len(c.times) - 1; i > 0 && c.times[i].After(after); i-- {
		longest = max(longest, c.times[i].Sub(c.times[i-1]))
	}
	return longest
}

// progress takes all answers for the guest's progress.
func (l *ledgerLoad) progress(context.Context) (n float64, at time.Time, err error) {
	for _, c := range l.clients {
		k, e := c.count()
		n, err = n+float64(k), errors.Join(err, e)
	}
	return n, time.Now(), err
}

// more waits until each client has n more answers.
func (l *ledgerLoad) more(ctx context.Context, n int) error {
	var before []int
	for _, c := range l.clients {
		k, _ := c.count()
		before = append(before, k)
	}
	var failed error
	err := waitUntil(ctx, "the ledger answers", func() bool {
		for i, c := range l.clients {
			k, err := c.count()
			if failed = errors.Join(failed, err); failed != nil {
				return true
			}
			if k < before[i]+n {
				return false
			}
		}
		return true
	})
	return errors.Join(err, failed)
}

// stop ends the clients, and returns all answers and how many connections broke.
func (l *ledgerLoad) stop() (answers []ledger.Answer, broken int) {
	l.cancel()
	l.wg.Wait()
	for _, c := range l.clients {
		answers = append(answers, c.answers...)
		if broken += c.Connects - 1; c.err != nil {
			broken++
		}
	}
	return answers, broken
}

func ledgerGuest() pairGuest {
	return pairGuest{name: "ledgerd", append: ledgerWords, disk: ledgerDisk, nic: true}
}

// ledgerDial connects to the ledger at an address of the network.
func ledgerDial(t *twins.Twins, address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return dialIn(ctx, t, "tcp", address, ledgerPort) }
}

// ledgerThroughput measures transactions, each of which is a network request and a durable write.
func ledgerThroughput() group {
	what := fmt.Sprintf("transactions of a ledger, %d clients", ledgerClients)
	return group{
		figures: []figure{
			share("lockstep-ledger", what, 80),
			shownFigure(figure{name: "lockstep-ledger-rate", what: what, unit: "/s", scale: 1, more: true}),
		},
		lockstep: true,
		measure: func(ctx context.Context, b *bench, _ vm) ([]float64, error) {
			var rate, base float64
			measure := func(t *twins.Twins, addresses ...string) (float64, error) {
				var loads []progress
				for _, a := range addresses {
					l := startLedger(ctx, ledgerClients, ledgerDial(t, a))
					defer l.stop()
					if err := l.more(ctx, 20); err != nil {
						return 0, err
					}
					loads = append(loads, l.progress)
				}
				r, err := rates(ctx, loads...)
				sum := 0.0
				for _, v := range r {
					sum += v
				}
				return sum / float64(len(r)), err
			}
			err := b.withTwins(ctx, ledgerGuest(), func(p *pairRun) (err error) {
				rate, err = measure(p.Twins, twins.GuestAddress)
				return err
			})
			if err != nil {
				return nil, err
			}
			err = b.withCopies(ctx, ledgerGuest(), func(c *copies) (err error) {
				base, err = measure(c.Twins, copyAddress(0), copyAddress(1))
				return err
			})
			return []float64{rate / base, rate}, err
		},
	}
}

// outputDelay measures what protection adds to the answer to a request: the answer leaves when the backup has
// done the same, which takes a round trip of the link at least.
func outputDelay(clients int) group {
	name, what := fmt.Sprintf("lockstep-delay-%d", clients), fmt.Sprintf("UDP echo, %d at a time", clients)
	beyond := figure{what: what + ": added to an answer, beyond a round trip of the link", unit: "us", scale: perMicro}
	p50, p99, p999 := alone(beyond), shownFigure(beyond), shownFigure(beyond)
	p50.name, p50.target = name, 300
	p99.name, p99.quantile, p99.what = name+"-p99", 0.99, p99.what+", 99 in 100"
	p999.name, p999.quantile, p999.what = name+"-p999", 0.999, p999.what+", 999 in 1000"
	return group{
		figures: []figure{
			p50, p99, p999,
			shownFigure(figure{name: name + "-link", what: what + ": a round trip of the link, as heartbeats see it", unit: "us", scale: perMicro}),
			shownFigure(figure{name: name + "-protected", what: what + ": request to answer, protected", unit: "us", scale: perMicro, plot: "delay", series: what + ", protected"}),
			shownFigure(figure{name: name + "-unprotected", what: what + ": … unprotected", unit: "us", scale: perMicro, plot: "delay", series: what + ", unprotected"}),
		},
		lockstep: true,
		spread: func(ctx context.Context, b *bench, _ vm) ([][]float64, error) {
			g := pairGuest{name: "net", nic: true}
			var protected, unprotected []float64
			var trip float64
			err := b.withTwins(ctx, g, func(p *pairRun) (err error) {
				if protected, err = echoes(ctx, p.Twins, clients, twins.GuestAddress); err != nil {
					return err
				}
				n, err := p.counters(ctx)
				trip = float64(n["link_rtt_ns"]) / 1e9
				return err
			})
			if err != nil {
				return nil, err
			}
			err = b.withCopies(ctx, g, func(c *copies) (err error) {
				unprotected, err = echoes(ctx, c.Twins, clients, copyAddress(0), copyAddress(1))
				return err
			})
			if err != nil {
				return nil, err
			}
			added, base := make([]float64, len(protected)), median(unprotected)
			for i, v := range protected {
				added[i] = v - base - trip
			}
			return [][]float64{added, added, added, {trip}, protected, unprotected}, nil
		},
	}
}

// echoWarmUp is how many echoes of a client do not count.
const echoWarmUp = 200

// echoes has n clients of each address make one request after another, and returns how long each took, in seconds.
func echoes(ctx context.Context, t *twins.Twins, n int, addresses ...string) (all []float64, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, a := range addresses {
		for range n {
			wg.Go(func() {
				took, e := echo(ctx, t, a)
				mu.Lock()
				defer mu.Unlock()
				all, err = append(all, took...), errors.Join(err, e)
			})
		}
	}
	wg.Wait()
	if err == nil && len(all) == 0 {
		err = errors.New("no echo came back")
	}
	return all, err
}

func echo(ctx context.Context, t *twins.Twins, address string) (took []float64, err error) {
	c, err := dialIn(ctx, t, "udp", address, portEcho)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	out, in := bytes.Repeat([]byte{'x'}, requestSize), make([]byte, requestSize)
	limit := time.Now().Add(pairPatience)
	var ends time.Time
	for n := 0; n < echoWarmUp || time.Now().Before(ends); n++ {
		begun := time.Now()
		if err := c.SetDeadline(begun.Add(netTimeout)); err != nil {
			return nil, err
		}
		_, err := c.Write(out)
		if err == nil {
			_, err = c.Read(in)
		}
		switch now := time.Now(); {
		case err != nil && (now.After(limit) || n >= echoWarmUp || ctx.Err() != nil):
			return nil, fmt.Errorf("echo %d: %w", n, err)
		case err != nil: // the guest is not up yet
			if n = -1; pass(ctx, pairPoll) != nil {
				return nil, ctx.Err()
			}
		case n == echoWarmUp-1:
			ends = now.Add(pairWindow)
		case n >= echoWarmUp:
			took = append(took, now.Sub(begun).Seconds())
		}
	}
	return took, nil
}
