package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// The names of checks that Conclude looks for.
const (
	checkKind       = "host.kind"
	checkNested     = "host.nested"
	checkCompletion = "kvm.completion"
	checkSyncRegs   = "kvm.sync-regs"
	checkMSRs       = "kvm.msr-filter"
	checkInterrupts = "kvm.interrupts"
	checkDirtyLog   = "kvm.dirty-log"
	checkStats      = "kvm.statistics"
	checkTSC        = "kvm.tsc"
	checkCounter    = "kvm.counter"
	checkVCPUs      = "kvm.vcpus"
	checkLanding    = "guest.landing"
	guestPrefix     = "guest."
)

// Host returns the checks of what the host's kernel offers. They take less than a second.
func Host() []Check {
	return []Check{
		{Name: checkKind, Run: hostKind},
		{Name: checkNested, Run: hostNested},
		{Name: checkCompletion, Run: completion},
		{Name: checkSyncRegs, Run: syncRegs},
		{Name: checkMSRs, Run: msrFilter},
		{Name: checkInterrupts, Run: interrupts},
		{Name: checkDirtyLog, Run: dirtyLog},
		{Name: checkStats, Run: statistics},
		{Name: checkTSC, Run: tscControl},
		{Name: checkCounter, Run: counter},
		{Name: checkVCPUs, Run: vcpus},
	}
}

// Open tells whether there is a KVM to check. Its error is one of package kvm.
func Open(device string) error {
	if device == "" {
		device = vmm.DefaultKVM
	}
	s, err := kvm.Open(device)
	if err != nil {
		return err
	}
	return s.Close()
}

const newerKernel = "use a newer Linux kernel on the host"

// hostKind tells which of KVM's implementations runs guests here: what is known about
// hosts in general is known by kind.
func hostKind(context.Context, *Env) Row {
	release := "unknown"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	row := Row{State: Information, Meaning: "recordings and pairs need hosts of the same kind"}
	cpu := cpuInfo("model name")
	for _, k := range []struct{ module, value, name string }{
		// KVM-PVM first: where it is loaded it is what offers the device.
		{"kvm_pvm", "pvm", "KVM-PVM, virtualisation in software"},
		{"kvm_intel", "vmx", "Intel VT-x"},
		{"kvm_amd", "svm", "AMD-V"},
	} {
		if _, err := os.Stat("/sys/module/" + k.module); err == nil {
			row.Code, row.Value = "kvm-"+k.value, k.value
			row.Found = fmt.Sprintf("%s on %s, Linux %s", k.name, cpu, release)
			return row
		}
	}
	row.State, row.Code = Unknown, "kvm-kind-unknown"
	row.Found = fmt.Sprintf("no module of KVM that is known here, on %s, Linux %s", cpu, release)
	row.Remedy = "none is needed if all other rows are good; a KVM that is built into the kernel shows no module"
	return row
}

// cpuInfo returns a field of the first processor in /proc/cpuinfo, "?" if there is none.
func cpuInfo(field string) string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "?"
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == field {
			return strings.TrimSpace(v)
		}
	}
	return "?"
}

// hostNested tells whether the host is itself a virtual machine.
func hostNested(context.Context, *Env) Row {
	flags := " " + cpuInfo("flags") + " "
	switch {
	case flags == " ? ":
		return Row{
			State: Unknown, Code: "nested-unknown", Found: "/proc/cpuinfo does not tell the processor's flags",
			Meaning: "whether the host is itself a virtual machine is not known",
		}
	case strings.Contains(flags, " hypervisor "):
		return Row{
			State: Information, Code: "nested", Value: "nested", Found: "the host is itself a virtual machine",
			Meaning: "its processors stop at another's will, and two hosts on one machine die together",
			Remedy:  "for a pair in production, take two machines",
		}
	}
	return Row{
		State: Good, Code: "bare-metal", Value: "none", Found: "the host is no virtual machine",
		Meaning: "its processors are its own",
	}
}

const port = 0x11 // of the probes; a byte is all that goes through it

