package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/ftvmm/ftvmm/vmm/console"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a guest that notes what is asked of it.
type fake struct {
	mu    sync.Mutex
	calls []string
	err   error
	cons  *console.Console
}

func (f *fake) note(call string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, call)
	return f.err
}

func (f *fake) Status(context.Context) (Status, error) {
	return Status{Name: "db1", State: Running, MemoryBytes: 1 << 28, Consoles: []string{"serial0"}}, f.note("status")
}
func (f *fake) Stats(context.Context) (Stats, error) {
	return Stats{Counters: map[string]uint64{"exits": 7}, Consoles: map[string]console.Stats{"serial0": {Output: 3}}}, f.note("stats")
}
func (f *fake) Pause(context.Context) error               { return f.note("pause") }
func (f *fake) Resume(context.Context) error              { return f.note("resume") }
func (f *fake) Reset(context.Context) error               { return f.note("reset") }
func (f *fake) Save(_ context.Context, path string) error { return f.note("save " + path) }
func (f *fake) PowerButton() error                        { return f.note("power-button") }
func (f *fake) Pair(context.Context) (Pair, error) {
	return Pair{Name: "db1", Side: "b", Role: Standby, Phase: "backup", Paths: []PairPath{{RTT: 80}}}, f.note("pair")
}
func (f *fake) Failover(context.Context) error { return f.note("failover") }
func (f *fake) Force(context.Context) error    { return f.note("force") }
func (f *fake) Quit()                          { _ = f.note("quit") }
func (f *fake) Console(name string) *console.Console {
	if f.cons != nil && name == f.cons.Name() {
		return f.cons
	}
	return nil
}

func serve(t *testing.T, m Machine) (*Server, *Client) {
	t.Helper()
	s, err := Listen(filepath.Join(t.TempDir(), "g.sock"), m)
	require.NoError(t, err)
	c := NewClient(s.Path())
	t.Cleanup(func() {
		c.Close()
		require.NoError(t, s.Close())
	})
	return s, c
}

func TestVerbsReachTheMachine(t *testing.T) {
	f := &fake{}
	s, c := serve(t, f)
	ctx := t.Context()
	st, err := c.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, Status{Meta: Meta{"ftvmm/v1", "Status"}, Name: "db1", State: Running, MemoryBytes: 1 << 28, Consoles: []string{"serial0"}}, st)
	stats, err := c.Stats(ctx)
	require.NoError(t, err)
	require.Equal(t, KindStats, stats.Kind)
	require.EqualValues(t, 7, stats.Counters["exits"])
	side, err := c.Pair(ctx)
	require.NoError(t, err)
	require.Equal(t, Pair{
		Meta: Meta{"ftvmm/v1", "Pair"}, Name: "db1", Side: "b", Role: Standby, Phase: "backup", Paths: []PairPath{{RTT: 80}},
	}, side)
	require.NoError(t, c.Failover(ctx))
	require.NoError(t, c.Force(ctx))
	require.NoError(t, c.Pause(ctx))
	require.NoError(t, c.Resume(ctx))
	require.NoError(t, c.Reset(ctx))
	require.NoError(t, c.PowerButton(ctx))
	require.NoError(t, c.Save(ctx, "/tmp/x/../state"))
	require.NoError(t, c.Quit(ctx))
	require.Equal(t, []string{"status", "stats", "pair", "failover", "force", "pause", "resume", "reset", "power-button", "save /tmp/state", "quit"}, f.calls)

	fi, err := os.Stat(s.Path())
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
}

func TestARefusalKeepsItsCodeAndRemedy(t *testing.T) {
	f := &fake{err: ErrEnded()}
	_, c := serve(t, f)
	var e *Error
	require.ErrorAs(t, c.Pause(t.Context()), &e)
	require.Equal(t, ErrEnded(), e)
	f.err = errors.New("no space left on device")
	require.ErrorAs(t, c.Save(t.Context(), "/state"), &e)
	require.Equal(t, CodeFailed, e.Code)
	require.Equal(t, "no space left on device", e.Message)
	require.NotEmpty(t, e.Remedy)
}

