package user

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	vnet "github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var guestMAC = macAddr{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}

var (
	gatewayIP = netip.MustParseAddr("10.0.2.2")
	dnsIP     = netip.MustParseAddr("10.0.2.3")
	guestIP   = netip.MustParseAddr("10.0.2.15")
)

// patience bounds waits that end long before it when all is well.
const patience = 30 * time.Second

// guest is a machine on a user network: a TCP/IP stack of its own.
type guest struct {
	t       *testing.T
	n       *Network
	s       *stack.Stack
	ep      *channel.Endpoint
	largest int // bytes of the largest frame received
	partial int // frames with a partial checksum
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	mu      sync.Mutex
}

// newGuest starts a guest on a network with the given configuration. Frames from the guest
// carry checksums or not, as a driver's do.
func newGuest(t *testing.T, c Config, accept vnet.Offloads) *guest {
	n, err := New(c)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	g := &guest{t: t, n: n, ep: channel.New(1024, 1514, tcpip.LinkAddress(guestMAC[:])), cancel: cancel}
	// The stack under test leaves the checksums that the guest accepts to it: so does this one
	// not verify them, but the frames are checked below.
	g.ep.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	g.s = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	require.Nil(t, g.s.CreateNIC(1, ethernet.New(g.ep)))
	require.Nil(t, g.s.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(guestIP), PrefixLen: 24},
	}, stack.AddressProperties{}))
	subnet, _ := tcpip.NewSubnet(toStack(netip.MustParseAddr("10.0.2.0")), tcpip.MaskFromBytes([]byte{255, 255, 255, 0}))
	g.s.SetRouteTable([]tcpip.Route{
		{Destination: subnet, NIC: 1},
		{Destination: header.IPv4EmptySubnet, Gateway: toStack(gatewayIP), NIC: 1},
	})
	n.SetOffloads(accept)
	n.Start(func(f []byte) {
		g.mu.Lock()
		g.largest = max(g.largest, len(f))
		if f[hdrFlags] == flagNeedsCsum {
			g.partial++
		}
		g.mu.Unlock()
		checkFrame(t, f, accept)
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(f[etherAt:])})
		g.ep.InjectInbound(0, pkt)
		pkt.DecRef()
		backend.PutFrame(f)
	}, func(bool) { t.Error("the carrier never changes") })
	g.wg.Go(func() {
		for {
			pkt := g.ep.ReadContext(ctx)
			if pkt == nil {
				return
			}
			f := make([]byte, vnet.HeaderSize, vnet.HeaderSize+pkt.Size())
			for _, s := range pkt.AsSlices() {
				f = append(f, s...)
			}
			pkt.DecRef()
			n.Transmit(f)
		}
	})
	t.Cleanup(g.close)
	return g
}

func (g *guest) close() {
	require.NoError(g.t, g.n.Close())
	require.NoError(g.t, g.n.Close(), "closing twice is harmless")
	g.s.Close()
	g.cancel()
	g.wg.Wait()
	g.s.Destroy()
}

// checkFrame claims what holds for every frame to a guest that accepts these offloads.
func checkFrame(t *testing.T, f []byte, accept vnet.Offloads) {
	if len(f) < packetAt || binary.LittleEndian.Uint16(f[hdrNumBuffers:]) != 1 {
		t.Errorf("malformed frame % x", f)
		return
	}
	if f[hdrFlags] != 0 && accept&vnet.RxChecksum == 0 || f[hdrGSOType] != 0 && accept&vnet.RxTSO4 == 0 {
		t.Errorf("header % x offers more than was accepted", f[:vnet.HeaderSize])
	}
	if f[hdrGSOType] == 0 && len(f) > packetAt+DefaultMTU {
		t.Errorf("frame of %d bytes", len(f))
	}
	if header.Ethernet(f[etherAt:]).Type() != header.IPv4ProtocolNumber {
		return
	}
	ip := header.IPv4(f[packetAt:])
	if !ip.IsValid(len(ip)) || !ip.IsChecksumValid() {
		t.Errorf("bad IPv4 header % x", ip[:20])
	}
	if ip.TransportProtocol() == header.TCPProtocolNumber && f[hdrFlags]&flagNeedsCsum == 0 {
		seg := header.TCP(ip.Payload())
		data := seg.Payload()
		sum := uint32(0)
		for i := range data {
			sum += uint32(data[i]) << (8 * (1 - i&1))
		}
		for sum>>16 != 0 {
			sum = sum&0xffff + sum>>16
		}
		if !seg.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), uint16(sum), uint16(len(data))) {
			t.Error("bad TCP checksum")
		}
	}
}

