package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/etcd"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/witness"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

var _ arbiter.Arbiter = (*etcd.Arbiter)(nil)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs a witness without keys until the test ends.
func start(t *testing.T, data, listen string) *witness.Witness {
	t.Helper()
	w, err := witness.Start(t.Context(), witness.Config{Data: data, Listen: listen, Insecure: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.Close()) })
	return w
}

func open(t *testing.T, timeout time.Duration, endpoints ...string) *etcd.Arbiter {
	t.Helper()
	a, err := etcd.Open(etcd.Config{Pair: "db", Endpoints: endpoints, Timeout: timeout})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, a.Close()) })
	return a
}

// patience is the time that a call gets which is expected to succeed.
const patience = 30 * time.Second

// put writes what no arbiter would.
func put(t *testing.T, endpoint string, op clientv3.Op) {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	require.NoError(t, err)
	defer c.Close()
	_, err = c.Txn(t.Context()).Then(op).Commit()
	require.NoError(t, err)
}

func solo(epoch uint64, s protocol.Side, nonce uint64) protocol.Record {
	return protocol.Record{Epoch: epoch, InSync: protocol.Only(s), Primary: s, Nonce: nonce}
}

func requireReason(t *testing.T, reason string, err error) {
	t.Helper()
	var e *arbiter.Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, reason, e.Reason, "%v", err)
	require.NotEmpty(t, e.Remedy)
}

func TestTheRecordOutlivesTheWitness(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	data := t.TempDir()
	w, err := witness.Start(ctx, witness.Config{Data: data, Listen: "127.0.0.1:0", Insecure: true})
	require.NoError(t, err)
	p := newProxy(t, w.Addr().String()) // its address stays
	addr := p.Addr().String()
	a := open(t, patience, addr)
	want := solo(1, protocol.A, 7)
	ok, held, err := a.Swap(ctx, want)
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, want, held)
	require.NoError(t, w.Close())

	// Away: an error, soon, and no answer that could be taken for one.
	gone := open(t, 500*time.Millisecond, addr)
	for _, a := range []*etcd.Arbiter{a, gone} {
		held, err = a.Read(ctx)
		requireReason(t, arbiter.NoAnswer, err)
		require.ErrorContains(t, err, addr)
		require.Zero(t, held)
		ok, held, err = a.Swap(ctx, solo(2, protocol.B, 8))
		requireReason(t, arbiter.NoAnswer, err)
		require.False(t, ok)
		require.Zero(t, held)
	}

	// Back: with the record, for the same clients, in the time that reconnecting takes.
	p.lead(start(t, data, "127.0.0.1:0"))
	require.Equal(t, want, readable(t, a))
	ok, _, err = open(t, patience, addr).Swap(ctx, solo(2, protocol.B, 8))
	require.NoError(t, err)
	require.True(t, ok)
}

func TestWhatIsNoRecordIsAnErrorAndStays(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	addr := start(t, t.TempDir(), "127.0.0.1:0").Addr().String()
	a := open(t, patience, addr)
	for name, value := range map[string]string{
		"empty":         "",
		"garbage":       "\x00\x01",
		"no epoch":      `{"in_sync":2,"primary":1}`,
		"unknown field": `{"epoch":1,"in_sync":2,"primary":1,"nonce":1,"extra":1}`,
		"two":           `{"epoch":1,"in_sync":2,"primary":1,"nonce":1}{}`,
		"too long":      `{"epoch":1,"in_sync":2,"primary":1,"nonce":1}` + strings.Repeat(" ", arbiter.MaxRecord),
	} {
		t.Run(name, func(t *testing.T) {
			put(t, addr, clientv3.OpPut(etcd.Key("db"), value))
			held, err := a.Read(ctx)
			requireReason(t, arbiter.Malformed, err)
			require.ErrorIs(t, err, arbiter.ErrNotRecord)
			require.ErrorContains(t, err, etcd.Key("db"))
			require.Zero(t, held)
			for _, epoch := range []uint64{1, 2} {
				ok, _, err := a.Swap(ctx, solo(epoch, protocol.A, 1))
				requireReason(t, arbiter.Malformed, err)
				require.False(t, ok)
			}
		})
	}
}

