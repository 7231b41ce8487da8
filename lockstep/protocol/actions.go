package protocol

import "fmt"

// Action is something that the shell around a [Node] has to do. The shell carries out actions
// one after the other in the order in which [Node.Ready] lists them: the order is part of the
// protocol (an output leaves before its release is confirmed; a link is closed before a bid).
type Action interface{ String() string }

// The actions.
type (
	// Send sends a message on a connection, in order. If the connection is gone it is dropped.
	Send struct {
		Conn    uint64
		Message Message
	}
	// CloseLink closes a connection. Nothing that comes from it later may be heard of again.
	CloseLink struct{ Conn uint64 }
	// Ask sends a request to the arbiter.
	Ask struct{ Request Request }
	// Release lets outputs leave, in order.
	Release struct{ Outputs []Output }

	// Boot starts the guest from its disk, as after a power cycle.
	Boot struct{ Epoch uint64 }
	// Freeze stops the guest at its next stop; it does not run until Thaw, and its inputs wait.
	// When it stands the shell calls Node.Frozen.
	Freeze struct{}
	// Thaw lets a frozen guest run again. It is live.
	Thaw struct{}
	// Pace makes the vCPU wait (true) or no longer wait (false) because the backup is behind,
	// or because the gate's buffer is full.
	Pace struct{ Wait bool }
	// GoLive switches the guest's input from the log to the world, re-issues disk requests that
	// have no logged completion, and announces the guest's addresses to the network.
	GoLive struct{}
	// Follow makes a frozen primary a backup: its input comes from the log of a new term, which
	// begins where it stands.
	Follow struct{}

	// Feed gives the replayer more log. It may run up to and including Limit.
	Feed struct {
		Items []Item
		Limit Point
	}
	// Verified lets the backup issue the disk writes that were kicked up to and including Point.
	Verified struct{ Point Point }
	// Prepare makes a side ready to be overwritten: it stops the guest, drops its state, drains
	// its own disk requests and marks its replica stale. Then the shell calls Node.Prepared.
	Prepare struct{}
	// Precopy starts to send memory and disk while the guest runs: the shell calls Node.Chunk,
	// and Node.PrecopyDone when what is left fits a cut.
	Precopy struct{}
	// StageChunk takes a piece of the pre-copy.
	StageChunk struct{ Data []byte }
	// StopForCut stops replay where it is and drains the backup's disk requests. Then the shell
	// calls Node.CutReady with what it dirtied since the last cut.
	StopForCut struct{}
	// TakeCut stops the primary's guest anywhere, completes its exit, copies state and pages
	// that either side dirtied to a buffer, and lets it run on in the new term, in which
	// exits count from 0. The shell calls Node.CutTaken before the guest runs.
	//
	// Dirty is what the backup said. Full asks for the hashes of all pages, not only of those
	// that somebody dirtied: a flipped bit is in no dirty log. Since is the point of the ending
	// term up to which the backup's disk writes are known to be equal: the cut carries the
	// disk's content for every write that was kicked after it.
	TakeCut struct {
		Term  uint64
		Dirty []byte
		Since Point
		Full  bool
	}
	// Stage compares a cut's page hashes with the backup's pages. The shell calls Node.CutWant.
	Stage struct{ Data []byte }
	// CollectPages answers a CutWant from the buffer: the shell calls Node.CutPages, once or more.
	CollectPages struct{ Want []byte }
	// StagePages takes pages of a cut into the staging area.
	StagePages struct{ Data []byte }
	// Apply puts what is staged in the place of state, memory and disk, all of it; the backup
	// issues the disk requests that were in flight. The shell calls Node.CutApplied.
	Apply struct{ Term uint64 }
	// Discard throws away what is staged or buffered, and ends a pre-copy. Replay goes on where
	// StopForCut had stopped it.
	Discard struct{}

	// Event tells people what happened.
	Event struct {
		Kind EventKind
		Text string
	}
)

// EventKind is the reason code of an event.
type EventKind string

// The events.
const (
	EventPhase      EventKind = "phase"       // the node's phase has changed
	EventSuspect    EventKind = "suspect"     // the peer is silent
	EventDead       EventKind = "dead"        // the peer has been silent for too long
	EventLinkLost   EventKind = "link-lost"   // the link was closed
	EventSlow       EventKind = "slow"        // the primary waits for the backup, which is alive
	EventDivergence EventKind = "divergence"  // digests differ
	EventTaint      EventKind = "taint"       // a cut because of an untrapped clock
	EventCut        EventKind = "cut"         // a cut begins
	EventNoArbiter  EventKind = "no-arbiter"  // the arbiter does not answer; frozen until it does
	EventRefused    EventKind = "refused"     // the arbiter's record rules this side out
	EventForced     EventKind = "forced"      // a person overruled the record
	EventProtocol   EventKind = "protocol"    // the peer broke the protocol
	EventCold       EventKind = "cold-start"  // the guest starts from its disk
	EventSwitchOver EventKind = "switch-over" // a planned change of primary
)

func (a Send) String() string       { return fmt.Sprintf("send %v", a.Message) }
func (a CloseLink) String() string  { return fmt.Sprintf("close link %d", a.Conn) }
func (a Ask) String() string        { return fmt.Sprintf("ask arbiter: %v", a.Request) }
func (a Boot) String() string       { return fmt.Sprintf("boot the guest (epoch %d)", a.Epoch) }
func (Freeze) String() string       { return "freeze" }
func (Thaw) String() string         { return "thaw" }
func (a Pace) String() string       { return fmt.Sprintf("pace wait=%v", a.Wait) }
func (GoLive) String() string       { return "go live" }
func (Follow) String() string       { return "follow" }
func (a Verified) String() string   { return fmt.Sprintf("writes may go to %v", a.Point) }
func (Prepare) String() string      { return "prepare to be overwritten" }
func (Precopy) String() string      { return "pre-copy" }
func (StageChunk) String() string   { return "stage chunk" }
func (StopForCut) String() string   { return "stop for cut" }
func (a TakeCut) String() string    { return fmt.Sprintf("take cut, term %d", a.Term) }
func (Stage) String() string        { return "stage cut" }
func (CollectPages) String() string { return "collect pages" }
func (StagePages) String() string   { return "stage pages" }
func (a Apply) String() string      { return fmt.Sprintf("apply cut, term %d", a.Term) }
func (Discard) String() string      { return "discard what is staged" }
func (a Event) String() string      { return fmt.Sprintf("event %s: %s", a.Kind, a.Text) }

func (a Feed) String() string {
	return fmt.Sprintf("feed %v, run to %v", a.Items, a.Limit)
}

func (a Release) String() string {
	s := "release"
	for _, o := range a.Outputs {
		s += fmt.Sprintf(" #%d", o.Seq)
	}
	return s
}
