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
	KindPair   = "Pair"
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
	// Role and Side are "" for a guest that runs alone.
	Role Role   `json:"role,omitempty"`
	Side string `json:"side,omitempty"` // of its pair: a or b
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

// Role is what one side of a pair is to the guest.
type Role string

// The roles.
const (
	Primary Role = "primary" // the guest that the world sees runs here
	Standby Role = "standby" // it runs on the other side, or nowhere
)

// Pair describes one side of a pair.
type Pair struct {
	Meta
	Name string `json:"name"`
	Side string `json:"side"` // a or b
	Role Role   `json:"role"`
	// Phase is what the side is doing: waiting, joining, backup, draining, bidding, alone, syncing, protected or
	// switching (docs/lockstep.md).
	Phase string `json:"phase"`
	// Protected says that the other side can take over with all that was ever promised, as far as this side knows.
	Protected   bool       `json:"protected"`
	Term        uint64     `json:"term"` // counts the copies of the state
	Record      PairRecord `json:"record"`
	Linked      bool       `json:"linked"`
	HeldOutputs int        `json:"held_outputs"` // that wait for the other side
	Cuts        uint64     `json:"cuts"`         // copies of the state that this side took
	Paths       []PairPath `json:"paths"`
}

// PairRecord is what the arbiter keeps, as this side last read it.
type PairRecord struct {
	Epoch   uint64   `json:"epoch"`   // 0: there is none
	InSync  []string `json:"in_sync"` // the sides that hold all that was ever promised
	Primary string   `json:"primary"` // who may start alone when both were down; "" if there is no record
}

// PairPath is one path of the link between the sides.
type PairPath struct {
	Path  int   `json:"path"`
	Quiet bool  `json:"quiet"` // nothing was heard over it for a while
	RTT   int64 `json:"rtt_us"`
	Log   bool  `json:"log"`  // the log goes over it
	Bulk  bool  `json:"bulk"` // copies of memory and disk go over it
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
	// Pair returns what this side of a pair is doing; an error with [CodeNotPaired] says that the guest runs alone.
	Pair(ctx context.Context) (Pair, error)
	// Failover begins to hand the guest over to the other side of its pair, and returns when that has begun.
	Failover(ctx context.Context) error
	// Force makes a side live although the arbiter's record does not allow it.
	Force(ctx context.Context) error
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
	CodeNotPaired    = "not-paired"     // the guest runs alone
	CodeNotProtected = "not-protected"  // the pair is not complete
	CodeNotNow       = "not-now"        // the side's phase does not allow it
	CodeStandby      = "standby"        // the guest runs on the other side
)

// ErrEnded is what a Machine's methods return after the guest has ended.
func ErrEnded() *Error {
	return &Error{Code: CodeEnded, Status: http.StatusConflict, Message: "the guest has ended", Remedy: "start it again with ftvmm run"}
}
