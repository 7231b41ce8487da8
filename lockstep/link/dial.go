package link

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Limits of a listener. Connections and sessions above them are refused as [Busy].
const (
	// maxHandshakes bounds connections that have not said who they are.
	maxHandshakes = 16
	maxSessions   = 8
	// maxWaiting bounds sessions that Accept has not returned yet.
	maxWaiting = 4
)

// Pauses between attempts to restore a path.
const (
	minRetry = 100 * time.Millisecond
	maxRetry = 2 * time.Second
)

// Dial begins a session with the side that listens, over one or two paths: addresses are "host:port", one a
// path. It tries each once and returns when the first path is there. The session goes on to try the paths
// that are not. The error of a failure is an [*Error] with the reason of the first path that has one other
// than [Unreachable].
func Dial(ctx context.Context, cfg Config, addresses ...string) (*Session, error) {
	c, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	if n := len(addresses); n == 0 || n > MaxPaths {
		return nil, fmt.Errorf("link: %d addresses to dial; 1 to %d are allowed", n, MaxPaths)
	}
	var id nonce
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	s := newSession(c, id, true)
	failed := make(chan *Error, len(addresses))
	for i, a := range addresses {
		s.wg.Go(func() { s.keep(i, a, failed) })
	}
	var worst *Error
	for range addresses {
		select {
		case <-s.up:
			return s, nil
		case <-ctx.Done():
			s.Close("dialling was given up")
			return nil, refuse(Unreachable, "dial %v: %w", addresses, ctx.Err())
		case err := <-failed:
			if worst == nil || worst.Reason == Unreachable {
				worst = err
			}
		}
	}
	// A path that failed late may have followed one that is up.
	select {
	case <-s.up:
		return s, nil
	default:
	}
	s.Close("no path")
	return nil, worst
}

// keep has a path as long as the session lasts.
func (s *Session) keep(index int, address string, failed chan<- *Error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.wg.Go(func() {
		select {
		case <-s.done:
			cancel()
		case <-ctx.Done():
		}
	})
	var told Reason
	wait := minRetry
	for first := true; ; first = false {
		p, err := s.connect(ctx, index, address)
		if ctx.Err() != nil {
			if first {
				failed <- refuse(Unreachable, "dial %s: the session is over", address)
			}
			return
		}
		if err != nil {
			if err.Reason != told { // the same answer again is no news
				told = err.Reason
				s.cfg.refused(address, err)
			}
			if first {
				failed <- err
			}
		}
		if p != nil {
			told, wait = "", minRetry
			select {
			case <-p.gone:
			case <-s.done:
				return
			}
		}
		select {
		case <-time.After(wait):
			wait = min(2*wait, maxRetry)
		case <-s.done:
			return
		}
	}
}

// connect makes the connections of one path.
func (s *Session) connect(ctx context.Context, index int, address string) (*path, *Error) {
	for _, class := range []Class{control, Log, Bulk} {
		k, err := s.greet(ctx, index, class, address)
		if err != nil {
			return nil, err
		}
		if !s.place(k, class, index) {
			return nil, errClosed
		}
		if p := s.ready(k, index); p != nil {
			return p, nil
		}
	}
	return nil, errClosed
}

// greet makes one connection and says hello.
func (s *Session) greet(ctx context.Context, index int, class Class, address string) (_ *conn, bad *Error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	c, err := s.cfg.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, refuse(Unreachable, "dial %s: %w", address, err)
	}
	k, bad := handshake(ctx, s.cfg, c, true)
	if bad != nil {
		return nil, tooLate(ctx, bad)
	}
	defer func() {
		if bad != nil {
			k.raw.Close()
			bad = tooLate(ctx, bad)
		}
	}()
	defer context.AfterFunc(ctx, func() { k.raw.Close() })()
	s.mu.Lock()
	peer := s.other
	s.mu.Unlock()
	h := s.cfg.hello(class, index, s.nonce, peer)
	if err := k.write(kindHello, h.append(nil)); err != nil {
		return nil, handshakeError(err)
	}
	f, payload, bad := k.frames.next()
	if bad != nil {
		return nil, bad
	}
	switch f.kind {
	case kindWelcome:
	case kindRefusal:
		e, bad := parseRefusal(payload)
		if bad != nil {
			return nil, bad
		}
		return nil, e
	default:
		return nil, refuse(BadHello, "the peer answers the hello with a frame of kind %d", f.kind)
	}
	if k.hello, bad = parseHello(payload, s.cfg.versions); bad != nil {
		return nil, bad
	}
	if bad := k.identify(s.cfg.Keys); bad != nil {
		return nil, bad
	}
	return k, s.meet(&k.hello)
}

