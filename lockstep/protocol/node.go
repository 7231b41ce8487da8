package protocol

import "fmt"

// Phase is what a node is doing. The diagram is in docs/protocol.md.
type Phase uint8

// The phases.
const (
	// Waiting: not live, and not allowed to become so; waits to be taken as a backup. It may
	// hold the frozen state of a guest, or nothing.
	Waiting Phase = iota
	// Joining: a live peer is copying its guest here.
	Joining
	// Backup: replays the primary's log; listed by the arbiter.
	Backup
	// Draining: the primary is lost; replays what there is of its log, then bids.
	Draining
	// Bidding: frozen until the arbiter has decided.
	Bidding
	// Alone: live and unprotected.
	Alone
	// Syncing: live, and copying the guest to a joining peer.
	Syncing
	// Protected: primary of a pair in lockstep.
	Protected
	// Switching: a primary that is handing over to its backup.
	Switching
)

var phaseNames = [...]string{"waiting", "joining", "backup", "draining", "bidding", "alone", "syncing", "protected", "switching"}

// String returns the name in lower case.
func (p Phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase(%d)", uint8(p))
}

// Config is what a node is told at its start. Times are in ticks, whose length the shell
// chooses; nothing but speed depends on their being right.
type Config struct {
	Self   Side
	Commit Commit
	// Incarnation differs between any two starts of a node of this pair (a random number will
	// do): it makes the nonces of bids unique.
	Incarnation uint64
	// Create lets this side make the first record, if the arbiter holds none.
	Create bool
	// Stale says that the replica of the disk is known to be incomplete (a Prepare was not
	// followed by an Apply): it must not be booted from.
	Stale bool

	HeartbeatTicks int // between heartbeats
	SuspectTicks   int // of silence before an event says so
	DeadTicks      int // of silence before the peer counts as dead
	ArbiterTicks   int // before an unanswered request counts as ambiguous
	PollTicks      int // between a waiting side's looks at the record
	ColdTicks      int // without a peer before a cold start
	FlushTicks     int // that log may wait to be sent
	LeadTicks      int // the primary's lead while no output waits
	TightTicks     int // and while one waits

	LeadBytes int // bound of log that is not executed yet
	GateBytes int // bound of outputs that wait
	BatchSize int // bytes of log that are sent at once, at the latest
}

// DefaultConfig returns the defaults for ticks of one millisecond.
func DefaultConfig(self Side) Config {
	return Config{
		Self:           self,
		HeartbeatTicks: 20, SuspectTicks: 100, DeadTicks: 300,
		ArbiterTicks: 200, PollTicks: 250, ColdTicks: 2000,
		FlushTicks: 1, LeadTicks: 10, TightTicks: 2,
		LeadBytes: 4 << 20, GateBytes: 1 << 20, BatchSize: 64 << 10,
	}
}

// stage says how far a cut is.
type stage uint8

const (
	noCut        stage = iota
	cutAsked           // primary: waits for CutDirty; backup: waits for the shell's CutReady
	cutTaking          // primary: waits for the shell's CutTaken
	cutTaken           // primary: waits for CutAck
	cutReceiving       // backup: CutDirty is sent, the cut is arriving
	cutApplying        // backup: all of it is staged, the shell is applying it
)

// span is log that the backup has, or will get, and has not executed yet.
type span struct {
	upTo  Point
	bytes int
	tick  uint64
}

// Node is one side's protocol state machine. It is not safe for concurrent use. Its methods
// never block; what they want done comes out of [Node.Ready].
type Node struct {
	cfg      Config
	sabotage // nothing, unless built to test the tests
	phase    Phase
	now      uint64 // ticks so far
	actions  []Action
	taken    int // how many of actions the last Ready returned

	// The link.
	conn    uint64 // 0: none
	heard   uint64 // tick of the last message
	sent    uint64 // tick of the last message sent
	suspect bool
	peer    Phase // as the peer last said

	// The arbiter.
	record     Record // the newest that this node knows
	bid        Record // what it is trying to swap in; Epoch 0: nothing
	bids       uint64
	asked      uint64 // id of the first request of the question that waits for its answer; 0: none
	askedAt    uint64 // tick of the last one
	requests   uint64
	retryAt    uint64 // tick at which to ask again
	idle       uint64 // tick since which there has been neither peer nor bid
	forced     bool
	refused    bool // the event has been shown
	unanswered bool // likewise

	// The guest, on either side.
	hasState bool // this side holds a guest's state
	live     bool // that state is a primary's: the guest resumes with Thaw
	stale    bool
	barred   bool // that state must not go live: it cannot account for released outputs
	term     uint64
	nextSeq  uint64
	outputs  []Output // primary: held by the gate; backup: not confirmed as released
	bytes    int      // in outputs
	cut      stage

	// Primary.
	logging  bool // the guest's run is being logged to a peer
	pending  []Item
	size     int // bytes in pending
	pendedAt uint64
	mark     *Item // newest watermark, if newer than all of pending
	lastMark Point
	lead     []span // on either side
	leadSize int
	waiting  bool // Pace{true} is in force
	slow     bool // the backup is, and an event has said so
	tainted  bool // somewhere in this term, on this side or as the backup says
	base     bool // the backup holds the start of this term
	received Point
	executed Point
	clean    Point
	still    bool // Switching: the guest stands
	full     bool // the cut that has begun compares everything

	// Backup.
	cutTerm  uint64
	cutMsg   Message // CutState: outputs and sequence number, until applied
	early    []Item  // log of the term that the cut begins
	marks    []Item  // watermarks that replay has not reached
	logged   Point   // of the newest item of log
	confirm  uint64  // outputs below this have been released
	dirtyRun bool    // taint since the last watermark
	diverged bool
	ackDue   bool
}

