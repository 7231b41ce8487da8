package lapic

import (
	"fmt"
	"sort"
)

// MaxAPICs bounds the processors of one machine.
const MaxAPICs = 255

// broadcast is the destination of a message to all.
const broadcast = 0xffffffff

// Bus carries interrupt messages to the local APICs. It implements [devices.MSI].
// It has no state to save.
type Bus struct {
	apics []*APIC // in order of identifiers
}

// NewBus returns a bus without APICs.
func NewBus() *Bus { return &Bus{} }

// Add connects a to the bus.
func (b *Bus) Add(a *APIC) error {
	if len(b.apics) == MaxAPICs {
		return fmt.Errorf("lapic: more than %d APICs", MaxAPICs)
	}
	i := sort.Search(len(b.apics), func(i int) bool { return b.apics[i].id >= a.id })
	if i < len(b.apics) && b.apics[i].id == a.id {
		return fmt.Errorf("lapic: two APICs with identifier %d", a.id)
	}
	b.apics = append(b.apics, nil)
	copy(b.apics[i+1:], b.apics[i:])
	b.apics[i] = a
	a.bus = b
	return nil
}

// widen turns a destination of 8 bits into one of 32.
func widen(dest uint8) uint32 {
	if dest == 0xff {
		return broadcast
	}
	return uint32(dest)
}

// Fields of a message-signalled interrupt (SDM 11.11).
const (
	msiAddress     = 0xfee // bits 31 to 20 of its address; those above are zero
	msiDestShift   = 12
	msiRedirection = 1 << 3
	msiLogical     = 1 << 2
)

// Send implements [devices.MSI]. A message to any other address has no effect.
func (b *Bus) Send(addr uint64, data uint32) {
	if addr>>20 != msiAddress || data&levelTrigger != 0 && data&icrAssert == 0 {
		return
	}
	mode := uint8(data & modeMask >> modeShift)
	if mode == ModeFixed && addr&msiRedirection != 0 {
		mode = ModeLowest
	}
	b.deliver(widen(uint8(addr>>msiDestShift)), addr&msiLogical != 0, mode, uint8(data), data&levelTrigger != 0)
}

// Deliver sends an interrupt message with a destination of 8 bits, as I/O APICs do:
// logical is the destination mode, mode one of the Mode constants, level the trigger
// mode. It returns whether any APIC took it.
func (b *Bus) Deliver(dest uint8, logical bool, mode, vector uint8, level bool) (accepted bool) {
	return b.deliver(widen(dest), logical, mode, vector, level)
}

func (b *Bus) deliver(dest uint32, logical bool, mode, vector uint8, level bool) (accepted bool) {
	if mode == ModeLowest {
		var winner *APIC
		for _, a := range b.apics {
			if a.addressed(dest, logical) && a.enabled() && (winner == nil || a.priority() < winner.priority()) {
				winner = a
			}
		}
		return winner != nil && winner.message(mode, vector, level)
	}
	for _, a := range b.apics {
		if a.addressed(dest, logical) && a.message(mode, vector, level) {
			accepted = true
		}
	}
	return accepted
}

// addressed says whether a message's destination includes this APIC (SDM 11.6.2).
func (a *APIC) addressed(dest uint32, logical bool) bool {
	switch {
	case dest == broadcast:
		return true
	case !logical && a.x2apic():
		return dest == a.id
	case !logical:
		return dest == a.id&0xff
	case a.x2apic():
		id := a.logicalID()
		return dest>>16 == id>>16 && dest&id&0xffff != 0
	}
	id, to := uint8(a.s.LDR>>24), uint8(dest)
	if a.s.DFR&dfrModel == dfrModel {
		return id&to != 0
	}
	// Cluster model; a cluster of all ones is every cluster.
	return (to>>4 == 0xf || to>>4 == id>>4) && to&id&0xf != 0
}

// command sends what the interrupt command register says (SDM 11.6.1).
func (a *APIC) command() {
	icr := a.s.ICR
	mode, vector := uint8(icr&modeMask>>modeShift), uint8(icr)
	switch mode {
	case ModeFixed, ModeLowest:
		if vector < firstVector {
			a.fail(errSendVector)
			return
		}
	case ModeINIT:
		// The de-assertion that old software sends after INIT does nothing on processors
		// since the Pentium 4.
		if icr&levelTrigger != 0 && icr&icrAssert == 0 {
			return
		}
	case ModeNMI, ModeStartUp:
	default: // SMI is not offered; the rest are reserved
		return
	}
	dest := widen(uint8(icr >> icrXAPICDestShift))
	if a.x2apic() {
		dest = uint32(icr >> icrDestShift)
	}
	switch icr >> icrShorthandShift & 3 {
	case toDestination:
		a.bus.deliver(dest, icr&icrLogical != 0, mode, vector, false)
	case toSelf:
		a.message(mode, vector, false)
	case toAll:
		for _, to := range a.bus.apics {
			to.message(mode, vector, false)
		}
	case toOthers:
		for _, to := range a.bus.apics {
			if to != a {
				to.message(mode, vector, false)
			}
		}
	}
}

// sendFixed sends an edge-triggered interrupt.
func (a *APIC) sendFixed(to *APIC, vector uint8) {
	if vector < firstVector {
		a.fail(errSendVector)
		return
	}
	to.accept(vector, false)
}
