package pair

import (
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/lockstep/announce"
	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
)

// mode is what the world does for its guest.
type mode uint32

const (
	idle      mode = iota // there is no guest, or one that is to be dropped: the vCPU stands
	live                  // inputs come from outside
	following             // inputs come from the peer's log
)

// Limits of the world.
const (
	// patience is how long something waits for a synchronous exit before a stop between two exits is named.
	patience = time.Millisecond
	// cutAfter is how long it waits before a cut is asked for, or, in a guest that makes exits, twice as long as it
	// lately took to come to the next one, up to maxCutAfter: a cut makes the guest slow for a while, since its first writes to
	// each page fault, and so the next cut likelier.
	cutAfter    = 2 * time.Millisecond
	maxCutAfter = 10 * time.Millisecond
	// cutAgain is after how long it is asked for again: it may have come at a time when there are none, such as
	// before a joining side is official.
	cutAgain = 5 * time.Millisecond
	// wakeAfter is how old an event may become before the shell is woken, if nothing waits for it.
	wakeAfter = 500 * time.Microsecond
	// ringBytes and ringEvents bound what the shell has not taken: then the guest stands until it has.
	ringBytes  = 4 << 20
	ringEvents = 1 << 16
	// arenaSize is the size in bytes of a piece of memory for log entries.
	arenaSize = 64 << 10
	// maxQueue bounds the entries that a following guest has before it. The protocol bounds their bytes.
	maxQueue = 1 << 20
	// maxStep bounds a step of time in a peer's log, in nanoseconds: devices count their periods in it.
	maxStep = int64(24 * time.Hour)
)

// eventKind is what the vCPU loop has to say to the shell.
type eventKind uint8

const (
	evLog eventKind = iota
	evOutput
	evMark
	evExecuted
	evDiverged
	evCall // a function that the shell runs
)

// event is something that the vCPU loop tells the shell.
type event struct {
	kind   eventKind
	point  protocol.Point
	data   []byte
	flag   bool // of a log: completes; of a mark or execution: tainted
	digest protocol.Digest
	call   func()
}

// mark is a watermark that a following guest has before it.
type mark struct {
	point  protocol.Point
	digest protocol.Digest
}

// world is the source and sink of one side's machine.
type world struct {
	in         *vmm.Live
	m          *vmm.Machine
	bell       *vmm.Bell
	disks      *disks
	checkpoint bool         // the peer is passive
	taint      bool         // the guest may read clocks that cannot be trapped
	wake       func()       // the shell
	failed     func(error)  // this side cannot go on
	diverge    func(string) // an event for people
	learner    []*announce.Learner

	mode    atomic.Uint32 // changed by the vCPU loop only
	logging atomic.Bool
	pace    atomic.Bool
	full    atomic.Bool // the ring is
	ended   atomic.Bool // the guest's end may be shown

	// Of the vCPU loop.
	cur       vmm.Position // the present stop
	closed    bool         // its end has been dealt with
	sum       digest.Digest
	enc       log.Encoder
	arena     []byte // room for entries; entries are those of the present stop
	entries   []byte
	completes bool
	urgent    bool // somebody waits for what the guest makes of an input: it would be lost with this host
	time      int64
	skew      int64 // a fault that was injected
	offloads  map[int]vmm.Offloads
	entropy   map[uint64]int
	reissuing bool
	exitSent  bool
	stuckExit uint64
	stuckAt   time.Time
	cutAsked  time.Time // zero: not since the term began
	timer     *time.Timer

	closedAt time.Time     // the last stop
	gap      time.Duration // between stops, the longest of late
	recent   recent
	scrub    scrub

	// The ring.
	mu     sync.Mutex
	ring   []event
	size   int
	woken  bool
	wokeAt time.Time

	// What follows: the log before this side's guest, and what the shell wants of the vCPU loop while it stands. Under mu.
	queue    []log.Entry
	head     int
	limit    protocol.Point
	hasLimit bool
	marks    []mark
	stop     bool // for a cut
	diverged bool
	orders   []func() error
	waits    bool // the vCPU loop stands
}

func (w *world) is(m mode) bool { return mode(w.mode.Load()) == m }

func (w *world) become(m mode) { w.mode.Store(uint32(m)) }

func point(p vmm.Position) protocol.Point { return protocol.Point{Exit: p.Exit, Round: p.Round} }

