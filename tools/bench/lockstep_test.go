package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/vmm/event"
)

func TestParseRecording(t *testing.T) {
	const both = `goos: linux
BenchmarkRecording/out/logged-2         	  598754	       271.5 ns/op	      40 B/op	       0 allocs/op
BenchmarkRecording/out/alone-2          	13431556	        10.5 ns/op	       0 B/op	       0 allocs/op
BenchmarkRecording/clock/logged-2       	  391290	       400.0 ns/op	      62 B/op	       1 allocs/op
BenchmarkRecording/clock/alone-2        	 2150012	        55.0 ns/op	       0 B/op	       0 allocs/op
PASS
`
	v, err := parseRecording([]byte(both))
	require.NoError(t, err)
	require.InDeltaSlice(t, []float64{345e-9, 1}, v, 1e-12)

	_, err = parseRecording([]byte("PASS\n"))
	require.ErrorContains(t, err, "no benchmark")
	_, err = parseRecording([]byte(strings.Replace(both, "clock/alone", "other/alone", 1)))
	require.ErrorContains(t, err, "half a benchmark")
}

func TestAcknowledgements(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	old := "time=x level=DEBUG msg=\"cut acknowledged\" us=9\n"
	require.NoError(t, os.WriteFile(path, []byte(old+"time=x level=DEBUG msg=\"cut acknowledged\" us=1500\nmsg=else us=7\nmsg=\"cut acknowledged\" us=250000\n"), 0o600))
	seconds, err := ackTimes(path, int64(len(old)))
	require.NoError(t, err)
	require.InDeltaSlice(t, []float64{0.0015, 0.25}, seconds, 1e-9)
	require.EqualValues(t, 0, sizeOf(path+"-nothing"))
	seconds, err = ackTimes(path, 1<<40)
	require.NoError(t, err)
	require.Empty(t, seconds)
}

func TestGapsOfAClient(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	c := &ledgerClient{times: []time.Time{at(0), at(500), at(501), at(503), at(560), at(561)}}
	for _, tt := range []struct {
		name  string
		after int
		want  time.Duration
	}{
		{"the longest that ends later", 502, 57 * time.Millisecond},
		{"one that had begun", 530, 57 * time.Millisecond},
		{"not one that was over", 560, time.Millisecond},
		{"none", 561, 0},
		{"all", -1, 500 * time.Millisecond},
	} {
		require.Equal(t, tt.want, c.gap(at(tt.after)), tt.name)
	}
}

func TestLastRound(t *testing.T) {
	for console, want := range map[string]float64{
		"": 0, "ok compute": 0,
		"round 100 sum 1\nround 200 sum 2\nround 30": 200, // a line that is not whole is none
	} {
		require.InDelta(t, want, lastRound([]byte(console)), 0, console)
	}
}

func TestFiguresOfOursWithoutTarget(t *testing.T) {
	samples := []float64{1, 2, 3, 4, 100}
	for _, tt := range []struct {
		name string
		f    figure
		want float64
		met  string
	}{
		{"median", alone(figure{scale: 1, target: 3}), 3, "yes"},
		{"greatest", alone(figure{scale: 1, target: 99, quantile: 1}), 100, "no"},
		{"a quantile", alone(figure{scale: 1, target: 4, quantile: 0.8}), 4, "yes"},
		{"shown", shownFigure(figure{scale: 1, target: 3, quantile: 0.8}), 4, "-"},
	} {
		r := result{figure: tt.f, ours: samples}
		v, _, _ := r.value()
		require.InDelta(t, tt.want, v, 0, tt.name)
		require.Equal(t, tt.met, r.verdict(), tt.name)
	}
	d := newDocument(&bench{}, options{}, []result{{figure: shownFigure(figure{name: "s", scale: 1}), ours: samples}})
	require.Nil(t, d.Figures[0].Target)
	require.InDelta(t, 3, *d.Figures[0].Ftvmm, 0)
	require.Equal(t, share("s", "x", 0).shown, !share("s", "x", 80).shown)
}

func TestNumberOfAnEvent(t *testing.T) {
	e := event.Event{Attrs: event.Attrs{"pages": 7.0, "text": "x"}}
	require.InDelta(t, 7, number(e, "pages"), 0)
	require.Zero(t, number(e, "text"))
	require.Zero(t, number(e, "nothing"))
}
