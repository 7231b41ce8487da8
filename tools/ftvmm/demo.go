package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/integration/guests/ledger"
	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/tools/bench/plot"
	"github.com/ftvmm/ftvmm/vmm/console"
	"github.com/ftvmm/ftvmm/vmm/control"
	"github.com/ftvmm/ftvmm/vmm/event"
)

// Sizes and limits of the demo.
const (
	maxDemoClients = 64
	maxDemoTrials  = 200
	maxDemoWork    = 1600 // clients times trials
	// The bytes of a side's disk: the journal grows all the time, with each client.
	demoDisk       = 16 << 20
	demoDiskClient = 2 << 20
	demoDiskTrial  = 512 << 10 // for each client
	// demoPatience bounds each wait for a guest or a side, on hosts that are slow or busy.
	demoPatience = time.Minute
	// calm is how long clients are watched while nothing happens.
	calm = time.Second
	// demoLog is how many of a failed side's last events are shown.
	demoLog = 12
	// userNetwork is the ledger's address on a user network.
	userNetwork = "ip=10.0.2.15/24 gw=10.0.2.2"
)

// Networks of the demo.
const (
	networkTap  = "tap"
	networkUser = "user"
)

func init() {
	extraCommands = append(extraCommands, (*app).demoCommand)
}

// demoOptions are the demo's flags.
type demoOptions struct {
	trials, clients int
	svg             string
	engine          string
	network         string
	bios            bool
}

// demoReport is what the demo has seen.
type demoReport struct {
	control.Meta
	Verdict         string       `json:"verdict"` // good or error
	Network         string       `json:"network"` // tap or user
	Engine          string       `json:"engine"`
	FirmwareMS      int64        `json:"firmware_ms,omitempty"`
	FormedMS        int64        `json:"formed_ms"` // from the start of both sides until each protected the other
	Clients         int          `json:"clients"`
	Acknowledged    int          `json:"acknowledged"`
	Lost            int          `json:"lost"`
	Duplicated      int          `json:"duplicated"`
	PerSecond       int          `json:"transactions_per_s"`
	ConnectionsKept int          `json:"connections_kept"` // of Clients; none is expected to be on user networks
	Repeats         int          `json:"repeats"`
	JournalRecords  int          `json:"journal_records"`
	DisksEqual      bool         `json:"disks_equal"`
	Divergences     int          `json:"divergences"` // that the pair found and repaired
	CalmMS          float64      `json:"calm_gap_ms"` // the longest gap of a client while nothing happened
	Trials          int          `json:"trials"`
	Gaps            []demoGaps   `json:"gaps"`
	Rejoin          distribution `json:"rejoin"`
	TookMS          int64        `json:"took_ms"`
}

// demoGaps are the gaps that clients saw around one kind of event.
type demoGaps struct {
	Event string `json:"event"`
	distribution
}

// distribution is of times in milliseconds.
type distribution struct {
	Samples []float64 `json:"samples_ms"`
	P50     float64   `json:"p50_ms"`
	Max     float64   `json:"max_ms"`
}

func (d *distribution) add(times ...time.Duration) {
	for _, t := range times {
		d.Samples = append(d.Samples, float64(t.Microseconds())/1e3)
	}
	slices.Sort(d.Samples)
	d.P50, d.Max = plot.Quantile(d.Samples, 0.5), plot.Quantile(d.Samples, 1)
}

// What is done to the pair, by the index of its gaps in the report.
const (
	killPrimary = iota
	switchOver
	killBackup
)

var demoEvents = [...]string{killPrimary: "kill of the primary", switchOver: "planned switch-over", killBackup: "kill of the backup"}

// demo is one run of the demo.
type demo struct {
	*app
	*board
	demoOptions
	report demoReport
	began  time.Time
	pair   *twins.Twins
	load   atomic.Pointer[clients]
	done   atomic.Int64 // parts of the work, for the live line
	total  int
	recent []int // acknowledged in the last second, of the live line
}

