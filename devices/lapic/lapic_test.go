package lapic

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
)

// machine is some processors' APICs on one bus, and what they did to their processors.
type machine struct {
	clock *devices.Clock
	bus   *Bus
	apics []*APIC
	log   []string
}

func (m *machine) INIT(id uint32)             { m.log = append(m.log, fmt.Sprint("INIT ", id)) }
func (m *machine) StartUp(id uint32, v uint8) { m.log = append(m.log, fmt.Sprint("SIPI ", id, " ", v)) }
func (m *machine) NMI(id uint32)              { m.log = append(m.log, fmt.Sprint("NMI ", id)) }
func (m *machine) EOI(v uint8)                { m.log = append(m.log, fmt.Sprint("EOI ", v)) }

// newMachine returns processors with the given identifiers, their APICs enabled by
// software.
func newMachine(t require.TestingT, ids ...uint32) *machine {
	m := &machine{clock: devices.NewClock(), bus: NewBus()}
	for _, id := range ids {
		a := New(m.clock, id, m)
		require.NoError(t, m.bus.Add(a))
		a.Write(regSVR, 4, svrEnable|0xff)
		m.apics = append(m.apics, a)
	}
	return m
}

// pending returns the processors that would take the given vector next.
func (m *machine) pending(vector int) (ids []uint32) {
	for _, a := range m.apics {
		if v, _, ok := a.Pending(); ok && v == vector {
			ids = append(ids, a.id)
		}
	}
	return ids
}

func TestRegistersAfterPowerOn(t *testing.T) {
	m := &machine{clock: devices.NewClock()}
	for _, c := range []struct {
		id   uint32
		reg  uint64
		want uint32
	}{
		{3, regID, 3 << 24}, {3, regVersion, 0x50014}, {3, regTPR, 0}, {3, regAPR, 0}, {3, regPPR, 0},
		{3, regRRD, 0}, {3, regLDR, 0}, {3, regDFR, 0xffffffff}, {3, regSVR, 0xff}, {3, regESR, 0},
		{3, regISR, 0}, {3, regTMR + 0x70, 0}, {3, regIRR + 0x30, 0}, {3, regICRLow, 0}, {3, regICRHigh, 0},
		{3, regLVTTimer, lvtMasked}, {3, 0x330, lvtMasked}, {3, 0x340, lvtMasked}, {3, 0x350, lvtMasked},
		{3, 0x360, lvtMasked}, {3, regLVTError, lvtMasked}, {3, regInitial, 0}, {3, regCurrent, 0}, {3, regDivide, 0},
		{0, 0x350, ModeExtINT << modeShift}, // the bootstrap processor listens to the 8259
	} {
		a := New(devices.NewClock(), c.id, m)
		require.EqualValues(t, c.want, a.Read(c.reg, 4), "APIC %d register %#x", c.id, c.reg)
	}
	base, ok := New(devices.NewClock(), 0, m).ReadMSR(MSRAPICBase)
	require.True(t, ok)
	require.EqualValues(t, 0xfee00900, base)
	base, _ = New(devices.NewClock(), 1, m).ReadMSR(MSRAPICBase)
	require.EqualValues(t, 0xfee00800, base)
}

func TestWritableBits(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	for _, c := range []struct {
		reg  uint64
		want uint32
	}{
		{regID, 0}, {regVersion, 0x50014}, {regTPR, 0xff}, {regLDR, 0xff000000}, {regDFR, 0xffffffff},
		{regSVR, 0x3ff}, {regICRHigh, 0xff000000}, {regLVTTimer, 0x300ff}, {0x330, 0x107ff}, {0x340, 0x107ff},
		{0x350, 0x1a7ff}, {0x360, 0x1a7ff}, {regLVTError, 0x100ff}, {regInitial, 0xffffffff}, {regDivide, 0xb},
		{regISR, 0}, {regTMR, 0}, {regIRR, 0}, {regCurrent, 0xffffffff},
	} {
		a.Write(c.reg, 4, 0xffffffff)
		require.EqualValues(t, c.want, a.Read(c.reg, 4), "register %#x", c.reg)
	}
	a.Write(regDFR, 4, 0)
	require.EqualValues(t, 0x0fffffff, a.Read(regDFR, 4))
	a.Write(regTPR, 4, 0x1234567)
	for _, c := range []struct {
		off        uint64
		size       int
		want, mask uint64
	}{{0x80, 1, 0x67, 0xff}, {0x30, 2, 0x14, 0xffff}, {0x32, 2, 5, 0xffff}, {0x84, 4, 0, ^uint64(0)}, {0x30, 8, 0x50014, ^uint64(0)}} {
		require.Equal(t, c.want, a.Read(c.off, c.size)&c.mask, "%d bytes at %#x", c.size, c.off)
	}
	a.Write(regTPR, 1, 0)
	a.Write(regTPR+4, 4, 0)
	require.EqualValues(t, 0x67, a.Read(regTPR, 4), "only aligned 32-bit writes count")
}

