package protocol

// The primary's half: the log, the output gate, the lead, cuts, taking a backup, handing over.

// Log logs the inputs that the guest gets at a point. Completes says that a disk request
// completes there. The order at a stop is Log, Output for what the guest sent, Mark.
func (n *Node) Log(p Point, data []byte, completes bool) {
	if !n.logging || n.cfg.Commit == Checkpointed {
		return
	}
	if completes && !n.broken(CoalesceMarks) {
		// The backup writes once an equal watermark covers the kick, and takes the completion
		// once its own write is done. So between a kick and its completion there must be a
		// watermark, or it would wait for itself.
		n.pin()
	}
	n.pend(Item{Point: p, Data: data})
}

// Mark says that the log is complete up to and including a point, at which the digest was d.
// Tainted says that the guest may have read a clock that could not be trapped since the last Mark.
func (n *Node) Mark(p Point, d Digest, tainted bool) {
	if !n.logging {
		return
	}
	if n.cfg.Commit == Checkpointed {
		n.tainted = true // the backup is not in this state until the next cut
		n.pace()
		return
	}
	if tainted {
		n.tainted = true
	}
	if n.mark != nil {
		tainted = tainted || n.mark.Tainted
	} else if len(n.pending) == 0 {
		n.pendedAt = n.now
	}
	n.mark = &Item{Point: p, Mark: true, Digest: d, Tainted: tainted}
	idle := !n.executed.Before(n.lastMark)
	if len(n.outputs) > 0 || idle || n.size >= n.cfg.BatchSize {
		n.flush()
	}
	n.taint()
	n.pace()
}

// Output takes an output of the guest at a point. On the primary it goes to the gate, on a backup
// it is kept until the primary confirms that its own copy has left.
func (n *Node) Output(p Point, data []byte) {
	o := Output{Seq: n.nextSeq, Point: p, Data: data}
	n.nextSeq++
	switch {
	case n.Open():
		n.do(Release{[]Output{o}})
		return
	case n.broken(ReleaseUnacked) && n.phase == Protected, n.broken(ReleaseUnlisted) && n.phase == Syncing:
		n.do(Release{[]Output{o}})
		n.send(Message{Type: MsgReleased, Seq: o.Seq})
		return
	case !n.Live() && !n.live && o.Seq < n.confirm:
		return // the primary's has left
	}
	n.outputs = append(n.outputs, o)
	n.bytes += len(data)
}

// NeedCut asks for a cut: an input has waited too long for a stop that can be named, a scrub has
// found a difference, a checkpoint is due.
func (n *Node) NeedCut(why string) {
	if n.phase == Protected {
		n.beginCut(why)
	}
}

// SwitchOver hands the guest over to the backup. It reports whether that began; the phase tells
// how it ends.
func (n *Node) SwitchOver() bool {
	if n.phase != Protected || n.cut != noCut {
		return false
	}
	n.event(EventSwitchOver, "to %v", n.cfg.Self.Other())
	n.still = false
	n.become(Switching)
	n.do(Freeze{})
	return true
}

// Frozen tells that the guest stands after a Freeze: there will be no Log, Output or Mark
// until it is thawed. Named says that it stands where the last Mark was, so that the backup can come there
// too; else a cut brings it there.
func (n *Node) Frozen(named bool) {
	if n.phase != Switching {
		return
	}
	n.tainted = n.tainted || !named
	n.still = true
	n.flush()
	n.switchOver()
}

func (n *Node) pend(i Item) {
	if len(n.pending) == 0 && n.mark == nil {
		n.pendedAt = n.now
	}
	n.pending = append(n.pending, i)
	n.size += len(i.Data) + itemSize
}

// itemSize is what an item costs besides its data, for the bounds.
const itemSize = 32

// pin puts the newest watermark into the log for good; until then a newer one replaces it. Entries of a later
// point, whose own watermark is still to come, may be in the log already: it belongs before them.
func (n *Node) pin() {
	if n.mark == nil {
		return
	}
	m := *n.mark
	n.mark = nil
	n.pend(m)
	for i := len(n.pending) - 1; i > 0 && m.Point.Before(n.pending[i-1].Point); i-- {
		n.pending[i-1], n.pending[i] = n.pending[i], n.pending[i-1]
	}
	n.lastMark = m.Point
}

// flush sends the log that is pending.
func (n *Node) flush() {
	n.pin()
	if len(n.pending) == 0 {
		return
	}
	n.send(Message{Type: MsgLog, Term: n.term, Items: n.pending})
	n.lead = append(n.lead, span{n.lastMark, n.size, n.pendedAt})
	n.leadSize += n.size
	n.pending, n.size = nil, 0
}

