package tap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	vnet "github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits that end long before it when all is well.
const patience = 30 * time.Second

// testType is an Ethernet type for experiments (IEEE 802, 9.2.3).
const testType = 0x88b5

var guestMAC = net.HardwareAddr{0x52, 0x54, 0, 0x12, 0x34, 0x56}

// space is a network namespace that ends with the test.
type space struct {
	t    *testing.T
	name string
	nl   *netlink.Handle
}

// newSpace makes a namespace with a bridge br0 at 192.0.2.1/24.
func newSpace(t *testing.T) *space {
	if os.Geteuid() != 0 {
		t.Skip("making a network namespace takes root")
	}
	if _, err := os.Stat(devicePath); err != nil {
		t.Skipf("no %s: the kernel has no tun/tap", devicePath)
	}
	s := &space{t: t, name: fmt.Sprintf("ftvmm-test-%d", os.Getpid())}
	// On a thread of its own, which ends in the new namespace.
	failed := make(chan error)
	go func() {
		runtime.LockOSThread()
		h, err := netns.NewNamed(s.name)
		if err == nil {
			h.Close()
		}
		failed <- err
	}()
	if err := <-failed; err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, netns.DeleteNamed(s.name)) })
	h, err := netns.GetFromName(s.name)
	require.NoError(t, err)
	defer h.Close()
	s.nl, err = netlink.NewHandleAt(h, unix.NETLINK_ROUTE)
	require.NoError(t, err)
	t.Cleanup(s.nl.Close)
	// Without IPv6 the only frames are the test's and those it causes.
	s.enter(func() {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	})
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	require.NoError(t, s.nl.LinkAdd(br))
	require.NoError(t, s.nl.LinkSetUp(br))
	addr, _ := netlink.ParseAddr("192.0.2.1/24")
	require.NoError(t, s.nl.AddrAdd(br, addr))
	return s
}

// enter calls f on a thread in the namespace.
func (s *space) enter(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		h, err := netns.GetFromName(s.name)
		if err == nil {
			err = netns.Set(h)
			h.Close()
		}
		if err != nil {
			s.t.Error(err)
			return
		}
		f()
	}()
	<-done
}

func (s *space) link(name string) netlink.Link {
	l, err := s.nl.LinkByName(name)
	require.NoError(s.t, err)
	return l
}

func (s *space) open(c Config) *Tap {
	c.Netns = s.name
	n, err := Open(c)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, n.Close()) })
	return n
}

// started is a tap with what it delivered.
type started struct {
	*Tap
	frames chan []byte
	links  chan bool
	quit   chan struct{}
}

func start(t *testing.T, n *Tap) *started {
	s := &started{n, make(chan []byte), make(chan bool, 16), make(chan struct{})}
	n.Start(func(f []byte) {
		select {
		case s.frames <- bytes.Clone(f):
		case <-s.quit:
		}
		backend.PutFrame(f)
	}, func(up bool) { s.links <- up })
	t.Cleanup(func() { close(s.quit); require.NoError(t, n.Close()) })
	return s
}

// next returns the next frame of an Ethernet type.
func (s *started) next(t *testing.T, etherType uint16) []byte {
	deadline := time.After(patience)
	for {
		select {
		case f := <-s.frames:
			if binary.BigEndian.Uint16(f[vnet.HeaderSize+12:]) == etherType {
				return f
			}
		case <-deadline:
			require.Fail(t, "no frame")
		}
	}
}

func frameOf(dst, src net.HardwareAddr, etherType uint16, payload []byte) []byte {
	f := make([]byte, vnet.HeaderSize)
	f = append(append(f, dst...), src...)
	f = binary.BigEndian.AppendUint16(f, etherType)
	return append(f, payload...)
}

