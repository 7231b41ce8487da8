package kvm

import (
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// This file holds what naming and repeating a stop between two exits takes: single steps, and
// the kernel's statistics of a vCPU.

var (
	ioSetGuestDebug = gokvm.IIOW(0x9b, unsafe.Sizeof(guestDebug{}))
	ioGetStatsFD    = gokvm.IIO(0xce)
)

// CapBinaryStatsFD is KVM_CAP_BINARY_STATS_FD.
const CapBinaryStatsFD = 203

// guestDebug is struct kvm_guest_debug.
type guestDebug struct {
	control, _ uint32
	registers  [8]uint64
}

// Bits of guestDebug.control.
const (
	guestDebugEnable     = 1
	guestDebugSingleStep = 2
	guestDebugHardware   = 0x20000
)

// breakpoint0 is a DR7 that makes DR0 an execution breakpoint, beside the bit that is always set.
const breakpoint0 = 1<<10 | 1<<1

// SetSingleStep makes KVM_RUN return with [ExitDebug] after each guest instruction, or no more.
func (v *VCPU) SetSingleStep(on bool) error {
	var d guestDebug
	if on {
		d.control = guestDebugEnable | guestDebugSingleStep
	}
	return v.do("set guest debug", ioSetGuestDebug, unsafe.Pointer(&d))
}

// SetBreakpoint makes KVM_RUN return with [ExitDebug] before the guest executes the instruction at the
// linear address, until SetSingleStep or SetBreakpoint says otherwise.
func (v *VCPU) SetBreakpoint(addr uint64) error {
	d := guestDebug{control: guestDebugEnable | guestDebugHardware}
	d.registers[0], d.registers[7] = addr, breakpoint0
	return v.do("set guest debug", ioSetGuestDebug, unsafe.Pointer(&d))
}

// Statistic is one figure that the kernel keeps of a vCPU.
type Statistic struct {
	fd  int
	off int64
}

// statsHeader is struct kvm_stats_header, statsDesc the fixed part of struct kvm_stats_desc.
type (
	statsHeader struct {
		_, _, _, _, descOffset, dataOffset uint32
	}
	statsDesc struct {
		_      uint32 // flags
		_, _   uint16 // exponent, values
		offset uint32
		_      uint32 // bucket
	}
)

// Limits of what is believed of a statistics file.
const (
	maxStats    = 4096
	maxStatName = 1024
)

// Statistic opens the figure with the name of <linux/kvm.h>'s binary statistics. An
// error that is [ErrFeature] means that this kernel does not keep it.
func (v *VCPU) Statistic(name string) (*Statistic, error) {
	n, err := ioctl(v.fd, ioGetStatsFD, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: statistics of a vCPU: %w", ErrFeature, err)
	}
	s := &Statistic{fd: int(n)}
	if s.off, err = findStatistic(statsReader(s.fd), name); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// statsReader reads from a statistics file.
type statsReader int

func (r statsReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := unix.Pread(int(r), p, off)
	if err == nil && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// findStatistic returns where in the file the value is.
func findStatistic(r io.ReaderAt, name string) (int64, error) {
	var head [unsafe.Sizeof(statsHeader{})]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return 0, fmt.Errorf("kvm: statistics: %w", err)
	}
	le := binary.LittleEndian
	nameSize, descs := le.Uint32(head[4:]), le.Uint32(head[8:])
	descOffset, dataOffset := le.Uint32(head[16:]), le.Uint32(head[20:])
	if descs > maxStats || nameSize > maxStatName {
		return 0, fmt.Errorf("kvm: statistics: %d figures with names of %d bytes", descs, nameSize)
	}
	fixed := int(unsafe.Sizeof(statsDesc{}))
	d := make([]byte, fixed+int(nameSize))
	for i := range int64(descs) {
		if _, err := r.ReadAt(d, int64(descOffset)+i*int64(len(d))); err != nil {
			return 0, fmt.Errorf("kvm: statistics: %w", err)
		}
		if got, _, _ := strings.Cut(string(d[fixed:]), "\x00"); got == name {
			return int64(dataOffset) + int64(le.Uint32(d[8:])), nil
		}
	}
	return 0, fmt.Errorf("%w: statistic %q", ErrFeature, name)
}

// Value reads the figure.
func (s *Statistic) Value() (uint64, error) {
	var b [8]byte
	if _, err := statsReader(s.fd).ReadAt(b[:], s.off); err != nil {
		return 0, fmt.Errorf("kvm: read statistic: %w", err)
	}
	return binary.LittleEndian.Uint64(b[:]), nil
}

// Close closes the statistics file.
func (s *Statistic) Close() error { return unix.Close(s.fd) }
