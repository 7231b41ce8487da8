package guests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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
)

var (
	guestMAC = []byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	guestIP  = [4]byte{10, 0, 2, 15}
	peerMAC  = []byte{0x52, 0x54, 0, 0, 0, 0x02}
	peerIP   = [4]byte{10, 0, 2, 2}
)

// weather is what a wire does to frames, in parts of a thousand, in both directions.
type weather struct {
	lose, double, swap int
	seed               uint64
}

// wire is an Ethernet between a guest in QEMU and gVisor's TCP/IP stack.
type wire struct {
	t     *testing.T
	s     *stack.Stack
	ep    *channel.Endpoint
	conn  *net.UnixConn
	guest *net.UnixAddr

	mu      sync.Mutex
	rng     *rand.Rand
	weather weather
	held    [2][]byte // a frame that the next one overtakes, by direction
	lost    int
	spy     chan<- []byte // gets frames from the guest while it has room

	first chan []byte // the first frame from the guest

	// Of the guest: what it printed, and when that was "ready" or it ended.
	out      bytes.Buffer
	ready    chan struct{}
	ended    chan struct{}
	code     int
	qmp      string
	kill     func() // ends QEMU at once and waits for that
	readOnce sync.Once
}

// startNet boots a network guest, with more arguments for QEMU, and waits until it serves.
func startNet(t *testing.T, name, cmdline string, weather weather, args ...string) *wire {
	t.Helper()
	dir, err := os.MkdirTemp("", "wire") // t.TempDir has characters that QEMU's options lack
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &wire{
		t: t, weather: weather, rng: rand.New(rand.NewPCG(weather.seed, 1)),
		guest: &net.UnixAddr{Name: filepath.Join(dir, "guest"), Net: "unixgram"},
		first: make(chan []byte, 1), ready: make(chan struct{}), ended: make(chan struct{}), qmp: filepath.Join(dir, "qmp"),
	}
	q := newQEMU(t, tcg, "-netdev", fmt.Sprintf("dgram,id=n,local.type=unix,local.path=%s,remote.type=unix,remote.path=%s",
		w.guest.Name, filepath.Join(dir, "peer")), "-device", "virtio-net-pci,netdev=n", "-qmp", "unix:"+w.qmp+",server=on,wait=off")
	w.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "peer"), Net: "unixgram"})
	require.NoError(t, err)
	w.ep = channel.New(1024, 1514, tcpip.LinkAddress(peerMAC))
	w.s = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	require.Nil(t, w.s.CreateNIC(1, ethernet.New(w.ep)))
	require.Nil(t, w.s.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(peerIP), PrefixLen: 24},
	}, stack.AddressProperties{}))
	w.s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})

	ctx, cancel := context.WithCancel(context.Background())
	var pumps sync.WaitGroup
	pumps.Go(w.fromGuest)
	pumps.Go(func() { w.toGuest(ctx) })
	t.Cleanup(func() {
		cancel()
		w.conn.Close()
		pumps.Wait()
		w.s.Close()
		w.s.Destroy()
	})
	w.boot(q, append([]string{"-kernel", kernel(t, name), "-append", cmdline}, args...))
	return w
}

// boot starts QEMU and waits for the guest's line "ready".
func (w *wire) boot(q *qemu, args []string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), runLimit)
	cmd := q.command(ctx, args...)
	stdout, err := cmd.StdoutPipe()
	require.NoError(w.t, err)
	var log bytes.Buffer
	cmd.Stderr = &log
	require.NoError(w.t, cmd.Start())
	go func() {
		defer close(w.ended)
		buf := make([]byte, 4096)
		for {
			n, err := stdout.Read(buf)
			w.mu.Lock()
			w.out.Write(buf[:n])
			serves := bytes.Contains(w.out.Bytes(), []byte("\nready\n"))
			w.mu.Unlock()
			if serves {
				w.readOnce.Do(func() { close(w.ready) })
			}
			if err != nil {
				break
			}
		}
		cmd.Wait()
		w.code = cmd.ProcessState.ExitCode()
	}()
	w.kill = func() {
		cancel()
		<-w.ended
	}
	w.t.Cleanup(w.kill)
	select {
	case <-w.ready:
	case <-w.ended:
		w.t.Fatalf("the guest ended: %s\n%s", w.output(), log.Bytes())
	}
}