// completion checks that immediate_exit finishes the last exit and goes no further: the ground of every
// stop that is saved, cut or interrupted.
func completion(_ context.Context, e *Env) Row {
	const answer = 0xa7
	row := Row{
		State: Good, Code: "completion-exact", Found: "an IN is completed without an instruction more",
		Meaning: "a guest can be stopped, saved and interrupted at every exit",
	}
	err := func() error {
		p, err := newProbe(e.KVM, []byte{
			0xe4, port, // in al, port
			0xb4, 0x5b, // mov ah, 0x5b
			0xf4, // hlt
		}, probeOptions{})
		if err != nil {
			return err
		}
		defer p.close()
		if err := p.expect(kvm.ExitIO); err != nil {
			return err
		}
		data := p.vcpu.IOData(p.page.IO())
		if len(data) != 1 {
			return fmt.Errorf("an IN of a byte has %d bytes", len(data))
		}
		data[0] = answer
		if err := p.complete(); err != nil {
			return err
		}
		r, err := p.vcpu.Regs()
		if err != nil {
			return err
		}
		if r.RAX != answer || r.RIP != probeCode+2 {
			return fmt.Errorf("after the completion of IN rax is %#x, rip %#x, want %#x, %#x", r.RAX, r.RIP, answer, probeCode+2)
		}
		return p.expect(kvm.ExitHLT)
	}()
	if err != nil {
		row = Row{
			State: Error, Code: "completion-inexact", Found: err.Error(),
			Meaning: "a guest cannot be saved, recorded or protected", Remedy: newerKernel,
		}
	}
	return row
}

// syncRegs checks that the registers in the shared page are those of the vCPU: they go into the digest.
func syncRegs(_ context.Context, e *Env) Row {
	var caps int
	err := func() error {
		p, err := newProbe(e.KVM, []byte{
			0xb8, 0x34, 0x12, // mov ax, 0x1234
			0xf9,       // stc
			0xe6, port, // out port, al
			0xf4,
		}, probeOptions{})
		if err != nil {
			return err
		}
		defer p.close()
		caps = p.sys.Check(kvm.CapSyncRegs)
		p.page.ValidRegs = kvm.SyncRegsBit
		if _, err := p.expectOut(port); err != nil {
			return err
		}
		r, err := p.vcpu.Regs()
		if err != nil {
			return err
		}
		if p.page.Sync.Regs != r || r.RAX != 0x1234 {
			return fmt.Errorf("the shared page has %+v, the vCPU %+v", p.page.Sync.Regs, r)
		}
		return nil
	}()
	if err != nil {
		return Row{
			State: Error, Code: "sync-regs-wrong", Found: err.Error(),
			Meaning: "two runs of a guest cannot be compared", Remedy: newerKernel,
		}
	}
	return Row{
		State: Good, Code: "sync-regs-exact", Found: fmt.Sprintf("classes %#x; registers at an exit are those of the vCPU", caps),
		Meaning: "registers are compared at every exit, at no cost",
	}
}

// msrFilter checks that RDMSR and WRMSR come to this program: clocks among the MSRs must.
func msrFilter(_ context.Context, e *Env) Row {
	const msrTSC, low, high = 0x10, 0x89abcdef, 0x01234567
	err := func() error {
		p, err := newProbe(e.KVM, []byte{
			0x66, 0xb9, msrTSC, 0, 0, 0, // mov ecx, IA32_TSC
			0x0f, 0x32, // rdmsr
			0x0f, 0x30, // wrmsr
			0xf4,
		}, probeOptions{msrs: []uint32{}})
		if err != nil {
			return err
		}
		defer p.close()
		if err := p.expect(kvm.ExitRDMSR); err != nil {
			return err
		}
		m := p.page.MSR()
		if m.Index != msrTSC {
			return fmt.Errorf("RDMSR of %#x arrives as %#x", msrTSC, m.Index)
		}
		m.Data, m.Error = high<<32|low, 0
		if err := p.expect(kvm.ExitWRMSR); err != nil {
			return err
		}
		if m := p.page.MSR(); m.Index != msrTSC || m.Data != high<<32|low {
			return fmt.Errorf("WRMSR of %#x to %#x arrives as %#x to %#x", uint64(high<<32|low), msrTSC, m.Data, m.Index)
		}
		return nil
	}()
	if err != nil {
		return Row{
			State: Error, Code: "msr-filter-fails", Found: err.Error(),
			Meaning: "a guest would read this host's clocks and identity from MSRs: it cannot be recorded or protected", Remedy: newerKernel,
		}
	}
	return Row{
		State: Good, Code: "msr-filter-works", Found: "RDMSR and WRMSR of IA32_TSC are answered by this program",
		Meaning: "a guest that reads its clocks from MSRs is the same on both hosts",
	}
}

