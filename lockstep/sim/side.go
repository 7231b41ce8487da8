package sim

import (
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// ShellRule is a rule of the shell around the protocol that a run can break.
type ShellRule string

// The rules, named after what breaking them does.
const (
	TearCuts      ShellRule = "tear-cuts"      // pages of a cut are applied as they come
	CompleteEarly ShellRule = "complete-early" // the backup takes completions before its own
	SkipDrain     ShellRule = "skip-drain"     // a side is overwritten while its own writes are under way
	SkipReissue   ShellRule = "skip-reissue"   // going live forgets requests without completion
	ForgetWrites  ShellRule = "forget-writes"  // a cut does not carry what was written since the last verified point
)

// ShellRules are all of them.
var ShellRules = []ShellRule{TearCuts, CompleteEarly, SkipDrain, SkipReissue, ForgetWrites}

type mode uint8

const (
	off    mode = iota // no guest
	live               // inputs come from the world
	replay             // inputs come from the log
)

// kick is a write that the backup's guest has asked for and that is not issued yet.
type kick struct {
	at protocol.Point
	r  request
}

// cutState is what a CutState carries.
type cutState struct {
	g      guest // its memory does not count
	hashes [pages]uint64
	hashed uint8
	disk   map[int]uint64
}

// cutPages is what CutPages carries.
type cutPages struct {
	which uint8
	mem   [pages]page
}

// dirtied is what CutDirty carries.
type dirtied struct {
	pages uint8
	slots uint8
}

// chunk is a piece of a pre-copy: a page, or a slot of the disk.
type chunk struct {
	page, slot int
	mem        page
	val        uint64
}

// side is one host: the shell around a node, a guest, a disk that outlives crashes.
type side struct {
	w    *world
	id   protocol.Side
	disk [slots]uint64
	// stale is the mark on the replica.
	stale bool

	up       bool
	paused   bool
	deferred []func()
	life     int
	slow     int64
	tick     int64
	node     *protocol.Node
	twin     int // life of the peer whose guest this side follows
	conn     uint64

	mode   mode
	frozen bool
	wait   bool
	g      guest
	pt     protocol.Point
	inputs []input

	// Replay.
	log     []protocol.Item
	limit   protocol.Point
	stopped bool // for a cut, or by a divergence
	kicks   []kick

	// Own disk requests.
	issued  map[uint64]request
	done    map[uint64]bool
	drained func() // called when nothing is under way
	touched []kick // writes of this term, on the primary
	written uint8  // slots written since the last cut or chunk

	// Copies.
	precopy  int // generation; a pre-copy of another one ends
	buffer   cutPages
	staged   *cutState
	stagedIn cutPages
}

func newSide(w *world, id protocol.Side) *side {
	return &side{w: w, id: id, slow: 1, tick: 100}
}

func (s *side) index() int { return int(s.id) - 1 }

// start starts the process: all memory is new.
func (s *side) start() {
	w := s.w
	old := s
	*s = side{w: w, id: old.id, disk: old.disk, stale: old.stale, life: old.life + 1, slow: old.slow, tick: old.tick, up: true}
	s.issued, s.done = map[uint64]request{}, map[uint64]bool{}
	cfg := protocol.DefaultConfig(s.id)
	cfg.Commit = w.commit
	cfg.Incarnation = w.rng.Uint64()
	cfg.Create = s.id == protocol.A
	cfg.Stale = s.stale
	cfg.HeartbeatTicks, cfg.SuspectTicks, cfg.DeadTicks = 5, 15, 40
	cfg.ArbiterTicks, cfg.PollTicks, cfg.ColdTicks = 20, 40, 100
	cfg.LeadTicks, cfg.TightTicks = 20, 4
	s.node = protocol.New(cfg)
	if w.o.Prepare != nil {
		w.o.Prepare(s.node)
	}
	w.tracef("%v starts", s.id)
	s.later(1, s.ticking)
	s.later(1, s.running)
}

// crash kills the process. Writes under way may land or not; the disk stays.
func (s *side) crash() {
	if !s.up {
		return
	}
	w := s.w
	w.stats.Crashes++
	w.tracef("%v crashes", s.id)
	s.up, s.paused, s.deferred = false, false, nil
	for id := range s.g.nextReq + 1 { // in order: a run must repeat
		if r, ok := s.issued[id]; ok && w.chance(2) {
			s.disk[r.slot] = r.val
		}
	}
	s.issued = nil
	if s.conn != 0 && w.rng.IntN(4) > 0 { // the kernel says so; or the whole host is gone
		w.hangUp(s, s.conn)
	}
	s.conn = 0
	life := s.life
	w.after(w.between(100, 30000), func() {
		if !s.up && s.life == life {
			s.start()
		}
	})
}

func (s *side) resume() {
	if !s.up || !s.paused {
		return
	}
	s.w.tracef("%v resumes", s.id)
	s.paused = false
	q := s.deferred
	s.deferred = nil
	life := s.life
	for _, f := range q {
		s.on(life, f)
	}
}

// on runs f in the process that was started life-th, if that lives; when it is not paused.
func (s *side) on(life int, f func()) {
	switch {
	case !s.up || s.life != life || s.w.err != nil:
	case s.paused:
		s.deferred = append(s.deferred, f)
	default:
		f()
		s.act()
	}
}

func (s *side) later(d int64, f func()) {
	life := s.life
	s.w.after(d, func() { s.on(life, f) })
}

func (s *side) linkDown(conn uint64) {
	if s.conn == conn {
		s.conn = 0
	}
	s.node.LinkDown(conn)
}

func (s *side) ticking() {
	s.later(s.tick, s.ticking)
	s.node.Tick()
	if s.w.commit == protocol.Checkpointed && s.w.chance(8) {
		s.node.NeedCut("interval")
	}
}

// act carries out what the node wants.
func (s *side) act() {
	life := s.life
	for s.up && s.life == life {
		todo := s.node.Ready()
		if len(todo) == 0 {
			return
		}
		for _, a := range todo {
			if m, ok := a.(protocol.Send); !ok || m.Message.Type != protocol.MsgHeartbeat {
				s.w.tracef("%v: %v", s.id, a)
			}
			s.do(a)
			odds := int64(20000)
			if _, ok := a.(protocol.Release); ok {
				odds = 4000
			}
			if s.w.faulty && s.w.chance(odds) {
				s.crash()
			}
			if !s.up || s.life != life || s.w.err != nil {
				return
			}
		}
		s.node.Advance()
	}
}

func (s *side) do(a protocol.Action) {
	w := s.w
	switch a := a.(type) {
	case protocol.Send:
		if a.Conn != s.conn {
			return
		}
		o := w.sides[1-s.index()]
		life := o.life
		m := a.Message
		w.carry(s, a.Conn, func() {
			o.on(life, func() { o.node.Step(a.Conn, m) })
		})
	case protocol.CloseLink:
		if s.conn == a.Conn {
			s.conn = 0
		}
		w.hangUp(s, a.Conn)
	case protocol.Ask:
		w.ask(s, a.Request)
	case protocol.Release:
		for _, o := range a.Outputs {
			w.checkRelease(s, w.unblob(o.Data).(output), o.Point)
		}
	case protocol.Boot:
		w.stats.ColdStarts++
		s.g = newGuest(a.Epoch, &s.disk)
		s.goLive()
	case protocol.Freeze:
		s.frozen = true
		named := w.between(0, 3) > 0
		s.later(w.between(1, 50), func() { s.node.Frozen(named) })
	case protocol.Thaw:
		s.frozen = false
		w.checkLedger(s)
	case protocol.Pace:
		s.wait = a.Wait
	case protocol.GoLive:
		if s.node.Phase() == protocol.Alone { // a hand-over has begun a term already
			w.checkTwin(s)
		}
		w.stats.TakeOvers++
		s.goLive()
	case protocol.Follow:
		s.mode, s.frozen, s.inputs = replay, false, nil
		s.twin = w.sides[1-s.index()].life
		s.startTerm()
	case protocol.Feed:
		for _, i := range a.Items {
			if !i.Mark {
				s.log = append(s.log, i)
			}
		}
		s.limit = a.Limit
	case protocol.Verified:
		k := 0
		for k < len(s.kicks) && !a.Point.Before(s.kicks[k].at) {
			s.submit(s.kicks[k].r)
			k++
		}
		s.kicks = s.kicks[k:]
	case protocol.Prepare:
		s.mode, s.frozen, s.inputs = off, false, nil
		s.log, s.kicks, s.touched = nil, nil, nil
		s.stale, s.staged, s.stagedIn = true, nil, cutPages{}
		s.g = guest{}
		s.whenDrained(s.node.Prepared)
	case protocol.Precopy:
		s.precopy++
		s.written = 0
		gen := s.precopy
		s.later(1, func() { s.copyPage(gen, 0) })
	case protocol.StageChunk:
		c := w.unblob(a.Data).(chunk)
		if c.page >= 0 {
			s.g.mem[c.page] = c.mem // no state is here: the staging area may as well be in its place
		} else {
			s.disk[c.slot] = c.val
		}
	case protocol.StopForCut:
		s.stopped = true
		s.whenDrained(func() {
			s.node.CutReady(w.blob(dirtied{s.g.dirty, s.written}))
		})
	case protocol.TakeCut:
		s.takeCut(a)
	case protocol.Stage:
		c := w.unblob(a.Data).(cutState)
		s.staged = &c
		s.stagedIn = cutPages{}
		var want uint8
		for i := range s.g.mem {
			if c.hashed&(1<<i) != 0 && mix(3, s.g.mem[i][:]...) != c.hashes[i] {
				want |= 1 << i
			}
		}
		s.later(w.between(1, 50), func() { s.node.CutWant([]byte{want}) })
	case protocol.CollectPages:
		b := s.buffer
		// In two messages, so that the first can come without the last.
		first := cutPages{a.Want[0] & 0x0f, b.mem}
		last := cutPages{a.Want[0] & 0xf0, b.mem}
		s.later(w.between(1, 100), func() { s.node.CutPages(w.blob(first), false) })
		s.later(w.between(101, 300), func() { s.node.CutPages(w.blob(last), true) })
	case protocol.StagePages:
		c := w.unblob(a.Data).(cutPages)
		for i := range c.mem {
			if c.which&(1<<i) != 0 {
				s.stagedIn.mem[i] = c.mem[i]
				if w.o.Break == TearCuts {
					s.g.mem[i] = c.mem[i]
				}
			}
		}
		s.stagedIn.which |= c.which
		if w.faulty && w.chance(20) { // a kill that is aimed at the middle of a cut
			w.after(w.between(1, 150), w.sides[1-s.index()].crash)
		}
	case protocol.Apply:
		s.later(w.between(1, 100), s.apply)
	case protocol.Discard:
		s.precopy++
		s.staged, s.stagedIn = nil, cutPages{}
		s.drained = nil
		if !s.node.Diverging() {
			s.stopped = false
		}
	case protocol.Event:
		if a.Kind == protocol.EventDivergence {
			w.stats.Divergences++
		}
	}
}

func (s *side) startTerm() {
	s.pt, s.limit = protocol.Point{}, protocol.Point{}
	s.log, s.kicks, s.touched = nil, nil, nil
	s.stopped = false
}

// goLive takes inputs from the world from now on.
func (s *side) goLive() {
	s.mode, s.frozen, s.inputs = live, false, nil
	s.startTerm()
	if s.w.o.Break != SkipReissue {
		for _, r := range s.g.inflight {
			_, under := s.issued[r.id]
			switch {
			case r.id == 0 || under:
			case s.done[r.id]:
				s.inputs = append(s.inputs, input{kind: inDone, val: r.id})
			default:
				s.submit(r)
			}
		}
	}
	s.w.checkLedger(s)
}

// submit writes to the disk. The host does it, whether the process is paused or not.
func (s *side) submit(r request) {
	s.issued[r.id] = r
	life := s.life
	d := s.w.between(20, 400) * s.slow
	if s.w.chance(30) {
		d += s.w.between(0, 6000) // the disk has a bad moment
	}
	s.w.after(d, func() {
		if !s.up || s.life != life {
			return
		}
		s.disk[r.slot] = r.val
		s.written |= 1 << r.slot
		s.on(life, func() {
			delete(s.issued, r.id)
			s.done[r.id] = true
			if s.mode == live {
				s.inputs = append(s.inputs, input{kind: inDone, val: r.id})
			}
			if len(s.issued) == 0 && s.drained != nil {
				f := s.drained
				s.drained = nil
				f()
			}
		})
	})
}

func (s *side) whenDrained(f func()) {
	if len(s.issued) == 0 || s.w.o.Break == SkipDrain {
		s.later(1, f)
		return
	}
	s.drained = f
}

// running lets the guest make a stop, again and again.
func (s *side) running() {
	s.later(s.w.between(10, 50)*s.slow, s.running)
	switch s.mode {
	case live:
		s.runLive()
	case replay:
		s.runReplay()
	}
}

func (s *side) nextPoint() protocol.Point {
	if s.g.halted {
		return protocol.Point{Exit: s.pt.Exit, Round: s.pt.Round + 1}
	}
	return protocol.Point{Exit: s.pt.Exit + 1}
}

func (s *side) runLive() {
	w := s.w
	if s.frozen || s.wait || s.g.halted && len(s.inputs) == 0 || w.quiet && len(s.inputs) == 0 {
		return
	}
	p := s.nextPoint()
	in := s.inputs
	s.inputs = nil
	if len(in) > 0 {
		completes := false
		for _, i := range in {
			completes = completes || i.kind == inDone
		}
		s.node.Log(p, w.blob(in), completes)
	}
	e := s.g.stop(in, w.rng.Uint64(), w.hasTSC)
	s.pt = p
	w.stats.Exits++
	w.note(s)
	for _, r := range e.writes {
		s.touched = append(s.touched, kick{p, r})
		s.submit(r)
	}
	for _, o := range e.outputs {
		s.node.Output(p, w.blob(o))
	}
	s.node.Mark(p, s.g.sum(), e.tainted)
	w.checkLedger(s)
}

func (s *side) runReplay() {
	w := s.w
	p := s.nextPoint()
	if s.stopped || s.limit.Before(p) {
		return
	}
	var in []input
	if len(s.log) > 0 && s.log[0].Point == p {
		in = w.unblob(s.log[0].Data).([]input)
		for _, i := range in {
			if i.kind == inDone && !s.done[i.val] && s.inFlight(i.val) && w.o.Break != CompleteEarly {
				return // its own write is still under way
			}
		}
		s.log = s.log[1:]
	} else if s.g.halted || len(s.log) > 0 && s.log[0].Point.Before(p) {
		s.stopped = true
		s.node.Diverged(p, s.g.sum())
		return
	}
	e := s.g.stop(in, w.rng.Uint64(), w.hasTSC)
	s.pt = p
	for _, r := range e.writes {
		s.kicks = append(s.kicks, kick{p, r})
	}
	for _, o := range e.outputs {
		s.node.Output(p, w.blob(o))
	}
	w.checkTwin(s)
	if !s.node.Executed(p, s.g.sum(), e.tainted) {
		s.stopped = true
	}
}

// inFlight reports whether the guest knows a request: a diverged one may not.
func (s *side) inFlight(id uint64) bool {
	for _, r := range s.g.inflight {
		if r.id == id {
			return true
		}
	}
	return false
}

// accounts reports whether this side could reproduce an output that the peer releases.
func (s *side) accounts(o output, at protocol.Point) bool {
	switch {
	case s.mode == off && s.w.record.Primary != s.id:
		return true // it may not start from its disk: the survivor is the one that releases
	case s.mode == off:
		// It had executed the output and won, and has crashed since. A guest that starts from
		// its disk need not repeat outputs, but what clients were told must be there.
		return o.client < 0 || s.disk[o.client] >= o.val
	case s.g.boot > o.boot:
		return o.client < 0 || s.g.ledger[o.client] >= o.val
	case s.g.boot == o.boot && s.g.outSeq > o.seq:
		return true
	}
	return s.w.commit == protocol.Received && s.mode == replay && !s.limit.Before(at)
}

// copyPage is one step of a pre-copy.
func (s *side) copyPage(gen, i int) {
	if gen != s.precopy {
		return
	}
	switch {
	case i < pages:
		s.node.Chunk(s.w.blob(chunk{page: i, mem: s.g.mem[i]}))
	case i < pages+slots:
		slot := i - pages
		s.written &^= 1 << slot
		s.node.Chunk(s.w.blob(chunk{page: -1, slot: slot, val: s.disk[slot]}))
	default:
		s.node.PrecopyDone()
		return
	}
	s.later(s.w.between(10, 100), func() { s.copyPage(gen, i+1) })
}

func (s *side) takeCut(a protocol.TakeCut) {
	w := s.w
	w.stats.Cuts++
	d := w.unblob(a.Dirty).(dirtied)
	c := cutState{g: s.g, hashed: s.g.dirty | d.pages, disk: map[int]uint64{}}
	if a.Full {
		c.hashed = 0xff
	}
	s.buffer = cutPages{mem: s.g.mem}
	for i := range s.g.mem {
		c.hashes[i] = mix(3, s.g.mem[i][:]...)
	}
	carry := d.slots
	for _, k := range s.touched {
		if a.Since.Before(k.at) && w.o.Break != ForgetWrites {
			carry |= 1 << k.r.slot
		}
	}
	if a.Full {
		carry |= s.written
		for _, r := range s.g.inflight {
			if r.id != 0 {
				carry |= 1 << r.slot
			}
		}
	}
	for i := range slots {
		if carry&(1<<i) != 0 {
			c.disk[i] = s.disk[i]
		}
	}
	s.g.dirty, s.written = 0, 0
	s.touched = nil
	s.pt = protocol.Point{}
	s.node.CutTaken(w.blob(c))
}

// apply puts the staged cut in place, all of it.
func (s *side) apply() {
	w := s.w
	mem := s.g.mem
	for i := range mem {
		if s.stagedIn.which&(1<<i) != 0 {
			mem[i] = s.stagedIn.mem[i]
		}
	}
	s.g = s.staged.g
	s.g.mem, s.g.dirty = mem, 0
	for i := range slots {
		if v, ok := s.staged.disk[i]; ok {
			s.disk[i] = v
		}
	}
	s.written = 0
	s.staged = nil
	s.twin = w.sides[1-s.index()].life
	if s.mode == off {
		w.stats.Joins++
		s.stale = false
		s.mode = replay
	}
	s.done = map[uint64]bool{}
	s.startTerm()
	for _, r := range s.g.inflight {
		if r.id != 0 {
			s.submit(r)
		}
	}
	s.node.CutApplied()
}
