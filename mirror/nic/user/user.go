package user

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdnet "net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	vnet "github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/mirror/nic/user/tftp"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// nicID is the stack's name for its only interface.
const nicID tcpip.NICID = 1

// tftpHeaders are the bytes of a packet before a block's data: IPv4's, UDP's and TFTP's.
const tftpHeaders = header.IPv4MinimumSize + header.UDPMinimumSize + 4

// offloads is what the network does for the guest: the stack takes what is large or lacks
// a checksum as it is.
const offloads = vnet.TxChecksum | vnet.TxTSO4 | vnet.RxChecksum | vnet.RxTSO4

// Network is a user network; it implements [backend.NIC].
type Network struct {
	config    Config
	gateway   netip.Addr
	dns       netip.Addr
	guest     netip.Addr // of the first lease
	broadcast netip.Addr

	link     *link
	stack    *stack.Stack
	tftpRoot *os.Root // nil without TFTP
	forwards []Forward
	accepted atomic.Uint32 // [vnet.Offloads] that the guest takes

	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	tasks    sync.WaitGroup // all goroutines but that of reception
	received sync.WaitGroup // that of reception

	// tx lets one frame in at a time, and none after Close.
	tx   sync.Mutex
	dhcp dhcpServer
	down bool

	mu       sync.Mutex // guards what follows
	closed   bool
	open     map[io.Closer]struct{} // what Close has to close
	tcpCount int
	udp      map[*udpSession]struct{}
}

// New makes a network. Host ports that are forwarded are open when it returns. Errors are
// of type [*mirror.Error].
func New(c Config) (*Network, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c.Net = c.net()
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &Network{
		config:    c,
		gateway:   host(c.Net, gatewayHost),
		dns:       host(c.Net, dnsHost),
		guest:     host(c.Net, firstLeaseHost),
		broadcast: broadcast(c.Net),
		ctx:       ctx,
		cancel:    cancel,
		open:      map[io.Closer]struct{}{},
		udp:       map[*udpSession]struct{}{},
	}
	g := n.gateway.As4()
	n.link = &link{
		// Locally administered, and different for different gateways.
		mac:       macAddr{0x52, 0x55, g[0], g[1], g[2], g[3]},
		mtu:       uint32(c.MTU),
		rx:        make(chan []byte, rxQueue),
		neighbors: map[netip.Addr]macAddr{},
		self:      n.gateway,
	}
	n.dhcp = newDHCPServer(n)
	if err := n.start(); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

func (n *Network) start() error {
	if n.config.TFTP != "" {
		root, err := os.OpenRoot(n.config.TFTP)
		if err != nil {
			return mirror.Errorf("tftp-directory", "Name a directory that this user may read.", "user network: TFTP directory %s: %w", n.config.TFTP, err)
		}
		n.tftpRoot = root
	}
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := n.configureStack(); err != nil {
		return mirror.Errorf("user-net-stack", "Report this as a defect.", "user network: %s", err)
	}
	if !n.config.Restrict {
		if err := n.serveUDP(n.dns, DNSPort, n.relayDNS); err != nil {
			return err
		}
	}
	if n.tftpRoot != nil {
		if err := n.serveUDP(n.gateway, tftpPort, n.serveTFTP); err != nil {
			return err
		}
	}
	for _, f := range n.config.Forwards {
		if err := n.forward(f); err != nil {
			return mirror.Errorf("hostfwd-listen", "Choose a port that is free and, without privilege, above 1023.", "port forwarding %v: %w", f, err)
		}
	}
	return nil
}

func (n *Network) configureStack() tcpip.Error {
	s := n.stack
	if err := s.CreateNIC(nicID, n.link); err != nil {
		return err
	}
	for _, a := range []netip.Addr{n.gateway, n.dns} {
		addr := tcpip.ProtocolAddress{
			Protocol:          ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(a), PrefixLen: n.config.Net.Bits()},
		}
		if err := s.AddProtocolAddress(nicID, addr, stack.AddressProperties{}); err != nil {
			return err
		}
	}
	// All addresses outside are here: packets to them are ours, and ours come from them.
	if err := s.SetPromiscuousMode(nicID, true); err != nil {
		return err
	}
	if err := s.SetSpoofing(nicID, true); err != nil {
		return err
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}})
	sack := tcpip.TCPSACKEnabled(true)
	if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, &sack); err != nil {
		return err
	}
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, &moderate); err != nil {
		return err
	}
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s, 0, maxDialing, n.acceptTCP).HandlePacket)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(s, n.acceptUDP).HandlePacket)
	return nil
}

// serveUDP has serve read from a socket of ours until Close.
func (n *Network) serveUDP(a netip.Addr, port uint16, serve func(*gonet.UDPConn)) error {
	local := n.stackAddr(netip.AddrPortFrom(a, port))
	c, err := gonet.DialUDP(n.stack, &local, nil, ipv4.ProtocolNumber)
	if err != nil {
		return mirror.Errorf("user-net-stack", "Report this as a defect.", "user network: listen on %v:%d: %w", a, port, err)
	}
	if !n.track(c) {
		return stdnet.ErrClosed
	}
	n.spawn(func() { serve(c) })
	return nil
}

func (n *Network) stackAddr(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: toStack(a.Addr()), Port: a.Port()}
}

// spawn runs f in a goroutine that Close waits for; it reports false, and does not, after Close.
func (n *Network) spawn(f func()) bool {
	if !n.begin() {
		return false
	}
	go func() {
		defer n.tasks.Done()
		f()
	}()
	return true
}

// begin counts the calling goroutine as one that Close waits for, until tasks.Done.
func (n *Network) begin() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.tasks.Add(1)
	return true
}

