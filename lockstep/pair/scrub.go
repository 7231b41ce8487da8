package pair

import (
	"fmt"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/vmm"
)

// The digest covers what a guest shows: its exits, and what it sends and stores. A bit that flips in its memory shows when the
// guest uses it, perhaps a month later, when the other side is the only one. So both sides compare all that they hold, piece by
// piece: at some stops the live side logs the hash of the next piece, and the other side hashes its own there.

// Limits of a scrub.
const (
	// DefaultScrubPeriod is the time within which everything is compared once.
	DefaultScrubPeriod = time.Minute
	// scrubPiece is the least that is hashed at once, in bytes: some 25 microseconds.
	scrubPiece = 256 << 10
	// scrubPause is the least time between two pieces. Where they would have to follow closer, they are larger.
	scrubPause = 2 * time.Millisecond
)

// scrub goes over the guest's state. It is the vCPU loop's.
type scrub struct {
	m     *vmm.Machine
	size  uint64 // of a piece of memory, in bytes
	count uint64 // pieces: those of memory, then a device each
	pause time.Duration
	next  uint64
	last  time.Time
}

// plan divides the guest's state into pieces.
func (s *scrub) plan(m *vmm.Machine, period time.Duration) {
	s.m, s.size = m, scrubPiece
	for {
		s.count = uint64(m.Components())
		for _, r := range m.Memory().Regions() {
			s.count += (uint64(len(r.Bytes)) + s.size - 1) / s.size
		}
		if s.pause = period / time.Duration(s.count); s.pause >= scrubPause || s.size >= 1<<30 {
			return
		}
		s.size *= 2
	}
}

// piece hashes a piece, and says what it is.
func (s *scrub) piece(i uint64) (sum digest.Sum, what string, err error) {
	for _, r := range s.m.Memory().Regions() {
		n := (uint64(len(r.Bytes)) + s.size - 1) / s.size
		if i < n {
			b := r.Bytes[i*s.size : min((i+1)*s.size, uint64(len(r.Bytes)))]
			return xxh3.Hash128(b).Bytes(), fmt.Sprintf("memory from %#x, %d bytes", r.Base+i*s.size, len(b)), nil
		}
		i -= n
	}
	name, b, err := s.m.EncodeComponent(int(i))
	return xxh3.Hash128(b).Bytes(), "the state of " + name, err
}

// due logs the next piece, if it is time.
func (s *scrub) due(w *world, now time.Time) {
	if now.Sub(s.last) < s.pause {
		return
	}
	s.last = now
	i := s.next % s.count
	s.next = i + 1
	sum, _, err := s.piece(i)
	if err != nil {
		w.failed(err)
		return
	}
	w.log(0, func(b []byte) []byte { return w.enc.Scrub(b, w.cur, i, sum) })
	w.closed = true
}

// compare hashes the pieces that the log has for the present stop.
func (s *scrub) compare(w *world) {
	for {
		e := w.next(w.cur, log.Scrub)
		if e == nil {
			return
		}
		if e.Piece >= s.count {
			w.differs(fmt.Sprintf("the log has piece %d of %d", e.Piece, s.count))
			return
		}
		sum, what, err := s.piece(e.Piece)
		if err != nil {
			w.failed(err)
			return
		}
		if sum != e.Sum {
			w.differs(what + " differs")
			return
		}
	}
}
