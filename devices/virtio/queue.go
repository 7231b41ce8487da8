package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Limits of a virtqueue.
const (
	// DefaultQueueSize is the queue size that a device offers unless told otherwise.
	DefaultQueueSize = 256
	// MaxQueueSize is the largest queue size that a device can offer.
	MaxQueueSize = 1024
	// MaxSegments bounds the buffers of one chain, indirect or not. Guests that stay
	// within the specification have at most a queue size of them (2.7.5.3.1).
	MaxSegments = 1024
)

// Layout of a split virtqueue (virtio 1.2, 2.7.5 to 2.7.8), in bytes.
const (
	descSize     = 16
	availHeader  = 4 // flags, idx
	usedHeader   = 4
	usedElemSize = 8
	eventSize    = 2 // used_event after the available ring, avail_event after the used one
	legacyAlign  = 4096
	descNext     = 1 << 0
	descWrite    = 1 << 1
	descIndirect = 1 << 2
	noInterrupt  = 1 << 0 // flags of the available ring
	availFlags   = 0      // offsets of the fields in the headers of the rings
	availIdx     = 2
	usedIdx      = 2
)

// Segment is one buffer of a chain: Len bytes of guest RAM at Addr.
type Segment struct {
	Addr uint64
	Len  uint32
}

// Chain is what the driver put into a queue in one go: buffers that the device reads,
// then buffers that it writes (virtio 1.2, 2.7.4.2). All lie in guest RAM and none is
// empty. The slices are valid until the Chain is used for another call of [Queue.Next].
type Chain struct {
	Head          uint16
	Out, In       []Segment // device-readable, device-writable
	OutLen, InLen uint64    // their total lengths in bytes

	segs []Segment // backs Out and In
}

// Set makes c a chain with these buffers, in storage of its own: for a device that
// restores one from its state.
func (c *Chain) Set(head uint16, out, in []Segment) {
	c.start(head)
	c.segs = append(append(c.segs, out...), in...)
	c.split(len(out))
}

func (c *Chain) start(head uint16) {
	*c = Chain{Head: head, segs: c.segs[:0]}
}

// split divides segs into Out and In.
func (c *Chain) split(outs int) {
	c.Out, c.In = c.segs[:outs:outs], c.segs[outs:]
	for _, s := range c.Out {
		c.OutLen += uint64(s.Len)
	}
	for _, s := range c.In {
		c.InLen += uint64(s.Len)
	}
}

// Queue is one split virtqueue, seen from the device.
//
// Nothing here relies on the driver standing still: what is read from guest memory is
// read once, then checked, then used.
type Queue struct {
	t   *Transport
	mem *memory.Memory
	max uint16 // what the device offers

	size              uint16 // a power of two up to max
	enabled           bool
	desc, avail, used uint64 // guest-physical addresses of the three parts
	vector            uint16
	next              uint16 // index of the next chain in the available ring
	done              uint16 // index of the next element of the used ring
	signalled         uint16 // done when the driver was last told of it
	inUse             uint16 // chains taken and not yet given back
	filled            uint16 // elements written at done and not yet published
	taken             uint16 // chains taken since the last Interrupt

	fence atomic.Uint32
}

// barrier orders what was stored before it against what is loaded after it. Where
// other vCPUs run meanwhile, the event indexes need that (2.7.7.2, 2.7.10); the fence's
// value means nothing.
func (q *Queue) barrier() { q.fence.Store(0) }

// Live says whether the device may touch the queue at all: the driver has set it up and
// lets the device use memory, and nothing is broken. A legacy driver may use a
// queue before it sets DRIVER_OK (2.1.2 was not a rule then), and some of them
// never enable bus mastering.
func (q *Queue) Live() bool {
	t := q.t
	return q.enabled && !t.broken && (t.legacy || t.status&StatusDriverOK != 0 && t.f.BusMaster())
}

// Max returns the number of descriptors that the device offers.
func (q *Queue) Max() int { return int(q.max) }

// Size returns the number of descriptors that the driver has chosen.
func (q *Queue) Size() int { return int(q.size) }

// InUse returns how many chains the device has taken and not yet given back.
func (q *Queue) InUse() int { return int(q.inUse) }

var (
	errRunaway  = errors.New("available index runs away")
	errTooMany  = errors.New("more chains in flight than descriptors")
	errIndex    = errors.New("descriptor index beyond the table")
	errLoop     = errors.New("descriptor chain loops")
	errOrder    = errors.New("readable buffer after a writable one")
	errIndirect = errors.New("misplaced indirect descriptor")
	errTable    = errors.New("indirect table of a wrong length")
	errSegments = errors.New("too many buffers in a chain")
)