func TestInterruptsAreTakenByPriority(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	send := func(v uint32) { m.bus.Send(0xfee00000, v) }
	expect := func(want int) {
		t.Helper()
		v, ext, ok := a.Pending()
		require.False(t, ext)
		require.Equal(t, want >= 0, ok)
		if ok {
			require.Equal(t, want, v)
		}
	}
	expect(-1)
	for _, v := range []uint32{0x31, 0x52, 0x55} {
		send(v)
	}
	expect(0x55)
	require.Equal(t, 0x55, a.Acknowledge(0x55))
	require.EqualValues(t, 1<<0x15, a.Read(regISR+0x20, 4))
	require.EqualValues(t, 1<<0x12, a.Read(regIRR+0x20, 4))
	require.EqualValues(t, 0x50, a.Read(regPPR, 4))
	expect(-1) // 0x52 is of the class in service
	send(0x61)
	expect(0x61)
	a.SetTPR(0x65)
	require.EqualValues(t, 0x65, a.Read(regPPR, 4))
	expect(-1)
	require.Equal(t, 0xff, a.Acknowledge(0x61), "no longer deliverable: spurious")
	require.Zero(t, a.Read(regISR+0x30, 4))
	a.SetCR8(5)
	require.EqualValues(t, 0x50, a.TPR())
	require.EqualValues(t, 5, a.CR8())
	expect(0x61)
	a.SetCR8(0)
	require.Equal(t, 0x61, a.Acknowledge(0x61))
	a.Write(regEOI, 4, 0)
	require.EqualValues(t, 0x50, a.Read(regPPR, 4))
	a.Write(regEOI, 4, 0)
	expect(0x52)
	a.Acknowledge(0x52)
	a.Write(regEOI, 4, 0)
	expect(0x31)
	require.Empty(t, m.log, "edges have no broadcast")
	a.Write(regSVR, 4, 0xff)
	expect(-1)
}

func TestLevelInterruptsBroadcastTheirEOI(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	require.True(t, m.bus.Deliver(0, false, ModeFixed, 0x40, true))
	m.bus.Deliver(0, false, ModeFixed, 0x50, false)
	require.EqualValues(t, 1, a.Read(regTMR+0x20, 4))
	a.Acknowledge(0x50)
	a.Write(regEOI, 4, 0)
	require.Empty(t, m.log)
	a.Acknowledge(0x40)
	a.Write(regEOI, 4, 0)
	a.Write(regEOI, 4, 0) // nothing is in service
	require.Equal(t, []string{"EOI 64"}, m.log)
	m.bus.Deliver(0, false, ModeFixed, 0x40, true)
	m.bus.Deliver(0, false, ModeFixed, 0x40, false)
	require.Zero(t, a.Read(regTMR+0x20, 4), "the last message says how it was triggered")
	require.False(t, m.bus.Deliver(1, false, ModeFixed, 0x40, true), "there is no APIC 1")
	a.Write(regSVR, 4, 0xff)
	require.False(t, m.bus.Deliver(0, false, ModeFixed, 0x40, true), "disabled")
}

func TestThe8259IsHeardThroughLINT0(t *testing.T) {
	for name, c := range map[string]struct {
		lvt  uint64
		want bool
	}{
		"ExtINT": {0x700, true}, "ExtINT masked": {0x10700, false}, "NMI": {0x400, false}, "SMI": {0x200, false},
	} {
		m := newMachine(t, 0)
		a := m.apics[0]
		a.Write(0x350, 4, c.lvt)
		_, _, ok := a.Pending()
		require.False(t, ok)
		a.LINT0().Set(true)
		_, ext, ok := a.Pending()
		require.Equal(t, c.want, ok && ext, name)
		m.bus.Send(0xfee00000, 0x40)
		v, ext, ok := a.Pending()
		require.True(t, ok && !ext && v == 0x40, "the APIC's own go first")
	}
	m := newMachine(t, 1)
	a := m.apics[0]
	a.LINT0().Set(true)
	_, _, ok := a.Pending()
	require.False(t, ok, "masked after reset where it is not the bootstrap processor")
	require.True(t, a.WriteMSR(MSRAPICBase, Base))
	_, ext, ok := a.Pending()
	require.True(t, ext && ok, "without an APIC the input is the processor's INTR")
	a.LINT0().Set(false)
	_, _, ok = a.Pending()
	require.False(t, ok)
}

