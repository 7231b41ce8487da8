// Package ioapic is the I/O APIC: 24 interrupt inputs, each with a redirection entry
// that says to which local APICs its interrupt goes, as which vector, and how.
//
// An edge-triggered input sends one message when it rises; while it is masked, the
// edge is lost (82093AA data sheet, 3.2.4). A level-triggered input sends a message
// whenever it is high, unmasked and not being served (remote IRR); the end of
// interrupt of its vector, broadcast by the local APICs or written to the EOI register,
// ends the service. The polarity bit is stored and means nothing: a [devices.Line] is
// asserted or not.
//
// References: Intel 82093AA data sheet (290566); the EOI register is that of version
// 0x20, described in Intel's I/O controller hub data sheets.
package ioapic

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
)

// The window of the registers.
const (
	Base = 0xfec00000
	Size = 0x1000
)

// Pins is the number of inputs.
const Pins = devices.NumGSI

// Offsets in the window (82093AA, 3.1).
const (
	offSelect = 0x00
	offWindow = 0x10
	offEOI    = 0x40
)

// Registers behind the window (82093AA, 3.2).
const (
	regID          = 0x00
	regVersion     = 0x01
	regArbitration = 0x02
	regRedirection = 0x10 // two for each pin

	version = (Pins-1)<<16 | 0x20
	idMask  = 0x0f000000
)

// Bits of a redirection entry (82093AA, 3.2.4).
const (
	vectorMask  = 0xff
	modeShift   = 8
	modeMask    = 7 << modeShift
	logical     = 1 << 11
	polarity    = 1 << 13
	remoteIRR   = 1 << 14
	levelMode   = 1 << 15
	masked      = 1 << 16
	destShift   = 56
	destination = 0xff << destShift

	lowWritable = vectorMask | modeMask | logical | polarity | levelMode | masked
	modeLowest  = 1 // fixed is 0: only these two have level triggering
)

// Bus delivers an interrupt message to local APICs: dest is 8 bits in the given
// destination mode, mode the delivery mode of the redirection entry. It returns
// whether any local APIC took the message.
type Bus interface {
	Deliver(dest uint8, logical bool, mode, vector uint8, level bool) (accepted bool)
}

// IOAPIC is one I/O APIC.
type IOAPIC struct {
	bus Bus
	s   State
}

// State is the saved form of an [IOAPIC].
type State struct {
	Select      uint8
	ID          uint32       // as its register shows it, in bits 24 to 27
	Redirection [Pins]uint64 // the entries, with remote IRR
	Level       uint32       // a bit for each input that is high
}

// New returns an I/O APIC in its power-on state: every input masked.
func New(bus Bus) *IOAPIC {
	a := &IOAPIC{bus: bus}
	a.Reset()
	return a
}

// Reset puts the registers into their power-on state. The levels of the inputs stay.
func (a *IOAPIC) Reset() {
	a.s = State{Level: a.s.Level}
	for i := range a.s.Redirection {
		a.s.Redirection[i] = masked
	}
}

// Line returns input n, from 0 to Pins-1.
func (a *IOAPIC) Line(n int) devices.Line {
	bit := uint32(1) << n
	_ = a.s.Redirection[n] // a pin that does not exist is a defect of construction
	return devices.LineFunc(func(level bool) {
		was := a.s.Level&bit != 0
		if !level {
			a.s.Level &^= bit
			return
		}
		a.s.Level |= bit
		if e := a.s.Redirection[n]; isLevel(e) {
			a.serve(n)
		} else if !was && e&masked == 0 {
			a.send(e, false)
		}
	})
}

// isLevel says whether an entry is level-triggered. Delivery modes for which the data
// sheet demands edges are edge-triggered whatever the trigger bit says.
func isLevel(e uint64) bool { return e&levelMode != 0 && e&modeMask>>modeShift <= modeLowest }

// serve sends the message of a level-triggered input that is due. If no local APIC
// takes it, nobody will end its service: it stays due.
func (a *IOAPIC) serve(n int) {
	e := &a.s.Redirection[n]
	if isLevel(*e) && a.s.Level>>n&1 != 0 && *e&(masked|remoteIRR) == 0 {
		if a.send(*e, true) {
			*e |= remoteIRR
		}
	}
}

func (a *IOAPIC) send(e uint64, level bool) bool {
	return a.bus.Deliver(uint8(e>>destShift), e&logical != 0, uint8(e&modeMask>>modeShift), uint8(e&vectorMask), level)
}

// EOI ends the service of the level-triggered inputs with this vector; one that is
// still high sends its message again.
func (a *IOAPIC) EOI(vector uint8) {
	for n := range a.s.Redirection {
		if e := &a.s.Redirection[n]; uint8(*e&vectorMask) == vector && *e&remoteIRR != 0 {
			*e &^= remoteIRR
			a.serve(n)
		}
	}
}

// Read implements [devices.Handler]. The registers are 32 bits wide; narrower reads
// see the low bytes of the select register and nothing of the others.
func (a *IOAPIC) Read(off uint64, size int) uint64 {
	switch {
	case off == offSelect:
		return uint64(a.s.Select)
	case off == offWindow && size >= 4:
		return uint64(a.register(a.s.Select))
	}
	return 0
}

func (a *IOAPIC) register(reg uint8) uint32 {
	switch {
	case reg == regID, reg == regArbitration:
		return a.s.ID
	case reg == regVersion:
		return version
	case reg >= regRedirection && reg < regRedirection+2*Pins:
		e := a.s.Redirection[(reg-regRedirection)/2]
		return uint32(e >> (32 * (reg & 1)))
	}
	return 0
}

// Write implements [devices.Handler].
func (a *IOAPIC) Write(off uint64, size int, v uint64) {
	switch {
	case off == offSelect:
		a.s.Select = uint8(v)
	case off == offWindow && size >= 4:
		a.setRegister(a.s.Select, uint32(v))
	case off == offEOI:
		a.EOI(uint8(v))
	}
}

func (a *IOAPIC) setRegister(reg uint8, v uint32) {
	switch {
	case reg == regID:
		a.s.ID = v & idMask
	case reg >= regRedirection && reg < regRedirection+2*Pins:
		n := int(reg-regRedirection) / 2
		e := &a.s.Redirection[n]
		if reg&1 != 0 {
			*e = *e&(1<<32-1) | uint64(v)<<32&destination
			return
		}
		*e = *e&(destination|remoteIRR) | uint64(v&lowWritable)
		// An entry made edge-triggered is no longer being served. Software without an EOI
		// register relies on it to end a service (and version 0x11 parts do it).
		if !isLevel(*e) {
			*e &^= remoteIRR
		}
		a.serve(n)
	}
}

// Save returns the I/O APIC's state.
func (a *IOAPIC) Save() State { return a.s }

// Restore sets the I/O APIC's state, or refuses it and changes nothing. It sends no
// messages.
func (a *IOAPIC) Restore(s State) error {
	if s.ID&^idMask != 0 || s.Level>>Pins != 0 {
		return fmt.Errorf("ioapic: saved identifier %#x or levels %#x have bits too many", s.ID, s.Level)
	}
	for n, e := range s.Redirection {
		if e&^(destination|remoteIRR|lowWritable) != 0 || e&remoteIRR != 0 && !isLevel(e) {
			return fmt.Errorf("ioapic: saved redirection entry %d is %#x", n, e)
		}
	}
	a.s = s
	return nil
}
