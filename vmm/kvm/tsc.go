package kvm

import (
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// This file holds what makes the guest's time stamp counter: its rate, and its offset to the host's.

var (
	ioSetTSCKHz     = gokvm.IIO(0xa2)
	ioGetTSCKHz     = gokvm.IIO(0xa3)
	ioSetDeviceAttr = gokvm.IIOW(0xe1, unsafe.Sizeof(deviceAttr{}))
	ioGetDeviceAttr = gokvm.IIOW(0xe2, unsafe.Sizeof(deviceAttr{}))
	ioHasDeviceAttr = gokvm.IIOW(0xe3, unsafe.Sizeof(deviceAttr{}))
)

// deviceAttr is struct kvm_device_attr.
type deviceAttr struct {
	flags, group uint32
	attr         uint64
	addr         *uint64
}

// Groups and attributes of a vCPU.
const (
	vcpuTSCCtrl   = 0 // KVM_VCPU_TSC_CTRL
	vcpuTSCOffset = 0 // KVM_VCPU_TSC_OFFSET
)

// MSRTSC is IA32_TIME_STAMP_COUNTER. Reading it through KVM gives what RDTSC would give the guest. It must not be written to set
// the guest's counter: KVM takes a write that is near to what it expects for an attempt to synchronise vCPUs, and uses another value.
const MSRTSC = 0x10

// TSCKHz returns the rate of the guest's time stamp counter in kHz; that of the host's until it is set.
func (v *VCPU) TSCKHz() (uint32, error) {
	n, err := ioctl(v.fd, ioGetTSCKHz, 0)
	if err != nil {
		return 0, fmt.Errorf("kvm: get TSC rate: %w", err)
	}
	return uint32(n), nil
}

// SetTSCKHz sets the rate of the guest's time stamp counter in kHz. Where [CapTSCControl] is absent KVM
// accepts rates that it does not give.
func (v *VCPU) SetTSCKHz(rate uint32) error {
	if _, err := ioctl(v.fd, ioSetTSCKHz, uintptr(rate)); err != nil {
		return fmt.Errorf("kvm: set TSC rate to %d kHz: %w", rate, err)
	}
	return nil
}

// HasTSCOffset says whether the offset can be read and set (Linux 5.16).
func (v *VCPU) HasTSCOffset() bool {
	return v.tscOffset("probe TSC offset", ioHasDeviceAttr, nil) == nil
}

// TSCOffset returns what KVM adds to the host's scaled time stamp counter, modulo 2^64.
func (v *VCPU) TSCOffset() (offset uint64, err error) {
	err = v.tscOffset("get TSC offset", ioGetDeviceAttr, &offset)
	return offset, err
}

// SetTSCOffset sets what KVM adds to the host's scaled time stamp counter, modulo 2^64.
func (v *VCPU) SetTSCOffset(offset uint64) error {
	return v.tscOffset("set TSC offset", ioSetDeviceAttr, &offset)
}

func (v *VCPU) tscOffset(what string, op uintptr, offset *uint64) error {
	a := deviceAttr{group: vcpuTSCCtrl, attr: vcpuTSCOffset, addr: offset}
	return v.do(what, op, unsafe.Pointer(&a))
}
