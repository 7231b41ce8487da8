package link

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"time"
)

// conn is one authenticated connection.
type conn struct {
	raw    net.Conn // below TLS; closing it wakes whoever reads or writes
	tls    *tls.Conn
	frames frameReader
	hello  hello // the peer's
	ready  bool  // both hellos are exchanged; Session.mu
}

// handshake makes c a TLS connection with a verified peer. It closes c if that fails.
func handshake(ctx context.Context, cfg *Config, c net.Conn, client bool) (*conn, *Error) {
	k := &conn{raw: c}
	if client {
		k.tls = tls.Client(c, cfg.tls)
	} else {
		k.tls = tls.Server(c, cfg.tls)
	}
	k.frames = frameReader{r: k.tls, buf: make([]byte, 2*maxRecord)}
	_ = c.SetDeadline(time.Now().Add(cfg.HandshakeTimeout))
	if err := k.tls.HandshakeContext(ctx); err != nil {
		c.Close()
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