// New returns a node that holds no state and waits.
func New(cfg Config) *Node {
	n := &Node{cfg: cfg, stale: cfg.Stale}
	n.retryAt = 1
	return n
}

// Phase returns what the node is doing.
func (n *Node) Phase() Phase { return n.phase }

// Record returns the newest record that the node knows.
func (n *Node) Record() Record { return n.record }

// Term returns the current term.
func (n *Node) Term() uint64 { return n.term }

// Live reports whether this side's guest may run as the one that the world sees.
func (n *Node) Live() bool {
	return n.phase == Alone || n.phase == Syncing || n.phase == Protected || n.phase == Switching
}

// Open reports whether outputs leave without waiting for anybody.
func (n *Node) Open() bool { return n.phase == Alone || n.phase == Syncing && !n.logging }

// Logging reports whether the guest's run is being logged to a peer: Log, Output and Mark are wanted at each stop.
func (n *Node) Logging() bool { return n.logging }

// Held returns how many outputs are held: by the gate of a primary, or on a backup because their
// release has not been confirmed.
func (n *Node) Held() int { return len(n.outputs) }

// Acked returns the point up to which the backup has executed the current term.
func (n *Node) Acked() Point { return n.executed }

// HoldsState reports whether this side holds a guest's state, running or frozen.
func (n *Node) HoldsState() bool { return n.hasState }

// Diverging reports whether this side has found a divergence that no cut has repaired yet.
func (n *Node) Diverging() bool { return n.diverged }

// Ready returns what there is to do, in the order in which it must be done. The shell carries
// it out, then calls Advance. Methods may be called in between; what they ask for comes with
// the next Ready.
func (n *Node) Ready() []Action {
	if n.ackDue && n.conn != 0 && (n.phase == Joining || n.phase == Backup || n.broken(BidBeforeClose)) {
		n.ackDue = false
		n.send(Message{Type: MsgAck, Term: n.term, Received: n.received, Executed: n.executed, Clean: n.clean, Tainted: n.tainted})
	}
	n.taken = len(n.actions)
	return n.actions[:n.taken:n.taken]
}

// Advance tells that what the last Ready returned has been carried out.
func (n *Node) Advance() {
	n.actions = n.actions[n.taken:]
	n.taken = 0
	if len(n.actions) == 0 {
		n.actions = nil
	}
}

func (n *Node) do(a Action) { n.actions = append(n.actions, a) }

func (n *Node) event(k EventKind, format string, args ...any) {
	n.do(Event{k, fmt.Sprintf(format, args...)})
}

func (n *Node) send(m Message) {
	if n.conn == 0 {
		return
	}
	m.From = n.cfg.Self
	n.sent = n.now
	n.do(Send{n.conn, m})
}

func (n *Node) become(p Phase) {
	if n.phase == p {
		return
	}
	n.event(EventPhase, "%v -> %v", n.phase, p)
	n.phase = p
	n.idle = n.now
	n.hello()
}

// hello tells the peer the phase; the live side acts on a peer that waits.
func (n *Node) hello() {
	n.send(Message{Type: MsgHello, Phase: n.phase, Epoch: n.record.Epoch})
}

// LinkUp tells that a connection to the peer has been made. Connections have different,
// non-zero numbers; a new one replaces the last.
func (n *Node) LinkUp(conn uint64) {
	if n.conn != 0 {
		n.LinkDown(n.conn)
	}
	n.conn, n.heard, n.suspect, n.ackDue = conn, n.now, false, false
	n.peer = Bidding // until it says better
	n.hello()
}