func TestFramesPassBothWaysThroughABridge(t *testing.T) {
	for _, vnetHdr := range []bool{true, false} {
		t.Run(fmt.Sprintf("vnet=%v", vnetHdr), func(t *testing.T) {
			sp := newSpace(t)
			n := sp.open(Config{Name: "tap0", Bridge: "br0", Create: true, MTU: 1400, VnetHdr: vnetHdr})
			require.Equal(t, 1400, n.MTU())
			require.Equal(t, 1400, sp.link("tap0").Attrs().MTU)
			require.Equal(t, sp.link("br0").Attrs().Index, sp.link("tap0").Attrs().MasterIndex)
			require.Equal(t, vnetHdr, n.Offloads() != 0)
			n.SetOffloads(n.Offloads())
			s := start(t, n)

			br := sp.link("br0").Attrs()
			var pc *packet.Conn
			sp.enter(func() {
				var err error
				pc, err = packet.Listen(&net.Interface{Index: br.Index, Name: "br0", MTU: br.MTU, HardwareAddr: br.HardwareAddr}, packet.Raw, testType, nil)
				require.NoError(t, err)
			})
			defer pc.Close()
			require.NoError(t, pc.SetDeadline(time.Now().Add(patience)))
			buf := make([]byte, 2000)
			for _, size := range []int{46, 1000, 1400} {
				ping := bytes.Repeat([]byte{byte(size)}, size)
				n.Transmit(frameOf(br.HardwareAddr, guestMAC, testType, ping))
				k, _, err := pc.ReadFrom(buf)
				require.NoError(t, err)
				require.Equal(t, ping, buf[14:k])
				_, err = pc.WriteTo(frameOf(guestMAC, br.HardwareAddr, testType, ping)[vnet.HeaderSize:], &packet.Addr{HardwareAddr: guestMAC})
				require.NoError(t, err)
				f := s.next(t, testType)
				require.Equal(t, ping, f[vnet.HeaderSize+14:])
				require.Equal(t, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0}, f[:vnet.HeaderSize])
			}
			require.Zero(t, n.Dropped())
			for _, bad := range [][]byte{nil, make([]byte, vnet.HeaderSize+13), make([]byte, vnet.MaxFrame+1)} {
				n.Transmit(bad)
			}
			require.EqualValues(t, 3, n.Dropped())
		})
	}
}

// arpReply says who has an address.
func arpReply(mac net.HardwareAddr, ip, toIP netip.Addr, to net.HardwareAddr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 2}
	b = append(append(b, mac...), ip.AsSlice()...)
	return append(append(b, to...), toIP.AsSlice()...)
}

func TestTheKernelLeavesChecksumsAndSegmentsToAGuestThatTakesThem(t *testing.T) {
	sp := newSpace(t)
	n := sp.open(Config{Name: "tap0", Bridge: "br0", Create: true, VnetHdr: true})
	s := start(t, n)
	br := sp.link("br0").Attrs()
	var u net.Conn
	sp.enter(func() {
		var err error
		u, err = net.Dial("udp", "192.0.2.9:7")
		require.NoError(t, err)
	})
	defer u.Close()
	host, guest := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.9")

	checksumIsValid := func(f []byte) bool {
		ip := f[vnet.HeaderSize+14:]
		var sum uint32
		pseudo := append(append([]byte{}, ip[12:20]...), 0, 17, ip[24], ip[25])
		for _, b := range [][]byte{pseudo, ip[20:]} {
			for i := range b {
				sum += uint32(b[i]) << (8 * (1 - i&1))
			}
		}
		for sum>>16 != 0 {
			sum = sum&0xffff + sum>>16
		}
		return sum == 0xffff
	}
	for i, accept := range []vnet.Offloads{0, vnet.RxChecksum | vnet.RxTSO4, vnet.RxTSO6, vnet.RxChecksum} {
		n.SetOffloads(accept)
		_, err := u.Write([]byte("an odd datagram"))
		require.NoError(t, err)
		if i == 0 {
			s.next(t, 0x0806)
			n.Transmit(frameOf(br.HardwareAddr, guestMAC, 0x0806, arpReply(guestMAC, guest, host, br.HardwareAddr)))
		}
		f := s.next(t, 0x0800)
		require.Equal(t, "an odd datagram", string(f[len(f)-15:]))
		if accept&vnet.RxChecksum == 0 {
			require.Zero(t, f[0], "accepted %b", accept)
			require.True(t, checksumIsValid(f))
		} else {
			require.EqualValues(t, 1, f[0], "the checksum is the guest's to complete")
			require.False(t, checksumIsValid(f))
		}
	}

	// And the other way round: a partial checksum of the guest's is completed.
	var pc net.PacketConn
	sp.enter(func() {
		var err error
		pc, err = net.ListenPacket("udp", "192.0.2.1:9")
		require.NoError(t, err)
	})
	defer pc.Close()
	require.NoError(t, pc.SetDeadline(time.Now().Add(patience)))
	ip := []byte{0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0xf6, 0xc4, 192, 0, 2, 9, 192, 0, 2, 1}
	var sum uint32
	clear(ip[10:12])
	for i := range ip {
		sum += uint32(ip[i]) << (8 * (1 - i&1))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	pseudo := uint32(0xc000+0x0209+0xc000+0x0201) + 17 + 12
	pseudo = pseudo&0xffff + pseudo>>16
	udp := append([]byte{0, 7, 0, 9, 0, 12, byte(pseudo >> 8), byte(pseudo)}, "ping"...)
	f := frameOf(br.HardwareAddr, guestMAC, 0x0800, append(ip, udp...))
	f[0] = 1                                    // NEEDS_CSUM
	binary.LittleEndian.PutUint16(f[6:], 14+20) // csum_start
	binary.LittleEndian.PutUint16(f[8:], 6)     // csum_offset
	n.Transmit(f)
	buf := make([]byte, 100)
	k, from, err := pc.ReadFrom(buf)
	require.NoError(t, err)
	require.Equal(t, "ping", string(buf[:k]))
	require.Equal(t, "192.0.2.9:7", from.String())
}

func TestTheCarrierFollowsTheInterface(t *testing.T) {
	sp := newSpace(t)
	n := sp.open(Config{Name: "tap0", Bridge: "br0", Create: true, VnetHdr: true})
	s := start(t, n)
	want := func(up bool) {
		select {
		case got := <-s.links:
			require.Equal(t, up, got)
		case <-time.After(patience):
			require.Fail(t, "no change of the carrier")
		}
	}
	require.NoError(t, sp.nl.LinkSetDown(sp.link("tap0")))
	want(false)
	require.NoError(t, sp.nl.LinkSetUp(sp.link("tap0")))
	want(true)
	require.NoError(t, sp.nl.LinkDel(sp.link("tap0")))
	want(false)
	n.Transmit(frameOf(guestMAC, guestMAC, testType, make([]byte, 46)))
	require.EqualValues(t, 1, n.Dropped())
	require.Empty(t, s.links)
}

func TestATapThatWeMadeGoesAwayAndOthersStay(t *testing.T) {
	sp := newSpace(t)
	n := sp.open(Config{Name: "made", Create: true, VnetHdr: true})
	sp.link("made")
	require.NoError(t, n.Close())
	_, err := sp.nl.LinkByName("made")
	require.Error(t, err)

	for i, flags := range []netlink.TuntapFlag{netlink.TUNTAP_DEFAULTS | netlink.TUNTAP_VNET_HDR, netlink.TUNTAP_DEFAULTS | netlink.TUNTAP_MULTI_QUEUE} {
		name := fmt.Sprintf("stays%d", i)
		sp.enter(func() {
			tt := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP, Flags: flags, Queues: 1}
			require.NoError(t, netlink.LinkAdd(tt))
			for _, f := range tt.Fds {
				f.Close()
			}
		})
		n = sp.open(Config{Name: name, VnetHdr: true})
		if i == 0 {
			_, err = Open(Config{Name: name, Netns: sp.name})
			require.Equal(t, "tap-in-use", mirror.ReasonOf(err), "%v", err)
		}
		require.NoError(t, n.Close())
		sp.link(name)
	}
}

