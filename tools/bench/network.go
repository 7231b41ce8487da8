package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	tapName      = "bench0"
	hostAddress  = "10.0.99.1/24"
	guestAddress = "10.0.99.2"

	// Ports of the net guest.
	portEcho    = 7
	portDiscard = 9
	portChargen = 19

	netWarmUp   = 200
	netRequests = 3000
	requestSize = 64
	bulkIn      = 64 << 20 // bytes
	bulkOut     = 64 << 20
	// netTimeout bounds the wait for one answer.
	netTimeout = 2 * time.Second
)

// network is a network namespace with a tap in it, and a thread that is in it. It ends with
// the thread.
type network struct{ calls chan func() }

// newNetwork makes the namespace.
func newNetwork() (*network, error) {
	n := &network{calls: make(chan func())}
	ready := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and the namespace with the thread.
		runtime.LockOSThread()
		ready <- n.enter()
		for f := range n.calls {
			f()
		}
	}()
	return n, <-ready
}

func (n *network) enter() error {
	ns, err := netns.New()
	if err != nil {
		return fmt.Errorf("make a network namespace (are you root?): %w", err)
	}
	if err := ns.Close(); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = tapName
	tap := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR}
	if err := netlink.LinkAdd(tap); err != nil {
		return fmt.Errorf("make a tap: %w", err)
	}
	addr, err := netlink.ParseAddr(hostAddress)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(tap, addr); err != nil {
		return fmt.Errorf("give the tap its address: %w", err)
	}
	return netlink.LinkSetUp(tap)
}

// do calls f on the thread in the namespace: programs that it starts and sockets that it opens
// are in the namespace, too.
func (n *network) do(f func() error) error {
	result := make(chan error)
	n.calls <- func() { result <- f() }
	return <-result
}

func (n *network) close() { close(n.calls) }

// measureNetwork talks to the net guest over a tap.
func measureNetwork(ctx context.Context, b *bench, v vm) (values []float64, err error) {
	if b.net == nil {
		n, err := newNetwork()
		if err != nil {
			return nil, err
		}
		b.net = n
	}
	return values, b.net.do(func() error {
		g := guest{tap: tapName, append: fmt.Sprintf("ip=%s/24 bytes=%d offload=large", guestAddress, bulkOut)}
		m, err := b.startGuest(ctx, v, "net", g)
		if err != nil {
			return err
		}
		defer m.kill()
		if _, _, err := m.when("ready\n"); err != nil {
			return err
		}
		values, err = talk(ctx)
		return err
	})
}

func talk(ctx context.Context) (values []float64, err error) {
	if err := reach(ctx); err != nil {
		return nil, err
	}
	for _, f := range []func() (float64, error){
		func() (float64, error) { return requests(unix.SOCK_DGRAM) },
		func() (float64, error) { return requests(unix.SOCK_STREAM) },
		sendBulk,
		receiveBulk,
	} {
		v, err := f()
		if err != nil {
			return nil, err
		}
		values = append(values, v)
	}
	return values, nil
}

// dial connects a blocking socket: a poller between it and this thread would be measured, too.
func dial(kind, port int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	timeout := unix.NsecToTimeval(int64(netTimeout))
	to := &unix.SockaddrInet4{Port: port, Addr: [4]byte(net.ParseIP(guestAddress).To4())}
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout),
	)
	if kind == unix.SOCK_STREAM {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	}
	if err == nil {
		err = retry(func() error { return unix.Connect(fd, to) })
	}
	if err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("connect to port %d of the guest: %w", port, err)
	}
	return fd, nil
}

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// reach sends datagrams until one comes back: the guest's first frames may be lost.
func reach(ctx context.Context) error {
	fd, err := dial(unix.SOCK_DGRAM, portEcho)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	timeout := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return err
	}
	p := make([]byte, requestSize)
	for ctx.Err() == nil {
		if _, err := unix.Write(fd, p); err == nil {
			if n, err := unix.Read(fd, p); err == nil && n == len(p) {
				return nil
			}
		}
	}
	return fmt.Errorf("the guest's network: %w", ctx.Err())
}

// socket is a connected socket as a stream.
type socket int

func (s socket) Read(p []byte) (n int, err error) {
	err = retry(func() error { n, err = unix.Read(int(s), p); return err })
	if err == nil && n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return max(n, 0), err
}

func (s socket) Write(p []byte) (done int, err error) {
	for done < len(p) && err == nil {
		var n int
		err = retry(func() error { n, err = unix.Write(int(s), p[done:]); return err })
		done += max(n, 0)
	}
	return done, err
}

// requests returns how many echoes there are in a second, one after another.
func requests(kind int) (float64, error) {
	fd, err := dial(kind, portEcho)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	s := socket(fd)
	out, in := bytes.Repeat([]byte{'x'}, requestSize), make([]byte, requestSize)
	var begun time.Time
	for i := range netWarmUp + netRequests {
		if i == netWarmUp {
			begun = time.Now()
		}
		if _, err := s.Write(out); err != nil {
			return 0, fmt.Errorf("request %d: %w", i, err)
		}
		if _, err := io.ReadFull(s, in); err != nil {
			return 0, fmt.Errorf("answer %d: %w", i, err)
		}
	}
	return netRequests / time.Since(begun).Seconds(), nil
}

// sendBulk returns bytes a second into the guest, which counts them.
func sendBulk() (float64, error) {
	fd, err := dial(unix.SOCK_STREAM, portDiscard)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	s := socket(fd)
	chunk := make([]byte, 256<<10)
	begun := time.Now()
	for sent := 0; sent < bulkIn; sent += len(chunk) {
		if _, err := s.Write(chunk); err != nil {
			return 0, fmt.Errorf("send: %w", err)
		}
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return 0, err
	}
	answer, err := io.ReadAll(s)
	took := time.Since(begun)
	if err != nil {
		return 0, fmt.Errorf("the guest's count: %w", err)
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(answer))); err != nil || n != bulkIn {
		return 0, fmt.Errorf("the guest counted %q of %d bytes", answer, bulkIn)
	}
	return bulkIn / took.Seconds(), nil
}

// receiveBulk returns bytes a second out of the guest.
func receiveBulk() (float64, error) {
	fd, err := dial(unix.SOCK_STREAM, portChargen)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	begun := time.Now()
	n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{socket(fd)}, make([]byte, 256<<10))
	if err != nil {
		return 0, fmt.Errorf("receive: %w", err)
	}
	if n != bulkOut {
		return 0, fmt.Errorf("received %d of %d bytes", n, bulkOut)
	}
	return bulkOut / time.Since(begun).Seconds(), nil
}
