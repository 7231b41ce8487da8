package selftest

import (
	"context"
	"fmt"
	"time"

	"github.com/ftvmm/ftvmm/vmm"
)

// Env is what all checks share. It belongs to one goroutine.
type Env struct {
	// KVM is the path of the KVM device, "" for the usual one.
	KVM string
	// Seed decides the kicks, the pages that are written and the frames that are sent. Equal seeds ask for
	// the same; when a kick of the host arrives is still the host's affair.
	Seed uint64
	// Quick runs shorter guests.
	Quick bool
	// Inject breaks one of the two runs of a guest on purpose, to see that it is found.
	Inject Fault

	counter  vmm.CounterKind // that the guests run with; the check of counters sets it
	patience time.Duration   // for one run of a guest; 0: guestPatience
}

// A Check finds out one thing. Run returns a row without Check and Elapsed.
type Check struct {
	Name string
	// Weight is how long it takes beside others; 0 counts as 1.
	Weight int
	Run    func(ctx context.Context, e *Env) Row
}

// Progress says how far the checks have come.
type Progress struct {
	Done, Total int     // checks
	Part        float64 // of the work that is done, by weight, 0 to 1
	Next        string  // the check that begins
}

// Run carries out the checks in turn. progress, if not nil, is told before each of them. Between two
// checks ctx can end it; the rows so far are returned with its error.
func Run(ctx context.Context, e *Env, checks []Check, progress func(Progress)) ([]Row, error) {
	rows := make([]Row, 0, len(checks))
	done, total := 0, 0
	for i := range checks {
		total += max(checks[i].Weight, 1)
	}
	for i, c := range checks {
		if err := ctx.Err(); err != nil {
			return rows, fmt.Errorf("self-test: %w", context.Cause(ctx))
		}
		if progress != nil {
			progress(Progress{Done: i, Total: len(checks), Part: float64(done) / float64(total), Next: c.Name})
		}
		began := time.Now()
		row := c.Run(ctx, e)
		row.Check, row.Elapsed = c.Name, milliseconds(time.Since(began))
		rows = append(rows, row)
		done += max(c.Weight, 1)
	}
	if err := ctx.Err(); err != nil {
		return rows, fmt.Errorf("self-test: %w", context.Cause(ctx))
	}
	return rows, nil
}

// broken is the row of a check that the host did not let come to a result.
func broken(code string, err error, meaning string) Row {
	return Row{
		State: Unknown, Code: code, Found: err.Error(), Meaning: meaning,
		Remedy: "run the check again; if it fails again, report it with this text",
	}
}