// --- Events -------------------------------------------------------------------------------------

// tell puts an event into the ring. Urgent wakes the shell at once.
func (w *world) tell(e event, urgent bool) {
	w.mu.Lock()
	if n := len(w.ring); e.kind == evMark && n > 0 && w.ring[n-1].kind == evMark {
		e.flag = e.flag || w.ring[n-1].flag
		w.ring[n-1] = e // the newer one says it all
	} else {
		w.ring = append(w.ring, e)
		w.size += len(e.data)
		if len(w.ring) > ringEvents || w.size > ringBytes {
			w.full.Store(true)
			urgent = true
		}
	}
	if !w.woken && !urgent {
		now := time.Now()
		if w.wokeAt.IsZero() {
			w.wokeAt = now
		}
		urgent = now.Sub(w.wokeAt) >= wakeAfter
	}
	wake := urgent && !w.woken
	if wake {
		w.woken = true
	}
	w.mu.Unlock()
	if wake {
		w.wake()
	}
}

// events takes what is in the ring. The shell calls it.
func (w *world) events(buf []event) []event {
	w.mu.Lock()
	buf, w.ring = w.ring, buf[:0]
	w.size, w.woken, w.wokeAt = 0, false, time.Time{}
	w.mu.Unlock()
	if w.full.Load() {
		w.full.Store(false)
		w.bell.Ring()
	}
	return buf
}

// --- Stops --------------------------------------------------------------------------------------

// at is called first for all that happens at a stop.
func (w *world) at(pos vmm.Position) {
	if pos != w.cur {
		w.close()
		w.cur, w.closed = pos, false
	}
}

// close deals with the end of the present stop: on the live side a watermark, on the other the comparison with it.
func (w *world) close() {
	if w.closed {
		return
	}
	w.closed = true
	switch {
	case w.logging.Load():
		now := time.Now()
		if gap := now.Sub(w.closedAt); gap > w.gap {
			w.gap = gap
		} else {
			w.gap -= w.gap / 64
		}
		w.closedAt = now
		if w.cur.Count == 0 {
			w.scrub.due(w, now)
		}
		w.flush()
		if w.cur.Count == 0 {
			w.tell(event{kind: evMark, point: point(w.cur), digest: protocol.Digest(w.sum.Sum()), flag: w.taint}, w.urgent)
			w.urgent = false
		}
	case w.is(following) && w.cur.Count == 0:
		w.scrub.compare(w)
		w.check()
	}
}

// check compares the digest with the log's, if it has one for this stop.
func (w *world) check() {
	p := point(w.cur)
	w.mu.Lock()
	if len(w.marks) == 0 || p.Before(w.marks[0].point) || w.diverged {
		w.mu.Unlock()
		return
	}
	m := w.marks[0]
	w.marks = w.marks[1:]
	w.mu.Unlock()
	d := protocol.Digest(w.sum.Sum())
	if m.point != p || m.digest != d {
		w.differs(fmt.Sprintf("digest %v at %v where the log has %v at %v", d, p, m.digest, m.point))
		return
	}
	w.tell(event{kind: evExecuted, point: p, digest: d, flag: w.taint}, true)
}

// differs says that this side's guest does not do what the log says.
func (w *world) differs(what string) {
	w.mu.Lock()
	before := w.diverged
	w.diverged = true
	w.mu.Unlock()
	if before {
		return
	}
	w.diverge(fmt.Sprintf("after %v: %s", w.cur, what))
	w.tell(event{kind: evDiverged, point: point(w.cur), digest: protocol.Digest(w.sum.Sum())}, true)
}

// flush tells the entries of the present stop.
func (w *world) flush() {
	if len(w.entries) == 0 {
		return
	}
	n := len(w.entries)
	w.tell(event{kind: evLog, point: point(w.cur), data: w.entries[:n:n], flag: w.completes}, false)
	w.arena, w.entries, w.completes = w.entries[n:], nil, false
}

// log makes room for an entry of the present stop, and has f append it.
func (w *world) log(size int, f func(b []byte) []byte) {
	w.closed = false
	if w.entries == nil {
		w.entries = w.arena[:0]
	}
	if cap(w.entries)-len(w.entries) < size+64 {
		w.flush()
		w.entries = make([]byte, 0, max(arenaSize, size+64))
	}
	w.entries = f(w.entries)
}