// pace lets the vCPU wait while the backup is too far behind or the gate is full.
func (n *Node) pace() {
	limit := n.cfg.LeadTicks
	if len(n.outputs) > 0 {
		limit = n.cfg.TightTicks
	}
	late := n.runnable() && n.now-n.lead[0].tick > uint64(limit)
	much := n.leadSize+n.size > n.cfg.LeadBytes
	wait := n.logging && (late || much || n.bytes > n.cfg.GateBytes)
	if wait && much && n.phase == Protected && n.mark == nil && !n.executed.Before(n.lastMark) {
		n.beginCut("much log in one segment")
	}
	if wait == n.waiting {
		return
	}
	n.waiting = wait
	n.do(Pace{wait})
}

// runnable reports whether the oldest log that is not known to be executed can be: there is a watermark behind it. What
// the guest gets between two exits has none before the next exit, and a guest that waits does not come there.
func (n *Node) runnable() bool {
	return len(n.lead) > 0 && n.executed.Before(n.lead[0].upTo)
}

// watch tells apart a backup that is slow from one that is dead: this one's heartbeats come.
func (n *Node) watch() {
	slow := n.logging && n.cut == noCut && n.runnable() && n.now-n.lead[0].tick >= uint64(n.cfg.SuspectTicks) && !n.suspect
	if slow && !n.slow {
		n.event(EventSlow, "backup is alive at %v, primary at %v", n.executed, n.lastMark)
	}
	n.slow = slow
}

func (n *Node) stopLogging() {
	n.logging, n.cut, n.base, n.tainted = false, noCut, false, false
	n.pending, n.size, n.mark, n.lead, n.leadSize = nil, 0, nil, nil, 0
	n.pace()
}

// startTerm resets what counts within a term.
func (n *Node) startTerm(term uint64) {
	n.term = term
	n.received, n.executed, n.clean, n.lastMark = Point{}, Point{}, Point{}, Point{}
	n.tainted, n.dirtyRun, n.diverged = false, false, false
	n.pending, n.size, n.mark, n.lead, n.leadSize = nil, 0, nil, nil, 0
	n.marks, n.logged = nil, Point{}
}

func (n *Node) stepPrimary(m Message) {
	if n.phase != Syncing && n.phase != Protected && n.phase != Switching {
		return
	}
	switch m.Type {
	case MsgReady:
		if n.phase == Syncing && n.cut == noCut && !n.logging {
			n.do(Precopy{})
		}
	case MsgAck:
		if n.logging && m.Term == n.term {
			n.acked(m)
		}
	case MsgDiverged:
		if n.logging && m.Term == n.term {
			n.event(EventDivergence, "backup differs at %v of term %d: %v", m.Point, m.Term, m.Digest)
			n.beginCut(cutDivergence)
		}
	case MsgCutDirty:
		if n.cut == cutAsked && m.Term == n.term+1 {
			n.cut = cutTaking
			since := n.executed
			if !n.logging {
				since = Point{} // of an older term: who joins has executed nothing of this one
			}
			n.do(TakeCut{Term: m.Term, Dirty: m.Data, Since: since, Full: n.full})
		}
	case MsgCutWant:
		if n.cut == cutTaken && m.Term == n.term {
			n.do(CollectPages{m.Data})
		}
	case MsgCutAck:
		if n.cut == cutTaken && m.Term == n.term {
			n.cut = noCut
			n.base = true
			switch n.phase {
			case Syncing:
				// All that the peer must hold it holds: make it official. (If this is not the
				// first cut since it joined, the bid has been made.)
				if n.bid.Epoch == 0 {
					n.propose(Both, n.cfg.Self)
				}
			default:
				n.commit()
			}
			n.switchOver()
		}
	}
}

// acked takes the backup's word for how far it is.
func (n *Node) acked(m Message) {
	n.received, n.executed, n.clean = m.Received, m.Executed, m.Clean
	n.tainted = n.tainted || m.Tainted
	n.shorten()
	if n.phase != Syncing {
		n.commit()
	}
	n.taint()
	n.switchOver()
	n.pace()
	if n.logging && n.mark != nil && !n.executed.Before(n.lastMark) {
		n.flush() // the backup is idle
	}
}

// shorten forgets log that has been executed.
func (n *Node) shorten() {
	for len(n.lead) > 0 && !n.executed.Before(n.lead[0].upTo) {
		n.leadSize -= n.lead[0].bytes
		n.lead = n.lead[1:]
	}
}