// interrupts checks the delivery of an interrupt without an interrupt controller in the kernel, and the
// exit when a guest begins to take them.
func interrupts(_ context.Context, e *Env) Row {
	const vector, handler, done, mark = 0x20, 0x1100, 0x12, 0x5a
	err := func() error {
		p, err := newProbe(e.KVM, []byte{
			0xe6, port, // out port, al: interrupts are off
			0xfb,       // sti
			0x90,       // nop: sti takes effect after it
			0xeb, 0xfe, // jmp $
		}, probeOptions{})
		if err != nil {
			return err
		}
		defer p.close()
		// The vector's entry in the real-mode table, 0000:handler, and the handler: mov al, mark; out done, al; iret.
		if err := errors.Join(p.mem.PutUint32(vector*4, handler), p.mem.Write(handler, []byte{0xb0, mark, 0xe6, done, 0xcf})); err != nil {
			return err
		}
		if _, err := p.expectOut(port); err != nil {
			return err
		}
		p.page.SetInterruptWindow(true)
		if err := p.complete(); err != nil {
			return err
		}
		if p.page.IfFlag != 0 || p.page.ReadyForInterruptInjection != 0 {
			return errors.New("the guest is said to take interrupts before STI")
		}
		if err := p.expect(kvm.ExitIRQWindowOpen); err != nil {
			return fmt.Errorf("interrupt window: %w", err)
		}
		if p.page.IfFlag == 0 || p.page.ReadyForInterruptInjection == 0 {
			return errors.New("the window is open and the guest is said not to take interrupts")
		}
		p.page.SetInterruptWindow(false)
		if err := p.vcpu.Interrupt(vector); err != nil {
			return err
		}
		if v, err := p.expectOut(done); err != nil || v != mark {
			return errors.Join(err, fmt.Errorf("the handler writes %#x, want %#x", v, mark))
		}
		// The frame on the stack: IP, CS, FLAGS.
		frame, err := p.mem.View(probeStack-6, 6)
		if err != nil {
			return err
		}
		if ip := int(frame[0]) | int(frame[1])<<8; ip != probeCode+3 && ip != probeCode+4 || !bytes.Equal(frame[2:4], []byte{0, 0}) || frame[5]&2 == 0 {
			return fmt.Errorf("the interrupt's frame is % x", frame)
		}
		return nil
	}()
	if err != nil {
		return Row{
			State: Error, Code: "interrupts-fail", Found: err.Error(),
			Meaning: "guests cannot run: this program has the interrupt controllers, not the kernel", Remedy: newerKernel,
		}
	}
	return Row{
		State: Good, Code: "interrupts-work", Found: "the window opens after STI, and the vector arrives",
		Meaning: "interrupts reach a guest where this program decides",
	}
}

// statistics checks whether the kernel gives figures of a vCPU.
func statistics(_ context.Context, e *Env) Row {
	p, err := newProbe(e.KVM, []byte{0xf4}, probeOptions{})
	if err != nil {
		return broken("statistics-unknown", err, "whether the kernel counts emulated instructions is not known")
	}
	defer p.close()
	row := Row{
		State: Information, Code: "statistics-none", Found: "the kernel gives no statistics of a vCPU by file descriptor (KVM_CAP_BINARY_STATS_FD)",
		Meaning: "emulated instructions cannot be counted", Remedy: "Linux 5.14 and later have them",
	}
	if p.sys.Check(kvm.CapBinaryStatsFD) == 0 {
		return row
	}
	const name = "insn_emulation"
	s, err := p.vcpu.Statistic(name)
	switch {
	case errors.Is(err, kvm.ErrFeature):
		row.Code, row.Found = "statistics-other", err.Error()
		return row
	case err != nil:
		return broken("statistics-unknown", err, row.Meaning)
	}
	defer s.Close()
	v, err := s.Value()
	if err != nil {
		return broken("statistics-unknown", err, row.Meaning)
	}
	return Row{
		State: Good, Code: "statistics-work", Found: fmt.Sprintf("%s is kept for each vCPU (%d for a new one)", name, v),
		Meaning: "emulated instructions can be counted",
	}
}

// vcpus tells how many vCPUs a guest may have, as far as the kernel goes.
func vcpus(_ context.Context, e *Env) Row {
	device := e.KVM
	if device == "" {
		device = vmm.DefaultKVM
	}
	s, err := kvm.Open(device)
	if err != nil {
		return broken("vcpus-unknown", err, "how many vCPUs a guest may have is not known")
	}
	defer s.Close()
	soft, hard := s.Check(kvm.CapNrVCPUs), s.Check(kvm.CapMaxVCPUs)
	return Row{
		State: Information, Code: "vcpus", Value: fmt.Sprint(soft),
		Found:   fmt.Sprintf("the kernel recommends up to %d vCPUs a guest, and refuses more than %d; this version runs %d", soft, hard, vmm.MaxCPUs),
		Meaning: "a guest with more than one vCPU cannot run in lockstep: level 3 protects it by checkpoints",
	}
}
