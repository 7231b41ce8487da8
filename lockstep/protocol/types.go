package protocol

import (
	"fmt"
	"strings"
)

// Side names one of the two members of a pair.
type Side uint8

// The sides. None is the zero value: nobody.
const (
	None Side = iota
	A
	B
)

// Other returns the peer of a side.
func (s Side) Other() Side {
	switch s {
	case A:
		return B
	case B:
		return A
	}
	return None
}

// String returns "A", "B" or "none".
func (s Side) String() string {
	switch s {
	case A:
		return "A"
	case B:
		return "B"
	}
	return "none"
}

// Sides is a set of sides, a bit each.
type Sides uint8

// Both is the set of both sides.
const Both = Sides(1<<A | 1<<B)

// Only returns the set of one side.
func Only(s Side) Sides { return 1 << s }

// Has reports whether s is in the set.
func (m Sides) Has(s Side) bool { return s != None && m&(1<<s) != 0 }

// String lists the members, as in "A+B".
func (m Sides) String() string {
	var names []string
	for _, s := range []Side{A, B} {
		if m.Has(s) {
			names = append(names, s.String())
		}
	}
	return strings.Join(names, "+")
}

// Record is what the arbiter keeps of a pair. It changes only by a compare-and-swap from epoch
// N to epoch N+1. The zero Record means that there is none.
type Record struct {
	Epoch   uint64 `json:"epoch"`
	InSync  Sides  `json:"in_sync"` // who holds all that was ever promised to the outside
	Primary Side   `json:"primary"` // who may start alone when both were down
	Nonce   uint64 `json:"nonce"`   // of the bid that wrote it: recognises one's own
}

// String returns the record in the form of the transcripts.
func (r Record) String() string {
	if r.Epoch == 0 {
		return "no record"
	}
	return fmt.Sprintf("%d{%v primary %v}", r.Epoch, r.InSync, r.Primary)
}

// Point is an instant of a term that both sides reach: a synchronous exit, and in an exit that
// halts, a round of waiting. Points of different terms cannot be compared.
type Point struct {
	Exit  uint64
	Round uint32
}

// Before reports whether p comes before q in one term.
func (p Point) Before(q Point) bool {
	return p.Exit < q.Exit || p.Exit == q.Exit && p.Round < q.Round
}

// String returns the exit, and the round if there is one.
func (p Point) String() string {
	if p.Round == 0 {
		return fmt.Sprint(p.Exit)
	}
	return fmt.Sprintf("%d.%d", p.Exit, p.Round)
}

// Digest is the running hash of an execution.
type Digest [16]byte

// String returns the first half in hexadecimal: enough to tell two apart.
func (d Digest) String() string { return fmt.Sprintf("%x", d[:8]) }

// Item is one piece of a log: an entry or a watermark. Items come in the order of their points.
type Item struct {
	Point Point
	// Data is what the recorder wrote for an entry; the protocol does not look into it.
	Data []byte
	// Mark makes the item a watermark, which promises that the log is complete up to and
	// including Point, and carries the digest of that point. Tainted says that since the last
	// watermark the guest may have read a clock that could not be trapped.
	Mark    bool
	Digest  Digest
	Tainted bool
}

// String returns a watermark as "~5", an entry as "5(data length)".
func (i Item) String() string {
	switch {
	case !i.Mark:
		return fmt.Sprintf("%v(%d)", i.Point, len(i.Data))
	case i.Tainted:
		return fmt.Sprintf("~%v tainted", i.Point)
	}
	return fmt.Sprintf("~%v", i.Point)
}

// Output is something that wants to leave: a frame, console bytes, an exit status.
type Output struct {
	Seq   uint64 // counts a guest's outputs from its power-on; equal on both sides
	Point Point  // where it was made, in the term in which it is held
	Data  []byte
}

// Commit is the rule that says when an output may leave.
type Commit uint8

const (
	// Executed: the backup has itself reached the output's point, with an equal digest and no
	// taint on either side. Right on every host.
	Executed Commit = iota
	// Received: the backup has the log up to the output's point. Allowed only where every clock
	// of the guest traps and both hosts have passed the self-test.
	Received
	// Checkpointed: a cut that carries the output has been applied. The backup is passive: it gets
	// no log and replays nothing; the shell asks for a cut at every interval (NeedCut).
	Checkpointed
)

// String returns the name that the configuration uses.
func (c Commit) String() string {
	switch c {
	case Received:
		return "received"
	case Checkpointed:
		return "checkpointed"
	}
	return "executed"
}

// Type says what a message is.
type Type uint8

