// Package kvm issues every KVM ioctl of this program, typed.
//
// Register, segment, MSR and CPUID types come from github.com/bobuhiro11/gokvm/kvm where
// they have the kernel's layout; the ioctls themselves are issued here, because that
// package hides errors that a virtual machine monitor must see (docs/kvm.md lists them).
// Sizes and offsets are checked against <linux/kvm.h> by a test.
//
// Rules that keep it safe in Go: a pointer becomes a uintptr only within the expression
// of the system call; the vCPU's file descriptor is used by one goroutine, which has
// locked itself to its thread ([VCPU.Run] must always come from the same thread); the
// shared run page is mapped by the kernel and does not move.
package kvm

import (
	"errors"
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// ioctl numbers, by _IOC(direction, 0xAE, number, size) of <asm-generic/ioctl.h>.
var (
	ioGetAPIVersion       = gokvm.IIO(0x00)
	ioCreateVM            = gokvm.IIO(0x01)
	ioCheckExtension      = gokvm.IIO(0x03)
	ioGetVCPUMmapSize     = gokvm.IIO(0x04)
	ioGetSupportedCPUID   = gokvm.IIOWR(0x05, 8)
	ioCreateVCPU          = gokvm.IIO(0x41)
	ioGetDirtyLog         = gokvm.IIOW(0x42, 16)
	ioSetUserMemoryRegion = gokvm.IIOW(0x46, 32)
	ioSetTSSAddr          = gokvm.IIO(0x47)
	ioSetIdentityMapAddr  = gokvm.IIOW(0x48, 8)
	ioRun                 = gokvm.IIO(0x80)
	ioGetRegs             = gokvm.IIOR(0x81, unsafe.Sizeof(gokvm.Regs{}))
	ioSetRegs             = gokvm.IIOW(0x82, unsafe.Sizeof(gokvm.Regs{}))
	ioGetSregs            = gokvm.IIOR(0x83, unsafe.Sizeof(gokvm.Sregs{}))
	ioSetSregs            = gokvm.IIOW(0x84, unsafe.Sizeof(gokvm.Sregs{}))
	ioInterrupt           = gokvm.IIOW(0x86, 4)
	ioGetMSRs             = gokvm.IIOWR(0x88, 8)
	ioSetMSRs             = gokvm.IIOW(0x89, 8)
	ioSetCPUID2           = gokvm.IIOW(0x90, 8)
	ioGetMPState          = gokvm.IIOR(0x98, 4)
	ioSetMPState          = gokvm.IIOW(0x99, 4)
	ioNMI                 = gokvm.IIO(0x9a)
	ioGetVCPUEvents       = gokvm.IIOR(0x9f, unsafe.Sizeof(gokvm.VCPUEvents{}))
	ioSetVCPUEvents       = gokvm.IIOW(0xa0, unsafe.Sizeof(gokvm.VCPUEvents{}))
	ioGetDebugRegs        = gokvm.IIOR(0xa1, unsafe.Sizeof(gokvm.DebugRegs{}))
	ioSetDebugRegs        = gokvm.IIOW(0xa2, unsafe.Sizeof(gokvm.DebugRegs{}))
	ioEnableCap           = gokvm.IIOW(0xa3, unsafe.Sizeof(enableCap{}))
	ioGetXSave            = gokvm.IIOR(0xa4, 4096)
	ioSetXSave            = gokvm.IIOW(0xa5, 4096)
	ioGetXCRS             = gokvm.IIOR(0xa6, unsafe.Sizeof(xcrs{}))
	ioSetXCRS             = gokvm.IIOW(0xa7, unsafe.Sizeof(xcrs{}))
	ioSetMSRFilter        = gokvm.IIOW(0xc6, unsafe.Sizeof(msrFilter{}))
	ioGetXSave2           = gokvm.IIOR(0xcf, 4096)
)

// Capability numbers of <linux/kvm.h> that the program asks for.
const (
	CapUserMemory         = 3
	CapSetTSSAddr         = 4
	CapNrVCPUs            = 9
	CapNrMemslots         = 10
	CapMPState            = 14
	CapSetIdentityMapAddr = 37
	CapVCPUEvents         = 41
	CapDebugRegs          = 50
	CapXSave              = 55
	CapXCRS               = 56
	CapTSCControl         = 60
	CapMaxVCPUs           = 66
	CapSyncRegs           = 74
	CapImmediateExit      = 136
	CapX86UserSpaceMSR    = 188
	CapX86MSRFilter       = 189
	CapXSave2             = 208
)

// apiVersion is the only version of the KVM API that has ever been stable.
const apiVersion = 12

// ioctl issues an ioctl whose argument is a number.
func ioctl(fd int, op uintptr, arg uintptr) (uintptr, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), op, arg)
		if errno == 0 {
			return r, nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

// ioctlAt issues an ioctl whose argument is a structure. It must arrive here as a pointer: what it points
// to may be on this goroutine's stack, which moves when it grows, and a uintptr would go on pointing to where it was.
func ioctlAt(fd int, op uintptr, arg unsafe.Pointer) (uintptr, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), op, uintptr(arg))
		if errno == 0 {
			return r, nil
		}
		if errno != unix.EINTR {
			return 0, errno
		}
	}
}

