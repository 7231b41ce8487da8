package sim

import (
	"slices"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// The link is like TCP: in order within a connection; a connection breaks without one or the
// other end knowing; a blocked direction delays what it carries until it is unblocked. The
// arbiter is a compare-and-swap behind a network that loses, delays and duplicates.

// parcel is something that a blocked direction holds up.
type parcel struct {
	conn    uint64
	deliver func()
}

// carry brings something to the other side, in order within its connection.
func (w *world) carry(from *side, conn uint64, deliver func()) {
	d := from.index()
	last := w.lastAt[conn]
	last[d] = max(last[d], w.now+w.between(5, 60))
	w.lastAt[conn] = last
	pass := func() {
		if conn > w.resetTo {
			deliver()
		}
	}
	w.after(last[d]-w.now, func() {
		if w.blocked[d] || slices.ContainsFunc(w.stalled[d], func(p parcel) bool { return p.conn == conn }) {
			w.stalled[d] = append(w.stalled[d], parcel{conn, pass})
			return
		}
		pass()
	})
}

// unblock delivers what has been held up, in its order, but perhaps after things that newer
// connections carry.
func (w *world) unblock(d int) {
	w.blocked[d] = false
	w.after(w.between(1, 3000), func() {
		if w.blocked[d] {
			return
		}
		q := w.stalled[d]
		w.stalled[d] = nil
		for _, p := range q {
			p.deliver()
		}
	})
}

// dial makes a new connection when a side lacks one and packets pass both ways.
func (w *world) dial() {
	w.after(w.between(200, 600), w.dial)
	a, b := w.sides[0], w.sides[1]
	if !a.up || !b.up || a.paused || b.paused || w.blocked[0] || w.blocked[1] ||
		a.conn == b.conn && a.conn != 0 || w.now-w.dialled < 2000 {
		return
	}
	w.dialled = w.now
	w.conns++
	conn := w.conns
	for _, s := range w.sides {
		life := s.life
		w.carry(w.sides[1-s.index()], conn, func() {
			s.on(life, func() {
				s.conn = conn
				s.node.LinkUp(conn)
			})
		})
	}
}

// hangUp tells the other side that this one has closed a connection.
func (w *world) hangUp(s *side, conn uint64) {
	o := w.sides[1-s.index()]
	life := o.life
	w.carry(s, conn, func() {
		o.on(life, func() { o.linkDown(conn) })
	})
}

// breakLink resets the connection: what is under way is gone, or is only slow and arrives when
// there is a new connection. An end may not notice.
func (w *world) breakLink() {
	w.stats.Breaks++
	conn := w.conns
	if w.chance(2) {
		for d, s := range w.sides {
			w.blocked[d] = true
			life := s.life
			w.after(w.between(100, 1000), func() { s.on(life, func() { s.linkDown(conn) }) })
		}
		w.after(w.between(100, 1500), func() { w.unblock(0); w.unblock(1) })
		return
	}
	w.resetTo = conn
	for _, s := range w.sides {
		if s.up && w.rng.IntN(3) > 0 {
			life := s.life
			w.after(w.between(1, 500), func() { s.on(life, func() { s.linkDown(conn) }) })
		}
	}
}

// ask carries a request to the arbiter, and its answer back.
func (w *world) ask(s *side, r protocol.Request) {
	if r.Swap {
		w.stats.Bids++
	}
	lost := func() bool { return w.faulty && w.rng.IntN(100) < w.loss }
	delay := func() int64 {
		if w.faulty && w.chance(10) {
			return w.between(1000, 15000) // late: its answer is given up long before
		}
		return w.between(10, 300)
	}
	if w.arbBlock[s.index()] || lost() {
		return
	}
	life := s.life
	w.after(delay(), func() {
		a := protocol.Answer{ID: r.ID, Record: w.record}
		if r.Swap && w.record.Epoch == r.Record.Epoch-1 {
			w.record = r.Record
			a.Swapped, a.Record = true, r.Record
			w.tracef("arbiter: %v", w.record)
		}
		if w.arbBlock[s.index()] || lost() {
			return
		}
		copies := 1
		if w.faulty && w.chance(8) {
			copies = 2
		}
		for range copies {
			w.after(delay(), func() { s.on(life, func() { s.node.Answer(a) }) })
		}
	})
}

// clientSend lets every client send what it has no answer to, time and again.
func (w *world) clientSend() {
	if w.quiet {
		return
	}
	w.after(w.between(100, 400), w.clientSend)
	for c := range w.next {
		if w.chance(2) {
			continue
		}
		for _, s := range w.sides {
			if s.up && s.mode == live && len(s.inputs) < 32 {
				s.inputs = append(s.inputs, input{inFrame, c, w.next[c]})
			}
		}
	}
	for _, s := range w.sides {
		if s.up && s.mode == live && w.chance(2) {
			s.inputs = append(s.inputs, input{kind: inTime, val: uint64(w.now)})
		}
	}
}

// fault makes something go wrong, and mend later.
func (w *world) fault() {
	if !w.faulty {
		return
	}
	w.after(w.between(500, 25000), w.fault)
	s := w.sides[w.rng.IntN(2)]
	switch w.rng.IntN(11) {
	case 0, 1:
		s.crash()
	case 2:
		if s.up && !s.paused {
			w.stats.Pauses++
			w.tracef("%v is paused", s.id)
			s.paused = true
			w.after(w.between(100, 15000), s.resume)
		}
	case 3:
		w.stats.Partitions++
		d := w.rng.IntN(2)
		both := w.chance(2)
		w.tracef("link blocked, away from %v, both ways %v", w.sides[d].id, both)
		w.blocked[d] = true
		if both {
			w.blocked[1-d] = true
		}
		w.after(w.between(100, 20000), func() { w.unblock(0); w.unblock(1) })
	case 4:
		w.tracef("link breaks")
		w.breakLink()
	case 5:
		i := s.index()
		w.tracef("arbiter out of reach for %v", s.id)
		w.arbBlock[i] = true
		w.after(w.between(100, 20000), func() { w.arbBlock[i] = false })
	case 6:
		s.slow = w.between(1, 8)
	case 7:
		s.tick = w.between(40, 250)
	case 8:
		if w.flips && s.up && s.mode != off {
			w.stats.Injected++
			p := w.rng.IntN(pages)
			w.tracef("a bit of page %d flips on %v", p, s.id)
			s.g.mem[p][w.rng.IntN(words)] ^= 1 << w.rng.IntN(64)
		}
	case 9:
		if s.up && !s.paused {
			s.on(s.life, func() { s.node.NeedCut("input waits") })
			if w.chance(2) {
				w.after(w.between(50, 700), s.crash)
			}
		}
	case 10:
		if s.up && !s.paused {
			s.on(s.life, func() {
				if s.node.SwitchOver() {
					w.stats.SwitchOvers++
				}
			})
		}
	}
}

// heal ends all faults.
func (w *world) heal() {
	w.tracef("faults end")
	w.faulty = false
	w.unblock(0)
	w.unblock(1)
	w.arbBlock = [2]bool{}
	for _, s := range w.sides {
		s.slow, s.tick = 1, 100
		if s.paused {
			s.resume()
		}
		if !s.up {
			s.start()
		}
	}
}
