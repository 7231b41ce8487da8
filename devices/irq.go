package devices

import "fmt"

// Line is the input of an interrupt controller, or any other level signal, as seen
// by the device that drives it. Setting the level that it has already is harmless.
type Line interface {
	Set(level bool)
}

// LineFunc makes a function a [Line].
type LineFunc func(level bool)

// Set calls f.
func (f LineFunc) Set(level bool) { f(level) }

// MSI takes message-signalled interrupts: a write of data to addr in the local
// APICs' range (Intel SDM vol. 3, 11.11).
type MSI interface {
	Send(addr uint64, data uint32)
}

// GSI numbers that this machine has: one for each pin of the I/O APIC. The first 16
// also reach the two 8259s.
const NumGSI = 24

// maxSources bounds the devices that share one global system interrupt.
const maxSources = 64

// Interrupts is the board's wiring between devices and interrupt controllers: each
// global system interrupt (GSI) is the OR of its sources and drives one or more
// sinks. The zero value is not usable; see [NewInterrupts].
type Interrupts struct {
	gsi [NumGSI]gsi
}

type gsi struct {
	sources int
	high    uint64 // a bit for each source
	sinks   []Line
}

// NewInterrupts returns wiring without sources and sinks.
func NewInterrupts() *Interrupts { return &Interrupts{} }

// Connect makes line follow GSI n. All sinks are connected before the first source
// changes.
func (i *Interrupts) Connect(n int, line Line) {
	i.gsi[n].sinks = append(i.gsi[n].sinks, line)
}

// Source returns a new source of GSI n. It panics when there are too many, a defect
// of the machine's construction.
func (i *Interrupts) Source(n int) Line {
	g := &i.gsi[n]
	if g.sources == maxSources {
		panic(fmt.Sprintf("devices: too many sources of GSI %d", n))
	}
	bit := uint64(1) << g.sources
	g.sources++
	return LineFunc(func(level bool) {
		was := g.high != 0
		if level {
			g.high |= bit
		} else {
			g.high &^= bit
		}
		if now := g.high != 0; now != was {
			for _, s := range g.sinks {
				s.Set(now)
			}
		}
	})
}

// InterruptsState is the saved form: which sources of each GSI are high.
type InterruptsState struct {
	High [NumGSI]uint64
}

// Save returns the levels of all sources.
func (i *Interrupts) Save() InterruptsState {
	var s InterruptsState
	for n := range i.gsi {
		s.High[n] = i.gsi[n].high
	}
	return s
}

// Restore sets the levels without driving the sinks, whose own state is restored
// beside this one.
func (i *Interrupts) Restore(s InterruptsState) error {
	for n := range i.gsi {
		if g := &i.gsi[n]; g.sources < maxSources && s.High[n]>>g.sources != 0 {
			return fmt.Errorf("devices: saved level of a source that GSI %d does not have", n)
		}
	}
	for n := range i.gsi {
		i.gsi[n].high = s.High[n]
	}
	return nil
}
