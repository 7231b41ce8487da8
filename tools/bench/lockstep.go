package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/vmm/control"
)

// What protection costs. Each share is of the same guest without protection in the same run, of which two copies run at once
// then: two cores carry a pair, and two copies keep them as busy.

const (
	pairMemory   = "64M"
	pairSettle   = 300 * time.Millisecond // from the complete pair to the measurement
	pairWindow   = 2 * time.Second        // of a measurement of throughput
	pairPatience = 30 * time.Second       // for a pair to be complete, or for a guest to answer
	pairPoll     = time.Millisecond
	lastEvents   = 10 // of a side, that are shown with a failure
)

// alone completes a figure of ours that has nothing beside it.
func alone(f figure) figure {
	f.absolute = true
	return f
}

// shownFigure completes a figure of ours that has no target.
func shownFigure(f figure) figure {
	f.shown = true
	return alone(f)
}

// share is a figure in percent of the unprotected guest's, of which target is the least.
func share(name, what string, target float64) figure {
	f := figure{name: name, what: what + ", of an unprotected one's", unit: "%", scale: perCent, more: true, target: target}
	if target == 0 {
		return shownFigure(f)
	}
	return alone(f)
}

// pairGuest is a guest to protect.
type pairGuest struct {
	name, append string
	memory       string // default pairMemory
	disk         int64  // bytes; 0: none
	nic          bool
	apart        bool          // the sides are in namespaces of their own, with a link that can be cut
	rtoMin       time.Duration // of the clients; 0: the system's
	flags        []string      // more flags of a side
}

func (g *pairGuest) memoryOr() string {
	if g.memory == "" {
		return pairMemory
	}
	return g.memory
}

// twins makes the files and the network for a guest.
func (b *bench) twins(g pairGuest) (t *twins.Twins, dir string, err error) {
	ours, ok := b.ours.(*ftvmm)
	if !ok {
		return nil, "", fmt.Errorf("%s makes no pairs", b.ours.name())
	}
	if dir, err = os.MkdirTemp(b.dir, "pair-"); err != nil {
		return nil, "", err
	}
	t, err = twins.New(twins.Options{
		Binary: ours.path, Dir: dir, Guest: g.name, Append: g.append, Memory: g.memoryOr(), DiskSize: g.disk, NoNIC: !g.nic, Apart: g.apart,
		Flags: append([]string{"--guest-tsc", "unused"}, g.flags...),
	})
	return t, dir, err
}

// pairRun is a pair that runs.
type pairRun struct {
	*twins.Twins
	primary int
}

// withTwins starts a guest's pair and calls f when it is complete. Both sides are gone afterwards.
func (b *bench) withTwins(ctx context.Context, g pairGuest, f func(p *pairRun) error) (err error) {
	t, dir, err := b.twins(g)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, t.Close(), os.RemoveAll(dir))
	}()
	p := &pairRun{Twins: t}
	for _, s := range t.Sides {
		if err := s.Start(); err != nil {
			return err
		}
	}
	if err = p.complete(ctx); err == nil {
		err = f(p)
	}
	if err != nil {
		for i, s := range t.Sides {
			stderr, _ := os.ReadFile(t.Errors(i))
			err = fmt.Errorf("%w\nside %s is %q, and said: %s", err, twins.Sides[i], s.Phase(), bytes.TrimSpace(stderr))
			events := s.Events()
			for _, e := range events[max(0, len(events)-lastEvents):] {
				err = fmt.Errorf("%w\n  %s %s %v", err, e.Time.Format("15:04:05.000"), e.Kind, e.Attrs)
			}
		}
	}
	return err
}

// complete waits until both sides protect the guest, and notes which is the primary.
func (p *pairRun) complete(ctx context.Context) (err error) {
	limited, cancel := context.WithTimeout(ctx, pairPatience)
	defer cancel()
	p.primary, err = p.Protected(limited)
	return err
}

// counters returns the counters of the primary.
func (p *pairRun) counters(ctx context.Context) (map[string]uint64, error) {
	return countersAt(ctx, p.Control(p.primary))
}

func countersAt(ctx context.Context, socket string) (map[string]uint64, error) {
	c := control.NewClient(socket)
	defer c.Close()
	st, err := c.Stats(ctx)
	return st.Counters, err
}

// copies are two unprotected copies of a guest on the network of a pair that is not started.
type copies struct {
	*twins.Twins
	dir string
	cmd [2]*exec.Cmd
}

// copyAddress is where a copy is on the network.
func copyAddress(i int) string { return fmt.Sprintf("192.0.2.%d", 20+i) }

