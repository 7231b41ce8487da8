package vmm

import (
	"encoding/binary"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// This file takes a guest in 32-bit protected mode into its interrupt handlers and out
// of them, where KVM does it wrong. KVM-PVM, which emulates such code, pushes the frame of an
// interrupt as if the stack segment began at address 0: with another base it overwrites
// memory of the guest, or, where there is none, reports a triple fault. It does not know
// IRET there. Network boot programs run in such segments with interrupts on. What is done here
// is what they need: privilege level 0, 32-bit code and stack, no paging, no change of task.

// pvmModule is there on hosts with KVM-PVM.
const pvmModule = "/sys/module/kvm_pvm"

// Bits of the processor's registers (Intel SDM vol. 3, 2.3 to 2.5).
const (
	rflagsFixed = 1 << 1
	rflagsTF    = 1 << 8
	rflagsIF    = 1 << 9
	rflagsNT    = 1 << 14
	rflagsRF    = 1 << 16
	rflagsVM    = 1 << 17
	rflagsAll   = 0x3d7fd5 // what IRET loads at privilege level 0, but VM
	cr0PE       = 1 << 0
	cr0PG       = 1 << 31
	eferLMA     = 1 << 10

	selectorLow = 7 // of a selector: its privilege level and table
)

// Parts of a descriptor (SDM vol. 3, 3.4.5 and 6.11).
const (
	descriptorSize  = 8 // bytes
	gateInterrupt32 = 0xe
	gateTrap32      = 0xf
	typeAccessed    = 1 << 0
	typeExpandDown  = 1 << 2 // of a data segment
	typeCode        = 1 << 3

	frameSize = 12 // of an interrupt without a change of privilege: EIP, CS, EFLAGS
)

// inject delivers an interrupt that the guest can take.
func (m *Machine) inject(vector uint8) error {
	if s := &m.run.Sync.Sregs; m.pvm && s.CR0&cr0PE != 0 && s.SS.Base != 0 {
		if done, err := m.enterHandler(vector); done || err != nil {
			return err
		}
	}
	return m.vcpu.Interrupt(vector)
}

// in32 reports whether the guest is in the mode that this file is about.
func in32(r *kvm.Regs, s *kvm.Sregs) bool {
	return s.CR0&(cr0PE|cr0PG) == cr0PE && s.EFER&eferLMA == 0 && r.RFLAGS&(rflagsVM|rflagsNT) == 0 &&
		s.CS.Selector&selectorLow == 0 && s.CS.DB != 0 && s.SS.DB != 0 && s.SS.Typ&typeExpandDown == 0
}

// enterHandler does what the processor does with an interrupt (SDM vol. 3, 6.12.1): it goes
// to the handler through the vector's gate. It returns false, having changed nothing, where the processor
// would do anything else, such as raise a fault.
func (m *Machine) enterHandler(vector uint8) (bool, error) {
	regs, sregs, err := m.registers()
	if err != nil || !in32(&regs, &sregs) {
		return false, err
	}
	gate, ok := m.descriptor(sregs.IDT, uint32(vector)*descriptorSize)
	kind := gate >> 40 & 0x1f
	if !ok || gate>>47&1 == 0 || kind != gateInterrupt32 && kind != gateTrap32 {
		return false, nil
	}
	handler := uint32(gate&0xffff | gate>>32&0xffff0000)
	esp := uint32(regs.RSP) - frameSize
	if uint64(esp)+frameSize-1 > uint64(sregs.SS.Limit) {
		return false, nil
	}
	var frame [frameSize]byte
	binary.LittleEndian.PutUint32(frame[0:], uint32(regs.RIP))
	binary.LittleEndian.PutUint32(frame[4:], uint32(sregs.CS.Selector))
	binary.LittleEndian.PutUint32(frame[8:], uint32(regs.RFLAGS))
	stack := uint64(uint32(sregs.SS.Base) + esp)
	if !m.loadCode(&sregs, uint16(gate>>16), handler) || !m.mem.Contains(stack, frameSize) {
		return false, nil
	}
	if err := m.mem.Write(stack, frame[:]); err != nil {
		return false, err
	}
	regs.RIP, regs.RSP = uint64(handler), uint64(esp)
	regs.RFLAGS &^= rflagsTF | rflagsNT | rflagsRF
	if kind == gateInterrupt32 {
		regs.RFLAGS &^= rflagsIF
	}
	return true, m.resumeAt(&regs, &sregs)
}

// finishIRET carries out an IRET to the same privilege level (SDM vol. 2, IRET). It returns
// false, having changed nothing, if the instruction would do anything else.
func (m *Machine) finishIRET() (bool, error) {
	regs, sregs, err := m.registers()
	if err != nil || !in32(&regs, &sregs) {
		return false, err
	}
	var frame [frameSize]byte
	esp := uint32(regs.RSP)
	stack := uint64(uint32(sregs.SS.Base) + esp)
	if uint64(esp)+frameSize-1 > uint64(sregs.SS.Limit) || !m.mem.Contains(stack, frameSize) {
		return false, nil
	}
	if err := m.mem.Read(stack, frame[:]); err != nil {
		return false, err
	}
	eip, flags := binary.LittleEndian.Uint32(frame[0:]), uint64(binary.LittleEndian.Uint32(frame[8:]))
	if flags&rflagsVM != 0 || !m.loadCode(&sregs, binary.LittleEndian.Uint16(frame[4:]), eip) {
		return false, nil
	}
	regs.RIP, regs.RSP = uint64(eip), uint64(esp+frameSize)
	regs.RFLAGS = flags&rflagsAll | rflagsFixed
	events, err := m.vcpu.Events()
	if err != nil {
		return false, err
	}
	if events.N.Masked != 0 { // it ends the handling of an NMI
		events.N.Masked = 0
		if err := m.vcpu.SetEvents(&events); err != nil {
			return false, err
		}
	}
	return true, m.resumeAt(&regs, &sregs)
}

func (m *Machine) registers() (kvm.Regs, kvm.Sregs, error) {
	regs, err := m.vcpu.Regs()
	if err != nil {
		return kvm.Regs{}, kvm.Sregs{}, err
	}
	sregs, err := m.vcpu.Sregs()
	return regs, sregs, err
}

// resumeAt sets the registers after an instruction or an event that was finished here.
func (m *Machine) resumeAt(regs *kvm.Regs, sregs *kvm.Sregs) error {
	m.incomplete = false
	m.run.IfFlag = boolByte(regs.RFLAGS&rflagsIF != 0)
	m.run.ReadyForInterruptInjection = m.run.IfFlag
	if err := m.vcpu.SetSregs(sregs); err != nil {
		return err
	}
	return m.vcpu.SetRegs(regs)
}

// loadCode loads CS for a transfer to eip at privilege level 0, if it may be done.
func (m *Machine) loadCode(s *kvm.Sregs, selector uint16, eip uint32) bool {
	d, ok := m.descriptor(s.GDT, uint32(selector))
	typ := uint8(d >> 40 & 0xf)
	present, dpl, segment, db := d>>47&1 != 0, d>>45&3, d>>44&1 != 0, d>>54&1 != 0
	if !ok || selector == 0 || selector&selectorLow != 0 || !present || dpl != 0 || !segment || typ&typeCode == 0 || !db {
		return false
	}
	limit := uint32(d&0xffff | d>>32&0xf0000)
	if d>>55&1 != 0 {
		limit = limit<<12 | 0xfff
	}
	if eip > limit {
		return false
	}
	s.CS = kvm.Segment{
		Base: d>>16&0xffffff | d>>56<<24, Limit: limit, Selector: selector, Typ: typ | typeAccessed,
		Present: 1, S: 1, DB: 1, G: uint8(d >> 55 & 1), AVL: uint8(d >> 52 & 1),
	}
	return true
}

// descriptor reads a table's descriptor at an offset.
func (m *Machine) descriptor(table kvm.Descriptor, offset uint32) (uint64, bool) {
	if offset+descriptorSize-1 > uint32(table.Limit) {
		return 0, false
	}
	v, err := m.mem.Uint64(uint64(uint32(table.Base) + offset))
	return v, err == nil
}