// LinkDown tells that a connection is gone.
func (n *Node) LinkDown(conn uint64) {
	if conn != n.conn || conn == 0 {
		return
	}
	n.event(EventLinkLost, "link %d", conn)
	n.conn = 0
	n.lost()
}

// lost does what the loss of the peer means in each phase. The link is closed by now: that
// comes before everything else.
func (n *Node) lost() {
	n.idle = n.now
	n.ackDue = false
	switch n.phase {
	case Joining, Backup:
		n.early = nil
		switch {
		case n.cut == cutApplying: // all of it is here: it will be applied, and then it counts
		case n.phase == Joining && !n.hasState:
			n.cut, n.cutTerm = noCut, 0
			n.do(Discard{})
			n.become(Waiting)
			return
		case n.cut != noCut:
			n.cut, n.cutTerm = noCut, 0
			n.do(Discard{})
		}
		n.become(Draining)
		n.drained()
	case Protected, Switching:
		n.do(Freeze{})
		n.stopLogging()
		n.startBid()
	case Syncing:
		held := n.logging
		asked := n.bid.Epoch != 0
		n.stopLogging()
		n.do(Discard{})
		if asked && !n.broken(AssumeAlone) {
			// The record may list the peer by now, or later: only the arbiter knows.
			n.do(Freeze{})
			n.startBid()
			return
		}
		n.bid, n.asked = Record{}, 0
		n.become(Alone)
		if held {
			n.releaseAll()
		}
	}
}

// Tick tells that a tick has passed.
func (n *Node) Tick() {
	n.now++
	n.tickLink()
	n.tickArbiter()
	if n.logging {
		if len(n.pending) > 0 || n.mark != nil {
			if n.now-n.pendedAt >= uint64(n.cfg.FlushTicks) {
				n.flush()
			}
		}
		n.pace()
		n.watch()
	}
}

func (n *Node) tickLink() {
	if n.conn == 0 {
		return
	}
	if n.now-n.sent >= uint64(n.cfg.HeartbeatTicks) {
		n.send(Message{Type: MsgHeartbeat})
	}
	silent := n.now - n.heard
	if silent >= uint64(n.cfg.SuspectTicks) && !n.suspect {
		n.suspect = true
		n.event(EventSuspect, "peer silent for %d ticks", silent)
	}
	if silent >= uint64(n.cfg.DeadTicks) {
		n.event(EventDead, "peer silent for %d ticks", silent)
		if n.broken(BidBeforeClose) && n.phase == Backup {
			n.lost()
			n.heard = n.now
			return
		}
		// For good: what may still arrive on it must never be acked or applied once this
		// side has bid.
		n.hangUp()
		n.lost()
	}
}

// Step takes a message that came on a connection.
func (n *Node) Step(conn uint64, m Message) {
	if conn != n.conn || conn == 0 {
		if !n.broken(HearOldLinks) || n.conn == 0 {
			return
		}
	}
	if m.From != n.cfg.Self.Other() {
		n.event(EventProtocol, "message %v from %v", m.Type, m.From)
		return
	}
	n.heard = n.now
	n.suspect = false
	switch m.Type {
	case MsgHeartbeat:
	case MsgHello:
		n.stepHello(m)
	case MsgReady, MsgAck, MsgDiverged, MsgCutDirty, MsgCutWant, MsgCutAck:
		n.stepPrimary(m)
	case MsgJoin, MsgChunk, MsgLog, MsgReleased, MsgCutAsk, MsgCutState, MsgCutPages, MsgInSync, MsgHandOver:
		n.stepBackup(m)
	default:
		n.event(EventProtocol, "unknown message type %d", uint8(m.Type))
	}
}

func (n *Node) stepHello(m Message) {
	n.peer = m.Phase
	if m.Phase != Waiting {
		return
	}
	switch {
	case n.phase == Alone, n.phase == Syncing && n.cut == noCut && !n.logging:
		n.become(Syncing)
		n.send(Message{Type: MsgJoin, Epoch: n.record.Epoch})
	case n.phase == Syncing, n.phase == Protected, n.phase == Switching:
		// It has given up what this side relies on: as good as lost.
		n.violation("the backup says that it is waiting")
	}
}

// hangUp closes the link.
func (n *Node) hangUp() {
	if n.conn != 0 {
		n.do(CloseLink{n.conn})
		n.conn = 0
	}
}

// Force overrules the record: this side becomes live although it may not. It is for a person who
// knows that the other side is gone for good; what that side had promised is lost. It reports
// whether there is something to start from.
func (n *Node) Force() bool {
	if n.phase != Waiting || !n.hasState && n.stale {
		return false
	}
	n.forced = true
	n.event(EventForced, "start of side %v was forced over record %v", n.cfg.Self, n.record)
	n.startBid()
	return true
}
