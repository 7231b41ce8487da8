package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ftvmm/ftvmm/vmm/console"
)

// Limits of the server.
const (
	// MaxBody bounds the body of a request in bytes.
	MaxBody = 64 << 10
	// MaxConnections bounds the connections at one time; more wait in the socket's backlog.
	MaxConnections = 64
	maxHeader      = 16 << 10
	// headerTimeout is how long a client may take to send a request; idleTimeout how long it
	// may keep a connection without one.
	headerTimeout = 5 * time.Second
	idleTimeout   = time.Minute
	// shutdownTimeout is how long Close waits for requests in progress.
	shutdownTimeout = 2 * time.Second
)

// ConsoleProtocol is the name in the Upgrade header with which a console is attached.
const ConsoleProtocol = "ftvmm-console"

// Server serves one guest's control socket.
type Server struct {
	machine Machine
	http    *http.Server
	path    string
	serving chan struct{} // closed when the accept loop has ended

	mu       sync.Mutex
	attached map[net.Conn]bool
	closed   bool
	consoles sync.WaitGroup
}

// Listen opens the socket at path and serves m until Close. A socket that a dead process has left is
// replaced; [console.ErrInUse] says that a live one listens there.
func Listen(path string, m Machine) (*Server, error) {
	ln, err := console.Listen(path)
	if err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	s := newServer(m)
	s.path = path
	go func() {
		defer close(s.serving)
		// It always returns an error; at Close that is ErrServerClosed.
		if err := s.http.Serve(limit(ln, MaxConnections)); !errors.Is(err, http.ErrServerClosed) {
			slog.Error("control socket ended", "path", path, "error", err)
		}
	}()
	return s, nil
}

func newServer(m Machine) *Server {
	s := &Server{machine: m, attached: map[net.Conn]bool{}, serving: make(chan struct{})}
	s.http = &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	return s
}

// Path returns the socket's path.
func (s *Server) Path() string { return s.path }

// Close ends the server: no more connections, requests in progress may end for a short time, attached
// consoles are cut. The socket file is removed.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for conn := range s.attached {
		_ = conn.SetDeadline(time.Now().Add(shutdownTimeout / 2))
	}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
	}
	<-s.serving
	s.mu.Lock()
	for conn := range s.attached {
		conn.Close()
	}
	s.mu.Unlock()
	s.consoles.Wait()
	if err != nil {
		return fmt.Errorf("control: end the server: %w", err)
	}
	return nil
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	get := func(path string, f func(ctx context.Context) (any, error)) {
		s.route(mux, http.MethodGet, path, func(w http.ResponseWriter, r *http.Request) error {
			doc, err := f(r.Context())
			if err == nil {
				reply(w, http.StatusOK, doc)
			}
			return err
		})
	}
	get("/v1/status", func(ctx context.Context) (any, error) {
		st, err := s.machine.Status(ctx)
		st.Meta = NewMeta(KindStatus)
		return st, err
	})
	get("/v1/stats", func(ctx context.Context) (any, error) {
		st, err := s.machine.Stats(ctx)
		st.Meta = NewMeta(KindStats)
		return st, err
	})
	get("/v1/pair", func(ctx context.Context) (any, error) {
		p, err := s.machine.Pair(ctx)
		p.Meta = NewMeta(KindPair)
		return p, err
	})
	verb := func(name string, f func(r *http.Request) error) {
		s.route(mux, http.MethodPost, "/v1/"+name, func(w http.ResponseWriter, r *http.Request) error {
			if err := f(r); err != nil {
				return err
			}
			reply(w, http.StatusOK, Done{NewMeta(KindDone), name})
			return nil
		})
	}
	// plain is a verb without a body.
	plain := func(name string, f func(ctx context.Context) error) {
		verb(name, func(r *http.Request) error {
			if err := decode(r, &struct{}{}, true); err != nil {
				return err
			}
			return f(r.Context())
		})
	}
	plain("pause", s.machine.Pause)
	plain("resume", s.machine.Resume)
	plain("reset", s.machine.Reset)
	plain("failover", s.machine.Failover)
	plain("force", s.machine.Force)
	plain("power-button", func(context.Context) error { return s.machine.PowerButton() })
	plain("quit", func(context.Context) error {
		s.machine.Quit()
		return nil
	})
	verb("save", func(r *http.Request) error {
		var req SaveRequest
		if err := decode(r, &req, false); err != nil {
			return err
		}
		if !filepath.IsAbs(req.Path) || strings.ContainsRune(req.Path, 0) {
			return badRequest("%q is no absolute path", req.Path)
		}
		return s.machine.Save(r.Context(), filepath.Clean(req.Path))
	})
	s.route(mux, http.MethodGet, "/v1/console/{name}", s.attach)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, &Error{Code: CodeNotFound, Status: http.StatusNotFound, Message: "there is nothing at " + r.URL.Path, Remedy: "is this client newer than the guest's ftvmm?"})
	})
	return mux
}

// route adds a path that one method is for.
func (s *Server) route(mux *http.ServeMux, method, path string, f func(http.ResponseWriter, *http.Request) error) {
	mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != method {
			w.Header().Set("Allow", method)
			refuse(w, &Error{Code: CodeBadMethod, Status: http.StatusMethodNotAllowed, Message: r.Method + " is not possible here", Remedy: "use " + method})
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, MaxBody)
		if err := f(w, r); err != nil {
			refuse(w, err)
		}
	})
}