// withCopies starts two copies of a guest without protection, and calls f when both answer. Both are gone afterwards.
func (b *bench) withCopies(ctx context.Context, g pairGuest, f func(c *copies) error) (err error) {
	t, dir, err := b.twins(g)
	if err != nil {
		return err
	}
	c := &copies{Twins: t, dir: dir}
	defer func() {
		for _, cmd := range c.cmd {
			if cmd != nil {
				_ = cmd.Process.Kill()
				_ = cmd.Wait() // it was killed
			}
		}
		err = errors.Join(err, t.Close(), os.RemoveAll(dir))
	}()
	for i := range c.cmd {
		if err := c.start(i, b.ours.(*ftvmm).path, g); err != nil {
			return err
		}
	}
	for i := range c.cmd {
		if err := waitUntil(ctx, "an unprotected guest answers", func() bool {
			_, err := countersAt(ctx, c.control(i))
			return err == nil
		}); err != nil {
			return err
		}
	}
	return f(c)
}

func (c *copies) control(i int) string { return filepath.Join(c.dir, fmt.Sprint("control-", i)) }
func (c *copies) console(i int) string { return filepath.Join(c.dir, fmt.Sprint("console-", i)) }

func (c *copies) start(i int, binary string, g pairGuest) error {
	words := g.append
	args := []string{
		"run", "--guest", g.name, "--name", fmt.Sprint("copy-", i), "--memory", g.memoryOr(),
		"--control", c.control(i), "--serial", "file:" + c.console(i),
	}
	if g.disk > 0 {
		args = append(args, "--disk", "path="+c.Disk(i))
	}
	if g.nic {
		words += fmt.Sprintf(" ip=%s/24", copyAddress(i))
		args = append(args, "--nic", fmt.Sprintf("tap=tap-%d,bridge=br0", i))
	}
	c.cmd[i] = exec.Command(binary, append(args, "--append", words)...)
	return c.Enter(c.cmd[i].Start)
}

// dialIn connects to a port at an address in the namespace.
func dialIn(ctx context.Context, t *twins.Twins, network, address string, port int) (c net.Conn, err error) {
	err = t.Enter(func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, net.JoinHostPort(address, fmt.Sprint(port)))
		return err
	})
	return c, err
}

// waitUntil waits until ready says so.
func waitUntil(ctx context.Context, what string, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, pairPatience)
	defer cancel()
	for !ready() {
		if err := pass(ctx, pairPoll); err != nil {
			return fmt.Errorf("wait until %s: %w", what, err)
		}
	}
	return nil
}

