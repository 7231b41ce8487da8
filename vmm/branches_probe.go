package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/kvm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// This file finds out which counters a host has, by using them.

// CounterReport says whether this host has a counter.
type CounterReport struct {
	Kind      CounterKind
	Available bool
	Reason    string // why not, or what was tried; for people
}

// Counters says which counters this host has, the best first. The device is that of KVM, "" [DefaultKVM]. It
// runs small guests and takes some tens of milliseconds.
func Counters(device string) []CounterReport {
	branches := CounterReport{Kind: CounterBranches}
	if err := probeBranches(device); err != nil {
		branches.Reason = err.Error()
	} else {
		branches.Available, branches.Reason = true, "a loop of known length counts exactly, and a landing in it succeeds"
	}
	emulated := CounterReport{Kind: CounterEmulated}
	switch ok, err := probeEmulated(device); {
	case err != nil:
		emulated.Reason = err.Error()
	case !ok:
		emulated.Reason = "this KVM does not emulate each instruction of guest kernel code"
	default:
		emulated.Available, emulated.Reason = true, "a loop of known length counts exactly"
	}
	return []CounterReport{branches, emulated}
}

// A branchProbe is a program of outer times a loop of inner branches. Accesses to a port make exits and entries between
// them, and a locked operation is what some processors miscount by.
type branchProbe struct {
	outer, inner uint32
	want         uint64 // what the counter counts in all
}

// probeOf returns a probe with segments that are long against the skid.
func probeOf(e branchEvents) branchProbe {
	p := branchProbe{outer: 100, inner: uint32(4 * e.skid)}
	p.want = uint64(p.outer)*uint64(p.inner) + uint64(p.outer)
	return p
}

// code returns flat 32-bit code:
//
//	mov esi, outer
//	1: mov ecx, inner
//	2: lock inc dword [ebx]
//	dec ecx
//	jnz 2b
//	out 0x80, al
//	dec esi
//	jnz 1b
//	hlt
func (p branchProbe) code() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32([]byte{0xbe}, p.outer)
	b = le.AppendUint32(append(b, 0xb9), p.inner)
	return append(b, 0xf0, 0xff, 0x03, 0x49, 0x75, 0xfa, 0xe6, 0x80, 0x4e, 0x75, 0xf0, 0xf4)
}

// probeData is where EBX points to.
const probeData = 0x2000

// Files that tell of a host's settings. Where one does not exist there is no such setting.
const (
	freezeOnSMIFile       = "/sys/devices/cpu/freeze_on_smi"
	unrestrictedGuestFile = "/sys/module/kvm_intel/parameters/unrestricted_guest"
	hybridPMUDirectory    = "/sys/devices/cpu_core"
)

// hostObjection returns what a host's settings have against counting branches.
func hostObjection(read func(file string) (string, bool)) error {
	if _, ok := read(hybridPMUDirectory + "/type"); ok {
		return errors.New("the host's processors are of two kinds, which count differently")
	}
	if v, ok := read(freezeOnSMIFile); ok && v == "0" {
		return fmt.Errorf("system management interrupts are counted, too: write 1 to %s", freezeOnSMIFile)
	}
	if v, ok := read(unrestrictedGuestFile); ok && v != "Y" && v != "1" {
		return errors.New("KVM emulates real-mode code here: kvm_intel.unrestricted_guest is off")
	}
	return nil
}

func readSetting(file string) (string, bool) {
	b, err := os.ReadFile(file)
	return strings.TrimSpace(string(b)), err == nil
}