// tooLate gives what failed because the time was up that reason.
func tooLate(ctx context.Context, err *Error) *Error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return refuse(HandshakeTimedOut, "the peer takes too long: %w", err.Err)
	}
	return err
}

// meet compares a welcome with the session, which the first one completes.
func (s *Session) meet(h *hello) *Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case h.session != s.nonce || h.peer == nonce{}:
		return refuse(BadHello, "the peer welcomes another session")
	case s.other == nonce{}:
		s.other = h.peer
		s.peer = s.cfg.peer(h)
	case s.other != h.peer:
		return refuse(UnknownSession, "the peer has begun anew")
	}
	return nil
}

// hello returns this side's for one connection.
func (c *Config) hello(class Class, index int, session, peer nonce) hello {
	h := hello{
		min: c.versions[0], max: c.versions[1], pair: c.Keys.Fingerprint, side: c.Keys.Side,
		class: class, path: uint8(index), capabilities: c.Capabilities, session: session, peer: peer,
	}
	h.epoch, h.term = c.State()
	return h
}

// peer returns what a hello that was accepted says.
func (c *Config) peer(h *hello) Peer {
	v, _ := commonVersion(c.versions, [2]uint16{h.min, h.max})
	return Peer{Side: h.side, Version: int(v), Capabilities: h.capabilities & c.Capabilities, Epoch: h.epoch, Term: h.term}
}

// Listener waits for the peer.
type Listener struct {
	cfg   *Config
	lns   []net.Listener
	ready chan *Session
	slots chan struct{}
	done  chan struct{}
	wg    sync.WaitGroup

	mu       sync.Mutex
	sessions map[nonce]*Session
	closed   bool
}

// Listen waits for the peer at addresses "host:port" of this host, usually one a path.
func Listen(cfg Config, addresses ...string) (*Listener, error) {
	var lns []net.Listener
	for _, a := range addresses {
		ln, err := net.Listen("tcp", a)
		if err != nil {
			for _, ln := range lns {
				ln.Close()
			}
			return nil, fmt.Errorf("wait for the peer: %w", err)
		}
		lns = append(lns, ln)
	}
	return NewListener(cfg, lns...)
}

// NewListener waits for the peer with listeners that the caller made. They belong to it from here on.
func NewListener(cfg Config, lns ...net.Listener) (*Listener, error) {
	c, err := cfg.complete()
	if err != nil {
		for _, ln := range lns {
			ln.Close()
		}
		return nil, err
	}
	l := &Listener{cfg: c, lns: lns, ready: make(chan *Session, maxWaiting), slots: make(chan struct{}, maxHandshakes),
		done: make(chan struct{}), sessions: map[nonce]*Session{}}
	for _, ln := range lns {
		l.wg.Go(func() { l.accept(ln) })
	}
	return l, nil
}

// Addrs returns where the listener waits.
func (l *Listener) Addrs() []net.Addr {
	var a []net.Addr
	for _, ln := range l.lns {
		a = append(a, ln.Addr())
	}
	return a
}

// Accept waits for the next session that the peer begins. The peer may begin one while another is
// there, because it knows that that one is over and this side does not yet.
func (l *Listener) Accept(ctx context.Context) (*Session, error) {
	select {
	case s := <-l.ready:
		return s, nil
	case <-l.done:
		return nil, errClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Close stops waiting. Sessions that Accept has returned go on, without new paths; others end.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	close(l.done)
	l.mu.Unlock()
	var err error
	for _, ln := range l.lns {
		err = errors.Join(err, ln.Close())
	}
	l.wg.Wait()
	for {
		select {
		case s := <-l.ready:
			s.Close("the listener was closed")
		default:
			return err
		}
	}
}

func (l *Listener) accept(ln net.Listener) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l.wg.Go(func() {
		<-l.done
		cancel()
	})
	for {
		c, err := ln.Accept()
		if err != nil {
			select {
			case <-l.done:
				return
			case <-time.After(minRetry): // out of descriptors, perhaps: it passes
				continue
			}
		}
		select {
		case l.slots <- struct{}{}:
			l.wg.Go(func() {
				defer func() { <-l.slots }()
				if err := l.welcome(ctx, c); err != nil && ctx.Err() == nil {
					l.cfg.refused(c.RemoteAddr().String(), err)
				}
			})
		default:
			c.Close()
			l.cfg.refused(c.RemoteAddr().String(), refuse(Busy, "more than %d connections that have not said who they are", maxHandshakes))
		}
	}
}

