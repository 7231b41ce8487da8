package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// The model: a processor with the parts of the architecture that a landing depends on (conditional branches, REP instructions,
// RF, the shadow of MOV SS, faults and IRET, debug registers), running a program; and a counter with a skid.

type modelOp uint8

const (
	opALU   modelOp = iota // r[a] = r[a]*5 + n
	opNop                  // nothing, so that loops repeat their state but for the loop's counter
	opSet                  // r[a] = n
	opJcc                  // conditional branch to n if r[a] is odd
	opLoop                 // decrement r[a], conditional branch to n unless it is 0
	opJmp                  // to n, unconditionally
	opSetCX                // RCX = n
	opRep                  // RCX times: r[a] += 3
	opMovSS                // no breakpoint before the next instruction
	opFault                // faults; the handler lets it pass when it is tried again
	opIret
	opArm // the guest arms a breakpoint of its own
	opExit
)

type modelInsn struct {
	op modelOp
	a  int
	n  uint64
}

const (
	modelBase    = 0x1000 // address of instruction 0; instructions are a byte long
	modelRegs    = 8
	modelPassReg = 7 // set by the fault handler
)

type modelCPU struct {
	code    []modelInsn
	handler uint64

	rip, rcx uint64
	r        [modelRegs]uint64
	rf       bool
	shadow   bool
	armed    bool
	frames   []modelFrame // the stack
	pushed   uint64       // hash of all frames that were ever pushed: what the guest could have seen
	retired  uint64       // conditional branches
}

type modelFrame struct {
	rip uint64
	rf  bool
}

type modelStep uint8

const (
	stepDone modelStep = iota
	stepBranch
	stepBreak
	stepExit
)

func (c *modelCPU) step(breakpoint uint64) modelStep {
	if breakpoint != 0 && c.rip == breakpoint && !c.rf && !c.shadow {
		return stepBreak
	}
	c.rf, c.shadow = false, false
	i := c.code[c.rip-modelBase]
	next, result := c.rip+1, stepDone
	switch i.op {
	case opALU:
		c.r[i.a] = c.r[i.a]*5 + i.n
	case opSet:
		c.r[i.a] = i.n
	case opJcc:
		result = stepBranch
		if c.r[i.a]&1 != 0 {
			next = modelBase + i.n
		}
	case opLoop:
		result = stepBranch
		if c.r[i.a]--; c.r[i.a] != 0 {
			next = modelBase + i.n
		}
	case opJmp:
		next = modelBase + i.n
	case opSetCX:
		c.rcx = i.n
	case opRep:
		if c.rcx > 0 {
			c.rcx--
			c.r[i.a] += 3
		}
		if c.rcx > 0 {
			next, c.rf = c.rip, true
		}
	case opMovSS:
		c.shadow = true
	case opFault:
		if c.r[modelPassReg] == 0 {
			f := modelFrame{rip: c.rip, rf: true}
			c.frames = append(c.frames, f)
			c.pushed = c.pushed*31 + f.rip
			next = c.handler
		}
		c.r[modelPassReg] = 0
	case opIret:
		if len(c.frames) == 0 {
			return stepExit // a triple fault
		}
		f := c.frames[len(c.frames)-1]
		c.frames = c.frames[:len(c.frames)-1]
		c.r[modelPassReg] = 1
		next, c.rf = f.rip, f.rf
	case opArm:
		c.armed = true
	case opExit:
		return stepExit
	}
	c.rip = next
	if result == stepBranch {
		c.retired++
	}
	return result
}

