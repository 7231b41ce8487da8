package disk

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

const (
	// MaxQueued bounds the requests that wait for a worker. It is more than a device's
	// virtqueues can hold, so that a request beyond it (which fails with [ErrQueueFull])
	// means that the caller lost count.
	MaxQueued = 1024
	// DefaultWorkers is how many requests are in flight at once unless Options say otherwise.
	DefaultWorkers = 64
	// MaxWorkers bounds Options.Workers.
	MaxWorkers = 512
	// SectorSize is the unit of a disk's size and of every request, in bytes.
	SectorSize = 512
	// MaxID is the length of the longest disk ID in bytes (virtio 1.2, 5.2.6).
	MaxID = 20
	// MaxSize bounds a disk in bytes: what an off_t can address, in whole sectors.
	MaxSize = 1<<63 - SectorSize
)

var (
	// ErrClosed completes a request that was submitted after Close.
	ErrClosed = errors.New("disk: closed")
	// ErrQueueFull completes a request that was submitted while MaxQueued others waited.
	ErrQueueFull = errors.New("disk: too many requests in flight")
	// ErrRange completes a request that does not lie within the disk or whose Data does
	// not have its length.
	ErrRange = errors.New("disk: request out of range")
	// ErrReadOnly completes a request that would change a read-only disk.
	ErrReadOnly = errors.New("disk: read-only")
)

// Direct says whether the host's page cache is bypassed.
type Direct uint8

// The values of [Direct].
const (
	DirectAuto Direct = iota // where the file system can do it
	DirectOn                 // or do not open
	DirectOff
)

// UnmarshalText reads "auto", "on" or "off".
func (d *Direct) UnmarshalText(text []byte) error {
	switch string(text) {
	case "auto", "":
		*d = DirectAuto
	case "on":
		*d = DirectOn
	case "off":
		*d = DirectOff
	default:
		return mirror.Errorf("disk-direct", "Write auto, on or off.", "direct I/O: %q is not a mode", text)
	}
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (d Direct) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String returns "auto", "on" or "off".
func (d Direct) String() string {
	switch d {
	case DirectOn:
		return "on"
	case DirectOff:
		return "off"
	}
	return "auto"
}

// Options say how an image is opened. The zero value opens an existing image for writing.
type Options struct {
	ReadOnly bool
	Direct   Direct
	// Create is the size in bytes with which an image that does not exist is made; 0
	// refuses. An image that exists keeps its size.
	Create uint64
	// ID is what the guest reads as the disk's identity, at most [MaxID] bytes. The sides of
	// a pair must agree on it.
	ID string
	// Workers bounds the requests in flight; 0 means [DefaultWorkers].
	Workers int
	// Observe, if set, is told of every request when it is complete, from any
	// goroutine: how long it waited for a worker and how long that took.
	Observe func(op blk.Op, waited, took time.Duration, err error)
}

// job is a request on its way through the queue.
type job struct {
	r    *blk.Request
	done func(error)
	at   time.Time // of its submission; zero without Options.Observe
}

// disk implements [backend.Disk].
type disk struct {
	info    backend.DiskInfo
	im      *image
	observe func(blk.Op, time.Duration, time.Duration, error)
	max     int // workers

	queue   chan job
	idle    atomic.Int32 // workers that wait for a job
	alone   soloist      // one more worker, which is asked first
	workers sync.WaitGroup

	mu      sync.Mutex // guards what follows, and sends on queue against its closing
	started int        // workers
	solo    bool       // the soloist has started
	closed  bool
}

// Open opens the raw image at path, a regular file or a block device, and locks it
// against everyone else, for as long as the disk is open. Errors are of type
// [*mirror.Error].
func Open(path string, opts Options) (backend.Disk, error) {
	switch {
	case len(opts.ID) > MaxID:
		return nil, mirror.Errorf("disk-id", fmt.Sprintf("Choose one of at most %d bytes.", MaxID),
			"open disk %s: ID %q is too long", path, opts.ID)
	case opts.Workers < 0 || opts.Workers > MaxWorkers:
		return nil, mirror.Errorf("disk-workers", fmt.Sprintf("Choose a number from 1 to %d.", MaxWorkers),
			"open disk %s: %d workers", path, opts.Workers)
	case opts.Workers == 0:
		opts.Workers = DefaultWorkers
	}
	im, err := openImage(path, opts)
	if err != nil {
		return nil, err
	}
	return newDisk(im, opts), nil
}

func newDisk(im *image, opts Options) *disk {
	return &disk{
		info: backend.DiskInfo{
			Size:      im.size,
			BlockSize: im.blockSize,
			ReadOnly:  opts.ReadOnly,
			Discard:   im.discards && !opts.ReadOnly,
			ID:        opts.ID,
		},
		im:      im,
		observe: opts.Observe,
		max:     opts.Workers,
		queue:   make(chan job, MaxQueued),
	}
}

// Info implements [backend.Disk].
func (d *disk) Info() backend.DiskInfo { return d.info }

// Submit implements [backend.Disk].
func (d *disk) Submit(r *blk.Request, done func(error)) {
	j := job{r: r, done: done}
	if d.observe != nil {
		j.at = time.Now()
	}
	if err := d.submit(j); err != nil {
		// Not from within Submit: the caller may hold what its completion needs.
		go done(err)
	}
}

func (d *disk) submit(j job) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	if !d.solo && d.max > 1 {
		d.solo = true
		d.workers.Add(1)
		go d.playAlone()
	}
	if d.alone.play(j) {
		return nil
	}
	select {
	case d.queue <- j:
	default:
		return ErrQueueFull
	}
	// One worker for each job that waits, as far as they go. The count of idle ones may be behind:
	// then a worker too many starts, once.
	if d.started < max(d.max-1, 1) && int(d.idle.Load()) < len(d.queue) {
		d.started++
		d.workers.Add(1)
		go d.work()
	}
	return nil
}

