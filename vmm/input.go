package vmm

import (
	"fmt"
	"strconv"
	"strings"
)

// Position names an instant of guest execution that a recording machine and its replaying
// twin can both reach exactly (docs/determinism.md).
type Position struct {
	// Exit is the number of synchronous exits (those that the guest's own
	// instructions cause) since the last state sync or power-on.
	Exit uint64
	// Round numbers the waits inside one HLT, from 0.
	Round uint32
	// Count is 0 at the exit itself, or the number of counter events after it for an
	// asynchronous stop.
	Count uint64
}

func (p Position) String() string {
	s := fmt.Sprint(p.Exit)
	if p.Round != 0 {
		s += fmt.Sprintf(".%d", p.Round)
	}
	if p.Count != 0 {
		s += fmt.Sprintf("+%d", p.Count)
	}
	return s
}

// ParsePosition reads what String writes.
func ParsePosition(s string) (p Position, err error) {
	rest, count, asynchronous := strings.Cut(s, "+")
	exit, round, waiting := strings.Cut(rest, ".")
	if p.Exit, err = strconv.ParseUint(exit, 10, 64); err != nil {
		return Position{}, fmt.Errorf("vmm: position %q: %w", s, err)
	}
	if waiting {
		n, err := strconv.ParseUint(round, 10, 32)
		if err != nil {
			return Position{}, fmt.Errorf("vmm: position %q: %w", s, err)
		}
		p.Round = uint32(n)
	}
	if asynchronous {
		if p.Count, err = strconv.ParseUint(count, 10, 64); err != nil {
			return Position{}, fmt.Errorf("vmm: position %q: %w", s, err)
		}
	}
	return p, nil
}

// InputKind says what an [Input] is.
type InputKind uint8

// The kinds of input.
const (
	InputTime        InputKind = iota + 1 // the clock advances to Time
	InputDisk                             // request Tag of disk Device is complete, with Status
	InputFrame                            // NIC Device receives the frame Data
	InputLink                             // the carrier of NIC Device is Up or not
	InputConsole                          // console Device receives the bytes Data
	InputEntropy                          // request Tag of the random device gets the bytes Data
	InputPowerButton                      // the power button is pressed
	InputReset                            // the reset button is pressed
	InputStop                             // the machine ends with ExitQuit when this stop is complete: a replay's end
)

// Input is something from outside that changes guest state.
type Input struct {
	Kind   InputKind
	Device uint16 // index among the devices of the kind
	Up     bool
	Status uint8  // of a disk request: a blk.Status
	Time   int64  // virtual time in nanoseconds
	Tag    uint64 // of the request that is complete
	// Data is the frame or the bytes. For a disk read the data is in the request's own
	// buffer instead.
	Data []byte
}

// InputSource says what reaches the guest, and at which position. All methods but Attach
// are called from the vCPU loop.
type InputSource interface {
	// Attach is called once, before the first stop. The source rings the bell when Take
	// may have something to return.
	Attach(bell *Bell)
	// Take appends to buf the inputs for this stop. It is called at a synchronous exit, at a
	// named asynchronous stop, or, if Anywhere, at any stop; always when the bell has rung,
	// and at every synchronous exit if EveryStop. next is the earliest deadline of the guest's
	// timers on the virtual clock, devices.Never if there is none: if it has passed, one of the inputs is a
	// time sample.
	Take(pos Position, next int64, buf []Input) []Input
	// Sample returns the virtual time at a guest's reading of a clock. It never goes back.
	Sample(pos Position) int64
	// Wait is called in a HLT when no interrupt is due. It returns when Take may have something for
	// this round, when the bell rings, or when next has passed.
	Wait(pos Position, next int64)
	// Arm tells, before the guest is entered, when the next timer falls due.
	Arm(next int64)
	// Applied gives the inputs of the last Take back: their Data may be reused.
	Applied(inputs []Input)
	// Anywhere says whether inputs and interrupts may reach the guest at a stop that has no
	// name: true for a guest that nobody replays.
	Anywhere() bool
	// EveryStop says whether Take must be called at every synchronous exit, bell or not.
	EveryStop() bool
	// SetTime sets virtual time before the first entry: the guest was restored.
	SetTime(t int64)
	// Pause stops virtual time and Resume lets it go on, without a jump.
	Pause()
	Resume()
}

// OutputSink takes what leaves the guest, at a stop of the vCPU loop. It must not block for long.
type OutputSink interface {
	// Disk starts a request; its completion comes as an InputDisk.
	Disk(device int, r *DiskRequest)
	// Frame sends a frame, virtio header first; the buffer is lent for the call.
	Frame(device int, frame []byte)
	// Offloads tells what the guest's driver accepts in received frames.
	Offloads(device int, o Offloads)
	// Console sends bytes of a console; the buffer is lent for the call.
	Console(device int, p []byte)
	// Entropy asks for n random bytes; they come as an InputEntropy.
	Entropy(tag uint64, n int)
}
