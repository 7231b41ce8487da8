package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/record"
	"github.com/ftvmm/ftvmm/mirror/disk"
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
func recordRun(t testing.TB, cfg vmm.Config, opts record.Options, during func(m *vmm.Machine, console *terminal)) *recording {
	t.Helper()
	rec := &recording{path: filepath.Join(t.TempDir(), "log")}
	term := newTerminal()
	cfg.Serial = []vmm.Console{term}
	r := record.NewRecorder(&cfg, opts)
	m, err := vmm.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	f, err := os.Create(rec.path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, r.Begin(m, f, false))
	ctx, cancel := context.WithTimeout(context.Background(), emulatedLimit)
	defer cancel()
	stop := kick(m)
	var wg sync.WaitGroup
	if during != nil {
		wg.Go(func() { during(m, term) })
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
	ctx, cancel := context.WithTimeout(context.Background(), emulatedLimit)
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
		if rec.end.Reason != vmm.ExitQuit { // which came anywhere, after the last exit
			require.Equal(t, rec.stats.Exits, m.Stats().Exits)
			require.Equal(t, rec.stats.Interrupts, m.Stats().Interrupts)
			requireSameMemory(t, rec.machine, m)
		}
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

// A disk's data is in the recording: the replay has no disk.
func TestRecordedDiskReplays(t *testing.T) {
	d, err := disk.Open(filepath.Join(t.TempDir(), "image"), disk.Options{Create: 8 << 20})
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	rec := recordRun(t, vmm.Config{
		Memory: 64 << 20, Kernel: guest(t, "blk"), Cmdline: "mode=verify n=300", Disks: []vmm.Disk{{Backend: d}},
	}, record.Options{}, nil)
	require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, rec.end, rec.console)
	requireReplays(t, rec)
}

// The network's frames are in it, too, and the power button.
func TestRecordedNetworkReplays(t *testing.T) {
	card, dial := onUserNetwork(t, "tcp:7")
	kind, err := vmm.ProbeCounter("")
	require.NoError(t, err)
	rec := recordRun(t, vmm.Config{
		Memory: 64 << 20, Kernel: guest(t, "net"), Cmdline: "ip=10.0.2.15/24 gw=10.0.2.2", NICs: []vmm.NIC{card},
	}, record.Options{Counter: kind}, func(m *vmm.Machine, _ *terminal) {
		defer func() {
			if err := m.PowerButton(); err != nil {
				t.Error(err)
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := echoes(ctx, dial); err != nil {
			t.Error(err)
		}
	})
	require.Equal(t, vmm.ExitPowerOff, rec.end.Reason, rec.console)
	requireReplays(t, rec)
}

// echoes sends text to the guest's echo service and wants it back, many times over. The forward accepts
// connections before the guest is up, so the first ones may come to nothing.
func echoes(ctx context.Context, dial dialFunc) error {
	for {
		err := func() error {
			c, err := dial(ctx, "tcp", portEcho)
			if err != nil {
				return err
			}
			defer c.Close()
			for i := range 50 {
				want := bytes.Repeat([]byte{byte(i)}, 1+37*i)
				if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
					return err
				}
				if _, err := c.Write(want); err != nil {
					return err
				}
				got := make([]byte, len(want))
				if _, err := io.ReadFull(c, got); err != nil {
					return err
				}
				if !bytes.Equal(got, want) {
					return errors.New("the echo is another text")
				}
			}
			return nil
		}()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// A reset from outside is an input like others.
func TestRecordedResetReplays(t *testing.T) {
	rec := recordRun(t, vmm.Config{Memory: 64 << 20, Kernel: guest(t, "storm"), Cmdline: "mode=pio n=3000"}, record.Options{},
		func(m *vmm.Machine, console *terminal) {
			console.waitFor(t, 0, "# storm", patience)
			if err := m.Reset(context.Background()); err != nil {
				t.Error(err)
			}
		})
	require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, rec.end, rec.console)
	require.EqualValues(t, 1, rec.stats.Resets)
	requireReplays(t, rec)
}

// A recording that begins with a saved machine replays from there.
func TestRecordingOfARestoredMachine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "saved")
	cfg := func() vmm.Config {
		return vmm.Config{Memory: 64 << 20, Kernel: guest(t, "storm"), Cmdline: "mode=all n=1000", Epoch: time.Unix(1_700_000_000, 0)}
	}
	first := start(t, cfg())
	first.console.waitFor(t, 0, "# storm mmio", patience)
	require.NoError(t, first.Pause(context.Background()))
	require.NoError(t, first.Save(context.Background(), path))

	c, term := cfg(), newTerminal()
	c.Serial = []vmm.Console{term}
	r := record.NewRecorder(&c, record.Options{})
	m, err := vmm.New(c)
	require.NoError(t, err)
	defer m.Close()
	require.NoError(t, m.Restore(path))
	logPath := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(logPath)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, r.Begin(m, f, true))
	rec := &recording{path: logPath, machine: m, end: run(t, m, patience)}
	require.NoError(t, r.End(rec.end))
	require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, rec.end, term.String())
	rec.console, rec.stats = term.String(), m.Stats()
	requireReplays(t, rec)
}

