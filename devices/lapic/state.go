package lapic

import "fmt"

// State is the saved form of an [APIC].
type State struct {
	APICBase      uint64 // IA32_APIC_BASE
	TPR           uint8
	LDR, DFR, SVR uint32
	ISR, TMR, IRR VectorSet
	ESR           uint32 // what the register shows
	Errors        uint32 // what has happened since it was written
	ICR           uint64
	LVT           [numLVT]uint32
	LINT          [2]bool // levels of the inputs

	Initial, Divide uint32
	Running         bool  // the count has not reached zero
	Deadline        int64 // when it will, in nanoseconds of virtual time; 0 when it is not running
}

// Save returns the APIC's state.
func (a *APIC) Save() State { return a.s }

// maxDeadline bounds restored deadlines, so that sums with periods do not overflow:
// 146 years, in nanoseconds.
const maxDeadline = 1 << 62

// Restore sets the APIC's state, or refuses it and changes nothing.
func (a *APIC) Restore(s State) error {
	if err := s.check(a.s.APICBase & baseBSP); err != nil {
		return fmt.Errorf("lapic %d: %w", a.id, err)
	}
	a.s = s
	return nil
}

// check says whether a guest could have brought an APIC into this state.
func (s *State) check(bsp uint64) error {
	const mode = baseEnable | baseX2APIC
	illegal := (s.ISR[0] | s.IRR[0] | s.TMR[0]) & (1<<firstVector - 1)
	deadlineOK := !s.Running && s.Deadline == 0 ||
		s.Running && s.Initial != 0 && s.Deadline > 0 && s.Deadline <= maxDeadline
	for _, f := range []struct {
		what  string
		value uint64
		ok    bool
	}{
		{"IA32_APIC_BASE", s.APICBase, s.APICBase&^mode == Base|bsp && s.APICBase&mode != baseX2APIC},
		{"spurious vector register", uint64(s.SVR), s.SVR&^svrStored == 0},
		{"logical destination", uint64(s.LDR), s.LDR&^ldrXAPIC == 0},
		{"destination format", uint64(s.DFR), s.DFR|dfrModel == dfrFlat},
		{"vector below 16", uint64(illegal), illegal == 0},
		{"error status", uint64(s.ESR | s.Errors), (s.ESR|s.Errors)&^errAll == 0},
		{"interrupt command", s.ICR, uint32(s.ICR)&^uint32(icrStored) == 0},
		{"timer divider", uint64(s.Divide), s.Divide&^divideWritable == 0},
		{"timer deadline", uint64(s.Deadline), deadlineOK},
	} {
		if !f.ok {
			return fmt.Errorf("saved %s is %#x", f.what, f.value)
		}
	}
	for i, lvt := range s.LVT {
		allowed := lvtWritable[i]
		if i == lvtLINT0 || i == lvtLINT1 {
			allowed |= lvtRemoteIRR
		}
		if lvt&^allowed != 0 {
			return fmt.Errorf("saved local vector %d is %#x", i, lvt)
		}
	}
	return nil
}
