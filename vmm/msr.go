package vmm

import (
	"github.com/ftvmm/ftvmm/devices"
)

// Model-specific registers (Intel SDM vol. 4).
const (
	msrTSC           = 0x10
	msrPlatformID    = 0x17
	msrAPICBase      = 0x1b
	msrEBLPowerOn    = 0x2a
	msrSMICount      = 0x34
	msrFeatureCtl    = 0x3a
	msrTSCAdjust     = 0x3b
	msrSpecCtrl      = 0x48
	msrPredCmd       = 0x49
	msrUcodeRev      = 0x8b
	msrFSBFreq       = 0xcd
	msrPlatformInfo  = 0xce
	msrMTRRCap       = 0xfe
	msrArchCap       = 0x10a
	msrFlushCmd      = 0x10b
	msrMiscFeatures  = 0x140
	msrSysenterCS    = 0x174
	msrSysenterESP   = 0x175
	msrSysenterEIP   = 0x176
	msrMCGCap        = 0x179
	msrMCGStatus     = 0x17a
	msrPerfStatus    = 0x198
	msrPerfCtl       = 0x199
	msrThermStatus   = 0x19c
	msrMiscEnable    = 0x1a0
	msrDebugCtl      = 0x1d9
	msrMTRRPhysBase0 = 0x200
	msrMTRRFix64K    = 0x250
	msrMTRRFix16K    = 0x258
	msrMTRRFix4K     = 0x268
	msrPAT           = 0x277
	msrMTRRDefType   = 0x2ff
	msrRAPLUnit      = 0x606
	msrX2APICFirst   = 0x800
	msrX2APICLast    = 0x8ff
	msrEFER          = 0xc0000080
	msrSTAR          = 0xc0000081
	msrLSTAR         = 0xc0000082
	msrCSTAR         = 0xc0000083
	msrFMASK         = 0xc0000084
	msrFSBase        = 0xc0000100
	msrGSBase        = 0xc0000101
	msrKernelGSBase  = 0xc0000102
	msrAMDSysCfg     = 0xc0010010
	msrAMDHwcr       = 0xc0010015
	mtrrVariable     = 8 // pairs of variable MTRRs that KVM has
)

// kernelMSRs are the registers that KVM itself carries out, and that are saved with the
// vCPU: those that select entry points, segment bases and memory types. Every other MSR comes to
// [Machine.readMSR] and [Machine.writeMSR].
var kernelMSRs = func() []uint32 {
	l := []uint32{
		msrSysenterCS, msrSysenterESP, msrSysenterEIP, msrPAT, msrMTRRDefType, msrMiscEnable,
		msrMTRRFix64K, msrMTRRFix16K, msrMTRRFix16K + 1,
		msrEFER, msrSTAR, msrLSTAR, msrCSTAR, msrFMASK, msrFSBase, msrGSBase, msrKernelGSBase,
	}
	for i := uint32(0); i < 8; i++ {
		l = append(l, msrMTRRFix4K+i)
	}
	for i := uint32(0); i < 2*mtrrVariable; i++ {
		l = append(l, msrMTRRPhysBase0+i)
	}
	return l
}()

// virtualTSCHz is the rate of IA32_TSC when it is read as an MSR, which is a function of
// virtual time. RDTSC, the instruction, is the processor's own (docs/determinism.md, "Time").
const virtualTSCHz = 1_000_000_000

// fixedMSRs answer reads with a constant, the same on every host, and take writes without
// effect; those that are not here and have no other rule raise #GP, as on a processor that
// lacks them.
var fixedMSRs = map[uint32]uint64{
	msrPlatformID: 0, msrEBLPowerOn: 0, msrSMICount: 0,
	msrFeatureCtl: 1, // locked, VMX off
	msrTSCAdjust:  0, msrSpecCtrl: 0, msrPredCmd: 0, msrFlushCmd: 0,
	msrUcodeRev: 1 << 32, // a revision that no erratum check finds too old to run
	msrFSBFreq:  0, msrPlatformInfo: 0, msrArchCap: 0, msrMiscFeatures: 0,
	msrMTRRCap: 1<<10 | 1<<8 | mtrrVariable, // write-combining, fixed ranges
	msrMCGCap:  0, msrMCGStatus: 0, msrPerfStatus: 0, msrPerfCtl: 0, msrThermStatus: 0,
	msrDebugCtl: 0, msrRAPLUnit: 0, msrAMDSysCfg: 0, msrAMDHwcr: 0,
}

// msrNeedsTime says whether the access depends on the present time.
func (m *Machine) msrNeedsTime(index uint32, write bool) bool {
	return index == msrTSC || m.apic.NeedsTimeMSR(index, write)
}

// readMSR carries out RDMSR; false raises #GP.
func (m *Machine) readMSR(index uint32) (uint64, bool) {
	switch {
	case index == msrTSC:
		return devices.ScaleTime(m.clock.Now(), virtualTSCHz), true
	case index == msrAPICBase, index >= msrX2APICFirst && index <= msrX2APICLast:
		return m.apic.ReadMSR(index)
	}
	v, ok := fixedMSRs[index]
	return v, ok
}

// writeMSR carries out WRMSR; false raises #GP.
func (m *Machine) writeMSR(index uint32, v uint64) bool {
	switch {
	case index == msrTSC:
		return true // the virtual clock cannot be set
	case index == msrAPICBase, index >= msrX2APICFirst && index <= msrX2APICLast:
		return m.apic.WriteMSR(index, v)
	}
	_, ok := fixedMSRs[index]
	return ok
}
