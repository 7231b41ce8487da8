package integration

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/vmm/event"
)

// often returns how often something is done: a few times, or with the tag "slow" many.
func often(few, many int) int {
	if slow {
		return many
	}
	return few
}

// rules are the rules by which an output may leave.
var rules = []struct {
	name  string
	flags []string
}{
	{"executed", []string{"--engine", "lockstep"}},
	{"received", []string{"--engine", "lockstep", "--commit", "received"}},
	{"checkpointed", []string{"--engine", "checkpoint"}},
}

// wake lets clients notice soon that their connection is gone, for trials in which the guest starts from its disk.
func (x *trial) wake() {
	x.restarts = true
	for _, c := range x.clients {
		c.gate.Lock()
		c.client.Timeout = time.Second
		c.gate.Unlock()
	}
}

// The host of the live side is lost many times in a row, and each time the other has its place: all connections last.
func TestPairSurvivesManyFailoversInARow(t *testing.T) {
	x := newTrial(t, twins.Options{}, 3)
	for k := range often(4, 20) {
		victim := x.primary
		x.Sides[victim].Kill()
		x.alone(1 - victim)
		x.more(30)
		x.gaps("failover %d, from %s", k+1, twins.Sides[victim])
		x.start(victim)
		x.whole()
		require.Equal(x, 1-victim, x.primary)
	}
	x.end()
}

// Sides are killed at random moments, and started again at random moments, for as long as one of them is whole.
func TestPairSurvivesKillsAtRandom(t *testing.T) {
	if !slow {
		t.Skip("a hundred kills take minutes: run it with the tag slow")
	}
	for _, rule := range rules {
		t.Run(rule.name, func(t *testing.T) {
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			x := newTrial(t, twins.Options{Flags: rule.flags}, 2)
			for k := range 40 {
				victim := r.IntN(2)
				x.more(1 + r.IntN(60))
				time.Sleep(time.Duration(r.IntN(5000)) * time.Microsecond) // any moment
				x.Sides[victim].Kill()
				x.alone(1 - victim)
				x.more(1 + r.IntN(30))
				x.gaps("kill %d, of %s", k+1, twins.Sides[victim])
				x.start(victim)
				if r.IntN(3) == 0 { // and once more, on its way back
					_, err := x.Sides[victim].Happens(x.ctx, "joining", 0, func(e event.Event) bool { return e.Kind == event.PairPhase })
					require.NoError(x, err)
					time.Sleep(time.Duration(r.IntN(200)) * time.Millisecond)
					x.Sides[victim].Kill()
					x.alone(1 - victim)
					x.start(victim)
				}
				x.whole()
			}
			x.end()
		})
	}
}

// The side that joins dies, and the side that it joins goes on as if nothing had been: after any number of bytes of the copy or
// of its last cut.
func TestPairSurvivesTheLossOfAJoiningSide(t *testing.T) {
	x := newTrial(t, twins.Options{Proxied: true}, 2)
	victim := x.backup()
	x.Sides[victim].Kill()
	x.alone(x.primary)
	// A join moves some 75 MB, but zeros take no room.
	sent := x.Link.Passed(x.primary)
	x.start(victim)
	x.whole()
	whole := x.Link.Passed(x.primary) - sent
	x.Logf("a join takes %d bytes", whole)
	n := int64(often(3, 16))
	for k := range n {
		x.Sides[victim].Kill()
		x.alone(x.primary)
		dead := make(chan struct{})
		x.Link.HoldAfter(x.primary, whole*(k+1)/(n+1), func() { close(dead) })
		x.start(victim)
		select {
		case <-dead:
		case <-x.ctx.Done():
			x.Fatalf("the copy does not come to %d bytes", whole*(k+1)/(n+1))
		}
		x.Sides[victim].Kill()
		x.Link.Release()
		x.alone(x.primary)
		x.more(20)
		x.gaps("the joining side died after %d of some %d bytes", whole*(k+1)/(n+1), whole)
		x.start(victim)
		x.whole()
	}
	x.end()
}

// The live side dies while its guest is being copied. The side that was joining has half a copy and may not use it; the guest
// starts anew from the live side's disk, where all is that was ever answered.
func TestPairSurvivesTheLossOfTheSideThatIsJoined(t *testing.T) {
	x := newTrial(t, twins.Options{Proxied: true}, 2)
	x.wake()
	for k := range often(2, 10) {
		joins, live := x.backup(), x.primary
		x.Sides[joins].Kill()
		x.alone(live)
		dead := make(chan struct{})
		x.Link.HoldAfter(live, 30_000+int64(k)*17_000%90_000, func() { close(dead) }) // a join takes some 130 kB
		x.start(joins)
		select {
		case <-dead:
		case <-x.ctx.Done():
			x.Fatal("there is no copy")
		}
		x.await(joins, "joining")
		before := x.answers()
		x.Sides[live].Kill()
		x.Link.Release()
		x.await(joins, "waiting")
		// It must stay there, also if it is started anew: it is not the recorded primary, and its disk is no whole copy.
		n := x.answers()
		require.LessOrEqual(x, n, before+len(x.clients))
		x.Sides[joins].Kill()
		x.start(joins)
		x.start(live)
		x.whole()
		require.Equal(x, live, x.primary)
		x.gaps("the side that was joined died")
	}
	x.end()
}

