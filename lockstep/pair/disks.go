package pair

import (
	"fmt"
	"sync"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/lockstep/pages"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// key names a disk request.
type key struct {
	disk int
	tag  uint64
}

// reqState is how far a request is on this side's own replica.
type reqState uint8

const (
	held   reqState = iota // the backup has not yet been shown to be right
	issued                 // to the backend
	done                   // the backend has finished; the guest does not know
)

// request is a disk request of the guest that it has not seen complete.
type request struct {
	disk   int
	r      *vmm.DiskRequest
	point  protocol.Point // of the kick
	state  reqState
	status blk.Status
}

// tracking says what is kept of the writes to this side's replica, for one that is to become equal.
type tracking uint8

const (
	trackNothing tracking = iota
	trackRanges           // where was written: a copy of the disk is under way
	trackData             // what was written, until the backup has done the same
)

// written is a range that the guest has changed.
type written struct {
	point  protocol.Point
	extent pages.Extent
}

// disks carries a guest's requests to this side's replicas. On the live side they are issued as they
// come, and their completions are inputs. On the following side they are issued once a watermark has shown that the
// guest is the same, and the log says when they are complete.
type disks struct {
	backends []backend.Disk
	complete func(disk int, tag uint64, status uint8) // an input of a live guest
	finished func()                                   // a request of a following guest is done

	mu       sync.Mutex
	idle     sync.Cond // a backend has finished a request
	live     bool
	requests map[key]*request
	waiting  []*request // held, in order
	inFlight int
	track    tracking
	writes   []written
	term     uint64 // in which the guest makes them
	bytes    int    // in writes
}

func newDisks(backends []backend.Disk) *disks {
	d := &disks{backends: backends, requests: map[key]*request{}}
	d.idle.L = &d.mu
	return d
}

// submit takes a request of the guest, at a point. At once issues it in any case: it came with a state that is known
// to be right.
func (d *disks) submit(disk int, r *vmm.DiskRequest, p protocol.Point, atOnce bool) {
	q := &request{disk: disk, r: r, point: p}
	d.mu.Lock()
	d.requests[key{disk, r.Tag}] = q
	if !d.live && !atOnce {
		d.waiting = append(d.waiting, q)
		d.mu.Unlock()
		return
	}
	if d.live {
		d.note(q)
	}
	d.begin(q)
	d.mu.Unlock()
	d.issue(q)
}

// begin marks a request as issued. The lock is held.
func (d *disks) begin(q *request) {
	q.state = issued
	d.inFlight++
}

// issue gives a request that has begun to the backend.
func (d *disks) issue(q *request) {
	disk, tag := q.disk, q.r.Tag
	d.backends[disk].Submit(q.r, func(err error) {
		d.mu.Lock()
		q.state = done
		if err != nil {
			q.status = blk.StatusIOErr
		}
		d.inFlight--
		d.idle.Broadcast()
		live, status := d.live, uint8(q.status)
		d.mu.Unlock()
		if live {
			d.complete(disk, tag, status)
		} else {
			d.finished()
		}
	})
}

// taken forgets a request whose completion the guest gets now, and returns it: nil if there is none.
func (d *disks) taken(disk int, tag uint64) *request {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := key{disk, tag}
	q := d.requests[k]
	delete(d.requests, k)
	return q
}

// state tells how far a request is, false if there is no such request.
func (d *disks) state(disk int, tag uint64) (reqState, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	q := d.requests[key{disk, tag}]
	if q == nil {
		return 0, false
	}
	return q.state, true
}

// verified issues what was kicked up to and including a point.
func (d *disks) verified(p protocol.Point) {
	d.mu.Lock()
	n := 0
	for n < len(d.waiting) && !p.Before(d.waiting[n].point) {
		d.begin(d.waiting[n])
		n++
	}
	start := d.waiting[:n]
	d.waiting = d.waiting[n:]
	d.mu.Unlock()
	for _, q := range start {
		d.issue(q)
	}
}

// promote makes the guest of these disks live: what is not issued is, and what is done becomes an input.
func (d *disks) promote() {
	d.mu.Lock()
	d.live = true
	start := d.waiting
	d.waiting = nil
	for _, q := range start {
		d.note(q)
		d.begin(q)
	}
	var complete []*request
	for _, q := range d.requests {
		if q.state == done {
			complete = append(complete, q)
		}
	}
	d.mu.Unlock()
	for _, q := range start {
		d.issue(q)
	}
	for _, q := range complete {
		d.complete(q.disk, q.r.Tag, uint8(q.status))
	}
}

// demote makes it a guest that follows.
func (d *disks) demote() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.live, d.track, d.writes, d.bytes = false, trackNothing, nil, 0
}

