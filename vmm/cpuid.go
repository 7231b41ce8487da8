package vmm

import (
	"sort"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// CPUID leaves and bits (Intel SDM vol. 2, CPUID).
const (
	leafFeatures   = 1
	leafCacheIntel = 4
	leafMWAIT      = 5
	leafThermal    = 6
	leafExtended   = 7
	leafPMU        = 0xa
	leafTopology   = 0xb
	leafXSave      = 0xd
	leafSGX        = 0x12
	leafPT         = 0x14
	leafTSC        = 0x15
	leafFrequency  = 0x16
	leafTile       = 0x1d
	leafTopologyV2 = 0x1f
	leafHypervisor = 0x4000_0000
	leafHVEnd      = 0x4000_ffff
	leafExtFeature = 0x8000_0001
	leafAPM        = 0x8000_0007
	leafExtSizes   = 0x8000_0008
	leafSVM        = 0x8000_000a
	leafExtTopo    = 0x8000_001e

	// Leaf 1 ECX.
	ecxMONITOR    = 1 << 3
	ecxVMX        = 1 << 5
	ecxSMX        = 1 << 6
	ecxEST        = 1 << 7
	ecxTM2        = 1 << 8
	ecxPDCM       = 1 << 15
	ecxX2APIC     = 1 << 21
	ecxTSCDL      = 1 << 24
	ecxRDRAND     = 1 << 30
	ecxHypervisor = 1 << 31
	// Leaf 1 EDX.
	edxHTT  = 1 << 28
	edxACPI = 1 << 22
	edxDS   = 1 << 21
	edxTM   = 1 << 29
	edxPBE  = 1 << 31
	// Leaf 7.0.
	ebxTSCAdjust = 1 << 1
	ebxSGX       = 1 << 2
	ebxHLE       = 1 << 4
	ebxRTM       = 1 << 11
	ebxRDSEED    = 1 << 18
	ebxPT        = 1 << 25
	ecxWAITPKG   = 1 << 5
	ecxRDPID     = 1 << 22
	ecxSGXLC     = 1 << 30
	edxARCHCAP   = 1 << 29
	edxCORECAP   = 1 << 30
	edxPCONFIG   = 1 << 18
	edxUINTR     = 1 << 5
	// Leaf 0xd.1 EAX: XSAVEOPT, XSAVEC, XSAVES, XFD.
	eaxXSaveVariants = 1<<0 | 1<<1 | 1<<3 | 1<<4
	// Leaf 0x80000001.
	ecxSVM    = 1 << 2
	edxRDTSCP = 1 << 27
	// Leaf 0x80000007 EDX: invariant TSC.
	edxInvariantTSC = 1 << 8
)

// hypervisorName is what the guest reads at leaf 0x4000_0000: EBX, ECX, EDX spell
// "ftvmmftvmm".
var hypervisorName = [3]uint32{0x6d767466, 0x7674666d, 0x00006d6d}

// CPUIDTable makes the one table that a guest's CPUID answers from: what the host's KVM
// supports, less everything whose result differs between runs or hosts (docs/determinism.md, "Time"), with
// the vCPU's own APIC id in place of that of the processor that the host happened to ask on.
// Some hosts show a bit that is cleared here all the same (docs/kvm.md).
func CPUIDTable(supported []kvm.CPUIDEntry, apicID uint32) []kvm.CPUIDEntry {
	var out []kvm.CPUIDEntry
	for _, e := range supported {
		switch {
		case e.Function >= leafHypervisor && e.Function <= leafHVEnd,
			e.Function == leafSGX, e.Function == leafPT, e.Function == leafTSC, e.Function == leafFrequency,
			e.Function == leafTile, e.Function == leafTopologyV2, e.Function == leafSVM:
			continue
		}
		switch e.Function {
		case leafFeatures:
			e.Ebx = e.Ebx&0x0000ffff | 1<<16 | apicID<<24 // one logical processor, initial APIC id
			e.Ecx &^= ecxMONITOR | ecxVMX | ecxSMX | ecxEST | ecxTM2 | ecxPDCM | ecxTSCDL | ecxRDRAND
			e.Ecx |= ecxHypervisor | ecxX2APIC
			e.Edx &^= edxHTT | edxACPI | edxDS | edxTM | edxPBE
		case leafCacheIntel:
			e.Eax &= 0x00003fff // no sharing between cores or threads
		case leafMWAIT, leafThermal, leafPMU:
			e.Eax, e.Ebx, e.Ecx, e.Edx = 0, 0, 0, 0
		case leafExtended:
			if e.Index == 0 {
				e.Ebx &^= ebxTSCAdjust | ebxSGX | ebxHLE | ebxRTM | ebxRDSEED | ebxPT
				e.Ecx &^= ecxWAITPKG | ecxRDPID | ecxSGXLC
				e.Edx &^= edxARCHCAP | edxCORECAP | edxPCONFIG | edxUINTR
			}
		case leafTopology:
			// One thread, one core; EDX is the x2APIC id.
			e.Eax, e.Ebx, e.Ecx, e.Edx = 0, 0, e.Index, apicID
		case leafXSave:
			if e.Index == 1 {
				e.Eax &^= eaxXSaveVariants
			}
		case leafExtFeature:
			e.Ecx &^= ecxSVM
			e.Edx &^= edxRDTSCP
		case leafAPM:
			e.Edx &^= edxInvariantTSC
		case leafExtSizes:
			e.Ecx &^= 0xf0ff // AMD: one core (APM vol. 3, E.4.7)
		case leafExtTopo:
			e.Eax, e.Ebx, e.Ecx, e.Edx = apicID, 0, 0, 0
		}
		out = append(out, e)
	}
	out = append(out, kvm.CPUIDEntry{
		Function: leafHypervisor, Eax: leafHypervisor,
		Ebx: hypervisorName[0], Ecx: hypervisorName[1], Edx: hypervisorName[2],
	})
	sort.SliceStable(out, func(i, j int) bool {
		if out[i].Function != out[j].Function {
			return out[i].Function < out[j].Function
		}
		return out[i].Index < out[j].Index
	})
	return out
}