// Error kinds that a caller tells apart with errors.Is.
var (
	// ErrNoKVM means that the device cannot be opened: no KVM on this host.
	ErrNoKVM = errors.New("kvm: no usable KVM device")
	// ErrPermission means that the device exists but this user may not open it.
	ErrPermission = errors.New("kvm: no permission to use the KVM device")
	// ErrFeature means that this host's KVM lacks something that the program needs.
	ErrFeature = errors.New("kvm: the host's KVM lacks a feature")
)

// System is the open KVM device of the host.
type System struct {
	fd       int
	mmapSize int
}

// Open opens the KVM device, normally /dev/kvm, and checks for what every guest needs.
func Open(path string) (*System, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w: %s: %w", ErrPermission, path, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %s: %w", ErrNoKVM, path, err)
	}
	s := &System{fd: fd}
	v, err := ioctl(fd, ioGetAPIVersion, 0)
	if err != nil || v != apiVersion {
		s.Close()
		return nil, fmt.Errorf("%w: %s is not KVM API version %d (version %d, %w)", ErrNoKVM, path, apiVersion, v, errOrNone(err))
	}
	for _, c := range []struct {
		cap  int
		name string
	}{
		{CapUserMemory, "KVM_CAP_USER_MEMORY"}, {CapMPState, "KVM_CAP_MP_STATE"},
		{CapVCPUEvents, "KVM_CAP_VCPU_EVENTS"}, {CapImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"},
		{CapSyncRegs, "KVM_CAP_SYNC_REGS"}, {CapX86UserSpaceMSR, "KVM_CAP_X86_USER_SPACE_MSR"},
		{CapX86MSRFilter, "KVM_CAP_X86_MSR_FILTER"}, {CapXSave, "KVM_CAP_XSAVE"},
	} {
		if s.Check(c.cap) == 0 {
			s.Close()
			return nil, fmt.Errorf("%w: %s", ErrFeature, c.name)
		}
	}
	n, err := ioctl(fd, ioGetVCPUMmapSize, 0)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("kvm: size of the run page: %w", err)
	}
	s.mmapSize = int(n)
	return s, nil
}

func errOrNone(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}

// Close closes the device. Machines created from it live on.
func (s *System) Close() error { return unix.Close(s.fd) }

// Check returns the value of KVM_CHECK_EXTENSION for a capability, 0 when unknown.
func (s *System) Check(capability int) int { return check(s.fd, capability) }

func check(fd, capability int) int {
	v, err := ioctl(fd, ioCheckExtension, uintptr(capability))
	if err != nil {
		return 0
	}
	return int(v)
}