func (g *guest) dialTCP(to string) (*gonet.TCPConn, error) {
	ap := netip.MustParseAddrPort(to)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.s, full(ap), ipv4.ProtocolNumber)
}

func (g *guest) dialUDP(to string) *gonet.UDPConn {
	a := full(netip.MustParseAddrPort(to))
	c, err := gonet.DialUDP(g.s, nil, &a, ipv4.ProtocolNumber)
	require.NoError(g.t, err)
	require.NoError(g.t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

func full(ap netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: toStack(ap.Addr()), Port: ap.Port()}
}

// echoTCP serves on the host's loopback: it returns what it gets, until the sender's end.
func echoTCP(t *testing.T) netip.AddrPort {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func echoUDP(t *testing.T) netip.AddrPort {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(bytes.ToUpper(buf[:n]), from)
		}
	})
	t.Cleanup(func() { c.Close(); wg.Wait() })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestTCPThroughTheGatewayReachesTheHostsLoopback(t *testing.T) {
	for name, accept := range map[string]vnet.Offloads{
		"no offload":       0,
		"checksums":        vnet.RxChecksum,
		"segments as well": vnet.RxChecksum | vnet.RxTSO4,
	} {
		t.Run(name, func(t *testing.T) {
			server := echoTCP(t)
			g := newGuest(t, Config{}, accept)
			c, err := g.dialTCP(fmt.Sprintf("%v:%d", gatewayIP, server.Port()))
			require.NoError(t, err)
			defer c.Close()
			data := make([]byte, 3<<20)
			rng := rand.NewChaCha8([32]byte{1})
			_, _ = rng.Read(data)
			var wg sync.WaitGroup
			wg.Go(func() {
				_, err := c.Write(data)
				if err == nil {
					err = c.CloseWrite()
				}
				if err != nil {
					t.Error(err)
				}
			})
			require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
			got, err := io.ReadAll(c)
			wg.Wait()
			require.NoError(t, err)
			require.Equal(t, sha256.Sum256(data), sha256.Sum256(got), "the end of the sender's direction leaves the other one open")
			g.mu.Lock()
			defer g.mu.Unlock()
			if accept&vnet.RxTSO4 != 0 {
				require.Greater(t, g.largest, 2*DefaultMTU, "large segments were handed on")
			}
			require.Equal(t, accept&vnet.RxChecksum != 0, g.partial > 0)
		})
	}
}

func TestRefusedConnectionsAreRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	server := echoTCP(t)
	for name, tc := range map[string]struct {
		c  Config
		to string
	}{
		"nobody listens":         {Config{}, fmt.Sprintf("10.0.2.2:%d", port)},
		"loopback is off":        {Config{NoHostLoopback: true}, fmt.Sprintf("10.0.2.2:%d", server.Port())},
		"restricted":             {Config{Restrict: true}, fmt.Sprintf("10.0.2.2:%d", server.Port())},
		"no service at the name": {Config{}, fmt.Sprintf("10.0.2.3:%d", server.Port())},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, tc.c, 0)
			_, err := g.dialTCP(tc.to)
			require.ErrorContains(t, err, "refused")
		})
	}
}

func TestAddressesThatNoRouterForwardsAreNotReached(t *testing.T) {
	n := &Network{config: Config{Net: DefaultNet}, gateway: gatewayIP, dns: dnsIP}
	for to, want := range map[string]bool{
		"10.0.2.2": true, "192.0.2.1": true, "10.0.3.1": true,
		"127.0.0.1": false, "127.1.2.3": false, "0.0.0.0": false, "0.1.2.3": false,
		"169.254.169.254": false, "224.0.0.1": false, "240.0.0.1": false, "255.255.255.255": false,
		"10.0.2.77": false,
	} {
		_, ok := n.outside("tcp", stack.TransportEndpointID{LocalAddress: toStack(netip.MustParseAddr(to)), LocalPort: 80})
		require.Equal(t, want, ok, to)
	}
}