func (c *modelCPU) state() branchState {
	b := make([]byte, 0, 8*(modelRegs+2))
	for _, v := range append(c.r[:], c.rcx, c.rip) {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return branchState{RIP: c.rip, RCX: c.rcx, Regs: xxh3.Hash(b), Resume: c.rf, Busy: c.shadow, Debugs: c.armed}
}

// picture is all of the processor's state but for the debugger's.
func (c *modelCPU) picture() string {
	return fmt.Sprint(c.rip, c.rcx, c.r, c.rf, c.shadow, c.armed, c.frames, c.pushed, c.retired)
}

// drawProgram makes a program of nested loops that ends by an exit.
func drawProgram(t *rapid.T) []modelInsn {
	var code []modelInsn
	var body func(depth int)
	body = func(depth int) {
		for range rapid.IntRange(1, 5).Draw(t, "length") {
			a := rapid.IntRange(0, 2).Draw(t, "register")
			n := uint64(rapid.IntRange(0, 9).Draw(t, "n"))
			switch op := rapid.SampledFrom([]modelOp{opALU, opNop, opJcc, opLoop, opLoop, opSetCX, opMovSS, opFault}).Draw(t, "op"); op {
			case opJcc:
				code = append(code, modelInsn{op: op, a: a, n: uint64(len(code) + 2)}, modelInsn{op: opALU, a: a, n: n})
			case opLoop:
				if depth == 3 {
					continue
				}
				counter := 3 + depth
				code = append(code, modelInsn{op: opSet, a: counter, n: uint64(rapid.IntRange(1, 12).Draw(t, "times"))})
				start := uint64(len(code))
				body(depth + 1)
				code = append(code, modelInsn{op: opLoop, a: counter, n: start})
			case opSetCX:
				code = append(code, modelInsn{op: op, n: n}, modelInsn{op: opRep, a: a})
			default:
				code = append(code, modelInsn{op: op, a: a, n: n})
			}
		}
	}
	code = append(code, modelInsn{op: opSet, a: 6, n: uint64(rapid.IntRange(1, 20).Draw(t, "rounds"))})
	body(0)
	return append(code, modelInsn{op: opLoop, a: 6, n: 1}, modelInsn{op: opExit})
}

func newModelCPU(code []modelInsn) *modelCPU {
	c := &modelCPU{code: append([]modelInsn(nil), code...), rip: modelBase}
	c.handler = modelBase + uint64(len(c.code))
	c.code = append(c.code, modelInsn{op: opALU, a: 2, n: 1}, modelInsn{op: opIret})
	return c
}

// modelHW is the model behind the interface.
type modelHW struct {
	cpu *modelCPU
	rnd *rand.Rand

	skid       uint64
	breakpoint uint64
	period     uint64
	late       int // branches until the signal of an overflow arrives; -1: no overflow
	extra      uint64
	entries    int

	// What goes wrong:
	spurious  int // one kick without reason in so many steps; 0: none
	wild      bool
	overcount bool // of a branch at entries and exits
	noCount   bool // the counter may be taken away
}

const modelPatience = 5000 // steps

func (h *modelHW) Close() error { return nil }
func (h *modelHW) Skid() uint64 { return h.skid }
func (h *modelHW) Count() (uint64, error) {
	if h.noCount && h.rnd.IntN(20) == 0 {
		return 0, errNoCount
	}
	return h.cpu.retired + h.extra, nil
}

func (h *modelHW) SetOverflow(n uint64) error {
	if n == 0 {
		return errors.New("a period of 0")
	}
	h.period, h.late = n, -1
	return nil
}
func (h *modelHW) State() (branchState, error)     { return h.cpu.state(), nil }
func (h *modelHW) SetBreakpoint(addr uint64) error { h.breakpoint = addr; return nil }
func (h *modelHW) ClearBreakpoint() error          { h.breakpoint = 0; return nil }
func (h *modelHW) SetResume(on bool) error         { h.cpu.rf = on; return nil }

func (h *modelHW) Enter() (branchReturn, error) {
	h.entries++
	if h.overcount && h.rnd.IntN(3) == 0 {
		h.extra++
	}
	for i := range modelPatience {
		ran := time.Second / modelPatience * time.Duration(i)
		if h.spurious > 0 && h.rnd.IntN(h.spurious) == 0 {
			return branchReturn{ran: ran}, nil
		}
		switch h.cpu.step(h.breakpoint) {
		case stepBreak:
			return branchReturn{kind: branchBreakpoint}, nil
		case stepExit:
			return branchReturn{kind: branchExit, exit: kvm.ExitIO}, nil
		case stepBranch:
			if h.late > 0 {
				h.late--
			}
			if h.period--; h.period == 0 {
				h.period = noOverflow
				h.overflow()
			}
		}
		if h.late == 0 {
			h.late = -1
			return branchReturn{ran: ran}, nil
		}
	}
	return branchReturn{ran: time.Second}, nil
}

func (h *modelHW) overflow() {
	h.late = h.rnd.IntN(int(h.skid))
	if h.wild {
		switch h.rnd.IntN(4) {
		case 0:
			h.late = h.rnd.IntN(int(4 * h.skid))
		case 1:
			h.late = -1 // it is lost
		}
	}
}

// drawStop runs a program on a machine of its own, and names a place.
func drawStop(t *rapid.T, code []modelInsn) (to Stop, at string, end string) {
	whole := newModelCPU(code)
	steps := 0
	for whole.step(0) != stepExit {
		steps++
	}
	end = whole.picture()
	c := newModelCPU(code)
	for range rapid.IntRange(0, steps-1).Draw(t, "stop") {
		c.step(0)
	}
	counter := &branches{hw: &modelHW{cpu: c, skid: 1}, counts: true}
	for {
		s, ok, err := counter.Locate()
		require.NoError(t, err)
		if ok {
			return s, c.picture(), end
		}
		c.step(0) // the primary waits for its next chance
	}
}

// land lands, and says how that ended.
func land(t require.TestingT, c *branches, to Stop) error {
	for range 1 << 18 {
		there, err := c.Approach(to)
		if err != nil {
			require.NoError(t, c.End())
			return err
		}
		if there {
			s, ok, err := c.Locate()
			if !errors.Is(err, errNoCount) && c.counts {
				require.NoError(t, err)
				require.True(t, ok)
				require.Equal(t, to, s)
			}
			return c.End()
		}
	}
	require.Fail(t, "the landing does not end")
	return nil
}

// With a skid within the margin and kicks at any time a landing ends exactly at the stop, the guest has noticed nothing, and goes
// on as if nothing had been.
func TestALandingOnBranchesIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		code := drawProgram(t)
		to, at, end := drawStop(t, code)
		cpu := newModelCPU(code)
		h := &modelHW{
			cpu: cpu, rnd: rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)),
			skid: uint64(rapid.IntRange(1, 300).Draw(t, "skid")), spurious: rapid.SampledFrom([]int{0, 3, 50}).Draw(t, "spurious"),
			extra: rapid.Uint64Range(0, 1<<40).Draw(t, "before"), period: noOverflow, late: -1,
		}
		c := &branches{hw: h}
		require.NoError(t, c.Restart())
		require.NoError(t, land(t, c, to))
		require.Equal(t, at, cpu.picture())
		require.Zero(t, h.breakpoint)
		for cpu.step(h.breakpoint) != stepExit {
		}
		require.Equal(t, end, cpu.picture())
	})
}