func (w *wire) output() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.String()
}

// end waits until the guest has ended and returns QEMU's exit code.
func (w *wire) end() int {
	<-w.ended
	return w.code
}

func (w *wire) fromGuest() {
	buf := make([]byte, 65536)
	for {
		n, err := w.conn.Read(buf)
		if err != nil {
			return
		}
		frame := bytes.Clone(buf[:n])
		w.mu.Lock()
		spy := w.spy
		w.mu.Unlock()
		for _, c := range []chan<- []byte{w.first, spy} {
			select {
			case c <- frame:
			default:
			}
		}
		w.pass(0, frame, func(f []byte) {
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(f)})
			w.ep.InjectInbound(0, pkt)
			pkt.DecRef()
		})
	}
}

func (w *wire) toGuest(ctx context.Context) {
	for {
		pkt := w.ep.ReadContext(ctx)
		if pkt == nil {
			return
		}
		var frame []byte
		for _, s := range pkt.AsSlices() {
			frame = append(frame, s...)
		}
		pkt.DecRef()
		w.pass(1, frame, w.inject)
	}
}

// inject sends a frame to the guest past the weather. A frame that QEMU does not take
// is lost.
func (w *wire) inject(frame []byte) { w.conn.WriteToUnix(frame, w.guest) }

// pass lets a frame go through the weather.
func (w *wire) pass(direction int, frame []byte, deliver func([]byte)) {
	w.mu.Lock()
	held := w.held[direction]
	w.held[direction] = nil
	dice := w.rng.IntN(1000)
	if dice < w.weather.lose {
		w.lost++
		w.mu.Unlock()
	} else if dice -= w.weather.lose; dice < w.weather.swap && held == nil {
		w.held[direction] = frame
		w.mu.Unlock()
	} else {
		w.mu.Unlock()
		deliver(frame)
		if dice < w.weather.swap+w.weather.double {
			deliver(frame)
		}
	}
	if held != nil {
		deliver(held)
	}
}

func (w *wire) address(port uint16) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(guestIP), Port: port}
}

func (w *wire) dialTCP(ctx context.Context, port uint16) (net.Conn, error) {
	return gonet.DialContextTCP(ctx, w.s, w.address(port), ipv4.ProtocolNumber)
}

func (w *wire) dialUDP(port uint16) (net.Conn, error) {
	remote := w.address(port)
	return gonet.DialUDP(w.s, nil, &remote, ipv4.ProtocolNumber)
}

func (w *wire) tcp(port uint16) net.Conn {
	w.t.Helper()
	c, err := w.dialTCP(w.t.Context(), port)
	require.NoError(w.t, err, "%s", w.output())
	require.NoError(w.t, c.SetDeadline(time.Now().Add(runLimit)))
	w.t.Cleanup(func() { c.Close() })
	return c
}

// quit ends the guest net by a datagram and checks its last words.
func (w *wire) quit() {
	w.t.Helper()
	c, err := w.dialUDP(9)
	require.NoError(w.t, err)
	defer c.Close()
	w.mu.Lock()
	w.weather = weather{}
	w.mu.Unlock()
	for {
		_, err = c.Write([]byte("quit"))
		require.NoError(w.t, err)
		select {
		case <-w.ended:
			require.Equal(w.t, 1, w.end(), "%s", w.output())
			require.Contains(w.t, w.output(), "\nend by request\n")
			return
		case <-time.After(100 * time.Millisecond): // lost: say it again
		}
	}
}

func random(n int, seed uint64) []byte {
	b := make([]byte, (n+7)/8*8)
	r := rand.New(rand.NewPCG(seed, 2))
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b[:n]
}

// chargen is what the guest sends on port 19: splitmix64 from state 0.
func chargen(n int) []byte {
	b := make([]byte, (n+7)/8*8)
	for i := range uint64(len(b) / 8) {
		z := (i + 1) * 0x9e3779b97f4a7c15
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(b[8*i:], z^z>>31)
	}
	return b[:n]
}