// track has Close close c; after Close it does so at once and reports false.
func (n *Network) track(c io.Closer) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		c.Close()
		return false
	}
	n.open[c] = struct{}{}
	return true
}

// release closes what was tracked.
func (n *Network) release(c io.Closer) {
	n.mu.Lock()
	delete(n.open, c)
	n.mu.Unlock()
	c.Close()
}

// serveTFTP serves files until Close.
func (n *Network) serveTFTP(c *gonet.UDPConn) {
	s := tftp.Server{
		Root:     n.tftpRoot,
		MaxBlock: n.config.MTU - tftpHeaders,
		Dial: func(client netip.AddrPort) (stdnet.Conn, error) {
			local, remote := n.stackAddr(netip.AddrPortFrom(n.gateway, 0)), n.stackAddr(client)
			return gonet.DialUDP(n.stack, &local, &remote, ipv4.ProtocolNumber)
		},
	}
	_ = s.Serve(c) // it ends when Close closes c
}

// Forwards returns the forwarded ports, with the host ports that are really open.
func (n *Network) Forwards() []Forward { return append([]Forward(nil), n.forwards...) }

// Dropped returns how many frames to the guest were lost because it did not keep up or its
// station is not known.
func (n *Network) Dropped() uint64 { return n.link.drops.Load() }

// Offloads implements [backend.NIC].
func (*Network) Offloads() vnet.Offloads { return offloads }

// SetOffloads implements [backend.NIC].
func (n *Network) SetOffloads(o vnet.Offloads) { n.accepted.Store(uint32(o)) }

// Start implements [backend.NIC]. The carrier never changes.
func (n *Network) Start(deliver func([]byte), _ func(bool)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return
	}
	n.received.Add(1)
	go func() {
		defer n.received.Done()
		emit := func(f []byte) {
			if n.ctx.Err() != nil {
				backend.PutFrame(f)
				return
			}
			deliver(f)
		}
		for {
			select {
			case f := <-n.link.rx:
				finish(f, vnet.Offloads(n.accepted.Load()), emit)
			case <-n.ctx.Done():
				return
			}
		}
	}()
}

// Transmit implements [backend.NIC].
func (n *Network) Transmit(frame []byte) {
	n.tx.Lock()
	defer n.tx.Unlock()
	if n.down || len(frame) < packetAt || len(frame) > vnet.MaxFrame {
		return
	}
	eth := header.Ethernet(frame[etherAt:])
	src, dst := macAddr(eth[6:12]), macAddr(eth[:6])
	if src[0]&1 != 0 || dst != n.link.mac && dst != broadcastMAC {
		return
	}
	switch eth.Type() {
	case header.ARPProtocolNumber:
		n.handleARP(src, frame[packetAt:])
	case header.IPv4ProtocolNumber:
		n.handleIPv4(src, frame[packetAt:])
	}
}

func (n *Network) handleARP(src macAddr, packet []byte) {
	a := header.ARP(packet)
	if !a.IsValid() {
		return
	}
	sender := netip.AddrFrom4([4]byte(a.ProtocolAddressSender()))
	target := netip.AddrFrom4([4]byte(a.ProtocolAddressTarget()))
	n.learn(sender, macAddr(a.HardwareAddressSender()))
	if a.Op() == header.ARPRequest && (target == n.gateway || target == n.dns) {
		n.link.send(n.link.arp(header.ARPReply, src, macAddr(a.HardwareAddressSender()), sender, target))
	}
}

// learn notes an address of the guest.
func (n *Network) learn(a netip.Addr, m macAddr) {
	if m[0]&1 == 0 && n.isGuest(a) {
		n.link.learn(a, m)
	}
}

// isGuest reports whether a guest may have an address: in the network, and nobody else's.
func (n *Network) isGuest(a netip.Addr) bool {
	return n.config.Net.Contains(a) && a != n.config.Net.Addr() && a != n.gateway && a != n.dns && a != n.broadcast
}

// handleIPv4 lets through to the stack what a router would take from this network.
func (n *Network) handleIPv4(src macAddr, packet []byte) {
	ip := header.IPv4(packet)
	if !ip.IsValid(len(packet)) {
		return
	}
	packet = packet[:ip.TotalLength()]
	from := netip.AddrFrom4(ip.SourceAddress().As4())
	to := netip.AddrFrom4(ip.DestinationAddress().As4())
	if to == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || to == n.broadcast || to == n.gateway {
		if n.handleDHCP(src, from, ip) || to != n.gateway {
			return
		}
	}
	if !n.isGuest(from) {
		return
	}
	n.link.learn(from, src)
	switch proto := ip.TransportProtocol(); {
	case to == n.gateway || to == n.dns:
	case n.config.Net.Contains(to) || !routable(to):
		return
	case proto != header.TCPProtocolNumber && proto != header.UDPProtocolNumber:
		// The stack has every address and would answer a ping of any.
		return
	}
	n.link.inject(packet)
}

// Close implements [backend.NIC]: it ends all connections. A deliver that blocks must be let go first.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	open := n.open
	n.open = nil
	n.mu.Unlock()

	n.cancel()
	n.tx.Lock()
	n.down = true
	n.tx.Unlock()
	var errs []error
	for c := range open {
		if err := c.Close(); err != nil && !errors.Is(err, stdnet.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if n.stack != nil {
		n.stack.Close()
	}
	n.tasks.Wait()
	if n.stack != nil {
		n.stack.Destroy()
	}
	n.received.Wait()
	for {
		select {
		case f := <-n.link.rx:
			backend.PutFrame(f)
			continue
		default:
		}
		break
	}
	if n.tftpRoot != nil {
		errs = append(errs, n.tftpRoot.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close user network: %w", err)
	}
	return nil
}

var _ backend.NIC = (*Network)(nil)
