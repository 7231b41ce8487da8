package console

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// Limits of a console.
const (
	// RingSize is how many bytes of recent output a console keeps for who attaches later.
	RingSize = 64 << 10
	// SessionBuffer is how many bytes an attached session may lag behind the guest, the replayed
	// ring included.
	SessionBuffer = 256 << 10
	// MaxSessions bounds the sessions attached to one console at the same time.
	MaxSessions = 16
	// MaxInput is the largest piece of input that is handed over at once, in bytes.
	MaxInput = 4096
)

// Patience is how long a full terminal or file may hold up [Console.Output]. After one
// such wait in vain bytes are dropped without waiting, until the reader takes some.
const Patience = time.Second

// Errors of Attach.
var (
	ErrClosed   = errors.New("console: closed")
	ErrBusy     = errors.New("console: another session is writing to this console")
	ErrSessions = errors.New("console: too many sessions")
)

// Input takes bytes for the guest. It blocks while the guest's receive queue is full and
// keeps no reference to p. An error means that no more input is taken.
type Input func(ctx context.Context, p []byte) error

// Backend is where a console's output goes and its input comes from, apart from sessions.
type Backend interface {
	// Output takes bytes of the guest. It does not keep p, does not fail, and waits at most
	// [Patience]; what cannot be stored is dropped and counted.
	Output(p []byte)
	// Start begins input: the backend calls input from one goroutine of its own until
	// input fails or the backend is closed. It is called at most once.
	Start(ctx context.Context, input Input)
	// Name says how to reach the backend: a device path, a socket, a file name; empty if
	// there is nothing to reach.
	Name() string
	// Dropped returns how many bytes of output were lost so far.
	Dropped() uint64
	// Close hands over what is buffered (within [Patience]), ends input, waits for the goroutines of the
	// backend and restores what it changed. It may be called twice.
	Close() error
}

// Stats are a console's counters, in bytes.
type Stats struct {
	Output   uint64 `json:"output_bytes"`  // written by the guest
	Input    uint64 `json:"input_bytes"`   // taken by the guest
	Dropped  uint64 `json:"dropped_bytes"` // lost to a slow backend or session
	Sessions int    `json:"sessions"`      // attached now
}

// Console is one port of the guest. Its methods may be called from any goroutine.
type Console struct {
	name    string
	backend Backend
	ctx     context.Context // ends at Close
	cancel  context.CancelFunc

	// guest is the guest's end, set by Start before started is closed. It is called by who
	// holds the token in typing.
	guest   func(p []byte)
	started chan struct{}
	typing  chan struct{}

	mu       sync.Mutex
	ring     ring
	sessions []*Session
	writer   *Session
	stats    Stats
	closed   bool
}

// New returns a console named as users know it ("serial0", "console0") that is connected to
// backend, which it takes over.
func New(name string, backend Backend) *Console {
	ctx, cancel := context.WithCancel(context.Background())
	return &Console{
		name: name, backend: backend, ctx: ctx, cancel: cancel,
		started: make(chan struct{}),
		typing:  make(chan struct{}, 1),
		ring:    ring{data: make([]byte, RingSize)},
	}
}

// Name returns the console's name.
func (c *Console) Name() string { return c.name }

// Where says how the backend can be reached; see [Backend].
func (c *Console) Where() string { return c.backend.Name() }

// Output takes what the guest wrote and gives it to the backend, to all sessions and to the ring.
func (c *Console) Output(p []byte) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.stats.Output += uint64(len(p))
	c.ring.write(p)
	for _, s := range c.sessions {
		s.out.write(p, 0)
	}
	c.mu.Unlock()
	// Outside the lock: the backend may take its time, and a session may attach meanwhile.
	c.backend.Output(p)
}

// Start begins input: from now on what is typed is given to deliver, one call at a time, in
// pieces of at most [MaxInput] bytes. deliver blocks while the guest does not read, and must return
// once the machine has ended. Start is called once; what is typed before it waits.
func (c *Console) Start(deliver func(p []byte)) {
	c.guest = deliver
	close(c.started)
	c.backend.Start(c.ctx, c.deliver)
}

