package disk

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxBounce bounds one bounce buffer, and with it one system call on an unaligned
	// buffer, in bytes. A multiple of every alignment.
	maxBounce = 1 << 20
	// maxAlign is the largest alignment of direct I/O that we work with, in bytes.
	maxAlign = 64 << 10
	// maxZeroCall bounds one call that zeroes a range, in bytes, so that a huge one stays
	// within the kernel's limits and each call ends.
	maxZeroCall = 1 << 40
	// pageSize is the unit of the page cache in bytes.
	pageSize = 4096
)

// file is what an image needs of an open file. Tests put faults behind it.
type file interface {
	pread(p []byte, off int64) (int, error)
	pwrite(p []byte, off int64) (int, error)
	fallocate(mode uint32, off, n int64) error
	// zeroOut has a block device write zeros (BLKZEROOUT).
	zeroOut(off, n uint64) error
	datasync() error
	close() error
}

// image does whole operations on a disk's file: any sector-aligned range, complete or failed. Its methods
// may be called concurrently.
type image struct {
	path      string
	size      uint64 // bytes
	blockSize uint32 // bytes
	discards  bool

	cached file // through the page cache; holds the lock
	direct file // O_DIRECT; nil if there is none
	// align is the alignment in bytes of offsets and lengths on direct, memAlign that of
	// buffers; powers of two.
	align, memAlign uint64
	// directEnd is where direct ends and the page cache begins, in bytes: size, rounded down.
	directEnd uint64

	// rmw keeps other writes away while a write reads its neighbours; taken only where
	// align is larger than a sector.
	rmw sync.RWMutex

	noPunch, noZeroRange, noZeroOut atomic.Bool // found to be unsupported

	flushMu  sync.Mutex // guards lostData
	lostData error      // of the first datasync that failed
}

// read fills p from offset off.
func (im *image) read(p []byte, off uint64) error {
	d, c := im.split(p, off)
	if len(d) > 0 {
		if err := im.readDirect(d, off); err != nil {
			return err
		}
	}
	return transfer(im.cached.pread, c, off+uint64(len(d)), io.ErrUnexpectedEOF)
}

// write stores p at offset off.
func (im *image) write(p []byte, off uint64) error {
	d, c := im.split(p, off)
	if len(d) > 0 {
		if err := im.writeDirect(d, off); err != nil {
			return err
		}
	}
	return transfer(im.cached.pwrite, c, off+uint64(len(d)), io.ErrShortWrite)
}

// split cuts p, at offset off, into its parts for direct I/O and for the page cache.
func (im *image) split(p []byte, off uint64) (direct, cached []byte) {
	if im.direct == nil || off >= im.directEnd {
		return nil, p
	}
	n := min(uint64(len(p)), im.directEnd-off)
	return p[:n], p[n:]
}

// aligned reports whether a range can go to the direct file without its neighbours.
func (im *image) aligned(off, n uint64) bool { return (off|n)&(im.align-1) == 0 }

// inPlace reports whether p itself can be handed to the direct file.
func (im *image) inPlace(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(im.memAlign-1) == 0
}

func (im *image) readDirect(p []byte, off uint64) error {
	if im.inPlace(p) && im.aligned(off, uint64(len(p))) {
		return transfer(im.direct.pread, p, off, io.ErrUnexpectedEOF)
	}
	b := getBounce()
	defer putBounce(b)
	for len(p) > 0 {
		start := off &^ (im.align - 1)
		end := min(roundUp(off+uint64(len(p)), im.align), start+maxBounce)
		buf := b[:end-start]
		if err := transfer(im.direct.pread, buf, start, io.ErrUnexpectedEOF); err != nil {
			return err
		}
		n := copy(p, buf[off-start:])
		p, off = p[n:], off+uint64(n)
	}
	return nil
}

func (im *image) writeDirect(p []byte, off uint64) error {
	if !im.aligned(off, uint64(len(p))) {
		im.rmw.Lock()
		defer im.rmw.Unlock()
	} else {
		if im.align > SectorSize {
			im.rmw.RLock()
			defer im.rmw.RUnlock()
		}
		if im.inPlace(p) {
			return transfer(im.direct.pwrite, p, off, io.ErrShortWrite)
		}
	}
	b := getBounce()
	defer putBounce(b)
	for len(p) > 0 {
		start := off &^ (im.align - 1)
		end := min(roundUp(off+uint64(len(p)), im.align), start+maxBounce)
		buf := b[:end-start]
		// The neighbours on both sides, if there are any; one block may have both.
		if off > start {
			if err := transfer(im.direct.pread, buf[:im.align], start, io.ErrUnexpectedEOF); err != nil {
				return err
			}
		}
		if last := end - im.align; off+uint64(len(p)) < end && (last > start || off == start) {
			if err := transfer(im.direct.pread, buf[last-start:], last, io.ErrUnexpectedEOF); err != nil {
				return err
			}
		}
		n := copy(buf[off-start:], p)
		if err := transfer(im.direct.pwrite, buf, start, io.ErrShortWrite); err != nil {
			return err
		}
		p, off = p[n:], off+uint64(n)
	}
	return nil
}

