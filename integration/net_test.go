package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/mirror/nic/user"
	"github.com/ftvmm/ftvmm/vmm"
)

// patience bounds waits that end long before it when all is well.
const patience = 2 * time.Minute

// running is a machine that runs beside the test.
type running struct {
	*vmm.Machine
	console *terminal
	ended   chan vmm.Exit
}

// start runs a machine with a console on COM1; it has ended when the test does.
func start(t testing.TB, cfg vmm.Config) *running {
	r := &running{console: newTerminal(), ended: make(chan vmm.Exit, 1)}
	cfg.Serial = []vmm.Console{r.console}
	m, err := vmm.New(cfg)
	require.NoError(t, err)
	r.Machine = m
	failed := make(chan error, 1)
	go func() {
		e, err := m.Run(context.Background())
		failed <- err
		r.ended <- e
		close(r.ended)
	}()
	t.Cleanup(func() {
		m.Quit()
		require.NoError(t, <-failed)
		<-r.ended
		require.NoError(t, m.Close())
	})
	return r
}

// wait waits for the machine's end.
func (r *running) wait(t testing.TB) vmm.Exit {
	t.Helper()
	select {
	case e := <-r.ended:
		return e
	case <-time.After(patience):
		t.Fatalf("the guest does not end; it wrote:\n%s", r.console)
		return vmm.Exit{}
	}
}

// dialFunc connects to a service of the guest by the number of its port.
type dialFunc func(ctx context.Context, network string, port int) (net.Conn, error)

// onUserNetwork is a user network whose host ports lead to the guest's services.
func onUserNetwork(t testing.TB, services ...string) (vmm.NIC, dialFunc) {
	var cfg user.Config
	for _, s := range services {
		network, port, _ := strings.Cut(s, ":")
		f, err := user.ParseForward(network + ":127.0.0.1:0-:" + port)
		require.NoError(t, err)
		cfg.Forwards = append(cfg.Forwards, f)
	}
	n, err := user.New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	return vmm.NIC{Backend: n, MAC: guestMAC}, func(ctx context.Context, network string, port int) (net.Conn, error) {
		for _, f := range n.Forwards() {
			if f.Proto == network && int(f.Guest.Port()) == port {
				var d net.Dialer
				return d.DialContext(ctx, network, f.Host.String())
			}
		}
		return nil, fmt.Errorf("%s port %d is not forwarded", network, port)
	}
}

// onTap is a tap in the namespace.
func (s *space) onTap(vnet bool) (vmm.NIC, dialFunc) {
	return vmm.NIC{Backend: s.tap(vnet), MAC: guestMAC}, func(ctx context.Context, network string, port int) (net.Conn, error) {
		return s.dial(ctx, network, netip.AddrPortFrom(netip.MustParseAddr(spaceGuest), uint16(port)).String())
	}
}

var guestMAC = [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}

// The services of the guest "net".
const (
	portEcho    = 7
	portDiscard = 9
	portChargen = 19
)