// Whatever goes wrong (skids beyond the margin, signals that never come, branches that are counted twice or not at all, a
// guest that does something else) a landing ends, and ends at the stop's name or with an error.
func TestALandingOnBranchesIsNeverSilentlyElsewhere(t *testing.T) {
	landed, failed := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		code := drawProgram(t)
		to, at, _ := drawStop(t, code)
		diverged := rapid.Bool().Draw(t, "diverged")
		overcount := rapid.Bool().Draw(t, "overcount")
		if diverged {
			// The middle of the program is another one, or a loop without a branch, or uses the debug registers.
			i := rapid.IntRange(0, len(code)-1).Draw(t, "where")
			code = append([]modelInsn(nil), code...)
			code[i] = rapid.SampledFrom([]modelInsn{{op: opNop}, {op: opALU, n: 1}, {op: opJmp, n: uint64(i)}, {op: opArm}, {op: opExit}}).Draw(t, "what")
		}
		cpu := newModelCPU(code)
		h := &modelHW{
			cpu: cpu, rnd: rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)),
			skid: uint64(rapid.IntRange(1, 40).Draw(t, "skid")), spurious: rapid.SampledFrom([]int{0, 2000}).Draw(t, "spurious"),
			wild: true, overcount: overcount, noCount: rapid.Bool().Draw(t, "count may be lost"), period: noOverflow, late: -1,
		}
		c := &branches{hw: h}
		require.NoError(t, c.Restart())
		err := land(t, c, to)
		require.Zero(t, h.breakpoint)
		if err != nil {
			require.ErrorIs(t, err, ErrLanding)
			failed++
			return
		}
		landed++
		st := cpu.state()
		require.True(t, st.nameable())
		require.Equal(t, st.stop(to.Count), to)
		if !diverged && !overcount {
			require.Equal(t, at, cpu.picture())
		}
	})
	t.Logf("%d landed, %d failed", landed, failed)
	require.NotZero(t, landed)
	require.NotZero(t, failed)
}

