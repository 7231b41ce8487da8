package link

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"
)

// Batching of the sender.
const (
	// flushBytes and flushDelay bound what waits for company: a message that is not urgent leaves when
	// this much has gathered, or after this time.
	flushBytes = 64 << 10
	flushDelay = time.Millisecond
	// ackEvery is how much a receiver takes before it acknowledges without waiting for a heartbeat.
	ackEvery = 256 << 10
	// ringSize is what a class may have in flight. Two of the largest messages fit, so that one can be
	// taken in while the other is not yet acknowledged.
	ringSize = 16 << 20
)

// sender is the sending half of a class: a ring of encoded segments, from the first byte that the
// peer has not acknowledged to the last that was appended. Offsets count bytes from the session's start.
type sender struct {
	limit int // of a message

	mu     sync.Mutex
	room   sync.Cond // acked has moved, or closed
	buf    []byte    // length a power of two; made by the first append
	size   uint64
	acked  uint64
	sent   uint64 // the highest offset that any path has sent
	head   uint64
	due    uint64 // what is below is to be sent now
	armed  bool   // the timer runs
	timer  *time.Timer
	closed bool
	// active is the path that sends, -1 if none; begin counts its changes.
	active int
	begin  uint64
	work   [MaxPaths]*sync.Cond // wakes the writer of a path
}

func newSender(limit int, size uint64) *sender {
	s := &sender{limit: limit, size: size, active: -1}
	s.room.L = &s.mu
	for i := range s.work {
		s.work[i] = sync.NewCond(&s.mu)
	}
	s.timer = time.AfterFunc(time.Hour, s.flush)
	s.timer.Stop()
	return s
}

// append puts a message into the ring.
func (s *sender) append(p []byte, urgent, wait bool) error {
	if len(p) > s.limit {
		return refuse(Oversized, "a message of %d bytes; at most %d are allowed", len(p), s.limit)
	}
	segments := max(1, (len(p)+maxSegment-1)/maxSegment)
	need := uint64(len(p) + segments*headerSize)
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed && s.head+need-s.acked > s.size {
		// Whatever is in the ring must go before there is room.
		s.mark(s.head)
		if !wait {
			return ErrFull
		}
		s.room.Wait()
	}
	if s.closed {
		return errClosed
	}
	if s.buf == nil {
		s.buf = make([]byte, s.size)
	}
	var h [headerSize]byte
	for {
		piece := p[:min(len(p), maxSegment)]
		p = p[len(piece):]
		head := header{length: uint32(len(piece)), kind: kindSegment, offset: s.head}
		if len(p) > 0 {
			head.flags = flagMore
		}
		head.put(h[:])
		s.copyIn(h[:])
		s.copyIn(piece)
		if len(p) == 0 {
			break
		}
	}
	switch {
	case urgent || s.head-max(s.due, s.acked) >= flushBytes:
		s.mark(s.head)
	case !s.armed:
		s.armed = true
		s.timer.Reset(flushDelay)
	}
	return nil
}

// mark has everything below the offset sent now. s.mu is held.
func (s *sender) mark(offset uint64) {
	if offset > s.due {
		s.due = offset
		if s.active >= 0 {
			s.work[s.active].Broadcast()
		}
	}
}

// flush is the timer's.
func (s *sender) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.armed = false
	s.mark(s.head)
}

func (s *sender) copyIn(p []byte) {
	at := s.head & (s.size - 1)
	n := copy(s.buf[at:], p)
	copy(s.buf, p[n:])
	s.head += uint64(len(p))
}

// segmentEnd returns the offset after the segment that begins at an offset. s.mu is held.
func (s *sender) segmentEnd(offset uint64) uint64 {
	var b [4]byte
	for i := range b {
		b[i] = s.buf[(offset+uint64(i))&(s.size-1)]
	}
	return offset + headerSize + uint64(binary.LittleEndian.Uint32(b[:]))
}

// cursor is where the writer of one path stands.
type cursor struct {
	path  int
	at    uint64
	begin uint64
}

