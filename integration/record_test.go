package integration

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/record"
	"github.com/ftvmm/ftvmm/vmm"
)

// recording is a recorded live run.
type recording struct {
	path    string
	end     vmm.Exit
	console string
	machine *vmm.Machine
	stats   vmm.Stats
	bytes   int64
}

// recordRun runs a machine live, recorded, under random kicks.
func recordRun(t testing.TB, cfg vmm.Config, opts record.Options, during func(m *vmm.Machine)) *recording {
	t.Helper()
	rec := &recording{path: filepath.Join(t.TempDir(), "log")}
	term := newTerminal()
	if cfg.Serial == nil {
		cfg.Serial = []vmm.Console{term}
	}
	r := record.NewRecorder(&cfg, opts)
	m, err := vmm.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	f, err := os.Create(rec.path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, r.Begin(m, f, false))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stop := kick(m)
	var wg sync.WaitGroup
	if during != nil {
		wg.Go(func() { during(m) })
	}
	rec.end, err = m.Run(ctx)
	stop()
	wg.Wait()
	require.NoError(t, err)
	require.NoError(t, r.End(rec.end))
	rec.bytes, err = r.Stats()
	require.NoError(t, err)
	require.NoError(t, ctx.Err(), "the guest did not end in time:\n%s", term.String())
	rec.console, rec.machine, rec.stats = term.String(), m, m.Stats()
	return rec
}

// kick stops the machine for nothing at random moments until stop is called.
func kick(m *vmm.Machine) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Duration(rand.IntN(300)) * time.Microsecond):
				_, _ = m.Status(context.Background())
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}

// replay plays a recording in a fresh machine, under random kicks too.
func replay(t testing.TB, path string, opts record.ReplayOptions) (res record.Result, console string, m *vmm.Machine) {
	t.Helper()
	l, err := log.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	var out bytes.Buffer
	opts.Output = func(c int, p []byte) { out.Write(p) }
	r, err := record.NewReplayer(l, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	stop := kick(r.Machine())
	end, err := r.Machine().Run(ctx)
	stop()
	res, err = r.Finish(end, err)
	require.NoError(t, err)
	require.NoError(t, ctx.Err(), "the replay does not end:\n%s", out.String())
	return res, out.String(), r.Machine()
}

// requireReplays plays a recording twice and compares everything.
func requireReplays(t testing.TB, rec *recording) {
	t.Helper()
	var digests [2]string
	for i := range digests {
		res, console, m := replay(t, rec.path, record.ReplayOptions{Verify: true})
		if res.Divergence != nil {
			t.Fatalf("%v", res.Divergence)
		}
		require.Equal(t, rec.end, res.Exit)
		require.Equal(t, rec.end, res.Recorded)
		require.Equal(t, rec.console, console)
		require.Equal(t, rec.stats.Exits, m.Stats().Exits)
		require.Equal(t, rec.stats.Interrupts, m.Stats().Interrupts)
		requireSameMemory(t, rec.machine, m)
		digests[i] = res.Digest
	}
	require.Equal(t, digests[0], digests[1])
	t.Logf("%d exits, %d inputs, %d kicks, %d bytes of log: %.2f an exit, %s", rec.stats.Exits, rec.stats.Inputs, rec.stats.Interrupted,
		rec.bytes, float64(rec.bytes)/float64(rec.stats.Exits), digests[0])
}

// Live runs of all test guests, under random kicks, are the same again when they are replayed.
func TestRecordedGuestsReplay(t *testing.T) {
	for _, c := range []struct{ guest, cmdline string }{
		{"first", ""},
		{"pci", ""},
		{"hello", "a=b"},
		{"storm", "mode=all n=2000 cpl=0"},
		{"storm", "mode=all n=2000 cpl=3"},
		{"compute", "rounds=2 exit_every=1000"},
		{"compute", "rounds=2"},
		{"timers", "ms=20 no=rtc"},
		{"irq", ""},
		{"acpi", ""},
		{"ports", "to=0x7ff"},
	} {
		for _, details := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s %s details=%v", c.guest, c.cmdline, details), func(t *testing.T) {
				rec := recordRun(t, vmm.Config{Memory: 64 << 20, Kernel: guest(t, c.guest), Cmdline: c.cmdline, RNG: true},
					record.Options{Details: details}, nil)
				t.Log(rec.end, rec.console)
				requireReplays(t, rec)
			})
		}
	}
}

// An interrupt into a loop without exits reaches the guest on a host that can name the place, and the
// same place when the run is repeated.
func TestAsynchronousStopsAreRepeated(t *testing.T) {
	kind, err := vmm.ProbeCounter("")
	require.NoError(t, err)
	if kind == vmm.CounterNone {
		t.Skip("this host has no counter for stops between exits")
	}
	for _, cmdline := range []string{"n=40 hz=200", "n=40 hz=100 masked=500", "n=20 hz=500"} {
		t.Run(cmdline, func(t *testing.T) {
			rec := recordRun(t, vmm.Config{Memory: 64 << 20, Kernel: guest(t, "spin"), Cmdline: cmdline}, record.Options{Counter: kind}, nil)
			require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, rec.end, rec.console)
			requireReplays(t, rec)
			_, _, m := replay(t, rec.path, record.ReplayOptions{Verify: true})
			t.Logf("%d landings\n%s", m.Stats().Landings, rec.console)
			require.NotZero(t, m.Stats().Landings)
		})
	}
}
