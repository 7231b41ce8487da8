package log

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"
)

// The file's fixed parts.
const (
	magic   = "FTVMMLOG"
	version = 1

	frameHead = 5 // length and kind
	frameTail = 8 // checksum

	frameSetup   = 1
	frameBlob    = 2
	frameState   = 3
	frameEntries = 4

	// maxFrame bounds a payload: what may wait in the writer, and an entry on top.
	maxFrame = maxPending + 2*MaxData
	// pieceSize is how much of a blob one frame holds, uncompressed.
	pieceSize = 1 << 20
)

// Limits of a writer.
const (
	// flushBytes are written at once, less after flushAfter.
	flushBytes = 64 << 10
	flushAfter = 50 * time.Millisecond
	// maxPending bounds the bytes that wait to be written. Then the vCPU loop waits for the file: a
	// guest that is recorded runs no faster than its log can be written.
	maxPending = 16 << 20
)

// ErrNotLog reports a file that is no log of this program, or was altered.
var ErrNotLog = errors.New("log: not a recording")

// framer writes frames.
type framer struct {
	w   io.Writer
	n   uint64 // frames so far
	buf []byte
}

func (f *framer) frame(kind uint8, payload []byte) error {
	b := binary.LittleEndian.AppendUint32(f.buf[:0], uint32(len(payload)))
	b = append(append(b, kind), payload...)
	b = binary.LittleEndian.AppendUint64(b, xxh3.HashSeed(b, f.n))
	f.n++
	if cap(b) <= 1<<20 {
		f.buf = b
	}
	_, err := f.w.Write(b)
	return err
}

// Write lets a framer take a saved machine's state.
func (f *framer) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		piece := p[:min(len(p), pieceSize)]
		if err := f.frame(frameState, piece); err != nil {
			return n, err
		}
		p, n = p[len(piece):], n+len(piece)
	}
	return n, nil
}

// Writer writes a log. The vCPU loop appends entries to a buffer; a goroutine writes them.
type Writer struct {
	f framer

	mu      sync.Mutex
	room    sync.Cond // signalled when the buffer has been taken, or writing has failed
	pending []byte
	spare   []byte
	written int64 // bytes of entries
	err     error
	closed  bool
	wake    chan struct{}
	done    chan struct{}
}

// NewWriter begins a log on w with the setup and its images. state, if not nil, writes the saved machine that
// the recording begins with.
func NewWriter(w io.Writer, s *Setup, blobs [][]byte, state func(io.Writer) error) (*Writer, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	head, err := encMode.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("log: encode setup: %w", err)
	}
	if len(head) > maxSetup {
		return nil, fmt.Errorf("log: a setup of %d bytes", len(head))
	}
	l := &Writer{f: framer{w: w}, wake: make(chan struct{}, 1), done: make(chan struct{})}
	l.room.L = &l.mu
	if _, err := w.Write(binary.LittleEndian.AppendUint32([]byte(magic), version)); err != nil {
		return nil, err
	}
	if err := l.f.frame(frameSetup, head); err != nil {
		return nil, err
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	for _, b := range blobs {
		for len(b) > 0 {
			n := min(len(b), pieceSize)
			if err := l.f.frame(frameBlob, z.EncodeAll(b[:n], nil)); err != nil {
				return nil, err
			}
			b = b[n:]
		}
	}
	if state != nil {
		if err := state(&l.f); err != nil {
			return nil, err
		}
	}
	go l.drain()
	return l, nil
}

// Append has f append entries to the buffer. It waits while too much is pending.
func (l *Writer) Append(f func(b []byte) []byte) {
	l.mu.Lock()
	for len(l.pending) >= maxPending && l.err == nil {
		l.room.Wait()
	}
	l.pending = f(l.pending)
	if l.err != nil {
		l.pending = l.pending[:0] // nobody takes it any more
	}
	full := len(l.pending) >= flushBytes
	l.mu.Unlock()
	if full {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// drain writes what is pending, until the writer is closed.
func (l *Writer) drain() {
	defer close(l.done)
	tick := time.NewTicker(flushAfter)
	defer tick.Stop()
	for {
		select {
		case <-l.wake:
		case <-tick.C:
		}
		l.mu.Lock()
		b, closed := l.pending, l.closed
		l.pending, l.spare = l.spare[:0], nil
		l.room.Broadcast()
		l.mu.Unlock()
		var err error
		if len(b) > 0 {
			err = l.f.frame(frameEntries, b)
		}
		l.mu.Lock()
		l.written += int64(len(b))
		if cap(b) <= 4*flushBytes {
			l.spare = b
		}
		if err != nil && l.err == nil {
			l.err = fmt.Errorf("log: write: %w", err)
			l.room.Broadcast()
		}
		failed := l.err != nil
		l.mu.Unlock()
		if closed || failed {
			return
		}
	}
}

// Err returns why writing has failed, if it has. The guest is not stopped by that.
func (l *Writer) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Bytes returns the size of the entries so far.
func (l *Writer) Bytes() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written + int64(len(l.pending))
}

// Close writes what is pending. The file belongs to the caller.
func (l *Writer) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	<-l.done
	return l.Err()
}