// drain waits until no request is at a backend. None may be submitted meanwhile.
func (d *disks) drain() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.inFlight > 0 {
		d.idle.Wait()
	}
}

// forget drops all requests, of a guest whose state is dropped or replaced. None is in flight.
func (d *disks) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.requests)
	d.waiting = nil
}

// note keeps a write, if they are tracked. The lock is held.
func (d *disks) note(q *request) {
	r := q.r
	if d.track == trackNothing || r.Length == 0 {
		return
	}
	e := pages.Extent{Disk: uint16(q.disk), Offset: int64(r.Offset), Length: int64(r.Length)}
	switch r.Op {
	case blk.Write:
		if d.track == trackData {
			e.Data = append([]byte(nil), r.Data...)
			d.bytes += len(e.Data)
		}
	case blk.Discard, blk.WriteZeroes: // ranges that are discarded read as zeros
	default:
		return
	}
	d.writes = append(d.writes, written{q.point, e})
}

// setTracking changes what is kept, and returns what was.
func (d *disks) setTracking(t tracking) []written {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := d.writes
	d.track, d.writes, d.bytes = t, nil, 0
	return w
}

// prune forgets the writes of a term that the backup has done, too. The guest may have begun another by now.
func (d *disks) prune(done protocol.Point, term uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if term == d.term {
		d.drop(done)
	}
}

// drop forgets the writes up to and including a point. The lock is held.
func (d *disks) drop(done protocol.Point) {
	n := 0
	for n < len(d.writes) && !done.Before(d.writes[n].point) {
		d.bytes -= len(d.writes[n].extent.Data)
		n++
	}
	if n > 0 {
		d.writes = append([]written(nil), d.writes[n:]...)
	}
}

// since returns the writes after a point, and forgets all: a new term begins. With the zero point it returns all.
func (d *disks) since(p protocol.Point, term uint64) []written {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p != (protocol.Point{}) {
		d.drop(p)
	}
	w := d.writes
	d.track, d.writes, d.bytes, d.term = trackData, nil, 0, term
	return w
}

// beginTerm tracks a term that begins without a cut.
func (d *disks) beginTerm(term uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.track, d.writes, d.bytes, d.term = trackData, nil, 0, term
}

// barrier waits until every request that is in flight now has been done once.
func (d *disks) barrier() {
	d.mu.Lock()
	defer d.mu.Unlock()
	var mine []*request
	for _, q := range d.requests {
		if q.state == issued {
			mine = append(mine, q)
		}
	}
	for _, q := range mine {
		for q.state == issued {
			d.idle.Wait()
		}
	}
}

// access carries out a request of this package's own, and waits for it.
func access(b backend.Disk, op blk.Op, offset int64, data []byte, length int64) error {
	ch := make(chan error, 1)
	r := &blk.Request{Op: op, Offset: uint64(offset), Length: uint64(length), Data: data}
	b.Submit(r, func(err error) { ch <- err })
	return <-ch
}

// apply writes an extent to its replica.
func (d *disks) apply(e pages.Extent) error {
	if int(e.Disk) >= len(d.backends) {
		return fmt.Errorf("pair: content for disk %d, there are %d", e.Disk, len(d.backends))
	}
	b := d.backends[e.Disk]
	size := int64(b.Info().Size)
	if e.Offset < 0 || e.Length > size || e.Offset > size-e.Length {
		return fmt.Errorf("pair: %d bytes at %d of disk %d are beyond its %d", e.Length, e.Offset, e.Disk, size)
	}
	if e.Data == nil {
		// Requests have a limit, and the backend may have to write zeros.
		for e.Length > 0 {
			n := min(e.Length, zeroPiece)
			if err := access(b, blk.WriteZeroes, e.Offset, nil, n); err != nil {
				return fmt.Errorf("pair: write zeros to disk %d: %w", e.Disk, err)
			}
			e.Offset, e.Length = e.Offset+n, e.Length-n
		}
		return nil
	}
	if err := access(b, blk.Write, e.Offset, append([]byte(nil), e.Data...), e.Length); err != nil {
		return fmt.Errorf("pair: write disk %d: %w", e.Disk, err)
	}
	return nil
}

// zeroPiece is the most that is zeroed at once, in bytes.
const zeroPiece = 256 << 20
