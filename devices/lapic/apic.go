package lapic

import (
	"fmt"
	"math/bits"

	"github.com/ftvmm/ftvmm/devices"
)

// The page of memory-mapped registers (SDM 11.4.1).
const (
	Base = 0xfee00000
	Size = 0x1000
)

// Register offsets (SDM table 11-1). The MSR of a register in x2APIC mode is 0x800
// plus a sixteenth of its offset (SDM table 11-6).
const (
	regID       = 0x020
	regVersion  = 0x030
	regTPR      = 0x080
	regAPR      = 0x090
	regPPR      = 0x0a0
	regEOI      = 0x0b0
	regRRD      = 0x0c0
	regLDR      = 0x0d0
	regDFR      = 0x0e0
	regSVR      = 0x0f0
	regISR      = 0x100 // eight registers, like the next two
	regTMR      = 0x180
	regIRR      = 0x200
	regESR      = 0x280
	regICRLow   = 0x300
	regICRHigh  = 0x310
	regLVTTimer = 0x320 // first of numLVT
	regLVTError = 0x370
	regInitial  = 0x380
	regCurrent  = 0x390
	regDivide   = 0x3e0
	regSelfIPI  = 0x3f0 // x2APIC only

	regStride = 0x10
)

// version is an APIC of the 0x14 family with six local vectors and no suppression of
// EOI broadcasts (SDM 11.4.8).
const version = 0x00050014

// Indices of the local vector table.
const (
	lvtTimer = iota
	lvtThermal
	lvtPerf
	lvtLINT0
	lvtLINT1
	lvtError
	numLVT
)

// Bits of the local vector table and of the interrupt command register (SDM 11.5.1,
// 11.6.1).
const (
	vectorMask    = 0xff
	modeShift     = 8
	modeMask      = 7 << modeShift
	icrLogical    = 1 << 11
	icrAssert     = 1 << 14
	lvtRemoteIRR  = 1 << 14
	levelTrigger  = 1 << 15
	lvtMasked     = 1 << 16
	timerPeriodic = 1 << 17

	icrShorthandShift = 18
	icrDestShift      = 32
	icrXAPICDestShift = 56

	// icrStored leaves out the delivery status (always idle) and reserved bits.
	icrStored = vectorMask | modeMask | icrLogical | icrAssert | levelTrigger | 3<<icrShorthandShift
)

// lvtWritable has the bits of each local vector that exist and can be written.
var lvtWritable = [numLVT]uint32{
	lvtTimer:   vectorMask | lvtMasked | timerPeriodic,
	lvtThermal: vectorMask | modeMask | lvtMasked,
	lvtPerf:    vectorMask | modeMask | lvtMasked,
	lvtLINT0:   vectorMask | modeMask | 1<<13 | levelTrigger | lvtMasked,
	lvtLINT1:   vectorMask | modeMask | 1<<13 | levelTrigger | lvtMasked,
	lvtError:   vectorMask | lvtMasked,
}

// Delivery modes (SDM 11.5.1, 11.6.1).
const (
	ModeFixed   = 0
	ModeLowest  = 1
	ModeSMI     = 2
	ModeNMI     = 4
	ModeINIT    = 5
	ModeStartUp = 6
	ModeExtINT  = 7
)

// Destination shorthands of the interrupt command register.
const (
	toDestination = iota
	toSelf
	toAll
	toOthers
)

const (
	svrEnable   = 1 << 8
	svrStored   = vectorMask | svrEnable | 1<<9 // bit 9, focus checking, is storage
	dfrFlat     = 0xffffffff
	dfrModel    = 0xf0000000
	ldrXAPIC    = 0xff000000
	firstVector = 16 // SDM 11.5.2: the ones below are illegal
)

// Bits of the error status register (SDM 11.5.3).
const (
	errSendVector    = 1 << 5
	errReceiveVector = 1 << 6
	errRegister      = 1 << 7

	errAll = errSendVector | errReceiveVector | errRegister
)

// System is what an APIC can do to its processor, and to the I/O APICs. id is the
// APIC's identifier.
type System interface {
	// INIT resets the processor, which then waits for a start-up message. The APIC has
	// already put itself into the state that INIT leaves (SDM 11.4.7.3).
	INIT(id uint32)
	// StartUp starts a processor that waits at vector*4096 in real mode; others ignore it.
	StartUp(id uint32, vector uint8)
	// NMI makes a non-maskable interrupt pending.
	NMI(id uint32)
	// EOI says that a level-triggered interrupt of this vector was finished; it is for
	// the I/O APICs.
	EOI(vector uint8)
}