func TestLocalInputsByMode(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	pin := a.LINT1()
	pin.Set(true)
	pin.Set(false)
	require.Empty(t, m.log, "masked")
	a.Write(0x360, 4, 0x400)
	pin.Set(true)
	pin.Set(true)
	require.Equal(t, []string{"NMI 0"}, m.log, "once an edge")
	a.Write(0x360, 4, 0x41)
	require.Empty(t, m.pending(0x41), "high already")
	pin.Set(false)
	pin.Set(true)
	require.Len(t, m.pending(0x41), 1)
	a.Acknowledge(0x41)
	a.Write(regEOI, 4, 0)
	require.Empty(t, m.pending(0x41))

	a.Write(0x360, 4, levelTrigger|0x42)
	require.Len(t, m.pending(0x42), 1, "a level counts when it is unmasked")
	require.EqualValues(t, levelTrigger|lvtRemoteIRR|0x42, a.Read(0x360, 4))
	a.Acknowledge(0x42)
	pin.Set(false)
	a.Write(0x360, 4, levelTrigger|0x42)
	require.EqualValues(t, levelTrigger|lvtRemoteIRR|0x42, a.Read(0x360, 4), "read-only")
	pin.Set(true)
	require.Empty(t, m.pending(0x42))
	a.Write(regEOI, 4, 0)
	require.Len(t, m.pending(0x42), 1, "still high")
	a.Acknowledge(0x42)
	pin.Set(false)
	a.Write(regEOI, 4, 0)
	require.Empty(t, m.pending(0x42))
	require.EqualValues(t, levelTrigger|0x42, a.Read(0x360, 4))
}

func TestSoftwareDisableMasksTheLocalVectors(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	a.Write(regLVTTimer, 4, 0x40)
	a.Write(regInitial, 4, 100)
	require.NotEqual(t, devices.Never, m.clock.Next())
	a.Write(regSVR, 4, 0xff)
	require.Equal(t, devices.Never, m.clock.Next())
	for reg := uint64(regLVTTimer); reg <= regLVTError; reg += regStride {
		a.Write(reg, 4, 0x20)
		require.EqualValues(t, lvtMasked|0x20, a.Read(reg, 4))
	}
}

func TestErrorsAreLatchedByAWrite(t *testing.T) {
	for name, c := range map[string]struct {
		make func(m *machine)
		want uint64
	}{
		"send illegal vector":    {func(m *machine) { m.apics[0].Write(regICRLow, 4, 0x0f|1<<18) }, 1 << 5},
		"receive illegal vector": {func(m *machine) { m.bus.Send(0xfee00000, 0x0f) }, 1 << 6},
		"read illegal register":  {func(m *machine) { m.apics[0].Read(0x40, 4) }, 1 << 7},
		"write illegal register": {func(m *machine) { m.apics[0].Write(0x3f0, 4, 0x40) }, 1 << 7},
	} {
		m := newMachine(t, 0)
		a := m.apics[0]
		a.Write(regLVTError, 4, 0x99)
		c.make(m)
		require.Zero(t, a.Read(regESR, 4), name)
		require.Len(t, m.pending(0x99), 1, name)
		a.Acknowledge(0x99)
		a.Write(regEOI, 4, 0)
		c.make(m)
		require.Empty(t, m.pending(0x99), "%s: not reported again before it is read", name)
		a.Write(regESR, 4, 0)
		require.Equal(t, c.want, a.Read(regESR, 4), name)
		a.Write(regESR, 4, 0)
		require.Zero(t, a.Read(regESR, 4), name)
	}
	m := newMachine(t, 0)
	m.apics[0].Write(regLVTError, 4, 3) // an error about the error interrupt
	m.apics[0].Read(0x40, 4)
	m.apics[0].Write(regESR, 4, 0)
	require.EqualValues(t, 1<<7|1<<6, m.apics[0].Read(regESR, 4))
}

