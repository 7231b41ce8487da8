// Package event reports what happens to a guest, one JSON object a line, for programs:
// supervisors, tests, the pool.
//
// Every kind of event has a stable message ID ("FTV-0001"), a severity that is one of
// the five states that all of ftvmm uses, and a text for people; the [Catalog] lists
// them. A consumer keys on the kind or the ID and never on the text.
//
// Events are facts about the virtual machine monitor, on the host's clock. They are not inputs
// of the guest and nothing in the guest's course depends on them: a full disk or a slow
// reader of the event file loses events (counted, and reported by the next one that can be
// written), it never stops the guest.
package event

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Severity is one of the five states that ftvmm shows everywhere.
type Severity string

// The five states.
const (
	Good        Severity = "good"
	Warning     Severity = "warning"
	Error       Severity = "error"
	Information Severity = "information"
	Unknown     Severity = "unknown"
)

// Kind says what happened.
type Kind string

// The kinds of event in a guest's life.
const (
	Started        Kind = "started"         // the vCPU entered the guest for the first time
	Paused         Kind = "paused"          // the guest stands still, by request
	Resumed        Kind = "resumed"         // the guest goes on
	Reset          Kind = "reset"           // the machine was reset, by request or by the guest
	PowerButton    Kind = "power-button"    // the power button was pressed
	PoweredOff     Kind = "powered-off"     // the guest switched itself off
	DebugExit      Kind = "debug-exit"      // the guest wrote a code to the debug-exit device
	Crashed        Kind = "crashed"         // triple fault, or an exit that cannot be emulated
	Saved          Kind = "saved"           // the guest's state was written to a file
	Restored       Kind = "restored"        // the guest's state was read from a file
	SaveFailed     Kind = "save-failed"     // writing the state failed; the guest goes on
	ConsoleReady   Kind = "console-ready"   // a console can be reached; attrs name it and where
	ControlReady   Kind = "control-ready"   // the control socket listens
	LinkChanged    Kind = "link-changed"    // a network card's carrier came or went
	DiskError      Kind = "disk-error"      // a disk request failed on the host
	ConsoleDropped Kind = "console-dropped" // console output was lost to a slow reader
	EventsLost     Kind = "events-lost"     // this file missed events; attrs say how many
	Exited         Kind = "exited"          // the VMM ends; attrs carry reason and exit code
	UnknownMSR     Kind = "unknown-msr"     // the guest used a model-specific register that is not there; attrs say which
)

// The kinds of event in a pair's life (docs/lockstep.md).
const (
	PairPhase      Kind = "pair-phase"       // what this side is doing has changed; attrs say from what to what, and after how long
	PairSuspect    Kind = "pair-suspect"     // the other side is silent
	PairDead       Kind = "pair-dead"        // it has been silent for too long
	PairLinkLost   Kind = "pair-link-lost"   // the link is closed
	PairSlow       Kind = "pair-slow"        // the guest waits for the backup, which is alive
	PairDivergence Kind = "pair-divergence"  // the sides differ
	PairDifference Kind = "divergence-found" // where and in what, on the side that noticed
	PairTaint      Kind = "pair-taint"       // a cut because of a clock that could not be trapped
	PairCut        Kind = "pair-cut"         // a cut begins; attrs say why
	PairCutTaken   Kind = "cut"              // a cut was taken; attrs carry pages and pause
	PairNoArbiter  Kind = "pair-no-arbiter"  // the arbiter does not answer
	PairRefused    Kind = "pair-refused"     // the arbiter's record rules this side out
	PairForced     Kind = "pair-forced"      // a person overruled the record
	PairProtocol   Kind = "pair-protocol"    // the other side broke the protocol
	PairCold       Kind = "pair-cold-start"  // the guest starts from its disk
	PairSwitchOver Kind = "pair-switch-over" // a planned change of sides
	PairMismatch   Kind = "pair-mismatch"    // the sides are for different guests; attrs say in what
	PairFailed     Kind = "side-failed"      // this side cannot go on
	CopyProgress   Kind = "copy-progress"    // of the copy to a joining side
	Copied         Kind = "copied"           // that copy is complete but for the last cut
	LinkRefused    Kind = "link-refused"     // a connection was refused
	LinkPathUp     Kind = "link-path-up"     // a path to the other side is usable
	LinkPathLost   Kind = "link-path-lost"   // a path is no longer usable
	LinkMoved      Kind = "link-moved"       // traffic has moved to another path
	LinkSuspect    Kind = "link-suspect"     // nothing is heard over the link
	LinkDead       Kind = "link-dead"        // and for too long
	LinkAlive      Kind = "link-alive"       // heard from again
	LinkStarved    Kind = "link-starved"     // this process did not run
	LinkDown       Kind = "link-down"        // the session is over
)

