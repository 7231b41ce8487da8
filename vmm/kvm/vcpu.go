package kvm

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Register types with the kernel's layout.
type (
	Regs       = gokvm.Regs
	Sregs      = gokvm.Sregs
	Segment    = gokvm.Segment
	Descriptor = gokvm.Descriptor
	Events     = gokvm.VCPUEvents
	DebugRegs  = gokvm.DebugRegs
	MSREntry   = gokvm.MSREntry
	CPUIDEntry = gokvm.CPUIDEntry2
)

// Exit reasons of struct kvm_run.
const (
	ExitUnknown       = 0
	ExitException     = 1
	ExitIO            = 2
	ExitHypercall     = 3
	ExitDebug         = 4
	ExitHLT           = 5
	ExitMMIO          = 6
	ExitIRQWindowOpen = 7
	ExitShutdown      = 8
	ExitFailEntry     = 9
	ExitIntr          = 10
	ExitSetTPR        = 11
	ExitInternalError = 17
	ExitRDMSR         = 29
	ExitWRMSR         = 30
)

// InternalErrorEmulation is the suberror of an [ExitInternalError] for an instruction that
// KVM cannot emulate.
const InternalErrorEmulation = 1

// Run is struct kvm_run, the page that kernel and user space share for one vCPU.
// Fields that the kernel reads while the vCPU runs are accessed atomically.
type Run struct {
	RequestInterruptWindow uint8
	immediateExit          uint8
	_                      [6]uint8

	ExitReason                 uint32
	ReadyForInterruptInjection uint8
	IfFlag                     uint8
	Flags                      uint16

	CR8      uint64
	APICBase uint64

	union [256]byte

	ValidRegs uint64 // register classes that every exit copies into Sync
	DirtyRegs uint64 // register classes that the next entry takes from Sync
	Sync      SyncRegs
}

// SyncRegs is struct kvm_sync_regs.
type SyncRegs struct {
	Regs   Regs
	Sregs  Sregs
	Events Events
}

// Classes of [Run.ValidRegs] and [Run.DirtyRegs].
const (
	SyncRegsBit   = 1
	SyncSregsBit  = 2
	SyncEventsBit = 4
)

// IOExit is the union's part for [ExitIO].
type IOExit struct {
	Out        uint8 // 1 for a write by the guest
	Size       uint8 // bytes of one item: 1, 2 or 4
	Port       uint16
	Count      uint32 // items (string instructions move several at once)
	DataOffset uint64 // of the items, from the start of the run page
}

// MMIOExit is the union's part for [ExitMMIO].
type MMIOExit struct {
	Addr  uint64 // guest-physical
	Data  [8]byte
	Len   uint32 // bytes, 1 to 8
	Write uint8
}

// MSRExit is the union's part for [ExitRDMSR] and [ExitWRMSR].
type MSRExit struct {
	Error  uint8 // set to 1 by user space to raise #GP
	_      [7]uint8
	Reason uint32
	Index  uint32
	Data   uint64
}

// InternalExit is the union's part for [ExitInternalError].
type InternalExit struct {
	SubError  uint32
	NData     uint32
	Flags     uint64 // bit 0: Insn is valid
	InsnSize  uint8
	InsnBytes [15]uint8
}

// IO returns the union as an I/O exit.
func (r *Run) IO() *IOExit { return (*IOExit)(unsafe.Pointer(&r.union)) }

// MMIO returns the union as a memory-mapped I/O exit.
func (r *Run) MMIO() *MMIOExit { return (*MMIOExit)(unsafe.Pointer(&r.union)) }

// MSR returns the union as an MSR exit.
func (r *Run) MSR() *MSRExit { return (*MSRExit)(unsafe.Pointer(&r.union)) }

// Internal returns the union as an internal error.
func (r *Run) Internal() *InternalExit { return (*InternalExit)(unsafe.Pointer(&r.union)) }

// FailEntryReason returns the hardware's reason of an [ExitFailEntry].
func (r *Run) FailEntryReason() uint64 { return *(*uint64)(unsafe.Pointer(&r.union)) }

// immediateExitWord is the 32-bit word that holds immediate_exit in its second byte, for
// atomic access from the kicking goroutine; the other bytes are only written by the owner
// of the vCPU, atomically too.
func (r *Run) immediateExitWord() *uint32 { return (*uint32)(unsafe.Pointer(r)) }

const (
	wordWindow    = 1 << 0
	wordImmediate = 1 << 8
)

// SetImmediateExit makes the present or next KVM_RUN return with EINTR before it enters
// the guest, having completed the exit before. Any goroutine may call it.
func (r *Run) SetImmediateExit(on bool) { r.setBit(wordImmediate, on) }

// SetInterruptWindow asks for an exit as soon as the guest can take an interrupt.
func (r *Run) SetInterruptWindow(on bool) {
	if (r.RequestInterruptWindow != 0) != on {
		r.setBit(wordWindow, on)
	}
}