// work is a worker's life: it carries out requests until Close has emptied the queue.
func (d *disk) work() {
	defer d.workers.Done()
	for {
		d.idle.Add(1)
		j, ok := <-d.queue
		d.idle.Add(-1)
		if !ok {
			return
		}
		d.carryOut(j)
	}
}

// playAlone is the soloist's life.
func (d *disk) playAlone() {
	defer d.workers.Done()
	for {
		j, ok := d.alone.next()
		if !ok {
			return
		}
		d.carryOut(j)
	}
}

// carryOut carries out a job and reports it.
func (d *disk) carryOut(j job) {
	if d.observe == nil {
		j.done(d.do(j.r))
		return
	}
	begun := time.Now()
	err := d.do(j.r)
	d.observe(j.r.Op, begun.Sub(j.at), time.Since(begun), err)
	j.done(err)
}

// do carries out a request.
func (d *disk) do(r *blk.Request) error {
	if err := d.check(r); err != nil {
		return err
	}
	switch r.Op {
	case blk.Read:
		return d.im.read(r.Data, r.Offset)
	case blk.Write:
		return d.im.write(r.Data, r.Offset)
	case blk.Flush:
		return d.im.flush()
	case blk.Discard:
		return d.im.zero(r.Offset, r.Length, true)
	case blk.WriteZeroes:
		return d.im.zero(r.Offset, r.Length, r.Unmap)
	}
	return fmt.Errorf("disk: unknown operation %d", r.Op)
}

// check repeats the checks of the device, so that a defect there cannot grow an image.
func (d *disk) check(r *blk.Request) error {
	if r.Op == blk.Flush {
		return nil
	}
	if r.Offset > d.info.Size || r.Length > d.info.Size-r.Offset || (r.Offset|r.Length)%SectorSize != 0 {
		return ErrRange
	}
	if (r.Op == blk.Read || r.Op == blk.Write) && uint64(len(r.Data)) != r.Length {
		return ErrRange
	}
	if r.Op != blk.Read && d.info.ReadOnly {
		return ErrReadOnly
	}
	return nil
}

// Close implements [backend.Disk]. Requests that were submitted before are carried out
// and completed; later ones fail with [ErrClosed]. It may be called again, without effect.
func (d *disk) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	close(d.queue)
	d.alone.stop()
	d.mu.Unlock()
	d.workers.Wait()

	var err error
	if !d.info.ReadOnly {
		err = d.im.flush()
	}
	return errors.Join(err, d.im.close())
}

// String names the disk in messages.
func (d *disk) String() string { return d.im.path }

var _ backend.Disk = (*disk)(nil)
var _ fmt.Stringer = (*disk)(nil)