func TestLandingsThatCannotBe(t *testing.T) {
	loop := []modelInsn{{op: opSet, a: 3, n: 100}, {op: opNop}, {op: opLoop, a: 3, n: 1}, {op: opExit}}
	for name, test := range map[string]struct {
		code []modelInsn
		to   Stop
		want error
		says string
	}{
		"an exit comes first":        {loop, Stop{Count: 200, RIP: modelBase + 1}, ErrLanding, "exit"},
		"the registers are others":   {loop, Stop{Count: 50, RIP: modelBase + 1}, ErrLanding, "passed"},
		"the address is not reached": {loop, Stop{Count: 50, RIP: modelBase + 77}, ErrLanding, "passed"},
		"no branch any more":         {[]modelInsn{{op: opNop}, {op: opJmp, n: 0}}, Stop{Count: 50, RIP: modelBase + 1}, ErrLanding, "no branch"},
		"again and again":            {[]modelInsn{{op: opNop}, {op: opJmp, n: 0}}, Stop{Count: 0, RIP: modelBase + 1}, ErrLanding, "again and again"},
		"own breakpoints":            {append([]modelInsn{{op: opArm}}, loop...), Stop{Count: 50, RIP: modelBase + 2}, ErrGuestDebug, "own"},
	} {
		t.Run(name, func(t *testing.T) {
			h := &modelHW{cpu: newModelCPU(test.code), rnd: rand.New(rand.NewPCG(1, 2)), skid: 10, period: noOverflow, late: -1}
			c := &branches{hw: h}
			require.NoError(t, c.Restart())
			err := land(t, c, test.to)
			require.ErrorIs(t, err, test.want)
			require.ErrorContains(t, err, test.says)
			t.Log(err)
		})
	}
}

// A landing that is given up at a breakpoint leaves no resume flag behind.
func TestEndTakesBackTheResumeFlag(t *testing.T) {
	code := []modelInsn{{op: opSet, a: 3, n: 9}, {op: opNop}, {op: opLoop, a: 3, n: 1}, {op: opExit}}
	cpu := newModelCPU(code)
	h := &modelHW{cpu: cpu, rnd: rand.New(rand.NewPCG(1, 2)), skid: 100, period: noOverflow, late: -1}
	c := &branches{hw: h}
	require.NoError(t, c.Restart())
	to := Stop{Count: 5, RIP: modelBase + 1}
	there, err := c.Approach(to)
	require.False(t, there)
	require.NoError(t, err)
	require.True(t, c.hit)
	h.spurious = 1 // a kick comes before the instruction
	_, err = c.Approach(to)
	require.NoError(t, err)
	require.True(t, cpu.rf)
	require.NoError(t, c.End())
	require.False(t, cpu.rf)
	require.Zero(t, h.breakpoint)
}

// Without a count no stop has a name, and a machine goes on.
func TestALostCountOnlyTakesTheNames(t *testing.T) {
	h := &modelHW{cpu: newModelCPU([]modelInsn{{op: opNop}, {op: opExit}}), skid: 1, noCount: true, rnd: rand.New(rand.NewPCG(1, 2))}
	c := &branches{hw: h}
	named, lost := 0, 0
	for range 1000 {
		require.NoError(t, c.Restart())
		_, ok, err := c.Locate()
		require.NoError(t, err)
		if ok {
			named++
		} else {
			lost++
		}
	}
	require.NotZero(t, named)
	require.NotZero(t, lost)
}

