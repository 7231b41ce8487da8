package user

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// maxDialing bounds the connections that the guest is opening.
	maxDialing = 256
	// maxTCP bounds all TCP connections, in both directions.
	maxTCP = 1024
	// maxUDP bounds the UDP exchanges, in both directions; a new one ends the one that was silent
	// for longest.
	maxUDP = 512
	// dialTimeout bounds the wait for the other end of a connection.
	dialTimeout = 30 * time.Second
	// udpIdle ends a UDP exchange (RFC 4787, 4.3 asks for two minutes or more).
	udpIdle = 2 * time.Minute
	// keepaliveIdle and keepaliveInterval are for the guest's end: a guest that was reset
	// has forgotten its connections and would never end them.
	keepaliveIdle     = 2 * time.Minute
	keepaliveInterval = 30 * time.Second
	// copySize is the size of a buffer between two sockets in bytes: what a segment of
	// the largest size holds, and every UDP datagram.
	copySize = 64 << 10
)

var copyBuffers = sync.Pool{New: func() any { return new([copySize]byte) }}

// outside returns where on the host's side a destination of the guest is; ok is false if
// it may not go there.
func (n *Network) outside(network string, id stack.TransportEndpointID) (to netip.AddrPort, ok bool) {
	if n.config.Restrict {
		return netip.AddrPort{}, false
	}
	a := netip.AddrFrom4(id.LocalAddress.As4())
	switch {
	case a == n.gateway:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), id.LocalPort), !n.config.NoHostLoopback
	case a == n.dns:
		// DNS over UDP has a socket of its own and does not get here.
		return n.resolvers()[0], network == "tcp" && id.LocalPort == DNSPort
	}
	return netip.AddrPortFrom(a, id.LocalPort), routable(a) && !n.config.Net.Contains(a)
}

// acceptTCP connects a guest's connection; it runs in a goroutine of its own.
func (n *Network) acceptTCP(r *tcp.ForwarderRequest) {
	if !n.begin() {
		r.Complete(false)
		return
	}
	defer n.tasks.Done()
	to, ok := n.outside("tcp", r.ID())
	if !ok || !n.addTCP() {
		r.Complete(true)
		return
	}
	defer n.removeTCP()
	// First outside, then within: the guest hears of a refusal as of its own.
	d := net.Dialer{Timeout: dialTimeout}
	hostConn, err := d.DialContext(n.ctx, "tcp", to.String())
	if err != nil {
		r.Complete(true)
		return
	}
	if !n.track(hostConn) {
		r.Complete(false)
		return
	}
	defer n.release(hostConn)
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	if terr != nil {
		r.Complete(true)
		return
	}
	r.Complete(false)
	setKeepalive(ep)
	guestConn := gonet.NewTCPConn(&wq, ep)
	if !n.track(guestConn) {
		return
	}
	defer n.release(guestConn)
	splice(guestConn, hostConn.(*net.TCPConn))
}

func setKeepalive(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(keepaliveIdle)
	interval := tcpip.KeepaliveIntervalOption(keepaliveInterval)
	// Both take any positive duration.
	_ = ep.SetSockOpt(&idle)
	_ = ep.SetSockOpt(&interval)
	ep.SocketOptions().SetKeepAlive(true)
}

func (n *Network) addTCP() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.tcpCount >= maxTCP {
		return false
	}
	n.tcpCount++
	return true
}

func (n *Network) removeTCP() {
	n.mu.Lock()
	n.tcpCount--
	n.mu.Unlock()
}

// stream is a TCP connection of either side.
type stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// splice copies between two connections until both directions have ended. The end of
// one direction is passed on and leaves the other open; an error ends both.
func splice(a, b stream) {
	var wg sync.WaitGroup
	pump := func(dst, src stream) {
		buf := copyBuffers.Get().(*[copySize]byte)
		defer copyBuffers.Put(buf)
		// Hidden, so that neither side's ReadFrom brings a buffer of its own.
		_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf[:])
		if err == nil {
			err = dst.CloseWrite()
		}
		if err != nil {
			a.Close()
			b.Close()
		}
	}
	wg.Go(func() { pump(a, b) })
	pump(b, a)
	wg.Wait()
}

// forward opens a port of the host.
func (n *Network) forward(f Forward) error {
	if a := f.Guest.Addr(); !a.IsValid() || a.IsUnspecified() {
		f.Guest = netip.AddrPortFrom(n.guest, f.Guest.Port())
	}
	if f.Proto == "udp" {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(f.Host))
		if err != nil {
			return err
		}
		if !n.track(c) {
			return net.ErrClosed
		}
		f.Host = c.LocalAddr().(*net.UDPAddr).AddrPort()
		n.forwards = append(n.forwards, f)
		n.spawn(func() { n.forwardUDP(c, f.Guest) })
		return nil
	}
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(f.Host))
	if err != nil {
		return err
	}
	if !n.track(l) {
		return net.ErrClosed
	}
	f.Host = l.Addr().(*net.TCPAddr).AddrPort()
	n.forwards = append(n.forwards, f)
	n.spawn(func() { n.forwardTCP(l, f.Guest) })
	return nil
}