// rewrite copies a recording and changes entries on the way.
func rewrite(t testing.TB, path string, change func(e *log.Entry)) string {
	t.Helper()
	l, err := log.Open(path)
	require.NoError(t, err)
	defer l.Close()
	to := filepath.Join(t.TempDir(), "changed")
	f, err := os.Create(to)
	require.NoError(t, err)
	defer f.Close()
	w, err := log.NewWriter(f, l.Setup, l.Blobs, nil)
	require.NoError(t, err)
	enc := log.NewEncoder(l.Setup.Start)
	for {
		var e log.Entry
		err := l.Next(&e)
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		change(&e)
		w.Append(func(b []byte) []byte { return enc.Entry(b, &e) })
	}
	require.NoError(t, w.Close())
	return to
}

// A recording that was changed, with all checksums right, makes the guest do something else. The replay says
// where, and what both sides did.
func TestDivergenceIsReported(t *testing.T) {
	d, err := disk.Open(filepath.Join(t.TempDir(), "image"), disk.Options{Create: 8 << 20})
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	for _, details := range []bool{true, false} {
		clocks := recordRun(t, vmm.Config{Memory: 64 << 20, Kernel: guest(t, "timers"), Cmdline: "ms=10 no=rtc"}, record.Options{Details: details}, nil)
		blocks := recordRun(t, vmm.Config{
			Memory: 64 << 20, Kernel: guest(t, "blk"), Cmdline: "mode=verify n=100", Disks: []vmm.Disk{{Backend: d}},
		}, record.Options{Details: details}, nil)
		for _, c := range []struct {
			name   string
			rec    *recording
			change func(e *log.Entry) bool
			exact  bool // with details the exit itself shows the difference
		}{
			{"clock", clocks, func(e *log.Entry) bool {
				if e.Kind != log.Sample {
					return false
				}
				e.Time += int64(time.Millisecond)
				return true
			}, true},
			{"timer", clocks, func(e *log.Entry) bool {
				if e.Kind != log.Input || e.Input.Kind != vmm.InputTime {
					return false
				}
				e.Input.Time += int64(time.Second)
				return true
			}, false},
			{"disk data", blocks, func(e *log.Entry) bool {
				if e.Kind != log.Input || e.Input.Kind != vmm.InputDisk || len(e.Input.Data) == 0 {
					return false
				}
				e.Input.Data[len(e.Input.Data)/2] ^= 1
				return true
			}, false},
			{"disk status", blocks, func(e *log.Entry) bool {
				if e.Kind != log.Input || e.Input.Kind != vmm.InputDisk || len(e.Input.Data) != 0 {
					return false
				}
				e.Input.Status = 1
				return true
			}, false},
		} {
			t.Run(fmt.Sprintf("%s details=%v", c.name, details), func(t *testing.T) {
				var at *vmm.Position
				n := 0
				path := rewrite(t, c.rec.path, func(e *log.Entry) {
					if at != nil {
						return
					}
					was := *e
					if !c.change(e) {
						return
					}
					if n++; c.name == "clock" && n < 100 { // the first ones program timers
						*e = was
						return
					}
					pos := e.Pos
					at = &pos
				})
				require.NotNil(t, at)
				res, _, _ := replay(t, path, record.ReplayOptions{Verify: true})
				require.NotNil(t, res.Divergence)
				t.Logf("changed at %v\n%v", at, res.Divergence)
				require.GreaterOrEqual(t, res.Divergence.Position.Exit, at.Exit)
				if c.name != "timer" { // whose effect may be late
					require.LessOrEqual(t, res.Divergence.Position.Exit, at.Exit+6)
				}
				if c.exact && details {
					require.Equal(t, at.Exit, res.Divergence.Position.Exit)
					require.Contains(t, res.Divergence.Recorded, "IN addr")
					require.Contains(t, res.Divergence.Replayed, "IN addr")
				}
			})
		}
	}
}

