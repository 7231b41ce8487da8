package arbiter

import "fmt"

// Reasons of errors that a user can do something about. They are stable codes for programs.
const (
	BadSpec      = "bad-arbiter"          // the text names no arbiter
	NoStorage    = "arbiter-storage"      // the directory of a file arbiter is not there
	BadKeys      = "arbiter-keys"         // the keys for an arbiter are missing, unreadable or of another pair
	KeysReadable = "keys-not-protected"   // others may read the private key
	NotGranted   = "arbiter-refused"      // the arbiter does not let these keys use this pair's record
	NoAnswer     = "arbiter-unreachable"  // no answer within the time allowed
	Malformed    = "arbiter-record"       // what it keeps is no record
	OtherCluster = "arbiter-other-record" // two arbiters answer, where there must be one
)

// Error is an error that a user can do something about.
type Error struct {
	// Reason is one of the codes above.
	Reason string
	// Remedy is one sentence that says what to do.
	Remedy string
	// Err says what was being done, to what, and what went wrong.
	Err error
}

// Errorf returns an [Error] whose text is formatted as by [fmt.Errorf].
func Errorf(reason, remedy, format string, args ...any) *Error {
	return &Error{Reason: reason, Remedy: remedy, Err: fmt.Errorf(format, args...)}
}

// Error returns the text without reason and remedy, which a caller shows in its own way.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the error below.
func (e *Error) Unwrap() error { return e.Err }
