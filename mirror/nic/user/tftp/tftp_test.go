package tftp

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits that end long before it when all is well.
const patience = 30 * time.Second

// serve serves a directory on loopback and returns the server's address, and a function
// that closes its socket and waits for its end.
func serve(t *testing.T, dir string) (net.Addr, func()) {
	root, err := os.OpenRoot(dir)
	require.NoError(t, err)
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	require.NoError(t, err)
	s := &Server{Root: root, MaxBlock: 1468, Dial: func(client netip.AddrPort) (net.Conn, error) {
		return net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(client))
	}}
	ended := make(chan error)
	go func() { ended <- s.Serve(c) }()
	end := func() {
		c.Close()
		require.ErrorIs(t, <-ended, net.ErrClosed)
		require.NoError(t, root.Close())
	}
	return c.LocalAddr(), end
}

func client(t *testing.T) net.PacketConn {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

func send(t *testing.T, c net.PacketConn, to net.Addr, packet string) {
	_, err := c.WriteTo([]byte(packet), to)
	require.NoError(t, err)
}

func receive(t *testing.T, c net.PacketConn) (string, net.Addr) {
	buf := make([]byte, 2048)
	n, from, err := c.ReadFrom(buf)
	require.NoError(t, err)
	return string(buf[:n]), from
}

func TestTransferOverAHostsSocket(t *testing.T) {
	dir := t.TempDir()
	data := bytes.Repeat([]byte("0123456789abcdef"), 100)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), data, 0o644))
	server, end := serve(t, dir)
	defer end()
	c := client(t)
	send(t, c, server, "\x00\x01f\x00octet\x00blksize\x001468\x00tsize\x000\x00")
	packet, from := receive(t, c)
	require.Equal(t, "\x00\x06blksize\x001468\x00tsize\x001600\x00", packet)
	require.NotEqual(t, server.String(), from.String(), "a transfer has a port of its own")
	send(t, c, server, "\x00\x01f\x00octet\x00") // again, as if the answer had been lost: ignored
	send(t, c, from, "\x00\x04\x00\x00")
	packet, again := receive(t, c)
	require.Equal(t, from, again)
	require.Equal(t, "\x00\x03\x00\x01"+string(data[:1468]), packet)
	send(t, c, from, "\x00\x04\x00\x01")
	packet, _ = receive(t, c)
	require.Equal(t, "\x00\x03\x00\x02"+string(data[1468:]), packet)
	send(t, c, from, "\x00\x04\x00\x02")
}

func TestEndOfServiceEndsTransfers(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 4096), 0o644))
	server, end := serve(t, dir)
	c := client(t)
	send(t, c, server, "\x00\x01f\x00octet\x00timeout\x00255\x00")
	packet, _ := receive(t, c)
	require.Equal(t, "\x00\x06timeout\x00255\x00", packet)
	end() // with a transfer that would wait for four minutes
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
	server, end := serve(t, dir)
	defer end()
	for request, want := range map[string]string{
		"\x00\x01f\x00octet": "\x00\x05\x00\x04malformed request\x00",
		"\x00\x01" + string(bytes.Repeat([]byte("f"), 600)) + "\x00octet\x00":  "\x00\x05\x00\x04malformed request\x00",
		"\x00\x01" + string(bytes.Repeat([]byte("f"), 2000)) + "\x00octet\x00": "\x00\x05\x00\x04malformed request\x00",
		"\x00\x01f\x00netascii\x00": "\x00\x05\x00\x04only mode octet is served\x00",
		"\x00\x01g\x00octet\x00":    "\x00\x05\x00\x01no such file\x00",
		"\x00\x02f\x00octet\x00":    "\x00\x05\x00\x02this server is read-only\x00",
	} {
		c := client(t)
		send(t, c, server, "\x00") // too short, and what no server takes: no answer
		send(t, c, server, "\x00\x04\x00\x00")
		send(t, c, server, request)
		got, _ := receive(t, c)
		require.Equal(t, want, got, "%q", request)
	}
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte("f\x00octet\x00blksize\x00512\x00tsize\x000\x00"))
	f.Add([]byte("\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, ok := parseRequest(b)
		if !ok {
			return
		}
		p := r.negotiate(1, 1468)
		require.GreaterOrEqual(t, p.block, minBlock)
		require.LessOrEqual(t, p.block, 1468)
		require.Less(t, len(p.oack), 1468)
	})
}