func TestUDPThroughTheGateway(t *testing.T) {
	server := echoUDP(t)
	g := newGuest(t, Config{}, 0)
	c := g.dialUDP(fmt.Sprintf("%v:%d", gatewayIP, server.Port()))
	defer c.Close()
	buf := make([]byte, 65536)
	for _, size := range []int{1, 1400, 9000} { // the last in fragments
		_, err := c.Write(bytes.Repeat([]byte("a"), size))
		require.NoError(t, err)
		n, err := c.Read(buf)
		require.NoError(t, err)
		require.Equal(t, strings.Repeat("A", size), string(buf[:n]))
	}
}

func TestForwardedPortsLeadIntoTheGuest(t *testing.T) {
	tcpFwd, err := ParseForward("tcp:127.0.0.1:0-:22")
	require.NoError(t, err)
	udpFwd, err := ParseForward("udp::0-10.0.2.15:53")
	require.NoError(t, err)
	g := newGuest(t, Config{Forwards: []Forward{tcpFwd, udpFwd}, Restrict: true}, 0)
	open := g.n.Forwards()
	require.Len(t, open, 2)
	require.NotZero(t, open[0].Host.Port())

	l, err := gonet.ListenTCP(g.s, full(netip.AddrPortFrom(guestIP, 22)), ipv4.ProtocolNumber)
	require.NoError(t, err)
	defer l.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		if from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); from != gatewayIP {
			t.Errorf("the connection comes from %v", from)
		}
		_, _ = io.Copy(c, c)
	})
	c, err := net.Dial("tcp", open[0].Host.String())
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = c.Write([]byte("ping"))
	require.NoError(t, err)
	require.NoError(t, c.(*net.TCPConn).CloseWrite())
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	require.Equal(t, "ping", string(got))
	wg.Wait()

	local := full(netip.AddrPortFrom(guestIP, 53))
	u, err := gonet.DialUDP(g.s, &local, nil, ipv4.ProtocolNumber)
	require.NoError(t, err)
	defer u.Close()
	wg.Go(func() {
		buf := make([]byte, 100)
		for range 2 {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = u.WriteTo(bytes.ToUpper(buf[:n]), from)
		}
	})
	uc, err := net.Dial("udp", open[1].Host.String())
	require.NoError(t, err)
	defer uc.Close()
	require.NoError(t, uc.SetDeadline(time.Now().Add(patience)))
	buf := make([]byte, 100)
	for _, text := range []string{"one", "two"} {
		_, err = uc.Write([]byte(text))
		require.NoError(t, err)
		n, err := uc.Read(buf)
		require.NoError(t, err)
		require.Equal(t, strings.ToUpper(text), string(buf[:n]))
	}
	wg.Wait()
}

func TestCloseEndsConnectionsInEveryState(t *testing.T) {
	server := echoTCP(t)
	fwd, err := ParseForward("tcp:127.0.0.1:0-10.0.2.99:9")
	require.NoError(t, err)
	g := newGuest(t, Config{Forwards: []Forward{fwd}}, 0)
	c, err := g.dialTCP(fmt.Sprintf("%v:%d", gatewayIP, server.Port()))
	require.NoError(t, err)
	defer c.Close()
	// One to a station that does not exist: its handshake is under way when the network goes.
	silent := net.JoinHostPort("127.0.0.1", fmt.Sprint(g.n.Forwards()[0].Host.Port()))
	hc, err := net.Dial("tcp", silent)
	require.NoError(t, err)
	defer hc.Close()
	// And one that the guest has begun and does not finish.
	syn := tcpSYN(t, netip.AddrPortFrom(guestIP, 4000), netip.AddrPortFrom(gatewayIP, server.Port()))
	g.n.Transmit(syn)
	require.NoError(t, g.n.Close())
	require.NoError(t, hc.SetReadDeadline(time.Now().Add(patience)))
	_, err = hc.Read(make([]byte, 1))
	require.Error(t, err)
	g.n.Transmit(syn)
}

