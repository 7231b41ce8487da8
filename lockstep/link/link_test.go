package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if !beEcho(os.Stderr) {
		goleak.VerifyTestMain(m)
	}
}

// patience bounds waits that end long before it when all is well.
const patience = 30 * time.Second

// pairKeys makes a pair's keys and loads both sides.
func pairKeys(t testing.TB, name string) (a, b *Keys) {
	dir := filepath.Join(t.TempDir(), "keys")
	_, err := CreatePair(dir, name, false)
	require.NoError(t, err)
	return loadSide(t, dir, A), loadSide(t, dir, B)
}

func loadSide(t testing.TB, dir string, side Side) *Keys {
	k, err := LoadKeys(filepath.Join(dir, side.String()))
	require.NoError(t, err)
	return k
}

// events collects events and lets a test wait for one.
type events struct {
	mu   sync.Mutex
	all  []Event
	news chan struct{}
}

func newEvents() *events { return &events{news: make(chan struct{})} }

func (e *events) add(v Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, v)
	close(e.news)
	e.news = make(chan struct{})
}

// wait returns the first event for which ok holds.
func (e *events) wait(t testing.TB, what string, ok func(Event) bool) Event {
	t.Helper()
	limit := time.After(patience)
	for {
		e.mu.Lock()
		for _, v := range e.all {
			if ok(v) {
				e.mu.Unlock()
				return v
			}
		}
		news, all := e.news, e.all
		e.mu.Unlock()
		select {
		case <-news:
		case <-limit:
			require.FailNow(t, "no event: "+what, "%v", all)
		}
	}
}

func (e *events) kind(t testing.TB, k EventKind) Event {
	t.Helper()
	return e.wait(t, string(k), func(v Event) bool { return v.Kind == k })
}

func (e *events) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = nil
}

// wired is both ends of one session.
type wired struct {
	listener *Listener
	a, b     *Session // a listens, b dials
	ea, eb   *events
}

// spec is what tests vary.
type spec struct {
	a, b  func(*Config)
	paths int
	dial  func(l *Listener) []string
}

func wire(t testing.TB, sp spec) *wired {
	ka, kb := pairKeys(t, "db")
	w := &wired{ea: newEvents(), eb: newEvents()}
	// Hosts of tests are slow: nobody is to be taken for dead who only waits for a CPU.
	ca := Config{Keys: ka, Event: w.ea.add, Suspect: 5 * time.Second, Dead: 10 * time.Second}
	cb := Config{Keys: kb, Event: w.eb.add, Suspect: 5 * time.Second, Dead: 10 * time.Second}
	if sp.a != nil {
		sp.a(&ca)
	}
	if sp.b != nil {
		sp.b(&cb)
	}
	addresses := []string{"127.0.0.1:0"}
	if sp.paths == 2 {
		addresses = append(addresses, "127.0.0.1:0")
	}
	var err error
	w.listener, err = Listen(ca, addresses...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.listener.Close()) })
	to := addressesOf(w.listener)
	if sp.dial != nil {
		to = sp.dial(w.listener)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	w.b, err = Dial(ctx, cb, to...)
	require.NoError(t, err)
	t.Cleanup(func() { w.b.Close("end of test"); w.b.wg.Wait() })
	w.a, err = w.listener.Accept(ctx)
	require.NoError(t, err)
	t.Cleanup(func() { w.a.Close("end of test"); w.a.wg.Wait() })
	if sp.paths == 2 {
		for i := range sp.paths {
			up := func(v Event) bool { return v.Kind == EventPathUp && v.Path == i }
			w.ea.wait(t, "path up", up)
			w.eb.wait(t, "path up", up)
		}
	}
	return w
}

func addressesOf(l *Listener) (out []string) {
	for _, a := range l.Addrs() {
		out = append(out, a.String())
	}
	return out
}

// message n of a class: its number, and contents that depend on it.
func message(n uint64, size int) []byte {
	b := binary.LittleEndian.AppendUint64(make([]byte, 0, 8+size), n)
	r := rand.NewPCG(n, 1)
	for len(b) < 8+size {
		b = binary.LittleEndian.AppendUint64(b, r.Uint64())
	}
	return b[:8+size]
}