// echoes sends data to the echo service while it reads it back.
func (w *wire) echoes(data []byte) {
	w.t.Helper()
	c := w.tcp(7)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- errors.Join(err, c.(*gonet.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	require.NoError(w.t, err, "%s", w.output())
	require.NoError(w.t, <-sent)
	require.Equal(w.t, sha256.Sum256(data), sha256.Sum256(got), "%d bytes sent, %d came back", len(data), len(got))
}

func (w *wire) discards(data []byte) {
	w.t.Helper()
	c := w.tcp(9)
	_, err := c.Write(data)
	require.NoError(w.t, err)
	require.NoError(w.t, c.(*gonet.TCPConn).CloseWrite())
	got, err := io.ReadAll(c)
	require.NoError(w.t, err)
	require.Equal(w.t, fmt.Sprintf("%d\n", len(data)), string(got))
}

func (w *wire) generates(n int) {
	w.t.Helper()
	got, err := io.ReadAll(w.tcp(19))
	require.NoError(w.t, err)
	require.Equal(w.t, sha256.Sum256(chargen(n)), sha256.Sum256(got), "%d bytes came, want %d", len(got), n)
}

// TestNetServes talks to the guest over every kind of ring, interrupt and receive buffer.
func TestNetServes(t *testing.T) {
	for _, words := range []string{
		"", "irq=intx", "irq=poll", "event_idx=0 indirect=0", "mrg=0", "rxbuf=200",
		"legacy=1", "legacy=1 mrg=0 irq=intx",
	} {
		t.Run("words "+words, func(t *testing.T) {
			t.Parallel()
			w := startNet(t, "net", "bytes=300001 "+words, weather{})
			first := <-w.first
			require.Equal(t, append(bytes.Repeat([]byte{0xff}, 6), guestMAC...), first[:12], "the guest announces itself")
			require.Equal(t, []byte{0x08, 0x06}, first[12:14])
			require.Equal(t, first[28:32], first[38:42], "sender and target of a gratuitous ARP")
			require.Equal(t, guestIP[:], first[28:32])

			u, err := w.dialUDP(7)
			require.NoError(t, err)
			defer u.Close()
			require.NoError(t, u.SetDeadline(time.Now().Add(runLimit)))
			for _, n := range []int{1, 2, 3, 1472} {
				data, got := random(n, 1), make([]byte, 2000)
				_, err := u.Write(data)
				require.NoError(t, err)
				n, err := u.Read(got)
				require.NoError(t, err)
				require.Equal(t, data, got[:n])
			}
			w.echoes(random(300_000, 3))
			w.discards(random(300_000, 4))
			w.generates(300_001)
			_, err = w.dialTCP(t.Context(), 80)
			require.ErrorContains(t, err, "refused")
			w.quit()
		})
	}
}

// TestNetManyConnections fills the guest's table with connections at work, twice.
func TestNetManyConnections(t *testing.T) {
	w := startNet(t, "net", "", weather{})
	for round := range uint64(2) {
		conns := make([]net.Conn, 64)
		for i := range conns {
			conns[i] = w.tcp(7)
		}
		for i, c := range conns {
			_, err := c.Write(random(1000+i, round))
			require.NoError(t, err)
		}
		for i, c := range conns {
			got := make([]byte, 1000+i)
			_, err := io.ReadFull(c, got)
			require.NoError(t, err)
			require.Equal(t, random(1000+i, round), got)
			require.NoError(t, c.(*gonet.TCPConn).CloseWrite())
			rest, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Empty(t, rest)
		}
	}
	w.quit()
}

// TestNetInBadWeather loses, doubles and swaps frames both ways: TCP does not notice.
func TestNetInBadWeather(t *testing.T) {
	for _, words := range []string{"", "legacy=1"} {
		t.Run("words "+words, func(t *testing.T) {
			t.Parallel()
			w := startNet(t, "net", "bytes=200k "+words, weather{lose: 15, double: 15, swap: 15, seed: 7})
			w.echoes(random(150_000, 5))
			w.discards(random(150_000, 6))
			w.generates(200 << 10)
			require.Positive(t, w.lost, "the weather was bad")
			w.quit()
		})
	}
}

// TestNetSlowReader lets the guest's window and the reader's close: nothing is lost.
func TestNetSlowReader(t *testing.T) {
	w := startNet(t, "net", "bytes=4m", weather{})
	c := w.tcp(19)
	w.echoes(random(1000, 1)) // meanwhile the sender has run into the closed window
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	require.Equal(t, sha256.Sum256(chargen(4<<20)), sha256.Sum256(got))
	w.quit()
}

// TestNetPing has the guest answer echo requests up to the largest that fits a frame.
func TestNetPing(t *testing.T) {
	w := startNet(t, "net", "", weather{})
	raw := make(chan []byte, 16)
	w.mu.Lock()
	w.spy = raw
	w.mu.Unlock()
	for _, n := range []int{0, 1, 56, 1472} {
		w.inject(echoRequest(random(n, 9)))
		reply := <-raw
		for reply[23] != 1 { // not ICMP
			reply = <-raw
		}
		require.Len(t, reply, 42+n)
		ip := header.IPv4(reply[14:])
		require.True(t, ip.IsChecksumValid())
		require.Equal(t, tcpip.AddrFrom4(guestIP), ip.SourceAddress())
		icmp := header.ICMPv4(reply[34:])
		require.Equal(t, header.ICMPv4EchoReply, icmp.Type())
		require.Equal(t, header.ICMPv4Checksum(icmp[:header.ICMPv4MinimumSize], checksum(random(n, 9))), icmp.Checksum())
		require.Equal(t, random(n, 9), reply[42:])
	}
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		sum += uint32(v) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

func echoRequest(data []byte) []byte {
	f := make([]byte, 42+len(data))
	copy(f, guestMAC)
	copy(f[6:], peerMAC)
	f[12] = 0x08
	header.IPv4(f[14:]).Encode(&header.IPv4Fields{
		TotalLength: uint16(28 + len(data)), TTL: 64, Protocol: 1,
		SrcAddr: tcpip.AddrFrom4(peerIP), DstAddr: tcpip.AddrFrom4(guestIP),
	})
	ip := header.IPv4(f[14:])
	ip.SetChecksum(^ip.CalculateChecksum())
	icmp := header.ICMPv4(f[34:])
	icmp.SetType(header.ICMPv4Echo)
	icmp.SetIdent(77)
	copy(f[42:], data)
	icmp.SetChecksum(header.ICMPv4Checksum(icmp[:header.ICMPv4MinimumSize], checksum(data)))
	return f
}

// TestNetHostileFrames sends thousands of broken frames: the guest goes on to serve.
func TestNetHostileFrames(t *testing.T) {
	w := startNet(t, "net", "", weather{})
	rng := rand.New(rand.NewPCG(11, 0))
	good := echoRequest(random(100, 1))
	for i := range 20000 {
		f := bytes.Clone(good[:1+rng.IntN(len(good))]) // QEMU takes an empty one for the end
		if rng.IntN(2) == 0 {
			f = append(f, random(rng.IntN(1400), uint64(i))...)
		}
		for range rng.IntN(8) {
			if len(f) > 6 {
				f[6+rng.IntN(len(f)-6)] = byte(rng.Uint32())
			}
		}
		if len(f) > 23 && rng.IntN(2) == 0 {
			f[23] = []byte{1, 6, 17}[rng.IntN(3)]
			if ip := header.IPv4(f[14:]); len(ip) >= 20 && rng.IntN(4) > 0 {
				ip.SetHeaderLength(20)
				ip.SetTotalLength(uint16(len(ip)))
				ip.SetChecksum(0)
				ip.SetChecksum(^ip.CalculateChecksum())
			}
		}
		w.inject(f)
	}
	w.echoes(random(10_000, 2))
	w.quit()
}

// TestNetStackUnderSanitizers runs the guests' TCP/IP stack as a program of this host, with
// the compiler's checks for memory errors, against a peer that keeps few rules.
func TestNetStackUnderSanitizers(t *testing.T) {
	program := filepath.Join(t.TempDir(), "fuzz")
	out, err := exec.Command("gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
		"-fno-sanitize-recover=all", "-DNETSTACK_HOST", "-I.", "-o", program, "netstack/host/fuzz.c", "netstack/netstack.c").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) || strings.Contains(string(out), "cannot find") {
		t.Skipf("no compiler with sanitizers (gcc, libasan, libubsan): %v\n%s", err, out)
	}
	require.NoError(t, err, "%s", out)
	for seed := range 4 {
		cmd := exec.Command(program, fmt.Sprint(seed), "100000")
		cmd.Env = append(os.Environ(), "ASAN_OPTIONS=detect_leaks=0")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "seed %d: %s", seed, out)
		require.Contains(t, string(out), "ok 100000 frames in", "seed %d", seed)
	}
}
