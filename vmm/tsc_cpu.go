package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// This file is the hardware of a frozen time stamp counter, and finds out whether a host has it.

// readTSC reads the host's time stamp counter.
func readTSC() uint64

// vcpuTSC is the [tscHost] of a real vCPU.
type vcpuTSC struct {
	vcpu  *kvm.VCPU
	kHz   uint32 // of the host's counter
	timer *threadTimer
	tid   int // of the timer
}

func (h *vcpuTSC) Now() uint64                   { return readTSC() }
func (h *vcpuTSC) SetOffset(offset uint64) error { return h.vcpu.SetTSCOffset(offset) }

func (h *vcpuTSC) KickIn(ticks uint64) error {
	if tid := unix.Gettid(); h.timer == nil || h.tid != tid {
		h.Close()
		timer, err := newThreadTimer()
		if err != nil {
			return err
		}
		h.timer, h.tid = timer, tid
	}
	return h.timer.once(ticksToDuration(ticks, h.kHz))
}

func (h *vcpuTSC) Close() {
	if h.timer != nil {
		h.timer.close()
		h.timer = nil
	}
}

// ticksToDuration returns how long a counter of kHz takes for some ticks, an hour at most.
func ticksToDuration(ticks uint64, kHz uint32) time.Duration {
	hi, lo := bits.Mul64(ticks, uint64(time.Millisecond))
	if hi >= uint64(kHz) {
		return time.Hour
	}
	ns, _ := bits.Div64(hi, lo, uint64(kHz))
	return time.Duration(min(ns, uint64(time.Hour)))
}

// once has the timer fire once, after d.
func (t *threadTimer) once(d time.Duration) error {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(max(d, 1)))}
	if _, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(t.id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("vmm: set timer: %w", errno)
	}
	return nil
}

// newGuestTSC freezes the vCPU's counter at value. The caller has asked ProbeTSC whether that works here. It must not be undone: the
// guest would see time jump.
func newGuestTSC(vcpu *kvm.VCPU, hostKHz uint32, frac uint, value uint64) (*guestTSC, error) {
	scale, err := NewTSCScale(hostKHz, frozenKHz, frac)
	if err != nil {
		return nil, err
	}
	guard := uint64(hostKHz) * uint64(tscGuard) / uint64(time.Millisecond)
	f, err := NewFrozenTSC(scale, guard, value)
	if err != nil {
		return nil, err
	}
	if err := vcpu.SetTSCKHz(frozenKHz); err != nil {
		return nil, err
	}
	return &guestTSC{FrozenTSC: f, host: &vcpuTSC{vcpu: vcpu, kHz: hostKHz}}, nil
}

// TSCReport says whether this host can freeze a guest's time stamp counter.
type TSCReport struct {
	Available bool
	Reason    string // why not, or what was tried; for people
	HostKHz   uint32 // rate of the host's counter, 0 if not known
	Fraction  uint   // fraction bits of the processor's multiplier, 0 if not known
}

// ProbeTSC says whether this host can freeze a guest's time stamp counter, by trying. The device is that of KVM, ""
// [DefaultKVM]. It takes some tens of milliseconds.
func ProbeTSC(device string) TSCReport {
	r := TSCReport{Available: true, Reason: "a guest reads one value for the length of a slice, and KVM's counter is what it should be over several ticks"}
	if err := r.probe(device); err != nil {
		r.Available, r.Reason = false, err.Error()
	}
	return r
}

// clocksourcesFile lists the clocks that the kernel trusts. It leaves the TSC out when that is not the same on all processors; KVM
// then changes guests' offsets by itself.
const clocksourcesFile = "/sys/devices/system/clocksource/clocksource0/available_clocksource"

