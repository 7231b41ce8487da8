package protocol

// The backup's half: being copied to, replay, the check of digests, staging cuts.

func (n *Node) stepBackup(m Message) {
	if m.Type == MsgJoin {
		if n.phase == Waiting {
			n.hasState, n.live, n.barred, n.stale = false, false, false, true
			n.diverged, n.asked = false, 0
			n.outputs, n.bytes, n.marks, n.early = nil, 0, nil, nil
			n.cut, n.cutTerm = noCut, 0
			n.become(Joining)
			n.do(Prepare{})
		}
		return
	}
	if n.phase != Joining && n.phase != Backup {
		if n.broken(BidBeforeClose) && m.Type == MsgLog {
			n.received = m.Items[len(m.Items)-1].Point
			n.ackDue = true
		}
		return
	}
	switch m.Type {
	case MsgChunk:
		if n.phase == Joining && !n.hasState {
			n.do(StageChunk{m.Data})
		}
	case MsgLog:
		switch {
		case n.cutTerm != 0 && m.Term == n.cutTerm:
			// It belongs to a state that is not here yet: no ack before that is applied.
			n.early = append(n.early, m.Items...)
			n.behind(m.Items)
		case n.hasState && m.Term == n.term:
			n.accept(m.Items)
		}
	case MsgReleased:
		n.released(m.Seq)
	case MsgCutAsk:
		if n.cut == noCut {
			n.cut, n.cutTerm = cutAsked, m.Term
			n.do(StopForCut{})
		}
	case MsgCutState:
		if n.cut == cutReceiving && m.Term == n.cutTerm {
			n.cutMsg = m
			n.do(Stage{m.Data})
			if n.broken(AckUnapplied) {
				n.send(Message{Type: MsgCutAck, Term: n.cutTerm})
			}
		}
	case MsgCutPages:
		if n.cut == cutReceiving && m.Term == n.cutTerm {
			n.do(StagePages{m.Data})
			if m.Last {
				n.cut = cutApplying
				n.do(Apply{m.Term})
			}
		}
	case MsgInSync:
		if n.phase == Joining && n.hasState && m.Record.InSync.Has(n.cfg.Self) && m.Record.Epoch > n.record.Epoch {
			n.record = m.Record
			n.become(Backup)
		}
	case MsgHandOver:
		if n.phase == Backup && m.Record.Primary == n.cfg.Self && m.Record.Epoch > n.record.Epoch {
			n.record = m.Record
			n.do(GoLive{})
			n.startTerm(n.term + 1)
			n.live, n.logging, n.base = true, true, true
			n.become(Protected)
			n.releaseAll()
		}
	}
}

// Prepared says that the shell has made this side ready to be overwritten.
func (n *Node) Prepared() {
	if n.phase == Joining && !n.hasState {
		n.send(Message{Type: MsgReady})
	}
}

// accept takes log of the current term.
func (n *Node) accept(items []Item) {
	if len(items) == 0 {
		return
	}
	for _, i := range items {
		if i.Point.Before(n.logged) {
			n.violation("log goes back from %v to %v", n.logged, i.Point)
			return
		}
		n.logged = i.Point
		if i.Mark {
			n.marks = append(n.marks, i)
			n.received = i.Point
		}
	}
	n.do(Feed{items, n.received})
	n.lead = append(n.lead, span{upTo: n.received, bytes: n.behind(items)})
	if n.cfg.Commit == Received {
		n.ackDue = true
	}
}

// maxBehind bounds, in units of Config.LeadBytes, the log that a backup holds. A primary that
// keeps its lead never comes near: at most one lead in each of two terms.
const maxBehind = 4

// behind counts log that is to be executed, and gives up on a primary that sends too much.
func (n *Node) behind(items []Item) int {
	bytes := 0
	for _, i := range items {
		bytes += itemSize + len(i.Data)
	}
	n.leadSize += bytes
	if n.leadSize > maxBehind*n.cfg.LeadBytes {
		n.violation("%d bytes of log are more than a primary may be ahead", n.leadSize)
	}
	return bytes
}

