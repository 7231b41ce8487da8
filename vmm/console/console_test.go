package console

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseSpec(t *testing.T) {
	for text, want := range map[string]Spec{
		"none": {Kind: None}, "stdio": {Kind: Stdio}, "pty": {Kind: PTY},
		"file:/a:b": {File, "/a:b"}, "unix:x.sock": {Unix, "x.sock"},
	} {
		got, err := ParseSpec(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got)
		require.Equal(t, text, got.String())
	}
	require.Equal(t, "none", Spec{}.String())
	for _, text := range []string{"", "tty", "file", "file:", "unix:", "stdio:x", "pty:", "none:x", "Stdio", "file:a\x00b", "unix:/" + strings.Repeat("x", MaxSocketPath)} {
		_, err := ParseSpec(text)
		require.Error(t, err, text)
	}
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"none", "file:/x", "unix:y", "pty", "stdio:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseSpec(s)
		if err != nil {
			return
		}
		require.Equal(t, s, p.String())
	})
}

func TestRingKeepsTheLastBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := ring{data: make([]byte, rapid.IntRange(1, 40).Draw(t, "size"))}
		var all []byte
		for _, p := range rapid.SliceOf(rapid.SliceOfN(rapid.Byte(), 0, 60)).Draw(t, "writes") {
			r.write(p)
			all = append(all, p...)
			if want := all[max(0, len(all)-len(r.data)):]; !bytes.Equal(want, r.bytes()) {
				t.Fatalf("ring holds %q, want %q", r.bytes(), want)
			}
		}
	})
}

func TestBufferIsAQueueThatDropsWhatDoesNotFit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBuffer(rapid.IntRange(1, 20).Draw(t, "size"))
		var model []byte
		var dropped uint64
		for range rapid.IntRange(0, 30).Draw(t, "steps") {
			if len(model) > 0 && rapid.Bool().Draw(t, "read") {
				p := make([]byte, rapid.IntRange(1, 25).Draw(t, "n"))
				n := b.peek(p)
				if want := model[:min(len(model), len(p))]; !bytes.Equal(want, p[:n]) {
					t.Fatalf("read %q, want %q", p[:n], want)
				}
				k := rapid.IntRange(0, n).Draw(t, "taken")
				b.discard(k)
				model = model[k:]
				continue
			}
			p := rapid.SliceOfN(rapid.Byte(), 0, 25).Draw(t, "p")
			fit := min(len(p), len(b.data)-len(model))
			b.write(p, 0)
			model = append(model, p[:fit]...)
			dropped += uint64(len(p) - fit)
		}
		if b.drops() != dropped {
			t.Fatalf("%d dropped, want %d", b.drops(), dropped)
		}
	})
}

func TestBufferWaitsForItsReaderForABoundedTime(t *testing.T) {
	b := newBuffer(4)
	b.write([]byte("abcd"), 0)
	done := make(chan struct{})
	go func() { b.write([]byte("ef"), time.Hour); close(done) }()
	p := make([]byte, 4)
	for got := ""; got != "abcdef"; {
		n := b.peek(p)
		got += string(p[:n])
		b.discard(n)
	}
	<-done
	require.Zero(t, b.drops())

	b.write([]byte("abcd"), 0)
	b.write([]byte("x"), time.Nanosecond)
	require.EqualValues(t, 1, b.drops())
	b.write([]byte("y"), time.Hour) // returns at once: the reader is known to be stuck
	require.EqualValues(t, 2, b.drops())
	b.discard(4)
	b.write([]byte("z"), time.Hour)
	require.Equal(t, "z", string(p[:b.peek(p)]))

	go b.close()
	b.write([]byte("abcdefgh"), time.Hour) // close ends the wait
	require.NotZero(t, b.drops())
	require.Equal(t, 4, b.peek(p), "what was stored before the end can be read")
	b.discard(4)
	require.Zero(t, b.peek(p))
}

func TestEscape(t *testing.T) {
	for in, want := range map[string]struct{ data, keys string }{
		"abc":            {"abc", ""},
		"a\x1dqb":        {"ab", "q"},
		"\x1d\x1dq":      {"\x1dq", ""},
		"\x1d?\x1dp\x03": {"\x03", "?p"},
		"\x1d":           {"", ""},
	} {
		for split := 0; split <= len(in); split++ {
			var keys, data []byte
			e := Escape{OnKey: func(k byte) { keys = append(keys, k) }}
			data = append(data, e.Filter([]byte(in[:split]))...)
			data = append(data, e.Filter([]byte(in[split:]))...)
			require.Equal(t, want.data, string(data), "%q cut at %d", in, split)
			require.Equal(t, want.keys, string(keys), "%q cut at %d", in, split)
		}
	}
}