// forwardTCP accepts connections until Close.
func (n *Network) forwardTCP(l *net.TCPListener, guest netip.AddrPort) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors, or a connection that ended already: wait for better times.
			select {
			case <-time.After(acceptPause):
			case <-n.ctx.Done():
			}
			continue
		}
		if !n.track(c) {
			return
		}
		if !n.addTCP() {
			n.release(c)
			continue
		}
		n.spawn(func() {
			defer n.removeTCP()
			defer n.release(c)
			n.connectGuest(c, guest)
		})
	}
}

// acceptPause is the wait after an accept that failed.
const acceptPause = 100 * time.Millisecond

func (n *Network) connectGuest(c *net.TCPConn, guest netip.AddrPort) {
	ctx, cancel := context.WithTimeout(n.ctx, dialTimeout)
	defer cancel()
	g, err := gonet.DialTCPWithBind(ctx, n.stack, n.stackAddr(netip.AddrPortFrom(n.gateway, 0)), n.stackAddr(guest), ipv4.ProtocolNumber)
	if err != nil {
		// A refusal, not an orderly end.
		_ = c.SetLinger(0)
		return
	}
	if !n.track(g) {
		return
	}
	defer n.release(g)
	splice(g, c)
}

// udpSession is one exchange of datagrams between an address of the guest and one of the host's side.
type udpSession struct {
	used atomic.Int64 // when it was last used, in nanoseconds since the session's start
	idle *time.Timer
	a, b io.Closer
	once sync.Once
	born time.Time
}

func (s *udpSession) touch() {
	s.used.Store(int64(time.Since(s.born)))
	s.idle.Reset(udpIdle)
}

// lastUsed is when the session was last used.
func (s *udpSession) lastUsed() time.Time { return s.born.Add(time.Duration(s.used.Load())) }

// addUDP makes a session of two sockets, which it takes over; nil after Close. The oldest makes room.
func (n *Network) addUDP(a, b io.Closer) *udpSession {
	s := &udpSession{a: a, b: b, born: time.Now()}
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		a.Close()
		b.Close()
		return nil
	}
	var oldest *udpSession
	if len(n.udp) >= maxUDP {
		for o := range n.udp {
			if oldest == nil || o.lastUsed().Before(oldest.lastUsed()) {
				oldest = o
			}
		}
		delete(n.udp, oldest)
	}
	s.idle = time.AfterFunc(udpIdle, func() { n.endUDP(s) })
	n.udp[s] = struct{}{}
	n.open[s] = struct{}{}
	n.mu.Unlock()
	if oldest != nil {
		n.endUDP(oldest)
	}
	return s
}

// Close ends the session's sockets, and with them its goroutines.
func (s *udpSession) Close() error {
	s.once.Do(func() {
		s.idle.Stop()
		s.a.Close()
		s.b.Close()
	})
	return nil
}

func (n *Network) endUDP(s *udpSession) {
	n.mu.Lock()
	delete(n.udp, s)
	n.mu.Unlock()
	n.release(s)
}

// acceptUDP begins an exchange with the guest's first datagram to an address; false has
// the stack answer that the port is unreachable.
func (n *Network) acceptUDP(r *udp.ForwarderRequest) bool {
	to, ok := n.outside("udp", r.ID())
	if !ok {
		return false
	}
	hostConn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return false
	}
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	if terr != nil {
		hostConn.Close()
		return true
	}
	guestConn := gonet.NewUDPConn(&wq, ep)
	s := n.addUDP(guestConn, hostConn)
	if s == nil {
		return true
	}
	n.spawn(func() { n.relayUDP(s, hostConn, guestConn) })
	n.spawn(func() { n.relayUDP(s, guestConn, hostConn) })
	return true
}

// relayUDP copies datagrams until the session ends.
func (n *Network) relayUDP(s *udpSession, dst io.Writer, src io.Reader) {
	defer n.endUDP(s)
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	for {
		k, err := src.Read(buf[:])
		if err != nil {
			// The host's socket tells that nobody listens: the exchange is over.
			return
		}
		s.touch()
		if _, err := dst.Write(buf[:k]); err != nil && errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

// forwardUDP makes a session for each sender to a forwarded port, until Close.
func (n *Network) forwardUDP(c *net.UDPConn, guest netip.AddrPort) {
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	// Of this goroutine alone. A session that has ended is found by its error.
	peers := map[netip.AddrPort]*gonet.UDPConn{}
	for {
		k, peer, err := c.ReadFromUDPAddrPort(buf[:])
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		if g := peers[peer]; g != nil {
			if _, err := g.Write(buf[:k]); err == nil {
				continue
			}
			delete(peers, peer)
		}
		if len(peers) >= maxUDP {
			clear(peers) // those that live are found again as new ones
		}
		local, remote := n.stackAddr(netip.AddrPortFrom(n.gateway, 0)), n.stackAddr(guest)
		g, err := gonet.DialUDP(n.stack, &local, &remote, ipv4.ProtocolNumber)
		if err != nil {
			continue
		}
		s := n.addUDP(g, io.NopCloser(nil))
		if s == nil {
			return
		}
		peers[peer] = g
		n.spawn(func() { n.relayUDP(s, &udpReply{c, peer}, g) })
		_, _ = g.Write(buf[:k])
	}
}

// udpReply writes to one peer of a shared socket.
type udpReply struct {
	c    *net.UDPConn
	peer netip.AddrPort
}

func (r *udpReply) Write(p []byte) (int, error) { return r.c.WriteToUDPAddrPort(p, r.peer) }
