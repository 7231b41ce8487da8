package console

import (
	"sync"
	"time"
)

// buffer is a bounded queue of bytes between one producer that must not wait (or not
// for long) and one consumer that takes its time.
type buffer struct {
	mu      sync.Mutex
	data    []byte // a ring of fixed size
	start   int
	n       int
	dropped uint64
	stuck   bool // the last bounded wait was in vain: do not wait again before room appears
	closed  bool
	changed chan struct{} // closed and replaced at each change that somebody may wait for
	waiters int
}

func newBuffer(size int) *buffer {
	return &buffer{data: make([]byte, size), changed: make(chan struct{})}
}

// wake tells all who wait. The lock is held.
func (b *buffer) wake() {
	if b.waiters > 0 {
		close(b.changed)
		b.changed = make(chan struct{})
		b.waiters = 0
	}
}

// wait returns a channel that is closed at the next change. The lock is held.
func (b *buffer) wait() <-chan struct{} {
	b.waiters++
	return b.changed
}

// put stores as much of p as fits and returns how much. The lock is held.
func (b *buffer) put(p []byte) int {
	p = p[:min(len(p), len(b.data)-b.n)]
	end := (b.start + b.n) % len(b.data)
	c := copy(b.data[end:], p)
	copy(b.data, p[c:])
	b.n += len(p)
	return len(p)
}

// write stores p. While there is no room it waits, patience at most for the whole of p;
// what does not fit then is dropped and counted. With patience 0 it never waits.
func (b *buffer) write(p []byte, patience time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var timer *time.Timer
	for len(p) > 0 && !b.closed {
		if k := b.put(p); k > 0 {
			p = p[k:]
			b.wake()
			continue
		}
		if patience == 0 || b.stuck {
			break
		}
		if timer == nil {
			timer = time.NewTimer(patience)
			defer timer.Stop()
		}
		ch := b.wait()
		b.mu.Unlock()
		select {
		case <-ch:
		case <-timer.C:
			b.mu.Lock()
			b.stuck = true
			continue
		}
		b.mu.Lock()
	}
	b.dropped += uint64(len(p))
}

// peek waits until there are bytes and copies up to len(p) of them without taking them
// out; 0 means that the buffer is closed and empty. [buffer.discard] takes them out.
func (b *buffer) peek(p []byte) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.n == 0 {
		if b.closed {
			return 0
		}
		ch := b.wait()
		b.mu.Unlock()
		<-ch
		b.mu.Lock()
	}
	n := min(b.n, len(p))
	c := copy(p[:n], b.data[b.start:])
	copy(p[c:n], b.data)
	return n
}

// discard takes n bytes out.
func (b *buffer) discard(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.start = (b.start + n) % len(b.data)
	b.n -= n
	b.stuck = false
	b.wake()
}

// close ends the buffer: what is in it can still be read, nothing is added.
func (b *buffer) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.closed = true
		b.waiters++ // wake has a reason even if nobody waits
		b.wake()
	}
}

func (b *buffer) drops() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.dropped
}

// ring keeps the last bytes written to it.
type ring struct {
	data []byte
	end  int // where the next byte goes
	full bool
}

func (r *ring) write(p []byte) {
	if len(p) >= len(r.data) {
		copy(r.data, p[len(p)-len(r.data):])
		r.end, r.full = 0, true
		return
	}
	c := copy(r.data[r.end:], p)
	copy(r.data, p[c:])
	if r.end+len(p) >= len(r.data) {
		r.full = true
	}
	r.end = (r.end + len(p)) % len(r.data)
}

// bytes returns a copy of what is kept, oldest first.
func (r *ring) bytes() []byte {
	if !r.full {
		return append([]byte(nil), r.data[:r.end]...)
	}
	return append(append([]byte(nil), r.data[r.end:]...), r.data[:r.end]...)
}
