package link

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// hosts are two network namespaces with cables between them: cable i joins 10.77.i.1 and 10.77.i.2.
type hosts struct {
	t      testing.TB
	spaces [2]netns.NsHandle
	nl     [2]*netlink.Handle
}

// newHosts makes the namespaces. They have no name: they end with their last descriptor, and the cables with them.
func newHosts(t testing.TB, cables int) *hosts {
	if os.Geteuid() != 0 {
		t.Skip("making a network namespace takes root")
	}
	h := &hosts{t: t}
	for i := range h.spaces {
		made := make(chan error)
		// On a thread of its own, which ends in the new namespace.
		go func() {
			runtime.LockOSThread()
			var err error
			h.spaces[i], err = netns.New()
			made <- err
		}()
		if err := <-made; err != nil {
			t.Skipf("no network namespace: %v", err)
		}
		t.Cleanup(func() { require.NoError(t, h.spaces[i].Close()) })
		var err error
		h.nl[i], err = netlink.NewHandleAt(h.spaces[i], unix.NETLINK_ROUTE)
		require.NoError(t, err)
		t.Cleanup(h.nl[i].Close)
	}
	for c := range cables {
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name(c)}, PeerName: name(c), PeerNamespace: netlink.NsFd(int(h.spaces[1]))}
		require.NoError(t, h.nl[0].LinkAdd(v))
		for i := range h.nl {
			a, err := netlink.ParseAddr(fmt.Sprintf("10.77.%d.%d/24", c, i+1))
			require.NoError(t, err)
			require.NoError(t, h.nl[i].AddrAdd(h.link(i, c), a))
			require.NoError(t, h.nl[i].LinkSetUp(h.link(i, c)))
		}
	}
	return h
}

func name(cable int) string { return fmt.Sprintf("cable%d", cable) }

func (h *hosts) link(host, cable int) netlink.Link {
	l, err := h.nl[host].LinkByName(name(cable))
	require.NoError(h.t, err)
	return l
}

// on calls f on a thread in a host's namespace.
func (h *hosts) on(host int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		if err := netns.Set(h.spaces[host]); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// cut takes a cable out, or puts it in again.
func (h *hosts) cut(cable int, out bool) {
	if out {
		require.NoError(h.t, h.nl[0].LinkSetDown(h.link(0, cable)))
		return
	}
	require.NoError(h.t, h.nl[0].LinkSetUp(h.link(0, cable)))
}

// mute drops what one host sends over a cable; the other direction works.
func (h *hosts) mute(host, cable int) {
	_, to, err := net.ParseCIDR(fmt.Sprintf("10.77.%d.%d/32", cable, 2-host))
	require.NoError(h.t, err)
	require.NoError(h.t, h.nl[host].RouteAdd(&netlink.Route{Dst: to, Type: unix.RTN_BLACKHOLE, Priority: 0}))
}

// pair begins a session: side a listens on host 0, side b dials from host 1.
func (h *hosts) pair(cables int, suspect, dead time.Duration) *wired {
	ka, kb := pairKeys(h.t, "db")
	w := &wired{ea: newEvents(), eb: newEvents()}
	var (
		lns []net.Listener
		to  []string
	)
	for c := range cables {
		require.NoError(h.t, h.on(0, func() error {
			ln, err := net.Listen("tcp4", fmt.Sprintf("10.77.%d.1:0", c))
			lns = append(lns, ln)
			return err
		}))
		to = append(to, lns[c].Addr().String())
	}
	var err error
	w.listener, err = NewListener(Config{Keys: ka, Event: w.ea.add, Suspect: suspect, Dead: dead}, lns...)
	require.NoError(h.t, err)
	h.t.Cleanup(func() { require.NoError(h.t, w.listener.Close()) })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	w.b, err = Dial(ctx, Config{Keys: kb, Event: w.eb.add, Suspect: suspect, Dead: dead, Dial: func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = h.on(1, func() error {
			c, err = (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp4", address)
			return err
		})
		return c, err
	}}, to...)
	require.NoError(h.t, err)
	h.t.Cleanup(func() { w.b.Close("end of test"); w.b.wg.Wait() })
	w.a, err = w.listener.Accept(ctx)
	require.NoError(h.t, err)
	h.t.Cleanup(func() { w.a.Close("end of test"); w.a.wg.Wait() })
	for c := range cables {
		w.eb.wait(h.t, "path up", func(v Event) bool { return v.Kind == EventPathUp && v.Path == c })
	}
	return w
}

func TestACutCableIsSuspectThenDeadOnBothSides(t *testing.T) {
	h := newHosts(t, 1)
	w := h.pair(1, DefaultSuspect, DefaultDead)
	w.a.Start(func(Class, []byte) {})
	h.cut(0, true)
	for _, e := range []*events{w.ea, w.eb} {
		require.GreaterOrEqual(t, e.kind(t, EventSuspect).Silence, DefaultSuspect)
		require.GreaterOrEqual(t, e.kind(t, EventDead).Silence, DefaultDead)
	}
	// What follows is for the protocol to decide: the session is still there, and goes on when the cable does.
	require.NoError(t, w.a.Err())
	require.NoError(t, w.b.Err())
	h.cut(0, false)
	w.ea.kind(t, EventAlive)
	w.eb.kind(t, EventAlive)
	// Closing does not wait for a peer that cannot be reached.
	h.cut(0, true)
	w.a.Close("bidding")
	require.Equal(t, Closed, ReasonOf(w.a.Err()))
}

func TestACableCutInOneDirectionIsDeadForWhoHearsNothing(t *testing.T) {
	h := newHosts(t, 1)
	w := h.pair(1, DefaultSuspect, DefaultDead)
	h.mute(0, 0)
	w.eb.kind(t, EventDead)
	require.NoError(t, w.b.Err())
}

func TestACableOfTwoIsCutUnderLoadAndNothingIsLost(t *testing.T) {
	h := newHosts(t, 2)
	w := h.pair(2, DefaultSuspect, DefaultDead)
	const n = 2000
	sinks := []*sink{newSink(n), newSink(n)}
	w.a.Start(sinks[0].take)
	w.b.Start(sinks[1].take)
	errs := make(chan error, 4)
	for _, s := range []*Session{w.a, w.b} {
		for c := range Class(classes) {
			go func() { errs <- pump(s, c, n) }()
		}
	}
	// The one that the log goes over.
	cable := 0
	if w.b.Paths()[1].Log {
		cable = 1
	}
	h.cut(cable, true)
	lost := func(v Event) bool { return v.Kind == EventPathLost && v.Path == cable && v.Reason == Silent }
	w.ea.wait(t, "silent path", lost)
	w.eb.wait(t, "silent path", lost)
	for _, k := range sinks {
		k.wait(t, Log)
		k.wait(t, Bulk)
	}
	for range 4 {
		require.NoError(t, <-errs)
	}
	// The path is taken up again when its cable is there.
	w.eb.forget()
	h.cut(cable, false)
	w.eb.wait(t, "path up", func(v Event) bool { return v.Kind == EventPathUp && v.Path == cable })
	require.NoError(t, w.a.Err())
	require.NoError(t, w.b.Err())
}