// VectorSet has a bit for each vector, in the layout of the registers: vector v is
// bit v%32 of word v/32.
type VectorSet [8]uint32

func (s *VectorSet) set(v uint8)      { s[v/32] |= 1 << (v % 32) }
func (s *VectorSet) clear(v uint8)    { s[v/32] &^= 1 << (v % 32) }
func (s *VectorSet) has(v uint8) bool { return s[v/32]>>(v%32)&1 != 0 }

// highest returns the highest vector of the set, or -1.
func (s *VectorSet) highest() int {
	for i := len(s) - 1; i >= 0; i-- {
		if s[i] != 0 {
			return i*32 + bits.Len32(s[i]) - 1
		}
	}
	return -1
}

// APIC is one processor's local APIC.
type APIC struct {
	id    uint32
	sys   System
	bus   *Bus
	clock *devices.Clock
	timer *devices.Timer
	s     State
}

// New returns the APIC with the given identifier in its power-on state, on a message
// bus of its own. The processor with identifier 0 is the bootstrap processor.
func New(clock *devices.Clock, id uint32, sys System) *APIC {
	a := &APIC{id: id, sys: sys, clock: clock}
	a.bus = &Bus{apics: []*APIC{a}}
	a.timer = clock.NewTimer(fmt.Sprintf("lapic %d timer", id), a.fired)
	a.Reset()
	return a
}

// ID returns the APIC's identifier.
func (a *APIC) ID() uint32 { return a.id }

// Reset puts the APIC into its power-on state: enabled as xAPIC by hardware, not by
// software. The levels of LINT0 and LINT1 stay: they are inputs.
func (a *APIC) Reset() {
	a.s.APICBase = Base | baseEnable
	if a.id == 0 {
		a.s.APICBase |= baseBSP
	}
	a.clear()
}

// clear puts the registers into the state after power-up, INIT or disabling, which
// is the same but for IA32_APIC_BASE (SDM 11.4.7).
func (a *APIC) clear() {
	a.s = State{APICBase: a.s.APICBase, LINT: a.s.LINT, DFR: dfrFlat, SVR: vectorMask}
	for i := range a.s.LVT {
		a.s.LVT[i] = lvtMasked
	}
	if a.s.APICBase&baseBSP != 0 {
		a.s.LVT[lvtLINT0] = ModeExtINT << modeShift
	}
	a.timer.Disarm()
}

// enabled says whether software has enabled the APIC: only then does it accept
// ordinary interrupts (SDM 11.4.7.2).
func (a *APIC) enabled() bool { return a.hardwareEnabled() && a.s.SVR&svrEnable != 0 }

// priority returns the processor priority, PPR (SDM 11.8.3.1).
func (a *APIC) priority() uint8 {
	serving := a.s.ISR.highest()
	if serving < 0 || int(a.s.TPR&0xf0) >= serving&0xf0 {
		return a.s.TPR
	}
	return uint8(serving) & 0xf0
}

// Pending returns what the processor would be interrupted with: the highest vector
// whose class is above the processor priority; else, with extint, that the 8259s
// must be asked for the vector, because their output is high and LINT0 is set to
// accept it or the APIC is disabled. ok is false when there is nothing.
func (a *APIC) Pending() (vector int, extint bool, ok bool) {
	if v := a.deliverable(); v >= 0 {
		return v, false, true
	}
	if a.s.LINT[0] && (!a.hardwareEnabled() || a.s.LVT[lvtLINT0]&(lvtMasked|modeMask) == ModeExtINT<<modeShift) {
		return 0, true, true
	}
	return 0, false, false
}

func (a *APIC) deliverable() int {
	if v := a.s.IRR.highest(); v >= 0 && a.enabled() && v&0xf0 > int(a.priority()&0xf0) {
		return v
	}
	return -1
}