// violation gives up on a peer that breaks the protocol.
func (n *Node) violation(format string, args ...any) {
	n.event(EventProtocol, format, args...)
	n.hangUp()
	n.lost()
}

// released drops the outputs up to seq: the primary's have left.
func (n *Node) released(seq uint64) {
	n.confirm = max(n.confirm, seq+1)
	k := 0
	for k < len(n.outputs) && n.outputs[k].Seq < n.confirm {
		n.bytes -= len(n.outputs[k].Data)
		k++
	}
	n.outputs = n.outputs[k:]
}

// Executed says that replay has passed a point, at which the digest was d; tainted as in Mark. It
// reports whether replay may go on: not after a divergence.
func (n *Node) Executed(p Point, d Digest, tainted bool) bool {
	if n.diverged {
		return false
	}
	n.dirtyRun = n.dirtyRun || tainted
	if len(n.marks) == 0 || p.Before(n.marks[0].Point) {
		return true
	}
	m := n.marks[0]
	if p != m.Point || d != m.Digest {
		if !n.broken(IgnoreDivergence) {
			n.Diverged(m.Point, d)
			return false
		}
	}
	n.marks = n.marks[1:]
	n.executed = m.Point
	n.shorten()
	if m.Tainted || n.dirtyRun {
		n.tainted = true
	}
	if !n.tainted {
		n.clean = m.Point
	}
	n.dirtyRun = false
	n.ackDue = true
	n.do(Verified{m.Point})
	n.drained()
	return true
}

// Diverged says that replay cannot follow the log at a point. Executed finds out by itself when
// digests differ.
func (n *Node) Diverged(p Point, d Digest) {
	if n.diverged {
		return
	}
	n.diverged = true
	n.event(EventDivergence, "at %v of term %d: %v here", p, n.term, d)
	n.send(Message{Type: MsgDiverged, Term: n.term, Point: p, Digest: d})
	n.drained()
}

// drained bids once the log of a lost primary is applied as far as it can be.
func (n *Node) drained() {
	if n.phase != Draining || n.cut == cutApplying {
		return
	}
	switch {
	case n.diverged && n.cfg.Commit == Received:
		// Outputs beyond the divergence may have left, and this side cannot account for them.
		n.barred = true
		n.event(EventRefused, "diverged from a log that outputs may have been released on")
		n.become(Waiting)
		n.retryAt = n.now + uint64(n.cfg.PollTicks)
	case n.diverged, len(n.marks) == 0, n.broken(BidUndrained):
		n.startBid()
	}
}

// CutReady says that replay stands and the backup's own disk requests are done; dirty is what it
// dirtied since the last cut.
func (n *Node) CutReady(dirty []byte) {
	if n.cut != cutAsked || n.phase != Joining && n.phase != Backup {
		return
	}
	n.cut = cutReceiving
	if n.ackDue {
		n.ackDue = false
		n.send(Message{Type: MsgAck, Term: n.term, Received: n.received, Executed: n.executed, Clean: n.clean, Tainted: n.tainted})
	}
	n.send(Message{Type: MsgCutDirty, Term: n.cutTerm, Data: dirty})
}

// CutWant names the pages that differ from the primary's.
func (n *Node) CutWant(want []byte) {
	if n.cut == cutReceiving && (n.phase == Joining || n.phase == Backup) {
		n.send(Message{Type: MsgCutWant, Term: n.cutTerm, Data: want})
	}
}

// CutApplied says that what was staged is in place.
func (n *Node) CutApplied() {
	if n.cut != cutApplying {
		return
	}
	n.cut = noCut
	n.startTerm(n.cutTerm)
	n.cutTerm = 0
	n.hasState, n.stale, n.live = true, false, false
	n.nextSeq = n.cutMsg.Seq
	n.outputs, n.bytes = n.cutMsg.Outputs, 0
	for _, o := range n.outputs {
		n.bytes += len(o.Data)
	}
	n.confirm = n.nextSeq - uint64(len(n.outputs))
	n.cutMsg = Message{}
	n.send(Message{Type: MsgCutAck, Term: n.term})
	early := n.early
	n.early = nil
	n.accept(early)
	n.drained()
}