// newTerm begins to count anew on this side, at position 0.
func (w *world) newTerm() {
	w.cur, w.closed = vmm.Position{}, false
	w.sum, w.enc = digest.Digest{}, log.Encoder{}
	w.arena, w.entries, w.completes = nil, nil, false
	w.skew = 0
	w.stuckAt, w.cutAsked = time.Time{}, time.Time{}
}

// resetLog forgets the log of an ended term.
func (w *world) resetLog() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue, w.head, w.marks, w.limit, w.hasLimit, w.diverged = nil, 0, nil, protocol.Point{}, false, false
}

// --- Standing -----------------------------------------------------------------------------------

// stand keeps the vCPU loop waiting until ready (called with the lock) says that it may go on; it runs the shell's orders
// meanwhile. It returns false if things have changed so that the caller's question is void: the mode is another, a new
// term has begun, or the machine is to end.
func (w *world) stand(m mode, ready func() bool) bool {
	for {
		w.mu.Lock()
		w.waits = true
		var order func() error
		switch {
		case len(w.orders) > 0:
			order = w.orders[0]
			w.orders = w.orders[1:]
		case !w.stop && !w.diverged && w.is(m) && ready != nil && ready():
			w.waits = false
			w.mu.Unlock()
			return true
		}
		w.mu.Unlock()
		if order != nil {
			if err := order(); err != nil {
				w.failed(err)
			}
			if !w.is(m) || w.m.Fresh() {
				w.settled()
				return false
			}
			continue
		}
		if !w.is(m) || w.m.Quitting() {
			w.settled()
			return false
		}
		w.bell.Sleep(-1)
		w.bell.Answer()
		if w.m.Serve() {
			w.settled()
			return false
		}
	}
}

func (w *world) settled() {
	w.mu.Lock()
	w.waits = false
	w.mu.Unlock()
}

// order has the vCPU loop of a guest that follows, or of none, run f where it stands, or at its next stop.
func (w *world) order(f func() error) {
	w.mu.Lock()
	w.orders = append(w.orders, f)
	w.mu.Unlock()
	w.bell.Ring()
}

// ordered says whether the vCPU loop must stand: there is an order, or a cut.
func (w *world) ordered() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.orders) > 0 || w.stop || w.diverged
}

// feed gives a following guest more log.
func (w *world) feed(entries []log.Entry, marks []mark, limit protocol.Point, hasLimit bool) error {
	w.mu.Lock()
	if w.head == len(w.queue) {
		w.queue, w.head = entries, 0 // the vCPU loop may still look at an old one, whose place is not used again
	} else {
		w.queue = append(w.queue, entries...)
	}
	w.marks = append(w.marks, marks...)
	if hasLimit {
		w.limit, w.hasLimit = limit, true
	}
	n, waits := len(w.queue)-w.head, w.waits
	w.mu.Unlock()
	if n > maxQueue {
		return fmt.Errorf("pair: %d entries of log wait for the guest", n)
	}
	if waits {
		w.bell.Ring()
	}
	return nil
}

// covers says whether the log is complete up to a point. The lock is held.
func (w *world) covers(p protocol.Point) bool { return w.hasLimit && !w.limit.Before(p) }

// past says whether the log is complete up to the exit after a position. The lock is held.
func (w *world) past(pos vmm.Position) bool { return w.hasLimit && w.limit.Exit > pos.Exit }

// peek returns the next entry of the log, nil if there is none yet. The lock is held.
func (w *world) peek() *log.Entry {
	if w.head == len(w.queue) {
		return nil
	}
	return &w.queue[w.head]
}

// next returns the next entry if it is at this position and of this kind, and takes it.
func (w *world) next(pos vmm.Position, kind log.Kind) *log.Entry {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.peek()
	if e == nil || e.Pos != pos || e.Kind != kind {
		return nil
	}
	w.head++
	return e
}

// --- vmm.InputSource ----------------------------------------------------------------------------

func (w *world) Attach(bell *vmm.Bell) {
	w.bell = bell
	w.in.Mute(true)
	w.in.Attach(bell)
}

// Anywhere: a guest that nobody follows may get its inputs at any stop.
func (w *world) Anywhere() bool { return w.is(live) && (w.checkpoint || !w.logging.Load()) }

func (w *world) EveryStop() bool { return !w.is(live) || w.in.EveryStop() }