func TestDestinations(t *testing.T) {
	const phys, logi = 0, icrLogical
	flat := func(m *machine) {
		for i, a := range m.apics {
			a.Write(regLDR, 4, 1<<(24+i))
		}
	}
	cluster := func(m *machine) { // 0x11, 0x12, 0x21, 0x22
		for i, a := range m.apics {
			a.Write(regDFR, 4, 0x0fffffff)
			a.Write(regLDR, 4, uint64(i/2+1)<<28|1<<(24+i%2))
		}
	}
	for _, c := range []struct {
		name  string
		setup func(m *machine)
		dest  uint64
		low   uint64
		want  []uint32
	}{
		{"physical", flat, 2, phys, []uint32{2}},
		{"physical, nobody", flat, 9, phys, nil},
		{"physical broadcast", flat, 0xff, phys, []uint32{0, 1, 2, 3}},
		{"flat", flat, 0b1010, logi, []uint32{1, 3}},
		{"flat broadcast", flat, 0xff, logi, []uint32{0, 1, 2, 3}},
		{"cluster", cluster, 0x23, logi, []uint32{2, 3}},
		{"cluster, one", cluster, 0x12, logi, []uint32{1}},
		{"all clusters", cluster, 0xf1, logi, []uint32{0, 2}},
		{"cluster, nobody", cluster, 0x31, logi, nil},
		{"self", flat, 0, 1 << 18, []uint32{0}},
		{"all", flat, 0, 2 << 18, []uint32{0, 1, 2, 3}},
		{"all but self", flat, 0, 3 << 18, []uint32{1, 2, 3}},
		{"lowest priority", flat, 0b1110, logi | ModeLowest<<8, []uint32{1}},
	} {
		m := newMachine(t, 0, 1, 2, 3)
		c.setup(m)
		m.apics[0].Write(regICRHigh, 4, c.dest<<24)
		m.apics[0].Write(regICRLow, 4, c.low|0x77)
		require.Equal(t, c.want, m.pending(0x77), c.name)
		require.Equal(t, c.low|0x77, m.apics[0].Read(regICRLow, 4), "idle")
		if c.low>>18 == 0 && c.low&modeMask == 0 { // the same by message
			m := newMachine(t, 0, 1, 2, 3)
			c.setup(m)
			m.bus.Send(Base|c.dest<<12|c.low>>11<<2, 0x77)
			require.Equal(t, c.want, m.pending(0x77), c.name)
		}
	}
}

func TestLowestPriorityGoesToTheLowestIdentifierOfTheIdlest(t *testing.T) {
	m := newMachine(t, 2, 0, 3, 1) // added in any order
	byID := map[uint32]*APIC{}
	for _, a := range m.apics {
		byID[a.id] = a
	}
	hint := uint64(0xfeeff000 | msiRedirection)
	m.bus.Send(hint, 0x41)
	require.Equal(t, []uint32{0}, m.pending(0x41))
	byID[0].SetTPR(0x40)
	byID[1].SetTPR(0x30)
	m.bus.Send(hint, 0x42)
	require.Equal(t, []uint32{2}, m.pending(0x42))
	byID[2].Write(regSVR, 4, 0xff)
	m.bus.Send(0xfeeff000, ModeLowest<<8|0x43)
	require.Equal(t, []uint32{3}, m.pending(0x43), "a disabled one does not take part")
}

func TestMessagesThatAreNone(t *testing.T) {
	m := newMachine(t, 0)
	for _, c := range []struct {
		addr uint64
		data uint32
	}{
		{0xfec00000, 0x41}, {1<<32 | 0xfee00000, 0x41}, {0, 0x41}, {0xfee01000, 0x41},
		{0xfee00000, levelTrigger | 0x41}, {0xfee00000, ModeSMI<<8 | 0x41}, {0xfee00000, ModeExtINT<<8 | 0x41},
	} {
		m.bus.Send(c.addr, c.data)
		_, _, ok := m.apics[0].Pending()
		require.False(t, ok, "%#x %#x", c.addr, c.data)
	}
}

func TestProcessorsAreStartedByMessages(t *testing.T) {
	m := newMachine(t, 0, 1)
	a, ap := m.apics[0], m.apics[1]
	ap.SetTPR(0x20)
	a.Write(regICRHigh, 4, 1<<24)
	a.Write(regICRLow, 4, ModeINIT<<8|icrAssert|levelTrigger)
	require.Equal(t, []string{"INIT 1"}, m.log)
	require.EqualValues(t, 0xff, ap.Read(regSVR, 4), "INIT disables the APIC")
	require.Zero(t, ap.TPR())
	a.Write(regICRLow, 4, ModeINIT<<8|levelTrigger) // de-assert
	a.Write(regICRLow, 4, ModeStartUp<<8|0x9a)
	a.Write(regICRLow, 4, ModeNMI<<8|3<<18)
	a.Write(regICRLow, 4, ModeSMI<<8)
	require.Equal(t, []string{"INIT 1", "SIPI 1 154", "NMI 1"}, m.log)
	require.True(t, ap.WriteMSR(MSRAPICBase, Base))
	a.Write(regICRLow, 4, ModeNMI<<8|3<<18)
	require.Len(t, m.log, 3, "a disabled APIC hears nothing")
}

