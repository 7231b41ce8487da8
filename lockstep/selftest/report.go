package selftest

import (
	"time"
)

// State is how a check came out: one of the five states that the whole product uses.
type State string

// The states, best first.
const (
	Good        State = "good"
	Information State = "information" // worth knowing, nothing to mend
	Unknown     State = "unknown"     // could not be found out
	Warning     State = "warning"     // works, with less than could be had
	Error       State = "error"       // does not work
)

var severity = map[State]int{Good: 0, Information: 1, Unknown: 2, Warning: 3, Error: 4}

// Row is what one check has found.
type Row struct {
	Check   string `json:"check"` // the check's name, stable
	State   State  `json:"state"`
	Code    string `json:"code"`               // why, stable: docs/check.md lists them
	Found   string `json:"found"`              // what was seen on this host
	Meaning string `json:"meaning"`            // for a protected guest
	Remedy  string `json:"remedy,omitempty"`   // empty where there is nothing to mend
	Elapsed int64  `json:"elapsed_ms"`         //
	Value   string `json:"value,omitempty"`    // the finding itself, for programs
	Compare *Count `json:"compared,omitempty"` // of a guest that ran twice
	// Divergence is where the two runs of a guest parted, nil if they did not.
	Divergence *Divergence `json:"divergence,omitempty"`
}

// Count says how much two runs of a guest were compared on.
type Count struct {
	Runs         int    `json:"runs"`             // in all, the recorded one included
	Exits        uint64 `json:"exits"`            // compared with all registers
	Inputs       uint64 `json:"inputs"`           // that came from outside
	Clocks       uint64 `json:"clocks"`           // readings of a clock
	Interrupts   uint64 `json:"interrupts"`       // delivered
	Kicks        uint64 `json:"kicks"`            // returns of KVM_RUN that the host caused, in all runs
	Stops        uint64 `json:"stops"`            // asynchronous stops that were named
	Landings     uint64 `json:"landings"`         // asynchronous stops that were reached again, in all runs
	Instructions uint64 `json:"instructions"`     // counted on the way to the named stops
	Emulated     uint64 `json:"emulated"`         // instructions that KVM could not emulate and this program did
	Memory       uint64 `json:"memory_bytes"`     // compared at the end
	Components   int    `json:"components"`       // devices whose state was compared at the end
	Digest       string `json:"digest,omitempty"` // of all that the guest did
}

// Total is how much was compared in all rows together.
func Total(rows []Row) Count {
	var t Count
	for i := range rows {
		c := rows[i].Compare
		if c == nil {
			continue
		}
		t.Runs += c.Runs
		t.Exits += c.Exits
		t.Inputs += c.Inputs
		t.Clocks += c.Clocks
		t.Interrupts += c.Interrupts
		t.Kicks += c.Kicks
		t.Stops += c.Stops
		t.Landings += c.Landings
		t.Instructions += c.Instructions
		t.Emulated += c.Emulated
		t.Memory += c.Memory
		t.Components += c.Components
	}
	return t
}

// Divergence is the first difference between two runs of a guest.
type Divergence struct {
	Guest    string `json:"guest"`
	Position string `json:"position"` // EXIT, EXIT.ROUND or EXIT+COUNT; for memory and devices the guest's end
	What     string `json:"what"`
	First    string `json:"first"` // what the recorded run had
	Second   string `json:"second"`
}

// Worst returns the worst state of the rows, Good if there are none.
func Worst(rows []Row) State {
	worst := Good
	for i := range rows {
		if severity[rows[i].State] > severity[worst] {
			worst = rows[i].State
		}
	}
	return worst
}

// find returns the row of a check, nil if there is none.
func find(rows []Row, check string) *Row {
	for i := range rows {
		if rows[i].Check == check {
			return &rows[i]
		}
	}
	return nil
}

// milliseconds rounds a duration for a report.
func milliseconds(d time.Duration) int64 { return d.Round(time.Millisecond).Milliseconds() }