func (r *Run) setBit(bit uint32, on bool) {
	if on {
		atomic.OrUint32(r.immediateExitWord(), bit)
	} else {
		atomic.AndUint32(r.immediateExitWord(), ^bit)
	}
}

// VCPU is one virtual processor. All methods but [Run.SetImmediateExit] belong to the one
// goroutine, locked to its thread, that runs it.
type VCPU struct {
	fd        int
	run       *Run
	page      []byte
	xsaveSize int
}

// CreateVCPU makes virtual processor number id (its APIC id).
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, err := ioctl(vm.fd, ioCreateVCPU, uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("kvm: create vCPU %d: %w", id, err)
	}
	page, err := unix.Mmap(int(fd), 0, vm.sys.mmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(int(fd))
		return nil, fmt.Errorf("kvm: map the run page of vCPU %d: %w", id, err)
	}
	return &VCPU{fd: int(fd), run: (*Run)(unsafe.Pointer(&page[0])), page: page, xsaveSize: vm.XSaveSize()}, nil
}

// Close destroys the vCPU.
func (v *VCPU) Close() error {
	err := unix.Munmap(v.page)
	if e := unix.Close(v.fd); err == nil {
		err = e
	}
	return err
}

// RunPage returns the page shared with the kernel.
func (v *VCPU) RunPage() *Run { return v.run }

// IOData returns the bytes of an I/O exit's items, or nil if the kernel's numbers lie
// outside the page.
func (v *VCPU) IOData(io *IOExit) []byte {
	n := uint64(io.Size) * uint64(io.Count)
	if io.DataOffset > uint64(len(v.page)) || n > uint64(len(v.page))-io.DataOffset {
		return nil
	}
	return v.page[io.DataOffset : io.DataOffset+n]
}

// Run enters the guest and returns at its next exit: 0 with Run.ExitReason set, or
// unix.EINTR when a signal or [Run.SetImmediateExit] ended it.
func (v *VCPU) Run() unix.Errno {
	// entersyscall (unix.Syscall, not RawSyscall) lets the garbage collector and other
	// goroutines use this processor's slot while the guest runs.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.fd), ioRun, 0)
	return errno
}

func (v *VCPU) do(what string, op uintptr, p unsafe.Pointer) error {
	if _, err := ioctlAt(v.fd, op, p); err != nil {
		return fmt.Errorf("kvm: %s: %w", what, err)
	}
	return nil
}

// Regs reads the general registers.
func (v *VCPU) Regs() (r Regs, err error) {
	err = v.do("get registers", ioGetRegs, unsafe.Pointer(&r))
	return r, err
}

// SetRegs writes the general registers.
func (v *VCPU) SetRegs(r *Regs) error { return v.do("set registers", ioSetRegs, unsafe.Pointer(r)) }

// Sregs reads segment and control registers.
func (v *VCPU) Sregs() (s Sregs, err error) {
	err = v.do("get special registers", ioGetSregs, unsafe.Pointer(&s))
	return s, err
}

// SetSregs writes segment and control registers.
func (v *VCPU) SetSregs(s *Sregs) error {
	return v.do("set special registers", ioSetSregs, unsafe.Pointer(s))
}

// Interrupt queues an external interrupt with the vector, which the next entry delivers.
// The caller has checked that the guest can take it: KVM does not, and a second call
// replaces the first.
func (v *VCPU) Interrupt(vector uint8) error {
	n := uint32(vector)
	return v.do("inject interrupt", ioInterrupt, unsafe.Pointer(&n))
}

// NMI queues a non-maskable interrupt.
func (v *VCPU) NMI() error { return v.do("inject NMI", ioNMI, nil) }

// SetCPUID sets the table that the guest's CPUID instruction answers from.
func (v *VCPU) SetCPUID(table []CPUIDEntry) error {
	b := make([]byte, 8+len(table)*int(unsafe.Sizeof(CPUIDEntry{})))
	*(*uint32)(unsafe.Pointer(&b[0])) = uint32(len(table))
	for i := range table {
		*(*CPUIDEntry)(unsafe.Pointer(&b[8+i*int(unsafe.Sizeof(CPUIDEntry{}))])) = table[i]
	}
	return v.do("set CPUID", ioSetCPUID2, unsafe.Pointer(&b[0]))
}

// SupportedCPUID returns the CPUID table that this host's KVM supports. Beware: it holds
// the APIC id of the processor that it happened to run on.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	const most = 256
	b := make([]byte, 8+most*int(unsafe.Sizeof(CPUIDEntry{})))
	*(*uint32)(unsafe.Pointer(&b[0])) = most
	if _, err := ioctlAt(s.fd, ioGetSupportedCPUID, unsafe.Pointer(&b[0])); err != nil {
		return nil, fmt.Errorf("kvm: get supported CPUID: %w", err)
	}
	n := min(*(*uint32)(unsafe.Pointer(&b[0])), most)
	table := make([]CPUIDEntry, n)
	for i := range table {
		table[i] = *(*CPUIDEntry)(unsafe.Pointer(&b[8+i*int(unsafe.Sizeof(CPUIDEntry{}))]))
	}
	return table, nil
}

// msrList is struct kvm_msrs with room for entries.
type msrList struct {
	n, _    uint32
	entries [maxMSRsInOneSystem]MSREntry
}

// MSRs reads the listed MSRs; ones that the kernel does not have are left out.
func (v *VCPU) MSRs(indices []uint32) ([]MSREntry, error) {
	var out []MSREntry
	for len(indices) > 0 {
		l := msrList{n: uint32(min(len(indices), maxMSRsInOneSystem))}
		for i := range l.entries[:l.n] {
			l.entries[i].Index = indices[i]
		}
		n, err := ioctlAt(v.fd, ioGetMSRs, unsafe.Pointer(&l))
		if err != nil {
			return nil, fmt.Errorf("kvm: get MSRs: %w", err)
		}
		out = append(out, l.entries[:n]...)
		if n < uintptr(l.n) {
			n++ // the kernel stopped at one that it does not have
		}
		indices = indices[n:]
	}
	return out, nil
}

// SetMSRs writes MSRs; one that the kernel refuses is an error that names it.
func (v *VCPU) SetMSRs(entries []MSREntry) error {
	for len(entries) > 0 {
		l := msrList{n: uint32(min(len(entries), maxMSRsInOneSystem))}
		copy(l.entries[:], entries[:l.n])
		n, err := ioctlAt(v.fd, ioSetMSRs, unsafe.Pointer(&l))
		if err != nil {
			return fmt.Errorf("kvm: set MSRs: %w", err)
		}
		if n < uintptr(l.n) {
			return fmt.Errorf("kvm: MSR %#x refuses the value %#x", entries[n].Index, entries[n].Data)
		}
		entries = entries[n:]
	}
	return nil
}

// Events reads pending and injected exceptions, interrupts and NMIs.
func (v *VCPU) Events() (e Events, err error) {
	err = v.do("get events", ioGetVCPUEvents, unsafe.Pointer(&e))
	return e, err
}

// Flags of Events that say which fields a write sets.
const (
	eventsValidNMIPending = 1
	eventsValidShadow     = 4
)

// SetEvents writes pending and injected events.
func (v *VCPU) SetEvents(e *Events) error {
	c := *e
	c.Flags |= eventsValidNMIPending | eventsValidShadow
	return v.do("set events", ioSetVCPUEvents, unsafe.Pointer(&c))
}

// DebugRegs reads DR0–DR7.
func (v *VCPU) DebugRegs() (d DebugRegs, err error) {
	err = v.do("get debug registers", ioGetDebugRegs, unsafe.Pointer(&d))
	return d, err
}

// SetDebugRegs writes DR0–DR7.
func (v *VCPU) SetDebugRegs(d *DebugRegs) error {
	return v.do("set debug registers", ioSetDebugRegs, unsafe.Pointer(d))
}

// MPState reads whether the vCPU is runnable, halted or waiting for SIPI.
func (v *VCPU) MPState() (s uint32, err error) {
	err = v.do("get MP state", ioGetMPState, unsafe.Pointer(&s))
	return s, err
}

// SetMPState writes the MP state.
func (v *VCPU) SetMPState(s uint32) error {
	return v.do("set MP state", ioSetMPState, unsafe.Pointer(&s))
}

// XSave reads the extended (x87, SSE, AVX, …) state as an XSAVE image.
func (v *VCPU) XSave() ([]byte, error) {
	b := make([]byte, v.xsaveSize)
	op := ioGetXSave
	if v.xsaveSize > 4096 {
		op = ioGetXSave2
	}
	return b, v.do("get XSAVE state", op, unsafe.Pointer(&b[0]))
}

// SetXSave writes an XSAVE image of exactly the host's size.
func (v *VCPU) SetXSave(b []byte) error {
	if len(b) != v.xsaveSize {
		return fmt.Errorf("kvm: XSAVE image of %d bytes, this host has %d", len(b), v.xsaveSize)
	}
	return v.do("set XSAVE state", ioSetXSave, unsafe.Pointer(&b[0]))
}

// maxXCRS is KVM_MAX_XCRS.
const maxXCRS = 16

// xcrs is struct kvm_xcrs.
type xcrs struct {
	n, flags uint32
	xcrs     [maxXCRS]struct {
		index, _ uint32
		value    uint64
	}
	_ [16]uint64
}

// XCR0 reads the extended control register 0.
func (v *VCPU) XCR0() (uint64, error) {
	var x xcrs
	if err := v.do("get XCRs", ioGetXCRS, unsafe.Pointer(&x)); err != nil {
		return 0, err
	}
	for _, r := range x.xcrs[:min(x.n, maxXCRS)] {
		if r.index == 0 {
			return r.value, nil
		}
	}
	return 1, nil // x87 only: the architecture's reset value
}

// SetXCR0 writes the extended control register 0.
func (v *VCPU) SetXCR0(value uint64) error {
	x := xcrs{n: 1}
	x.xcrs[0].value = value
	return v.do("set XCR0", ioSetXCRS, unsafe.Pointer(&x))
}
