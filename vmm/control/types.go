package control

import (
	"context"
	"net/http"

	"github.com/ftvmm/ftvmm/vmm/console"
)

// APIVersion is the version of all documents.
const APIVersion = "ftvmm/v1"

// Meta begins every document.
type Meta struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

// NewMeta returns the beginning of a document of a kind.
func NewMeta(kind string) Meta { return Meta{APIVersion, kind} }

// The kinds of documents.
const (
	KindStatus = "Status"
	KindStats  = "Stats"
	KindDone   = "Done"
	KindError  = "Error"
)

// State is what a guest is doing.
type State string

// The states.
const (
	Created State = "created" // not started yet
	Running State = "running"
	Halted  State = "halted" // running, but waiting for an interrupt
	Paused  State = "paused"
	Ended   State = "ended"
)

// Status describes a guest.
type Status struct {
	Meta
	Name  string `json:"name"`
	State State  `json:"state"`
	// Position names the stop of the guest at which the status was taken (docs/determinism.md).
	Position      string   `json:"position"`
	VirtualTimeMS int64    `json:"virtual_time_ms"` // the guest's time since power-on
	UptimeMS      int64    `json:"uptime_ms"`       // the VMM's, on the host's clock
	MemoryBytes   uint64   `json:"memory_bytes"`
	CPUs          int      `json:"cpus"`
	PID           int      `json:"pid"`
	Version       string   `json:"version"` // of ftvmm
	Consoles      []string `json:"consoles"`
}

// Stats are a guest's counters.
type Stats struct {
	Meta
	Counters map[string]uint64        `json:"counters"`
	Consoles map[string]console.Stats `json:"consoles"`
}

// Done is the answer to a verb that succeeded.
type Done struct {
	Meta
	Verb string `json:"verb"`
}

// SaveRequest is the body of /v1/save.
type SaveRequest struct {
	// Path is an absolute path on the guest's host. The file appears when it is complete.
	Path string `json:"path"`
}

// Machine is the guest as the server needs it. Methods may be called from any goroutine.
// Their errors are shown to the client; an [Error] determines code and remedy.
type Machine interface {
	Status(ctx context.Context) (Status, error)
	Stats(ctx context.Context) (Stats, error)
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	Reset(ctx context.Context) error
	Save(ctx context.Context, path string) error
	PowerButton() error
	// Quit ends the guest at once; it does not wait for the end.
	Quit()
	// Console returns a console by name, nil if there is none of that name.
	Console(name string) *console.Console
}

// Error is a refusal.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
	// Status is the HTTP status; it tells the class of the refusal.
	Status int `json:"-"`
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// The codes of refusals.
const (
	CodeNotRunning   = "not-running"    // nobody listens on the socket
	CodeNotPermitted = "not-permitted"  // the socket belongs to another user
	CodeUnreachable  = "unreachable"    // the connection failed otherwise
	CodeBadRequest   = "bad-request"    // the request cannot be understood
	CodeNotFound     = "not-found"      // no such path or console
	CodeBadMethod    = "bad-method"     // GET for POST or the other way round
	CodeTooLarge     = "too-large"      // the request's body
	CodeConflict     = "conflict"       // the guest's state does not allow it
	CodeEnded        = "guest-ended"    // the guest runs no more
	CodeBusy         = "console-busy"   // another session types on the console
	CodeSessions     = "console-full"   // too many sessions
	CodeUpgrade      = "upgrade-needed" // a console was asked for by a plain GET
	CodeFailed       = "failed"         // the verb was tried and failed
)

// ErrEnded is what a Machine's methods return after the guest has ended.
func ErrEnded() *Error {
	return &Error{Code: CodeEnded, Status: http.StatusConflict, Message: "the guest has ended", Remedy: "start it again with ftvmm run"}
}
