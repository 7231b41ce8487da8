package selftest

import (
	"fmt"
	"strings"

	"github.com/ftvmm/ftvmm/vmm"
)

// Answer is one conclusion, with what it follows from.
type Answer struct {
	Value   string   `json:"value"`
	Reasons []string `json:"reasons"`
}

// Verdict is what the rows say about protection on this host (docs/determinism.md, "Output rule", "Cuts").
type Verdict struct {
	// Counter names stops between two exits: a vmm.CounterKind.
	Counter Answer `json:"counter"`
	// Commit is the rule by which outputs may leave: CommitReceived if a pair may choose it, else
	// CommitExecuted.
	Commit Answer `json:"commit"`
	// Engine is the best engine of level 3.
	Engine Answer `json:"engine"`
	// Levels are the answers for the levels of protection, from 1: "possible", "impossible" or "unknown".
	Levels []Answer `json:"levels"`
}

// The values of Verdict.
const (
	CommitReceived = "received"
	CommitExecuted = "executed"

	EngineLockstep   = "lockstep"
	EngineCheckpoint = "checkpoint"
	EngineNone       = "none"
	EngineUnknown    = "unknown"

	Possible   = "possible"
	Impossible = "impossible"
	NotKnown   = "unknown"
)

// MaxLevel is the highest level of protection.
const MaxLevel = 3

// basics are the checks without which no guest can run as it must.
var basics = []string{checkCompletion, checkSyncRegs, checkMSRs, checkInterrupts}

// findings sorts the rows by what the verdict asks.
type findings struct {
	rows     []Row
	basic    []string // reasons why guests cannot run
	parted   []string // guests whose runs differ
	failed   []string // guests that do not find the machine that they expect
	unclear  []string // checks without a result
	equal    int      // guests whose runs are equal
	exits    uint64
	stopping *Row // the landing's row
}

func sortOut(rows []Row) *findings {
	f := &findings{rows: rows, stopping: find(rows, checkLanding)}
	for _, name := range basics {
		switch r := find(rows, name); {
		case r == nil || r.State == Unknown:
			f.unclear = append(f.unclear, name)
		case r.State == Error:
			f.basic = append(f.basic, because(r))
		}
	}
	for i := range rows {
		r := &rows[i]
		if !strings.HasPrefix(r.Check, guestPrefix) {
			continue
		}
		switch {
		case r.Code == "guest-fails":
			f.failed = append(f.failed, because(r))
		case r.Check == checkLanding: // asked for with the counter
		case r.State == Error:
			f.parted = append(f.parted, because(r))
		case r.State != Good:
			f.unclear = append(f.unclear, r.Check)
		default:
			f.equal++
			f.exits += r.Compare.Exits
		}
	}
	return f
}

// because names a row as a reason.
func because(r *Row) string { return fmt.Sprintf("%s (%s): %s", r.Check, r.Code, r.Found) }

// Conclude says what follows from the rows of [Host], and of [Guests] if they have run.
func Conclude(rows []Row) Verdict {
	f := sortOut(rows)
	v := Verdict{Counter: f.counter()}
	v.Engine = f.engine(&v.Counter)
	v.Commit = f.commit(&v)
	for level := 1; level <= MaxLevel; level++ {
		v.Levels = append(v.Levels, f.level(level, &v))
	}
	return v
}

func (f *findings) counter() Answer {
	none := func(r *Row) Answer { return Answer{string(vmm.CounterNone), []string{because(r)}} }
	c := find(f.rows, checkCounter)
	switch {
	case c == nil:
		return Answer{string(vmm.CounterNone), []string{"it was not looked for"}}
	case c.State != Good:
		return none(c)
	case f.stopping == nil:
		return Answer{c.Value, []string{because(c), "landings were not tried: the guests have not run"}}
	case f.stopping.State != Good:
		return none(f.stopping)
	}
	return Answer{c.Value, []string{because(c), because(f.stopping)}}
}

func (f *findings) engine(counter *Answer) Answer {
	dirty := find(f.rows, checkDirtyLog)
	switch {
	case len(f.basic) > 0:
		return Answer{EngineNone, f.basic}
	case len(f.failed) > 0:
		return Answer{EngineNone, f.failed}
	case dirty == nil || dirty.State == Unknown:
		return Answer{EngineUnknown, []string{"it is not known whether written pages are reported"}}
	case dirty.State == Error:
		return Answer{EngineNone, []string{because(dirty)}}
	case len(f.parted) > 0:
		return Answer{EngineCheckpoint, append(f.parted, "checkpoints need no equal runs, only the pages that were written, and those are reported")}
	case len(f.unclear) > 0:
		return Answer{EngineUnknown, []string{"no result from " + strings.Join(f.unclear, ", ")}}
	case f.equal == 0:
		return Answer{EngineUnknown, []string{"the guests have not run: add --self-test"}}
	}
	a := Answer{EngineLockstep, []string{
		fmt.Sprintf("%d guests were equal in %d exits, in memory and in devices", f.equal, f.exits), because(dirty),
		"guests with one vCPU only: those with more are protected by checkpoints",
	}}
	if counter.Value == string(vmm.CounterNone) {
		a.Reasons = append(a.Reasons, "without a counter an input that finds the guest between two exits waits for the next one, or for a cut")
	}
	return a
}

func (f *findings) commit(v *Verdict) Answer {
	var missing []string
	if v.Counter.Value == string(vmm.CounterNone) {
		missing = append(missing, v.Counter.Reasons...)
	}
	if v.Engine.Value != EngineLockstep {
		missing = append(missing, v.Engine.Reasons...)
	}
	if len(missing) > 0 {
		return Answer{CommitExecuted, missing}
	}
	a := Answer{CommitReceived, []string{
		fmt.Sprintf("the counter %q exists, its landings were exact, and all guests were equal", v.Counter.Value),
		"only if the self-test passes on the other host, too",
		"only for a guest that does not execute RDTSC, which no KVM can trap; for others: " + CommitExecuted,
	}}
	if t := find(f.rows, checkTSC); t != nil && t.State == Good {
		a.Reasons[2] += ", with the counter frozen"
	}
	return a
}

func (f *findings) level(level int, v *Verdict) Answer {
	switch {
	case len(f.basic) > 0:
		return Answer{Impossible, f.basic}
	case len(f.failed) > 0:
		return Answer{Impossible, f.failed}
	case level == MaxLevel && v.Engine.Value == EngineNone:
		return Answer{Impossible, v.Engine.Reasons}
	case level == MaxLevel && v.Engine.Value == EngineUnknown:
		return Answer{NotKnown, v.Engine.Reasons}
	case level == MaxLevel:
		return Answer{Possible, []string{"by the engine " + v.Engine.Value}}
	case len(f.unclear) > 0 && f.equal == 0:
		return Answer{NotKnown, []string{"no result from " + strings.Join(f.unclear, ", ")}}
	}
	return Answer{Possible, []string{"guests run; their state need not be equal on two hosts"}}
}