func (a *app) demoCommand() *cobra.Command {
	var o demoOptions
	c := &cobra.Command{
		Use:   "demo",
		Short: "kill either of the two processes that run one guest, and look whether anybody notices",
		Long: `Show what a pair does, with nothing but this program, on this machine:

  1. SeaBIOS boots to its end on a guest's serial console.
  2. Two processes run one guest, the embedded ledger: a transaction server whose answer means
     that a transaction is durable on the guest's disk, of which each process has its own. Clients transfer money.
  3. The process that runs the guest is killed (SIGKILL), and started again; the guest is handed over as planned;
     the process that is the backup is killed, and started again. And again, --trials times.
  4. The power button is pressed, and the journal is read from both disks. Every answer that a client got must be in it, no
     transaction twice, both disks must be equal, and every client must still have its first connection.

As root the guest is on a tap in a network namespace that is made for the demo. Otherwise each process has a user
network of its own, where TCP connections end with the process: clients connect again and repeat
what was not answered, and half of them use UDP.`,
		Args: a.arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			usage := func(remedy, format string, args ...any) error {
				return fail(exitUsage, "bad-value", remedy, format, args...)
			}
			switch {
			case o.clients < 1 || o.clients > maxDemoClients:
				return usage(fmt.Sprintf("take 1 to %d", maxDemoClients), "%d clients", o.clients)
			case o.trials < 1 || o.trials > maxDemoTrials:
				return usage(fmt.Sprintf("take 1 to %d", maxDemoTrials), "%d trials", o.trials)
			case o.clients*o.trials > maxDemoWork:
				return usage("take fewer of one of them", "%d clients in %d trials would fill the guest's disk", o.clients, o.trials)
			case o.engine != engineLockstep && o.engine != engineCheckpoint:
				return usage("say lockstep or checkpoint", "--engine %q", o.engine)
			case o.network != networkTap && o.network != networkUser && o.network != "auto":
				return usage("say tap, user or auto", "--network %q", o.network)
			case o.network == networkTap && os.Geteuid() != 0:
				return fail(exitNotPermitted, "no-permission", "run it as root, or say --network user", "taps and network namespaces need root")
			}
			return a.demo(cmd.Context(), o)
		},
	}
	c.Flags().IntVar(&o.trials, "trials", 3, "how often to kill and switch over")
	c.Flags().IntVar(&o.clients, "clients", 8, "how many clients make transactions at the same time")
	c.Flags().StringVar(&o.engine, "engine", engineLockstep, "how the backup follows: lockstep or checkpoint")
	c.Flags().StringVar(&o.network, "network", "auto", "tap, user or auto, which is tap for root")
	c.Flags().BoolVar(&o.bios, "firmware", true, "boot SeaBIOS first")
	c.Flags().StringVar(&o.svg, "svg", "", "draw the gaps that clients saw to this `file`")
	return c
}

func (a *app) demo(ctx context.Context, o demoOptions) error {
	// Whatever ends the demo, nothing of it stays: the signals cancel what goes on, and the way back cleans up.
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	if o.network == "auto" {
		o.network = networkUser
		if os.Geteuid() == 0 {
			o.network = networkTap
		}
	}
	d := &demo{
		app: a, demoOptions: o, began: time.Now(), total: 2 + 5*o.trials,
		report: demoReport{Meta: control.NewMeta("Demo"), Verdict: "error", Network: o.network, Engine: o.engine, Clients: o.clients, Trials: o.trials},
	}
	for _, name := range demoEvents {
		d.report.Gaps = append(d.report.Gaps, demoGaps{Event: name})
	}
	d.board = newBoard(a.err, console.IsTerminal(int(os.Stderr.Fd())), d.liveLine)
	err := d.run(ctx)
	d.board.Close()
	if err != nil {
		return err
	}
	d.report.TookMS = time.Since(d.began).Milliseconds()
	return d.finish()
}

// run is the demo without its report.
func (d *demo) run(ctx context.Context) (err error) {
	if d.bios {
		if err := d.firmware(ctx); err != nil {
			return fmt.Errorf("firmware: %w", err)
		}
	}
	dir, err := os.MkdirTemp("", "ftvmm-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := d.form(ctx, dir); err != nil {
		return err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			d.showSides()
		}
		err = errors.Join(err, d.pair.Close())
	}()
	primary, err := d.start(ctx)
	if err != nil {
		return err
	}
	// Its clients end before the pair does, in any case.
	load := startClients(ctx, d.pair, d.clients, d.network == networkUser)
	defer load.cancel()
	d.load.Store(load)
	if err := d.undisturbed(ctx, load); err != nil {
		return err
	}
	d.done.Add(1)
	for trial := range d.trials {
		if d.trials > 1 {
			d.step("trial %d of %d", trial+1, d.trials)
		}
		if primary, err = d.trial(ctx, load, primary); err != nil {
			return err
		}
	}
	return d.end(ctx, load, primary)
}

