package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/record"
	"github.com/ftvmm/ftvmm/mirror/disk"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// Limits of a guest that runs for the self-test.
const (
	guestMemory = 32 << 20
	guestDisk   = 8 << 20
	// guestPatience bounds one run: the slowest takes a few seconds where kernel code is emulated.
	guestPatience = 60 * time.Second
	// liveTries is how often a guest may run before what it complains about counts.
	liveTries = 3
	// maxConsole bounds what is kept of a guest's output, in bytes.
	maxConsole = 64 << 10
)

// guest is one that runs twice.
type guest struct {
	name, image string
	cmdline     string
	quick       string // the command line with Env.Quick; "": the same
	disk, net   bool
	tries       string // for the report
	weight      int    // how long it takes beside others
	landing     bool   // it makes no exits: without a counter it never ends
}

// marker is on the command line of every guest; FaultMemory changes it there.
const marker = "selftest=unbroken"

var allGuests = []guest{
	{name: "hello", weight: 2, image: "hello", tries: "start-up and the console"},
	{name: "storm-cpl0", weight: 100, image: "storm", cmdline: "mode=all n=3000 cpl=0", quick: "mode=all n=300 cpl=0", tries: "every kind of exit from kernel code"},
	{name: "storm-cpl3", weight: 100, image: "storm", cmdline: "mode=all n=3000 cpl=3", quick: "mode=all n=300 cpl=3", tries: "every kind of exit from user code"},
	{name: "compute", weight: 40, image: "compute", cmdline: "size=8m rounds=60 exit_every=100000", quick: "size=4m rounds=2 exit_every=50000", tries: "long runs of user code that write memory, with vector registers"},
	{name: "timers", weight: 30, image: "timers", cmdline: "ms=20 no=rtc", quick: "ms=10 no=rtc", tries: "all clocks and timers"},
	{name: "irq", weight: 12, image: "irq", tries: "the interrupt controllers"},
	{name: "blk", weight: 55, image: "blk", cmdline: "mode=verify n=300", quick: "mode=verify n=60", disk: true, tries: "a disk whose requests end at any time"},
	{name: "net", weight: 4, image: "net", cmdline: netCmdline, net: true, tries: "a network whose frames come at any time"},
	{name: "landing", weight: 95, image: "spin", cmdline: "n=60 hz=200 masked=500", quick: "n=20 hz=200", landing: true, tries: "interrupts between two exits"},
}

// Guests returns the checks that run the committed test guests twice. [Host]'s come before them.
func Guests() []Check {
	checks := make([]Check, len(allGuests))
	for i := range allGuests {
		g := &allGuests[i]
		checks[i] = Check{guestPrefix + g.name, g.weight, func(ctx context.Context, e *Env) Row { return e.compare(ctx, g, uint64(i)) }}
	}
	return checks
}

// meaningEqual and meaningParted are what the outcome of two runs means.
const (
	meaningEqual  = "two machines that get the same inputs at the same positions stay the same on this host"
	meaningParted = "a backup on this host would leave its primary's track: no lockstep here"
	remedyParted  = "compare this kernel and processor with those in docs/kvm.md, and report it with the guest, the seed and both values; until it is mended protect by checkpoints"
)

// compare runs a guest twice and compares all that it does and leaves.
func (e *Env) compare(ctx context.Context, g *guest, number uint64) Row {
	if g.landing && e.counter != vmm.CounterNone && e.counter != "" || !g.landing {
		return e.compareRuns(ctx, g, number)
	}
	return Row{
		State: Warning, Code: "landing-no-counter", Found: "not tried: no counter of this host names stops between two exits",
		Meaning: "an input that comes while the guest makes no exits waits for the next one, or for a cut",
		Remedy:  "see the row " + checkCounter,
	}
}

func (e *Env) compareRuns(ctx context.Context, g *guest, number uint64) Row {
	first, err := e.live(ctx, g, number)
	defer first.close()
	if err != nil {
		return guestFailure(ctx, g, err)
	}
	if row := first.verdict(g); row != nil {
		return *row
	}
	if err := e.tamper(g, first); err != nil {
		return guestFailure(ctx, g, err)
	}
	count := Count{Runs: 1, Kicks: first.stats.Interrupted}
	replays := uint64(2)
	if e.Quick {
		replays = 1
	}
	for i := range replays {
		d, err := e.replay(ctx, g, first, &count, number<<8|i+1)
		if err != nil {
			return guestFailure(ctx, g, err)
		}
		if d != nil {
			d.Guest = g.name
			return Row{
				State: Error, Code: "divergence", Meaning: meaningParted, Remedy: remedyParted, Divergence: d, Compare: &count,
				Found: fmt.Sprintf("the runs part at exit %s: %s: %s", d.Position, d.What, shorten(d.First, d.Second)),
			}
		}
	}
	row := Row{State: Good, Code: "equal", Meaning: meaningEqual, Compare: &count, Found: fmt.Sprintf(
		"%s: %d runs equal in %d exits, %d inputs, %d interrupts, under %d kicks", g.tries, count.Runs, count.Exits, count.Inputs, count.Interrupts, count.Kicks)}
	if g.landing {
		row.Code = "landings-exact"
		row.Found = fmt.Sprintf("%d runs equal; all %d stops that were named between exits, %d instructions after them, were landed on, %d landings",
			count.Runs, count.Stops, count.Instructions, count.Landings)
		row.Meaning = "inputs reach a guest that makes no exits, at the same instruction on both sides"
		if count.Landings == 0 {
			row.State, row.Code = Unknown, "landings-none"
			row.Found = "the guest ended without a stop between two exits"
			row.Remedy = "run the check again on a host with less other work"
		}
	}
	return row
}

