package pair_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/file"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/lockstep/pair"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
)

// patience is how long anything may take on a busy machine.
const patience = 30 * time.Second

// side is one side of a pair in this process.
type side struct {
	t       *testing.T
	pair    *pair.Pair
	machine *vmm.Machine
	console *console
	done    chan struct{}
	end     vmm.Exit
	err     error

	mu     sync.Mutex
	change sync.Cond
	events []happening
}

type happening struct {
	name   string
	fields map[string]any
}

// console keeps what the guest writes.
type console struct {
	mu  sync.Mutex
	out strings.Builder
}

func (c *console) Output(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out.Write(p)
}

func (c *console) Start(func([]byte)) {}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.String()
}

// setting is a pair in one process.
type setting struct {
	guest, cmdline string
	commit         protocol.Commit
	taint          bool
	counter        vmm.CounterKind
	scrub          time.Duration
	verify         bool // each cut
}

// start makes both sides and lets them find each other.
func start(t *testing.T, s setting) [2]*side {
	if _, err := os.Stat(vmm.DefaultKVM); err != nil {
		t.Skipf("no KVM here: %v", err)
	}
	dir := t.TempDir()
	_, err := link.CreatePair(filepath.Join(dir, "keys"), "guest", false)
	require.NoError(t, err)
	image, err := guests.Image(s.guest)
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "arbiter"), 0o700))
	arb, err := file.Open(filepath.Join(dir, "arbiter"))
	require.NoError(t, err)
	// The address is free now, and nobody else wants it.
	l, err := link.Listen(link.Config{Keys: loadKeys(t, dir, "a")}, "127.0.0.1:0")
	require.NoError(t, err)
	address := l.Addrs()[0].String()
	require.NoError(t, l.Close())
	var sides [2]*side
	for i, name := range []string{"a", "b"} {
		x := &side{t: t, console: &console{}, done: make(chan struct{})}
		x.change.L = &x.mu
		cfg := vmm.Config{
			Name: "guest", Memory: 32 << 20, Kernel: image, Cmdline: s.cmdline, Serial: []vmm.Console{x.console},
			Epoch: time.Unix(1e9, 0), Counter: s.counter,
		}
		log := slog.New(slog.DiscardHandler)
		if os.Getenv("FTVMM_TEST_PAIR_LOG") != "" {
			log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("side", name)
		}
		o := pair.Options{
			Keys: loadKeys(t, dir, name), Arbiter: arb, Commit: s.commit, Taint: s.taint, ScrubPeriod: s.scrub, VerifyCuts: s.verify,
			Event: x.happened, Log: log, StaleMark: filepath.Join(dir, "stale-"+name),
		}
		if i == 0 {
			o.Listen = []string{address}
		} else {
			o.Peer = []string{address}
		}
		x.pair, err = pair.New(&cfg, o)
		require.NoError(t, err)
		x.machine, err = vmm.New(cfg)
		require.NoError(t, err)
		require.NoError(t, x.pair.Start(x.machine))
		go func() {
			defer close(x.done)
			x.end, x.err = x.machine.Run(context.Background())
		}()
		t.Cleanup(func() { x.close() })
		sides[i] = x
	}
	return sides
}

func loadKeys(t *testing.T, dir, name string) *link.Keys {
	k, err := link.LoadKeys(filepath.Join(dir, "keys", name))
	require.NoError(t, err)
	return k
}

func (x *side) happened(name string, fields map[string]any) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.events = append(x.events, happening{name, fields})
	x.change.Broadcast()
}

// close ends a side as the loss of its host would, as far as the other side can tell.
func (x *side) close() {
	select {
	case <-x.done:
	default:
		x.machine.Quit()
		<-x.done
	}
	if x.pair != nil {
		if err := x.pair.Close(); err != nil && !x.t.Failed() {
			x.t.Errorf("close: %v", err)
		}
		x.pair = nil
		require.NoError(x.t, x.machine.Close())
	}
}

// count returns how many events of a name there are.
func (x *side) count(name string) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.countLocked(name)
}

func (x *side) countLocked(name string) (n int) {
	for _, e := range x.events {
		if e.name == name {
			n++
		}
	}
	return n
}

// await waits until the events show something.
func (x *side) await(what string, ready func() bool) {
	x.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	defer context.AfterFunc(ctx, x.change.Broadcast)()
	x.mu.Lock()
	defer x.mu.Unlock()
	for !ready() {
		if ctx.Err() != nil {
			var all strings.Builder
			for _, e := range x.events {
				fmt.Fprintf(&all, "  %s %v\n", e.name, e.fields)
			}
			x.t.Fatalf("no %s; events:\n%s", what, all.String())
		}
		x.change.Wait()
	}
}

// phase waits until a side is in a phase.
func (x *side) phase(want string) {
	x.t.Helper()
	x.await("phase "+want, func() bool {
		for i := len(x.events) - 1; i >= 0; i-- {
			if x.events[i].name == "pair-phase" {
				return strings.HasSuffix(fmt.Sprint(x.events[i].fields["text"]), "-> "+want)
			}
		}
		return false
	})
}

// protected waits until both are what they should be.
func protected(sides [2]*side) {
	sides[0].phase("protected")
	sides[1].phase("backup")
}