// committed reports whether the backup could reproduce an output.
func (n *Node) committed(o Output) bool {
	switch {
	case !n.base:
		return false
	case o.Point == Point{}: // came with the cut
		return true
	case n.cfg.Commit == Checkpointed:
		return false
	case n.cfg.Commit == Received:
		return !n.received.Before(o.Point)
	}
	return !n.clean.Before(o.Point)
}

// commit releases what is committed.
func (n *Node) commit() {
	k := 0
	for k < len(n.outputs) && n.committed(n.outputs[k]) {
		n.bytes -= len(n.outputs[k].Data)
		k++
	}
	if k == 0 {
		return
	}
	// First the output leaves, then it is confirmed: the other way round it would be lost if
	// this side died in between.
	out := n.outputs[:k:k]
	confirm := Message{Type: MsgReleased, Seq: out[k-1].Seq}
	n.outputs = n.outputs[k:]
	if n.broken(ConfirmFirst) {
		n.send(confirm)
		n.do(Release{out})
		return
	}
	n.do(Release{out})
	n.send(confirm)
}

// releaseAll releases everything: this side has become the only one.
func (n *Node) releaseAll() {
	if len(n.outputs) > 0 {
		n.do(Release{n.outputs})
	}
	n.outputs, n.bytes = nil, 0
}

// taint makes a cut if an output waits that no ack will ever commit.
func (n *Node) taint() {
	if n.cfg.Commit == Executed && n.tainted && len(n.outputs) > 0 && (n.phase == Protected || n.phase == Switching && n.still) {
		if n.cut == noCut {
			n.event(EventTaint, "an output waits in a tainted slice")
		}
		n.beginCut("taint")
	}
}

// Reasons for cuts that compare everything.
const (
	cutDivergence = "divergence"
	cutJoin       = "join"
)

func (n *Node) beginCut(why string) {
	if n.cut != noCut {
		return
	}
	n.event(EventCut, "term %d: %s", n.term+1, why)
	n.cut = cutAsked
	// What a fault has changed no dirty log knows of.
	n.full = why == cutDivergence || why == cutJoin
	n.flush()
	n.send(Message{Type: MsgCutAsk, Term: n.term + 1})
}

// Chunk sends a piece of the pre-copy.
func (n *Node) Chunk(data []byte) {
	if n.phase == Syncing && n.cut == noCut && !n.logging {
		n.send(Message{Type: MsgChunk, Data: data})
	}
}

// PrecopyDone says that what is left to copy fits a cut.
func (n *Node) PrecopyDone() {
	if n.phase == Syncing && !n.logging {
		n.beginCut(cutJoin)
	}
}

// CutTaken gives the state that TakeCut asked for, with the hashes of pages. The guest may run
// on, counting exits of the new term from 1: point 0 is the cut.
func (n *Node) CutTaken(state []byte) {
	if n.cut != cutTaking {
		return
	}
	n.cut = cutTaken
	n.startTerm(n.term + 1)
	n.base, n.logging = false, true
	// From here on outputs wait, also those of a guest that was alone a moment ago.
	for i := range n.outputs {
		n.outputs[i].Point = Point{}
	}
	held := append([]Output(nil), n.outputs...)
	n.send(Message{Type: MsgCutState, Term: n.term, Data: state, Outputs: held, Seq: n.nextSeq})
	n.pace()
}

// CutPages sends pages that the backup wants; last says that there are no more.
func (n *Node) CutPages(data []byte, last bool) {
	if n.cut == cutTaken {
		n.send(Message{Type: MsgCutPages, Term: n.term, Data: data, Last: last})
	}
}

// protected is reached when the record lists both.
func (n *Node) protected() {
	n.bid = Record{}
	n.become(Protected)
	n.send(Message{Type: MsgInSync, Record: n.record})
	n.commit()
	n.taint()
}

// switchOver takes the next step of handing over, if its time has come: the guest stands, the
// backup stands at the same point, and all outputs have left.
func (n *Node) switchOver() {
	if n.phase != Switching || !n.still || n.bid.Epoch != 0 || n.cut != noCut || !n.base {
		return
	}
	if n.tainted {
		n.beginCut("switch-over of a tainted guest")
		return
	}
	if len(n.outputs) == 0 && len(n.pending) == 0 && n.mark == nil && !n.executed.Before(n.lastMark) {
		n.propose(Both, n.cfg.Self.Other())
	}
}

// handOver makes this side the backup: the record says that the peer is primary.
func (n *Node) handOver() {
	n.bid = Record{}
	n.stopLogging()
	n.send(Message{Type: MsgHandOver, Record: n.record})
	n.do(Follow{})
	n.startTerm(n.term + 1)
	n.confirm = n.nextSeq
	n.live = false
	n.become(Backup)
}