// Acknowledge says that the processor takes the interrupt that Pending named. It
// returns the vector to deliver, which is the same, or the spurious vector when the
// interrupt is no longer deliverable (SDM 11.9); then nothing is in service and
// the handler sends no EOI.
func (a *APIC) Acknowledge(vector int) int {
	if vector < 0 || vector != a.deliverable() {
		return int(a.s.SVR & vectorMask)
	}
	a.s.IRR.clear(uint8(vector))
	a.s.ISR.set(uint8(vector))
	return vector
}

// eoi finishes the highest interrupt in service (SDM 11.8.5).
func (a *APIC) eoi() {
	highest := a.s.ISR.highest()
	if highest < 0 {
		return
	}
	v := uint8(highest)
	a.s.ISR.clear(v)
	if a.s.TMR.has(v) {
		for pin := range a.s.LINT {
			if lvt := &a.s.LVT[lvtLINT0+pin]; uint8(*lvt) == v {
				*lvt &^= lvtRemoteIRR
			}
		}
		a.sys.EOI(v)
		a.lintLevels()
	}
}

// TPR returns the task priority register.
func (a *APIC) TPR() uint8 { return a.s.TPR }

// SetTPR sets the task priority register.
func (a *APIC) SetTPR(v uint8) { a.s.TPR = v }

// CR8 returns the task priority as the processor's CR8 has it: its class.
func (a *APIC) CR8() uint8 { return a.s.TPR >> 4 }

// SetCR8 sets the task priority from the processor's CR8 (SDM 11.8.6).
func (a *APIC) SetCR8(v uint8) { a.s.TPR = v << 4 }

// accept takes an interrupt message of mode fixed or lowest priority, if it can.
func (a *APIC) accept(vector uint8, level bool) bool {
	if !a.enabled() {
		return false
	}
	if vector < firstVector {
		a.fail(errReceiveVector)
		return false
	}
	a.s.IRR.set(vector)
	if level {
		a.s.TMR.set(vector)
	} else {
		a.s.TMR.clear(vector)
	}
	return true
}

// message takes any interrupt message that is meant for this APIC, if it can.
func (a *APIC) message(mode, vector uint8, level bool) bool {
	if !a.hardwareEnabled() {
		return false
	}
	switch mode {
	case ModeFixed, ModeLowest:
		return a.accept(vector, level)
	case ModeNMI:
		a.sys.NMI(a.id)
	case ModeINIT:
		a.clear()
		a.sys.INIT(a.id)
	case ModeStartUp:
		a.sys.StartUp(a.id, vector)
	default:
		return false
	}
	return true
}

// fail records an error and raises the error interrupt if it is new.
func (a *APIC) fail(err uint32) {
	if a.s.Errors&err != 0 {
		return
	}
	a.s.Errors |= err
	if lvt := a.s.LVT[lvtError]; lvt&lvtMasked == 0 {
		a.accept(uint8(lvt), false)
	}
}

// LINT0 returns the input that the 8259s drive.
func (a *APIC) LINT0() devices.Line { return devices.LineFunc(func(l bool) { a.setLINT(0, l) }) }

// LINT1 returns the input that a board wires to its NMI sources.
func (a *APIC) LINT1() devices.Line { return devices.LineFunc(func(l bool) { a.setLINT(1, l) }) }

func (a *APIC) setLINT(pin int, level bool) {
	rising := level && !a.s.LINT[pin]
	a.s.LINT[pin] = level
	lvt := a.s.LVT[lvtLINT0+pin]
	if !a.hardwareEnabled() || lvt&lvtMasked != 0 {
		return
	}
	switch mode := lvt & modeMask >> modeShift; {
	case mode == ModeNMI && rising:
		a.sys.NMI(a.id)
	case mode == ModeFixed && lvt&levelTrigger != 0:
		a.lintLevels()
	case mode == ModeFixed && rising:
		a.accept(uint8(lvt), false)
	}
}

// lintLevels makes level-triggered local interrupts pending whose input is high and
// that are not being served.
func (a *APIC) lintLevels() {
	for pin, high := range a.s.LINT {
		lvt := &a.s.LVT[lvtLINT0+pin]
		const relevant = lvtMasked | modeMask | levelTrigger | lvtRemoteIRR
		if high && *lvt&relevant == ModeFixed<<modeShift|levelTrigger && a.accept(uint8(*lvt), true) {
			*lvt |= lvtRemoteIRR
		}
	}
}
