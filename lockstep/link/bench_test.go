package link

import (
	"fmt"
	"testing"
	"time"
)

// quiet are settings for benchmarks: nobody is suspected.
func quiet(th threads) spec {
	f := func(c *Config) { c.Suspect, c.Dead, c.threads = 10*time.Second, 20*time.Second, th }
	return spec{a: f, b: f}
}

var threadsNames = map[threads]string{blocking: "blocking", blockingLocked: "blocking+locked", polled: "poller"}

// BenchmarkRoundTrip is one urgent message there and one back, TLS and both senders' threads included.
func BenchmarkRoundTrip(b *testing.B) {
	for _, th := range []threads{polled, blocking, blockingLocked} {
		b.Run(threadsNames[th], func(b *testing.B) {
			w := wire(b, quiet(th))
			back := make(chan struct{}, 1)
			answer := make([]byte, 64)
			w.a.Start(func(Class, []byte) { _ = w.a.Send(Log, answer, true) })
			w.b.Start(func(Class, []byte) { back <- struct{}{} })
			p := make([]byte, 64)
			b.ReportAllocs()
			for b.Loop() {
				_ = w.b.Send(Log, p, true)
				<-back
			}
		})
	}
}

// BenchmarkSend is what a message costs the thread that sends it, with a reader that keeps up.
func BenchmarkSend(b *testing.B) {
	for _, size := range []int{16, 256} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			w := wire(b, quiet(blocking))
			w.a.Start(func(Class, []byte) {})
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				_ = w.b.Send(Log, p, false)
			}
		})
	}
}

// BenchmarkBulk is throughput of 1 MiB messages.
func BenchmarkBulk(b *testing.B) {
	w := wire(b, quiet(blocking))
	w.a.Start(func(Class, []byte) {})
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		_ = w.b.Send(Bulk, p, true)
	}
}