func (w *world) Take(pos vmm.Position, next int64, buf []vmm.Input) []vmm.Input {
	n := len(buf)
	if !w.is(live) {
		var ok bool
		switch buf, ok = w.follow(pos, buf); {
		case ok:
			return buf
		case !w.is(live) || w.m.Fresh():
			return buf[:n] // of a stop that is void
		}
		// The guest has become live in the middle: what was taken from the log counts.
	}
	w.at(pos)
	n = len(buf)
	buf = w.in.Take(pos, next, buf)
	if len(buf) > n {
		w.stuckAt = time.Time{}
	}
	for i := range buf[n:] {
		w.input(pos, &buf[n+i])
	}
	return buf
}

// input logs an input of a live guest.
func (w *world) input(pos vmm.Position, in *vmm.Input) {
	logging := w.logging.Load()
	switch in.Kind {
	case vmm.InputDisk:
		q := w.disks.taken(int(in.Device), in.Tag)
		if q != nil && logging {
			w.read(in, q)
		}
		w.completes = w.completes || logging
	case vmm.InputTime:
		w.time = in.Time
	case vmm.InputFrame:
		w.received(in)
		w.urgent = true
	case vmm.InputConsole, vmm.InputPowerButton:
		w.urgent = true
	case vmm.InputEntropy:
		delete(w.entropy, in.Tag)
	}
	if !logging {
		return
	}
	data := in.Data
	if in.Kind == vmm.InputDisk {
		data = nil // the other side has its own
	}
	w.log(len(data), func(b []byte) []byte { return w.enc.Input(b, pos, in, data) })
}

// received shows a frame for the guest to the learner of its addresses.
func (w *world) received(in *vmm.Input) {
	if len(in.Data) > frameHeader {
		w.learner[in.Device].Received(in.Data[frameHeader:])
	}
}

// read folds the completion of a request into the digest.
func (w *world) read(in *vmm.Input, q *request) {
	var data []byte
	if q.r.Op == blk.Read && blk.Status(in.Status) == blk.StatusOK {
		data = q.r.Data
	}
	w.sum.Read(int(in.Device), in.Tag, in.Status, data)
}

// follow takes the inputs that the log has for a stop. It returns false if the guest has become live.
func (w *world) follow(pos vmm.Position, buf []vmm.Input) ([]vmm.Input, bool) {
	if w.is(idle) {
		return buf, w.stand(idle, nil)
	}
	w.at(pos)
	if pos.Count == 0 && !w.stand(following, func() bool { return w.covers(point(pos)) }) {
		return buf, false
	}
	for {
		w.mu.Lock()
		e := w.peek()
		if e != nil && log.Before(e.Pos, pos) {
			w.mu.Unlock()
			w.differs(fmt.Sprintf("an entry of %v is left over", e.Pos))
			return buf, true
		}
		// A stop between two exits has no watermark of its own, and its entries may come one by one.
		more := e == nil && pos.Count != 0 && !w.past(pos)
		w.mu.Unlock()
		if more {
			if !w.stand(following, func() bool { return w.peek() != nil || w.past(pos) }) {
				return buf, false
			}
			continue
		}
		if e == nil || e.Pos != pos || e.Kind != log.Input {
			return buf, true
		}
		in := e.Input
		if in.Kind == vmm.InputDisk {
			state, ok := w.disks.state(int(in.Device), in.Tag)
			if !ok {
				w.differs(fmt.Sprintf("request %d of disk %d is complete, and was never made here", in.Tag, in.Device))
				return buf, true
			}
			if state != done && !w.stand(following, func() bool {
				s, ok := w.disks.state(int(in.Device), in.Tag)
				return !ok || s == done
			}) {
				return buf, false
			}
		}
		w.next(pos, log.Input)
		if !w.accept(&in) {
			return buf, true
		}
		buf = append(buf, in)
	}
}