// Next takes the next chain that the driver has made available. It returns false when
// there is none, and has then asked the driver for a notification of the next one; or
// when the queue is not in use or the device broken.
//
// Between two calls of Interrupt it returns no more chains than the queue has
// descriptors: rings that overlap each other or a buffer can otherwise make work out of the work
// done, without end.
func (q *Queue) Next(c *Chain) bool {
	if !q.Live() {
		return false
	}
	ring, err := q.mem.View(q.avail, availHeader+2*uint64(q.size))
	if err != nil {
		q.t.Fail()
		return false
	}
	ahead := binary.LittleEndian.Uint16(ring[availIdx:]) - q.next
	if ahead == 0 {
		if !q.t.Has(FeatureRingEventIdx) {
			return false
		}
		if q.mem.PutUint16(q.used+usedHeader+usedElemSize*uint64(q.size), q.next) != nil {
			q.t.Fail()
			return false
		}
		q.barrier()
		if ahead = binary.LittleEndian.Uint16(ring[availIdx:]) - q.next; ahead == 0 {
			return false
		}
	}
	switch {
	case ahead > q.size:
		err = errRunaway
	case q.taken == q.size:
		return false
	case q.inUse >= q.size:
		err = errTooMany
	default:
		err = q.parse(c, binary.LittleEndian.Uint16(ring[availHeader+2*int(q.next&(q.size-1)):]))
	}
	if err != nil {
		q.t.Fail()
		return false
	}
	q.next++
	q.inUse++
	q.taken++
	return true
}

// parse follows the chain that begins at head (2.7.5).
func (q *Queue) parse(c *Chain, head uint16) error {
	c.start(head)
	table, err := q.mem.View(q.desc, descSize*uint64(q.size))
	if err != nil {
		return err
	}
	entries, left := uint64(q.size), uint64(q.size)
	index, indirect, outs := uint64(head), false, 0
	for {
		if index >= entries {
			return errIndex
		}
		if left == 0 {
			return errLoop
		}
		left--
		d := table[index*descSize:][:descSize]
		addr, length := binary.LittleEndian.Uint64(d), binary.LittleEndian.Uint32(d[8:])
		flags := binary.LittleEndian.Uint16(d[12:])
		if flags&descIndirect != 0 {
			// The write flag of such a descriptor means nothing (2.7.5.3.2).
			if indirect || flags&descNext != 0 || !q.t.Has(FeatureRingIndirectDesc) {
				return errIndirect
			}
			if length == 0 || length%descSize != 0 {
				return errTable
			}
			if table, err = q.mem.View(addr, uint64(length)); err != nil {
				return err
			}
			entries, left = uint64(length)/descSize, uint64(length)/descSize
			index, indirect = 0, true
			continue
		}
		if length > 0 {
			if !q.mem.Contains(addr, uint64(length)) {
				return memory.ErrOutside
			}
			if len(c.segs) == MaxSegments {
				return errSegments
			}
			if flags&descWrite == 0 {
				if outs < len(c.segs) {
					return errOrder
				}
				outs++
			}
			c.segs = append(c.segs, Segment{addr, length})
		}
		if flags&descNext == 0 {
			c.split(outs)
			return nil
		}
		index = uint64(binary.LittleEndian.Uint16(d[14:]))
	}
}

// Rewind puts the last n chains that Next returned back, as if they had not been
// taken, and forgets what Fill wrote for them. It is for a device that finds too little
// room for what it has.
func (q *Queue) Rewind(n int) {
	n = min(n, int(q.inUse))
	q.next -= uint16(n)
	q.inUse -= uint16(n)
	q.taken -= min(uint16(n), q.taken)
	q.filled = 0
}

// Fill gives a chain back to the driver, with written bytes stored in its writable
// buffers, but does not show it yet: see Publish.
func (q *Queue) Fill(head uint16, written uint32) {
	if !q.Live() {
		return
	}
	elem, err := q.mem.Mutable(q.used+usedHeader+usedElemSize*uint64((q.done+q.filled)&(q.size-1)), usedElemSize)
	if err != nil {
		q.t.Fail()
		return
	}
	binary.LittleEndian.PutUint32(elem, uint32(head))
	binary.LittleEndian.PutUint32(elem[4:], written)
	q.filled++
}

// Publish shows the driver all chains given to Fill at once.
func (q *Queue) Publish() {
	n := q.filled
	q.filled = 0
	if n == 0 || !q.Live() {
		return
	}
	if q.mem.PutUint16(q.used+usedIdx, q.done+n) != nil {
		q.t.Fail()
		return
	}
	q.done += n
	q.inUse -= min(n, q.inUse)
}

// Push gives one chain back to the driver: Fill and Publish.
func (q *Queue) Push(head uint16, written uint32) {
	q.Fill(head, written)
	q.Publish()
}

