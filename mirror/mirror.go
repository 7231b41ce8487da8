// Package mirror holds what the storage and network backends share: the way they report
// an error to a person. The backends themselves are the packages below this one:
//
//   - mirror/disk keeps a guest's disk in a raw file or a block device;
//   - mirror/nic reads the description of a network card and opens what it names:
//     mirror/nic/tap, a tap interface of the host, or mirror/nic/user, a network of the
//     process's own that needs no privilege.
//
// They are the shell between a deterministic machine and the host: they have goroutines,
// make system calls and see the wall clock, and everything that they bring back reaches
// the guest as an input at a position that the vCPU loop chooses (vmm/backend).
package mirror

import (
	"errors"
	"fmt"
)

// Error is an error that a user can do something about.
type Error struct {
	// Reason is a stable code for programs: lower case, words joined by hyphens
	// ("image-in-use").
	Reason string
	// Remedy is one sentence that says what to do; it ends with a full stop.
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

// ReasonOf returns the reason code of err or of an error that it wraps, "" if there is none.
func ReasonOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}