// guest collects what is typed.
type guest struct {
	mu   sync.Mutex
	got  []byte
	grew chan struct{}
}

func newGuest() *guest { return &guest{grew: make(chan struct{}, 1)} }

func (g *guest) deliver(p []byte) {
	g.mu.Lock()
	g.got = append(g.got, p...)
	g.mu.Unlock()
	select {
	case g.grew <- struct{}{}:
	default:
	}
}

// wait returns when everything typed is want.
func (g *guest) wait(t *testing.T, want string) {
	t.Helper()
	for {
		g.mu.Lock()
		got := string(g.got)
		g.mu.Unlock()
		if got == want {
			return
		}
		require.Less(t, len(got), max(len(want), 1), "got %q", got)
		<-g.grew
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func TestStdioOverPipes(t *testing.T) {
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	keys := 0
	c, err := Open("serial0", Spec{Kind: Stdio}, Options{Stdin: int(inR.Fd()), Stdout: int(outW.Fd()), OnKey: func(byte) { keys++ }})
	require.NoError(t, err)
	g := newGuest()
	_, err = inW.WriteString("typed before\x1dq")
	require.NoError(t, err)
	c.Start(g.deliver)
	g.wait(t, "typed before\x1dq") // no terminal, no escapes
	require.Zero(t, keys)

	c.Output([]byte("hello\r\n"))
	b := make([]byte, 7)
	_, err = io.ReadFull(outR, b)
	require.NoError(t, err)
	require.Equal(t, "hello\r\n", string(b))

	c.Output([]byte("last words"))
	require.NoError(t, c.Close())
	require.NoError(t, c.Close(), "twice is harmless")
	outW.Close()
	rest, err := io.ReadAll(outR)
	require.NoError(t, err)
	require.Equal(t, "last words", string(rest), "Close hands over what is buffered")
	require.Equal(t, Stats{Output: 17, Input: 14}, c.Stats())
}

func TestStdioLosesOutputToAClosedPipeAndGoesOn(t *testing.T) {
	inR, _ := pipe(t)
	outR, outW := pipe(t)
	c, err := Open("serial0", Spec{Kind: Stdio}, Options{Stdin: int(inR.Fd()), Stdout: int(outW.Fd())})
	require.NoError(t, err)
	outR.Close()
	c.Output([]byte("nobody reads this"))
	require.NoError(t, c.Close())
	require.EqualValues(t, 17, c.Stats().Dropped)
}

func TestStdioOnATerminal(t *testing.T) {
	// The terminal is no controlling terminal of this process, so the kernel's answer to
	// "who is in the foreground" is "nobody" and the console leaves the terminal alone.
	master, slave, err := pty.Open()
	require.NoError(t, err)
	defer master.Close()
	defer slave.Close()
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	require.NoError(t, err)
	require.True(t, IsTerminal(int(slave.Fd())))
	c, err := Open("serial0", Spec{Kind: Stdio}, Options{Stdin: int(slave.Fd()), Stdout: int(slave.Fd())})
	require.NoError(t, err)
	now, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	require.NoError(t, err)
	require.Equal(t, before, now)
	require.NoError(t, c.Close())

	restore, err := MakeRaw(int(slave.Fd()))
	require.NoError(t, err)
	now, err = unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	require.NoError(t, err)
	require.Zero(t, now.Lflag&(unix.ECHO|unix.ICANON|unix.ISIG))
	require.NotZero(t, now.Oflag&unix.OPOST, "messages of ftvmm share the screen")
	require.NoError(t, restore())
	require.NoError(t, restore())
	now, err = unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	require.NoError(t, err)
	require.Equal(t, before, now)
	_, err = MakeRaw(-1)
	require.Error(t, err)
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	big := strings.Repeat("0123456789abcdef", 2*streamBuffer/16)
	for range 2 {
		c, err := Open("serial0", Spec{File, path}, Options{})
		require.NoError(t, err)
		require.Equal(t, path, c.Where())
		c.Start(func([]byte) { panic("a file types nothing") })
		c.Output([]byte(big)) // more than the buffer: a file is waited for
		require.NoError(t, c.Close())
		require.Zero(t, c.Stats().Dropped)
	}
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, big+big, string(b), "a file is appended to")
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
	_, err = Open("serial0", Spec{File, filepath.Join(path, "x")}, Options{})
	require.Error(t, err)
}

func TestPTY(t *testing.T) {
	c, err := Open("serial0", Spec{Kind: PTY}, Options{})
	require.NoError(t, err)
	// Nobody has it open: output must not block, whatever its size.
	c.Output(bytes.Repeat([]byte("x"), 4*streamBuffer))
	require.NotZero(t, c.Stats().Dropped)
	require.NoError(t, c.Close())

	c, err = Open("serial0", Spec{Kind: PTY}, Options{})
	require.NoError(t, err)
	g := newGuest()
	c.Start(g.deliver)
	tty, err := os.OpenFile(c.Where(), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	defer tty.Close()
	_, err = tty.WriteString("raw\x03\r")
	require.NoError(t, err)
	g.wait(t, "raw\x03\r")
	c.Output([]byte("a\r\n"))
	b := make([]byte, 3)
	_, err = io.ReadFull(tty, b)
	require.NoError(t, err)
	require.Equal(t, "a\r\n", string(b))
	require.NoError(t, c.Close())
}

func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	c, err := Open("serial0", Spec{Unix, path}, Options{})
	require.NoError(t, err)
	require.Equal(t, path, c.Where())
	c.Output([]byte("boot\n"))
	first, err := net.Dial("unix", path)
	require.NoError(t, err)
	defer first.Close()
	read := func(conn net.Conn, want string) {
		t.Helper()
		b := make([]byte, len(want))
		_, err := io.ReadFull(conn, b)
		require.NoError(t, err)
		require.Equal(t, want, string(b))
	}
	read(first, "boot\n")
	second, err := net.Dial("unix", path)
	require.NoError(t, err)
	defer second.Close()
	read(second, "boot\n")
	_, err = second.Write([]byte("ignored")) // the second one reads along
	require.NoError(t, err)
	_, err = first.Write([]byte("typed"))
	require.NoError(t, err)
	g := newGuest()
	c.Start(g.deliver)
	g.wait(t, "typed")
	c.Output([]byte("more\n"))
	read(first, "more\n")
	read(second, "more\n")

	// The first one stops typing and goes on reading; a third may type now.
	require.NoError(t, first.(*net.UnixConn).CloseWrite())
	third := dialUntilWriter(t, c, path, g)
	defer third.Close()
	c.Output([]byte("end\n"))
	read(first, "end\n")
	require.NoError(t, c.Close())
	_, err = io.ReadAll(second)
	require.NoError(t, err)
	_, err = os.Stat(path)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// dialUntilWriter connects until a connection is the one that may type: that the last writer
// stopped is noticed by a goroutine of the listener.
func dialUntilWriter(t *testing.T, c *Console, path string, g *guest) net.Conn {
	t.Helper()
	for {
		c.mu.Lock()
		free := c.writer == nil
		c.mu.Unlock()
		if free {
			break
		}
	}
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	_, err = conn.Write([]byte("!"))
	require.NoError(t, err)
	g.wait(t, "typed!")
	return conn
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	ln, err := Listen(path)
	require.NoError(t, err)
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
	_, err = Listen(path)
	require.ErrorIs(t, err, ErrInUse)

	ln.SetUnlinkOnClose(false)
	require.NoError(t, ln.Close())
	ln, err = Listen(path)
	require.NoError(t, err, "the socket of a dead process is replaced")
	require.NoError(t, ln.Close())

	require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600))
	_, err = Listen(path)
	require.ErrorContains(t, err, "no socket")
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "precious", string(b))

	_, err = Listen(filepath.Join(dir, "no", "such", "dir"))
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Listen("/" + strings.Repeat("x", MaxSocketPath))
	require.ErrorContains(t, err, "at most")
}