// Message is the catalogue's entry of a kind.
type Message struct {
	Kind     Kind     `json:"event"`
	ID       string   `json:"id"`
	Severity Severity `json:"severity"`
	// Text is one sentence for people.
	Text string `json:"text"`
	// Remedy says what to do about it; empty where nothing needs to be done.
	Remedy string `json:"remedy,omitempty"`
}

// catalog is in order of ID. An ID is never reused or renumbered.
var catalog = [...]Message{
	{Started, "FTV-0001", Good, "The guest has started.", ""},
	{Paused, "FTV-0002", Information, "The guest is paused.", ""},
	{Resumed, "FTV-0003", Good, "The guest runs again.", ""},
	{Reset, "FTV-0004", Information, "The guest was reset.", ""},
	{PowerButton, "FTV-0005", Information, "The power button was pressed.", ""},
	{PoweredOff, "FTV-0006", Information, "The guest has powered off.", ""},
	{DebugExit, "FTV-0007", Information, "The guest ended itself through the debug-exit device.", ""},
	{Crashed, "FTV-0008", Error, "The guest has crashed.", "Look at the guest's console output; restart the guest."},
	{Saved, "FTV-0009", Information, "The guest's state was saved.", ""},
	{Restored, "FTV-0010", Information, "The guest's state was restored.", ""},
	{SaveFailed, "FTV-0011", Warning, "Saving the guest's state failed; the guest goes on.", "Check the free space and permissions of the target directory and save again."},
	{ConsoleReady, "FTV-0012", Information, "A console can be reached.", ""},
	{ControlReady, "FTV-0013", Information, "The control socket listens.", ""},
	{LinkChanged, "FTV-0014", Information, "The carrier of a network card changed.", ""},
	{DiskError, "FTV-0015", Error, "A disk request failed on the host.", "Check the storage below the image named in the event."},
	{ConsoleDropped, "FTV-0016", Warning, "Console output was lost because its reader is too slow.", "Attach a reader that keeps up, or write the console to a file."},
	{EventsLost, "FTV-0017", Warning, "Events were lost because they could not be written.", "Check the file or pipe given with --events."},
	{Exited, "FTV-0018", Information, "The virtual machine monitor has ended.", ""},
	{UnknownMSR, "FTV-0019", Information, "The guest used a model-specific register that this machine does not have.", ""},
	{PairPhase, "FTV-0100", Information, "This side of the pair has changed its phase.", ""},
	{PairSuspect, "FTV-0101", Warning, "The other side is silent.", "Look at the other host and at the link if it does not come back."},
	{PairDead, "FTV-0102", Error, "The other side has been silent for too long and counts as lost.", "Look at the other host and at the link."},
	{PairLinkLost, "FTV-0103", Warning, "The link to the other side is closed.", "Look at the other host and at the link."},
	{PairSlow, "FTV-0104", Warning, "The guest waits for its backup, which is alive but slow.", "Give the backup's host more processor time."},
	{PairDivergence, "FTV-0105", Warning, "The two sides differ; the backup is made equal.", "If it happens again, check both hosts' memory and processors, and ftvmm check --self-test."},
	{PairDifference, "FTV-0106", Warning, "This side's guest does not do what the log says.", "If it happens again, check both hosts' memory and processors, and ftvmm check --self-test."},
	{PairTaint, "FTV-0107", Information, "An output waits in a stretch in which the guest may have read a clock that cannot be trapped.", ""},
	{PairCut, "FTV-0108", Information, "The state is copied to the backup.", ""},
	{PairCutTaken, "FTV-0109", Information, "A copy of the state was taken.", ""},
	{PairNoArbiter, "FTV-0110", Error, "The arbiter does not answer; the guest stands until it does.", "Look at the arbiter and the network to it."},
	{PairRefused, "FTV-0111", Warning, "The arbiter's record does not let this side go on.", "Nothing, if the other side is live; else see docs/protocol.md."},
	{PairForced, "FTV-0112", Warning, "A person has made this side live against the record.", "Make sure that the other side is gone for good."},
	{PairProtocol, "FTV-0113", Error, "The other side broke the protocol.", "Check that both hosts run the same version of ftvmm."},
	{PairCold, "FTV-0114", Information, "The guest starts from its disk.", ""},
	{PairSwitchOver, "FTV-0115", Information, "The guest is handed over to the other side.", ""},
	{PairMismatch, "FTV-0116", Error, "The two sides are not for the same guest.", "Give both sides the same configuration and the same kind of processor."},
	{PairFailed, "FTV-0117", Error, "This side cannot go on; the other can.", "Mend what the event names and start this side again."},
	{CopyProgress, "FTV-0118", Information, "The guest is being copied to the other side.", ""},
	{Copied, "FTV-0119", Good, "The guest was copied to the other side.", ""},
	{LinkRefused, "FTV-0120", Warning, "A connection on the link was refused.", "Look at the reason in the event."},
	{LinkPathUp, "FTV-0121", Good, "A path to the other side is usable.", ""},
	{LinkPathLost, "FTV-0122", Warning, "A path to the other side is lost.", "Look at the network below that path."},
	{LinkMoved, "FTV-0123", Information, "Traffic has moved to the other path.", ""},
	{LinkSuspect, "FTV-0124", Warning, "Nothing is heard over the link.", "Look at the other host and at the link."},
	{LinkDead, "FTV-0125", Error, "Nothing has been heard over the link for too long.", "Look at the other host and at the link."},
	{LinkAlive, "FTV-0126", Good, "The other side is heard again.", ""},
	{LinkStarved, "FTV-0127", Warning, "This process did not get any processor time.", "Give it more: the pair cannot tell a starved host from a dead one for ever."},
	{LinkDown, "FTV-0128", Warning, "The link's session is over.", "Look at the other host and at the link if it does not come back."},
}