// accept checks an input of the log and completes it.
func (w *world) accept(in *vmm.Input) bool {
	switch in.Kind {
	case vmm.InputTime:
		if in.Time > w.time+maxStep {
			w.differs(fmt.Sprintf("time jumps from %d ns to %d ns", w.time, in.Time))
			return false
		}
		w.time = max(w.time, in.Time)
		in.Time = w.time + w.skew
	case vmm.InputDisk:
		q := w.disks.taken(int(in.Device), in.Tag)
		if q == nil {
			return false
		}
		if uint8(q.status) != in.Status {
			w.failed(&ReplicaError{Disk: q.disk, Op: q.r.Op, Offset: q.r.Offset, Length: q.r.Length, Here: q.status, There: blk.Status(in.Status)})
		}
		w.read(in, q)
	case vmm.InputFrame:
		w.received(in)
	case vmm.InputEntropy:
		if n, ok := w.entropy[in.Tag]; !ok || len(in.Data) > n {
			w.differs(fmt.Sprintf("random bytes for request %d, which was never made here", in.Tag))
			return false
		}
		delete(w.entropy, in.Tag)
	}
	return true
}

func (w *world) Sample(pos vmm.Position) int64 {
	if w.is(following) {
		w.at(pos)
		e := w.next(pos, log.Sample)
		if e == nil || e.Time > w.time+maxStep {
			w.differs("the guest reads a clock, and the log has no time for it")
			return w.time
		}
		w.time = max(w.time, e.Time)
		return w.time + w.skew
	}
	t := w.in.Sample(pos)
	w.time = t
	if w.logging.Load() {
		w.at(pos)
		w.log(0, func(b []byte) []byte { return w.enc.Sample(b, pos, t) })
	}
	return t
}

// Arm is called before the guest is entered: the stop is over.
func (w *world) Arm(next int64) {
	w.close()
	if !w.is(live) {
		if w.is(idle) || w.ordered() {
			w.stand(mode(w.mode.Load()), func() bool { return !w.is(idle) })
		}
		return
	}
	if w.pace.Load() || w.full.Load() {
		w.bell.Sleep(-1)
	}
	w.in.Arm(next)
}

// Wait is called in a HLT.
func (w *world) Wait(pos vmm.Position, next int64) {
	w.close()
	switch {
	case w.is(following):
		w.stand(following, func() bool { return w.covers(protocol.Point{Exit: pos.Exit, Round: pos.Round + 1}) })
	case w.is(idle):
		w.stand(idle, nil)
	case w.pace.Load() || w.full.Load():
		w.bell.Sleep(-1)
	default:
		if w.logging.Load() {
			w.tell(event{kind: evCall}, true) // the guest is idle: let the peer know how far it is
		}
		w.in.Wait(pos, next)
		w.closedAt = time.Now()
	}
}

// Linger passes on that an answer to what the guest has sent may come at once: a guest that nobody follows waits for it.
func (w *world) Linger() {
	if w.is(live) && !w.logging.Load() {
		w.in.Linger()
	}
}

func (w *world) Applied(inputs []vmm.Input) {
	if w.is(live) {
		w.in.Applied(inputs)
	}
}

func (w *world) SetTime(t int64) {
	w.time = t
	w.in.SetTime(t)
}

func (w *world) Pause() {
	if w.is(live) {
		w.in.Pause()
	}
}

func (w *world) Resume() {
	if w.is(live) {
		w.in.Resume()
	}
}

// --- vmm.AsyncSource, vmm.Stucker, vmm.Ender ----------------------------------------------------

// waited returns for how long something has waited for a stop that has a name.
func (w *world) waited(pos vmm.Position) time.Duration {
	now := time.Now()
	if w.stuckAt.IsZero() || w.stuckExit != pos.Exit {
		w.stuckAt, w.stuckExit = now, pos.Exit
	}
	return now.Sub(w.stuckAt)
}

func (w *world) Due(pos vmm.Position) bool {
	return w.is(live) && w.logging.Load() && w.waited(pos) >= patience
}

func (w *world) Stopped(pos vmm.Position, s vmm.Stop) {
	if w.is(following) {
		w.at(pos)
		w.next(pos, log.Stop)
		return
	}
	if w.logging.Load() {
		w.at(pos)
		w.log(0, func(b []byte) []byte { return w.enc.Stop(b, pos, s) })
	}
}

// Next returns the asynchronous stop to land on in this segment, once it is known whether there is one.
func (w *world) Next(pos vmm.Position) (s vmm.Stop, ok bool) {
	if !w.is(following) {
		return s, false
	}
	w.stand(following, func() bool {
		if e := w.peek(); e != nil && e.Kind == log.Stop && e.Pos.Exit == pos.Exit && e.Pos.Round == pos.Round && e.Pos.Count > pos.Count {
			s, ok = e.Stop, true
			return true
		}
		return w.past(pos)
	})
	return s, ok && w.is(following)
}