// A guest that computes for ever, with an exit now and then and a timer, and that writes much.
const endless = "size=2m rounds=1000000000 exit_every=20000 hz=100 report=50"

// A fault in the backup's guest is found: at once where it shows in what the guest does, by the scrub where it does not.
// The backup is made equal again, and the guest of the other side never notices.
func TestFaultsAreFoundAndRepaired(t *testing.T) {
	for _, f := range []pair.Fault{pair.FaultMemory, pair.FaultRegister, pair.FaultClock} {
		t.Run(string(f), func(t *testing.T) {
			sides := start(t, setting{guest: "compute", cmdline: endless, scrub: time.Second})
			protected(sides)
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			for n := 1; n <= 1; n++ {
				// A cut may come first, which repairs it unseen.
				require.Eventually(t, func() bool {
					require.NoError(t, sides[1].pair.Inject(ctx, f))
					for i := 0; i < 30 && sides[1].count("divergence-found") < n; i++ {
						time.Sleep(50 * time.Millisecond)
					}
					return sides[1].count("divergence-found") >= n
				}, patience, time.Millisecond, "no divergence")
				// The cut that repairs it compares all.
				sides[0].await("repair", func() bool {
					full := 0
					for _, e := range sides[0].events {
						if e.name == "cut" && e.fields["full"] == true {
							full++
						}
					}
					return full >= n+1 // and that of the join
				})
				// The guest goes on, on both sides.
				before := len(sides[0].console.String())
				sides[0].await("progress", func() bool { return len(sides[0].console.String()) > before || !wait(&sides[0].mu) })
			}
			sides[0].close()
			sides[1].phase("alone")
			before := len(sides[1].console.String())
			sides[1].await("progress", func() bool { return len(sides[1].console.String()) > before || !wait(&sides[1].mu) })
			require.NotContains(t, sides[0].console.String()+sides[1].console.String(), "BAD")
		})
	}
}

// wait lets a little time pass for what no event tells.
func wait(mu *sync.Mutex) bool {
	mu.Unlock()
	time.Sleep(5 * time.Millisecond)
	mu.Lock()
	return true
}

// A guest's output and end are those of an unprotected run, whatever host they come from, also when the
// sides change places all the time.
func TestOutputIsWholeAcrossSwitchOvers(t *testing.T) {
	const cmdline = "size=256k rounds=4000 exit_every=5000 hz=100 report=200"
	for name, s := range map[string]setting{
		"lockstep":   {},
		"counter":    {counter: vmm.CounterEmulated},
		"checkpoint": {commit: protocol.Checkpointed},
		"tainted":    {taint: true},
	} {
		t.Run(name, func(t *testing.T) {
			// To verify each cut is too slow where there is one for each output or interval.
			s.guest, s.cmdline, s.scrub, s.verify = "compute", cmdline, time.Second, s.commit != protocol.Checkpointed && !s.taint
			sides := start(t, s)
			protected(sides)
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			live, switches := 0, 0
			for switches < 4 {
				if err := sides[live].pair.SwitchOver(ctx); err != nil {
					require.ErrorIs(t, err, pair.ErrNotNow)
					select {
					case <-sides[live].done:
						t.Fatal("the guest has ended too early")
					case <-time.After(5 * time.Millisecond):
					}
					continue
				}
				sides[1-live].phase("protected")
				sides[live].phase("backup")
				live, switches = 1-live, switches+1
			}
			for _, x := range sides {
				select {
				case <-x.done:
				case <-ctx.Done():
					for i, x := range sides {
						x.mu.Lock()
						for _, e := range x.events {
							if e.name != "cut" && e.name != "pair-cut" {
								t.Logf("%d %s %v", i, e.name, e.fields)
							}
						}
						x.mu.Unlock()
						s, err := x.pair.Status(context.Background())
						t.Logf("%d %+v %v", i, s, err)
					}
					t.Fatal("a side does not end")
				}
				require.NoError(t, x.err)
				require.Equal(t, vmm.ExitDebugExit, x.end.Reason, "%+v", x.end)
				require.Zero(t, x.end.Code)
				require.Zero(t, x.count("pair-divergence"))
			}
			// Each line once, from one side or the other, in order on each.
			got := sides[0].console.String() + sides[1].console.String()
			want := unprotected(t, s)
			for line := range strings.Lines(want) {
				require.Equal(t, strings.Count(want, line), strings.Count(got, line), "%q", line)
			}
			require.Len(t, got, len(want))
		})
	}
}

// unprotected returns what the guest writes when it runs alone.
func unprotected(t *testing.T, s setting) string {
	image, err := guests.Image(s.guest)
	require.NoError(t, err)
	c := &console{}
	m, err := vmm.New(vmm.Config{
		Name: "guest", Memory: 32 << 20, Kernel: image, Cmdline: s.cmdline, Serial: []vmm.Console{c}, Epoch: time.Unix(1e9, 0),
	})
	require.NoError(t, err)
	defer m.Close()
	end, err := m.Run(context.Background())
	require.NoError(t, err)
	require.Equal(t, vmm.ExitDebugExit, end.Reason)
	return c.String()
}
