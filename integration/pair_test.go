package integration

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/guests/ledger"
	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/vmm/event"
)

// ftvmm builds the command, once.
var ftvmm = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "ftvmm-command-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "ftvmm")
	cmd := exec.Command("go", "build", "-o", path, "../tools/ftvmm")
	cmd.Stderr = os.Stderr
	return path, cmd.Run()
})

const twinDisk = 8 << 20

// newTwins makes a pair that runs the ledger.
func newTwins(t *testing.T, o twins.Options) *twins.Twins {
	if os.Geteuid() != 0 && !o.User && !o.NoNIC {
		t.Skip("making a network namespace takes root")
	}
	var err error
	o.Binary, err = ftvmm()
	require.NoError(t, err)
	o.Dir = t.TempDir()
	if o.Guest == "" && !slices.Contains(o.Flags, "--firmware") {
		o.Guest, o.DiskSize, o.Append = "ledgerd", twinDisk, "journal=77"
	}
	o.Flags = append([]string{"--guest-tsc", "unused", "--scrub", "2s"}, o.Flags...)
	p, err := twins.New(o)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, p.Close())
		if t.Failed() {
			for i := range p.Sides {
				t.Logf("side %s: %s", twins.Sides[i], p.Sides[i].Phase())
				for _, e := range p.Sides[i].Events() {
					t.Logf("  %s %s %v", e.Time.Format("05.000000"), e.Kind, e.Attrs)
				}
				b, _ := os.ReadFile(p.Console(i))
				t.Logf("  console: %s", b)
				b, _ = os.ReadFile(filepath.Join(o.Dir, "stderr-"+twins.Sides[i]))
				t.Logf("  stderr: %s", b)
				b, _ = os.ReadFile(p.Log(i))
				for line := range strings.Lines(string(b)) {
					if strings.Contains(line, "msg=exit") || strings.Contains(line, "page differs") {
						t.Logf("  %s", line)
					}
				}
			}
		}
	})
	return p
}

// startTwins starts both sides and waits until they protect each other.
func startTwins(t *testing.T, ctx context.Context, p *twins.Twins) (primary int) {
	for _, s := range p.Sides {
		require.NoError(t, s.Start())
	}
	primary, err := p.Protected(ctx)
	require.NoError(t, err)
	return primary
}

// load is a client that transfers money until it is stopped, and watches for gaps.
type load struct {
	gate    sync.Mutex // held while a transfer is under way
	mu      sync.Mutex
	answers []ledger.Answer
	gap     time.Duration
	client  *ledger.Client
	err     error
	cancel  context.CancelFunc
	done    chan struct{}
}

// startLoad starts a client with an identity.
func startLoad(ctx context.Context, p *twins.Twins, id uint32) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, done: make(chan struct{})}
	l.client = ledger.NewClient(id, func(ctx context.Context) (net.Conn, error) { return p.Dial(ctx, "tcp", 7000) })
	l.client.Timeout = 0 // a connection that breaks is a finding, a late answer is a gap
	go func() {
		defer close(l.done)
		last := time.Now()
		for ctx.Err() == nil {
			l.gate.Lock()
			a, err := l.client.Deposit(ctx, uint16(id), 1)
			l.gate.Unlock()
			if err != nil {
				if ctx.Err() == nil {
					l.err = err
				}
				return
			}
			now := time.Now()
			l.mu.Lock()
			l.answers = append(l.answers, a)
			l.gap = max(l.gap, now.Sub(last))
			l.mu.Unlock()
			last = now
		}
	}()
	return l
}

// took returns the longest gap between two answers since the last call, and how many answers there are.
func (l *load) took() (time.Duration, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	gap := l.gap
	l.gap = 0
	return gap, len(l.answers)
}

// after waits for ten more answers.
func (l *load) after(t *testing.T) (time.Duration, int) {
	_, before := l.took2()
	require.Eventually(t, func() bool { _, n := l.took2(); return n >= before+10 }, patience, time.Millisecond, "the ledger does not answer")
	return l.took()
}

func (l *load) took2() (time.Duration, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.gap, len(l.answers)
}

func (l *load) stop(t *testing.T) []ledger.Answer {
	l.cancel()
	<-l.done
	require.NoError(t, l.err)
	return l.answers
}

