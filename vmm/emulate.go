package vmm

import (
	"fmt"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// This file is all that the program does about instructions that the host's KVM cannot
// emulate. KVM on VT-x and SVM runs guest code on the processor and never comes here but
// for an access to a device by an exotic instruction. KVM-PVM emulates guest kernel code
// and lacks a handful of instructions that firmware and boot programs use (docs/kvm.md); the ones
// here have an effect that is simple and exact. Each use is counted (Stats.Emulated).

// Opcodes of the helper.
const (
	opFWAIT = 0x9b
	opIRET  = 0xcf
)

// handleInternalError tries to finish an instruction that KVM could not; else the guest has crashed.
func (m *Machine) handleInternalError() error {
	e := m.run.Internal()
	m.incomplete = false
	regs, err := m.vcpu.Regs()
	if err != nil {
		return err
	}
	if e.SubError != kvm.InternalErrorEmulation {
		m.crash(fmt.Sprintf("KVM internal error %d at %#x", e.SubError, regs.RIP))
		return nil
	}
	var insn []byte
	if e.NData > 0 && e.Flags&1 != 0 {
		insn = e.InsnBytes[:min(int(e.InsnSize), len(e.InsnBytes))]
	}
	if len(insn) > 0 && insn[0] == opIRET {
		if done, err := m.finishIRET(); done || err != nil {
			m.observe(ExitRecord{Kind: KindEmulated, Addr: regs.RIP, Size: 1})
			m.stats.Emulated++
			return err
		}
	}
	n := 0
	if len(insn) > 0 {
		if n, err = m.emulateX87(insn, &regs); err != nil {
			return err
		}
	}
	if n == 0 {
		m.crash(fmt.Sprintf("KVM cannot emulate the instruction at %#x: % x", regs.RIP, insn))
		return nil
	}
	m.observe(ExitRecord{Kind: KindEmulated, Addr: regs.RIP, Size: n})
	m.stats.Emulated++
	regs.RIP += uint64(n)
	regs.RFLAGS &^= rflagsRF
	return m.vcpu.SetRegs(&regs)
}