// next waits until there is something for c's path to send, and fills record with whole segments. It returns nil
// when the session is over or stop reports that this writer is no longer needed.
func (s *sender) next(c *cursor, record []byte, stop func() bool) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.closed || stop() {
			return nil
		}
		if s.active == c.path {
			if c.begin != s.begin {
				// The class has just moved here: repeat what may have been lost on the way.
				c.begin, c.at = s.begin, s.acked
			}
			// What the peer has, from another path, need not be sent here.
			c.at = max(c.at, s.acked)
			if c.at < s.due {
				break
			}
		}
		s.work[c.path].Wait()
	}
	from, to := c.at, c.at
	for to < s.head {
		end := s.segmentEnd(to)
		if end-from > maxRecord {
			break
		}
		to = end
	}
	record = record[:to-from]
	n := copy(record, s.buf[from&(s.size-1):])
	copy(record[n:], s.buf)
	c.at = to
	s.sent = max(s.sent, to)
	return record
}

// ack frees what the peer has taken.
func (s *sender) ack(offset uint64) *Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if offset <= s.acked { // acknowledgements come over two paths
		return nil
	}
	if offset > s.sent {
		return refuse(OutOfOrder, "the peer acknowledges %d bytes of %d sent", offset, s.sent)
	}
	// Walk the segments: an acknowledgement of half a segment would break the next move between paths.
	at := s.acked
	for at < offset {
		at = s.segmentEnd(at)
	}
	if at != offset {
		return refuse(OutOfOrder, "the peer acknowledges a part of a segment")
	}
	s.acked = offset
	s.room.Broadcast()
	return nil
}

// move makes a path the one that sends; -1 for none.
func (s *sender) move(path int) (moved bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if path == s.active {
		return false
	}
	s.active = path
	s.begin++
	if path >= 0 {
		s.due = s.head
		s.work[path].Broadcast()
	}
	return true
}

// path returns the path that sends, -1 if none.
func (s *sender) path() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.active
}

// wake has the writers look at their stop functions.
func (s *sender) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.work {
		c.Broadcast()
	}
}

// close ends the stream: nothing more is appended or sent.
func (s *sender) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.timer.Stop()
	s.room.Broadcast()
	for _, c := range s.work {
		c.Broadcast()
	}
}

// pending returns how many bytes the peer has not taken.
func (s *sender) pending() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int(s.head - s.acked)
}

// receiver is the receiving half of a class. Readers of both paths feed it.
type receiver struct {
	limit   int
	deliver func([]byte)

	mu      sync.Mutex // held while deliver runs, so that close waits for it
	next    uint64     // offset of the segment that is expected
	partial []byte     // of a message whose last segment has not come
	told    uint64     // next when the peer was last told without being due a heartbeat
	closed  bool

	over  atomic.Bool   // the session is ending: begin no delivery
	taken atomic.Uint64 // next, for acknowledgements
}

// segment takes one segment; p is only valid during the call. It reports whether the peer is to be told
// how far the stream has been taken.
func (r *receiver) segment(h header, p []byte) (tell bool, err *Error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.over.Load() {
		return false, nil
	}
	end := h.offset + headerSize + uint64(h.length)
	switch {
	case end < h.offset || h.offset > r.next || h.offset < r.next && end > r.next:
		return false, refuse(OutOfOrder, "a segment at %d where %d is expected", h.offset, r.next)
	case h.offset < r.next:
		return false, nil // came over the other path
	case len(r.partial)+len(p) > r.limit:
		return false, refuse(Oversized, "a message of more than %d bytes", r.limit)
	}
	if h.flags&flagMore != 0 || len(r.partial) > 0 {
		r.partial = append(r.partial, p...)
		p = r.partial
	}
	if h.flags&flagMore == 0 {
		r.deliver(p)
		r.partial = r.partial[:0]
	}
	r.next = end
	r.taken.Store(end)
	if end-r.told < ackEvery {
		return false, nil
	}
	r.told = end
	return true, nil
}

// close returns when no message is being delivered and none will be.
func (r *receiver) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.partial = nil
}
