package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file holds what counting the guest's own events takes: a hardware counter of
// perf_event_open(2) that runs only inside the guest, and what KVM tells of a breakpoint.

// ErrCountLost reports that a [PerfEvent] has not counted all the time: the kernel gave the hardware counter to
// somebody else. What it has counted is worth nothing.
var ErrCountLost = errors.New("kvm: the hardware counter was taken away for a time")

// Signals of a perf event's file go to one thread (struct f_owner_ex of fcntl(2)).
const ownerTID = 0 // F_OWNER_TID

type ownerEx struct {
	kind, pid int32
}

// MaxPeriod is the longest period, in events; one that no guest lives to see the end of.
const MaxPeriod = 1<<63 - 1

// PerfEvent counts a hardware event while the thread that opened it runs guest code.
type PerfEvent struct{ fd int }

// OpenGuestEvent counts the raw event with the processor's code (IA32_PERFEVTSELx, Intel SDM vol. 3 §20.2.1; PERF_CTL,
// AMD APM vol. 2 §13.2.1) in the calling thread's guest, not in the host. The signal is sent to the thread each
// time a period ends, which makes KVM_RUN return EINTR. The caller has locked its goroutine to the thread.
//
// The event is pinned: it has a counter of its own or, as [PerfEvent.Value] tells, none.
// An error that is [ErrFeature] means that this host has no such counter, [ErrPermission] that this user may not
// count what a guest's kernel does.
func OpenGuestEvent(code uint64, sig unix.Signal) (*PerfEvent, error) {
	return openEvent(&unix.PerfEventAttr{
		Type: unix.PERF_TYPE_RAW, Config: code, Sample: MaxPeriod,
		Bits: unix.PerfBitPinned | unix.PerfBitExcludeHost | unix.PerfBitDisabled,
	}, sig)
}

func openEvent(attr *unix.PerfEventAttr, sig unix.Signal) (*PerfEvent, error) {
	attr.Size = uint32(unsafe.Sizeof(*attr))
	attr.Read_format = unix.PERF_FORMAT_TOTAL_TIME_ENABLED | unix.PERF_FORMAT_TOTAL_TIME_RUNNING
	fd, err := unix.PerfEventOpen(attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	switch {
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w: perf_event_open: %w", ErrPermission, err)
	case err != nil:
		return nil, fmt.Errorf("%w: perf_event_open: %w", ErrFeature, err)
	}
	p := &PerfEvent{fd: fd}
	if err := p.route(sig); err != nil {
		p.Close()
		return nil, err
	}
	if attr.Bits&unix.PerfBitDisabled != 0 {
		if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_ENABLE, 0); err != nil {
			p.Close()
			return nil, fmt.Errorf("kvm: enable the hardware counter: %w", err)
		}
	}
	return p, nil
}

// route has the signal sent to this thread when a period ends.
func (p *PerfEvent) route(sig unix.Signal) error {
	owner := ownerEx{kind: ownerTID, pid: int32(unix.Gettid())}
	_, _, errno := unix.Syscall(unix.SYS_FCNTL, uintptr(p.fd), unix.F_SETOWN_EX, uintptr(unsafe.Pointer(&owner)))
	runtime.KeepAlive(&owner)
	if errno != 0 {
		return fmt.Errorf("kvm: send the hardware counter's signal to this thread: %w", errno)
	}
	if _, err := unix.FcntlInt(uintptr(p.fd), unix.F_SETSIG, int(sig)); err != nil {
		return fmt.Errorf("kvm: set the hardware counter's signal: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(p.fd), unix.F_SETFL, unix.O_ASYNC); err != nil {
		return fmt.Errorf("kvm: turn on the hardware counter's signal: %w", err)
	}
	return nil
}

// Value returns the number of events so far. An error that is [ErrCountLost] means that there were more.
func (p *PerfEvent) Value() (uint64, error) {
	var b [3 * 8]byte // value, time enabled, time running
	n, err := unix.Read(p.fd, b[:])
	switch {
	case err != nil:
		return 0, fmt.Errorf("kvm: read the hardware counter: %w", err)
	case n == 0: // a pinned event in the error state
		return 0, fmt.Errorf("%w: it has none", ErrCountLost)
	case n != len(b):
		return 0, fmt.Errorf("kvm: read the hardware counter: %d bytes", n)
	}
	le := binary.LittleEndian
	if enabled, running := le.Uint64(b[8:]), le.Uint64(b[16:]); enabled != running {
		return 0, fmt.Errorf("%w: it ran for %d of %d ns", ErrCountLost, running, enabled)
	}
	return le.Uint64(b[:]), nil
}

// SetPeriod begins a new period of n events, 1 to [MaxPeriod], at the end of which the signal is sent. The
// processor goes on for a while before the signal stops the guest: the skid.
func (p *PerfEvent) SetPeriod(n uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(p.fd), unix.PERF_EVENT_IOC_PERIOD, uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return fmt.Errorf("kvm: set the hardware counter's period to %d: %w", n, errno)
	}
	return nil
}

// Close frees the counter.
func (p *PerfEvent) Close() error { return unix.Close(p.fd) }

// CapPMUCapability is KVM_CAP_PMU_CAPABILITY.
const CapPMUCapability = 212

const pmuDisable = 1 // KVM_PMU_CAP_DISABLE

// DisablePMU takes the virtual performance counters from a machine that has no vCPUs yet, where KVM can. They are hidden from
// our guests in any case; but a kernel that lends the processor's own counters to guests (the mediated PMU) refuses to count guest
// events for the host as long as there is a machine with them.
func (vm *VM) DisablePMU() error {
	if vm.sys.Check(CapPMUCapability)&pmuDisable == 0 {
		return nil
	}
	c := enableCap{cap: CapPMUCapability}
	c.args[0] = pmuDisable
	if _, err := ioctl(vm.fd, ioEnableCap, uintptr(unsafe.Pointer(&c))); err != nil {
		return fmt.Errorf("kvm: disable the virtual PMU: %w", err)
	}
	return nil
}

// DebugExit is the union's part for [ExitDebug] (struct kvm_debug_exit_arch).
type DebugExit struct {
	Exception uint32 // the vector: 1 for #DB, 3 for #BP
	_         uint32
	PC        uint64 // linear
	DR6       uint64
	DR7       uint64
}

// Debug returns the union as a debug exit.
func (r *Run) Debug() *DebugExit { return (*DebugExit)(unsafe.Pointer(&r.union)) }

// Fields of a [DebugExit] (Intel SDM vol. 3 §18.2.3).
const (
	DebugVector = 1       // #DB
	DR6B0       = 1 << 0  // the breakpoint of [VCPU.SetBreakpoint]
	DR6BS       = 1 << 14 // a single step
	DR7Enable   = 0xff    // L0, G0 to L3, G3
)
