package integration

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/vmm/event"
)

// trial is a pair under load to which something happens. At its end it checks what must hold whatever has happened.
type trial struct {
	*testing.T
	*twins.Twins
	ctx      context.Context
	primary  int
	clients  []*load
	watch    *twins.Watch
	restarts bool // the guest may have been started from its disk, which breaks its connections
}

// newTrial starts a pair that runs the ledger, and clients.
func newTrial(t *testing.T, o twins.Options, clients int) *trial {
	limit := 2 * patience
	if slow {
		limit = 10 * patience
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return begin(t, ctx, newTwins(t, o), clients)
}

// begin starts the pair p, and clients.
func begin(t *testing.T, ctx context.Context, p *twins.Twins, clients int) *trial {
	x := &trial{T: t, Twins: p, ctx: ctx}
	var err error
	x.watch, err = p.Watch()
	require.NoError(t, err)
	x.primary = startTwins(t, x.ctx, x.Twins)
	for i := range clients {
		x.clients = append(x.clients, startLoad(x.ctx, x.Twins, uint32(i+1)))
	}
	x.more(20)
	return x
}

func (x *trial) backup() int { return 1 - x.primary }

// answers returns how many answers the clients have.
func (x *trial) answers() (n int) {
	for _, c := range x.clients {
		_, k := c.took2()
		n += k
	}
	return n
}

// more waits for n more answers, if there are clients.
func (x *trial) more(n int) {
	x.Helper()
	if len(x.clients) == 0 {
		return
	}
	before := x.answers()
	x.eventually(func() bool { return x.answers() >= before+n }, "the ledger does not answer")
}

// eventually waits for a condition, and ends the test with what the sides are doing if it does not come.
func (x *trial) eventually(ready func() bool, format string, args ...any) {
	x.Helper()
	for !ready() {
		if x.ctx.Err() != nil {
			x.Fatalf("%s: a is %q, b is %q", fmt.Sprintf(format, args...), x.Sides[0].Phase(), x.Sides[1].Phase())
		}
		time.Sleep(time.Millisecond)
	}
}

// await waits until a side is in one of these phases.
func (x *trial) await(side int, phases ...string) {
	x.Helper()
	require.NoError(x, x.Sides[side].Await(x.ctx, phases...))
}

// alone waits until a side goes on without the other.
func (x *trial) alone(side int) {
	x.Helper()
	x.await(side, "alone", "syncing", "protected")
}

// whole waits until the sides protect each other again, and have equal disks.
func (x *trial) whole() {
	x.Helper()
	var err error
	x.primary, err = x.Protected(x.ctx)
	require.NoError(x, err)
	if len(x.clients) == 0 {
		return // the guest has no disk, or nobody knows when it rests
	}
	x.more(20)
	for _, c := range x.clients {
		c.gate.Lock()
	}
	x.eventually(x.same, "the sides' disks stay different")
	for _, c := range x.clients {
		c.gate.Unlock()
	}
}

// same says whether the sides' disks are equal.
func (x *trial) same() bool {
	a, err := os.ReadFile(x.Disk(0))
	require.NoError(x, err)
	b, err := os.ReadFile(x.Disk(1))
	require.NoError(x, err)
	return bytes.Equal(a, b)
}

func (x *trial) signal(side int, s syscall.Signal) {
	x.Helper()
	require.NoError(x, x.Sides[side].Signal(s))
}

func (x *trial) start(side int) {
	x.Helper()
	require.NoError(x, x.Sides[side].Start())
}

// gaps logs how long the clients have waited since the last call.
func (x *trial) gaps(format string, args ...any) {
	var worst time.Duration
	for _, c := range x.clients {
		gap, _ := c.took()
		worst = max(worst, gap)
	}
	x.Logf("%s: a gap of %v, %d answers so far", fmt.Sprintf(format, args...), worst.Round(time.Millisecond), x.answers())
}

// end ends the pair, which is whole, and checks what must hold.
func (x *trial) end() {
	x.Helper()
	x.whole()
	for _, c := range x.clients {
		answers := c.stop(x.T)
		if !x.restarts {
			require.Equal(x, 1, c.client.Connects, "the connection broke")
		}
		defer func() {
			requireCovered(x.T, x.Disk(0), answers)
		}()
	}
	endTwins(x.T, x.ctx, x.Twins, x.primary)
	requireEqualDisks(x.T, x.Twins)
	sent, conflicts := x.watch.Close()
	require.Empty(x, conflicts, "what the guest sent was not the same from both sides")
	if len(x.clients) > 0 {
		require.Positive(x, sent)
	}
	x.quiet()
	x.single()
}

// quiet requires that nothing was found that only a defect explains.
func (x *trial) quiet() {
	for i, s := range x.Sides {
		for _, life := range s.Lives() {
			for _, e := range life.Events {
				switch e.Kind {
				case event.PairDivergence, event.PairDifference, event.PairFailed, event.PairProtocol, event.PairMismatch, event.PairForced, event.DiskError, event.Crashed:
					x.Errorf("side %s: %s %v", twins.Sides[i], e.Kind, e.Attrs)
				}
			}
		}
	}
}

// reign is a time in which a side was live.
type reign struct {
	side        int
	from, until time.Time
	open        bool // outputs left on its word alone
	deposed     bool // it ended with a bid that was not won, or with a death
}

// reigns returns when a side was live, as its events tell.
func (x *trial) reigns(side int) (list []reign) {
	for _, life := range x.Sides[side].Lives() {
		now := ""
		var since time.Time
		var after []string // the phases behind the reign that is last in list
		close := func(at time.Time, next string) {
			switch now {
			case "alone", "syncing", "protected", "switching":
				list = append(list, reign{side, since, at, now == "alone", next == ""})
				after = nil
			}
		}
		for _, e := range life.Events {
			if e.Kind != event.PairPhase {
				continue
			}
			text, _ := e.Attrs["text"].(string)
			_, next, _ := strings.Cut(text, " -> ")
			close(e.Time, next)
			now, since = next, e.Time
			if after = append(after, next); len(list) > 0 && len(after) == 2 && after[0] == "bidding" && after[1] == "waiting" {
				list[len(list)-1].deposed = true
			}
		}
		ended := life.Ended
		if ended.IsZero() {
			ended = time.Now()
		}
		if n := len(list); n > 0 && len(after) == 1 && after[0] == "bidding" {
			list[n-1].deposed = true // it died before it was told
		}
		close(ended, "")
	}
	return list
}

// single requires that there were never two live sides. A primary that hears nothing may believe that it is one, and lets
// nothing out, until it asks the arbiter and is told otherwise.
func (x *trial) single() {
	for _, a := range x.reigns(0) {
		for _, b := range x.reigns(1) {
			if !a.from.Before(b.until) || !b.from.Before(a.until) {
				continue
			}
			if a.open && b.open || !a.deposed && !b.deposed || !a.open && !b.open {
				x.Errorf("both sides were live: %+v and %+v", a, b)
			}
		}
	}
}

// Either side, or both, stand still for longer than the other believes in them, and wake later as if nothing had been.
func TestPairSurvivesAStandstill(t *testing.T) {
	x := newTrial(t, twins.Options{}, 2)
	for _, who := range []string{"primary", "backup"} {
		side := x.primary
		if who == "backup" {
			side = x.backup()
		}
		x.signal(side, syscall.SIGSTOP)
		x.alone(1 - side)
		x.more(20)
		x.gaps("the %s, side %s, stands", who, twins.Sides[side])
		x.signal(side, syscall.SIGCONT)
		x.await(side, "waiting", "joining", "backup")
		x.whole()
		require.Equal(x, 1-side, x.primary)
		x.gaps("and wakes")
	}
	for first := range 2 {
		x.signal(0, syscall.SIGSTOP)
		x.signal(1, syscall.SIGSTOP)
		time.Sleep(400 * time.Millisecond) // what happens: longer than either waits for the other
		x.signal(first, syscall.SIGCONT)
		x.signal(1-first, syscall.SIGCONT)
		x.whole()
		x.gaps("both stood, and %s woke first", twins.Sides[first])
	}
	x.end()
}

// The link loses everything, or what one side sends only. The arbiter decides; the side that has lost waits, and joins when
// the link is back.
func TestPairSurvivesACutLink(t *testing.T) {
	x := newTrial(t, twins.Options{Apart: true}, 2)
	for _, c := range []struct {
		name  string
		sides func() []int
	}{
		{"in both directions", func() []int { return []int{0, 1} }},
		{"from the primary", func() []int { return []int{x.primary} }},
		{"from the backup", func() []int { return []int{x.backup()} }},
	} {
		before := [2]int{len(x.Sides[0].Events()), len(x.Sides[1].Events())}
		for _, s := range c.sides() {
			require.NoError(x, x.Cut(s))
		}
		winner := -1
		x.eventually(func() bool {
			for i, s := range x.Sides {
				for _, e := range s.Events()[before[i]:] {
					if text, _ := e.Attrs["text"].(string); e.Kind == event.PairPhase && text == "bidding -> alone" {
						winner = i
					}
				}
			}
			return winner >= 0
		}, "nobody goes on after the link is cut %s", c.name)
		_, err := x.Sides[1-winner].Happens(x.ctx, "refusal", before[1-winner], func(e event.Event) bool { return e.Kind == event.PairRefused })
		require.NoError(x, err)
		x.more(20)
		x.gaps("the link was cut %s, and %s went on", c.name, twins.Sides[winner])
		require.Equal(x, "waiting", x.Sides[1-winner].Phase())
		for s := range x.Sides {
			require.NoError(x, x.Heal(s))
		}
		x.whole()
		require.Equal(x, winner, x.primary)
		x.gaps("and was mended")
	}
	x.end()
}

// A link that stops for a moment, that delays, or whose connections are reset, costs time and nothing else.
func TestPairSurvivesABadLink(t *testing.T) {
	x := newTrial(t, twins.Options{Proxied: true}, 2)
	for way := range 2 {
		x.Link.Hold(way)
		time.Sleep(100 * time.Millisecond) // what happens: less than a side takes for death
		x.Link.Release()
		x.whole()
		x.gaps("the link held what %s sends for a moment", twins.Sides[way])
	}
	x.Link.Delay(twins.FromTarget, 5*time.Millisecond)
	x.Link.Delay(twins.FromClient, 5*time.Millisecond)
	x.more(20)
	x.Link.Release()
	x.gaps("the link was slow")
	x.whole()
	x.Link.Break()
	x.eventually(func() bool { return x.Sides[0].Count(event.PairLinkLost)+x.Sides[1].Count(event.PairLinkLost) > 0 }, "nobody notices that the link is broken")
	x.whole()
	x.gaps("the link's connections were reset")
	x.end()
}

// A backup that gets little processor time is slow, not dead, and is told apart from one that is.
func TestPairSurvivesAStarvedBackup(t *testing.T) {
	x := newTrial(t, twins.Options{}, 2)
	before := len(x.Sides[x.primary].Events())
	for range 12 {
		x.signal(x.backup(), syscall.SIGSTOP)
		time.Sleep(40 * time.Millisecond) // what happens: of 50 ms it runs for 10
		x.signal(x.backup(), syscall.SIGCONT)
		time.Sleep(10 * time.Millisecond)
	}
	x.gaps("the backup was starved")
	for _, e := range x.Sides[x.primary].Events()[before:] {
		require.NotContains(x, []event.Kind{event.PairDead, event.PairLinkLost}, e.Kind, "a starved side was taken for dead: %v", e)
	}
	x.end()
}

// witness is an etcd of one member as the pair's arbiter, behind a proxy.
type witness struct {
	x    *trial
	p    *twins.Twins
	dir  string
	cmd  *exec.Cmd
	wire *twins.Proxy
}

// Where the witness is, and where the sides look for it.
const (
	witnessAddress = "127.0.0.1:2379"
	arbiterAddress = "127.0.0.1:2380"
)

// newWitnessed starts a pair whose arbiter is a witness.
func newWitnessed(t *testing.T, o twins.Options) (*trial, *witness) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(cancel)
	o.Arbiter = "etcd:" + arbiterAddress
	w := &witness{p: newTwins(t, o), dir: t.TempDir()}
	w.start(t)
	t.Cleanup(w.kill)
	var err error
	w.wire, err = w.p.Proxy(arbiterAddress, witnessAddress)
	require.NoError(t, err)
	t.Cleanup(func() { w.wire.Close() })
	w.x = begin(t, ctx, w.p, 2)
	return w.x, w
}

