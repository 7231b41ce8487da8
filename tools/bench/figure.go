package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/tools/bench/plot"
)

// slowRuns is the most runs of a slow group.
const slowRuns = 3

// figure is one line of the table.
type figure struct {
	name  string
	what  string
	unit  string
	scale float64 // a sample divided by it is in unit
	// target is what the ratio ours/QEMU may be at most or, if more is better, must be at least;
	// of a figure without comparison, what the figure itself may be.
	target   float64
	more     bool // more is better
	absolute bool // there is nothing to compare with
	peer     bool // QEMU's alone, to put ours beside: there is no target
	shown    bool // ours alone, without a target
	// quantile is which of the samples, in ascending order, stands for all (1: the greatest); 0: the median.
	quantile float64
	// plot is the picture in which the samples are a distribution, "" for none, and series what it is called there.
	plot, series string
}

// met says whether a value meets the target.
func (f *figure) met(v float64) bool {
	if f.more {
		return v >= f.target
	}
	return v <= f.target
}

// group is what one run of a virtual machine measures.
type group struct {
	figures []figure
	// Measured only if asked for: with the option of that name, or with a -run that matches.
	slow, lockstep bool
	// measure takes one sample of each figure, in the figures' order.
	measure func(ctx context.Context, b *bench, v vm) ([]float64, error)
	// spread, instead of measure, takes any number of samples of each figure.
	spread func(ctx context.Context, b *bench, v vm) ([][]float64, error)
}

// take takes the samples of one run.
func (g *group) take(ctx context.Context, b *bench, v vm) ([][]float64, error) {
	if g.spread != nil {
		return g.spread(ctx, b, v)
	}
	values, err := g.measure(ctx, b, v)
	samples := make([][]float64, len(values))
	for i := range values {
		samples[i] = values[i : i+1]
	}
	return samples, err
}

// selected says whether a figure is to be measured.
func (g *group) selected(f *figure, o options) bool {
	if !o.only.MatchString(f.name) {
		return false
	}
	return o.only.String() != "" || (!g.slow || o.slow) && (!g.lockstep || o.lockstep)
}

// bench is one comparison.
type bench struct {
	dir, root string // for files of the run; the source tree
	ours      vm
	qemu      vm // nil: not installed
	log       io.Writer
	net       *network // made when it is first needed
	disk      string   // likewise
}

func (b *bench) logf(format string, args ...any) { fmt.Fprintf(b.log, format+"\n", args...) }

// result is a figure with its samples.
type result struct {
	figure
	ours, qemu []float64
	missing    string // why there are no samples, "" if there are
}

// value returns what stands for the samples of ours and of QEMU's, in the figure's unit, and the ratio to QEMU's (0 without one).
func (r *result) value() (ours, qemu, ratio float64) {
	ours, qemu = r.typical(r.ours)/r.scale, r.typical(r.qemu)/r.scale
	if qemu != 0 {
		ratio = ours / qemu
	}
	return ours, qemu, ratio
}

// typical returns the sample that stands for all.
func (f *figure) typical(samples []float64) float64 {
	if f.quantile == 0 {
		return median(samples)
	}
	s := slices.Clone(samples)
	slices.Sort(s)
	return plot.Quantile(s, f.quantile)
}

// verdict says whether the target is met: "yes", "no", or "-" where it cannot be said.
func (r *result) verdict() string {
	ours, qemu, ratio := r.value()
	switch {
	case r.peer, r.shown, len(r.ours) == 0, !r.absolute && qemu == 0:
		return "-"
	case r.absolute && r.met(ours), !r.absolute && r.met(ratio):
		return "yes"
	}
	return "no"
}

