package vmm

import (
	"errors"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// opening is the place where a guest lets interrupts in.
//
// A program that polls with interrupts off opens them for an instruction or two now and then:
// "sti; nop; nop; cli" is how iPXE keeps its clock going. KVM-PVM, which emulates such code,
// looks at the interrupt window only between batches of a thousand instructions, and each of the guest's
// exits begins a new batch: a loop that polls a device opens at the same instruction of the
// batch each time and never at its end, so that its timer's interrupt waits for seconds. Once a
// window has been seen, by chance, a breakpoint there finds it the next time, for as long as a vector
// waits. It is for hosts with KVM-PVM, guests without paging (whose code is emulated wherever it
// runs) and sources that take inputs anywhere.
type opening struct {
	place uint64 // linear address of an instruction before which a vector was let in
	known bool
	armed bool // the breakpoint is set
	hit   bool // the guest stands at it, and would hit it again at once
}

// awaitWindow has KVM_RUN return where the guest lets in the vector that waits for it.
//
// Where stops must have names the vector waits for the next one that has: where the window opens is
// not the same on two hosts.
func (m *Machine) awaitWindow() error {
	anywhere := m.source.Anywhere()
	m.run.SetInterruptWindow(anywhere || m.async != nil && !m.noWindow)
	o := &m.opening
	if !anywhere || m.run.Sync.Sregs.CR0&cr0PG != 0 {
		return m.disarm()
	}
	if !o.known || o.armed || o.hit {
		return nil
	}
	o.armed = true
	return m.vcpu.SetBreakpoint(o.place)
}

// forgetWindow undoes awaitWindow: nothing waits.
func (m *Machine) forgetWindow() error {
	m.run.SetInterruptWindow(false)
	return m.disarm()
}

func (m *Machine) disarm() error {
	if !m.opening.armed {
		return nil
	}
	m.opening.armed = false
	return m.vcpu.SetSingleStep(false)
}

// opened handles the return of KVM_RUN at the breakpoint or in an interrupt window. The next
// deliver injects what waits.
func (m *Machine) opened() error {
	o := &m.opening
	open := m.run.IfFlag != 0 && m.run.ReadyForInterruptInjection != 0
	if m.run.ExitReason == kvm.ExitDebug {
		o.hit, o.known = true, open // code that is there no more lets nothing in
		return m.disarm()
	}
	if !m.pvm || !m.source.Anywhere() || !open || m.run.Sync.Sregs.CR0&cr0PG != 0 {
		return nil
	}
	regs, err := m.vcpu.Regs()
	o.place, o.known = m.run.Sync.Sregs.CS.Base+regs.RIP, err == nil
	return errors.Join(err, m.disarm())
}