// start starts the witness and waits until it listens.
func (w *witness) start(t *testing.T) {
	binary, err := ftvmm()
	require.NoError(t, err)
	w.cmd = exec.Command(binary, "witness", "run", "--insecure", "--listen", witnessAddress, "--data", filepath.Join(w.dir, "data"))
	require.NoError(t, w.p.Enter(w.cmd.Start))
	require.Eventually(t, func() bool {
		var c net.Conn
		err := w.p.Enter(func() (err error) {
			c, err = net.Dial("tcp", witnessAddress)
			return err
		})
		if err == nil {
			c.Close()
		}
		return err == nil
	}, patience, 5*time.Millisecond, "the witness does not listen")
}

func (w *witness) kill() {
	if w.cmd != nil {
		_ = w.cmd.Process.Kill()
		_ = w.cmd.Wait()
		w.cmd = nil
	}
}

// told waits until a side says that the arbiter does not answer, in an event after the first n of its present life.
func (x *trial) told(side, n int) {
	x.Helper()
	_, err := x.Sides[side].Happens(x.ctx, "complaint about the arbiter", n, func(e event.Event) bool { return e.Kind == event.PairNoArbiter })
	require.NoError(x, err)
}

// The arbiter is away when it is needed: the side that is left stands, says so, and goes on when the arbiter is back, be
// it restarted, reached again, or only slow. A pair that does not need it does not notice.
func TestPairWaitsForItsArbiter(t *testing.T) {
	x, w := newWitnessed(t, twins.Options{})

	// Nobody needs it.
	w.kill()
	x.more(50)
	// Now the backup does. It must not go on.
	victim := x.primary
	said := len(x.Sides[1-victim].Events())
	x.Sides[victim].Kill()
	x.await(1-victim, "bidding")
	x.told(1-victim, said)
	require.Equal(x, "bidding", x.Sides[1-victim].Phase())
	w.start(t)
	x.alone(1 - victim)
	x.more(20)
	x.gaps("the witness was away, and restarted")

	// A join needs it, too: till it is there, the live side runs with its outputs held.
	said = len(x.Sides[1-victim].Events())
	w.wire.Hold(twins.FromTarget)
	x.start(victim)
	x.await(1-victim, "syncing")
	x.told(1-victim, said)
	require.Equal(x, "syncing", x.Sides[1-victim].Phase())
	w.wire.Release()
	x.whole()
	x.gaps("the witness did not answer a join")

	// The swap takes effect, and its answer is lost.
	victim = x.primary
	said = len(x.Sides[1-victim].Events())
	w.wire.Hold(twins.FromTarget)
	x.Sides[victim].Kill()
	x.told(1-victim, said)
	w.wire.Break()
	w.wire.Release()
	x.alone(1 - victim)
	x.more(20)
	x.gaps("the witness's answer was lost")
	x.start(victim)
	x.whole()

	// Slow, but there.
	w.wire.Delay(twins.FromTarget, 300*time.Millisecond)
	victim = x.primary
	x.Sides[victim].Kill()
	x.alone(1 - victim)
	w.wire.Release()
	x.more(20)
	x.gaps("the witness was slow")
	x.start(victim)
	x.end()
}

// The directory of a file arbiter goes away and comes back, as a share does whose server is restarted.
func TestPairWaitsForItsArbitersDirectory(t *testing.T) {
	x := newTrial(t, twins.Options{}, 2)
	dir := filepath.Join(filepath.Dir(x.Disk(0)), "arbiter")
	require.NoError(x, os.Rename(dir, dir+"-away"))
	victim := x.primary
	said := len(x.Sides[1-victim].Events())
	x.Sides[victim].Kill()
	x.await(1-victim, "bidding")
	x.told(1-victim, said)
	require.Equal(x, "bidding", x.Sides[1-victim].Phase())
	require.NoError(x, os.Rename(dir+"-away", dir))
	x.alone(1 - victim)
	x.more(20)
	x.gaps("the arbiter's directory was away")
	x.start(victim)
	x.end()
}