// deliver hands p to the guest in pieces and counts it. ctx ends the wait for others who type.
func (c *Console) deliver(ctx context.Context, p []byte) error {
	for len(p) > 0 {
		select {
		case <-ctx.Done(): // also when the token is free
			return ctx.Err()
		default:
		}
		select {
		case c.typing <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		piece := p[:min(len(p), MaxInput)]
		c.guest(piece)
		<-c.typing
		c.mu.Lock()
		c.stats.Input += uint64(len(piece))
		c.mu.Unlock()
		p = p[len(piece):]
	}
	return nil
}

// Stats returns the counters.
func (c *Console) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Sessions = len(c.sessions)
	s.Dropped += c.backend.Dropped()
	for _, sess := range c.sessions {
		s.Dropped += sess.out.drops()
	}
	return s
}

// Recent returns a copy of the last output, at most [RingSize] bytes.
func (c *Console) Recent() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ring.bytes()
}

// Close ends all sessions (they can read what they already have) and closes the backend. The function
// given to Start must not block any more.
func (c *Console) Close() error {
	c.mu.Lock()
	c.closed = true
	sessions := append([]*Session(nil), c.sessions...)
	c.mu.Unlock()
	c.cancel()
	for _, s := range sessions {
		s.end()
	}
	return c.backend.Close()
}

// Attach opens a session that reads the recent output and then everything that follows. With
// write it may also type; one session at a time can, [ErrBusy] says that another one does.
func (c *Console) Attach(write bool) (*Session, error) { return c.attach(write, nil) }

// AttachConn is Attach on behalf of a network connection, which [Pipe] then serves.
func (c *Console) AttachConn(conn net.Conn, write bool) (*Session, error) {
	return c.attach(write, func() bool { return hungUp(conn) })
}

func (c *Console) attach(write bool, gone func() bool) (*Session, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, ErrClosed
	}
	// A session whose peer has gone may not have noticed: it waits for the guest, which is silent or
	// takes no input. It ends now, when its place is wanted.
	c.reap()
	switch {
	case len(c.sessions) == MaxSessions:
		return nil, ErrSessions
	case write && c.writer != nil:
		return nil, ErrBusy
	}
	s := &Session{console: c, out: newBuffer(SessionBuffer), gone: gone}
	s.ctx, s.cancel = context.WithCancel(c.ctx)
	if write {
		c.writer = s
	}
	s.out.write(c.ring.bytes(), 0)
	c.sessions = append(c.sessions, s)
	return s, nil
}

// Session is one reader of a console, and perhaps its writer. Read may be called from one goroutine and
// Write from another.
type Session struct {
	console *Console
	out     *buffer
	ctx     context.Context
	cancel  context.CancelFunc
	gone    func() bool // tells that nobody reads any more; nil if that cannot be told
}

// Read waits for output of the guest. It returns [io.EOF] after the session or the console was closed.
func (s *Session) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n := s.out.peek(p)
	if n == 0 {
		return 0, io.EOF
	}
	s.out.discard(n)
	return n, nil
}

// Write types p and returns when the guest's queue has taken it.
func (s *Session) Write(p []byte) (int, error) {
	c := s.console
	c.mu.Lock()
	may := c.writer == s
	c.mu.Unlock()
	if !may {
		return 0, io.ErrClosedPipe
	}
	select {
	case <-c.started:
	case <-s.ctx.Done():
		return 0, ErrClosed
	}
	if err := c.deliver(s.ctx, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Dropped returns how many bytes this session lost because it read too slowly.
func (s *Session) Dropped() uint64 { return s.out.drops() }

// Close detaches the session.
func (s *Session) Close() error {
	s.console.mu.Lock()
	defer s.console.mu.Unlock()
	s.console.drop(s)
	return nil
}

// stopTyping lets another session become the writer.
func (s *Session) stopTyping() {
	c := s.console
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writer == s {
		c.writer = nil
	}
}

// drop detaches a session. The lock is held.
func (c *Console) drop(s *Session) {
	if i := slices.Index(c.sessions, s); i >= 0 {
		c.sessions = slices.Delete(c.sessions, i, i+1)
		c.stats.Dropped += s.out.drops()
	}
	if c.writer == s {
		c.writer = nil
	}
	s.end()
}

// reap detaches the sessions whose peer has gone. The lock is held.
func (c *Console) reap() {
	for _, s := range slices.Clone(c.sessions) {
		if s.gone != nil && s.gone() {
			c.drop(s)
		}
	}
}

func (s *Session) end() {
	s.cancel()
	s.out.close()
}