// form makes the pair.
func (d *demo) form(ctx context.Context, dir string) error {
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	o := twins.Options{
		Binary: binary, Dir: dir, Guest: "ledgerd", DiskSize: demoDisk + int64(d.clients)*(demoDiskClient+int64(d.trials)*demoDiskTrial),
		Flags: []string{"--guest-tsc", tscUnused, "--engine", d.engine},
	}
	if d.network == networkUser {
		o.User, o.Append = true, userNetwork
		d.step("no taps: each process has a user network of its own, where TCP connections end with the process")
	}
	if d.pair, err = twins.New(o); err != nil {
		return fmt.Errorf("prepare the pair: %w", err)
	}
	return nil
}

// start starts both sides and says how they came to protect each other.
func (d *demo) start(ctx context.Context) (primary int, err error) {
	d.step("two processes, side a and side b, begin to run one guest: the ledger, a transaction server")
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	began := time.Now()
	for _, s := range d.pair.Sides {
		if err := s.Start(); err != nil {
			return 0, fmt.Errorf("start a side: %w", err)
		}
	}
	if primary, err = d.pair.Protected(ctx); err != nil {
		return 0, err
	}
	took := time.Since(began)
	d.report.FormedMS = took.Milliseconds()
	for i, s := range d.pair.Sides {
		d.say("   side %s: %s", twins.Sides[i], phases(s.Events(), began))
	}
	d.say("   the pair is complete after %v: side %s runs the guest, side %s follows each of its steps", rounded(took), twins.Sides[primary], twins.Sides[1-primary])
	return primary, nil
}

// phases tells a side's phases with their times.
func phases(events []event.Event, began time.Time) string {
	var parts []string
	for _, e := range events {
		text, _ := e.Attrs["text"].(string)
		if _, to, ok := strings.Cut(text, " -> "); ok && e.Kind == event.PairPhase {
			parts = append(parts, fmt.Sprintf("%s at %.2f s", to, e.Time.Sub(began).Seconds()))
		}
	}
	return strings.Join(parts, ", ")
}

// rounded leaves what a person wants to read of a time.
func rounded(t time.Duration) time.Duration {
	if t < 100*time.Millisecond {
		return t.Round(100 * time.Microsecond)
	}
	return t.Round(time.Millisecond)
}

// undisturbed watches the clients while nothing happens.
func (d *demo) undisturbed(ctx context.Context, load *clients) error {
	transports := fmt.Sprintf("%d TCP connections", len(load.all))
	if d.network == networkUser {
		transports = "TCP and UDP"
	}
	d.step("%d clients transfer money over %s", len(load.all), transports)
	if _, err := load.served(ctx); err != nil {
		return err
	}
	load.mark()
	before, began := load.acked.Load(), time.Now()
	if err := sleep(ctx, calm); err != nil {
		return err
	}
	gaps, err := load.served(ctx)
	if err != nil {
		return err
	}
	d.report.PerSecond = int(float64(load.acked.Load()-before) / time.Since(began).Seconds())
	longest := slices.Max(gaps)
	d.report.CalmMS = float64(longest.Microseconds()) / 1e3
	d.say("   %s transactions/s, each known to both sides before it is answered; the longest wait of a client was %v",
		thousands(d.report.PerSecond), rounded(longest))
	return nil
}

// trial kills the primary, hands over as planned, and kills the backup. The pair is complete before and after.
func (d *demo) trial(ctx context.Context, load *clients, primary int) (int, error) {
	if err := d.kill(ctx, load, primary, killPrimary); err != nil {
		return 0, err
	}
	primary = 1 - primary
	load.mark()
	began := time.Now()
	if err := d.handOver(ctx, primary); err != nil {
		return 0, err
	}
	took := time.Since(began)
	primary = 1 - primary
	gaps, err := load.served(ctx)
	if err != nil {
		return 0, err
	}
	d.report.Gaps[switchOver].add(gaps...)
	d.say("   ftvmm failover       side %s runs the guest after %v; clients waited %v at the most", twins.Sides[primary], rounded(took), rounded(slices.Max(gaps)))
	d.done.Add(1)
	return primary, d.kill(ctx, load, 1-primary, killBackup)
}

