package vmm

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// This file is what [branches] needs to know of processors, and the hardware behind it: a counter of perf_event_open(2) and
// KVM's guest debugging.

// Codes of the event "conditional branches retired": unit mask and event, with the bits USR, OS, INT and EN of
// the selector.
const (
	intelBranches   = 0x5101c4 // BR_INST_RETIRED.CONDITIONAL, Sandy Bridge to Comet Lake
	iceLakeBranches = 0x5111c4 // BR_INST_RETIRED.COND, from Ice Lake on
	zenBranches     = 0x5100d1 // ex_ret_cond, all Zen

	// zenSpecLocks counts locked operations that a Zen has carried out speculatively; the count of branches is wrong
	// unless the firmware or the kernel has turned that off.
	zenSpecLocks = 0x510825
)

// Skids: within how many branches of the overflow the guest stops. They are what rr has learned on many machines
// (100 to 125 on Intel, 10,000 on Zen), and room. A longer skid fails a landing, and is seen.
const (
	intelSkid = 200
	zenSkid   = 10_000
)

// branchPatience is after which time an entry ends, whatever the guest does.
const branchPatience = time.Second

// branchEvents is how a processor counts branches.
type branchEvents struct {
	branches  uint64
	specLocks uint64 // must not happen; 0: no such event
	skid      uint64
}

// hostCPU is what /proc/cpuinfo says of the host's processor.
type hostCPU struct {
	vendor        string
	family, model int
}

const (
	intelVendor = "GenuineIntel"
	amdVendor   = "AuthenticAMD"
)

// Models of Intel's family 6 (SDM vol. 4, table 2-1).
var (
	intelBeforeIceLake = []int{
		0x2a, 0x2d, 0x3a, 0x3e, // Sandy Bridge, Ivy Bridge
		0x3c, 0x3f, 0x45, 0x46, 0x3d, 0x47, 0x4f, 0x56, // Haswell, Broadwell
		0x4e, 0x5e, 0x55, 0x8e, 0x9e, 0xa5, 0xa6, // Skylake to Comet Lake
	}
	intelIceLake = []int{
		0x6a, 0x6c, 0x7d, 0x7e, 0x8c, 0x8d, 0xa7, // Ice Lake, Tiger Lake, Rocket Lake
		0x8f, 0xcf, 0xad, 0xae, // Sapphire, Emerald and Granite Rapids
		0x97, 0x9a, 0xb7, 0xba, 0xbf, 0xaa, 0xac, // Alder, Raptor and Meteor Lake: performance cores
	}
	// Atom cores count a branch or two at each entry and exit of a guest.
	intelAtom = []int{
		0x37, 0x4a, 0x4c, 0x4d, 0x5a, 0x5c, 0x5f, 0x7a, 0x86, 0x8a, 0x96, 0x9c, 0xbe, 0xaf, 0xb6, 0xdd,
	}
)

// events returns how the processor counts branches, or why it does not.
func (p hostCPU) events() (branchEvents, error) {
	in := func(models []int) bool {
		for _, m := range models {
			if m == p.model {
				return true
			}
		}
		return false
	}
	switch {
	case p.vendor == intelVendor && p.family == 6 && in(intelBeforeIceLake):
		return branchEvents{branches: intelBranches, skid: intelSkid}, nil
	case p.vendor == intelVendor && p.family == 6 && in(intelIceLake):
		return branchEvents{branches: iceLakeBranches, skid: intelSkid}, nil
	case p.vendor == intelVendor && p.family == 6 && in(intelAtom):
		return branchEvents{}, errors.New("processors of the Atom line count branches of their own at each exit of a guest")
	case p.vendor == amdVendor && p.family >= 0x17 && p.family <= 0x1a: // Zen 1 to 5; AMD has used no 0x18
		return branchEvents{branches: zenBranches, specLocks: zenSpecLocks, skid: zenSkid}, nil
	}
	return branchEvents{}, fmt.Errorf("what a processor %q family %#x model %#x counts is not known", p.vendor, p.family, p.model)
}