// What a crash of the recording program leaves replays as far as it goes; what was altered is refused.
func TestDamagedRecordings(t *testing.T) {
	rec := recordRun(t, vmm.Config{Memory: 64 << 20, Kernel: guest(t, "storm"), Cmdline: "mode=all n=300"}, record.Options{}, nil)
	whole, err := os.ReadFile(rec.path)
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "damaged")
	began := 0
	for i := range 12 {
		n := len(whole) * (i + 1) / 13
		if i > 6 {
			n = len(whole) - 1 - 40*(i-7)
		}
		require.NoError(t, os.WriteFile(path, whole[:n], 0o600))
		l, err := log.Open(path)
		if err != nil {
			require.ErrorIs(t, err, log.ErrNotLog, "the setup itself is cut short")
			continue
		}
		require.True(t, l.Truncated)
		require.NoError(t, l.Close())
		res, console, _ := replay(t, path, record.ReplayOptions{Verify: true})
		require.Nil(t, res.Divergence)
		require.Equal(t, vmm.ExitQuit, res.Exit.Reason)
		require.True(t, strings.HasPrefix(rec.console, console))
		began++
	}
	require.NotZero(t, began)
	for i := range 50 {
		at := len(whole) * i / 50
		b := bytes.Clone(whole)
		b[at] ^= 0x10
		require.NoError(t, os.WriteFile(path, b, 0o600))
		l, err := log.Open(path)
		if err == nil { // a length that reaches beyond the end looks like a file cut short
			require.True(t, l.Truncated)
			require.NoError(t, l.Close())
			continue
		}
		require.ErrorIs(t, err, log.ErrNotLog)
	}
}

// A replay stops where it is told, at a state that is the same each time.
func TestReplayUntil(t *testing.T) {
	rec := recordRun(t, vmm.Config{Memory: 64 << 20, Kernel: guest(t, "timers"), Cmdline: "ms=10 no=rtc"}, record.Options{}, nil)
	for _, at := range []uint64{1, 2, rec.stats.Exits / 3, rec.stats.Exits / 2, rec.stats.Exits - 1} {
		var states [2]*vmm.State
		var machines [2]*vmm.Machine
		for i := range states {
			res, _, m := replay(t, rec.path, record.ReplayOptions{Verify: i == 0, Until: &vmm.Position{Exit: at}})
			require.Nil(t, res.Divergence)
			require.GreaterOrEqual(t, res.Position.Exit, at)
			var err error
			states[i], err = m.State()
			require.NoError(t, err)
			machines[i] = m
		}
		states[1].CPU.Regs.RFLAGS = states[1].CPU.Regs.RFLAGS&^(1<<16) | states[0].CPU.Regs.RFLAGS&(1<<16)
		require.Equal(t, states[0], states[1])
		requireSameMemory(t, machines[0], machines[1])
	}
}

// Firmware that nobody here wrote does the same again, kernel-mode code with asynchronous stops.
func TestRecordedSeaBIOSReplays(t *testing.T) {
	if !slow {
		t.Skip("firmware recorded and played twice takes half a minute and more: ./build.sh test-slow")
	}
	kind, err := vmm.ProbeCounter("")
	require.NoError(t, err)
	rec := recordRun(t, vmm.Config{Memory: thirdPartyMemory, Firmware: thirdParty(t, seabiosImage, "seabios"), RNG: true},
		record.Options{Counter: kind}, func(m *vmm.Machine, console *terminal) {
			console.waitFor(t, 0, "No bootable device.", emulatedLimit)
			m.Quit()
		})
	require.Equal(t, vmm.ExitQuit, rec.end.Reason, rec.console)
	requireReplays(t, rec)
}
