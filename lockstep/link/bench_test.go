package link

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Variables that make the test program an echo of messages, for benchmarks between two processes.
const (
	echoAddress = "FTVMM_LINK_ECHO_ADDRESS"
	echoKeys    = "FTVMM_LINK_ECHO_KEYS"
)

// quiet returns settings for benchmarks: nobody is suspected.
func quiet(k *Keys) Config {
	return Config{Keys: k, Suspect: 10 * time.Second, Dead: 20 * time.Second}
}

// echo answers each message with itself, until the link ends.
func echo() error {
	k, err := LoadKeys(os.Getenv(echoKeys))
	if err != nil {
		return err
	}
	s, err := Dial(context.Background(), quiet(k), os.Getenv(echoAddress))
	if err != nil {
		return err
	}
	s.Start(func(c Class, p []byte) {
		if c == Log {
			_ = s.Send(c, p, true)
		}
	})
	<-s.Done()
	return nil
}

// beside begins a session with an echo in another process.
func beside(b *testing.B) *Session {
	dir := filepath.Join(b.TempDir(), "keys")
	_, err := CreatePair(dir, "db", false)
	require.NoError(b, err)
	l, err := Listen(quiet(loadSide(b, dir, A)), "127.0.0.1:0")
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, l.Close()) })
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), echoAddress+"="+addressesOf(l)[0], echoKeys+"="+filepath.Join(dir, "b"))
	cmd.Stderr = os.Stderr
	require.NoError(b, cmd.Start())
	b.Cleanup(func() { require.NoError(b, cmd.Wait()) })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := l.Accept(ctx)
	require.NoError(b, err)
	b.Cleanup(func() { s.Close("end of benchmark"); s.wg.Wait() })
	return s
}

// BenchmarkRoundTrip is one urgent message to another process and back: TLS, and the hand-over to the
// senders' goroutines on both sides included. With blocking descriptors instead of Go's network poller it took
// 79 µs where this took 48, and 161 µs on goroutines locked to their threads: a goroutine that has woken the sender
// and goes on into a blocking read keeps its processor from the sender until the scheduler takes it away.
func BenchmarkRoundTrip(b *testing.B) {
	s := beside(b)
	back := make(chan struct{}, 1)
	s.Start(func(Class, []byte) { back <- struct{}{} })
	p := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		_ = s.Send(Log, p, true)
		<-back
	}
}

// BenchmarkSend is what a message costs the thread that sends it, if the peer keeps up.
func BenchmarkSend(b *testing.B) {
	for _, size := range []int{16, 256} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			s := beside(b)
			s.Start(func(Class, []byte) {})
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				_ = s.Send(Bulk, p, false)
			}
		})
	}
}

// BenchmarkBulk is throughput of messages of 1 MiB.
func BenchmarkBulk(b *testing.B) {
	s := beside(b)
	s.Start(func(Class, []byte) {})
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		_ = s.Send(Bulk, p, true)
	}
}

// beEcho is TestMain's: it reports whether this process is an echo.
func beEcho(w io.Writer) bool {
	if os.Getenv(echoAddress) == "" {
		return false
	}
	if err := echo(); err != nil {
		fmt.Fprintln(w, strings.TrimSpace(err.Error()))
		os.Exit(1)
	}
	return true
}
