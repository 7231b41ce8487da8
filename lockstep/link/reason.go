package link

import (
	"errors"
	"fmt"
)

// Reason says why a connection was refused or a session ended. The values are stable: programs may
// compare them.
type Reason string

// Reasons to refuse a connection.
const (
	NotTLS            Reason = "tls-failed"                // no TLS 1.3 handshake with a certificate took place
	BadCertificate    Reason = "bad-certificate"           // the certificate names no pair and side
	Untrusted         Reason = "untrusted-certificate"     // not signed by this pair's authority
	WrongPair         Reason = "wrong-pair"                // of another pair
	SameSide          Reason = "same-side"                 // both ends hold the keys of one side
	Expired           Reason = "certificate-expired"       // by this host's clock
	NotYetValid       Reason = "certificate-not-yet-valid" // by this host's clock
	BadHello          Reason = "bad-hello"                 // the first message is not a hello
	WrongVersion      Reason = "wrong-version"             // no common version of the protocol
	UnknownSession    Reason = "unknown-session"           // a path for a session that is over or was never there
	Busy              Reason = "busy"                      // too many connections at once
	HandshakeTimedOut Reason = "handshake-timeout"         // the peer did not finish its hello in time
	Unreachable       Reason = "unreachable"               // nobody answers at the address
	RefusedByPeer     Reason = "refused-by-peer"           // the peer closed the connection; its log says why
)

// Reasons for the end of a session or a path.
const (
	Closed      Reason = "closed"       // by this side
	PeerClosed  Reason = "peer-closed"  // by the peer, on purpose
	Lost        Reason = "lost"         // the last connection broke
	Silent      Reason = "silent"       // a path was given up because nothing came over it
	Garbage     Reason = "garbage"      // a frame that has no meaning
	Truncated   Reason = "truncated"    // the connection ended inside a frame
	Oversized   Reason = "oversized"    // a length above its limit
	OutOfOrder  Reason = "out-of-order" // a segment or an acknowledgement that does not follow the last
	Unencrypted Reason = "tls-broken"   // a TLS record that does not decrypt
)

// Error is a refusal or the end of a session.
type Error struct {
	Reason Reason
	// ByPeer says that the peer refused, and that Reason is what it said.
	ByPeer bool
	Err    error
}

func refuse(r Reason, format string, args ...any) *Error {
	return &Error{Reason: r, Err: fmt.Errorf(format, args...)}
}

// Error returns the text with the reason.
func (e *Error) Error() string {
	who := ""
	if e.ByPeer {
		who = "the peer refused: "
	}
	return fmt.Sprintf("%s%v (%s)", who, e.Err, e.Reason)
}

// Unwrap returns what went wrong.
func (e *Error) Unwrap() error { return e.Err }

// ReasonOf returns the reason in an error of this package, "" if it has none.
func ReasonOf(err error) Reason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}

// ErrFull is returned by [Session.TrySend] when the ring has no room for the message.
var ErrFull = errors.New("link: the peer does not keep up")