// Of many that start at once on a dead socket, one wins.
func TestListenersExcludeEachOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 20 {
		ln, err := Listen(path)
		require.NoError(t, err)
		ln.SetUnlinkOnClose(false)
		require.NoError(t, ln.Close())
		var wg sync.WaitGroup
		won := make(chan net.Listener, 8)
		for range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if ln, err := Listen(path); err == nil {
					won <- ln
				}
			}()
		}
		wg.Wait()
		require.Len(t, won, 1)
		(<-won).Close()
	}
}

func TestSessionsThatLagLoseBytesAlone(t *testing.T) {
	c := New("serial0", nothing{})
	slow, err := c.Attach(false)
	require.NoError(t, err)
	quick, err := c.Attach(false)
	require.NoError(t, err)
	p := make([]byte, MaxInput)
	for i := range 2 * SessionBuffer / len(p) {
		copy(p, fmt.Sprint(i))
		c.Output(p)
		got := make([]byte, len(p))
		_, err := io.ReadFull(quick, got)
		require.NoError(t, err)
		require.Equal(t, p, got)
	}
	require.EqualValues(t, SessionBuffer, slow.Dropped())
	require.Zero(t, quick.Dropped())
	require.EqualValues(t, SessionBuffer, c.Stats().Dropped)
	require.NoError(t, slow.Close())
	require.EqualValues(t, SessionBuffer, c.Stats().Dropped, "what a session lost stays counted")
	require.Len(t, c.Recent(), RingSize)
	require.NoError(t, c.Close())
	rest, err := io.ReadAll(quick)
	require.NoError(t, err)
	require.Empty(t, rest)
	_, err = c.Attach(false)
	require.ErrorIs(t, err, ErrClosed)
}