// probeBranches returns nil if stops can be named by branches here, and landed on.
func probeBranches(device string) error {
	p, err := readHostCPU()
	if err != nil {
		return err
	}
	events, err := p.events()
	if err != nil {
		return err
	}
	if err := hostObjection(readSetting); err != nil {
		return err
	}
	switch err := tryEvent(events.branches); {
	case errors.Is(err, kvm.ErrPermission):
		return fmt.Errorf("counting what a guest's kernel does takes CAP_PERFMON or kernel.perf_event_paranoid = 1: %w", err)
	case errors.Is(err, kvm.ErrCountLost):
		return fmt.Errorf("all counters are in use (kernel.nmi_watchdog = 0 frees one): %w", err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the kernel does not count guest code now: a virtual machine on this host may own the PMU (kvm.enable_mediated_pmu): %w", err)
	case err != nil:
		return fmt.Errorf("no hardware counter for guest code (in a virtual machine: its host gives it no PMU): %w", err)
	}
	g, err := newProbeGuest(device, probeOf(events).code())
	if err != nil {
		return err
	}
	defer g.close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := g.noSpecLocks(events); err != nil {
		return err
	}
	return tryBranches(&branches{hw: newBranchCPU(g.vcpu, events)}, g, probeOf(events))
}

// noSpecLocks runs the probe and counts what spoils the count of branches.
func (g *probeGuest) noSpecLocks(events branchEvents) error {
	if events.specLocks == 0 {
		return nil
	}
	bad, err := openBranchEvent(events.specLocks)
	if err != nil {
		return fmt.Errorf("count speculative locks: %w", err)
	}
	defer bad.Close()
	if err := g.restart(); err != nil {
		return err
	}
	for done := false; !done; {
		if done, err = g.enter(); err != nil {
			return err
		}
	}
	n, err := bad.Value()
	if err == nil && n != 0 {
		err = fmt.Errorf("this Zen carries out locked operations speculatively (%d times), which spoils its count of branches; "+
			"bit 54 of MSR 0xc0011020 turns that off", n)
	}
	return err
}

// tryBranches runs the probe under the counter three times. The first time it names a stop, the second time it lands there; each time
// it must count exactly.
func tryBranches(c *branches, g *probeGuest, p branchProbe) (err error) {
	defer func() { err = errors.Join(err, c.Close()) }()
	if _, err := c.hw.Count(); err != nil { // opens it on this thread
		return err
	}
	var stop Stop
	inMiddle := [...]func() error{
		func() (err error) { stop, err = stopAfter(c, uint64(p.inner)/2); return err },
		func() error { return landOn(c, stop) },
		func() error { return nil },
	}
	for _, f := range inMiddle {
		total, err := g.count(c, int(p.outer/2), f)
		if err != nil {
			return err
		}
		if total != p.want {
			return fmt.Errorf("a loop that makes %d branches counts as %d", p.want, total)
		}
	}
	return nil
}

// count runs the guest and adds up the segments; after some exits it calls a function.
func (g *probeGuest) count(c *branches, after int, f func() error) (total uint64, err error) {
	if err := g.restart(); err != nil {
		return 0, err
	}
	if err := c.Restart(); err != nil {
		return 0, err
	}
	for exit, done := 0, false; !done; exit++ {
		if exit == after {
			if err := f(); err != nil {
				return 0, err
			}
		}
		if done, err = g.enter(); err != nil {
			return 0, err
		}
		n, err := c.count()
		if err != nil {
			return 0, err
		}
		total += n
		if err := c.Restart(); err != nil {
			return 0, err
		}
	}
	return total, nil
}

// stopAfter stops the guest by an overflow, and names the place.
func stopAfter(c *branches, n uint64) (s Stop, err error) {
	for {
		count, err := c.count()
		if err != nil {
			return s, err
		}
		if count > n+c.hw.Skid() {
			return s, fmt.Errorf("an overflow after %d branches stops the guest after %d", n, count)
		}
		if count >= n {
			break
		}
		if err := c.hw.SetOverflow(n - count); err != nil {
			return s, err
		}
		r, err := c.hw.Enter()
		if err != nil {
			return s, err
		}
		if r.kind != branchKick {
			return s, fmt.Errorf("an overflow after %d branches does not stop the guest", n)
		}
	}
	if err := c.hw.SetOverflow(noOverflow); err != nil {
		return s, err
	}
	s, ok, err := c.Locate()
	if err == nil && !ok {
		err = errors.New("a stop in a plain loop has no name")
	}
	return s, err
}

// landOn lands.
func landOn(c *branches, to Stop) (err error) {
	defer func() { err = errors.Join(err, c.End()) }()
	for {
		there, err := c.Approach(to)
		if err != nil || there {
			return err
		}
	}
}

// probeGuest is a guest of one vCPU that runs a few instructions of flat 32-bit code at CPL 0.
type probeGuest struct {
	sys  *kvm.System
	vm   *kvm.VM
	mem  *memory.Memory
	vcpu *kvm.VCPU
}

func newProbeGuest(device string, code []byte) (*probeGuest, error) {
	g := &probeGuest{}
	if err := g.open(device, code); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

func (g *probeGuest) open(device string, code []byte) (err error) {
	if device == "" {
		device = DefaultKVM
	}
	if g.sys, err = kvm.Open(device); err != nil {
		return err
	}
	if g.vm, err = g.sys.CreateVM(); err != nil {
		return err
	}
	if err = g.vm.DisablePMU(); err != nil {
		return err
	}
	if g.mem, err = memory.New(memory.Extent{Base: 0, Size: probeMemory}); err != nil {
		return err
	}
	if err = g.mem.Write(probeCode, code); err != nil {
		return err
	}
	if err = g.vm.SetMemory(0, 0, g.mem.Regions()[0].Bytes, 0); err != nil {
		return err
	}
	g.vcpu, err = g.vm.CreateVCPU(0)
	return err
}

func (g *probeGuest) close() {
	if g.vcpu != nil {
		_ = g.vcpu.Close()
	}
	if g.vm != nil {
		_ = g.vm.Close()
	}
	if g.mem != nil {
		_ = g.mem.Close()
	}
	if g.sys != nil {
		_ = g.sys.Close()
	}
}

// restart has the guest begin anew.
func (g *probeGuest) restart() error {
	if err := g.mem.Write(probeData, make([]byte, 4)); err != nil { // its flags would tell runs apart
		return err
	}
	s, err := g.vcpu.Sregs()
	if err != nil {
		return err
	}
	code := kvm.Segment{Limit: 0xffffffff, Selector: 8, Typ: 11, Present: 1, DB: 1, S: 1, G: 1}
	data := code
	data.Selector, data.Typ = 16, 3
	s.CS, s.DS, s.ES, s.FS, s.GS, s.SS = code, data, data, data, data, data
	s.CR0 |= 1 // protected mode
	if err := g.vcpu.SetSregs(&s); err != nil {
		return err
	}
	return g.vcpu.SetRegs(&kvm.Regs{RIP: probeCode, RBX: probeData, RFLAGS: 2})
}

// enter runs the guest to its next exit; true for the last, a HLT.
func (g *probeGuest) enter() (done bool, err error) {
	for {
		switch errno := g.vcpu.Run(); errno {
		case unix.EINTR, unix.EAGAIN:
			continue
		case 0:
		default:
			return false, fmt.Errorf("vmm: run vCPU: %w", errno)
		}
		switch reason := g.vcpu.RunPage().ExitReason; reason {
		case kvm.ExitHLT:
			return true, nil
		case kvm.ExitIO:
			return false, nil
		default:
			return false, fmt.Errorf("vmm: the counter's probe ended with KVM exit reason %d", reason)
		}
	}
}
