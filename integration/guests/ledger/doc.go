// Package ledger is the host's side of the test guest ledgerd, a transaction server
// whose every answer is durable before it is sent: a client that repeats a request
// until it is answered, and a reader that checks what the guest's disk holds.
//
// Together they turn "no acknowledged data is lost, nothing is applied twice" into an
// assertion. A test keeps the answers that a [Client] got while it broke the machine
// below the guest, stops the guest, reads the journal of any replica with
// [ReadJournal] and asks [Journal.Covers] whether every answer is in it. While the
// guest runs, [Client.Hash] gives its hash of the state, which is equal to that of a
// [State] to which the same records were applied.
//
// The protocol is described in ledgerd/main.c, the disk's layout and the rules of
// replay in ledgerd/journal.h.
package ledger
