package sim

import (
	"container/heap"
	"fmt"
	"io"
	"math/rand/v2"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// Options says what to simulate.
type Options struct {
	Seed uint64
	// Trace, if set, gets a readable transcript.
	Trace io.Writer
	// Break names a rule to break: of the protocol (in a build with the tag "sabotage", through
	// Prepare) or of the shell around it.
	Break ShellRule
	// Prepare, if set, gets every new node.
	Prepare func(*protocol.Node)
}

// Stats counts what happened in a run.
type Stats struct {
	Steps, Exits, Released, Acked                 int
	Crashes, Pauses, Partitions, Breaks, Injected int
	Bids, TakeOvers, SwitchOvers, ColdStarts      int
	Joins, Cuts, Divergences                      int
}

// String lists what happened, a line each kind.
func (s Stats) String() string {
	return fmt.Sprintf(`%d steps, %d exits, %d outputs released, %d transactions acknowledged
faults: %d crashes, %d pauses, %d partitions, %d broken links, %d memory errors
%d bids, %d take-overs and hand-overs (%d begun by hand), %d cold starts, %d joins, %d cuts, %d divergences reported`,
		s.Steps, s.Exits, s.Released, s.Acked, s.Crashes, s.Pauses, s.Partitions, s.Breaks, s.Injected,
		s.Bids, s.TakeOvers, s.SwitchOvers, s.ColdStarts, s.Joins, s.Cuts, s.Divergences)
}

// Add adds another run's counts.
func (s *Stats) Add(o Stats) {
	s.Steps += o.Steps
	s.Exits += o.Exits
	s.Released += o.Released
	s.Acked += o.Acked
	s.Bids += o.Bids
	s.Crashes += o.Crashes
	s.Pauses += o.Pauses
	s.Partitions += o.Partitions
	s.Breaks += o.Breaks
	s.ColdStarts += o.ColdStarts
	s.TakeOvers += o.TakeOvers
	s.Joins += o.Joins
	s.Cuts += o.Cuts
	s.Injected += o.Injected
	s.SwitchOvers += o.SwitchOvers
	s.Divergences += o.Divergences
}

// Times, in the simulator's unit, of which a tick has about 100.
const (
	faultTime  = 150_000 // faults happen
	settleTime = 250_000 // after the last fault everything must work again by then
	settleStep = 5_000   // how often that is looked at
	drainTime  = 20_000  // without clients, everything comes to rest
)

type event struct {
	at  int64
	seq uint64
	run func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at < e[j].at || e[i].at == e[j].at && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	o := *e
	x := o[len(o)-1]
	*e = o[:len(o)-1]
	return x
}

// version names an output of one power-on of the guest.
type version struct{ boot, seq uint64 }

// instant names an instant of a primary's run.
type instant struct {
	primary protocol.Side
	life    int
	term    uint64
	at      protocol.Point
}

// world is everything: both sides, what connects them, the arbiter, the clients.
type world struct {
	o      Options
	rng    *rand.Rand
	now    int64
	seq    uint64
	queue  events
	stats  Stats
	err    error
	faulty bool // faults may happen
	blobs  map[uint64]any
	nblobs uint64

	commit protocol.Commit
	hasTSC bool
	flips  bool // memory errors happen
	loss   int  // percent of the arbiter's messages that get lost

	sides [2]*side

	// The link. Direction d leads away from sides[d].
	conns    uint64
	dialled  int64
	blocked  [2]bool
	stalled  [2][]parcel
	lastAt   map[uint64][2]int64 // by connection: when the newest arrives
	resetTo  uint64              // messages of connections up to this one are gone
	arbBlock [2]bool

	record protocol.Record

	released map[version]uint64 // hash of every output that left
	trail    map[instant]uint64 // hash of the primary's state
	acked    [clients]uint64    // what each client was told
	next     [clients]uint64
	quiet    bool // clients have stopped
}

func (w *world) after(d int64, f func()) {
	w.seq++
	heap.Push(&w.queue, event{w.now + max(d, 1), w.seq, f})
}

func (w *world) between(lo, hi int64) int64 { return lo + w.rng.Int64N(hi-lo+1) }
func (w *world) chance(oneIn int64) bool    { return w.rng.Int64N(oneIn) == 0 }

func (w *world) fail(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf(format, args...)
		w.tracef("     FAILED: %v", w.err)
	}
}

func (w *world) tracef(format string, args ...any) {
	if w.o.Trace != nil {
		fmt.Fprintf(w.o.Trace, "%8d %s\n", w.now, fmt.Sprintf(format, args...))
	}
}

// blob lets a message carry a value without an encoding of its own.
func (w *world) blob(v any) []byte {
	w.nblobs++
	w.blobs[w.nblobs] = v
	b := make([]byte, 8)
	for i := range b {
		b[i] = byte(w.nblobs >> (8 * i))
	}
	return b
}

func (w *world) unblob(b []byte) any {
	var k uint64
	for i := range b {
		k |= uint64(b[i]) << (8 * i)
	}
	return w.blobs[k]
}

