package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/tools/bench/plot"
)

// fakeMonitor answers each command with the next of answers, each a few lines.
func fakeMonitor(t *testing.T, answers ...string) *qmp {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	q := &qmp{conn: ours}
	q.in = json.NewDecoder(ours)
	go func() {
		in := json.NewDecoder(theirs)
		for _, a := range answers {
			var request struct{ Execute string }
			if in.Decode(&request) != nil {
				return
			}
			if _, err := fmt.Fprintln(theirs, a); err != nil {
				return
			}
		}
		_, _ = io.Copy(io.Discard, theirs)
	}()
	return q
}

func TestQMP(t *testing.T) {
	const event = `{"timestamp": {"seconds": 10, "microseconds": 250}, "event": "STOP"}`
	q := fakeMonitor(t,
		event+"\n"+`{"return": {"status": "colo", "downtime": 5}}`,
		`{"return": {}}`,
		`{"error": {"class": "GenericError", "desc": "out of luck"}}`+"\n"+`{"timestamp": {"seconds": 11, "microseconds": 0}, "event": "RESUME"}`,
	)
	var m migration
	require.NoError(t, q.execute(t.Context(), "query-migrate", nil, &m))
	require.Equal(t, migration{Status: "colo", Downtime: 5}, m)
	require.Equal(t, []qmpEvent{{"STOP", time.Unix(10, 250_000)}}, q.events)
	require.NoError(t, q.execute(t.Context(), "stop", map[string]any{"now": true}, nil))
	require.EqualError(t, q.execute(t.Context(), "cont", nil, nil), "QMP cont: out of luck (GenericError)")

	at, err := q.wait(t.Context(), "RESUME", time.Unix(10, 0))
	require.NoError(t, err)
	require.Equal(t, time.Unix(11, 0), at)

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = q.wait(ctx, "STOP", time.Unix(12, 0))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "one that was before does not count")
	require.ErrorContains(t, err, "wait for STOP")
}

func TestQMPGreeting(t *testing.T) {
	for _, tt := range []struct{ greeting, want string }{
		{`{"QMP": {"version": {}, "capabilities": []}}` + "\n" + `{"return": {}}`, ""},
		{`{"return": {}}`, "no greeting"},
		{"hello", "invalid character"},
	} {
		path := filepath.Join(t.TempDir(), "q")
		l, err := listenQMP(path)
		require.NoError(t, err)
		defer l.Close()
		go func() {
			c, err := net.Dial("unix", path)
			if err != nil {
				return
			}
			defer c.Close()
			fmt.Fprintln(c, tt.greeting)
			_, _ = bufio.NewReader(c).ReadString('}')
		}()
		q, err := acceptQMP(t.Context(), l)
		if tt.want != "" {
			require.ErrorContains(t, err, tt.want)
			continue
		}
		require.NoError(t, err)
		q.conn.Close()
	}
}

func TestMonitorThatDoesNotOpen(t *testing.T) {
	l, err := listenQMP(filepath.Join(t.TempDir(), "q"))
	require.NoError(t, err)
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = acceptQMP(ctx, l)
	require.ErrorContains(t, err, "does not open its monitor")
}

// newMember returns a member whose guest has reported at these times.
func newMember(at ...time.Time) *member {
	m := &member{machine: &machine{ended: make(chan struct{})}}
	m.changed.L = &m.mu
	for i, t := range at {
		m.out, m.stamps = append(m.out, '.'), append(m.stamps, stamp{i + 1, t})
	}
	return m
}

func TestWaitingForReports(t *testing.T) {
	m := newMember(time.Unix(1, 0), time.Unix(2, 0))
	require.NoError(t, m.reports(t.Context(), 2, time.Hour))
	require.ErrorIs(t, m.reports(t.Context(), 3, time.Millisecond), context.DeadlineExceeded)

	at, err := m.firstSince(t.Context(), time.Unix(1, 1))
	require.NoError(t, err)
	require.Equal(t, time.Unix(2, 0), at)

	m.eof = true
	require.EqualError(t, m.reports(t.Context(), 3, time.Hour), "QEMU ended after 2 reports of the guest")
	_, err = m.firstSince(t.Context(), time.Unix(3, 0))
	require.ErrorContains(t, err, "QEMU ended")
}