// zero makes the n bytes at off read as zeros, and gives their space back if unmap is
// set and the storage can.
func (im *image) zero(off, n uint64, unmap bool) error {
	for n > 0 {
		part := min(n, maxZeroCall)
		if err := im.zeroPart(off, part, unmap); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

func (im *image) zeroPart(off, n uint64, unmap bool) error {
	done, err := im.zeroInKernel(off, n, unmap)
	if done || err != nil {
		return err
	}
	for n > 0 {
		part := min(n, uint64(len(zeros)))
		if err := im.write(zeros[:part], off); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

// zeroInKernel tries the system calls for zeroing; done is false if none of them can.
func (im *image) zeroInKernel(off, n uint64, unmap bool) (done bool, err error) {
	if im.direct != nil && im.align > SectorSize {
		im.rmw.RLock()
		defer im.rmw.RUnlock()
	}
	punch := func() error {
		return im.cached.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
	}
	zeroRange := func() error {
		return im.cached.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
	}
	zeroOut := func() error { return im.cached.zeroOut(off, n) }
	for _, way := range [...]struct {
		use     bool
		missing *atomic.Bool
		call    func() error
	}{
		{unmap, &im.noPunch, punch},
		{true, &im.noZeroRange, zeroRange},
		{true, &im.noZeroOut, zeroOut},
	} {
		if !way.use || way.missing.Load() {
			continue
		}
		switch err := retry(way.call); {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.ENOSYS):
			way.missing.Store(true)
		case errors.Is(err, unix.EINVAL):
			// A block device whose blocks are larger than this range: the next one may do.
		default:
			return false, fmt.Errorf("zero %d bytes at %d: %w", n, off, err)
		}
	}
	return false, nil
}

// flush makes completed writes durable. Once it has failed it fails for ever: the
// kernel reports lost data once, and a second fdatasync would claim that nothing is missing.
func (im *image) flush() error {
	im.flushMu.Lock()
	lost := im.lostData
	im.flushMu.Unlock()
	if lost != nil {
		return lost
	}
	err := retry(im.cached.datasync)
	if err == nil {
		return nil
	}
	im.flushMu.Lock()
	defer im.flushMu.Unlock()
	if im.lostData == nil {
		im.lostData = fmt.Errorf("flush %s: %w", im.path, err)
	}
	return im.lostData
}

func (im *image) close() error {
	var err error
	if im.direct != nil {
		err = im.direct.close()
	}
	return errors.Join(err, im.cached.close())
}

// transfer has call move all of p to or from offset off, going on after short
// transfers; a call that moves nothing is the given error.
func transfer(call func([]byte, int64) (int, error), p []byte, off uint64, nothing error) error {
	for len(p) > 0 {
		n, err := call(p, int64(off))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("%d bytes at %d: %w", len(p), off, err)
		case n <= 0 || n > len(p):
			return fmt.Errorf("%d bytes at %d: %w", len(p), off, nothing)
		default:
			p, off = p[n:], off+uint64(n)
		}
	}
	return nil
}

// retry repeats a call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func roundUp(n, align uint64) uint64 { return (n + align - 1) &^ (align - 1) }

// zeros is what is written where nothing else can zero; in the BSS, so it costs no
// memory until then. The extra length leaves room for alignment.
var (
	zeroSpace [maxBounce + maxAlign]byte
	zeros     = alignedTo(zeroSpace[:], maxAlign)[:maxBounce]
)

var bounces = sync.Pool{New: func() any {
	b := alignedTo(make([]byte, maxBounce+maxAlign), maxAlign)[:maxBounce]
	return &b
}}

func getBounce() []byte  { return *bounces.Get().(*[]byte) }
func putBounce(b []byte) { bounces.Put(&b) }

// alignedTo returns the part of b that begins at a multiple of align, a power of two.
func alignedTo(b []byte, align uint64) []byte {
	p := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
	return b[roundUp(p, align)-p:]
}