// Interrupt ends the device's work on the queue for now: it tells the driver of the chains
// published since the last call, unless it does not want to know (2.7.7, 2.7.10).
func (q *Queue) Interrupt() {
	q.taken = 0
	before := q.signalled
	if q.done == before || !q.Live() {
		return
	}
	q.signalled = q.done
	q.barrier()
	if q.t.Has(FeatureRingEventIdx) {
		event, err := q.mem.Uint16(q.avail + availHeader + 2*uint64(q.size))
		if err != nil {
			q.t.Fail()
			return
		}
		if q.done-event-1 < q.done-before {
			q.t.interruptQueue(q)
		}
		return
	}
	ring, err := q.mem.View(q.avail, availHeader)
	if err != nil {
		q.t.Fail()
		return
	}
	wanted := binary.LittleEndian.Uint16(ring[availFlags:])&noInterrupt == 0
	empty := q.inUse == 0 && binary.LittleEndian.Uint16(ring[availIdx:]) == q.next
	if wanted || empty && q.t.Has(FeatureNotifyOnEmpty) {
		q.t.interruptQueue(q)
	}
}

// Read copies from the concatenation of segs, from offset off on, to p and returns how
// many bytes there were.
func (q *Queue) Read(segs []Segment, off uint64, p []byte) (n int) {
	for _, s := range segs {
		if len(p) == 0 {
			break
		}
		if off >= uint64(s.Len) {
			off -= uint64(s.Len)
			continue
		}
		part := min(uint64(s.Len)-off, uint64(len(p)))
		if q.mem.Read(s.Addr+off, p[:part]) != nil {
			break
		}
		p, n, off = p[part:], n+int(part), 0
	}
	return n
}

// Write copies p to the concatenation of segs, from offset off on, and returns how many
// bytes had room.
func (q *Queue) Write(segs []Segment, off uint64, p []byte) (n int) {
	for _, s := range segs {
		if len(p) == 0 {
			break
		}
		if off >= uint64(s.Len) {
			off -= uint64(s.Len)
			continue
		}
		part := min(uint64(s.Len)-off, uint64(len(p)))
		if q.mem.Write(s.Addr+off, p[:part]) != nil {
			break
		}
		p, n, off = p[part:], n+int(part), 0
	}
	return n
}

// CheckSegments refuses buffers that [Queue.Next] would not have returned: for a device
// that restores a chain from its state.
func (q *Queue) CheckSegments(head uint16, segs ...[]Segment) error {
	n := 0
	for _, list := range segs {
		for _, s := range list {
			if s.Len == 0 || !q.mem.Contains(s.Addr, uint64(s.Len)) {
				return fmt.Errorf("virtio: saved buffer %#x+%#x: %w", s.Addr, s.Len, memory.ErrOutside)
			}
		}
		n += len(list)
	}
	if n > MaxSegments || head >= q.max {
		return fmt.Errorf("virtio: saved chain at %d with %d buffers", head, n)
	}
	return nil
}

// reset is the queue before the driver has set it up.
func (q *Queue) reset() {
	q.restore(QueueState{Size: q.max, Vector: noVector})
}

// QueueState is the saved form of a [Queue].
type QueueState struct {
	Size              uint16
	Enabled           bool
	Desc, Avail, Used uint64 // guest-physical addresses
	Vector            uint16
	NextAvail         uint16 // index of the next chain to take
	NextUsed          uint16 // index of the next chain to give back
	Signalled         uint16 // NextUsed when the driver was last told
	InUse             uint16 // chains taken and not given back
}

func (q *Queue) save() QueueState {
	return QueueState{q.size, q.enabled, q.desc, q.avail, q.used, q.vector, q.next, q.done, q.signalled, q.inUse}
}

func (q *Queue) check(s QueueState) error {
	if !validSize(s.Size, q.max) || s.InUse > s.Size || !q.t.validVector(s.Vector) {
		return fmt.Errorf("virtio: saved queue of size %d (at most %d) with %d in use and vector %#x",
			s.Size, q.max, s.InUse, s.Vector)
	}
	return nil
}

func (q *Queue) restore(s QueueState) {
	q.size, q.enabled = s.Size, s.Enabled
	q.desc, q.avail, q.used = s.Desc, s.Avail, s.Used
	q.vector, q.next, q.done, q.signalled, q.inUse = s.Vector, s.NextAvail, s.NextUsed, s.Signalled, s.InUse
	q.filled, q.taken = 0, 0
}

func validSize(size, most uint16) bool { return size > 0 && size <= most && size&(size-1) == 0 }

// placeLegacy lays the queue out as a legacy driver does: in one piece from base on, the
// used ring on a page of its own (2.7.2).
func (q *Queue) placeLegacy(base uint64) {
	q.size = q.max // a legacy driver cannot choose
	q.desc = base
	q.avail = base + descSize*uint64(q.size)
	q.used = (q.avail + availHeader + 2*uint64(q.size) + eventSize + legacyAlign - 1) &^ (legacyAlign - 1)
	q.enabled = true
}