// tcpSYN is the first segment of a connection from the guest.
func tcpSYN(t *testing.T, from, to netip.AddrPort) []byte {
	f := newFrame(macAddr{0x52, 0x55, 10, 0, 2, 2}, guestMAC, uint16(header.IPv4ProtocolNumber), 40)
	ip := header.IPv4(f[packetAt:])
	ip.Encode(&header.IPv4Fields{TotalLength: 40, TTL: 64, Protocol: 6, SrcAddr: toStack(from.Addr()), DstAddr: toStack(to.Addr())})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.TCP(ip[20:]).Encode(&header.TCPFields{SrcPort: from.Port(), DstPort: to.Port(), DataOffset: 20, Flags: header.TCPFlagSyn, WindowSize: 1000})
	return f
}

func TestDNSIsRelayed(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	ready := make(chan struct{})
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(ready) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		rr, _ := dns.NewRR(q.Question[0].Name + " 60 IN A 192.0.2.7")
		m.Answer = append(m.Answer, rr)
		_ = w.WriteMsg(m)
	})}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.ActivateAndServe() })
	<-ready
	t.Cleanup(func() { _ = srv.Shutdown(); wg.Wait() })

	// The first resolver is a port that nobody listens on: the second one is asked.
	dead, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	deadAddr := dead.LocalAddr().(*net.UDPAddr).AddrPort()
	dead.Close()
	g := newGuest(t, Config{Resolvers: []netip.AddrPort{deadAddr, pc.LocalAddr().(*net.UDPAddr).AddrPort()}}, 0)
	c := g.dialUDP("10.0.2.3:53")
	defer c.Close()
	q := new(dns.Msg).SetQuestion("guest.example.", dns.TypeA)
	wire, err := q.Pack()
	require.NoError(t, err)
	_, err = c.Write(wire)
	require.NoError(t, err)
	buf := make([]byte, 1500)
	n, err := c.Read(buf)
	require.NoError(t, err)
	var a dns.Msg
	require.NoError(t, a.Unpack(buf[:n]))
	require.Equal(t, q.Id, a.Id)
	require.Equal(t, "192.0.2.7", a.Answer[0].(*dns.A).A.String())
}

func TestParseResolvConf(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "[]",
		"nameserver 192.0.2.1":    "[192.0.2.1:53]",
		"# c\nnameserver\t::1 \n": "[[::1]:53]",
		"nameserver x\nnameserver fe80::1%eth0\nsearch a\n": "[[fe80::1%eth0]:53]",
		"nameserverx 192.0.2.1\n options edns0":             "[]",
		strings.Repeat("nameserver 192.0.2.1\n", 100):       "[" + strings.TrimSpace(strings.Repeat("192.0.2.1:53 ", MaxResolvers)) + "]",
	} {
		require.Equal(t, want, fmt.Sprint(parseResolvConf(text)), "%q", text)
	}
}