func TestWhatProcessorsCount(t *testing.T) {
	info := func(vendor string, family, model int) string {
		return fmt.Sprintf("processor\t: 0\nvendor_id\t: %s\ncpu family\t: %d\nmodel\t\t: %d\nmodel name\t: x\n\nprocessor\t: 1\nvendor_id\t: other\n", vendor, family, model)
	}
	for _, test := range []struct {
		info string
		code uint64
		says string
	}{
		{info(intelVendor, 6, 0x55), 0x5101c4, ""},  // Skylake-SP
		{info(intelVendor, 6, 0x6a), 0x5111c4, ""},  // Ice Lake-SP
		{info(intelVendor, 6, 0x8f), 0x5111c4, ""},  // Sapphire Rapids
		{info(amdVendor, 0x17, 0x31), 0x5100d1, ""}, // Rome
		{info(amdVendor, 0x19, 1), 0x5100d1, ""},    // Milan
		{info(amdVendor, 0x1a, 2), 0x5100d1, ""},    // Turin
		{info(amdVendor, 0x15, 2), 0, "not known"},  // Piledriver
		{info(intelVendor, 6, 0x5f), 0, "Atom"},     // Denverton
		{info(intelVendor, 15, 6), 0, "not known"},  // NetBurst
		{info("CentaurHauls", 7, 0x5b), 0, "not known"},
		{"vendor_id\t: " + intelVendor + "\n", 0, "lacks"},
		{"cpu family\t: six\n", 0, "invalid"},
		{strings.Repeat("x", 1<<17), 0, "too long"},
		{"", 0, "lacks"},
	} {
		p, err := parseCPUInfo(strings.NewReader(test.info))
		var e branchEvents
		if err == nil {
			e, err = p.events()
		}
		if test.says != "" {
			require.ErrorContains(t, err, test.says)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, test.code, e.branches)
		require.NotZero(t, e.skid)
		require.Equal(t, p.vendor == amdVendor, e.specLocks != 0)
	}
}

// statHW is the hardware of a host whose KVM emulates guest kernel code: a real vCPU with real breakpoints, whose counter is that
// of emulated instructions and whose overflow is a timer. The landing, what it reads of the guest, and the probe
// run on it as they do on a processor that counts branches.
type statHW struct {
	*branchCPU
	stat *kvm.Statistic
	due  uint64
	at   uint64 // the breakpoint
	hits int
}

func newStatHW(t *testing.T, vcpu *kvm.VCPU) *statHW {
	stat, err := vcpu.Statistic(statInsnEmulation)
	require.NoError(t, err)
	timer, err := newThreadTimer()
	require.NoError(t, err)
	return &statHW{branchCPU: &branchCPU{vcpu: vcpu, run: vcpu.RunPage(), timer: timer}, stat: stat, due: noOverflow}
}

func (h *statHW) Close() error           { return errors.Join(h.stat.Close(), h.branchCPU.Close()) }
func (h *statHW) Skid() uint64           { return 1000 }
func (h *statHW) Count() (uint64, error) { return h.stat.Value() }
func (h *statHW) SetOverflow(n uint64) error {
	v, err := h.stat.Value()
	h.due = v + n
	return err
}

func (h *statHW) SetBreakpoint(addr uint64) error {
	h.at = addr
	return h.branchCPU.SetBreakpoint(addr)
}

// State leaves RF out: KVM-PVM sets and clears it as it likes.
func (h *statHW) State() (branchState, error) {
	st, err := h.branchCPU.State()
	st.Resume = false
	return st, err
}

// SetResume does by a step what RF does on a processor: KVM's emulator does not look at RF.
func (h *statHW) SetResume(on bool) error {
	if !on {
		return nil
	}
	if err := h.vcpu.SetSingleStep(true); err != nil {
		return err
	}
	for {
		r, err := h.enter(branchPatience)
		if err != nil {
			return err
		}
		if r.kind != branchKick {
			return h.branchCPU.SetBreakpoint(h.at)
		}
	}
}