func TestTimerCountsDownByItsDivider(t *testing.T) {
	for code, div := range map[uint64]int64{0: 2, 1: 4, 2: 8, 3: 16, 8: 32, 9: 64, 10: 128, 11: 1} {
		m := newMachine(t, 0)
		a := m.apics[0]
		m.clock.Advance(12345)
		a.Write(regDivide, 4, code)
		a.Write(regLVTTimer, 4, 0x40)
		a.Write(regInitial, 4, 1000)
		require.EqualValues(t, 1000, a.Read(regCurrent, 4))
		m.clock.Advance(12345 + 400*div)
		require.EqualValues(t, 600, a.Read(regCurrent, 4), "divided by %d", div)
		m.clock.Advance(12345 + 1000*div - 1)
		require.EqualValues(t, 1, a.Read(regCurrent, 4))
		require.Empty(t, m.pending(0x40))
		m.clock.Advance(12345 + 1000*div)
		require.Zero(t, a.Read(regCurrent, 4))
		require.Len(t, m.pending(0x40), 1)
		require.Equal(t, devices.Never, m.clock.Next(), "one shot")
	}
}

func TestPeriodicTimer(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	a.Write(regDivide, 4, 11)
	a.Write(regLVTTimer, 4, timerPeriodic|0x40)
	a.Write(regInitial, 4, 1_000_000)
	for _, at := range []int64{1_000_000, 2_000_000, 7_300_000} { // the last passes over several
		m.clock.Advance(at)
		require.Len(t, m.pending(0x40), 1)
		a.Acknowledge(0x40)
		a.Write(regEOI, 4, 0)
		require.Empty(t, m.pending(0x40))
	}
	require.EqualValues(t, 700_000, a.Read(regCurrent, 4))
	require.EqualValues(t, 8_000_000, m.clock.Next())

	a.Write(regDivide, 4, 0) // half the speed from here: the count goes on
	require.EqualValues(t, 700_000, a.Read(regCurrent, 4))
	require.EqualValues(t, 8_700_000, m.clock.Next())

	a.Write(regLVTTimer, 4, lvtMasked|timerPeriodic|0x40)
	require.Equal(t, devices.Never, m.clock.Next(), "nobody need be woken")
	m.clock.Advance(9_700_000) // half a period past zero
	require.EqualValues(t, 500_000, a.Read(regCurrent, 4))
	a.Write(regLVTTimer, 4, timerPeriodic|0x40)
	require.EqualValues(t, 10_700_000, m.clock.Next())
	require.Empty(t, m.pending(0x40), "what passed while it was masked is lost")
	a.Write(regLVTTimer, 4, 0x40)
	m.clock.Advance(20_000_000)
	require.Len(t, m.pending(0x40), 1)
	require.Equal(t, devices.Never, m.clock.Next())
	require.Zero(t, a.Read(regCurrent, 4))
	a.Write(regInitial, 4, 5)
	a.Write(regInitial, 4, 0)
	require.Equal(t, devices.Never, m.clock.Next(), "zero stops it")
}

func TestMaskedOneShotDoesNotFireLater(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	a.Write(regLVTTimer, 4, lvtMasked|0x40)
	a.Write(regInitial, 4, 10)
	m.clock.Advance(1000)
	require.Zero(t, a.Read(regCurrent, 4))
	a.Write(regLVTTimer, 4, 0x40)
	m.clock.Advance(2000)
	require.Empty(t, m.pending(0x40))
}

func TestAFastPeriodIsCountedInSteps(t *testing.T) {
	m := newMachine(t, 0)
	a := m.apics[0]
	a.Write(regDivide, 4, 11)
	a.Write(regLVTTimer, 4, timerPeriodic|0x40)
	a.Write(regInitial, 4, 7)
	m.clock.Advance(7)
	require.EqualValues(t, 7+(MinPeriod+6)/7*7, m.clock.Next())
	m.clock.Advance(9)
	require.EqualValues(t, 5, a.Read(regCurrent, 4), "the count shows the true period")
}

func TestOnlyTheTimerNeedsTheTime(t *testing.T) {
	a := newMachine(t, 0).apics[0]
	x := newMachine(t, 0).apics[0]
	require.True(t, x.WriteMSR(MSRAPICBase, Base|baseBSP|baseEnable|baseX2APIC))
	for off := uint64(0); off < Size; off += 4 {
		reg := off &^ 15
		read := reg == regCurrent
		write := reg == regInitial || reg == regDivide || reg == regLVTTimer
		require.Equal(t, read, a.NeedsTime(off, false), "reading %#x", off)
		require.Equal(t, write, a.NeedsTime(off, true), "writing %#x", off)
		require.False(t, x.NeedsTime(off, false), "not there in x2APIC mode")
		msr := uint32(MSRX2APIC + off/16)
		require.Equal(t, read, x.NeedsTimeMSR(msr, false))
		require.Equal(t, write, x.NeedsTimeMSR(msr, true))
		require.False(t, a.NeedsTimeMSR(msr, false))
	}
}