func TestTFTPServesFilesBelowItsDirectory(t *testing.T) {
	dir := t.TempDir()
	pub := filepath.Join(dir, "pub")
	require.NoError(t, os.MkdirAll(filepath.Join(pub, "boot"), 0o755))
	big := make([]byte, 200_000)
	rng := rand.NewChaCha8([32]byte{2})
	_, _ = rng.Read(big)
	require.NoError(t, os.WriteFile(filepath.Join(pub, "boot", "kernel"), big, 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(pub, "exact"), big[:1024], 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(pub, "empty"), nil, 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o644))
	require.NoError(t, os.Symlink("../secret", filepath.Join(pub, "link")))
	g := newGuest(t, Config{TFTP: pub, Restrict: true}, 0)

	for _, tc := range []struct {
		name    string
		options []string
		want    []byte
		oack    string
		err     string
	}{
		{name: "exact", want: big[:1024]},
		{name: "empty", want: nil},
		{name: "/boot/kernel", options: []string{"BLKSIZE", "1400", "tsize", "0"}, want: big, oack: "blksize=1400 tsize=200000 "},
		{name: `\boot\kernel`, options: []string{"blksize", "65464", "unknown", "1"}, want: big, oack: "blksize=1468 "},
		{name: "exact", options: []string{"blksize", "7", "timeout", "0"}, want: big[:1024]},
		{name: "exact", options: []string{"timeout", "3"}, want: big[:1024], oack: "timeout=3 "},
		{name: "nothing", err: "no such file"},
		{name: "boot", err: "cannot be read"},
		{name: "../secret", err: "no such file"},
		{name: "link", err: "cannot be read"},
		{name: "/", err: "no such file"},
	} {
		t.Run(strings.NewReplacer("/", "_", `\`, "_").Replace(tc.name), func(t *testing.T) {
			got, oack, err := tftpGet(g, tc.name, "octet", tc.options...)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.oack, oack)
			require.True(t, bytes.Equal(tc.want, got), "%d bytes", len(got))
		})
	}
	_, _, err := tftpGet(g, "exact", "netascii")
	require.ErrorContains(t, err, "octet")

	local := full(netip.AddrPortFrom(guestIP, 2000))
	c, err := gonet.DialUDP(g.s, &local, nil, ipv4.ProtocolNumber)
	require.NoError(t, err)
	defer c.Close()
	_, err = c.WriteTo([]byte("\x00\x02exact\x00octet\x00"), &net.UDPAddr{IP: gatewayIP.AsSlice(), Port: 69})
	require.NoError(t, err)
	require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 600)
	n, _, err := c.ReadFrom(buf)
	require.NoError(t, err)
	require.Equal(t, "\x00\x05\x00\x02this server is read-only\x00", string(buf[:n]))
}

// tftpGet is a client. It acknowledges each block twice now and then, which must not
// double the transfer.
func tftpGet(g *guest, name, mode string, options ...string) (data []byte, oack string, err error) {
	c, err := gonet.DialUDP(g.s, &tcpip.FullAddress{NIC: 1, Addr: toStack(guestIP)}, nil, ipv4.ProtocolNumber)
	if err != nil {
		return nil, "", err
	}
	defer c.Close()
	req := "\x00\x01" + name + "\x00" + mode + "\x00"
	for _, o := range options {
		req += o + "\x00"
	}
	if _, err := c.WriteTo([]byte(req), &net.UDPAddr{IP: gatewayIP.AsSlice(), Port: 69}); err != nil {
		return nil, "", err
	}
	const opData, opError, opOAck = 3, 5, 6
	buf := make([]byte, 65536)
	block, next := 512, uint16(1)
	for {
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return nil, "", err
		}
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return nil, "", err
		}
		number := binary.BigEndian.Uint16(buf[2:])
		switch binary.BigEndian.Uint16(buf) {
		case opError:
			return nil, "", fmt.Errorf("%s", buf[4:n-1])
		case opOAck:
			words := strings.Split(string(buf[2:n-1]), "\x00")
			for i := 0; i+1 < len(words); i += 2 {
				oack += words[i] + "=" + words[i+1] + " "
				if words[i] == "blksize" {
					_, _ = fmt.Sscan(words[i+1], &block)
				}
			}
			if _, err := c.WriteTo([]byte{0, 4, 0, 0}, from); err != nil {
				return nil, "", err
			}
		case opData:
			if number == next {
				data = append(data, buf[4:n]...)
				next++
			}
			ack := []byte{0, 4, buf[2], buf[3]}
			for range 1 + number%2 {
				if _, err := c.WriteTo(ack, from); err != nil {
					return nil, "", err
				}
			}
			if n-4 < block {
				return data, oack, nil
			}
		}
	}
}

// bare is a network without a stack at its other end: the test makes the frames.
type bare struct {
	*Network
	rx chan []byte
}

func newBare(t testing.TB, c Config) *bare {
	n, err := New(c)
	require.NoError(t, err)
	b := &bare{n, make(chan []byte, 2*rxQueue)}
	n.Start(func(f []byte) {
		select {
		case b.rx <- bytes.Clone(f):
		default:
		}
		backend.PutFrame(f)
	}, nil)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	return b
}

func (b *bare) next(t *testing.T) []byte {
	select {
	case f := <-b.rx:
		return f
	case <-time.After(patience):
		require.Fail(t, "no frame")
		return nil
	}
}

func dhcpFrame(from, to netip.Addr, m *dhcpv4.DHCPv4) []byte {
	return newUDPFrame(broadcastMAC, guestMAC, netip.AddrPortFrom(to, 67), netip.AddrPortFrom(from, 68), m.ToBytes())
}

// ask sends a DHCP message and returns the reply and the station that it was sent to.
func (b *bare) ask(t *testing.T, m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, macAddr, netip.Addr) {
	b.Transmit(dhcpFrame(netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), m))
	f := b.next(t)
	checkFrame(t, f, 0)
	ip := header.IPv4(f[packetAt:])
	r, err := dhcpv4.FromBytes(header.UDP(ip.Payload()).Payload())
	require.NoError(t, err)
	return r, macAddr(f[etherAt : etherAt+6]), netip.AddrFrom4(ip.DestinationAddress().As4())
}

func TestDHCP(t *testing.T) {
	b := newBare(t, Config{BootFile: "boot.ipxe", Hostname: "vm", Domain: "example.org", MTU: 1400})
	discover, err := dhcpv4.NewDiscovery(guestMAC[:])
	require.NoError(t, err)
	offer, station, to := b.ask(t, discover)
	require.Equal(t, dhcpv4.MessageTypeOffer, offer.MessageType())
	require.Equal(t, "10.0.2.15", offer.YourIPAddr.String())
	require.Equal(t, guestMAC, station)
	require.Equal(t, guestIP, to)
	require.Equal(t, "boot.ipxe", offer.BootFileName)
	require.Equal(t, "boot.ipxe", offer.BootFileNameOption())
	require.Equal(t, "10.0.2.2", offer.ServerIPAddr.String())
	require.Equal(t, "10.0.2.2", offer.TFTPServerName())
	require.Equal(t, "[10.0.2.2]", fmt.Sprint(offer.Router()))
	require.Equal(t, "[10.0.2.3]", fmt.Sprint(offer.DNS()))
	require.Equal(t, "vm", offer.HostName())
	require.Equal(t, "example.org", offer.DomainName())
	require.Equal(t, []byte{0x05, 0x78}, offer.Options.Get(dhcpv4.OptionInterfaceMTU))
	require.Equal(t, leaseTime, offer.IPAddressLeaseTime(0))

	discover.SetBroadcast()
	_, station, to = b.ask(t, discover)
	require.Equal(t, broadcastMAC, station)
	require.Equal(t, "255.255.255.255", to.String())

	request, err := dhcpv4.NewRequestFromOffer(offer)
	require.NoError(t, err)
	ack, _, _ := b.ask(t, request)
	require.Equal(t, dhcpv4.MessageTypeAck, ack.MessageType())
	require.Equal(t, "10.0.2.15", ack.YourIPAddr.String())

	request.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 0, 2, 99)))
	nak, station, _ := b.ask(t, request)
	require.Equal(t, dhcpv4.MessageTypeNak, nak.MessageType())
	require.Equal(t, broadcastMAC, station)

	// Another station gets the next address, or, after a restart of ours, the one it had.
	other := net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	discover, _ = dhcpv4.NewDiscovery(other)
	offer, _, _ = b.ask(t, discover)
	require.Equal(t, "10.0.2.16", offer.YourIPAddr.String())
	third, _ := dhcpv4.New(dhcpv4.WithHwAddr(net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2}),
		dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest), dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 0, 2, 200))))
	ack, _, _ = b.ask(t, third)
	require.Equal(t, "10.0.2.200", ack.YourIPAddr.String())

	bootp, _ := dhcpv4.New(dhcpv4.WithHwAddr(guestMAC[:]))
	reply, _, _ := b.ask(t, bootp)
	require.Equal(t, dhcpv4.MessageTypeNone, reply.MessageType())
	require.Equal(t, "10.0.2.15", reply.YourIPAddr.String())

	// Renewal is by unicast from the address.
	renew, _ := dhcpv4.NewRenewFromAck(ack)
	renew.ClientIPAddr = net.IPv4(10, 0, 2, 200)
	b.Transmit(newUDPFrame(b.link.mac, macAddr{0x52, 0x54, 0, 0, 0, 2}, netip.AddrPortFrom(gatewayIP, 67), netip.MustParseAddrPort("10.0.2.200:68"), renew.ToBytes()))
	f := b.next(t)
	require.Equal(t, macAddr{0x52, 0x54, 0, 0, 0, 2}, macAddr(f[etherAt:etherAt+6]))
	require.Equal(t, "10.0.2.200", netip.AddrFrom4(header.IPv4(f[packetAt:]).DestinationAddress().As4()).String())
}

func TestDHCPLeasesAreBounded(t *testing.T) {
	n := &Network{config: Config{Net: netip.MustParsePrefix("10.0.0.0/16"), MTU: DefaultMTU}, gateway: host(netip.MustParsePrefix("10.0.0.0/16"), 2)}
	n.dns, n.broadcast = n.gateway.Next(), netip.MustParseAddr("10.0.255.255")
	d := newDHCPServer(n)
	given := map[netip.Addr]bool{}
	for i := range 2 * maxLeases {
		a := d.lease(macAddr{0x52, 0, 0, 0, byte(i >> 8), byte(i)}, netip.Addr{})
		require.Equal(t, i < maxLeases, a.IsValid())
		require.False(t, given[a] && a.IsValid())
		given[a] = true
	}
	require.Len(t, d.leases, maxLeases)
}

func TestARPIsAnsweredForOurAddressesOnly(t *testing.T) {
	b := newBare(t, Config{})
	request := func(target netip.Addr) {
		f := newFrame(broadcastMAC, guestMAC, uint16(header.ARPProtocolNumber), header.ARPSize)
		a := header.ARP(f[packetAt:])
		a.SetIPv4OverEthernet()
		a.SetOp(header.ARPRequest)
		copy(a.HardwareAddressSender(), guestMAC[:])
		copy(a.ProtocolAddressSender(), guestIP.AsSlice())
		copy(a.ProtocolAddressTarget(), target.AsSlice())
		b.Transmit(f)
	}
	for _, silent := range []string{"10.0.2.15", "10.0.2.16", "10.0.2.1", "8.8.8.8"} {
		request(netip.MustParseAddr(silent)) // duplicate address detection must find nobody
	}
	for _, a := range []netip.Addr{gatewayIP, dnsIP} {
		request(a)
		reply := header.ARP(b.next(t)[packetAt:])
		require.Equal(t, header.ARPReply, reply.Op())
		require.Equal(t, a.AsSlice(), reply.ProtocolAddressSender())
		require.Equal(t, guestIP.AsSlice(), reply.ProtocolAddressTarget())
	}
	require.Empty(t, b.rx)
}

func TestPingIsAnsweredByOurAddressesOnly(t *testing.T) {
	b := newBare(t, Config{})
	ping := func(to netip.Addr) {
		f := newFrame(b.link.mac, guestMAC, uint16(header.IPv4ProtocolNumber), 28+4)
		ip := header.IPv4(f[packetAt:])
		ip.Encode(&header.IPv4Fields{TotalLength: 32, TTL: 64, Protocol: 1, SrcAddr: toStack(guestIP), DstAddr: toStack(to)})
		ip.SetChecksum(^ip.CalculateChecksum())
		icmp := header.ICMPv4(ip[20:])
		copy(icmp, []byte{8, 0, 0, 0, 0, 1, 0, 1, 'p', 'i', 'n', 'g'})
		icmp.SetChecksum(header.ICMPv4Checksum(icmp, 0))
		b.Transmit(f)
	}
	ping(netip.MustParseAddr("8.8.8.8"))
	ping(netip.MustParseAddr("10.0.2.77"))
	for _, a := range []netip.Addr{gatewayIP, dnsIP} {
		ping(a)
		f := b.next(t)
		ip := header.IPv4(f[packetAt:])
		require.Equal(t, a, netip.AddrFrom4(ip.SourceAddress().As4()))
		require.Equal(t, header.ICMPv4EchoReply, header.ICMPv4(ip.Payload()).Type())
	}
	require.Empty(t, b.rx)
}

func TestTheQueueToTheGuestIsBounded(t *testing.T) {
	n, err := New(Config{})
	require.NoError(t, err)
	defer n.Close()
	for range 2 * rxQueue { // never started: nobody takes the frames
		n.link.send(backend.GetFrame(100))
	}
	require.Len(t, n.link.rx, rxQueue)
	require.EqualValues(t, rxQueue, n.Dropped())
	for i := range 2 * maxNeighbors {
		n.link.learn(host(netip.MustParsePrefix("10.0.0.0/8"), uint32(i)), guestMAC)
	}
	require.Len(t, n.link.neighbors, maxNeighbors)
}

func TestForwardThatCannotListenIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	f, err := ParseForward("tcp:" + l.Addr().String() + "-:1")
	require.NoError(t, err)
	_, err = New(Config{Forwards: []Forward{f}})
	require.ErrorContains(t, err, "address already in use")
	_, err = New(Config{TFTP: filepath.Join(t.TempDir(), "none")})
	require.ErrorContains(t, err, "TFTP directory")
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		n, err := New(Config{})
		require.NoError(b, err)
		require.NoError(b, n.Close())
	}
}

// FuzzTransmit feeds frames to a network: raw ones, and ones whose headers are right so
// that the bytes reach further in. There is no outside to reach.
func FuzzTransmit(f *testing.F) {
	discover, _ := dhcpv4.NewDiscovery(guestMAC[:])
	f.Add(uint8(0), dhcpFrame(netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255"), discover))
	f.Add(uint8(1), []byte("\x08\x00\x00\x00\x00\x01\x00\x01ping"))
	f.Add(uint8(17), []byte("\x10\x00\x00\x45\x00\x14\x00\x00\x00\x01f\x00octet\x00"))
	f.Add(uint8(6), []byte("\x10\x00\x00\x16\x00\x00\x00\x00\x00\x00\x00\x00\x50\x02\x04\x00\x00\x00\x00\x00"))
	f.Add(uint8(2), []byte{0x11, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, proto uint8, data []byte) {
		n, err := New(Config{Restrict: true, TFTP: t.TempDir()})
		require.NoError(t, err)
		n.Start(backend.PutFrame, nil)
		n.Transmit(data)
		if len(data) < 1400 {
			for _, to := range []netip.Addr{gatewayIP, dnsIP, netip.MustParseAddr("192.0.2.1")} {
				fr := newFrame(n.link.mac, guestMAC, uint16(header.IPv4ProtocolNumber), 20+len(data))
				ip := header.IPv4(fr[packetAt:])
				ip.Encode(&header.IPv4Fields{TotalLength: uint16(20 + len(data)), TTL: 64, Protocol: proto, SrcAddr: toStack(guestIP), DstAddr: toStack(to)})
				copy(ip[20:], data)
				n.Transmit(fr)
			}
			fr := newFrame(n.link.mac, guestMAC, uint16(header.IPv4ProtocolNumber), len(data))
			copy(fr[packetAt:], data)
			n.Transmit(fr)
			n.Transmit(newUDPFrame(broadcastMAC, guestMAC, netip.MustParseAddrPort("255.255.255.255:67"), netip.MustParseAddrPort("0.0.0.0:68"), data))
			n.Transmit(newUDPFrame(n.link.mac, guestMAC, netip.MustParseAddrPort("10.0.2.2:69"), netip.MustParseAddrPort("10.0.2.15:1000"), data))
		}
		require.NoError(t, n.Close())
	})
}

func FuzzParseForward(f *testing.F) {
	for _, s := range []string{"tcp:127.0.0.1:5555-:22", "udp:[::1]:53-10.0.2.20:53", "tcp::0-:1", "tcp:0.0.0.0:1-:0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		fwd, err := ParseForward(text)
		if err != nil {
			return
		}
		again, err := ParseForward(fwd.String())
		require.NoError(t, err)
		require.Equal(t, fwd, again)
	})
}