// median returns the middle sample, or the mean of the two in the middle; 0 of none.
func median(samples []float64) float64 {
	s := slices.Clone(samples)
	slices.Sort(s)
	n := len(s)
	switch {
	case n == 0:
		return 0
	case n%2 == 1:
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// measure takes the samples of all groups that have a selected figure. A group that fails is
// reported and left out; the others go on.
func (b *bench) measure(ctx context.Context, groups []group, o options) ([]result, error) {
	var all []result
	failed := 0
	for _, g := range groups {
		var selected []result
		var index []int
		for i, f := range g.figures {
			if g.selected(&f, o) {
				selected, index = append(selected, result{figure: f}), append(index, i)
			}
		}
		if len(selected) == 0 {
			continue
		}
		name := g.figures[0].name
		if len(g.figures) > 1 {
			name += " and others"
		}
		runs := o.runs
		if g.slow || g.lockstep {
			runs = min(runs, slowRuns)
		}
		if g.figures[0].peer && b.qemu == nil {
			for i := range selected {
				selected[i].missing = "no QEMU here"
			}
			all = append(all, selected...)
			continue
		}
		if err := b.sample(ctx, g, name, runs, selected, index); err != nil {
			if ctx.Err() != nil {
				return all, ctx.Err()
			}
			b.logf("%s: %v", name, err)
			failed++
			continue
		}
		all = append(all, selected...)
	}
	if b.net != nil {
		b.net.close()
	}
	switch {
	case failed > 0:
		return all, fmt.Errorf("%d measurements failed", failed)
	case len(all) == 0:
		return nil, fmt.Errorf("no figure matches %q", o.only)
	}
	return all, nil
}

// sample runs one group: ours, QEMU, ours, QEMU ...
func (b *bench) sample(ctx context.Context, g group, name string, runs int, selected []result, index []int) error {
	for i := range runs {
		for _, v := range []vm{b.ours, b.qemu} {
			if v == nil || v == b.qemu && g.figures[0].absolute || v == b.ours && g.figures[0].peer {
				continue
			}
			limited, cancel := context.WithTimeout(ctx, runLimit)
			values, err := g.take(limited, b, v)
			cancel()
			if err != nil {
				return fmt.Errorf("%s: %w", v.name(), err)
			}
			var line strings.Builder
			for j := range selected {
				r := &selected[j]
				if v == b.ours {
					r.ours = append(r.ours, values[index[j]]...)
				} else {
					r.qemu = append(r.qemu, values[index[j]]...)
				}
				fmt.Fprintf(&line, " %s", digits(r.typical(values[index[j]])/r.scale))
			}
			b.logf("%s %d/%d %s:%s", name, i+1, runs, v.name(), line.String())
		}
	}
	return nil
}

// printTable writes the figures for people.
func printTable(to io.Writer, results []result) {
	w := tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "figure\tftvmm\tQEMU\tunit\tratio\ttarget\tmet\twhat")
	for i := range results {
		r := &results[i]
		ours, qemu, ratio := r.value()
		sign := "<="
		if r.more {
			sign = ">="
		}
		mine, theirs, quotient, target, what := digits(ours), "-", "-", fmt.Sprintf("%s %g", sign, r.target), r.what
		if qemu != 0 {
			theirs, quotient = digits(qemu), fmt.Sprintf("%.3f", ratio)
		}
		if r.peer {
			mine, quotient, target = "-", "-", "-"
		}
		if r.shown {
			target = "-"
		}
		if r.missing != "" {
			what = fmt.Sprintf("not measured, %s: %s", r.missing, what)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.name, mine, theirs, r.unit, quotient, target, r.verdict(), what)
	}
	_ = w.Flush() // standard output
}

// digits writes a number with what digits mean something.
func digits(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// document is the JSON form of a comparison.
type document struct {
	APIVersion string           `json:"apiVersion"`
	Kind       string           `json:"kind"`
	Time       time.Time        `json:"time"`
	Host       hostDocument     `json:"host"`
	Runs       int              `json:"runs"`
	Figures    []figureDocument `json:"figures"`
}

type hostDocument struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	QEMU   string `json:"qemu,omitempty"`
}

type figureDocument struct {
	Name     string    `json:"name"`
	What     string    `json:"what"`
	Unit     string    `json:"unit"`
	Peer     bool      `json:"peer,omitempty"` // QEMU's alone, for comparison: no ftvmm, target or verdict
	Missing  string    `json:"missing,omitempty"`
	Ftvmm    *float64  `json:"ftvmm,omitempty"`
	QEMU     float64   `json:"qemu,omitempty"`
	Ratio    float64   `json:"ratio,omitempty"`
	Target   *float64  `json:"target,omitempty"`
	Better   string    `json:"better"` // "less" or "more"
	Met      string    `json:"met"`    // "yes", "no" or "-"
	Samples  []float64 `json:"samples,omitempty"`
	Baseline []float64 `json:"baseline,omitempty"` // QEMU's samples
}

func newDocument(b *bench, o options, results []result) document {
	d := document{APIVersion: "v1", Kind: "Benchmark", Time: time.Now().UTC(), Runs: o.runs}
	d.Host = hostDocument{CPUs: runtime.NumCPU(), CPU: cpuModel()}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		d.Host.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	if q, ok := b.qemu.(*qemu); ok {
		d.Host.QEMU = q.version
	}
	for i := range results {
		r := &results[i]
		f := figureDocument{Name: r.name, What: r.what, Unit: r.unit, Better: "less", Met: r.verdict(), Peer: r.peer, Missing: r.missing}
		if r.more {
			f.Better = "more"
		}
		ours, qemu, ratio := r.value()
		f.QEMU, f.Ratio = qemu, ratio
		if !r.peer {
			f.Ftvmm = &ours
		}
		if !r.peer && !r.shown {
			f.Target = &r.target
		}
		f.Samples, f.Baseline = scaled(r.ours, r.scale), scaled(r.qemu, r.scale)
		d.Figures = append(d.Figures, f)
	}
	return d
}

func scaled(samples []float64, scale float64) (out []float64) {
	for _, v := range samples {
		out = append(out, v/scale)
	}
	return out
}

// cpuModel returns the name that the kernel gives the first processor.
func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
