package kvm

import (
	"fmt"
	"math/bits"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VM is one virtual machine: an address space with memory slots, and vCPUs.
type VM struct {
	sys *System
	fd  int
}

// Places in guest-physical memory that VMX hosts use for themselves: the pages of the
// real-mode TSS and of the identity map, just below the 256 KiB of firmware at 4 GiB.
const (
	tssAddr      = 0xfffbd000
	identityAddr = 0xfffbc000
)

// CreateVM makes a machine without memory and vCPUs: no interrupt controller, timer or
// clock in the kernel.
func (s *System) CreateVM() (*VM, error) {
	fd, err := ioctl(s.fd, ioCreateVM, 0)
	if err != nil {
		return nil, fmt.Errorf("kvm: create virtual machine: %w", err)
	}
	vm := &VM{sys: s, fd: int(fd)}
	if s.Check(CapSetIdentityMapAddr) != 0 {
		addr := uint64(identityAddr)
		if _, err := ioctlAt(vm.fd, ioSetIdentityMapAddr, unsafe.Pointer(&addr)); err != nil {
			vm.Close()
			return nil, fmt.Errorf("kvm: set identity map address: %w", err)
		}
	}
	if s.Check(CapSetTSSAddr) != 0 {
		if _, err := ioctl(vm.fd, ioSetTSSAddr, tssAddr); err != nil {
			vm.Close()
			return nil, fmt.Errorf("kvm: set TSS address: %w", err)
		}
	}
	return vm, nil
}

// Close destroys the machine once its vCPUs are closed too.
func (vm *VM) Close() error { return unix.Close(vm.fd) }

// MemLogDirtyPages is the flag of a memory slot whose writes KVM logs.
const MemLogDirtyPages = 1

// SetMemory makes host memory b the guest-physical memory at gpa, as memory slot `slot`.
// b must be page-aligned and stay mapped as long as the machine exists.
func (vm *VM) SetMemory(slot uint32, gpa uint64, b []byte, flags uint32) error {
	r := gokvm.UserspaceMemoryRegion{
		Slot: slot, Flags: flags, GuestPhysAddr: gpa,
		MemorySize: uint64(len(b)), UserspaceAddr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))),
	}
	if _, err := ioctlAt(vm.fd, ioSetUserMemoryRegion, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("kvm: memory slot %d at %#x, %d bytes: %w", slot, gpa, len(b), err)
	}
	return nil
}

// DirtyLog copies the dirty bitmap of a slot, one bit a page, into bitmap and clears it
// in the kernel. bitmap must hold a bit for each page of the slot.
func (vm *VM) DirtyLog(slot uint32, bitmap []uint64) error {
	var log struct {
		slot, _ uint32
		bitmap  *uint64
	}
	log.slot, log.bitmap = slot, unsafe.SliceData(bitmap)
	if _, err := ioctlAt(vm.fd, ioGetDirtyLog, unsafe.Pointer(&log)); err != nil {
		return fmt.Errorf("kvm: dirty log of slot %d: %w", slot, err)
	}
	return nil
}

// enableCap is struct kvm_enable_cap.
type enableCap struct {
	cap, flags uint32
	args       [4]uint64
	_          [64]byte
}

// msrFilterRange and msrFilter are struct kvm_msr_filter_range and kvm_msr_filter.
type msrFilterRange struct {
	flags, nmsrs, base uint32
	_                  uint32
	bitmap             *byte
}

type msrFilter struct {
	flags  uint32
	_      uint32
	ranges [maxFilterRanges]msrFilterRange
}

const (
	maxFilterRanges    = 16
	msrFilterRead      = 1
	msrFilterWrite     = 2
	msrFilterDeny      = 1 // default action
	msrReasonInvalid   = 1
	msrReasonUnknown   = 2
	msrReasonFilter    = 4
	rangeMSRs          = 0x2000 // MSRs a range covers; a multiple of 8
	msrRangeLow        = 0
	msrRangeExtended   = 0xc0000000
	msrRangeAMD        = 0xc0010000
	maxMSRsInOneSystem = 256
)

// FilterMSRs makes every RDMSR and WRMSR of the guest exit to user space, except for the
// MSRs listed, which the kernel carries out; they must lie in the architectural
// ranges 0–0x1fff, 0xc0000000–0xc0001fff and 0xc0010000–0xc0011fff. (x2APIC MSRs cannot be filtered by KVM; without
// an in-kernel APIC they fail there and exit all the same.)
func (vm *VM) FilterMSRs(allow []uint32) error {
	c := enableCap{cap: CapX86UserSpaceMSR}
	c.args[0] = msrReasonInvalid | msrReasonUnknown | msrReasonFilter
	if _, err := ioctlAt(vm.fd, ioEnableCap, unsafe.Pointer(&c)); err != nil {
		return fmt.Errorf("kvm: send MSR accesses to user space: %w", err)
	}
	bases := [...]uint32{msrRangeLow, msrRangeExtended, msrRangeAMD}
	var bitmaps [len(bases)][rangeMSRs / 8]byte
	f := &msrFilter{flags: msrFilterDeny}
	for i, base := range bases {
		f.ranges[i] = msrFilterRange{flags: msrFilterRead | msrFilterWrite, nmsrs: rangeMSRs, base: base, bitmap: &bitmaps[i][0]}
	}
next:
	for _, m := range allow {
		for i, base := range bases {
			if m >= base && m-base < rangeMSRs {
				bitmaps[i][(m-base)/8] |= 1 << ((m - base) % 8)
				continue next
			}
		}
		return fmt.Errorf("kvm: MSR %#x lies outside the ranges of the filter", m)
	}
	if _, err := ioctlAt(vm.fd, ioSetMSRFilter, unsafe.Pointer(f)); err != nil {
		return fmt.Errorf("kvm: set MSR filter: %w", err)
	}
	return nil
}

// XSaveSize returns the size in bytes of a vCPU's XSAVE image on this host.
func (vm *VM) XSaveSize() int {
	if n := check(vm.fd, CapXSave2); n > 4096 {
		return n
	}
	return 4096
}

// Pages calls f with the number of every page that a dirty bitmap has set.
func Pages(bitmap []uint64, f func(page uint64)) {
	for i, w := range bitmap {
		for ; w != 0; w &= w - 1 {
			f(uint64(i*64 + bits.TrailingZeros64(w)))
		}
	}
}