// errLate reports a guest that did not end in time.
var errLate = errors.New("the guest does not end in time")

// guestFailure is the row of a guest that could not be compared.
func guestFailure(ctx context.Context, g *guest, err error) Row {
	const meaning = "whether this host repeats such a guest is not known"
	switch {
	case ctx.Err() != nil:
		return Row{State: Unknown, Code: "interrupted", Found: "the check was interrupted", Meaning: meaning, Remedy: "run the check again"}
	case errors.Is(err, errLate):
		return Row{
			State: Unknown, Code: "guest-timeout", Found: fmt.Sprintf("%s: %v", g.name, err), Meaning: meaning,
			Remedy: "run the check again on a host with less other work",
		}
	}
	return broken("guest-broken", err, meaning)
}

// recorded is a run of a guest with all that is needed to compare it.
type recorded struct {
	machine *vmm.Machine
	disk    backend.Disk
	dir     string // of the scratch disk
	peer    *peer
	log     []byte
	end     vmm.Exit
	stats   vmm.Stats
	console tail
}

func (r *recorded) close() {
	if r.machine != nil {
		_ = r.machine.Close()
	}
	if r.peer != nil {
		_ = r.peer.Close()
	}
	if r.disk != nil {
		_ = r.disk.Close()
	}
	if r.dir != "" {
		_ = os.RemoveAll(r.dir)
	}
}

// verdict returns a row if the guest itself was not content with the machine.
func (r *recorded) verdict(g *guest) *Row {
	if r.end == (vmm.Exit{Reason: vmm.ExitDebugExit}) {
		return nil
	}
	why := fmt.Sprintf("%s ended with %s %d %s", g.name, r.end.Reason, r.end.Code, r.end.Detail)
	for line := range strings.Lines(r.console.String()) {
		if strings.HasPrefix(line, "FAIL ") {
			why += "; " + strings.TrimSpace(line)
		}
	}
	return &Row{
		State: Error, Code: "guest-fails", Found: why, Meaning: "the machine is not what a guest expects: guests may not run here",
		Remedy: "report it with this text, the processor and the kernel",
	}
}

// live runs the guest until it is content with the machine, at most liveTries times: claims about clocks do not
// hold when a busy host stops a guest for longer than a clock takes to go round (55 ms for the PIT).
func (e *Env) live(ctx context.Context, g *guest, number uint64) (r *recorded, err error) {
	for try := range uint64(liveTries) {
		if r != nil {
			r.close()
		}
		if r, err = e.record(ctx, g, number|try<<16); err != nil || r.verdict(g) == nil {
			break
		}
	}
	return r, err
}

// record runs the guest live, recorded and kicked.
func (e *Env) record(ctx context.Context, g *guest, number uint64) (r *recorded, err error) {
	r = &recorded{}
	kernel, err := guests.Image(g.image)
	if err != nil {
		return r, err
	}
	cmdline := g.cmdline
	if e.Quick && g.quick != "" {
		cmdline = g.quick
	}
	cfg := vmm.Config{
		Name: g.name, KVM: e.KVM, Memory: guestMemory, Kernel: kernel, Cmdline: strings.TrimSpace(cmdline + " " + marker),
		Serial: []vmm.Console{&r.console}, RNG: true,
	}
	if g.disk {
		if err := r.scratch(&cfg); err != nil {
			return r, err
		}
	}
	if g.net {
		r.peer = newPeer(e.Seed ^ number)
		cfg.NICs = []vmm.NIC{{Backend: r.peer, MAC: peerGuestMAC}}
	}
	cfg.Observe = e.breaker(g, &r.machine)
	rec := record.NewRecorder(&cfg, record.Options{Counter: e.counter, Details: true})
	if r.machine, err = vmm.New(cfg); err != nil {
		return r, err
	}
	var buf bytes.Buffer
	if err := rec.Begin(r.machine, &buf, false); err != nil {
		return r, err
	}
	r.end, err = e.run(ctx, r.machine, number<<8)
	if endErr := rec.End(r.end); err == nil {
		err = endErr
	}
	r.log, r.stats = buf.Bytes(), r.machine.Stats()
	return r, err
}