func (h *statHW) Enter() (branchReturn, error) {
	for {
		v, err := h.stat.Value()
		if err != nil || v >= h.due {
			return branchReturn{}, err
		}
		r, err := h.enter(max(min(time.Duration(min(h.due-v, 1<<20))*fastest/4, branchPatience), minPiece))
		if r.kind == branchBreakpoint {
			h.hits++
		}
		if err != nil || r.kind != branchKick {
			return r, err
		}
	}
}

// requireEmulated skips where KVM does not emulate guest code; there the branches themselves can be counted.
func requireEmulated(t *testing.T) {
	ok, err := probeEmulated("")
	require.NoError(t, err)
	if !ok {
		t.Skip("this host's KVM does not emulate guest code")
	}
}

func TestTheProbeLandsOnARealVCPU(t *testing.T) {
	requireEmulated(t)
	p := branchProbe{outer: 4, inner: 3000}
	p.want = 1 + uint64(p.outer)*(1+3*uint64(p.inner)+3) + 1 // instructions
	g, err := newProbeGuest("", p.code())
	require.NoError(t, err)
	defer g.close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h := newStatHW(t, g.vcpu)
	require.NoError(t, tryBranches(&branches{hw: h}, g, p))
	require.NotZero(t, h.hits, "it came by breakpoints")

	p.want++
	h = newStatHW(t, g.vcpu)
	require.ErrorContains(t, tryBranches(&branches{hw: h}, g, p), "counts as", "a count that is not exact is refused")
}

func TestARealGuestsDebuggingIsSeen(t *testing.T) {
	requireEmulated(t)
	g, err := newProbeGuest("", probeOf(branchEvents{skid: intelSkid}).code())
	require.NoError(t, err)
	defer g.close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	require.NoError(t, g.restart())
	h := newStatHW(t, g.vcpu)
	defer h.Close()
	st, err := h.State()
	require.NoError(t, err)
	require.True(t, st.nameable())
	require.EqualValues(t, probeCode, st.RIP)

	d, err := g.vcpu.DebugRegs()
	require.NoError(t, err)
	d.DB[1], d.DR7 = probeCode, d.DR7|1<<2
	require.NoError(t, g.vcpu.SetDebugRegs(&d))
	st, err = h.State()
	require.NoError(t, err)
	require.True(t, st.Debugs)
	c := &branches{hw: h}
	require.NoError(t, c.Restart())
	_, err = c.Approach(Stop{Count: 10, RIP: probeCode})
	require.ErrorIs(t, err, ErrGuestDebug)
	_, ok, err := c.Locate()
	require.NoError(t, err)
	require.False(t, ok, "nor is a stop named that nobody can land on")
}

func TestWhoRaisedADebugException(t *testing.T) {
	require.Equal(t, branchBreakpoint, debugReturn(&kvm.DebugExit{Exception: 1, DR6: 0xffff0ff1}))
	require.Equal(t, branchDebug, debugReturn(&kvm.DebugExit{Exception: 1, DR6: 0xffff4ff0}), "the trap flag")
	require.Equal(t, branchDebug, debugReturn(&kvm.DebugExit{Exception: 1, DR6: 0xffff4ff1}), "the trap flag, at the breakpoint")
	require.Equal(t, branchDebug, debugReturn(&kvm.DebugExit{Exception: 1, DR6: 0xffff0ff0}), "INT1")
	require.Equal(t, branchDebug, debugReturn(&kvm.DebugExit{Exception: 3}), "INT3")
}

func TestLinearAddressOfTheNextInstruction(t *testing.T) {
	r := &kvm.Regs{RIP: 0xfff0}
	require.EqualValues(t, 0xfffffff0, linearRIP(r, &kvm.Sregs{CS: kvm.Segment{Base: 0xffff0000}}), "at reset")
	require.EqualValues(t, 0xffef, linearRIP(r, &kvm.Sregs{CS: kvm.Segment{Base: 0xffffffff}}), "wraps at 4 GiB")
	long := &kvm.Sregs{EFER: eferLMA, CS: kvm.Segment{Base: 0x1000, L: 1}}
	require.EqualValues(t, 0xfff0, linearRIP(r, long), "no base in 64-bit code")
	long.CS.L = 0
	require.EqualValues(t, 0x10ff0, linearRIP(r, long), "a base in compatibility mode")
}