func badRequest(format string, args ...any) *Error {
	return &Error{Code: CodeBadRequest, Status: http.StatusBadRequest, Message: fmt.Sprintf(format, args...), Remedy: "see the documentation of the control socket"}
}

// decode reads the body: one JSON object without unknown fields, or nothing if mayBeEmpty.
func decode(r *http.Request, into any, mayBeEmpty bool) error {
	body, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return &Error{Code: CodeTooLarge, Status: http.StatusRequestEntityTooLarge, Message: fmt.Sprintf("the body is larger than %d bytes", MaxBody), Remedy: "send less"}
	}
	if err != nil {
		return badRequest("read the body: %v", err)
	}
	if len(bytes.TrimSpace(body)) == 0 && mayBeEmpty {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return badRequest("the body is not what is expected: %v", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return badRequest("something follows the JSON document")
	}
	return nil
}

func reply(w http.ResponseWriter, status int, doc any) {
	b, err := json.Marshal(doc)
	if err != nil {
		refuse(w, fmt.Errorf("encode the answer: %w", err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // a client that has gone needs no answer
}

// errorDocument is a refusal on the wire.
type errorDocument struct {
	Meta
	Error Error `json:"error"`
}

func refuse(w http.ResponseWriter, err error) {
	e := asError(err)
	reply(w, e.Status, errorDocument{NewMeta(KindError), *e})
}

func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		if e.Status == 0 {
			c := *e
			c.Status = http.StatusInternalServerError
			return &c
		}
		return e
	}
	return &Error{Code: CodeFailed, Status: http.StatusInternalServerError, Message: err.Error(), Remedy: "the guest's own messages may say more"}
}

// attach turns the connection into a session of a console.
func (s *Server) attach(w http.ResponseWriter, r *http.Request) error {
	name := r.PathValue("name")
	c := s.machine.Console(name)
	if c == nil {
		return &Error{Code: CodeNotFound, Status: http.StatusNotFound, Message: fmt.Sprintf("the guest has no console %q", name), Remedy: "ftvmm vm status lists the consoles"}
	}
	if !strings.EqualFold(r.Header.Get("Upgrade"), ConsoleProtocol) {
		w.Header().Set("Upgrade", ConsoleProtocol)
		return &Error{Code: CodeUpgrade, Status: http.StatusUpgradeRequired, Message: "a console is attached by an upgrade of the connection", Remedy: "use ftvmm vm console"}
	}
	write := false
	if q := r.URL.Query().Get("write"); q != "" {
		var err error
		if write, err = strconv.ParseBool(q); err != nil {
			return badRequest("write=%q is neither true nor false", q)
		}
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return fmt.Errorf("take over the connection: %w", err)
	}
	if !s.track(conn) {
		conn.Close()
		return nil
	}
	defer s.untrack(conn)
	_ = conn.SetDeadline(time.Time{}) // the server's limits end here
	session, err := c.AttachConn(conn, write)
	if err != nil {
		s.refuseRaw(conn, attachError(err))
		return nil
	}
	if _, err := fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", ConsoleProtocol); err != nil {
		session.Close()
		conn.Close()
		return nil
	}
	early := make([]byte, buffered.Reader.Buffered())
	if _, err := io.ReadFull(buffered, early); err != nil {
		early = nil
	}
	console.Pipe(session, conn, early)
	return nil
}

func attachError(err error) *Error {
	switch {
	case errors.Is(err, console.ErrBusy):
		return &Error{Code: CodeBusy, Status: http.StatusConflict, Message: "another session types on this console", Remedy: "attach read-only, or end the other session"}
	case errors.Is(err, console.ErrSessions):
		return &Error{Code: CodeSessions, Status: http.StatusConflict, Message: "too many sessions are attached to this console", Remedy: "end one of them"}
	}
	return ErrEnded()
}

// refuseRaw answers on a connection that was taken over, and closes it.
func (s *Server) refuseRaw(conn net.Conn, e *Error) {
	body, err := json.Marshal(errorDocument{NewMeta(KindError), *e})
	if err == nil {
		fmt.Fprintf(conn, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", e.Status, http.StatusText(e.Status), len(body), body)
	}
	conn.Close()
}

// track notes an attached connection, so that Close ends it; false: the server is closing.
func (s *Server) track(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.attached[conn] = true
	s.consoles.Add(1)
	return true
}

func (s *Server) untrack(conn net.Conn) {
	s.mu.Lock()
	delete(s.attached, conn)
	s.mu.Unlock()
	s.consoles.Done()
}

// limit bounds the connections that are open at one time.
func limit(ln net.Listener, n int) net.Listener {
	return &limitedListener{Listener: ln, places: make(chan struct{}, n), closed: make(chan struct{})}
}

type limitedListener struct {
	net.Listener
	places chan struct{}
	once   sync.Once
	closed chan struct{}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.places <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.places
		return nil, err
	}
	return &limitedConn{UnixConn: conn.(*net.UnixConn), release: sync.OnceFunc(func() { <-l.places })}, nil
}

func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitedConn gives its place back when it is closed. It embeds the concrete type, whose other
// methods (SyscallConn) the console needs.
type limitedConn struct {
	*net.UnixConn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.UnixConn.Close()
}