// sizeOf is the size of message n: mostly small, some of many segments.
func sizeOf(n uint64) int {
	switch {
	case n%97 == 5:
		return 200_000
	case n%13 == 3:
		return maxSegment - 8 + int(n%3) - 1
	}
	return int(n*37) % 900
}

// sink checks that messages come in order, whole, each once.
type sink struct {
	mu   sync.Mutex
	next [classes]uint64
	bad  error
	want uint64
	done [classes]chan struct{}
}

func newSink(want uint64) *sink {
	return &sink{want: want, done: [classes]chan struct{}{make(chan struct{}), make(chan struct{})}}
}

func (k *sink) take(c Class, p []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := k.next[c]
	if k.bad == nil && !bytes.Equal(p, message(n, sizeOf(n))) {
		k.bad = fmt.Errorf("%v message %d is wrong: %d bytes, number %d", c, n, len(p), binary.LittleEndian.Uint64(p))
	}
	if k.next[c]++; k.next[c] == k.want {
		close(k.done[c])
	}
}

func (k *sink) wait(t testing.TB, c Class) {
	t.Helper()
	select {
	case <-k.done[c]:
	case <-time.After(patience):
		k.mu.Lock()
		defer k.mu.Unlock()
		require.FailNow(t, "messages are missing", "%v: %d of %d came; %v", c, k.next[c], k.want, k.bad)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	require.NoError(t, k.bad)
}

// pump sends messages 0 to n-1.
func pump(s *Session, c Class, n uint64) error {
	for i := range n {
		if err := s.Send(c, message(i, sizeOf(i)), i%5 == 0); err != nil {
			return err
		}
	}
	return nil
}

func TestMessagesOfBothClassesComeInOrderBothWays(t *testing.T) {
	for _, paths := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d paths", paths), func(t *testing.T) {
			w := wire(t, spec{paths: paths})
			const n = 400
			at := map[*Session]*sink{w.a: newSink(n), w.b: newSink(n)}
			var wg sync.WaitGroup
			errs := make(chan error, 4)
			for s, k := range at {
				s.Start(k.take)
				for c := range Class(classes) {
					wg.Go(func() { errs <- pump(s, c, n) })
				}
			}
			for _, k := range at {
				k.wait(t, Log)
				k.wait(t, Bulk)
			}
			wg.Wait()
			for range 4 {
				require.NoError(t, <-errs)
			}
		})
	}
}

func TestAMessageThatIsNotUrgentGoesOutWithoutCompany(t *testing.T) {
	w := wire(t, spec{})
	got := make(chan string, 1)
	w.a.Start(func(_ Class, p []byte) { got <- string(p) })
	require.NoError(t, w.b.Send(Log, []byte("hello"), false))
	select {
	case s := <-got:
		require.Equal(t, "hello", s)
	case <-time.After(patience):
		require.FailNow(t, "the message did not come")
	}
}

func TestHelloTellsOfThePeer(t *testing.T) {
	w := wire(t, spec{
		a: func(c *Config) {
			c.Capabilities = 0b1101
			c.State = func() (uint64, uint64) { return 7, 70 }
			c.versions = [2]uint16{1, 5}
		},
		b: func(c *Config) {
			c.Capabilities = 0b0111
			c.State = func() (uint64, uint64) { return 8, 80 }
			c.versions = [2]uint16{1, 3}
		},
	})
	require.Equal(t, Peer{Side: B, Version: 3, Capabilities: 0b0101, Epoch: 8, Term: 80}, w.a.Peer())
	require.Equal(t, Peer{Side: A, Version: 3, Capabilities: 0b0101, Epoch: 7, Term: 70}, w.b.Peer())
	require.Equal(t, w.a.ID(), w.b.ID())
}

func TestHeartbeatsMeasureTheRoundTrip(t *testing.T) {
	fast := func(c *Config) { c.Suspect = 50 * time.Millisecond }
	w := wire(t, spec{a: fast, b: fast})
	require.Eventually(t, func() bool {
		p, q := w.a.Paths()[0], w.b.Paths()[0]
		return p.Up && q.Up && p.RTT > 0 && q.RTT > 0 && p.Log && p.Bulk
	}, patience, time.Millisecond)
}