// do sends a request to the handler without a socket.
func do(m Machine, method, path, body string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	newServer(m).handler().ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return w
}

func TestBadRequestsAreRefused(t *testing.T) {
	c := console.New("serial0", nobackend{})
	defer c.Close()
	for _, r := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"GET", "/v1/pause", "", http.StatusMethodNotAllowed, CodeBadMethod},
		{"GET", "/v1/failover", "", http.StatusMethodNotAllowed, CodeBadMethod},
		{"POST", "/v1/force", `{"really":true}`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/status", "", http.StatusMethodNotAllowed, CodeBadMethod},
		{"GET", "/", "", http.StatusNotFound, CodeNotFound},
		{"POST", "/v1/explode", "", http.StatusNotFound, CodeNotFound},
		{"POST", "/v1/pause", "{", http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/pause", `{"now":true}`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", "", http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", `{}`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", `{"path":"relative"}`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", `{"path":"/a\u0000b"}`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", `{"path":"/a","mode":1}`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", `{"path":"/a"}{}`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", `["/a"]`, http.StatusBadRequest, CodeBadRequest},
		{"POST", "/v1/save", strings.Repeat(" ", MaxBody+1), http.StatusRequestEntityTooLarge, CodeTooLarge},
		{"GET", "/v1/console/serial9", "", http.StatusNotFound, CodeNotFound},
		{"GET", "/v1/console/serial0", "", http.StatusUpgradeRequired, CodeUpgrade},
	} {
		f := &fake{cons: c}
		w := do(f, r.method, r.path, r.body)
		require.Equal(t, r.status, w.Code, "%s %s", r.method, r.path)
		var doc errorDocument
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &doc))
		require.Equal(t, KindError, doc.Kind)
		require.Equal(t, r.code, doc.Error.Code)
		require.NotEmpty(t, doc.Error.Message)
		require.NotEmpty(t, doc.Error.Remedy)
		require.Empty(t, f.calls, "%s %s reached the machine", r.method, r.path)
	}
	require.Equal(t, http.StatusOK, do(&fake{}, "POST", "/v1/pause", "{}").Code, "an empty object is no body")
}

