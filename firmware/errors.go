package firmware

import "strings"

// Error is a failure that a user can do something about.
type Error struct {
	Code    string // a stable word for programs, such as "firmware-missing"
	Problem string // what is wrong
	Remedy  string // what to do about it
	Err     error  // the cause, or nil
}

// Error returns the problem, its cause and the remedy in one line.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Problem)
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	if e.Remedy != "" {
		b.WriteString(" (" + e.Remedy + ")")
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }
