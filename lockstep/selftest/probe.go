package selftest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// The memory of a probe: a small slot for its program, and one for data.
const (
	probeSize  = 2 << 20
	probeCode  = 0x1000
	probeStack = 0x800
	dataBase   = 16 << 20
	dataSize   = 4 << 20
	dataSlot   = 1
)

// probePatience is how long a probe's program may run: it takes microseconds.
const probePatience = 5 * time.Second

// errStuck reports a probe whose program did not come to its end.
var errStuck = errors.New("the program of the probe does not come to its end")

// probe is a virtual machine with a program of a few instructions. It belongs to one goroutine, which
// newProbe locks to its thread until close.
type probe struct {
	sys  *kvm.System
	vm   *kvm.VM
	vcpu *kvm.VCPU
	page *kvm.Run
	mem  *memory.Memory
}

// probeOptions say what a probe has beside its program.
type probeOptions struct {
	msrs []uint32 // filter MSRs, all but these; nil: no filter
	data uint32   // flags of the data slot
}

// newProbe makes a probe in real mode, its program at probeCode.
func newProbe(device string, code []byte, o probeOptions) (p *probe, err error) {
	if device == "" {
		device = vmm.DefaultKVM
	}
	runtime.LockOSThread()
	p = &probe{}
	defer func() {
		if err != nil {
			p.close()
			p = nil
		}
	}()
	if p.sys, err = kvm.Open(device); err != nil {
		return p, err
	}
	if p.vm, err = p.sys.CreateVM(); err != nil {
		return p, err
	}
	if o.msrs != nil {
		if err = p.vm.FilterMSRs(o.msrs); err != nil {
			return p, err
		}
	}
	if p.mem, err = memory.New(memory.Extent{Size: probeSize}, memory.Extent{Base: dataBase, Size: dataSize}); err != nil {
		return p, err
	}
	flags := [...]uint32{0, dataSlot: o.data}
	for i, r := range p.mem.Regions() {
		if err = p.vm.SetMemory(uint32(i), r.Base, r.Bytes, flags[i]); err != nil {
			return p, err
		}
	}
	if err = p.mem.Write(probeCode, code); err != nil {
		return p, err
	}
	if p.vcpu, err = p.vm.CreateVCPU(0); err != nil {
		return p, err
	}
	p.page = p.vcpu.RunPage()
	return p, p.realMode()
}

// realMode starts the program in real mode, with all segments at 0.
func (p *probe) realMode() error {
	s, err := p.vcpu.Sregs()
	if err != nil {
		return err
	}
	s.CS.Base, s.CS.Selector = 0, 0
	if err := p.vcpu.SetSregs(&s); err != nil {
		return err
	}
	return p.vcpu.SetRegs(&kvm.Regs{RIP: probeCode, RSP: probeStack, RFLAGS: 2})
}

// The page tables of longMode: identity for the first GiB, in pages of 2 MiB.
const (
	tablePML4 = 0x2000
	tablePDPT = 0x3000
	tablePD   = 0x4000
	// pageBits: present, writable, user, accessed, dirty. With the latter two set before nothing but
	// the program itself writes.
	pageBits  = 1<<0 | 1<<1 | 1<<2 | 1<<5 | 1<<6
	pageLarge = 1 << 7
	largePage = 2 << 20
)

// longMode brings the probe to 64-bit mode with paging, at the privilege level.
func (p *probe) longMode(cpl uint8) error {
	entry := func(at, v uint64) error {
		return p.mem.Write(at, binary.LittleEndian.AppendUint64(nil, v))
	}
	errs := []error{entry(tablePML4, tablePDPT|pageBits), entry(tablePDPT, tablePD|pageBits)}
	for i := range uint64(512) {
		errs = append(errs, entry(tablePD+8*i, i*largePage|pageBits|pageLarge))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	s, err := p.vcpu.Sregs()
	if err != nil {
		return err
	}
	code := kvm.Segment{Limit: 0xffffffff, Selector: 8 | uint16(cpl), Typ: 11, Present: 1, DPL: cpl, S: 1, L: 1, G: 1}
	data := kvm.Segment{Limit: 0xffffffff, Selector: 16 | uint16(cpl), Typ: 3, Present: 1, DPL: cpl, DB: 1, S: 1, G: 1}
	s.CS, s.DS, s.ES, s.FS, s.GS, s.SS = code, data, data, data, data, data
	s.CR3 = tablePML4
	s.CR4 |= 1 << 5               // PAE
	s.CR0 |= 1<<0 | 1<<16 | 1<<31 // protection, write protection, paging
	s.EFER |= 1<<8 | 1<<10        // long mode enabled and active
	return p.vcpu.SetSregs(&s)
}

// enter runs the guest to its next exit. Signals do not end it; a program that runs for too long is an error.
func (p *probe) enter() (reason uint32, err error) {
	var late atomic.Bool
	pid, tid := os.Getpid(), unix.Gettid()
	t := time.AfterFunc(probePatience, func() {
		late.Store(true)
		p.page.SetImmediateExit(true)
		_ = unix.Tgkill(pid, tid, unix.SIGURG)
	})
	defer t.Stop()
	for {
		switch errno := p.vcpu.Run(); errno {
		case 0:
			return p.page.ExitReason, nil
		case unix.EINTR, unix.EAGAIN:
			if late.Load() {
				p.page.SetImmediateExit(false)
				return 0, errStuck
			}
		default:
			return 0, fmt.Errorf("run vCPU: %w", errno)
		}
	}
}

// expect runs the guest to its next exit, which must have the reason.
func (p *probe) expect(want uint32) error {
	got, err := p.enter()
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("the program of the probe ends with KVM exit reason %d, want %d", got, want)
	}
	return nil
}

// expectOut runs the guest to an OUT of one byte to the port, and returns the byte.
func (p *probe) expectOut(port uint16) (byte, error) {
	if err := p.expect(kvm.ExitIO); err != nil {
		return 0, err
	}
	io := p.page.IO()
	data := p.vcpu.IOData(io)
	if io.Out != 1 || io.Port != port || len(data) != 1 {
		return 0, fmt.Errorf("the probe makes an I/O exit on port %#x, want OUT to port %#x", io.Port, port)
	}
	return data[0], nil
}

// complete finishes the last exit without entering the guest further.
func (p *probe) complete() error {
	p.page.SetImmediateExit(true)
	defer p.page.SetImmediateExit(false)
	switch errno := p.vcpu.Run(); errno {
	case unix.EINTR:
		return nil
	case 0:
		return fmt.Errorf("KVM_RUN with immediate_exit makes an exit (reason %d) rather than return EINTR", p.page.ExitReason)
	default:
		return fmt.Errorf("KVM_RUN with immediate_exit: %w", errno)
	}
}

func (p *probe) close() {
	if p.vcpu != nil {
		_ = p.vcpu.Close()
	}
	if p.vm != nil {
		_ = p.vm.Close()
	}
	if p.mem != nil {
		_ = p.mem.Close()
	}
	if p.sys != nil {
		_ = p.sys.Close()
	}
	runtime.UnlockOSThread()
}