// A side dies while a cut is on its way to the backup, which has a part of it and drops that.
func TestPairSurvivesTheLossOfASideDuringACut(t *testing.T) {
	x := newTrial(t, twins.Options{Proxied: true, Flags: []string{"--engine", "checkpoint"}}, 2)
	for k := range often(4, 40) {
		victim, from := x.primary, x.primary
		if k%3 == 2 {
			victim = x.backup()
		}
		// A cut of the ledger is some 10 to 100 kB.
		torn := make(chan struct{})
		x.Link.HoldAfter(from, 1+int64(k*7919%60_000), func() { close(torn) })
		select {
		case <-torn:
		case <-x.ctx.Done():
			x.Fatal("there are no cuts")
		}
		x.Sides[victim].Kill()
		x.Link.Release()
		x.alone(1 - victim)
		x.more(20)
		x.gaps("side %s died during a cut", twins.Sides[victim])
		x.start(victim)
		x.whole()
	}
	x.end()
}

// The primary dies with outputs held: the backup's word, which would have let them leave, does not arrive. And it dies after its
// own disk has got writes that the backup has not heard of.
func TestPairSurvivesTheLossOfAPrimaryThatIsAhead(t *testing.T) {
	for _, rule := range rules {
		t.Run(rule.name, func(t *testing.T) {
			x := newTrial(t, twins.Options{Proxied: true, Flags: rule.flags}, 2)
			for k := range often(1, 10) {
				for _, ahead := range []bool{true, false} {
					victim, from := x.primary, x.backup()
					if ahead {
						from = victim
					}
					x.Link.Hold(from)
					if from == victim {
						// Within the time in which the backup still believes in the link, if all goes well.
						x.eventually(func() bool { return !x.same() || x.Sides[1-victim].Phase() != "backup" }, "the primary's disk does not change")
					} else {
						time.Sleep(50 * time.Millisecond) // what happens: outputs pile up
					}
					x.Sides[victim].Kill()
					x.Link.Release()
					x.alone(1 - victim)
					x.more(20)
					x.gaps("%d: the primary, %s, died while the link held what %s said", k, twins.Sides[victim], twins.Sides[from])
					x.start(victim)
					x.whole()
				}
			}
			x.end()
		})
	}
}

// Both sides die, one after the other, and are started in either order. The side that died first lacks what the other
// has done since, and waits for it, however long that takes.
func TestPairSurvivesTheLossOfBothSides(t *testing.T) {
	x := newTrial(t, twins.Options{}, 2)
	x.wake()
	for k := range often(2, 16) {
		if !slow {
			k *= 3 // one of each
		}
		first := x.primary
		if k&1 != 0 {
			first = x.backup()
		}
		last := 1 - first
		x.Sides[first].Kill()
		x.alone(last)
		x.more(30)
		x.Sides[last].Kill()
		before := x.answers()
		if k&2 == 0 {
			// The stale side comes first. It waits, longer than it takes to start a guest.
			x.start(first)
			time.Sleep(2500 * time.Millisecond) // what must not happen has no event
			require.Equal(x, "", x.Sides[first].Phase(), "a stale side has done something")
			require.LessOrEqual(x, x.answers(), before+len(x.clients))
			x.start(last)
		} else {
			x.start(last)
			x.alone(last)
			x.start(first)
		}
		x.whole()
		require.Equal(x, last, x.primary)
		x.gaps("%s died, then %s", twins.Sides[first], twins.Sides[last])
	}
	x.end()
}

// The backup wins the record, and dies before it hears of it. Now it is the one that the record names, although it
// was never live; the old primary may not go on, nor start from its disk.
func TestPairSurvivesTheLossOfTheWinnerBeforeItsAnswer(t *testing.T) {
	x, w := newWitnessed(t, twins.Options{})
	x.wake()
	// A bid is a read and a swap. How much does the witness answer? All of it but the end is let through, below.
	passed := w.wire.Passed(twins.FromTarget)
	x.Sides[x.primary].Kill()
	x.alone(x.backup())
	passed = w.wire.Passed(twins.FromTarget) - passed
	x.more(20)
	x.start(x.primary)
	x.whole()
	for range often(1, 6) {
		loser, winner := x.primary, x.backup()
		said := len(x.Sides[winner].Events())
		cut := make(chan struct{})
		w.wire.HoldAfter(twins.FromTarget, passed-20, func() { close(cut) })
		x.Sides[loser].Kill()
		x.told(winner, said)
		<-cut
		require.Equal(x, "bidding", x.Sides[winner].Phase())
		x.Sides[winner].Kill()
		w.wire.Break()
		w.wire.Release()
		before := x.answers()
		x.start(loser)
		time.Sleep(2500 * time.Millisecond) // what must not happen has no event
		require.Equal(x, "", x.Sides[loser].Phase(), "the record does not name this side")
		require.LessOrEqual(x, x.answers(), before+len(x.clients))
		x.start(winner)
		x.whole()
		require.Equal(x, winner, x.primary)
		require.Equal(x, 1, x.Sides[winner].Count(event.PairCold))
		x.gaps("the winner died before it knew")
	}
	x.end()
}