func TestCloseTellsThePeerWhy(t *testing.T) {
	w := wire(t, spec{})
	w.a.Close("bidding for the guest")
	e := w.eb.kind(t, EventDown)
	require.Equal(t, PeerClosed, e.Reason, e.Text)
	require.Contains(t, e.Text, "bidding for the guest")
	require.Equal(t, PeerClosed, ReasonOf(w.b.Err()))
	require.Equal(t, Closed, ReasonOf(w.a.Err()))
	require.Equal(t, Closed, ReasonOf(w.a.Send(Log, nil, true)))
	require.Equal(t, PeerClosed, ReasonOf(w.b.Send(Log, nil, true)))
	w.ea.mu.Lock()
	defer w.ea.mu.Unlock()
	for _, e := range w.ea.all {
		require.NotEqual(t, EventDown, e.Kind, "who closes needs no event")
	}
}

// The rule that a backup's bid rests on.
func TestNothingIsDeliveredOnceCloseHasReturned(t *testing.T) {
	for range 20 {
		w := wire(t, spec{})
		var (
			mu     sync.Mutex
			closed bool
			late   int
			first  = make(chan struct{})
			once   sync.Once
		)
		w.a.Start(func(Class, []byte) {
			mu.Lock()
			defer mu.Unlock()
			if closed {
				late++
			}
			once.Do(func() { close(first) })
		})
		var wg sync.WaitGroup
		for c := range Class(classes) {
			wg.Go(func() {
				for w.b.Send(c, make([]byte, 100), true) == nil {
				}
			})
		}
		<-first
		w.a.Close("enough")
		mu.Lock()
		closed = true
		mu.Unlock()
		wg.Wait() // the peer has seen the end
		w.a.wg.Wait()
		require.Zero(t, late)
	}
}

func TestClosingEndsAHandlerThatWaitsForDone(t *testing.T) {
	w := wire(t, spec{})
	in := make(chan struct{})
	w.a.Start(func(Class, []byte) {
		close(in)
		<-w.a.Done()
	})
	require.NoError(t, w.b.Send(Log, []byte("x"), true))
	<-in
	w.a.Close("now")
}

func TestASlowReaderIsBoundedAndNotDead(t *testing.T) {
	quick := func(c *Config) { c.Suspect, c.Dead = time.Second, 2*time.Second }
	w := wire(t, spec{a: quick, b: quick})
	release := make(chan struct{})
	k := newSink(1 << 40)
	w.a.Start(func(c Class, p []byte) {
		<-release
		k.take(c, p)
	})
	// Until ring and sockets are full.
	var sent uint64
	for {
		err := w.b.TrySend(Log, message(sent, sizeOf(sent)), false)
		if errors.Is(err, ErrFull) {
			break
		}
		require.NoError(t, err)
		sent++
	}
	require.LessOrEqual(t, w.b.Pending(Log), ringSize)
	require.Greater(t, w.b.Pending(Log), ringSize-300_000)
	// The other class is not held up by it, nor are heartbeats.
	before := w.b.Paths()[0].RTT
	require.Eventually(t, func() bool { return w.b.Paths()[0].RTT != before }, patience, time.Millisecond)
	require.NoError(t, w.b.Send(Bulk, message(0, sizeOf(0)), true))
	k.mu.Lock()
	k.want = sent
	k.mu.Unlock()
	close(release)
	k.wait(t, Log)
	require.Eventually(t, func() bool { return w.b.Pending(Log) == 0 }, patience, time.Millisecond)
	require.NoError(t, w.b.Err())
	w.eb.mu.Lock()
	defer w.eb.mu.Unlock()
	for _, e := range w.eb.all {
		require.NotEqual(t, EventDead, e.Kind)
	}
}