func TestOpenErrorsNameReasonAndRemedy(t *testing.T) {
	sp := newSpace(t)
	for reason, c := range map[string]Config{
		"tap-name":            {Name: strings.Repeat("x", 16)},
		"tap-missing":         {Name: "none", Netns: sp.name},
		"netns-missing":       {Name: "t", Netns: "ftvmm-no-such-namespace"},
		"bridge-missing":      {Name: "t", Netns: sp.name, Create: true, Bridge: "none"},
		"bridge-not-a-bridge": {Name: "t", Netns: sp.name, Create: true, Bridge: "lo"},
		"tap-not-a-tap":       {Name: "br0", Netns: sp.name},
		"tap-configure":       {Name: "t", Netns: sp.name, Create: true, MTU: 1 << 20},
	} {
		_, err := Open(c)
		var e *mirror.Error
		require.ErrorAs(t, err, &e, "%s", reason)
		require.Equal(t, reason, e.Reason, "%v", err)
		require.True(t, strings.HasSuffix(e.Remedy, "."), e.Remedy)
		if c.Create {
			_, err := sp.nl.LinkByName("t")
			require.Error(t, err, "a tap that could not be set up does not stay")
		}
	}
}

func TestReceptionWaitsForTheGuest(t *testing.T) {
	sp := newSpace(t)
	n := sp.open(Config{Name: "tap0", Bridge: "br0", Create: true, VnetHdr: true})
	entered, release := make(chan struct{}, 100), make(chan struct{})
	var order []byte
	n.Start(func(f []byte) {
		entered <- struct{}{}
		<-release
		if binary.BigEndian.Uint16(f[vnet.HeaderSize+12:]) == testType {
			order = append(order, f[vnet.HeaderSize+14])
		}
		backend.PutFrame(f)
	}, func(bool) {})
	br := sp.link("br0").Attrs()
	var pc *packet.Conn
	sp.enter(func() {
		var err error
		pc, err = packet.Listen(&net.Interface{Index: br.Index, Name: "br0", MTU: br.MTU, HardwareAddr: br.HardwareAddr}, packet.Raw, testType, nil)
		require.NoError(t, err)
	})
	defer pc.Close()
	for i := range 10 {
		_, err := pc.WriteTo(frameOf(guestMAC, br.HardwareAddr, testType, bytes.Repeat([]byte{byte(i)}, 46))[vnet.HeaderSize:], &packet.Addr{HardwareAddr: guestMAC})
		require.NoError(t, err)
	}
	<-entered
	require.Empty(t, entered, "no second delivery while the first one blocks")
	close(release)
	for range 9 {
		<-entered
	}
	require.NoError(t, n.Close())
	require.Equal(t, []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, order)
}
