// Package link is the connection between the two hosts of a pair: messages, in order, each once, between
// two processes that have proved to each other who they are.
//
// # Who may speak
//
// Everything travels in TLS 1.3 with certificates on both ends. [CreatePair] makes a certificate authority for
// one pair, signs one certificate for side a and one for side b, and forgets the authority's key: nobody
// can join later. A certificate carries the pair's name and the side. What does not fit is refused
// with a [Reason], before a byte of it reaches anything but this package's decoders.
//
// # Sessions
//
// A [Session] is one life of the link. It begins with [Dial] on one side and [Listener.Accept] on the other, and
// it ends once: by [Session.Close], by the peer's, by the loss of the last path, or because the peer sent what no
// correct peer sends. An ended session delivers nothing more, ever; to speak again is to begin a new one. That is
// what the protocol above needs: a backup closes the link for good before it bids for the guest.
//
// # Classes and paths
//
// There are two classes of messages. [Log] is small and must be quick; [Bulk] (pages, disk blocks) is large and may
// take its time. Each has connections of its own, and heartbeats and acknowledgements have a third, so
// that nothing waits behind bulk and a slow reader is not taken for a dead host.
//
//	path 0   control ── heartbeats, acknowledgements, goodbye
//	         log     ── segments of the log
//	         bulk    ── segments of bulk data
//	path 1   the same again, where there is a second network
//
// A message is cut into segments of at most one TLS record. Each carries its offset in the class's stream, as in
// TCP, and stays in the sender's ring until the peer's application has taken it. A class uses one path at a
// time: the log the one with the shorter round trip, bulk the other. When a path fails or falls silent the class
// moves: the sender begins again, on the other path, at the first byte that was not acknowledged, and
// the receiver drops what it has already had. Nothing is lost, repeated or reordered. When the last path is lost
// the session is over.
//
// The rings bound what is in flight. [Session.Send] waits for room, [Session.TrySend] does not; a thread that must
// never wait uses the latter.
//
// # What it does not do
//
// It decides nothing. Silence of the peer is an [Event], for the protocol to judge; the payloads are opaque.
package link