// Missed says that the guest does not come to a stop where the log has it.
func (w *world) Missed(err error) bool {
	if !w.is(following) {
		return false
	}
	w.differs(err.Error())
	return true
}

// Stuck asks for a cut if what waits has waited for too long.
func (w *world) Stuck(pos vmm.Position) {
	if !w.is(live) || !w.logging.Load() {
		return
	}
	again := patience
	if w.waited(pos) >= min(max(cutAfter, 2*w.gap), maxCutAfter) && !w.pace.Load() {
		again = cutAgain
		if time.Since(w.cutAsked) >= cutAgain {
			w.cutAsked = time.Now()
			w.tell(event{kind: evCall, flag: true}, true)
		}
	}
	if w.timer == nil {
		w.timer = time.AfterFunc(again, w.bell.Ring)
	} else {
		w.timer.Reset(again)
	}
}

// Ended holds the guest's end until it may be shown: it is an output like others.
func (w *world) Ended(e vmm.Exit) bool {
	if w.m.Quitting() {
		return true
	}
	if !w.exitSent {
		w.exitSent = true
		if w.is(following) && w.more() {
			w.differs(fmt.Sprintf("the guest has ended (%s, code %d, %s), and the log goes on", e.Reason, e.Code, e.Detail))
		}
		b, _ := json.Marshal(e)
		w.output(outExit, 0, b)
	}
	w.close()
	if w.is(live) {
		w.closed = true
		w.tell(event{kind: evCall}, true)
		if !w.ended.Load() {
			w.bell.Sleep(-1)
			w.bell.Answer()
		}
		return w.ended.Load()
	}
	at := point(w.cur)
	w.stand(mode(w.mode.Load()), func() bool {
		return w.ended.Load() || len(w.marks) > 0 && !at.Before(w.marks[0].point)
	})
	w.closed = false // a mark may have come for this stop, the last
	return w.ended.Load()
}

// more says whether the log goes on after the present stop.
func (w *world) more() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := w.head; i < len(w.queue); i++ {
		if e := &w.queue[i]; e.Kind != log.Scrub || e.Pos != w.cur { // those are dealt with when the stop ends
			return true
		}
	}
	return w.hasLimit && point(w.cur).Before(w.limit)
}

// --- vmm.OutputSink -----------------------------------------------------------------------------

// observe folds an exit into the digest.
func (w *world) observe(e *vmm.ExitRecord) {
	if !w.is(following) && !w.logging.Load() {
		return
	}
	w.at(e.Pos)
	w.sum.Exit(e)
	w.recent.add(e, w.sum.Sum())
}

// Kinds of output.
const (
	outFrame = iota + 1
	outConsole
	outExit
)

// output tells of something that wants to leave.
func (w *world) output(kind, device int, p []byte) {
	w.flush()
	w.closed = false
	b := make([]byte, 0, 3+len(p))
	b = append(b, byte(kind), byte(device), byte(device>>8))
	w.tell(event{kind: evOutput, point: point(w.cur), data: append(b, p...)}, true)
}

func (w *world) Disk(device int, r *vmm.DiskRequest) {
	if w.is(following) && !w.reissuing || w.logging.Load() {
		w.sum.Disk(device, r)
	}
	w.disks.submit(device, r, point(w.cur), w.reissuing)
}

func (w *world) Frame(device int, frame []byte) {
	w.sum.Frame(device, frame)
	if len(frame) > frameHeader {
		w.learner[device].Observe(frame[frameHeader:])
	}
	w.output(outFrame, device, frame)
}

func (w *world) Offloads(device int, o vmm.Offloads) {
	w.offloads[device] = o
	if w.is(live) {
		w.in.Offloads(device, o)
	}
}

func (w *world) Console(device int, p []byte) {
	w.sum.Console(device, p)
	w.output(outConsole, device, p)
}

func (w *world) Entropy(tag uint64, n int) {
	w.sum.Entropy(tag, n)
	w.entropy[tag] = n
	if w.is(live) {
		w.in.Entropy(tag, n)
	}
}

// PressPowerButton and PressReset have the world press a button of a live guest.
func (w *world) PressPowerButton() { w.in.PressPowerButton() }
func (w *world) PressReset()       { w.in.PressReset() }