func (r *TSCReport) probe(device string) error {
	p, err := readHostCPU()
	if err != nil {
		return err
	}
	if r.Fraction, err = p.tscFraction(); err != nil {
		return err
	}
	g, err := newProbeGuest(device, tscProbe)
	if err != nil {
		return err
	}
	defer g.close()
	if g.sys.Check(kvm.CapTSCControl) == 0 {
		return errors.New("KVM_CAP_TSC_CONTROL is missing: this KVM or its processor cannot scale a guest's time stamp counter")
	}
	if !g.vcpu.HasTSCOffset() {
		return errors.New("KVM_VCPU_TSC_OFFSET is missing: it came with Linux 5.16")
	}
	if list, _ := readSetting(clocksourcesFile); !slices.Contains(strings.Fields(list), "tsc") {
		return errors.New("the kernel does not trust the processor's time stamp counter (available_clocksource has no tsc)")
	}
	if r.HostKHz, err = g.vcpu.TSCKHz(); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const value = 1 << 40
	c, err := newGuestTSC(g.vcpu, r.HostKHz, r.Fraction, value)
	if err != nil {
		return err
	}
	defer c.host.(*vcpuTSC).Close()
	if rate, err := g.vcpu.TSCKHz(); err != nil || rate != frozenKHz {
		return errors.Join(fmt.Errorf("KVM gives the guest a time stamp counter of %d kHz where %d was set", rate, frozenKHz), err)
	}
	const offset = 12345
	if err := g.vcpu.SetTSCOffset(offset); err != nil {
		return err
	}
	if err := verifyScale(c.scale, offset, readTSC, g.tsc); err != nil {
		return err
	}
	return g.tryFrozen(c, value)
}

// tscFraction returns the number of fraction bits of the processor's TSC multiplier.
func (p hostCPU) tscFraction() (uint, error) {
	switch p.vendor {
	case intelVendor:
		return vmxTSCFraction, nil
	case amdVendor:
		return svmTSCFraction, nil
	}
	return 0, fmt.Errorf("how a processor %q scales a guest's time stamp counter is not known", p.vendor)
}

// tsc returns the guest's counter, as KVM makes it.
func (g *probeGuest) tsc() (uint64, error) {
	m, err := g.vcpu.MSRs([]uint32{kvm.MSRTSC})
	if err != nil {
		return 0, err
	}
	if len(m) != 1 {
		return 0, fmt.Errorf("%w: no IA32_TSC", kvm.ErrFeature)
	}
	return m[0].Data, nil
}

// tscReads is how often the probe's guest reads its counter, in well under a millisecond.
const tscReads = 10_000

// tscProbe is flat 32-bit code at CPL 0 that reads the counter into EDI:ESI, and again tscReads times or until it is another; ECX is 0 only
// if it never was.
//
//	rdtsc
//	mov esi, eax
//	mov edi, edx
//	mov ecx, tscReads
//	1: rdtsc
//	cmp eax, esi
//	jne 2f
//	cmp edx, edi
//	jne 2f
//	dec ecx
//	jnz 1b
//	2: hlt
var tscProbe = []byte{
	0x0f, 0x31,
	0x89, 0xc6,
	0x89, 0xd7,
	0xb9, tscReads & 0xff, tscReads >> 8, 0, 0,
	0x0f, 0x31,
	0x39, 0xf0,
	0x75, 0x07,
	0x39, 0xfa,
	0x75, 0x03,
	0x49,
	0x75, 0xf3,
	0xf4,
}

// tryFrozen runs the guest in slices, with values that go up.
func (g *probeGuest) tryFrozen(c *guestTSC, value uint64) error {
	const runs, enough = 50, 10
	clean := 0
	for range runs {
		value += 1 << 33
		if err := g.restart(); err != nil {
			return err
		}
		c.Clean()
		for done := false; !done; {
			if err := c.enter(value); err != nil {
				return err
			}
			errno := g.vcpu.Run()
			c.left()
			switch {
			case errno == unix.EINTR || errno == unix.EAGAIN:
			case errno != 0:
				return fmt.Errorf("vmm: run vCPU: %w", errno)
			case g.vcpu.RunPage().ExitReason != kvm.ExitHLT:
				return fmt.Errorf("vmm: the TSC's probe ended with KVM exit reason %d", g.vcpu.RunPage().ExitReason)
			default:
				done = true
			}
		}
		if c.Tainted() != 0 {
			continue
		}
		regs, err := g.vcpu.Regs()
		if err != nil {
			return err
		}
		if err := readOnce(&regs, value); err != nil {
			return err
		}
		clean++
	}
	if clean < enough {
		return fmt.Errorf("the guest's time stamp counter ticked during %d of %d short slices: this host is too busy, or kicks come too late", runs-clean, runs)
	}
	return nil
}

// readOnce says whether the probe's guest has read the value, always.
func readOnce(r *kvm.Regs, value uint64) error {
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], uint32(r.RSI))
	binary.LittleEndian.PutUint32(b[4:], uint32(r.RDI))
	if got := binary.LittleEndian.Uint64(b[:]); got != value || r.RCX != 0 {
		return fmt.Errorf("%w: the guest reads %#x, then %#x, where %#x was set", errTSC, got, r.RDX<<32|uint64(uint32(r.RAX)), value)
	}
	return nil
}
