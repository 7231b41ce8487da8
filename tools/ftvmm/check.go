package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/lockstep/selftest"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/console"
	"github.com/ftvmm/ftvmm/vmm/control"
)

func init() {
	extraCommands = append(extraCommands, (*app).checkCommand)
}

// exitPrecondition is the exit code of a check that was asked whether something is possible, which it is not.
const exitPrecondition = 8

// checkFlags say what is checked.
type checkFlags struct {
	selfTest bool
	quick    bool
	explain  bool
	level    int
	seed     string
	inject   string
	kvm      string
}

// checkDocument is what check reports with --json.
type checkDocument struct {
	control.Meta
	State    selftest.State   `json:"state"` // the worst of the rows
	Version  string           `json:"version"`
	SelfTest bool             `json:"self_test"`
	Quick    bool             `json:"quick"`
	Seed     string           `json:"seed"` // text: JSON numbers lose digits
	Inject   selftest.Fault   `json:"inject,omitempty"`
	Elapsed  int64            `json:"elapsed_ms"`
	Rows     []selftest.Row   `json:"rows"`
	Compared *selftest.Count  `json:"compared,omitempty"` // by all rows together
	Verdict  selftest.Verdict `json:"verdict"`
	Level    *checkedLevel    `json:"level,omitempty"`
	ExitCode int              `json:"exit_code"`
}

// checkedLevel is the answer to --level.
type checkedLevel struct {
	Asked int `json:"asked"`
	selftest.Answer
}

func (a *app) checkCommand() *cobra.Command {
	var f checkFlags
	c := &cobra.Command{
		Use:   "check",
		Short: "find out what this host can promise a guest",
		Long: `Find out what this host can promise a protected guest, by trying it.

Without --self-test: what the host's KVM offers, in less than a second. With it
test guests, which are part of this program, also run twice, kicked at random moments;
every exit, the memory and the devices of both runs must be equal. That takes
half a minute, with --quick a few seconds, and needs no network, no root, and 8 MiB
in the directory for temporary files.

Each row says good, information, unknown, warning or error, with a code that stays the same
between versions; docs/check.md explains all of them. Then come the
conclusions: which counter names stops between two exits, which commit rule a pair may
use, which engine can protect at level 3, and which levels are possible.

--inject breaks one of the two runs on purpose, to see that it is found: a
test that cannot fail proves nothing.

Exit codes: 0 no error; 1 a row is an error; 2 usage; 8 the level that
--level asks for is not possible, or not known to be; 65 no KVM, no permission to
use it, or it lacks a feature that every guest needs.`,
		Example: `  ftvmm check
  ftvmm check --self-test
  ftvmm check --self-test --quick --level 3 --json`,
		Args: a.arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.check(cmd.Context(), &f)
		},
	}
	c.Flags().BoolVar(&f.selfTest, "self-test", false, "also run the test guests twice and compare")
	c.Flags().BoolVar(&f.quick, "quick", false, "with --self-test: run them shorter")
	c.Flags().BoolVar(&f.explain, "explain", false, "say of good rows, too, what they mean")
	c.Flags().IntVar(&f.level, "level", 0, "fail with exit code 8 if protection at this `level`, 1 to 3, is not possible")
	c.Flags().StringVar(&f.seed, "seed", "", "`number` that decides the random kicks; default: a new one, which is printed")
	c.Flags().StringVar(&f.inject, "inject", "", "with --self-test: break one run by this `fault`: "+faultNames())
	c.Flags().StringVar(&f.kvm, "kvm", vmm.DefaultKVM, "the hypervisor's device `node`")
	return c
}

func faultNames() string {
	var names []string
	for _, f := range selftest.Faults {
		names = append(names, string(f))
	}
	return strings.Join(names, ", ")
}

// env checks the flags.
func (f *checkFlags) env() (*selftest.Env, error) {
	e := &selftest.Env{KVM: f.kvm, Quick: f.quick, Seed: rand.Uint64(), Inject: selftest.Fault(f.inject)}
	if f.seed != "" {
		var err error
		if e.Seed, err = strconv.ParseUint(f.seed, 0, 64); err != nil {
			return nil, fail(exitUsage, "bad-value", "take a whole number, such as one that an earlier check has printed", "%q is no seed", f.seed)
		}
	}
	switch {
	case f.level < 0 || f.level > selftest.MaxLevel:
		return nil, fail(exitUsage, "bad-value", "levels are 1, 2 and 3", "there is no level %d", f.level)
	case f.inject != "" && !slices.Contains(selftest.Faults, e.Inject):
		return nil, fail(exitUsage, "bad-value", "choose one of "+faultNames(), "there is no fault %q", f.inject)
	case !f.selfTest && (f.quick || f.inject != ""):
		return nil, fail(exitUsage, "usage", "add --self-test", "--quick and --inject say how the guests run, and no guest is to run")
	}
	return e, nil
}