// The messages. The comment says who sends one, and what it carries.
const (
	MsgHello     Type = iota + 1 // both: Phase, Epoch, From
	MsgHeartbeat                 // both
	MsgJoin                      // live side: be my backup
	MsgReady                     // joining side: own I/O is drained, send
	MsgChunk                     // live side: Data of the pre-copy
	MsgLog                       // primary: Term, Items
	MsgAck                       // backup: Term, Received, Executed, Clean, Tainted
	MsgReleased                  // primary: Seq, up to which (inclusive) outputs have left
	MsgDiverged                  // backup: Term, Point, Digest
	MsgCutAsk                    // primary: Term that the cut begins
	MsgCutDirty                  // backup: Term, Data: what it dirtied since the last cut
	MsgCutState                  // primary: Term, Data, Outputs still held, Seq of the next output
	MsgCutWant                   // backup: Term, Data: the pages that differ
	MsgCutPages                  // primary: Term, Data, Last
	MsgCutAck                    // backup: Term: applied
	MsgInSync                    // primary: Record, which lists the backup
	MsgHandOver                  // old primary: Record, in which the receiver is primary
)

var typeNames = [...]string{
	MsgHello: "Hello", MsgHeartbeat: "Heartbeat", MsgJoin: "Join", MsgReady: "Ready", MsgChunk: "Chunk",
	MsgLog: "Log", MsgAck: "Ack", MsgReleased: "Released", MsgDiverged: "Diverged",
	MsgCutAsk: "CutAsk", MsgCutDirty: "CutDirty", MsgCutState: "CutState", MsgCutWant: "CutWant",
	MsgCutPages: "CutPages", MsgCutAck: "CutAck", MsgInSync: "InSync", MsgHandOver: "HandOver",
}

// String returns the name without "Msg".
func (t Type) String() string {
	if int(t) < len(typeNames) && typeNames[t] != "" {
		return typeNames[t]
	}
	return fmt.Sprintf("Type(%d)", uint8(t))
}

// Message is what the sides send each other. Which fields count depends on the type.
type Message struct {
	Type     Type
	From     Side
	Phase    Phase
	Epoch    uint64
	Term     uint64
	Items    []Item
	Received Point // the backup's log is complete up to here
	Executed Point // it has executed up to here, with an equal digest
	Clean    Point // and up to here without taint on either side
	Tainted  bool  // something after Clean was tainted
	Seq      uint64
	Point    Point
	Digest   Digest
	Data     []byte
	Last     bool
	Outputs  []Output
	Record   Record
}

// String returns the message in the form of the transcripts.
func (m Message) String() string {
	var b strings.Builder
	fmt.Fprint(&b, m.Type)
	switch m.Type {
	case MsgHello:
		fmt.Fprintf(&b, " %v epoch %d", m.Phase, m.Epoch)
	case MsgLog:
		fmt.Fprintf(&b, " term %d:", m.Term)
		for _, i := range m.Items {
			fmt.Fprintf(&b, " %v", i)
		}
	case MsgAck:
		fmt.Fprintf(&b, " term %d received %v executed %v", m.Term, m.Received, m.Executed)
		if m.Tainted {
			fmt.Fprintf(&b, " clean to %v", m.Clean)
		}
	case MsgReleased:
		fmt.Fprintf(&b, " to #%d", m.Seq)
	case MsgDiverged:
		fmt.Fprintf(&b, " term %d at %v", m.Term, m.Point)
	case MsgCutAsk, MsgCutDirty, MsgCutWant, MsgCutAck:
		fmt.Fprintf(&b, " term %d", m.Term)
	case MsgCutState:
		fmt.Fprintf(&b, " term %d, %d outputs held", m.Term, len(m.Outputs))
	case MsgCutPages:
		fmt.Fprintf(&b, " term %d", m.Term)
		if m.Last {
			b.WriteString(" last")
		}
	case MsgInSync, MsgHandOver:
		fmt.Fprintf(&b, " %v", m.Record)
	}
	return b.String()
}

// Request asks the arbiter something. From == 0 with a zero Record is a linearizable read; else
// it is a compare-and-swap from epoch Record.Epoch-1 to Record.
type Request struct {
	ID     uint64
	Swap   bool
	Record Record
}

// String returns the request in the form of the transcripts.
func (r Request) String() string {
	if !r.Swap {
		return fmt.Sprintf("read #%d", r.ID)
	}
	return fmt.Sprintf("swap #%d %d -> %v", r.ID, r.Record.Epoch-1, r.Record)
}

// Answer is what the arbiter says. There may be none: requests and answers get lost, come late
// and more than once, and a request whose answer is lost may take effect later.
type Answer struct {
	ID uint64
	// Swapped says that the swap took effect; then Record is what was asked for. Otherwise
	// Record is what the arbiter held at some moment between request and answer, the zero
	// Record if it holds none.
	Swapped bool
	Record  Record
}
