package main

import (
	"context"
	"errors"
	"io"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		samples []float64
		want    float64
	}{
		{nil, 0},
		{[]float64{3}, 3},
		{[]float64{9, 1, 2}, 2},
		{[]float64{4, 1, 3, 9}, 3.5},
	} {
		require.Equal(t, tt.want, median(tt.samples), "%v", tt.samples)
	}
}

func TestVerdict(t *testing.T) {
	less := figure{scale: 1, target: 0.5}
	more := figure{scale: 1, target: 1, more: true}
	alone := figure{scale: 1, target: 3, absolute: true}
	for _, tt := range []struct {
		name       string
		f          figure
		ours, qemu []float64
		want       string
	}{
		{"half as long", less, []float64{1}, []float64{2}, "yes"},
		{"too long", less, []float64{1.1}, []float64{2}, "no"},
		{"as many", more, []float64{2}, []float64{2}, "yes"},
		{"fewer", more, []float64{1.9}, []float64{2}, "no"},
		{"outliers do not matter", more, []float64{2, 2, 0}, []float64{1, 1, 9}, "yes"},
		{"within the bound", alone, []float64{3}, nil, "yes"},
		{"beyond the bound", alone, []float64{4}, nil, "no"},
		{"no baseline", less, []float64{1}, nil, "-"},
		{"no sample", alone, nil, nil, "-"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := result{figure: tt.f, ours: tt.ours, qemu: tt.qemu}
			require.Equal(t, tt.want, r.verdict())
		})
	}
}

func TestResidentBeyond(t *testing.T) {
	const smaps = `55d000-55e000 r-xp 00000000 fe:00 1 /usr/bin/some: program
Size:               1024 kB
Rss:                 300 kB
7f0000-7f8000 rw-p 00000000 00:00 0
Size:             130304 kB
Rss:               50000 kB
VmFlags: rd wr mr mw me ac sd
7f9000-7fa000 rw-p 00000000 00:00 0
Size:              65536 kB
Rss:                   8 kB
`
	n, err := residentBeyond(strings.NewReader(smaps), 128<<20)
	require.NoError(t, err)
	require.Equal(t, uint64(308<<10), n)

	_, err = residentBeyond(strings.NewReader(smaps), 512<<20)
	require.ErrorContains(t, err, "cannot be told from the rest")
}

func TestParseLoop(t *testing.T) {
	v, err := parseLoop([]byte(`goos: linux
BenchmarkExit/out-2         	14336636	       114.0 ns/op	       0 B/op	       0 allocs/op
BenchmarkExit/rep-outs-2    	 4265230	       294.5 ns/op	      16 B/op	       2 allocs/op
BenchmarkExit/in            	 8672179	       260.8 ns/op	       0 B/op	       0 allocs/op
PASS
`))
	require.NoError(t, err)
	require.InDeltaSlice(t, []float64{294.5e-9, 2}, v, 1e-12)

	_, err = parseLoop([]byte("PASS\n"))
	require.ErrorContains(t, err, "no benchmark")
}

// fakeVM is a program that is never started.
type fakeVM string

func (v fakeVM) name() string              { return string(v) }
func (fakeVM) command(guest) []string      { return nil }
func (fakeVM) status(code int) (int, bool) { return code, true }

func TestProgramsRunInTurn(t *testing.T) {
	var order []string
	measure := func(values ...float64) func(context.Context, *bench, vm) ([]float64, error) {
		return func(_ context.Context, _ *bench, v vm) ([]float64, error) {
			order = append(order, v.name())
			return values, nil
		}
	}
	all := []group{
		{figures: []figure{{name: "a", scale: 1}, {name: "b", scale: 1}}, measure: measure(1, 2)},
		{figures: []figure{{name: "slow", scale: 1}}, slow: true, measure: measure(3)},
		{figures: []figure{{name: "alone", scale: 1, absolute: true}}, measure: measure(4)},
	}
	for _, tt := range []struct {
		name, only string
		slow       bool
		runs       int
		figures    []string
		order      string
	}{
		{"all but the slow", "", false, 2, []string{"a", "b", "alone"}, "A B A B A A"},
		{"one of a group", "^b$", false, 1, []string{"b"}, "A B"},
		{"few runs of the slow", "slow", true, 9, []string{"slow"}, "A B A B A B"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			order = nil
			b := &bench{ours: fakeVM("A"), qemu: fakeVM("B"), log: io.Discard}
			results, err := b.measure(t.Context(), all, options{runs: tt.runs, slow: tt.slow, only: regexp.MustCompile(tt.only)})
			require.NoError(t, err)
			var names []string
			for i := range results {
				names = append(names, results[i].name)
			}
			require.Equal(t, tt.figures, names)
			require.Equal(t, tt.order, strings.Join(order, " "))
		})
	}
}

func TestOneFailureDoesNotStopTheOthers(t *testing.T) {
	fail := errors.New("out of luck")
	all := []group{
		{figures: []figure{{name: "bad", scale: 1}}, measure: func(context.Context, *bench, vm) ([]float64, error) { return nil, fail }},
		{figures: []figure{{name: "good", scale: 1}}, measure: func(context.Context, *bench, vm) ([]float64, error) { return []float64{1}, nil }},
	}
	var log strings.Builder
	b := &bench{ours: fakeVM("A"), log: &log}
	results, err := b.measure(t.Context(), all, options{runs: 1, only: regexp.MustCompile("")})
	require.ErrorContains(t, err, "1 measurements failed")
	require.Len(t, results, 1)
	require.Equal(t, "good", results[0].name)
	require.Contains(t, log.String(), "out of luck")

	_, err = b.measure(t.Context(), all, options{runs: 1, only: regexp.MustCompile("nothing")})
	require.ErrorContains(t, err, "no figure matches")
}

func TestTable(t *testing.T) {
	var out strings.Builder
	printTable(&out, []result{
		{figure{name: "start", unit: "ms", scale: 1e-3, target: 0.25, what: "w"}, []float64{0.005}, []float64{3.2}, ""},
		{figure{name: "rate", unit: "req/s", scale: 1, target: 1, more: true}, []float64{41234}, nil, ""},
		{peerFigure(figure{name: "colo", unit: "ms", scale: 1, what: "w"}), nil, []float64{44}, ""},
		{peerFigure(figure{name: "move", unit: "ms", scale: 1, what: "w"}), nil, nil, "no QEMU here"},
	})
	lines := strings.Split(out.String(), "\n")
	require.Equal(t, strings.Fields("start 5 3200 ms 0.002 <= 0.25 yes w"), strings.Fields(lines[1]))
	require.Equal(t, strings.Fields("rate 41234 - req/s - >= 1 -"), strings.Fields(lines[2]))
	require.Equal(t, strings.Fields("colo - 44 ms - - - w"), strings.Fields(lines[3]))
	require.Equal(t, strings.Fields("move - - ms - - - not measured, no QEMU here: w"), strings.Fields(lines[4]))
}