func (a *app) check(ctx context.Context, f *checkFlags) error {
	e, err := f.env()
	if err != nil {
		return err
	}
	if err := selftest.Open(f.kvm); err != nil {
		return cannotRun(err)
	}
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + ioSlots)
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	defer stop()
	checks := selftest.Host()
	if f.selfTest {
		checks = append(checks, selftest.Guests()...)
	}
	began := time.Now()
	bar := a.newProgress(began)
	rows, err := selftest.Run(ctx, e, checks, bar.show)
	bar.clear()
	if err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	if err != nil {
		return fail(exitFailed, "interrupted", "run the check again", "interrupted after %d of %d checks", len(rows), len(checks))
	}
	doc := checkDocument{
		Meta: control.NewMeta("Check"), State: selftest.Worst(rows), Version: version, SelfTest: f.selfTest, Quick: f.quick,
		Seed: strconv.FormatUint(e.Seed, 10), Inject: e.Inject, Elapsed: time.Since(began).Milliseconds(), Rows: rows, Verdict: selftest.Conclude(rows),
	}
	if f.selfTest {
		total := selftest.Total(rows)
		doc.Compared = &total
	}
	doc.judge(f.level)
	a.exit = doc.ExitCode
	if a.json {
		return a.document(doc)
	}
	return a.checkText(&doc, f.explain)
}

// cannotRun is the failure of a host without KVM, with the exit code that run has for it.
func cannotRun(err error) *failure {
	f := classify(err)
	f.exit = runNoKVM
	return f
}

// judge decides the exit code.
func (d *checkDocument) judge(level int) {
	if d.State == selftest.Error {
		d.ExitCode = exitFailed
	}
	if level > 0 {
		d.Level = &checkedLevel{level, d.Verdict.Levels[level-1]}
		if d.Level.Value != selftest.Possible {
			d.ExitCode = exitPrecondition
		}
	}
}

func (a *app) checkText(d *checkDocument, explain bool) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	for i := range d.Rows {
		r := &d.Rows[i]
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", r.State, r.Check, r.Code, r.Found)
		if x := r.Divergence; x != nil {
			fmt.Fprintf(w, "\t\t\tfirst run: %s\n\t\t\tsecond run: %s\n", bounded(x.First), bounded(x.Second))
		}
		if r.State == selftest.Good && !explain {
			continue
		}
		fmt.Fprintf(w, "\t\t\tmeaning: %s\n", r.Meaning)
		if r.Remedy != "" {
			fmt.Fprintf(w, "\t\t\tremedy: %s\n", r.Remedy)
		}
	}
	fmt.Fprintln(w)
	answer := func(what string, v *selftest.Answer) {
		fmt.Fprintf(w, "%s\t%s\n", what, v.Value)
		for _, reason := range v.Reasons {
			fmt.Fprintf(w, "\t- %s\n", reason)
		}
	}
	// The first table's columns are not those of the second.
	if err := w.Flush(); err != nil {
		return err
	}
	answer("counter", &d.Verdict.Counter)
	answer("commit rule", &d.Verdict.Commit)
	answer("level 3 engine", &d.Verdict.Engine)
	for i := range d.Verdict.Levels {
		answer(fmt.Sprintf("level %d", i+1), &d.Verdict.Levels[i])
	}
	if c := d.Compared; c != nil {
		fmt.Fprintf(w, "compared\t%d runs: %d exits, %d inputs, %d readings of clocks, %d interrupts; %d instructions counted to %d stops; %d kicks\n",
			c.Runs, c.Exits, c.Inputs, c.Clocks, c.Interrupts, c.Instructions, c.Stops, c.Kicks)
		fmt.Fprintf(w, "seed\t%s\n", d.Seed)
	}
	fmt.Fprintf(w, "result\t%s, in %v\n", d.State, time.Duration(d.Elapsed)*time.Millisecond)
	if err := w.Flush(); err != nil {
		return err
	}
	if l := d.Level; l != nil && l.Value != selftest.Possible {
		fmt.Fprintf(a.err, "error: protection at level %d is %s on this host: %s (level-%s)\n  remedy: mend the rows that are named\n",
			l.Asked, l.Value, strings.Join(l.Reasons, "; "), l.Value)
	} else if d.ExitCode != exitOK {
		fmt.Fprintf(a.err, "error: a check has failed (check-failed)\n  remedy: see the rows that say error\n")
	}
	return nil
}

// maxValue bounds each of two different values on a terminal, in bytes; --json has all of them.
const maxValue = 400

func bounded(s string) string {
	s = strings.ToValidUTF8(strings.Join(strings.Fields(s), " "), "?")
	if len(s) > maxValue {
		s = s[:maxValue] + "…"
	}
	return s
}

// progress is one line on a terminal that says how far long work has come; elsewhere it is nothing.
type progress struct {
	w     io.Writer // nil: no terminal
	began time.Time
}

func (a *app) newProgress(began time.Time) *progress {
	if f, ok := a.err.(*os.File); ok && console.IsTerminal(int(f.Fd())) {
		return &progress{f, began}
	}
	return &progress{}
}

// eraseLine is carriage return and ECMA-48's "erase in line".
const eraseLine = "\r\x1b[K"

func (p *progress) show(at selftest.Progress) {
	if p.w == nil {
		return
	}
	elapsed := time.Since(p.began)
	left := ""
	if at.Part > 0.1 { // before it is a guess
		left = fmt.Sprintf(", about %v left", time.Duration(float64(elapsed)*(1-at.Part)/at.Part).Round(time.Second))
	}
	fmt.Fprintf(p.w, "%s%3.0f%%  check %d of %d: %s, %v%s", eraseLine, 100*at.Part, at.Done+1, at.Total, at.Next, elapsed.Round(time.Second), left)
}

func (p *progress) clear() {
	if p.w != nil {
		fmt.Fprint(p.w, eraseLine)
	}
}