// scratch gives the guest a disk of its own.
func (r *recorded) scratch(cfg *vmm.Config) (err error) {
	if r.dir, err = os.MkdirTemp("", "ftvmm-check-"); err != nil {
		return fmt.Errorf("make a scratch disk: %w", err)
	}
	if r.disk, err = disk.Open(filepath.Join(r.dir, "disk"), disk.Options{Create: guestDisk}); err != nil {
		return fmt.Errorf("make a scratch disk: %w", err)
	}
	cfg.Disks = []vmm.Disk{{Backend: r.disk}}
	return nil
}

// run runs a machine to its end, kicked at random moments.
func (e *Env) run(ctx context.Context, m *vmm.Machine, stream uint64) (vmm.Exit, error) {
	patience := guestPatience
	if e.patience > 0 {
		patience = e.patience
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errLate)
	defer cancel()
	stop := kick(m, e.Seed, stream)
	end, err := m.Run(ctx)
	stop()
	if err == nil && end.Reason == vmm.ExitQuit && ctx.Err() != nil {
		err = fmt.Errorf("%w (it came to exit %v)", context.Cause(ctx), m.Position())
	}
	return end, err
}

// replay runs the guest once more from its recording, kicked at other moments, and compares both
// runs. It returns the first difference, nil if there is none, and adds to count.
func (e *Env) replay(ctx context.Context, g *guest, first *recorded, count *Count, stream uint64) (*Divergence, error) {
	l, err := log.NewReader(bytes.NewReader(first.log), int64(len(first.log)))
	if err != nil {
		return nil, err
	}
	defer l.Close()
	var console tail
	r, err := record.NewReplayer(l, record.ReplayOptions{
		Verify: true, KVM: e.KVM, Output: func(_ int, p []byte) { console.Output(p) },
	})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	m := r.Machine()
	end, err := e.run(ctx, m, stream)
	res, err := r.Finish(end, err)
	if err != nil {
		return nil, err
	}
	stats := m.Stats()
	count.Runs++
	count.Exits, count.Interrupts, count.Emulated, count.Digest = stats.Exits, stats.Interrupts, stats.Emulated, res.Digest
	count.Kicks += stats.Interrupted
	count.Landings += stats.Landings
	if err := count.inputs(first.log); err != nil {
		return nil, err
	}
	if d := res.Divergence; d != nil {
		return &Divergence{Position: d.Position.String(), What: d.What, First: d.Recorded, Second: d.Replayed}, nil
	}
	at := res.Position.String()
	switch {
	case first.stats.Exits != stats.Exits:
		return &Divergence{Position: at, What: "the number of exits", First: fmt.Sprint(first.stats.Exits), Second: fmt.Sprint(stats.Exits)}, nil
	case first.stats.Interrupts != stats.Interrupts:
		return &Divergence{Position: at, What: "the number of interrupts", First: fmt.Sprint(first.stats.Interrupts), Second: fmt.Sprint(stats.Interrupts)}, nil
	case first.console.String() != console.String():
		return &Divergence{Position: at, What: "console output", First: first.console.String(), Second: console.String()}, nil
	}
	d := compareMemory(first.machine, m, count)
	if d == nil {
		d, err = compareState(first.machine, m, count)
	}
	if d != nil {
		d.Position = at
	}
	return d, err
}

// inputs counts what is in a recording.
func (c *Count) inputs(recording []byte) error {
	l, err := log.NewReader(bytes.NewReader(recording), int64(len(recording)))
	if err != nil {
		return err
	}
	defer l.Close()
	c.Inputs, c.Clocks, c.Stops, c.Instructions = 0, 0, 0, 0
	var last vmm.Position // the last stop
	for {
		var x log.Entry
		switch err := l.Next(&x); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		switch x.Kind {
		case log.Input:
			c.Inputs++
		case log.Sample:
			c.Clocks++
		case log.Stop:
			c.Stops++
			c.Instructions += x.Stop.Count
			if last.Exit == x.Pos.Exit {
				c.Instructions -= last.Count
			}
			last = x.Pos
		}
	}
}

// tail keeps the end of what a guest writes. Its methods are called from one goroutine at a time.
type tail struct{ b []byte }

// Start implements [vmm.Console]: nobody types.
func (t *tail) Start(func(p []byte)) {}

// Output keeps p.
func (t *tail) Output(p []byte) {
	t.b = append(t.b, p...)
	if n := len(t.b) - maxConsole; n > 0 {
		t.b = t.b[n:]
	}
}

func (t *tail) String() string { return string(t.b) }