// welcome takes one connection up to the end of its hello.
func (l *Listener) welcome(ctx context.Context, c net.Conn) *Error {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.HandshakeTimeout)
	defer cancel()
	k, bad := handshake(ctx, l.cfg, c, false)
	if bad != nil {
		return tooLate(ctx, bad)
	}
	stop := context.AfterFunc(ctx, func() { k.raw.Close() })
	s, bad := l.introduce(k)
	if bad != nil {
		_ = k.write(kindRefusal, appendRefusal(nil, bad))
		stop()
		k.raw.Close()
		return tooLate(ctx, bad)
	}
	// Before the answer: the peer's next connection may come at once.
	if !s.place(k, k.hello.class, int(k.hello.path)) {
		stop()
		return refuse(UnknownSession, "the session is over here")
	}
	h := l.cfg.hello(k.hello.class, int(k.hello.path), s.nonce, s.other)
	// Already checked to exist.
	v, _ := commonVersion(l.cfg.versions, [2]uint16{k.hello.min, k.hello.max})
	h.min, h.max = v, v
	if err := k.write(kindWelcome, h.append(nil)); err != nil {
		stop()
		k.raw.Close()
		return handshakeError(err)
	}
	if !stop() {
		return refuse(HandshakeTimedOut, "the peer takes too long to say hello")
	}
	s.ready(k, int(k.hello.path))
	return nil
}

// introduce reads the hello and finds its session, or begins one.
func (l *Listener) introduce(k *conn) (*Session, *Error) {
	f, payload, bad := k.frames.next()
	if bad != nil {
		return nil, bad
	}
	if f.kind != kindHello {
		return nil, refuse(BadHello, "the peer begins with a frame of kind %d", f.kind)
	}
	if k.hello, bad = parseHello(payload, l.cfg.versions); bad != nil {
		return nil, bad
	}
	if bad := k.identify(l.cfg.Keys); bad != nil {
		return nil, bad
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.sessions[k.hello.session]; s != nil {
		if k.hello.peer != s.other && (k.hello.peer != nonce{} || k.hello.class != control) {
			return nil, refuse(UnknownSession, "the peer means another session")
		}
		return s, nil
	}
	switch {
	case l.closed:
		return nil, errClosed
	case k.hello.class != control || k.hello.peer != nonce{}:
		return nil, refuse(UnknownSession, "the session is over here")
	case len(l.sessions) >= maxSessions:
		return nil, refuse(Busy, "there are %d sessions already", maxSessions)
	}
	s := newSession(l.cfg, k.hello.session, false)
	if _, err := rand.Read(s.other[:]); err != nil {
		return nil, refuse(Busy, "no random numbers: %w", err)
	}
	s.peer = l.cfg.peer(&k.hello)
	s.ended = func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.sessions, s.nonce)
	}
	l.sessions[s.nonce] = s
	l.wg.Go(func() { l.hand(s) })
	return s, nil
}

// hand gives a session to Accept when it has a path.
func (l *Listener) hand(s *Session) {
	limit := time.NewTimer(l.cfg.HandshakeTimeout)
	defer limit.Stop()
	select {
	case <-s.up:
		select {
		case l.ready <- s:
		default:
			s.fail(refuse(Busy, "%d sessions wait to be accepted", maxWaiting))
		}
	case <-limit.C:
		s.fail(refuse(HandshakeTimedOut, "the peer did not complete a path"))
	case <-l.done:
		s.Close("the listener was closed")
	case <-s.done:
	}
}