func TestModesChangeAlongTheManualsFigure(t *testing.T) {
	const off, x, x2, invalid = uint64(0), uint64(baseEnable), uint64(baseEnable | baseX2APIC), uint64(baseX2APIC)
	allowed := map[[2]uint64]bool{
		{off, off}: true, {off, x}: true, {x, x}: true, {x, x2}: true, {x, off}: true, {x2, x2}: true, {x2, off}: true,
	}
	for _, from := range []uint64{off, x, x2} {
		for _, to := range []uint64{off, x, x2, invalid} {
			a := newMachine(t, 0).apics[0]
			if from == off {
				require.True(t, a.WriteMSR(MSRAPICBase, Base))
			} else {
				require.True(t, a.WriteMSR(MSRAPICBase, Base|from))
			}
			require.Equal(t, allowed[[2]uint64{from, to}], a.WriteMSR(MSRAPICBase, Base|to), "%#x to %#x", from, to)
		}
	}
	a := newMachine(t, 0).apics[0]
	require.False(t, a.WriteMSR(MSRAPICBase, 0xfed00000|baseEnable), "the page does not move")
	require.False(t, a.WriteMSR(MSRAPICBase, Base|baseEnable|1), "reserved bit")
	a.SetTPR(0x50)
	a.Write(regLDR, 4, 1<<24)
	a.Write(regDFR, 4, 0)
	a.Write(regICRHigh, 4, 1<<24)
	require.True(t, a.WriteMSR(MSRAPICBase, Base|baseEnable|baseX2APIC))
	require.EqualValues(t, 0x50, a.TPR(), "kept")
	require.Zero(t, a.Save().LDR)
	require.EqualValues(t, dfrFlat, a.Save().DFR)
	icr, _ := a.ReadMSR(0x830)
	require.Zero(t, icr)
	require.EqualValues(t, ^uint64(0), a.Read(regTPR, 4), "no registers in memory")
	a.Write(regTPR, 4, 0)
	require.EqualValues(t, 0x50, a.TPR())
	require.True(t, a.WriteMSR(MSRAPICBase, Base))
	require.Zero(t, a.TPR(), "lost")
}

func TestX2APICRegisters(t *testing.T) {
	m := newMachine(t, 0, 0x25)
	for _, a := range m.apics {
		_, ok := a.ReadMSR(0x802)
		require.False(t, ok, "xAPIC mode")
		require.False(t, a.WriteMSR(0x808, 0))
		require.True(t, a.WriteMSR(MSRAPICBase, Base|baseEnable|baseX2APIC))
	}
	a, b := m.apics[0], m.apics[1]
	readable := map[uint32]bool{}
	for _, msr := range []uint32{0x802, 0x803, 0x808, 0x80a, 0x80d, 0x80f, 0x828, 0x830, 0x838, 0x839, 0x83e} {
		readable[msr] = true
	}
	for msr := uint32(0x810); msr < 0x828; msr++ {
		readable[msr] = true
	}
	for msr := uint32(0x832); msr < 0x838; msr++ {
		readable[msr] = true
	}
	writable := map[uint32]bool{0x808: true, 0x80b: true, 0x80f: true, 0x828: true, 0x830: true, 0x838: true, 0x83e: true}
	for msr := uint32(0x832); msr < 0x838; msr++ {
		writable[msr] = true
	}
	for msr := uint32(0x7ff); msr <= 0x900; msr++ {
		_, ok := b.ReadMSR(msr)
		require.Equal(t, readable[msr], ok, "reading %#x", msr)
		if msr != 0x83f { // the self IPI takes a vector
			require.Equal(t, writable[msr], b.WriteMSR(msr, 0), "writing %#x", msr)
		}
		require.False(t, b.WriteMSR(msr, 1<<31) && msr != 0x838, "reserved bit of %#x", msr)
	}
	for msr, want := range map[uint32]uint64{0x802: 0x25, 0x803: 0x50014, 0x80d: 2<<16 | 1<<5} {
		v, _ := b.ReadMSR(msr)
		require.Equal(t, want, v, "%#x", msr)
	}
	require.True(t, a.WriteMSR(0x80f, svrEnable|0xff))
	require.True(t, b.WriteMSR(0x80f, svrEnable|0xff))

	for name, c := range map[string]struct {
		icr  uint64
		want []uint32
	}{
		"physical":           {0x25<<32 | 0x71, []uint32{0x25}},
		"logical":            {(2<<16|1<<5)<<32 | icrLogical | 0x71, []uint32{0x25}},
		"logical, cluster 0": {1<<32 | icrLogical | 0x71, []uint32{0}},
		"logical, nobody":    {(2<<16|1<<4)<<32 | icrLogical | 0x71, nil},
		"broadcast":          {0xffffffff<<32 | 0x71, []uint32{0, 0x25}},
		"255 is nobody":      {0xff<<32 | 0x71, nil},
	} {
		require.True(t, a.WriteMSR(0x830, c.icr), name)
		require.Equal(t, c.want, m.pending(0x71), name)
		v, _ := a.ReadMSR(0x830)
		require.Equal(t, c.icr, v)
		for _, p := range m.apics {
			p.Acknowledge(0x71)
			require.True(t, p.WriteMSR(0x80b, 0))
		}
	}
	m.bus.Send(0xfeeff000, 0x72)
	require.Equal(t, []uint32{0, 0x25}, m.pending(0x72), "a message's 8-bit broadcast reaches all")
	require.True(t, b.WriteMSR(0x83f, 0x83))
	require.Equal(t, []uint32{0x25}, m.pending(0x83))
	require.True(t, b.WriteMSR(0x83f, 3))
	require.True(t, b.WriteMSR(0x828, 0))
	v, _ := b.ReadMSR(0x828)
	require.EqualValues(t, errSendVector, v)
}

