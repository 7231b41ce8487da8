package link

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// transport is the TCP connection below TLS. It begins with Go's network poller, which has deadlines. For the log it
// changes to a blocking descriptor: the kernel then wakes the reader's own thread, without the
// poller's between, which is half of the round trip or more on a quiet host.
type transport struct {
	net.Conn

	mu    sync.Mutex
	fd    int // -1 while the poller has it
	cut   bool
	users int // loops that use fd; the last one closes it
}

// block changes to a blocking descriptor that users loops will use, each of which calls release. Nobody may be
// reading or writing.
func (t *transport) block(users int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	sc, ok := t.Conn.(syscall.Conn)
	if !ok || t.cut {
		return nil // not a socket: the poller's interface does
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	fd := -1
	var dup error
	if err := raw.Control(func(old uintptr) { fd, dup = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return err
	}
	if dup != nil {
		return os.NewSyscallError("fcntl", dup)
	}
	if err := t.Close(); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		return errors.Join(os.NewSyscallError("fcntl", err), unix.Close(fd))
	}
	t.fd, t.users = fd, users
	return nil
}

// release says that a loop no longer uses the connection.
func (t *transport) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd < 0 {
		return
	}
	if t.users--; t.users == 0 {
		_ = unix.Close(t.fd)
		t.fd = -1
	}
}

// end breaks the connection: whoever reads or writes gets an error.
func (t *transport) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cut = true
	if t.fd < 0 {
		t.Close()
		return
	}
	_ = unix.Shutdown(t.fd, unix.SHUT_RDWR)
}

// Read and Write use t.fd without the lock: it is open until their loop calls release.

func (t *transport) Read(p []byte) (int, error) {
	if t.fd < 0 {
		return t.Conn.Read(p)
	}
	for {
		n, err := unix.Read(t.fd, p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func (t *transport) Write(p []byte) (int, error) {
	if t.fd < 0 {
		return t.Conn.Write(p)
	}
	done := 0
	for done < len(p) {
		n, err := unix.Write(t.fd, p[done:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, os.NewSyscallError("write", err)
		}
		done += n
	}
	return done, nil
}

// conn is one authenticated connection.
type conn struct {
	transport *transport
	tls       *tls.Conn
	frames    frameReader
	hello     hello // the peer's
	ready     bool  // both hellos are exchanged; Session.mu
}

// handshake makes c a TLS connection with a verified peer. It closes c if that fails.
func handshake(ctx context.Context, cfg *Config, c net.Conn, client bool) (*conn, *Error) {
	t := &transport{Conn: c, fd: -1}
	k := &conn{transport: t}
	if client {
		k.tls = tls.Client(t, cfg.tls)
	} else {
		k.tls = tls.Server(t, cfg.tls)
	}
	k.frames = frameReader{r: k.tls, buf: make([]byte, 2*maxRecord)}
	_ = c.SetDeadline(time.Now().Add(cfg.HandshakeTimeout))
	if err := k.tls.HandshakeContext(ctx); err != nil {
		t.end()
		return nil, handshakeError(err)
	}
	return k, nil
}

// handshakeError gives a failed handshake its reason.
func handshakeError(err error) *Error {
	var (
		e  *Error
		op *net.OpError
	)
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refuse(HandshakeTimedOut, "the peer takes too long to shake hands: %w", err)
	case errors.As(err, &op) && op.Op == "remote error":
		return refuse(RefusedByPeer, "the peer refuses the connection, see its log: %w", err)
	}
	return refuse(NotTLS, "shake hands: %w", err)
}

// identify checks that a hello belongs to the certificate.
func (k *conn) identify(keys *Keys) *Error {
	_, side, err := identity(k.tls.ConnectionState().PeerCertificates[0])
	switch {
	case err != nil:
		return &Error{Reason: BadCertificate, Err: err}
	case k.hello.pair != keys.Fingerprint:
		return refuse(WrongPair, "the peer's hello names another pair than its certificate")
	case k.hello.side != side:
		return refuse(BadHello, "the peer's hello says side %v, its certificate side %v", k.hello.side, side)
	}
	return nil
}

// write writes one frame that is no segment.
func (k *conn) write(kind kind, payload []byte) error {
	_, err := k.tls.Write(appendFrame(nil, kind, payload))
	return err
}

// frameReader cuts what it reads into frames.
type frameReader struct {
	r          io.Reader
	buf        []byte
	start, end int
}

// next returns the next frame. The payload is valid until the next call.
func (f *frameReader) next() (header, []byte, *Error) {
	if err := f.fill(headerSize); err != nil {
		return header{}, nil, err
	}
	h, err := parseHeader(f.buf[f.start:])
	if err != nil {
		return h, nil, err
	}
	size := headerSize + int(h.length)
	if err := f.fill(size); err != nil {
		return h, nil, err
	}
	p := f.buf[f.start+headerSize : f.start+size]
	f.start += size
	return h, p, nil
}

// fill reads until n bytes are there. No frame is larger than half the buffer.
func (f *frameReader) fill(n int) *Error {
	if f.start == f.end {
		f.start, f.end = 0, 0
	}
	for f.end-f.start < n {
		if len(f.buf)-f.start < n {
			f.end = copy(f.buf, f.buf[f.start:f.end])
			f.start = 0
		}
		got, err := f.r.Read(f.buf[f.end:])
		f.end += got
		if err != nil && f.end-f.start < n {
			return f.failure(err)
		}
	}
	return nil
}

// failure gives an error of reading its reason.
func (f *frameReader) failure(err error) *Error {
	var (
		op  *net.OpError
		rec tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &rec), errors.As(err, &op) && op.Op == "local error":
		return refuse(Unencrypted, "the connection is damaged: %w", err)
	case errors.As(err, &op) && op.Op == "remote error":
		return refuse(RefusedByPeer, "the peer refuses the connection, see its log: %w", err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refuse(HandshakeTimedOut, "the peer takes too long to say hello: %w", err)
	case errors.Is(err, io.ErrUnexpectedEOF), f.end > f.start:
		return refuse(Truncated, "the connection ended inside a frame: %w", err)
	}
	return refuse(Lost, "the connection ended: %w", err)
}