func TestSessionsAreBounded(t *testing.T) {
	c := New("serial0", nothing{})
	defer c.Close()
	for range MaxSessions {
		_, err := c.Attach(false)
		require.NoError(t, err)
	}
	_, err := c.Attach(false)
	require.ErrorIs(t, err, ErrSessions)
}

func TestInputWaitsForTheGuest(t *testing.T) {
	c := New("serial0", nothing{})
	w, err := c.Attach(true)
	require.NoError(t, err)
	_, err = c.Attach(true)
	require.ErrorIs(t, err, ErrBusy)
	r, err := c.Attach(false)
	require.NoError(t, err)
	_, err = r.Write([]byte("x"))
	require.ErrorIs(t, err, io.ErrClosedPipe)

	text := strings.Repeat("paste ", 2*MaxInput)
	written := make(chan error, 1)
	go func() {
		_, err := w.Write([]byte(text))
		written <- err
	}()
	room := make(chan struct{})
	var got strings.Builder
	c.Start(func(p []byte) {
		<-room // the guest's queue is full until somebody makes room
		got.Write(p)
	})
	for got := 0; got < len(text); got += MaxInput {
		room <- struct{}{}
	}
	require.NoError(t, <-written)
	require.Equal(t, text, got.String())
	require.NoError(t, w.Close())
	_, err = c.Attach(true)
	require.NoError(t, err, "the writer's place is free again")
	require.NoError(t, c.Close())
}

// A client that goes away while the guest takes no input does not keep the place of the writer.
func TestAWriterWhoIsGoneIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	c, err := Open("serial0", Spec{Unix, path}, Options{})
	require.NoError(t, err)
	release := make(chan struct{})
	entered := make(chan struct{}, 1)
	c.Start(func([]byte) {
		select {
		case entered <- struct{}{}:
		default:
		}
		<-release
	})
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	_, err = conn.Write([]byte("x"))
	require.NoError(t, err)
	<-entered
	require.NoError(t, conn.Close())
	s, err := c.Attach(true)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	close(release)
	require.NoError(t, c.Close())
}

func TestTypingEndsWithTheSession(t *testing.T) {
	c := New("serial0", nothing{})
	defer c.Close()
	s, err := c.Attach(true)
	require.NoError(t, err)
	result := make(chan error, 1)
	go func() {
		_, err := s.Write([]byte("x")) // waits: the guest has not started
		result <- err
	}()
	require.NoError(t, s.Close())
	require.Error(t, <-result)
	n, err := s.Read(nil)
	require.NoError(t, err)
	require.Zero(t, n)
	_, err = s.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	require.Error(t, c.deliver(canceled(), []byte("x")))
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

func FuzzEscape(f *testing.F) {
	f.Add([]byte("a\x1dqb\x1d\x1d"), 2)
	f.Fuzz(func(t *testing.T, p []byte, split int) {
		split = max(0, min(split, len(p)))
		whole := (&Escape{}).Filter(bytes.Clone(p))
		var e Escape
		parts := append(bytes.Clone(e.Filter(bytes.Clone(p[:split]))), e.Filter(bytes.Clone(p[split:]))...)
		require.Equal(t, string(whole), string(parts))
	})
}