// cpuinfoFile is where Linux describes the processors.
const cpuinfoFile = "/proc/cpuinfo"

func readHostCPU() (hostCPU, error) {
	f, err := os.Open(cpuinfoFile)
	if err != nil {
		return hostCPU{}, fmt.Errorf("vmm: identify the processor: %w", err)
	}
	defer f.Close()
	return parseCPUInfo(f)
}

// parseCPUInfo reads the first processor of a cpuinfo file.
func parseCPUInfo(r io.Reader) (p hostCPU, err error) {
	const most = 64 << 10 // one processor takes about 2 KiB
	in := bufio.NewScanner(io.LimitReader(r, most))
	in.Buffer(nil, most)
	p.family, p.model = -1, -1
	for in.Scan() && (p.vendor == "" || p.family < 0 || p.model < 0) {
		key, value, _ := strings.Cut(in.Text(), ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "vendor_id":
			p.vendor = value
		case "cpu family":
			p.family, err = strconv.Atoi(value)
		case "model":
			p.model, err = strconv.Atoi(value)
		}
		if err != nil {
			return hostCPU{}, fmt.Errorf("vmm: identify the processor: %w", err)
		}
	}
	if err := in.Err(); err != nil {
		return hostCPU{}, fmt.Errorf("vmm: identify the processor: %w", err)
	}
	if p.vendor == "" || p.family < 0 || p.model < 0 {
		return hostCPU{}, errors.New("vmm: identify the processor: cpuinfo lacks vendor, family or model")
	}
	return p, nil
}

// branchCPU is the [branchHardware] of a real processor.
//
// A counter belongs to a thread. The vCPU loop's is known only when the loop runs, so the event is opened
// by the first call from it; what comes before the next synchronous exit has no names.
type branchCPU struct {
	vcpu   *kvm.VCPU
	run    *kvm.Run
	events branchEvents
	open   func(code uint64) (branchEvent, error)
	event  branchEvent
	tid    int
	lost   bool // the event does not count any more
	timer  *threadTimer
}

// branchEvent is a [kvm.PerfEvent].
type branchEvent interface {
	Value() (uint64, error)
	SetPeriod(n uint64) error
	Close() error
}

func openBranchEvent(code uint64) (branchEvent, error) { return kvm.OpenGuestEvent(code, kickSignal) }

func newBranchCPU(vcpu *kvm.VCPU, e branchEvents) *branchCPU {
	return &branchCPU{vcpu: vcpu, run: vcpu.RunPage(), events: e, open: openBranchEvent}
}

func newBranches(vcpu *kvm.VCPU) (*branches, error) {
	p, err := readHostCPU()
	if err != nil {
		return nil, err
	}
	e, err := p.events()
	if err != nil {
		return nil, fmt.Errorf("%w: counter %q: %w", kvm.ErrFeature, CounterBranches, err)
	}
	if err := tryEvent(e.branches); err != nil {
		return nil, err
	}
	return &branches{hw: newBranchCPU(vcpu, e)}, nil
}

// tryEvent says whether this host and this user can count the event.
func tryEvent(code uint64) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	event, err := openBranchEvent(code)
	if err != nil {
		return err
	}
	_, err = event.Value()
	return errors.Join(err, event.Close())
}

func (h *branchCPU) Close() error {
	var errs []error
	if h.timer != nil {
		h.timer.close()
	}
	if h.event != nil {
		errs = append(errs, h.event.Close())
	}
	return errors.Join(errs...)
}

func (h *branchCPU) Skid() uint64 { return h.events.skid }

// attach opens the event on this thread. It returns errNoCount if another thread had it so far, or if the kernel has none left.
func (h *branchCPU) attach() error {
	tid := unix.Gettid()
	if h.tid == tid {
		return nil
	}
	moved := h.event != nil
	if err := h.Close(); err != nil {
		return err
	}
	h.event, h.timer, h.tid, h.lost = nil, nil, tid, true
	var err error
	if h.timer, err = newThreadTimer(); err != nil {
		return err
	}
	event, err := h.open(h.events.branches)
	if err != nil {
		return fmt.Errorf("%w: %w", errNoCount, err)
	}
	h.event, h.lost = event, false
	if moved {
		return errNoCount
	}
	return nil
}