// kill kills a side, waits until all clients are served again, and starts it again.
func (d *demo) kill(ctx context.Context, load *clients, side, kind int) error {
	waiting, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	name, other := twins.Sides[side], twins.Sides[1-side]
	load.mark()
	d.pair.Sides[side].Kill()
	if err := d.pair.Sides[1-side].Await(waiting, "alone", "syncing", "protected"); err != nil {
		return err
	}
	gaps, err := load.served(ctx)
	if err != nil {
		return err
	}
	d.report.Gaps[kind].add(gaps...)
	what := "the primary"
	if kind == killBackup {
		what = "the backup "
	}
	d.say("   kill -9 %s  side %s goes on alone; clients waited %v at the most", what, other, rounded(slices.Max(gaps)))
	d.done.Add(1)

	began := time.Now()
	if err := d.pair.Sides[side].Start(); err != nil {
		return fmt.Errorf("start side %s again: %w", name, err)
	}
	if _, err := d.pair.Protected(waiting); err != nil {
		return err
	}
	took := time.Since(began)
	d.report.Rejoin.add(took)
	if _, err := load.served(ctx); err != nil {
		return err
	}
	d.say("   side %s is back      it has copied the running guest; the pair is complete after %v", name, rounded(took))
	d.done.Add(1)
	return nil
}

// handOver does what ftvmm failover does.
func (d *demo) handOver(ctx context.Context, primary int) error {
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	c := control.NewClient(d.pair.Control(primary))
	defer c.Close()
	if err := c.Failover(ctx); err != nil {
		return fmt.Errorf("failover: %w", err)
	}
	if err := awaitFailover(ctx, c, failoverDocument{From: twins.Sides[primary], To: twins.Sides[1-primary]}); err != nil {
		return err
	}
	_, err := d.pair.Protected(ctx)
	return err
}

// end shuts the guest down and checks what is left of it.
func (d *demo) end(ctx context.Context, load *clients, primary int) error {
	answers, err := load.stop()
	if err != nil {
		return err
	}
	d.report.Acknowledged = len(answers)
	for _, c := range load.all {
		d.report.Repeats += c.Repeats
		if c.transport == "tcp" && c.Connects == 1 {
			d.report.ConnectionsKept++
		}
	}
	d.step("power button: the guest shuts down")
	waiting, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	c := control.NewClient(d.pair.Control(primary))
	defer c.Close()
	if err := c.PowerButton(waiting); err != nil {
		return fmt.Errorf("power button: %w", err)
	}
	for i, s := range d.pair.Sides {
		code, err := s.Wait(waiting)
		if err != nil {
			return err
		}
		if code != runPoweredOff {
			return fmt.Errorf("side %s ended with exit code %d", twins.Sides[i], code)
		}
	}
	for _, s := range d.pair.Sides {
		for _, life := range s.Lives() {
			for _, e := range life.Events {
				if e.Kind == event.PairDivergence {
					d.report.Divergences++
				}
			}
		}
	}
	d.step("read the journal from both disks")
	var errs []error
	for i := range d.pair.Sides {
		if err := d.check(d.pair.Disk(i), answers); err != nil {
			errs = append(errs, fmt.Errorf("disk of side %s: %w", twins.Sides[i], err))
		}
	}
	d.report.DisksEqual, err = equalFiles(d.pair.Disk(0), d.pair.Disk(1))
	d.done.Add(1)
	return errors.Join(append(errs, err)...)
}

// check reads a disk's journal, and counts what it lacks and what it has twice.
func (d *demo) check(disk string, answers []ledger.Answer) error {
	f, err := os.Open(disk)
	if err != nil {
		return err
	}
	defer f.Close()
	journal, err := ledger.ReadJournal(f)
	if err != nil {
		return err
	}
	type request struct {
		client uint32
		number uint64
	}
	seen := map[request]bool{}
	lost, twice := 0, 0
	for _, r := range journal.Records {
		id := request{r.Client, r.Number}
		if seen[id] {
			twice++
		}
		seen[id] = true
	}
	for _, a := range answers {
		if journal.Covers([]ledger.Answer{a}) != nil {
			lost++
		}
	}
	d.report.JournalRecords = len(journal.Records)
	d.report.Lost, d.report.Duplicated = max(d.report.Lost, lost), max(d.report.Duplicated, twice)
	return nil
}