// The guest's network card works in both interfaces of virtio, with each way of interrupting,
// with and without offloads, over both kinds of network: small and bulk transfers arrive
// complete and unaltered.
func TestGuestOnANetwork(t *testing.T) {
	const bulk = 512 << 10
	for _, c := range []struct {
		network, cmdline string
		vnet, modern     bool
	}{
		{network: "user", cmdline: "legacy=1 irq=intx offload=none"},
		{network: "user", cmdline: "irq=msix offload=large"},
		{network: "user", cmdline: "irq=poll offload=checksum mrg=0"},
		{network: "tap", cmdline: "legacy=1 irq=intx offload=none", vnet: true},
		{network: "tap", cmdline: "legacy=1 irq=msix offload=large mrg=0", vnet: true},
		{network: "tap", cmdline: "irq=msix offload=large", vnet: true, modern: true},
		{network: "tap", cmdline: "irq=msix offload=checksum rxbuf=256 event_idx=0", vnet: true},
		{network: "tap", cmdline: "irq=poll offload=large indirect=0"}, // a tap without offloads
	} {
		name := c.network + " " + c.cmdline
		if !c.vnet {
			name += " vnet=off"
		}
		t.Run(name, func(t *testing.T) {
			kernel, err := guests.Image("net")
			require.NoError(t, err)
			var nic vmm.NIC
			var dial dialFunc
			var sp *space
			if c.network == "user" {
				nic, dial = onUserNetwork(t, "tcp:7", "tcp:9", "tcp:19", "udp:7", "udp:9")
			} else {
				sp = newSpace(t)
				nic, dial = sp.onTap(c.vnet)
				c.cmdline += " ip=" + spaceGuest + spacePrefix
			}
			nic.Modern = c.modern
			m := start(t, vmm.Config{
				Memory: 32 << 20, Kernel: kernel, Cmdline: fmt.Sprintf("%s bytes=%d", c.cmdline, bulk), NICs: []vmm.NIC{nic},
			})
			m.console.waitFor(t, 0, "ready", patience)
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			open := func(network string, port int) net.Conn {
				conn, err := dial(ctx, network, port)
				require.NoError(t, err)
				t.Cleanup(func() { conn.Close() })
				require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
				return conn
			}
			if sp != nil {
				sp.ping(t)
			}
			requireDatagramEcho(t, open("udp", portEcho))
			requireEcho(t, open("tcp", portEcho).(*net.TCPConn), bulk/4)
			requireDiscard(t, open("tcp", portDiscard).(*net.TCPConn), bulk)
			requireChargen(t, open("tcp", portChargen), bulk)
			_, err = open("udp", portDiscard).Write([]byte("quit"))
			require.NoError(t, err)
			require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, m.wait(t), "%s", m.console)
			require.Contains(t, m.console.String(), "end by request")
		})
	}
}

// requireDatagramEcho sends datagrams of many sizes until each has come back, for a
// network may lose them.
func requireDatagramEcho(t *testing.T, c net.Conn) {
	buf := make([]byte, 2048)
	for _, size := range []int{1, 17, 18, 100, 1000, 1471, 1472} {
		want := pattern(size, uint64(size))
		for {
			_, err := c.Write(want)
			require.NoError(t, err)
			require.NoError(t, c.SetReadDeadline(time.Now().Add(patience/10)))
			n, err := c.Read(buf)
			var timeout net.Error
			if err != nil {
				require.ErrorAs(t, err, &timeout)
				require.True(t, timeout.Timeout(), "%v", err)
				continue
			}
			if n < size {
				continue // a late echo of an earlier one
			}
			require.True(t, bytes.Equal(want, buf[:n]), "%d bytes", size)
			break
		}
	}
}

// requireEcho writes and reads at the same time, and ends the connection from this side first.
func requireEcho(t *testing.T, c *net.TCPConn, n int) {
	data := pattern(n, 7)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		if err == nil {
			err = c.CloseWrite()
		}
		sent <- err
	}()
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	require.NoError(t, <-sent)
	require.True(t, bytes.Equal(data, got), "%d bytes", len(got))
}

func requireDiscard(t *testing.T, c *net.TCPConn, n int) {
	_, err := c.Write(pattern(n, 9))
	require.NoError(t, err)
	require.NoError(t, c.CloseWrite())
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("%d\n", n), string(got))
}

// requireChargen reads what the guest makes: the words of splitmix64 from 0.
func requireChargen(t *testing.T, c net.Conn, n int) {
	got := fnv.New64a()
	size, err := io.Copy(got, c)
	require.NoError(t, err)
	require.EqualValues(t, n, size)
	want := fnv.New64a()
	want.Write(pattern(n, 0))
	require.Equal(t, want.Sum64(), got.Sum64())
}

// pattern returns n bytes of the little-endian words of splitmix64 from a state.
func pattern(n int, state uint64) []byte {
	b := make([]byte, 0, n+8)
	for len(b) < n {
		state += 0x9e3779b97f4a7c15
		z := (state ^ state>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		b = binary.LittleEndian.AppendUint64(b, z^z>>31)
	}
	return b[:n]
}