func TestADeletedRecordIsNone(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	addr := start(t, t.TempDir(), "127.0.0.1:0").Addr().String()
	a := open(t, patience, addr)
	_, _, err := a.Swap(ctx, solo(1, protocol.A, 1))
	require.NoError(t, err)
	put(t, addr, clientv3.OpDelete(etcd.Key("db")))
	held, err := a.Read(ctx)
	require.NoError(t, err)
	require.Zero(t, held)
	ok, held, err := a.Swap(ctx, solo(2, protocol.A, 1))
	require.NoError(t, err)
	require.False(t, ok, "nothing is swapped that is not there")
	require.Zero(t, held)
}

func TestTwoWitnessesAreNotOneArbiter(t *testing.T) {
	t.Parallel()
	one, two := start(t, t.TempDir(), "127.0.0.1:0"), start(t, t.TempDir(), "127.0.0.1:0")
	a := open(t, patience, one.Addr().String(), two.Addr().String())
	var err error
	require.Eventually(t, func() bool {
		_, err = a.Read(t.Context())
		return err != nil
	}, patience, time.Millisecond, "calls go to both in turn")
	requireReason(t, arbiter.OtherCluster, err)
	_, err = a.Read(t.Context())
	requireReason(t, arbiter.OtherCluster, err)
}

func TestAWitnessThatLostItsDataIsAnother(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	w, err := witness.Start(ctx, witness.Config{Data: t.TempDir(), Listen: "127.0.0.1:0", Insecure: true})
	require.NoError(t, err)
	p := newProxy(t, w.Addr().String())
	a := open(t, patience, p.Addr().String())
	_, _, err = a.Swap(ctx, solo(1, protocol.A, 1))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	p.lead(start(t, t.TempDir(), "127.0.0.1:0"))
	require.Eventually(t, func() bool {
		_, err = a.Read(ctx)
		var e *arbiter.Error
		return errors.As(err, &e) && e.Reason == arbiter.OtherCluster
	}, patience, 10*time.Millisecond)
}

func TestTwoAddressesOfOneWitness(t *testing.T) {
	t.Parallel()
	_, port, err := net.SplitHostPort(start(t, t.TempDir(), "127.0.0.1:0").Addr().String())
	require.NoError(t, err)
	a := open(t, patience, "127.0.0.1:"+port, "localhost:"+port)
	for range 10 {
		_, err := a.Read(t.Context())
		require.NoError(t, err)
	}
}

// proxy passes bytes between a client and a witness. A request that holds a text springs a trap, once.
type proxy struct {
	net.Listener
	running sync.WaitGroup

	mu    sync.Mutex
	to    string
	conns []net.Conn
	trap  *trap
	deaf  bool // answers are dropped
}

// trap is what happens to the request that holds a text.
type trap struct {
	text   string
	deaf   bool          // its answer and all later ones are dropped
	sprung chan struct{} // is closed when it has come
	pass   chan struct{} // it waits for the end of this
	after  chan struct{} // and what follows it for the end of this
}

func newTrap(text string, deaf bool) *trap {
	return &trap{text, deaf, make(chan struct{}), make(chan struct{}), make(chan struct{})}
}

func newProxy(t *testing.T, to string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{Listener: l, to: to}
	p.running.Go(p.serve)
	t.Cleanup(func() {
		l.Close()
		p.cut()
		p.running.Wait()
	})
	return p
}

func (p *proxy) serve() {
	for {
		from, err := p.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		addr := p.to
		p.mu.Unlock()
		to, err := net.Dial("tcp", addr)
		if err != nil {
			from.Close()
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, from, to)
		p.mu.Unlock()
		p.running.Go(func() { p.requests(from, to) })
		p.running.Go(func() { p.answers(to, from) })
	}
}

func (p *proxy) requests(from, to net.Conn) {
	defer to.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		p.mu.Lock()
		caught := p.trap
		if caught == nil || !strings.Contains(string(b[:n]), caught.text) {
			caught = nil
		} else {
			p.trap = nil
			p.deaf = caught.deaf
		}
		p.mu.Unlock()
		if caught != nil {
			close(caught.sprung)
			<-caught.pass
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
		if caught != nil {
			<-caught.after
		}
	}
}

func (p *proxy) answers(from, to net.Conn) {
	defer to.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		p.mu.Lock()
		deaf := p.deaf
		p.mu.Unlock()
		if deaf {
			continue
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

func (p *proxy) set(tr *trap) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trap, p.deaf = tr, false
}

// lead makes new connections go to another witness.
func (p *proxy) lead(w *witness.Witness) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.to = w.Addr().String()
}