// Both sides bid, as the link is gone, and one of them dies while it does.
func TestPairSurvivesTheLossOfABidder(t *testing.T) {
	x := newTrial(t, twins.Options{Apart: true}, 2)
	x.wake()
	for k := range often(2, 10) {
		victim := k % 2
		said := len(x.Sides[victim].Events())
		for s := range x.Sides {
			require.NoError(x, x.Cut(s))
		}
		_, err := x.Sides[victim].Happens(x.ctx, "bid", said, func(e event.Event) bool {
			return e.Kind == event.PairPhase && e.Attrs["phase"] == "bidding"
		})
		require.NoError(x, err)
		x.Sides[victim].Kill()
		for s := range x.Sides {
			require.NoError(x, x.Heal(s))
		}
		x.start(victim)
		x.whole()
		x.gaps("the link was cut, and %s died bidding", twins.Sides[victim])
	}
	x.end()
}

// A bulk transfer in each direction goes on over failovers, and arrives unaltered.
func TestBulkTransfersSurviveFailovers(t *testing.T) {
	size := 24 << 20
	if slow {
		size = 192 << 20
	}
	p := newTwins(t, twins.Options{Guest: "net", Append: fmt.Sprintf("bytes=%d", size)})
	x := begin(t, t.Context(), p, 0)
	ctx := x.ctx
	open := func(port int) *net.TCPConn {
		c, err := p.Dial(ctx, "tcp", port)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		require.NoError(t, c.SetDeadline(time.Now().Add(4*patience)))
		return c.(*net.TCPConn)
	}
	failures := make(chan error, 2)
	kills := often(3, 20)
	moved := [2]*valve{newValve(), newValve()}
	made, echoed := open(portChargen), open(portEcho)
	go func() { failures <- drain(made, size, moved[0]) }()
	go func() { failures <- reflect(echoed, size, moved[1]) }()
	for k := range kills {
		// Each failover has a part of the transfers for itself, and strikes in the middle of it.
		part := int64(size / (kills + 1))
		for _, v := range moved {
			v.open(part * int64(k+1))
		}
		x.eventually(func() bool {
			return moved[0].passed() >= part*int64(k)+part/3 && moved[1].passed() >= part*int64(k)+part/3
		}, "the transfers do not go on")
		victim := x.primary
		x.Sides[victim].Kill()
		x.alone(1 - victim)
		x.Logf("kill %d, of %s: %d and %d bytes so far", k+1, twins.Sides[victim], moved[0].passed(), moved[1].passed())
		x.start(victim)
		x.whole()
	}
	for _, v := range moved {
		v.open(math.MaxInt64)
	}
	for range moved {
		select {
		case err := <-failures:
			require.NoError(t, err)
		case <-ctx.Done():
			t.Fatal("the transfers do not end")
		}
	}
	x.signal(x.primary, syscall.SIGTERM)
	for _, s := range x.Sides {
		code, err := s.Wait(ctx)
		require.NoError(t, err)
		require.Zero(t, code)
	}
	sent, conflicts := x.watch.Close()
	require.Empty(t, conflicts)
	require.Positive(t, sent)
	x.quiet()
	x.single()
}

// valve counts bytes, and lets only so many pass.
type valve struct {
	mu   sync.Mutex
	more sync.Cond
	n    int64
	room int64
}

func newValve() *valve {
	v := &valve{}
	v.more.L = &v.mu
	return v
}

func (v *valve) Write(b []byte) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.n+int64(len(b)) > v.room {
		v.more.Wait()
	}
	v.n += int64(len(b))
	return len(b), nil
}

// open lets bytes pass up to the nth.
func (v *valve) open(n int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.room = n
	v.more.Broadcast()
}

func (v *valve) passed() int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.n
}

// drain reads what the guest makes, n bytes.
func drain(c net.Conn, n int, moved *valve) error {
	got, want := fnv.New64a(), fnv.New64a()
	size, err := io.Copy(io.MultiWriter(got, moved), c)
	want.Write(pattern(n, 0))
	if err == nil && (size != int64(n) || got.Sum64() != want.Sum64()) {
		err = fmt.Errorf("%d bytes came from the guest where it sent %d, with the sum %#x and not %#x", size, n, got.Sum64(), want.Sum64())
	}
	return err
}

// reflect sends n bytes to the guest and reads them back.
func reflect(c *net.TCPConn, n int, moved *valve) error {
	data := pattern(n, 7)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		if err == nil {
			err = c.CloseWrite()
		}
		sent <- err
	}()
	got, want := fnv.New64a(), fnv.New64a()
	size, err := io.Copy(io.MultiWriter(got, moved), c)
	want.Write(data)
	if err == nil && (size != int64(n) || got.Sum64() != want.Sum64()) {
		err = fmt.Errorf("%d bytes came back of %d, with the sum %#x and not %#x", size, n, got.Sum64(), want.Sum64())
	}
	return errors.Join(err, <-sent)
}
