package integration

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

	"github.com/ftvmm/ftvmm/mirror/nic/tap"
)

// The two ends of the link in a network namespace: the test's, and the guest's.
const (
	spaceHost   = "192.0.2.1"
	spaceGuest  = "192.0.2.9"
	spacePrefix = "/24"
	spaceTap    = "tap0"
)

// space is a network namespace with a tap, which is there as long as the test.
type space struct {
	t    testing.TB
	name string
	nl   *netlink.Handle
}

// newSpace makes a namespace; it skips the test where that cannot be done.
func newSpace(t testing.TB) *space {
	if os.Geteuid() != 0 {
		t.Skip("making a network namespace takes root")
	}
	s := &space{t: t, name: fmt.Sprintf("ftvmm-machine-%d-%d", os.Getpid(), time.Now().UnixNano()%1e9)}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which is in the namespace, ends here
		h, err := netns.NewNamed(s.name)
		if err == nil {
			h.Close()
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Skipf("no network namespace: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, netns.DeleteNamed(s.name)) })
	h, err := netns.GetFromName(s.name)
	require.NoError(t, err)
	defer h.Close()
	s.nl, err = netlink.NewHandleAt(h, unix.NETLINK_ROUTE)
	require.NoError(t, err)
	t.Cleanup(s.nl.Close)
	lo, err := s.nl.LinkByName("lo")
	require.NoError(t, err)
	require.NoError(t, s.nl.LinkSetUp(lo))
	return s
}

// tap opens the tap, made if need be, and gives it the test's address.
func (s *space) tap(vnet bool) *tap.Tap {
	n, err := tap.Open(tap.Config{Name: spaceTap, Netns: s.name, Create: true, VnetHdr: vnet})
	require.NoError(s.t, err)
	s.t.Cleanup(func() { require.NoError(s.t, n.Close()) })
	link, err := s.nl.LinkByName(spaceTap)
	require.NoError(s.t, err)
	addr, err := netlink.ParseAddr(spaceHost + spacePrefix)
	require.NoError(s.t, err)
	require.NoError(s.t, s.nl.AddrAdd(link, addr))
	return n
}

// enter calls f on a thread in the namespace; sockets that it opens stay there.
func (s *space) enter(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		h, err := netns.GetFromName(s.name)
		if err == nil {
			err = netns.Set(h)
			h.Close()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// dial connects from within the namespace. The address is numeric: a name would be looked up by
// another thread.
func (s *space) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = s.enter(func() error {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// ping sends ICMP echo requests of several sizes to the guest and waits for the answers.
func (s *space) ping(t testing.TB) {
	var c net.PacketConn
	require.NoError(t, s.enter(func() (err error) {
		c, err = net.ListenPacket("ip4:icmp", spaceHost)
		return err
	}))
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	guest := &net.IPAddr{IP: net.ParseIP(spaceGuest)}
	buf := make([]byte, 2048)
	for seq, size := range []int{0, 1, 56, 1471, 1472 - icmpHeader} {
		want := pattern(size, uint64(seq))
		_, err := c.WriteTo(icmpEcho(icmpEchoRequest, seq, want), guest)
		require.NoError(t, err)
		for {
			n, from, err := c.ReadFrom(buf)
			require.NoError(t, err)
			if from.String() == spaceGuest && buf[0] == icmpEchoReply {
				require.Equal(t, icmpEcho(icmpEchoReply, seq, want), buf[:n])
				break
			}
		}
	}
}

// ICMP's messages (RFC 792).
const (
	icmpEchoReply   = 0
	icmpEchoRequest = 8
	icmpHeader      = 8
)

func icmpEcho(typ byte, seq int, data []byte) []byte {
	b := append([]byte{typ, 0, 0, 0, 0xf7, 0x77, byte(seq >> 8), byte(seq)}, data...)
	var sum uint32
	for i, v := range b {
		sum += uint32(v) << (8 * (1 - i&1))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	b[2], b[3] = ^byte(sum>>8), ^byte(sum)
	return b
}
