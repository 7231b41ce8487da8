package protocol

// Arbitration: who may go on. A bid is a compare-and-swap of the arbiter's record from the
// newest epoch known, N, to N+1. Its answer may be lost and it may take effect later; so from
// the first request on, nobody resumes but by an answer that shows what epoch N+1 became.

// A request is made again if its answer is overdue. The answer to any of them counts, for an arbiter that is slow and
// not away may never be in time: they are about one question, which asked begins and the first answer ends.
func (n *Node) ask(r Request) {
	n.requests++
	r.ID = n.requests
	if n.asked == 0 {
		n.asked = r.ID
	}
	n.askedAt = n.now
	n.do(Ask{r})
}

func (n *Node) askRead() { n.ask(Request{}) }

// askSwap asks for the swap to n.bid, again if need be: as the nonce is the same it is the same
// bid, whichever of the requests takes effect.
func (n *Node) askSwap() { n.ask(Request{Swap: true, Record: n.bid}) }

// propose makes a new bid from the record that this node knows.
func (n *Node) propose(in Sides, primary Side) {
	n.bids++
	n.bid = Record{Epoch: n.record.Epoch + 1, InSync: in, Primary: primary, Nonce: n.cfg.Incarnation + n.bids}
	n.asked = 0 // a new question
	n.askSwap()
}

// startBid begins to bid for going on alone.
func (n *Node) startBid() {
	n.become(Bidding)
	n.bid, n.asked = Record{}, 0
	if n.mayBid(n.record) {
		n.propose(Only(n.cfg.Self), n.cfg.Self)
		return
	}
	n.askRead()
}

// mayBid reports whether a record allows this side to bid for going on alone.
func (n *Node) mayBid(r Record) bool {
	switch {
	case n.forced:
		return r.Epoch > 0
	case n.hasState:
		return (r.InSync.Has(n.cfg.Self) || n.broken(BidUnlisted)) && !n.barred
	case n.stale:
		return false
	case r.Epoch == 0:
		return n.cfg.Create && n.record.Epoch == 0
	}
	return r.Primary == n.cfg.Self || n.broken(ColdAnyone)
}

// Answer takes an answer of the arbiter.
func (n *Node) Answer(a Answer) {
	if n.asked == 0 || a.ID < n.asked || a.ID > n.requests {
		return // to another question, or twice
	}
	n.asked, n.unanswered = 0, false
	r := a.Record
	won := n.bid.Epoch != 0 && r.Epoch == n.bid.Epoch && r.Nonce == n.bid.Nonce
	if !won && (r.Epoch < n.record.Epoch || r.Epoch == 0 && n.bid.Epoch > 1) {
		// The arbiter has lost what it knew. To go on from there could make two live sides.
		if !n.refused {
			n.refused = true
			n.event(EventRefused, "the arbiter holds %v, older than %v", r, n.record)
		}
		n.retryAt = n.now + uint64(n.cfg.PollTicks)
		return
	}
	n.refused = false
	pending := n.bid.Epoch != 0 && r.Epoch == n.bid.Epoch-1 // our bid has not taken effect yet
	n.record = r
	switch n.phase {
	case Waiting:
		n.polled()
	case Bidding:
		switch {
		case won:
			n.won()
		case pending:
			n.askSwap()
		case n.mayBid(r):
			n.propose(Only(n.cfg.Self), n.cfg.Self)
		default:
			n.halt()
		}
	case Syncing, Switching:
		switch {
		case n.bid.Epoch == 0: // the answer to an old question
		case won && n.phase == Syncing:
			n.protected()
		case won:
			n.handOver()
		case pending:
			n.askSwap()
		default: // somebody was forced to be live
			n.do(Freeze{})
			n.stopLogging()
			n.hangUp()
			n.halt()
		}
	}
}

// won makes this side the live one.
func (n *Node) won() {
	n.bid = Record{}
	n.forced, n.barred, n.diverged = false, false, false
	cold := !n.hasState
	n.marks, n.early = nil, nil
	switch {
	case cold:
		n.event(EventCold, "epoch %d", n.record.Epoch)
		n.do(Boot{n.record.Epoch})
		n.nextSeq, n.outputs, n.bytes = 0, nil, 0
	case n.live:
		n.do(Thaw{})
	default:
		n.do(GoLive{})
	}
	n.hasState, n.live = true, true
	n.become(Alone)
	n.releaseAll()
	n.greet()
}

// greet takes a peer that is already waiting.
func (n *Node) greet() {
	if n.conn != 0 && n.peer == Waiting {
		n.stepHello(Message{Phase: Waiting})
	}
}

// halt makes this side wait to be taken as a backup. Its frozen state stays until then.
func (n *Node) halt() {
	n.event(EventRefused, "record %v", n.record)
	n.bid = Record{}
	n.forced = false
	n.become(Waiting)
	n.retryAt = n.now + uint64(n.cfg.PollTicks)
}

// polled looks at a record that was read while waiting.
func (n *Node) polled() {
	n.retryAt = n.now + uint64(n.cfg.PollTicks)
	if !n.mayBid(n.record) {
		return
	}
	if n.hasState {
		// Listed after all: the primary's swap took effect after the link was lost.
		n.startBid()
		return
	}
	// A guest that is alive over there is better than one from this disk; so give the peer
	// time to be there, and leave it alone while it is deciding.
	alone := n.conn == 0 && n.now-n.idle >= uint64(n.cfg.ColdTicks)
	if alone || n.conn != 0 && n.peer == Waiting {
		if n.record.Epoch == 0 {
			n.become(Bidding)
			n.propose(Only(n.cfg.Self), n.cfg.Self)
			return
		}
		n.startBid()
	}
}

func (n *Node) tickArbiter() {
	overdue := n.asked != 0 && n.now-n.askedAt >= uint64(n.cfg.ArbiterTicks)
	if overdue {
		if !n.unanswered { // once is enough
			n.unanswered = true
			n.event(EventNoArbiter, "no answer for %d ticks", n.now-n.askedAt)
		}
		switch {
		case n.broken(ResumeUnread) && n.phase == Bidding && n.bid.Epoch != 0:
			n.record = n.bid
			n.won()
			return
		case n.broken(AssumeSwapped) && n.phase == Syncing && n.bid.Epoch != 0:
			n.record = n.bid
			n.protected()
			return
		}
		n.retryAt = n.now
	}
	switch {
	case n.phase != Waiting && n.phase != Bidding && n.bid.Epoch == 0:
		n.asked = 0 // nothing depends on the answer any more
	case overdue, n.asked == 0 && n.now >= n.retryAt:
		n.askRead()
	}
}
