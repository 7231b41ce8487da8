package log

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"
)

// Reader reads a log, which may be anybody's: every length is checked before memory is
// taken for it.
type Reader struct {
	// Setup and Blobs are the recorded machine and its images, in the order of Setup.Blobs; nil for none.
	Setup *Setup
	Blobs [][]byte
	// Truncated says that the last frame is cut short: the writer has died.
	Truncated bool

	r       io.ReaderAt
	end     int64 // of the frames that are whole
	frames  *frameReader
	payload []byte // a frame that was read ahead; nil: none
	dec     Decoder
	state   []span
	closer  io.Closer
}

// span is a part of the file.
type span struct{ off, n int64 }

// frameReader reads frame after frame.
type frameReader struct {
	r   *bufio.Reader
	n   uint64
	off int64
}

func newFrameReader(r io.ReaderAt, from, to int64, n uint64) *frameReader {
	return &frameReader{r: bufio.NewReaderSize(io.NewSectionReader(r, from, to-from), 1<<18), n: n, off: from}
}

// next returns the next frame. io.ErrUnexpectedEOF means that the file ends within it.
func (f *frameReader) next() (kind uint8, payload []byte, err error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return 0, nil, err // io.EOF at the border between two frames
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("%w: frame %d at byte %d claims %d bytes", ErrNotLog, f.n, f.off, n)
	}
	// In pieces, so that a length that is not true costs no memory.
	b := head[:frameHead:frameHead]
	for want := frameHead + int(n) + frameTail; len(b) < want; {
		at := len(b)
		b = append(b, make([]byte, min(want-at, pieceSize))...)
		if _, err := io.ReadFull(f.r, b[at:]); err != nil {
			return 0, nil, unexpected(err)
		}
	}
	body := b[:frameHead+n]
	if xxh3.HashSeed(body, f.n) != binary.LittleEndian.Uint64(b[len(body):]) {
		return 0, nil, fmt.Errorf("%w: frame %d at byte %d has a wrong checksum: the file was altered", ErrNotLog, f.n, f.off)
	}
	f.n++
	f.off += int64(len(b))
	return head[4], body[frameHead:], nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Open opens and checks the log in a file.
func Open(path string) (*Reader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%w: not a file", ErrNotLog)
	}
	var r *Reader
	if err == nil {
		r, err = NewReader(f, st.Size())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r.closer = f
	return r, nil
}

// NewReader checks the checksums of all frames of a log of size bytes, and reads what comes
// before the entries.
func NewReader(r io.ReaderAt, size int64) (*Reader, error) {
	var head [len(magic) + 4]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return nil, fmt.Errorf("%w: %d bytes are too few", ErrNotLog, size)
	}
	if string(head[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: it does not begin with %q", ErrNotLog, magic)
	}
	if v := binary.LittleEndian.Uint32(head[len(magic):]); v != version {
		return nil, fmt.Errorf("%w that this version can read: format %d, want %d", ErrNotLog, v, version)
	}
	l := &Reader{r: r}
	all := newFrameReader(r, int64(len(head)), size, 0)
	for l.end = all.off; ; l.end = all.off {
		_, _, err := all.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			l.Truncated = true
			break
		}
		if err != nil {
			return nil, err
		}
	}
	l.frames = newFrameReader(r, int64(len(head)), l.end, 0)
	if err := l.readHead(); err != nil {
		return nil, err
	}
	return l, nil
}

// readHead reads all frames before the entries.
func (l *Reader) readHead() error {
	kind, p, err := l.frames.next()
	if err != nil || kind != frameSetup || len(p) > maxSetup {
		return fmt.Errorf("%w: it has no setup", ErrNotLog)
	}
	l.Setup = &Setup{}
	if err := decMode.Unmarshal(p, l.Setup); err != nil {
		return fmt.Errorf("%w: %w", ErrNotLog, err)
	}
	if err := l.Setup.check(); err != nil {
		return err
	}
	z, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*pieceSize), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer z.Close()
	for _, n := range l.Setup.Blobs {
		var b []byte
		for uint64(len(b)) < n {
			kind, p, err := l.frames.next()
			if err != nil || kind != frameBlob {
				return fmt.Errorf("%w: an image is cut short", ErrNotLog)
			}
			piece, err := z.DecodeAll(p, nil)
			if err != nil || len(piece) == 0 || uint64(len(b)+len(piece)) > n {
				return fmt.Errorf("%w: an image of %d bytes does not end as announced", ErrNotLog, n)
			}
			b = append(b, piece...)
		}
		l.Blobs = append(l.Blobs, b)
	}
	for {
		at := l.frames.off
		kind, p, err := l.frames.next()
		switch {
		case errors.Is(err, io.EOF):
		case err != nil:
			return err
		case kind == frameState && l.Setup.State:
			l.state = append(l.state, span{at + frameHead, int64(len(p))})
			continue
		case kind == frameEntries:
			l.payload = p
		default:
			return fmt.Errorf("%w: frame %d is of kind %d", ErrNotLog, l.frames.n-1, kind)
		}
		break
	}
	if l.Setup.State && len(l.state) == 0 {
		return fmt.Errorf("%w: the saved machine that it begins with is missing", ErrNotLog)
	}
	l.dec.s.pos = l.Setup.Start
	return nil
}

// WriteState writes the saved machine that the recording begins with.
func (l *Reader) WriteState(w io.Writer) error {
	for _, s := range l.state {
		if _, err := io.Copy(w, io.NewSectionReader(l.r, s.off, s.n)); err != nil {
			return err
		}
	}
	return nil
}

// Next decodes the next entry; io.EOF is the log's end.
func (l *Reader) Next(e *Entry) error {
	for !l.dec.More() {
		p := l.payload
		l.payload = nil
		if p == nil {
			kind, next, err := l.frames.next()
			if err != nil {
				return err
			}
			if kind != frameEntries {
				return fmt.Errorf("%w: frame %d is of kind %d", ErrNotLog, l.frames.n-1, kind)
			}
			p = next
		}
		l.dec.Feed(p)
	}
	return l.dec.Next(e)
}

// Close closes the file of a log that Open opened.
func (l *Reader) Close() error {
	if l.closer == nil {
		return nil
	}
	return l.closer.Close()
}