// cut breaks all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// readable waits until the arbiter is reached again.
func readable(t *testing.T, a *etcd.Arbiter) (held protocol.Record) {
	t.Helper()
	require.Eventually(t, func() (ok bool) {
		var err error
		held, err = a.Read(t.Context())
		return err == nil
	}, patience, 10*time.Millisecond)
	return held
}

func TestASwapWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	w := start(t, t.TempDir(), "127.0.0.1:0")
	p := newProxy(t, w.Addr().String())
	a, direct := open(t, patience, p.Addr().String()), open(t, patience, w.Addr().String())
	readable(t, a)
	bid := solo(1, protocol.A, 7777777)
	tr := newTrap("7777777", true)
	p.set(tr)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	result := make(chan error)
	go func() {
		ok, held, err := a.Swap(ctx, bid)
		if ok || held != (protocol.Record{}) {
			err = fmt.Errorf("it answered %v %v without knowing", ok, held)
		}
		result <- err
	}()
	<-tr.sprung
	close(tr.pass)
	require.Eventually(t, func() bool {
		held, err := direct.Read(t.Context())
		return err == nil && held == bid
	}, patience, time.Millisecond, "it takes effect")
	cancel()
	require.ErrorIs(t, <-result, context.Canceled, "and its caller cannot know")

	// Asked again with the same nonce, it is recognised as what it was.
	close(tr.after)
	p.set(nil)
	p.cut()
	require.Equal(t, bid, readable(t, a))
	ok, held, err := a.Swap(t.Context(), bid)
	require.NoError(t, err)
	require.False(t, ok)
	require.Equal(t, bid, held)
}

func TestASwapThatTakesEffectAfterItsCallerGaveUp(t *testing.T) {
	t.Parallel()
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprintf("overtaken=%v", lost), func(t *testing.T) {
			w := start(t, t.TempDir(), "127.0.0.1:0")
			p := newProxy(t, w.Addr().String())
			a, direct := open(t, patience, p.Addr().String()), open(t, patience, w.Addr().String())
			readable(t, a)
			bid := solo(1, protocol.A, 7777777)
			tr := newTrap("7777777", false)
			p.set(tr)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := make(chan error)
			go func() {
				_, _, err := a.Swap(ctx, bid)
				result <- err
			}()
			<-tr.sprung
			cancel()
			require.ErrorIs(t, <-result, context.Canceled)
			held, err := direct.Read(t.Context())
			require.NoError(t, err)
			require.Zero(t, held, "it is still on its way")

			want := bid
			if lost {
				want = solo(1, protocol.B, 8)
				ok, _, err := direct.Swap(t.Context(), want)
				require.NoError(t, err)
				require.True(t, ok)
			}
			close(tr.pass)
			require.Eventually(t, func() bool {
				held, err := direct.Read(t.Context())
				return err == nil && held == want
			}, patience, time.Millisecond)
			close(tr.after)
			require.Equal(t, want, readable(t, a))
		})
	}
}

func TestASlowArbiter(t *testing.T) {
	t.Parallel()
	w := start(t, t.TempDir(), "127.0.0.1:0")
	p := newProxy(t, w.Addr().String())
	a := open(t, 200*time.Millisecond, p.Addr().String())
	readable(t, a)
	tr := newTrap("7777777", false)
	p.set(tr)
	ok, held, err := a.Swap(t.Context(), solo(1, protocol.A, 7777777))
	requireReason(t, arbiter.NoAnswer, err)
	require.False(t, ok)
	require.Zero(t, held)
	close(tr.pass)
	close(tr.after)
}

func TestConfigThatCannotWork(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		cfg    etcd.Config
		reason string
	}{
		{"no pair", etcd.Config{Endpoints: []string{"127.0.0.1:1"}}, arbiter.BadSpec},
		{"a pair that would be another's key", etcd.Config{Pair: "db/record/../x", Endpoints: []string{"127.0.0.1:1"}}, arbiter.BadSpec},
		{"no endpoint", etcd.Config{Pair: "db"}, arbiter.BadSpec},
		{"no port", etcd.Config{Pair: "db", Endpoints: []string{"127.0.0.1"}}, arbiter.BadSpec},
		{"another host without keys", etcd.Config{Pair: "db", Endpoints: []string{"192.0.2.1:2379"}}, arbiter.BadSpec},
		{"no keys", etcd.Config{Pair: "db", Endpoints: []string{"192.0.2.1:2379"}, Keys: t.TempDir()}, arbiter.BadKeys},
	} {
		_, err := etcd.Open(c.cfg)
		requireReason(t, c.reason, err)
	}
}
