package lapic

// MSRs that the APIC owns.
const (
	MSRAPICBase   = 0x1b
	MSRX2APIC     = 0x800 // the first of the x2APIC registers
	MSRX2APICLast = 0x8ff
)

// Bits of IA32_APIC_BASE (SDM 11.4.4, 11.12.1).
const (
	baseBSP    = 1 << 8
	baseX2APIC = 1 << 10
	baseEnable = 1 << 11
)

func (a *APIC) hardwareEnabled() bool { return a.s.APICBase&baseEnable != 0 }
func (a *APIC) x2apic() bool          { return a.s.APICBase&baseX2APIC != 0 }

// mapped says whether the memory-mapped registers are there.
func (a *APIC) mapped() bool { return a.hardwareEnabled() && !a.x2apic() }

// needsTime says whether reading or writing a register depends on the time.
func needsTime(reg uint64, write bool) bool {
	if write {
		return reg == regInitial || reg == regDivide || reg == regLVTTimer
	}
	return reg == regCurrent
}

// NeedsTime implements [devices.Timed].
func (a *APIC) NeedsTime(off uint64, write bool) bool {
	return a.mapped() && needsTime(off&^(regStride-1), write)
}

// Read implements [devices.Handler] for the page of registers. Registers are 32 bits
// wide at multiples of 16 bytes (SDM 11.4.1); between them zeros are read. An APIC
// that is disabled or in x2APIC mode decodes nothing.
func (a *APIC) Read(off uint64, size int) uint64 {
	if !a.mapped() {
		return ^uint64(0)
	}
	within := off % regStride
	if within >= 4 {
		return 0
	}
	return uint64(a.readRegister(off-within)) >> (8 * within)
}

// readRegister reads by the offset in the page.
func (a *APIC) readRegister(reg uint64) uint32 {
	switch reg {
	case regID:
		return a.id << 24
	case regAPR, regRRD: // not supported by this family (SDM table 11-1)
		return 0
	case regEOI: // write-only
		return 0
	case regDFR:
		return a.s.DFR
	case regICRHigh:
		return uint32(a.s.ICR >> icrDestShift)
	}
	v, ok := a.read(reg)
	if !ok {
		a.fail(errRegister)
	}
	return v
}

// read reads the registers that both modes have; ok is false for the others.
func (a *APIC) read(reg uint64) (v uint32, ok bool) {
	switch {
	case reg == regVersion:
		return version, true
	case reg == regTPR:
		return uint32(a.s.TPR), true
	case reg == regPPR:
		return uint32(a.priority()), true
	case reg == regLDR:
		return a.logicalID(), true
	case reg == regSVR:
		return a.s.SVR, true
	case reg >= regISR && reg < regTMR:
		return a.s.ISR[(reg-regISR)/regStride], true
	case reg >= regTMR && reg < regIRR:
		return a.s.TMR[(reg-regTMR)/regStride], true
	case reg >= regIRR && reg < regESR:
		return a.s.IRR[(reg-regIRR)/regStride], true
	case reg == regESR:
		return a.s.ESR, true
	case reg == regICRLow:
		return uint32(a.s.ICR), true
	case reg >= regLVTTimer && reg <= regLVTError:
		return a.s.LVT[(reg-regLVTTimer)/regStride], true
	case reg == regInitial:
		return a.s.Initial, true
	case reg == regCurrent:
		return a.count(), true
	case reg == regDivide:
		return a.s.Divide, true
	}
	return 0, false
}

// Write implements [devices.Handler]. Only aligned writes of 32 bits (or more, whose
// upper half is ignored) are defined; others have no effect.
func (a *APIC) Write(off uint64, size int, v uint64) {
	if !a.mapped() || off%regStride != 0 || size < 4 {
		return
	}
	w := uint32(v)
	switch off {
	case regID, regVersion, regAPR, regPPR, regRRD, regCurrent: // read-only here
	case regLDR:
		a.s.LDR = w & ldrXAPIC
	case regDFR:
		a.s.DFR = w | ^uint32(dfrModel)
	case regICRHigh:
		a.s.ICR = a.s.ICR&(1<<icrDestShift-1) | uint64(w&ldrXAPIC)<<icrDestShift
	case regICRLow:
		a.s.ICR = a.s.ICR>>icrDestShift<<icrDestShift | uint64(w&icrStored)
		a.command()
	default:
		if off >= regISR && off < regESR { // read-only
			return
		}
		if !a.write(off, w) {
			a.fail(errRegister)
		}
	}
}