// requireCovered checks that a side's disk has every answer.
func requireCovered(t *testing.T, disk string, answers []ledger.Answer) {
	f, err := os.Open(disk)
	require.NoError(t, err)
	defer f.Close()
	j, err := ledger.ReadJournal(f)
	require.NoError(t, err)
	require.NoError(t, j.Covers(answers))
}

// requireEqualDisks compares both sides' disks.
func requireEqualDisks(t *testing.T, p *twins.Twins) {
	a, err := os.ReadFile(p.Disk(0))
	require.NoError(t, err)
	b, err := os.ReadFile(p.Disk(1))
	require.NoError(t, err)
	require.True(t, bytes.Equal(a, b), "the disks of the sides differ")
}

// The host of the live side dies again and again under load; each time the other goes on where it was, the
// clients keep their connections, and the side that died comes back by itself when it is started.
func TestPairSurvivesTheLossOfEitherHost(t *testing.T) {
	const kills = 6
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	p := newTwins(t, twins.Options{})
	primary := startTwins(t, ctx, p)
	clients := []*load{startLoad(ctx, p, 1), startLoad(ctx, p, 2)}
	for k := range kills {
		before := 0
		for _, c := range clients {
			_, n := c.took()
			before += n
		}
		require.Eventually(t, func() bool {
			now := 0
			for _, c := range clients {
				_, n := c.took()
				now += n
			}
			return now > before+100
		}, patience, 5*time.Millisecond, "the ledger does not answer")
		victim := primary
		if k%3 == 2 {
			victim = 1 - primary // the backup, for once
		}
		p.Sides[victim].Kill()
		require.NoError(t, p.Sides[1-victim].Await(ctx, "alone", "syncing", "protected"))
		for i, c := range clients {
			gap, n := c.after(t) // some answers from one side alone
			t.Logf("kill %d of %s: client %d waited %v at the most, %d answers so far", k+1, twins.Sides[victim], i, gap, n)
		}
		require.NoError(t, p.Sides[victim].Start())
		var err error
		primary, err = p.Protected(ctx)
		require.NoError(t, err)
		require.Equal(t, 1-victim, primary)
	}
	var answers []ledger.Answer
	for _, c := range clients {
		answers = append(answers, c.stop(t)...)
		require.Equal(t, 1, c.client.Connects, "the connection broke")
	}
	endTwins(t, ctx, p, primary)
	requireCovered(t, p.Disk(0), answers)
	requireEqualDisks(t, p)
}

// endTwins shuts the guest down by its power button, which ends both sides.
func endTwins(t *testing.T, ctx context.Context, p *twins.Twins, primary int) {
	require.NoError(t, p.Sides[primary].Signal(sigterm))
	for _, s := range p.Sides {
		code, err := s.Wait(ctx)
		require.NoError(t, err)
		require.Zero(t, code)
	}
}

const sigterm = syscall.SIGTERM

// The other ways to follow: by cuts alone, with a clock that cannot be trapped (a cut for each output), and with outputs
// that leave when the backup has the log.
func TestPairInEachMode(t *testing.T) {
	for name, flags := range map[string][]string{
		"checkpoint": {"--engine", "checkpoint"},
		"tainted":    {"--guest-tsc", "auto"},
		"received":   {"--commit", "received"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			p := newTwins(t, twins.Options{Flags: flags})
			primary := startTwins(t, ctx, p)
			c := startLoad(ctx, p, 1)
			for range 2 {
				c.after(t)
				p.Sides[primary].Kill()
				gap, _ := c.after(t)
				t.Logf("gap %v", gap)
				require.NoError(t, p.Sides[primary].Start())
				_, err := p.Protected(ctx)
				require.NoError(t, err)
				primary = 1 - primary
			}
			answers := c.stop(t)
			require.Equal(t, 1, c.client.Connects, "the connection broke")
			for _, s := range p.Sides {
				require.Zero(t, s.Count(event.PairDivergence), "the sides differ")
			}
			endTwins(t, ctx, p, primary)
			requireCovered(t, p.Disk(0), answers)
			requireEqualDisks(t, p)
		})
	}
}
