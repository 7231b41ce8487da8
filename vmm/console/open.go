package console

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// Options are what some backends need besides their [Spec].
type Options struct {
	// Stdin and Stdout are the descriptors of the stdio backend.
	Stdin, Stdout int
	// OnKey receives escape commands typed on the stdio backend's terminal; see [Escape]. They are not
	// looked for where standard input is no terminal.
	OnKey func(key byte)
}

// Open returns the console of a port, connected as spec says.
func Open(name string, spec Spec, opt Options) (*Console, error) {
	var (
		b   Backend
		err error
	)
	switch spec.Kind {
	case None, "":
		b = nothing{}
	case Stdio:
		b, err = openStdio(opt)
	case File:
		b, err = openFile(spec.Path)
	case PTY:
		b, err = openPTY()
	case Unix:
		l, lerr := listenUnix(spec.Path)
		if lerr != nil {
			return nil, lerr
		}
		c := New(name, l)
		l.serve(c)
		return c, nil
	default:
		err = fmt.Errorf("console: no backend of kind %q", spec.Kind)
	}
	if err != nil {
		return nil, err
	}
	return New(name, b), nil
}

// nothing is the backend of [None].
type nothing struct{}

func (nothing) Output([]byte)                {}
func (nothing) Start(context.Context, Input) {}
func (nothing) Name() string                 { return "" }
func (nothing) Dropped() uint64              { return 0 }
func (nothing) Close() error                 { return nil }

// openStdio connects to the descriptors that the process was started with. A terminal is put into raw
// mode until Close. A terminal that belongs to another job is not read.
func openStdio(opt Options) (Backend, error) {
	s := &stream{in: opt.Stdin, out: opt.Stdout, patience: Patience}
	if IsTerminal(opt.Stdin) {
		if foreground(opt.Stdin) {
			restore, err := MakeRaw(opt.Stdin)
			if err != nil {
				return nil, err
			}
			s.cleanup = restore
			s.filter = (&Escape{OnKey: opt.OnKey}).Filter
		} else {
			s.in = -1
		}
	}
	st, err := newStream(s)
	if err != nil {
		if s.cleanup != nil {
			err = errors.Join(err, s.cleanup())
		}
		return nil, err
	}
	return st, nil
}

// openFile appends to a file, created with mode 0600.
func openFile(path string) (Backend, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("console: open output file: %w", err)
	}
	s, err := newStream(&stream{in: -1, out: int(f.Fd()), name: path, patience: Patience, cleanup: f.Close})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

// openPTY makes a pseudo-terminal. We keep its other end open too, so that programs may open
// and leave it at will; while none reads, output waits in the buffers and then is dropped.
func openPTY() (Backend, error) {
	master, slave, err := pty.Open()
	if err != nil {
		return nil, fmt.Errorf("console: open a pseudo-terminal: %w", err)
	}
	cleanup := func() error { return errors.Join(master.Close(), slave.Close()) }
	fd := int(master.Fd())
	if _, err = MakeRaw(int(slave.Fd())); err == nil {
		// The descriptor is ours alone; a write must not block when nobody reads.
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return nil, errors.Join(err, cleanup())
	}
	s, err := newStream(&stream{in: fd, out: fd, name: slave.Name(), cleanup: cleanup})
	if err != nil {
		return nil, errors.Join(err, cleanup())
	}
	return s, nil
}

// listener is the backend of [Unix]: each client is a session of the console. The first that
// is connected may type, the others read along.
type listener struct {
	ln   net.Listener
	path string
	done sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

func listenUnix(path string) (*listener, error) {
	ln, err := Listen(path)
	if err != nil {
		return nil, err
	}
	return &listener{ln: ln, path: path, conns: map[net.Conn]bool{}}, nil
}

func (l *listener) Output([]byte)                {} // sessions receive it
func (l *listener) Start(context.Context, Input) {}
func (l *listener) Name() string                 { return l.path }
func (l *listener) Dropped() uint64              { return 0 }

// serve accepts clients until Close.
func (l *listener) serve(c *Console) {
	l.done.Add(1)
	go func() {
		defer l.done.Done()
		for {
			conn, err := l.ln.Accept()
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				continue
			}
			l.mu.Lock()
			if l.closed {
				l.mu.Unlock()
				conn.Close()
				return
			}
			l.conns[conn] = true
			l.done.Add(1)
			l.mu.Unlock()
			go func() {
				defer l.done.Done()
				l.client(c, conn)
				l.mu.Lock()
				delete(l.conns, conn)
				l.mu.Unlock()
			}()
		}
	}()
}

// client carries one connection until one side ends it.
func (l *listener) client(c *Console, conn net.Conn) {
	s, err := c.AttachConn(conn, true)
	if errors.Is(err, ErrBusy) {
		s, err = c.AttachConn(conn, false)
	}
	if err != nil {
		conn.Close()
		return
	}
	Pipe(s, conn, nil)
}

func (l *listener) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	err := l.ln.Close() // also removes the socket file
	for conn := range l.conns {
		// The session has ended already or ends now; a client that does not read gets no longer than Patience.
		_ = conn.SetDeadline(deadline())
	}
	l.mu.Unlock()
	l.done.Wait()
	return err
}
