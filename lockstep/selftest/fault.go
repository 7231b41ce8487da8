package selftest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/vmm"
)

// Fault is something that goes wrong in one of two runs of a guest, on purpose: a test that cannot fail proves
// nothing.
type Fault string

// The faults.
const (
	FaultNone    Fault = ""
	FaultMemory  Fault = "memory"  // bytes of memory that the guest hello reads change
	FaultHidden  Fault = "hidden"  // a byte of memory changes that hello never looks at
	FaultTime    Fault = "time"    // a reading of the clock by the guest timers is a millisecond late
	FaultLanding Fault = "landing" // the guest of the landings is to be stopped where it never is
)

// Faults are those that can be chosen.
var Faults = []Fault{FaultMemory, FaultHidden, FaultTime, FaultLanding}

// faulty is the guest that each fault is made in.
var faulty = map[Fault]string{FaultMemory: "hello", FaultHidden: "hello", FaultTime: "timers", FaultLanding: "landing"}

// Where the faults are made: at which exit, which reading of the clock (behind those that program timers) and
// which stop.
const (
	breakExit   = 1
	breakSample = 100
	breakStop   = 3
)

// breaker returns an observer of the first run's exits that changes memory, nil for other faults.
func (e *Env) breaker(g *guest, m **vmm.Machine) func(*vmm.ExitRecord) {
	if faulty[e.Inject] != g.name || e.Inject != FaultMemory && e.Inject != FaultHidden {
		return nil
	}
	return func(x *vmm.ExitRecord) {
		if x.Pos.Exit != breakExit {
			return
		}
		regions := (*m).Memory().Regions()
		if e.Inject == FaultHidden {
			last := regions[len(regions)-1].Bytes
			last[len(last)-1] ^= 1
			return
		}
		for _, r := range regions {
			for b := r.Bytes; ; {
				at := bytes.Index(b, []byte(marker))
				if at < 0 {
					break
				}
				b = b[at+len(marker)-1:]
				b[0] ^= 1
			}
		}
	}
}

// tamper changes what was recorded.
func (e *Env) tamper(g *guest, r *recorded) error {
	if faulty[e.Inject] != g.name || e.Inject != FaultTime && e.Inject != FaultLanding {
		return nil
	}
	l, err := log.NewReader(bytes.NewReader(r.log), int64(len(r.log)))
	if err != nil {
		return err
	}
	defer l.Close()
	var buf bytes.Buffer
	w, err := log.NewWriter(&buf, l.Setup, l.Blobs, nil)
	if err != nil {
		return err
	}
	enc := log.NewEncoder(l.Setup.Start)
	samples, stops := 0, 0
	for {
		var x log.Entry
		err := l.Next(&x)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return errors.Join(fmt.Errorf("break the recording: %w", err), w.Close())
		}
		switch {
		case e.Inject == FaultTime && x.Kind == log.Sample:
			if samples++; samples == breakSample {
				x.Time += int64(time.Millisecond)
			}
		case e.Inject == FaultLanding && x.Kind == log.Stop:
			if stops++; stops == breakStop {
				x.Stop.Regs ^= 1
			}
		}
		w.Append(func(b []byte) []byte { return enc.Entry(b, &x) })
	}
	err = w.Close()
	r.log = buf.Bytes()
	return err
}