func TestBusRefusesTwins(t *testing.T) {
	m := newMachine(t, 0)
	require.Error(t, m.bus.Add(New(devices.NewClock(), 0, m)))
}

// step is one thing that happens to a machine of two processors.
type step struct {
	Kind, CPU, Size int
	At, V           uint64
}

var drawStep = rapid.Custom(func(t *rapid.T) step {
	return step{
		Kind: rapid.IntRange(0, 13).Draw(t, "kind"),
		CPU:  rapid.IntRange(0, 1).Draw(t, "CPU"),
		Size: 1 << rapid.IntRange(0, 3).Draw(t, "size"),
		At:   rapid.OneOf(rapid.Uint64Range(0, 0x40), rapid.Uint64Range(0, Size-1)).Draw(t, "at"),
		V: rapid.OneOf(rapid.Uint64(), rapid.Uint64Range(0, 0x3ffff),
			rapid.SampledFrom([]uint64{Base | baseEnable, Base | baseEnable | baseX2APIC, Base, svrEnable | 0x3f, 0x700, levelTrigger | 0x44})).Draw(t, "value"),
	}
})

func (s step) apply(m *machine) (seen []any) {
	a := m.apics[s.CPU]
	switch s.Kind {
	case 0:
		a.Write(s.At, s.Size, s.V)
	case 1:
		a.Write(s.At%0x40*regStride, 4, s.V)
	case 11: // what a guest does with its timer
		reg := []uint64{regLVTTimer, regInitial, regDivide, regLVTTimer}[s.At%4]
		v := s.V
		if reg == regLVTTimer {
			v = 0x40 + s.V&0xf | s.V>>4&3*lvtMasked
		}
		a.Write(reg, 4, v&0xffffff)
		msr := uint32(MSRX2APIC + reg/regStride)
		seen = append(seen, a.WriteMSR(msr, v&0xb))
	case 12: // one of few vectors, by edge or level
		seen = append(seen, m.bus.Deliver(uint8(s.CPU), false, ModeFixed, uint8(0x40+s.At%8), s.V&1 != 0))
	case 13:
		a.Write(regEOI, 4, 0)
	case 2:
		seen = append(seen, a.Read(s.At, s.Size), a.Read(s.At%0x40*regStride, 4))
	case 3:
		seen = append(seen, a.WriteMSR(uint32(MSRX2APIC+s.At%0x40), s.V&(1<<(s.At%60)-1)))
	case 4:
		v, ok := a.ReadMSR(uint32(MSRX2APIC + s.At%0x40))
		seen = append(seen, v, ok)
	case 5:
		seen = append(seen, a.WriteMSR(MSRAPICBase, s.V))
	case 6:
		m.clock.Advance(m.clock.Now() + int64(s.V&(1<<(s.At%37)-1)))
	case 7:
		m.bus.Send(Base|s.At<<2&0xffffc, uint32(s.V))
	case 8:
		a.LINT0().Set(s.V&1 != 0)
		a.LINT1().Set(s.V&2 != 0)
	case 9:
		v, ext, ok := a.Pending()
		if ok && !ext {
			seen = append(seen, a.Acknowledge(v))
		}
	case 10:
		a.SetCR8(uint8(s.V & 15))
	}
	for _, a := range m.apics {
		v, ext, ok := a.Pending()
		seen = append(seen, v, ext, ok, a.count(), a.priority())
	}
	return append(seen, m.clock.Next())
}

func (m *machine) save() (clock devices.ClockState, apics []State) {
	for _, a := range m.apics {
		apics = append(apics, a.Save())
	}
	return m.clock.Save(), apics
}