// Run simulates one seed. The error says which invariant broke.
func Run(o Options) (Stats, error) {
	w := &world{
		o: o, rng: rand.New(rand.NewPCG(o.Seed, 0x66747662)), blobs: map[uint64]any{},
		released: map[version]uint64{}, trail: map[instant]uint64{}, lastAt: map[uint64][2]int64{}, faulty: true,
	}
	w.loss = int(w.between(0, 30))
	switch w.rng.IntN(5) {
	case 0:
		w.commit = protocol.Received
	case 1:
		w.hasTSC = true
	case 2:
		w.flips = true
	case 3:
		w.commit = protocol.Checkpointed
	}
	w.sides[0] = newSide(w, protocol.A)
	w.sides[1] = newSide(w, protocol.B)
	for c := range w.next {
		w.next[c] = 1
	}
	w.tracef("seed %d: commit %v, taints %v, memory errors %v, arbiter loses %d%%", o.Seed, w.commit, w.hasTSC, w.flips, w.loss)
	w.sides[0].start()
	w.sides[1].start()
	w.after(1, w.dial)
	w.after(1, w.clientSend)
	w.after(w.between(5000, 30000), w.fault)
	w.runUntil(faultTime)
	w.heal()
	before := w.acked
	for w.now < faultTime+settleTime && w.err == nil && w.progress(before) != nil {
		w.runUntil(w.now + settleStep)
	}
	if err := w.progress(before); err != nil && w.err == nil {
		w.fail("%v", err)
	}
	w.quiet = true
	w.runUntil(w.now + drainTime)
	if w.err == nil {
		w.checkRest()
	}
	for _, a := range w.acked {
		w.stats.Acked += int(a)
	}
	return w.stats, w.err
}

func (w *world) runUntil(t int64) {
	for len(w.queue) > 0 && w.queue[0].at <= t && w.err == nil {
		e := heap.Pop(&w.queue).(event)
		w.now = e.at
		w.stats.Steps++
		e.run()
		w.checkStep()
	}
	w.now = t
}

// The invariants.

// checkStep checks what must hold at every moment.
func (w *world) checkStep() {
	open := 0
	for _, s := range w.sides {
		if !s.up || !s.node.Open() {
			continue
		}
		open++
		if w.record.InSync != protocol.Only(s.id) {
			w.fail("side %v lets outputs out on its own, but the record is %v", s.id, w.record)
		}
	}
	if open > 1 {
		w.fail("two live sides")
	}
}

// checkRelease checks an output at the moment at which it leaves.
//
// Survivors go on from what was released: so no output may come in two versions, and none may be
// missing before another.
func (w *world) checkRelease(s *side, o output, at protocol.Point) {
	v := version{o.boot, o.seq}
	if h, ok := w.released[v]; ok && h != o.hash {
		w.fail("side %v releases output %d.%d in a second version", s.id, o.boot, o.seq)
	}
	if _, ok := w.released[version{o.boot, o.seq - 1}]; o.seq > 0 && !ok {
		w.fail("side %v releases output %d.%d, but the one before it was lost", s.id, o.boot, o.seq)
	}
	w.released[v] = o.hash
	w.stats.Released++
	peer := w.sides[1-s.index()]
	if !s.node.Open() && peer.up && !peer.accounts(o, at) {
		w.fail("side %v releases output %d.%d, which side %v cannot account for", s.id, o.boot, o.seq, peer.id)
	}
	if o.client >= 0 {
		w.acked[o.client] = max(w.acked[o.client], o.val)
		if o.val >= w.next[o.client] {
			w.next[o.client] = o.val + 1
		}
	}
}

// checkLedger checks that a guest that runs live has all that clients were told. A primary that
// has lost its place and does not know it yet need not: its outputs wait for acks that never come.
func (w *world) checkLedger(s *side) {
	if !w.record.InSync.Has(s.id) {
		return
	}
	for c, a := range w.acked {
		if s.g.ledger[c] < a {
			w.fail("side %v is live with %d for client %d, who was told %d", s.id, s.g.ledger[c], c, a)
		}
	}
}

// note remembers the state of a primary at an instant.
func (w *world) note(s *side) {
	w.trail[instant{s.id, s.life, s.node.Term(), s.pt}] = s.g.hash()
}

// checkTwin checks that a backup is in the state in which its primary was at the same instant.
// Only a fault of the hardware, or a clock that is not trapped, may make a difference.
func (w *world) checkTwin(s *side) {
	if w.flips || w.hasTSC || w.err != nil {
		return
	}
	h, ok := w.trail[instant{s.id.Other(), s.twin, s.node.Term(), s.pt}]
	if ok && h != s.g.hash() {
		w.fail("side %v is not in the state that its primary was in at %v of term %d", s.id, s.pt, s.node.Term())
	}
}

// progress says what has not recovered since the faults ended.
func (w *world) progress(before [clients]uint64) error {
	for _, s := range w.sides {
		if p := s.node.Phase(); p != protocol.Protected && p != protocol.Backup {
			return fmt.Errorf("no progress: %v is still %v", s.id, p)
		}
	}
	for c := range before {
		if w.acked[c] < before[c]+3 {
			return fmt.Errorf("no progress for client %d", c)
		}
	}
	return nil
}

// checkRest compares the sides when everything has come to rest.
func (w *world) checkRest() {
	a, b := w.sides[0], w.sides[1]
	if a.node.Phase() == protocol.Backup {
		a, b = b, a
	}
	// The primary's guest stands; the backup has replayed everything.
	ga, gb := a.g, b.g
	ga.dirty, gb.dirty = 0, 0
	switch {
	case a.pt != b.pt:
		w.fail("at rest: primary %v at %v, backup at %v", a.id, a.pt, b.pt)
	case ga != gb && !w.hasTSC:
		w.fail("at rest: a divergence that nobody reported")
	case a.disk != b.disk:
		w.fail("at rest: the replicas differ: %v and %v", a.disk, b.disk)
	}
	for c, v := range w.acked {
		if a.disk[c] < v {
			w.fail("at rest: the disk has %d for client %d, who was told %d", a.disk[c], c, v)
		}
	}
}