func (h *branchCPU) Count() (uint64, error) {
	if err := h.attach(); err != nil {
		return 0, err
	}
	if h.lost {
		return 0, errNoCount
	}
	v, err := h.event.Value()
	if errors.Is(err, kvm.ErrCountLost) {
		h.lost = true
		return 0, fmt.Errorf("%w: %w", errNoCount, err)
	}
	return v, err
}

func (h *branchCPU) SetOverflow(n uint64) error { return h.event.SetPeriod(min(n, kvm.MaxPeriod)) }

// RFLAGS.TF (Intel SDM vol. 1 §3.4.3).
const trapFlag = 1 << 8

func (h *branchCPU) State() (s branchState, err error) {
	regs, err := h.vcpu.Regs()
	if err != nil {
		return s, err
	}
	sregs, err := h.vcpu.Sregs()
	if err != nil {
		return s, err
	}
	events, err := h.vcpu.Events()
	if err != nil {
		return s, err
	}
	debug, err := h.vcpu.DebugRegs()
	if err != nil {
		return s, err
	}
	s = branchState{
		RIP: linearRIP(&regs, &sregs), RCX: regs.RCX, Regs: hashRegs(&regs),
		Resume: regs.RFLAGS&resumeFlag != 0,
		Busy:   events.E.Inject|events.E.Pending|events.I.Inject|events.I.Shadow|events.N.Inject|events.N.Pending != 0,
		Debugs: debug.DR7&kvm.DR7Enable != 0 || regs.RFLAGS&trapFlag != 0,
	}
	return s, nil
}

// linearRIP returns the linear address of the next instruction (Intel SDM vol. 3 §3.4.1: 64-bit code has no base).
func linearRIP(r *kvm.Regs, s *kvm.Sregs) uint64 {
	if s.EFER&eferLMA != 0 && s.CS.L != 0 {
		return r.RIP
	}
	return uint64(uint32(s.CS.Base + r.RIP))
}

func (h *branchCPU) SetBreakpoint(addr uint64) error { return h.vcpu.SetBreakpoint(addr) }
func (h *branchCPU) ClearBreakpoint() error          { return h.vcpu.SetSingleStep(false) }

func (h *branchCPU) SetResume(on bool) error {
	regs, err := h.vcpu.Regs()
	if err != nil {
		return err
	}
	if on {
		regs.RFLAGS |= resumeFlag
	} else {
		regs.RFLAGS &^= resumeFlag
	}
	return h.vcpu.SetRegs(&regs)
}

func (h *branchCPU) Enter() (branchReturn, error) { return h.enter(branchPatience) }

// enter runs the guest for a time at most.
func (h *branchCPU) enter(most time.Duration) (r branchReturn, err error) {
	began := time.Now()
	if err := h.timer.set(most); err != nil {
		return r, err
	}
	errno := h.vcpu.Run()
	r.ran = time.Since(began)
	if err := h.timer.set(0); err != nil {
		return r, err
	}
	switch errno {
	case unix.EINTR:
		h.run.SetImmediateExit(false)
		return r, nil
	case unix.EAGAIN:
		return r, nil
	case 0:
	default:
		return r, fmt.Errorf("vmm: run vCPU: %w", errno)
	}
	switch h.run.ExitReason {
	case kvm.ExitIRQWindowOpen, kvm.ExitIntr:
	case kvm.ExitDebug:
		r.kind = debugReturn(h.run.Debug())
	default:
		r.kind, r.exit = branchExit, h.run.ExitReason
	}
	return r, nil
}

// debugReturn tells our breakpoint from the debug exceptions of the guest (its trap flag, INT1), which
// KVM does not deliver while a breakpoint is set.
func debugReturn(d *kvm.DebugExit) branchReturnKind {
	if d.Exception == kvm.DebugVector && d.DR6&kvm.DR6B0 != 0 && d.DR6&kvm.DR6BS == 0 {
		return branchBreakpoint
	}
	return branchDebug
}