// pass lets time pass.
func pass(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// progress says how far a guest is, and when it was there.
type progress func(ctx context.Context) (float64, time.Time, error)

// exitsOf takes a guest's exits for its progress.
func exitsOf(socket string) progress {
	return func(ctx context.Context) (float64, time.Time, error) {
		c, err := countersAt(ctx, socket)
		return float64(c["exits"]), time.Now(), err
	}
}

// roundLine is what the guest compute reports.
var roundLine = regexp.MustCompile(`round (\d+) sum`)

// roundsOf takes the rounds that the guest compute reports for its progress. It waits for the next report.
func roundsOf(console string) progress {
	return func(ctx context.Context) (n float64, at time.Time, err error) {
		before := -1.0
		err = waitUntil(ctx, "the guest reports", func() bool {
			p, _ := os.ReadFile(console)
			n, at = lastRound(p), time.Now()
			if before < 0 {
				before = n
			}
			return n > before
		})
		return n, at, err
	}
}

// lastRound returns the last round that the guest compute has reported, 0 if none.
func lastRound(console []byte) float64 {
	lines := roundLine.FindAllSubmatch(console, -1)
	if len(lines) == 0 {
		return 0
	}
	n, _ := strconv.ParseFloat(string(lines[len(lines)-1][1]), 64) // it is a number
	return n
}

// rates returns how fast guests get on, each in its own units a second, all in the same window.
func rates(ctx context.Context, all ...progress) ([]float64, error) {
	rates, errs := make([]float64, len(all)), make([]error, len(all))
	var wg sync.WaitGroup
	for i, p := range all {
		wg.Go(func() {
			from, begun, err := p(ctx)
			if err == nil {
				err = pass(ctx, pairWindow)
			}
			if err != nil {
				errs[i] = err
				return
			}
			to, ended, err := p(ctx)
			rates[i], errs[i] = (to-from)/ended.Sub(begun).Seconds(), err
		})
	}
	wg.Wait()
	return rates, errors.Join(errs...)
}

// unprotected returns how fast a copy of a guest gets on while another runs.
func (b *bench) unprotected(ctx context.Context, g pairGuest, of func(c *copies, i int) progress) (rate float64, err error) {
	err = b.withCopies(ctx, g, func(c *copies) error {
		if err := pass(ctx, pairSettle); err != nil {
			return err
		}
		r, err := rates(ctx, of(c, 0), of(c, 1))
		if err == nil {
			rate = (r[0] + r[1]) / 2
		}
		return err
	})
	if err == nil && rate <= 0 {
		err = errors.New("the unprotected guest does not get on")
	}
	return rate, err
}

// lockstepGroups are all measurements of a pair.
func lockstepGroups() (all []group) {
	all = append(all, protectedExits("compute", "size=1048576 rounds=1000000000 exit_every=250000", "lockstep-compute", "a guest that computes, with an exit each millisecond", 95, false))
	all = append(all, protectedExits("storm", "mode=pio n=1000000000", "lockstep-storm", "an exit storm (port I/O)", 85, false))
	all = append(all, protectedExits("storm", "mode=clock n=1000000000", "lockstep-clock", "an exit storm of clock readings", 0, true))
	all = append(all, group{
		figures: []figure{
			alone(figure{name: "lockstep-record", what: "what recording adds to an exit, on the vCPU thread", unit: "us", scale: perMicro, target: 1.5}),
			alone(figure{name: "lockstep-record-allocs", what: "allocations for recording an exit", unit: "", scale: 1, target: 0}),
		},
		lockstep: true,
		measure:  measureRecording,
	})
	for _, n := range []int{20, 100, 1000} {
		all = append(all, cuts(n))
	}
	return append(all, ledgerThroughput(), outputDelay(1), outputDelay(delayClients), killGaps(0), killGaps(20*time.Millisecond), freezeGaps(), cutGaps(), backupReturns())
}

// protectedExits measures a guest whose progress are its exits, and what of it is logged: at most 16 bytes for an exit with
// an input, and 1 for another.
func protectedExits(guest, words, name, what string, target float64, inputs bool) group {
	g := pairGuest{name: guest, append: words}
	most, which := 1.0, "an exit without input"
	if inputs {
		most, which = 16, "an exit with an input"
	}
	bytes := figure{name: name + "-log", what: what + ": bytes of log for " + which, unit: "B", scale: 1, target: most}
	if guest == "compute" {
		bytes.shown = true // an exit now and then has a watermark to itself
	}
	return group{
		figures: []figure{
			share(name, what, target), alone(bytes),
			shownFigure(figure{name: name + "-rate", what: what + ": exits of the protected guest", unit: "/s", scale: 1, more: true}),
		},
		lockstep: true,
		measure: func(ctx context.Context, b *bench, _ vm) (values []float64, err error) {
			var rate, logged float64
			err = b.withTwins(ctx, g, func(p *pairRun) error {
				if err := pass(ctx, pairSettle); err != nil {
					return err
				}
				before, err := p.counters(ctx)
				if err != nil {
					return err
				}
				r, err := rates(ctx, exitsOf(p.Control(p.primary)))
				if err != nil {
					return err
				}
				after, err := p.counters(ctx)
				if err == nil {
					rate, logged = r[0], float64(after["pair_log_bytes"]-before["pair_log_bytes"])/float64(after["exits"]-before["exits"])
				}
				return err
			})
			if err != nil {
				return nil, err
			}
			base, err := b.unprotected(ctx, g, func(c *copies, i int) progress { return exitsOf(c.control(i)) })
			if err != nil {
				return nil, err
			}
			return []float64{rate / base, logged, rate}, nil
		},
	}
}

// recordingBenchmark matches the lines of the benchmark of recording.
var recordingBenchmark = regexp.MustCompile(`(?m)^BenchmarkRecording/(\S+)/(logged|alone)\S*\s+\d+\s+([\d.]+) ns/op.*?(\d+) allocs/op`)

// measureRecording runs the Go benchmark of recording.
func measureRecording(ctx context.Context, b *bench, _ vm) ([]float64, error) {
	c := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkRecording$", "-benchtime", loopTime, "-benchmem", "./lockstep/pair")
	c.Dir = b.root
	out, err := c.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%v: %w\n%s", c.Args, err, out)
	}
	return parseRecording(out)
}

// parseRecording returns what recording adds to the kind of exit for which that is most, and the most allocations.
func parseRecording(out []byte) ([]float64, error) {
	times := map[string]map[string]float64{}
	var most, allocs float64
	for _, l := range recordingBenchmark.FindAllSubmatch(out, -1) {
		ns, err := strconv.ParseFloat(string(l[3]), 64)
		if err != nil {
			return nil, err
		}
		kind := string(l[1])
		if times[kind] == nil {
			times[kind] = map[string]float64{}
		}
		times[kind][string(l[2])] = ns
		n, err := strconv.ParseFloat(string(l[4]), 64)
		if err != nil {
			return nil, err
		}
		allocs = max(allocs, n)
	}
	if len(times) == 0 {
		return nil, fmt.Errorf("no benchmark of recording in:\n%s", out)
	}
	for kind, t := range times {
		if len(t) != 2 {
			return nil, fmt.Errorf("half a benchmark of %q in:\n%s", kind, out)
		}
		most = max(most, t["logged"]-t["alone"])
	}
	return []float64{most / 1e9, allocs}, nil
}