func equalFiles(a, b string) (bool, error) {
	f, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer f.Close()
	g, err := os.Open(b)
	if err != nil {
		return false, err
	}
	defer g.Close()
	var x, y [1 << 20]byte
	for {
		n, errF := io.ReadFull(f, x[:])
		m, errG := io.ReadFull(g, y[:])
		if !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		for _, err := range []error{errF, errG} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if errF != nil {
			return true, nil
		}
	}
}

// showSides shows what the sides said last, when something has gone wrong.
func (d *demo) showSides() {
	for i, s := range d.pair.Sides {
		d.say("   side %s is %q; its last events:", twins.Sides[i], s.Phase())
		events := s.Events()
		for _, e := range events[max(0, len(events)-demoLog):] {
			d.say("     %s %s %v", e.Time.Format("15:04:05.000"), e.Kind, e.Attrs)
		}
		if b, err := os.ReadFile(d.pair.Errors(i)); err == nil && len(b) > 0 {
			d.say("   and its messages: %s", bytes.TrimSpace(b[max(0, len(b)-2048):]))
		}
	}
}

// liveLine is what is shown while the demo runs.
func (d *demo) liveLine() string {
	load := d.load.Load()
	done := int(d.done.Load())
	if load == nil || done == d.total {
		return ""
	}
	states := make([]string, len(d.pair.Sides))
	for i, s := range d.pair.Sides {
		states[i] = "down"
		if s.Running() {
			states[i] = cmp.Or(s.Phase(), "starting")
		}
	}
	now := int(load.acked.Load())
	d.recent = append(d.recent, now)
	if n := len(d.recent) - 1 - int(time.Second/boardPeriod); n > 0 {
		d.recent = d.recent[n:]
	}
	rate := float64(now-d.recent[0]) / (float64(max(len(d.recent)-1, 1)) * boardPeriod.Seconds())
	return fmt.Sprintf("   %s  a: %-9s  b: %-9s  %s acknowledged, %.0f/s", bar(done, d.total), states[0], states[1], thousands(now), rate)
}

// finish draws, prints and judges.
func (d *demo) finish() error {
	r := &d.report
	kept := r.ConnectionsKept == r.Clients || r.Network == networkUser
	if r.Lost == 0 && r.Duplicated == 0 && r.DisksEqual && kept && r.Acknowledged > 0 {
		r.Verdict = "good"
	} else {
		d.exit = exitFailed
	}
	if d.svg != "" {
		if err := d.draw(); err != nil {
			return err
		}
	}
	if d.json {
		return d.document(r)
	}
	fmt.Fprintf(d.out, "%s\n  %s transactions acknowledged, %d lost, %d duplicated\n", verdict(r.Verdict), thousands(r.Acknowledged), r.Lost, r.Duplicated)
	if r.Network == networkTap {
		fmt.Fprintf(d.out, "  %d of %d TCP connections kept\n", r.ConnectionsKept, r.Clients)
	} else {
		fmt.Fprintf(d.out, "  %d requests repeated on new connections (as root they are kept)\n", r.Repeats)
	}
	for _, g := range r.Gaps {
		fmt.Fprintf(d.out, "  %-20s %2d times: a client waited %.1f ms (median), %.1f ms (longest)\n", g.Event+",", d.trials, g.P50, g.Max)
	}
	fmt.Fprintf(d.out, "  a side that was killed was back after %.1f s (median), %.1f s (longest)\n", r.Rejoin.P50/1e3, r.Rejoin.Max/1e3)
	if r.Divergences > 0 {
		fmt.Fprintf(d.out, "  the backup did something else than the primary %d times, and was made equal\n", r.Divergences)
	}
	fmt.Fprintf(d.out, "  journal of %s records verified on both disks, which are %s\n", thousands(r.JournalRecords), equality(r.DisksEqual))
	return nil
}

func verdict(v string) string {
	if v == "good" {
		return "good: nothing that a client was told is lost"
	}
	return "ERROR: a promise was broken"
}

func equality(equal bool) string {
	if equal {
		return "equal"
	}
	return "NOT EQUAL"
}

// draw writes the picture of the gaps.
func (d *demo) draw() (err error) {
	var series []plot.Series
	for _, g := range d.report.Gaps {
		series = append(series, plot.Series{Name: g.Event, Samples: g.Samples})
	}
	f, err := os.Create(d.svg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	title := fmt.Sprintf("How long a client waited: %d trials, %d clients, %s network", d.trials, d.report.Clients, d.network)
	return plot.CDF(f, title, "ms", series)
}