// Catalog returns every kind of event, in order of ID.
func Catalog() []Message { return append([]Message(nil), catalog[:]...) }

// Lookup returns the catalogue's entry of a kind; ok is false if there is none.
func Lookup(k Kind) (m Message, ok bool) {
	for _, m := range catalog {
		if m.Kind == k {
			return m, true
		}
	}
	return Message{}, false
}

// Attrs are an event's own facts. Keys are lower case with underscores, units last
// ("pause_ms"); values are what encoding/json can write.
type Attrs map[string]any

// Event is one line. [Decode] reads it back.
type Event struct {
	Time     time.Time `json:"time"` // UTC, RFC 3339 with nanoseconds
	Kind     Kind      `json:"event"`
	ID       string    `json:"id"`
	Severity Severity  `json:"severity"`
	Guest    string    `json:"guest,omitempty"`
	Seq      uint64    `json:"seq"` // 1, 2, 3 … within one emitter, so that a reader notices a gap
	Attrs    Attrs     `json:"attrs,omitempty"`
}

// MaxLine bounds one event's line in bytes, its newline included: within PIPE_BUF, so that
// a line into a pipe is written whole or not at all.
const MaxLine = 4096

// An Emitter writes events. Its methods may be called from any goroutine, and on a nil
// Emitter, which writes nothing.
type Emitter struct {
	guest string
	now   func() time.Time

	mu   sync.Mutex
	w    io.Writer
	c    io.Closer
	seq  uint64
	lost uint64
}

// New returns an emitter that writes to w, on behalf of the named guest.
func New(w io.Writer, guest string) *Emitter {
	return &Emitter{guest: guest, now: time.Now, w: w}
}