// write writes the registers that both modes have; it returns false for the others.
func (a *APIC) write(reg uint64, v uint32) bool {
	switch {
	case reg == regTPR:
		a.s.TPR = uint8(v)
	case reg == regEOI:
		a.eoi()
	case reg == regSVR:
		a.s.SVR = v & svrStored
		if v&svrEnable == 0 { // SDM 11.4.7.2: disabling masks all local interrupts
			for i := range a.s.LVT {
				a.writeLVT(i, a.s.LVT[i])
			}
		}
		a.lintLevels()
	case reg == regESR: // SDM 11.5.3: a write shows what has happened since the last
		a.s.ESR, a.s.Errors = a.s.Errors, 0
	case reg >= regLVTTimer && reg <= regLVTError:
		a.writeLVT(int(reg-regLVTTimer)/regStride, v)
		a.lintLevels()
	case reg == regInitial:
		a.start(v)
	case reg == regDivide:
		a.setDivide(v)
	default:
		return false
	}
	return true
}

// writeLVT writes entry i of the local vector table.
func (a *APIC) writeLVT(i int, v uint32) {
	lvt := v & lvtWritable[i]
	if a.s.SVR&svrEnable == 0 {
		lvt |= lvtMasked
	}
	switch i {
	case lvtTimer:
		a.setTimerVector(lvt)
		return
	case lvtLINT0, lvtLINT1:
		if lvt&levelTrigger != 0 { // an interrupt in service stays so
			lvt |= a.s.LVT[i] & lvtRemoteIRR
		}
	}
	a.s.LVT[i] = lvt
}

// logicalID returns the logical destination register. In x2APIC mode it follows from
// the identifier (SDM 11.12.10.2).
func (a *APIC) logicalID() uint32 {
	if a.x2apic() {
		return a.id>>4<<16 | 1<<(a.id&15)
	}
	return a.s.LDR
}

// NeedsTimeMSR says whether reading or writing an MSR depends on the time.
func (a *APIC) NeedsTimeMSR(msr uint32, write bool) bool {
	return a.x2apic() && msr >= MSRX2APIC && msr <= MSRX2APICLast && needsTime(registerOf(msr), write)
}

func registerOf(msr uint32) uint64 { return uint64(msr-MSRX2APIC) * regStride }

// ReadMSR reads IA32_APIC_BASE or, in x2APIC mode, an APIC register (SDM table 11-6).
// ok is false for what raises #GP.
func (a *APIC) ReadMSR(msr uint32) (v uint64, ok bool) {
	switch {
	case msr == MSRAPICBase:
		return a.s.APICBase, true
	case !a.x2apic() || msr < MSRX2APIC || msr > MSRX2APICLast:
		return 0, false
	}
	switch reg := registerOf(msr); reg {
	case regID:
		return uint64(a.id), true
	case regICRLow:
		return a.s.ICR, true
	default:
		v, ok := a.read(reg)
		return uint64(v), ok
	}
}

// WriteMSR writes IA32_APIC_BASE or, in x2APIC mode, an APIC register. It returns
// false, and has no effect, for what raises #GP: a register that does not exist or
// cannot be written, a reserved bit, an illegal change of mode.
func (a *APIC) WriteMSR(msr uint32, v uint64) bool {
	switch {
	case msr == MSRAPICBase:
		return a.setBase(v)
	case !a.x2apic() || msr < MSRX2APIC || msr > MSRX2APICLast:
		return false
	}
	reg := registerOf(msr)
	if reg == regICRLow {
		if uint32(v)&^uint32(icrStored) != 0 {
			return false
		}
		a.s.ICR = v
		a.command()
		return true
	}
	var writable uint64 // bits that may be set in v
	switch {
	case reg == regTPR, reg == regSelfIPI:
		writable = vectorMask
	case reg == regEOI, reg == regESR: // only zero may be written
	case reg == regSVR:
		writable = svrStored
	case reg >= regLVTTimer && reg <= regLVTError:
		writable = uint64(lvtWritable[(reg-regLVTTimer)/regStride]) | 1<<12 | lvtRemoteIRR
	case reg == regInitial:
		writable = 1<<32 - 1
	case reg == regDivide:
		writable = divideWritable
	default:
		return false
	}
	if v&^writable != 0 {
		return false
	}
	if reg == regSelfIPI {
		a.sendFixed(a, uint8(v))
		return true
	}
	return a.write(reg, uint32(v))
}

// setBase writes IA32_APIC_BASE. The modes change along SDM figure 11-27: disabled to
// xAPIC to x2APIC to disabled, and from xAPIC back to disabled.
func (a *APIC) setBase(v uint64) bool {
	const mode = baseEnable | baseX2APIC
	if v&^(mode|baseBSP) != Base {
		return false // reserved bits, or a page elsewhere, which is not offered
	}
	from, to := a.s.APICBase&mode, v&mode
	switch {
	case to == baseX2APIC,
		from == 0 && to == mode,
		from == mode && to == baseEnable:
		return false
	}
	a.s.APICBase = a.s.APICBase&^mode | to
	switch {
	case to == 0: // SDM 11.4.3: the state is lost
		a.clear()
	case to == mode && from != mode: // SDM 11.12.5.1: these do not exist any more
		a.s.LDR, a.s.DFR, a.s.ICR = 0, dfrFlat, a.s.ICR&(1<<icrDestShift-1)
	}
	return true
}