// restored returns a new machine in the state of m.
func restored(t require.TestingT, m *machine) *machine {
	n := newMachine(t, 0, 1)
	clock, apics := m.save()
	require.NoError(t, n.clock.Restore(clock))
	for i, s := range apics {
		require.NoError(t, n.apics[i].Restore(s))
	}
	require.Empty(t, n.log, "restoring does nothing to processors")
	return n
}

func TestSavedStateGoesOnElsewhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := newMachine(t, 0, 1)
		for _, s := range rapid.SliceOfN(drawStep, 30, 100).Draw(t, "before") {
			s.apply(x)
		}
		y := restored(t, x)
		x.log = nil
		for _, s := range rapid.SliceOfN(drawStep, 30, 100).Draw(t, "after") {
			require.Equal(t, s.apply(x), s.apply(y), "%+v", s)
		}
		require.Equal(t, x.log, y.log)
		xc, xs := x.save()
		yc, ys := y.save()
		require.Equal(t, xc, yc)
		require.Equal(t, xs, ys)
		for i, a := range x.apics {
			a.Reset()
			want := New(devices.NewClock(), uint32(i), x).Save()
			want.LINT = xs[i].LINT
			require.Equal(t, want, a.Save())
		}
		require.Equal(t, devices.Never, x.clock.Next())
	})
}

// TestTheHighestClassWins: what is pending is always above the processor priority,
// and acknowledging it moves exactly that vector into service.
func TestTheHighestClassWins(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMachine(t, 0)
		a := m.apics[0]
		for range 60 {
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0:
				m.bus.Send(Base, rapid.Uint32Range(16, 255).Draw(t, "vector"))
			case 1:
				a.SetTPR(rapid.Uint8().Draw(t, "TPR"))
			case 2:
				a.Write(regEOI, 4, 0)
			case 3:
				before := a.Save()
				v, _, ok := a.Pending()
				if !ok {
					continue
				}
				require.Greater(t, v>>4, int(a.priority()>>4))
				require.Equal(t, v, a.Acknowledge(v))
				want := before
				want.IRR.clear(uint8(v))
				want.ISR.set(uint8(v))
				require.Equal(t, want, a.Save())
			}
		}
	})
}

func TestRestoreRefusesImpossibleStates(t *testing.T) {
	a := newMachine(t, 0).apics[0]
	before := a.Save()
	for name, spoil := range map[string]func(s *State){
		"base elsewhere":       func(s *State) { s.APICBase += 0x1000 },
		"invalid mode":         func(s *State) { s.APICBase = Base | baseBSP | baseX2APIC },
		"not the bootstrap":    func(s *State) { s.APICBase &^= baseBSP },
		"spurious vector":      func(s *State) { s.SVR = 1 << 12 },
		"logical destination":  func(s *State) { s.LDR = 1 },
		"destination format":   func(s *State) { s.DFR = 0 },
		"illegal vector":       func(s *State) { s.IRR[0] = 8 },
		"error":                func(s *State) { s.Errors = 1 },
		"delivery status":      func(s *State) { s.ICR = 1 << 12 },
		"divider":              func(s *State) { s.Divide = 4 },
		"deadline":             func(s *State) { s.Deadline = 5 },
		"no deadline":          func(s *State) { s.Running, s.Initial = true, 5 },
		"endless":              func(s *State) { s.Running, s.Initial, s.Deadline = true, 5, devices.Never },
		"no period":            func(s *State) { s.Running, s.Deadline = true, 5 },
		"TSC deadline":         func(s *State) { s.LVT[lvtTimer] = 1 << 18 },
		"remote IRR of timers": func(s *State) { s.LVT[lvtTimer] = lvtRemoteIRR },
	} {
		s := before
		spoil(&s)
		require.Error(t, a.Restore(s), name)
		require.Equal(t, before, a.Save(), name)
	}
}

func FuzzAccess(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0x32, 0, 0x40, 0, 2, 0, 1, 0, 0, 0x38, 0, 0xff, 0, 0, 0, 6, 0, 0, 0, 0, 0xff, 0xff, 0, 0})
	f.Add([]byte{5, 1, 0, 0, 0, 0, 0x0c, 0xe0, 0xfe, 3, 1, 0, 0x30, 0, 0x41, 0, 0x0c, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		m := newMachine(t, 0, 1)
		for ; len(data) >= 9; data = data[9:] {
			v := uint64(data[5]) | uint64(data[6])<<8 | uint64(data[7])<<16 | uint64(data[8])<<24
			step{int(data[0] % 14), int(data[1] % 2), 1 << (data[2] % 4), (uint64(data[3]) | uint64(data[4])<<8) % Size, v}.apply(m)
		}
		restored(t, m)
	})
}