// Open returns an emitter for the target of --events: "fd:N" is a descriptor that the
// parent left open, anything else a file that is created with mode 0600 or appended to. A
// named pipe is written without waiting for a reader: what does not fit is lost and counted.
func Open(target, guest string) (*Emitter, error) {
	f, err := openTarget(target)
	if err != nil {
		return nil, err
	}
	e := New(patientFile{f}, guest)
	e.c = f
	return e, nil
}

func openTarget(target string) (*os.File, error) {
	var fd int
	if n, err := fmt.Sscanf(target, "fd:%d", &fd); err == nil && n == 1 {
		if fmt.Sprintf("fd:%d", fd) != target || fd < 1 {
			return nil, fmt.Errorf("event: %q is not a file descriptor", target)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			return nil, fmt.Errorf("event: file descriptor %d is not open", fd)
		}
		// A copy, so that closing the emitter leaves the parent's descriptor alone.
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, fmt.Errorf("event: duplicate file descriptor %d: %w", fd, err)
		}
		return os.NewFile(uintptr(dup), target), nil
	}
	flags := os.O_WRONLY | os.O_APPEND | os.O_CREATE
	if fi, err := os.Stat(target); err == nil && fi.Mode()&os.ModeNamedPipe != 0 {
		// Read-write, so that the open does not wait for a reader and a reader may come and go.
		flags = os.O_RDWR
	}
	f, err := os.OpenFile(target, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("event: open event file: %w", err)
	}
	return f, nil
}

// Emit writes one event. Attributes that make the line longer than [MaxLine] are left
// out, and "truncated": true stands in their place.
func (e *Emitter) Emit(k Kind, attrs Attrs) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.w == nil {
		return
	}
	if e.lost > 0 {
		if !e.write(EventsLost, Attrs{"count": e.lost}) {
			e.lost++
			return
		}
		e.lost = 0
	}
	if !e.write(k, attrs) {
		e.lost++
	}
}

func (e *Emitter) write(k Kind, attrs Attrs) bool {
	m, ok := Lookup(k)
	if !ok {
		m = Message{Kind: k, ID: "FTV-0000", Severity: Unknown}
	}
	ev := Event{Time: e.now().UTC(), Kind: k, ID: m.ID, Severity: m.Severity, Guest: e.guest, Seq: e.seq + 1, Attrs: attrs}
	line, err := json.Marshal(ev)
	if err != nil || len(line)+1 > MaxLine {
		ev.Attrs = Attrs{"truncated": true}
		if line, err = json.Marshal(ev); err != nil {
			return false
		}
	}
	if _, err := e.w.Write(append(line, '\n')); err != nil {
		return false
	}
	e.seq++
	return true
}

// writePatience bounds how long a pipe without a reader may hold up whoever emits.
const writePatience = 20 * time.Millisecond

// patientFile writes to a descriptor whose reader may be slow: it waits for room, for a
// bounded time. A line fits into what poll(2) calls writable (see [MaxLine]).
type patientFile struct{ *os.File }

func (f patientFile) Write(p []byte) (int, error) {
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds, int(writePatience.Milliseconds()))
	if err != nil {
		return 0, fmt.Errorf("event: wait for room: %w", err)
	}
	if n == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	return f.File.Write(p)
}

// Lost returns how many events could not be written since the last one that could.
func (e *Emitter) Lost() uint64 {
	if e == nil {
		return 0
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.lost
}

// Close closes the file that [Open] opened; later events go nowhere.
func (e *Emitter) Close() error {
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.w = nil
	if e.c == nil {
		return nil
	}
	err := e.c.Close()
	e.c = nil
	return err
}

// Decode reads one line that an Emitter wrote.
func Decode(line []byte) (Event, error) {
	var ev Event
	if len(line) > MaxLine {
		return ev, errors.New("event: line too long")
	}
	if err := json.Unmarshal(line, &ev); err != nil {
		return ev, fmt.Errorf("event: %w", err)
	}
	if ev.Kind == "" || ev.Time.IsZero() {
		return ev, errors.New("event: line has no time or no event")
	}
	return ev, nil
}