func TestMigrationThatFails(t *testing.T) {
	for _, tt := range []struct{ state, want string }{
		{`{"status": "failed", "error-desc": "no route"}`, "the migration is failed: no route"},
		{`{"status": "completed"}`, "the migration is completed"},
	} {
		m, to := newMember(), newMember()
		to.monitor = fakeMonitor(t, `{"return": {}}`, `{"return": {"socket-address": [{"host": "127.0.0.1", "port": "7"}]}}`)
		m.monitor = fakeMonitor(t, `{"return": {}}`, `{"return": {"status": "active"}}`, `{"return": `+tt.state+`}`)
		_, err := m.migrateTo(t.Context(), to, overTCP, "colo")
		require.ErrorContains(t, err, tt.want)
	}
}

func TestWhatIsMeasured(t *testing.T) {
	quick, slow, lockstep := group{}, group{slow: true}, group{lockstep: true}
	for _, tt := range []struct {
		only           string
		slow, lockstep bool
		want           string
	}{
		{"", false, false, "quick"},
		{"", true, false, "quick slow"},
		{"", false, true, "quick lockstep"},
		{"^figure$", false, false, "quick slow lockstep"},
		{"other", true, true, ""},
	} {
		var got []string
		for _, g := range []struct {
			name string
			group
		}{{"quick", quick}, {"slow", slow}, {"lockstep", lockstep}} {
			if g.selected(&figure{name: "figure"}, options{only: regexp.MustCompile(tt.only), slow: tt.slow, lockstep: tt.lockstep}) {
				got = append(got, g.name)
			}
		}
		require.Equal(t, tt.want, strings.Join(got, " "), "%+v", tt)
	}
}

func TestPeersAreMeasuredAlone(t *testing.T) {
	var ran []string
	all := []group{{
		figures:  []figure{peerFigure(figure{name: "a", unit: "ms", scale: perMilli, plot: "pauses", series: "A"}), peerFigure(figure{name: "b", scale: 1, plot: "pauses", series: "A"})},
		lockstep: true,
		spread: func(_ context.Context, _ *bench, v vm) ([][]float64, error) {
			ran = append(ran, v.name())
			return [][]float64{{0.001, 0.002, 0.004}, {7}}, nil
		},
	}}
	b := &bench{ours: fakeVM("A"), qemu: fakeVM("B"), log: io.Discard}
	o := options{runs: 9, lockstep: true, only: regexp.MustCompile("")}
	results, err := b.measure(t.Context(), all, o)
	require.NoError(t, err)
	require.Equal(t, "B B B", strings.Join(ran, " "))
	require.Equal(t, []float64{1, 2, 4, 1, 2, 4, 1, 2, 4}, scaled(results[0].qemu, perMilli))
	require.Equal(t, []float64{7, 7, 7}, results[1].qemu)
	require.Empty(t, results[0].ours)
	require.Equal(t, "-", results[0].verdict())

	d := newDocument(b, o, results).Figures[0]
	require.True(t, d.Peer)
	require.Nil(t, d.Target)
	require.Nil(t, d.Ftvmm)
	require.InDelta(t, 2, d.QEMU, 1e-9)

	dir := filepath.Join(t.TempDir(), "new")
	require.NoError(t, drawPlots(dir, results))
	svg, err := os.ReadFile(filepath.Join(dir, "pauses.svg"))
	require.NoError(t, err)
	require.Contains(t, string(svg), ">QEMU A<")
	require.Contains(t, string(svg), ">12<", "two figures make one series")
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1, "no picture without samples")

	b.qemu, ran = nil, nil
	results, err = b.measure(t.Context(), all, o)
	require.NoError(t, err)
	require.Empty(t, ran)
	require.Equal(t, "no QEMU here", results[1].missing)
}

func TestFiguresAreWellFormed(t *testing.T) {
	names, titles, units := map[string]bool{}, map[string]bool{}, map[string]string{}
	series := map[string]map[string]bool{}
	for _, p := range plots {
		titles[p.name] = true
	}
	for _, g := range groups {
		for _, f := range g.figures {
			require.False(t, names[f.name], "two figures are called %s", f.name)
			names[f.name] = true
			require.NotZero(t, f.scale, f.name)
			require.Equal(t, g.figures[0].peer, f.peer, "%s: a group is run by the same programs", f.name)
			if f.plot == "" {
				continue
			}
			require.True(t, titles[f.plot], "%s: there is no picture %q", f.name, f.plot)
			require.Contains(t, []string{"", f.unit}, units[f.plot], "%s: a picture has one unit", f.name)
			units[f.plot] = f.unit
			if series[f.plot] == nil {
				series[f.plot] = map[string]bool{}
			}
			series[f.plot][f.series] = true
			require.LessOrEqual(t, len(series[f.plot]), plot.MaxSeries, f.plot)
		}
	}
}