func TestSettingsOfAHostAgainstCounting(t *testing.T) {
	for _, test := range []struct {
		files map[string]string
		says  string
	}{
		{nil, ""},
		{map[string]string{freezeOnSMIFile: "1", unrestrictedGuestFile: "Y"}, ""},
		{map[string]string{freezeOnSMIFile: "0"}, "write 1 to"},
		{map[string]string{unrestrictedGuestFile: "N"}, "unrestricted_guest"},
		{map[string]string{hybridPMUDirectory + "/type": "4"}, "two kinds"},
	} {
		err := hostObjection(func(f string) (string, bool) { v, ok := test.files[f]; return v, ok })
		if test.says == "" {
			require.NoError(t, err)
		} else {
			require.ErrorContains(t, err, test.says)
		}
	}
}

// Each counter is there or says why not, and the first that is there is chosen.
func TestCountersSayWhy(t *testing.T) {
	kind, err := ProbeCounter("")
	require.NoError(t, err)
	want := CounterNone
	reports := Counters("")
	require.Len(t, reports, 2)
	for _, r := range reports {
		t.Logf("%s: %v: %s", r.Kind, r.Available, r.Reason)
		require.NotEmpty(t, r.Reason)
		if r.Available && want == CounterNone {
			want = r.Kind
		}
	}
	require.Equal(t, want, kind)
	for _, r := range Counters("/dev/null") {
		require.False(t, r.Available)
		require.NotEmpty(t, r.Reason)
	}
	_, err = ProbeCounter("/dev/null")
	require.ErrorIs(t, err, kvm.ErrNoKVM)
}

// A machine has the counter that it is asked for, or says why not.
func TestAMachineCountsBranchesOrRefuses(t *testing.T) {
	m, err := New(Config{Memory: testMemory, Kernel: image(t, "first"), Counter: CounterBranches})
	if Counters("")[0].Available {
		require.NoError(t, err)
		require.NoError(t, m.Close())
		return
	}
	require.Error(t, err)
	t.Log(err)
}

// testEvent stands in for the perf event of a thread.
type testEvent struct {
	value  uint64
	err    error
	closed bool
}

func (e *testEvent) Value() (uint64, error)   { return e.value, e.err }
func (e *testEvent) SetPeriod(n uint64) error { return nil }
func (e *testEvent) Close() error             { e.closed = true; return nil }

// A counter belongs to the thread that it was opened on: on another one stops have no names until the next exit. One that the kernel has taken
// away, or does not give, names nothing any more, and the machine goes on.
func TestACountBelongsToItsThread(t *testing.T) {
	// on runs a function on a thread of its own.
	on := func(f func()) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // and not unlocked: the thread ends with the goroutine
			f()
		}()
		<-done
	}
	var opened []*testEvent
	var refuse error
	h := &branchCPU{open: func(code uint64) (branchEvent, error) {
		require.EqualValues(t, zenBranches, code)
		if refuse != nil {
			return nil, refuse
		}
		opened = append(opened, &testEvent{value: 1000 * uint64(len(opened))})
		return opened[len(opened)-1], nil
	}, events: branchEvents{branches: zenBranches, skid: zenSkid}}
	c := &branches{hw: h}
	named := func() bool {
		_, err := c.count()
		if err != nil {
			require.ErrorIs(t, err, errNoCount)
		}
		return err == nil
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	require.False(t, named(), "no exit yet")
	require.NoError(t, c.Restart())
	require.True(t, named())
	on(func() {
		require.False(t, named(), "another thread")
		require.True(t, opened[0].closed)
		require.NoError(t, c.Restart())
		require.True(t, named(), "after its next exit")
		n, err := c.count()
		require.NoError(t, err)
		require.Zero(t, n)
		opened[1].err = fmt.Errorf("test: %w", kvm.ErrCountLost)
		require.False(t, named())
		opened[1].err = nil
		require.NoError(t, c.Restart())
		require.False(t, named(), "what was missed is not made good")
	})
	refuse = kvm.ErrFeature
	require.NoError(t, c.Restart())
	require.False(t, named())
	require.NoError(t, c.Close())
	require.True(t, opened[1].closed)
}
