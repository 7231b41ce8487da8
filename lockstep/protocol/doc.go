// Package protocol decides, for one side of a pair, when an output may leave, when a state is
// copied, who is live and who waits. It is a pure state machine in the manner of go.etcd.io/raft:
// no goroutine, clock, socket or chance is in it, so that package sim can drive two of them through
// every kind of trouble, and what it tests is what runs.
//
// A [Node] is one side for the life of its process. The shell around it tells it what happens:
//
//   - [Node.Tick] that time passes, [Node.LinkUp] and [Node.LinkDown] what becomes of connections,
//     [Node.Step] what the peer says, [Node.Answer] what the arbiter says;
//   - on the primary [Node.Log], [Node.Output] and [Node.Mark], at each stop of the guest in this
//     order; on the backup [Node.Output] and [Node.Executed], at each stop of replay;
//   - that something is done which the node had asked for: [Node.Prepared], [Node.CutTaken], …
//
// After each call, or a few of them, it carries out what [Node.Ready] lists, strictly in order,
// and calls [Node.Advance]:
//
//	for {
//		select {
//		case <-ticker:
//			n.Tick()
//		case m := <-link:
//			n.Step(m.conn, m.Message)
//		case a := <-arbiter:
//			n.Answer(a)
//		case stop := <-guest:
//			…
//		}
//		for _, a := range n.Ready() {
//			carryOut(a)
//		}
//		n.Advance()
//	}
//
// An action that takes long (copying pages, draining a disk) may be carried out beside the loop
// as long as the actions that concern the guest stay in order; the node waits for the call that
// says that it is done, and ignores one that comes when it no longer matters. A shell must not
// send, release or ask out of order: an output leaves before it is confirmed, a link is closed
// before the bid.
//
// Three ideas carry the rest. The gate: an output of a protected guest leaves when the backup could
// reproduce it. The cut: the backup's state is replaced whole or not at all, and its ack commits
// what was held. The record: only a swap at the arbiter makes a side live, and only a side that
// the record lists as in sync may try. docs/protocol.md tells the rules, each with the sequence of
// events that breaks a protocol without it.
//
// The package does not know what a log entry, a page or a frame is; it does not measure time
// (ticks may be late, early or wrong, and only speed suffers); and it trusts its peer to be the
// other half of the pair (the link is authenticated), but not to be right: what a peer says out of
// turn is ignored, and a log that goes back or grows without bound ends the connection.
package protocol