func TestMessagesAboveTheLimitAreNotSent(t *testing.T) {
	w := wire(t, spec{})
	for c, limit := range map[Class]int{Log: MaxLogMessage, Bulk: MaxBulkMessage} {
		require.Equal(t, Oversized, ReasonOf(w.b.Send(c, make([]byte, limit+1), true)))
	}
	got := make(chan int, 2)
	w.a.Start(func(_ Class, p []byte) { got <- len(p) })
	require.NoError(t, w.b.Send(Log, make([]byte, MaxLogMessage), true))
	require.Equal(t, MaxLogMessage, <-got)
	require.NoError(t, w.b.Send(Bulk, nil, true))
	require.Equal(t, 0, <-got)
	require.Error(t, w.b.Send(control, nil, true))
}

// proxy forwards TCP connections and can cut them.
type proxy struct {
	ln    net.Listener
	to    string
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns []net.Conn
	down  bool
}

func newProxy(t testing.TB, to string) *proxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{ln: ln, to: to}
	p.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.forward(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		p.set(true)
		p.wg.Wait()
	})
	return p
}

func (p *proxy) forward(c net.Conn) {
	defer c.Close()
	d, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer d.Close()
	p.mu.Lock()
	if p.down {
		p.mu.Unlock()
		return
	}
	p.conns = append(p.conns, c, d)
	p.mu.Unlock()
	var wg sync.WaitGroup
	for _, x := range [][2]net.Conn{{c, d}, {d, c}} {
		wg.Go(func() {
			_, _ = io.Copy(x[0], x[1])
			x[0].Close()
			x[1].Close()
		})
	}
	wg.Wait()
}

// set cuts all connections, and refuses new ones while down.
func (p *proxy) set(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
	for _, c := range p.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		c.Close()
	}
	p.conns = nil
}

func TestPathsThatFailUnderLoadLoseNothing(t *testing.T) {
	var proxies []*proxy
	w := wire(t, spec{paths: 2, dial: func(l *Listener) []string {
		var to []string
		for _, a := range addressesOf(l) {
			p := newProxy(t, a)
			proxies = append(proxies, p)
			to = append(to, p.ln.Addr().String())
		}
		return to
	}})
	const n = 3000
	sinks := []*sink{newSink(n), newSink(n)}
	w.a.Start(sinks[0].take)
	w.b.Start(sinks[1].take)
	var wg sync.WaitGroup
	errs := make(chan error, 4)
	for _, s := range []*Session{w.a, w.b} {
		for c := range Class(classes) {
			wg.Go(func() { errs <- pump(s, c, n) })
		}
	}
	// Each path in turn, in the middle of whatever is going on.
	for round := range 6 {
		i := round % 2
		w.eb.forget()
		w.ea.forget()
		proxies[i].set(true)
		lost := func(v Event) bool { return v.Kind == EventPathLost && v.Path == i }
		w.ea.wait(t, "path lost", lost)
		w.eb.wait(t, "path lost", lost)
		proxies[i].set(false)
		up := func(v Event) bool { return v.Kind == EventPathUp && v.Path == i }
		w.eb.wait(t, "path up", up)
		w.ea.wait(t, "path up", up)
	}
	for _, k := range sinks {
		k.wait(t, Log)
		k.wait(t, Bulk)
	}
	wg.Wait()
	for range 4 {
		require.NoError(t, <-errs)
	}
	// The last path's end is the session's.
	for _, p := range proxies {
		p.set(true)
	}
	require.Equal(t, Lost, w.ea.kind(t, EventDown).Reason)
	require.Equal(t, Lost, w.eb.kind(t, EventDown).Reason)
}

func TestANewSessionMayBeginWhileTheOldOneIsThere(t *testing.T) {
	w := wire(t, spec{})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := Dial(ctx, *w.b.cfg, addressesOf(w.listener)...)
	require.NoError(t, err)
	a, err := w.listener.Accept(ctx)
	require.NoError(t, err)
	require.Equal(t, a.ID(), b.ID())
	require.NotEqual(t, a.ID(), w.a.ID())
	require.NoError(t, w.a.Err())
	a.Close("")
	b.Close("")
	a.wg.Wait()
	b.wg.Wait()
}