func TestClientSaysWhyItCannotConnect(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	require.NoError(t, err)
	ln.SetUnlinkOnClose(false)
	require.NoError(t, ln.Close())
	for _, path := range []string{filepath.Join(dir, "none.sock"), dead} {
		_, err := NewClient(path).Status(t.Context())
		var e *Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, CodeNotRunning, e.Code)
		require.Contains(t, e.Message, path)
		_, err = NewClient(path).Console(t.Context(), "serial0", true)
		require.ErrorAs(t, err, &e)
		require.Equal(t, CodeNotRunning, e.Code)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = NewClient(dead).Status(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

func TestASecondServerDoesNotTakeTheSocket(t *testing.T) {
	s, c := serve(t, &fake{})
	_, err := Listen(s.Path(), &fake{})
	require.ErrorIs(t, err, console.ErrInUse)
	_, err = c.Status(t.Context())
	require.NoError(t, err, "the first one still answers")
}

// nobackend is a console's backend that leads nowhere.
type nobackend struct{}

func (nobackend) Output([]byte)                        {}
func (nobackend) Start(context.Context, console.Input) {}
func (nobackend) Name() string                         { return "" }
func (nobackend) Dropped() uint64                      { return 0 }
func (nobackend) Close() error                         { return nil }

func readFull(t *testing.T, r io.Reader, n int) string {
	t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	require.NoError(t, err)
	return string(b)
}

func TestConsoleSessions(t *testing.T) {
	cons := console.New("serial0", nobackend{})
	typed := make(chan string, 16)
	cons.Start(func(p []byte) { typed <- string(p) })
	_, c := serve(t, &fake{cons: cons})
	cons.Output([]byte("before\n"))

	first, err := c.Console(t.Context(), "serial0", true)
	require.NoError(t, err)
	require.Equal(t, "before\n", readFull(t, first, 7), "who attaches sees what was said")
	reader, err := c.Console(t.Context(), "serial0", false)
	require.NoError(t, err)
	require.Equal(t, "before\n", readFull(t, reader, 7))
	cons.Output([]byte("after\n"))
	require.Equal(t, "after\n", readFull(t, first, 6))
	require.Equal(t, "after\n", readFull(t, reader, 6))

	_, err = first.Write([]byte("date\n"))
	require.NoError(t, err)
	require.Equal(t, "date\n", <-typed)
	_, err = c.Console(t.Context(), "serial0", true)
	var e *Error
	require.ErrorAs(t, err, &e)
	require.Equal(t, CodeBusy, e.Code)
	_, err = c.Console(t.Context(), "con/../sole?", true)
	require.ErrorAs(t, err, &e)
	require.Equal(t, CodeNotFound, e.Code)

	// The writer leaves without a word of the guest; its place is free at once.
	require.NoError(t, first.Close())
	second, err := c.Console(t.Context(), "serial0", true)
	require.NoError(t, err)
	_, err = second.Write([]byte("x"))
	require.NoError(t, err)
	require.Equal(t, "x", <-typed)
	require.EqualValues(t, 6, cons.Stats().Input)

	require.NoError(t, cons.Close())
	_, err = io.ReadAll(second)
	require.NoError(t, err, "the end of the guest is the end of the stream")
	_, err = c.Console(t.Context(), "serial0", false)
	require.ErrorAs(t, err, &e)
	require.Equal(t, CodeEnded, e.Code)
	second.Close()
	reader.Close()
}

func TestCloseCutsAttachedConsolesAndRemovesTheSocket(t *testing.T) {
	cons := console.New("serial0", nobackend{})
	defer cons.Close()
	s, err := Listen(filepath.Join(t.TempDir(), "g.sock"), &fake{cons: cons})
	require.NoError(t, err)
	c := NewClient(s.Path())
	a, err := c.Console(t.Context(), "serial0", false)
	require.NoError(t, err)
	defer a.Close()
	require.NoError(t, s.Close())
	_, err = a.Read(make([]byte, 1))
	require.Error(t, err)
	_, err = os.Stat(s.Path())
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestConnectionsAreBounded(t *testing.T) {
	s, c := serve(t, &fake{})
	var conns []net.Conn
	for range MaxConnections {
		conn, err := net.Dial("unix", s.Path())
		require.NoError(t, err)
		conns = append(conns, conn)
	}
	// All places are taken by connections that say nothing: a further client waits …
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.Status(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	// … until one of them goes.
	for _, conn := range conns {
		conn.Close()
	}
	_, err = c.Status(t.Context())
	require.NoError(t, err)
}

func FuzzRequest(f *testing.F) {
	f.Add("POST", "/v1/save", []byte(`{"path":"/tmp/state"}`))
	f.Add("POST", "/v1/pause", []byte(`{}`))
	f.Add("GET", "/v1/console/serial0?write=1", []byte(``))
	f.Add("PUT", "/v1/../x", []byte("\x00"))
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		r, err := http.NewRequest(method, "http://guest"+target, bytes.NewReader(body))
		if err != nil {
			return
		}
		m := &fake{}
		w := httptest.NewRecorder()
		newServer(m).handler().ServeHTTP(w, r)
		if w.Code >= 300 && w.Code < 400 {
			return // the router's own redirect to a clean path
		}
		if method == http.MethodHead {
			return
		}
		var doc Meta
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &doc), "%s %s: %s", method, target, w.Body)
		require.Equal(t, APIVersion, doc.APIVersion)
		if w.Code != http.StatusOK {
			require.Empty(t, m.calls)
		}
		for _, call := range m.calls {
			path, isSave := strings.CutPrefix(call, "save ")
			require.True(t, !isSave || filepath.IsAbs(path))
		}
	})
}
