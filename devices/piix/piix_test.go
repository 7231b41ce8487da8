package piix

import (
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/pci"
)

// board is a chipset on a bus, as a guest sees it.
type board struct {
	clock  *devices.Clock
	irqs   *devices.Interrupts
	bus    *pci.Bus
	c      *Chipset
	ports  *devices.Bus
	level  [devices.NumGSI]bool
	slept  []uint8
	resets int
	intx   []devices.Line
}

func newBoard(t require.TestingT) *board {
	b := &board{clock: devices.NewClock(), irqs: devices.NewInterrupts(), bus: pci.NewBus(), ports: devices.NewPortBus()}
	for n := range b.level {
		b.irqs.Connect(n, devices.LineFunc(func(l bool) { b.level[n] = l }))
	}
	var err error
	b.c, err = New(b.clock, b.bus, Config{
		Interrupts: b.irqs,
		OnSleep:    func(typ uint8) { b.slept = append(b.slept, typ) },
		OnReset:    func() { b.resets++ },
	})
	require.NoError(t, err)
	require.NoError(t, b.ports.Map(pci.ConfigBase, pci.ConfigPorts, b.bus.ConfigPorts()))
	b.ports.SetResolver(b.bus.IO())
	for slot := uint8(1); slot <= 5; slot++ {
		b.intx = append(b.intx, b.c.INTx(slot<<3, 1))
	}
	return b
}

func (b *board) read(devfn, reg uint64, size int) uint64 {
	b.ports.Write(0xcf8, 4, 1<<31|devfn<<8|reg&^3)
	return b.ports.Read(0xcfc+reg&3, size)
}

func (b *board) write(devfn, reg uint64, size int, v uint64) {
	b.ports.Write(0xcf8, 4, 1<<31|devfn<<8|reg&^3)
	b.ports.Write(0xcfc+reg&3, size, v)
}

// highs returns the interrupts that are high.
func (b *board) highs() (n []int) {
	for i, l := range b.level {
		if l {
			n = append(n, i)
		}
	}
	return n
}

func TestFirmwareRecognisesTheBoard(t *testing.T) {
	b := newBoard(t)
	for _, c := range []struct {
		devfn, reg uint64
		size       int
		want       uint64
	}{
		{HostBridge, 0x00, 4, 0x12378086}, {HostBridge, 0x08, 4, 0x06000002}, {HostBridge, 0x2c, 4, 0x11001af4},
		{HostBridge, 0x06, 2, 0x0280}, {HostBridge, 0x0e, 1, 0}, {HostBridge, 0x58, 4, 0}, {HostBridge, 0x72, 1, 2},
		{ISABridge, 0x00, 4, 0x70008086}, {ISABridge, 0x08, 4, 0x06010000}, {ISABridge, 0x0e, 1, 0x80},
		{ISABridge, 0x04, 4, 0x02000007}, {ISABridge, 0x60, 4, 0x80808080}, {ISABridge, 0x4c, 1, 0x4d},
		{PowerMgmt, 0x00, 4, 0x71138086}, {PowerMgmt, 0x08, 4, 0x06800003}, {PowerMgmt, 0x40, 4, 1},
		{PowerMgmt, 0x3d, 1, 1}, {PowerMgmt, 0x58, 4, 0x02000000}, {PowerMgmt, 0x80, 1, 0}, {PowerMgmt, 0x90, 4, 1},
		{IDE, 0x00, 4, 0xffffffff},
	} {
		require.Equal(t, c.want, b.read(c.devfn, c.reg, c.size), "%#x, register %#x", c.devfn, c.reg)
	}
}

func TestWritableRegisters(t *testing.T) {
	b := newBoard(t)
	for _, c := range []struct {
		devfn, reg uint64
		want       uint64
	}{
		{HostBridge, 0x58, 0x333330ff}, {HostBridge, 0x5c, 0x33333333}, {HostBridge, 0x04, 0x02800507},
		{ISABridge, 0x60, 0x8f8f8f8f}, {ISABridge, 0x04, 0x02000007},
		{PowerMgmt, 0x40, 0xffc1}, {PowerMgmt, 0x80, 1}, {PowerMgmt, 0x90, 0xfff1}, {PowerMgmt, 0xd0, 0x000e0000},
	} {
		b.write(c.devfn, c.reg, 4, 0xffffffff)
		require.Equal(t, c.want, b.read(c.devfn, c.reg, 4), "%#x, register %#x", c.devfn, c.reg)
	}
}

func TestPinsRotateThroughThePIRQs(t *testing.T) {
	b := newBoard(t)
	b.c.Route([4]uint8{3, 4, 5, 6})
	for _, c := range []struct {
		slot uint8
		pin  int
		want uint8
	}{{1, 1, 3}, {1, 4, 6}, {2, 1, 4}, {3, 1, 5}, {4, 1, 6}, {5, 1, 3}, {3, 3, 3}, {0, 1, 6}, {31, 1, 5}} {
		require.Equal(t, c.want, b.c.IRQ(c.slot<<3, c.pin), "slot %d pin %d", c.slot, c.pin)
		line := b.c.INTx(c.slot<<3, c.pin)
		line.Set(true)
		require.Equal(t, []int{int(c.want)}, b.highs())
		line.Set(false)
		require.Empty(t, b.highs())
	}
	require.Panics(t, func() { b.c.INTx(8, 0) })
	require.Panics(t, func() { b.c.INTx(8, 5) })
}

func TestLevelsFollowTheirRoute(t *testing.T) {
	b := newBoard(t)
	b.intx[0].Set(true) // PIRQA, like slot 5
	require.Empty(t, b.highs(), "not routed after reset")
	require.EqualValues(t, 0xff, b.c.IRQ(1<<3, 1))
	b.write(ISABridge, 0x60, 1, 10)
	require.Equal(t, []int{10}, b.highs())
	b.write(ISABridge, 0x60, 1, 11)
	require.Equal(t, []int{11}, b.highs())
	b.intx[4].Set(true)
	b.intx[0].Set(false)
	require.Equal(t, []int{11}, b.highs(), "the PIRQ is the OR of its sources")
	b.write(ISABridge, 0x60, 1, 0x80|11)
	require.Empty(t, b.highs())
	for _, reserved := range []uint64{0, 1, 2, 8, 13} {
		b.write(ISABridge, 0x60, 1, reserved)
		require.Empty(t, b.highs(), "IRQ %d cannot be a PIRQ's", reserved)
	}
	b.intx[1].Set(true)                 // PIRQB
	b.write(ISABridge, 0x60, 2, 0x050b) // two PIRQs, two interrupts
	require.Equal(t, []int{5, 11}, b.highs())
	b.write(ISABridge, 0x60, 2, 0x0b0b) // and one
	require.Equal(t, []int{11}, b.highs())
	b.intx[4].Set(false)
	require.Equal(t, []int{11}, b.highs())
	b.c.Reset()
	require.Empty(t, b.highs())
}

func TestResetPort(t *testing.T) {
	b := newBoard(t)
	b.ports.Write(PortResetControl, 1, 2)
	require.Zero(t, b.resets)
	require.EqualValues(t, 2, b.ports.Read(PortResetControl, 1))
	b.ports.Write(PortResetControl, 1, 6)
	require.Equal(t, 1, b.resets)
	b.c.Reset()
	require.Zero(t, b.ports.Read(PortResetControl, 1))
}

const pm = 0x600

func TestPMBlockIsWhereFirmwarePutsIt(t *testing.T) {
	b := newBoard(t)
	control := func(base uint64) uint64 { return b.ports.Read(base+PM1Control, 2) }
	require.EqualValues(t, 0xffff, control(pm))
	b.write(PowerMgmt, 0x40, 4, pm|1)
	require.EqualValues(t, 0xffff, control(pm), "placed, not enabled")
	b.write(PowerMgmt, 0x80, 1, 1)
	require.Zero(t, control(pm))
	b.write(PowerMgmt, 0x40, 4, 0xb000)
	require.EqualValues(t, 0xffff, control(pm))
	require.Zero(t, control(0xb000))
	require.EqualValues(t, 0xff, b.ports.Read(0xb000+64, 1))
	b.write(PowerMgmt, 0x40, 4, PortGPE0&0xffc0) // over another block of the same function
	require.NotPanics(t, func() { b.ports.Write(PortGPE0, 4, 0xffffffff) })
	b.write(PowerMgmt, 0x40, 4, 0)
	require.EqualValues(t, 0xffff, control(0), "port 0 means not assigned")
	require.NoError(t, b.c.EnablePM(pm))
	require.Zero(t, control(pm))
	require.EqualValues(t, pm|1, b.read(PowerMgmt, 0x40, 4))
	other := newBoard(t)
	require.NoError(t, other.c.Restore(b.c.Save()))
	require.Zero(t, other.ports.Read(pm+PM1Control, 2))
	b.c.Reset()
	require.EqualValues(t, 0xffff, control(pm))
	require.Error(t, b.c.EnablePM(0x610))
	require.Error(t, b.c.EnablePM(0))
}

func TestPMTimerCountsVirtualTime(t *testing.T) {
	b := newBoard(t)
	require.NoError(t, b.c.EnablePM(pm))
	b.clock.Advance(1_000_000_000)
	require.EqualValues(t, PMTimerHz, b.ports.Read(pm+PMTimer, 4))
	require.EqualValues(t, PMTimerHz>>8&0xffff, b.ports.Read(pm+PMTimer+1, 2))
	b.clock.Advance(1200_000_000_000) // 4,295,454,000 ticks: once around
	require.EqualValues(t, uint32(1200*PMTimerHz&0xffffffff), b.ports.Read(pm+PMTimer, 4))
	b.ports.Write(pm+PMTimer, 4, 0)
	require.EqualValues(t, uint32(1200*PMTimerHz&0xffffffff), b.ports.Read(pm+PMTimer, 4), "read-only")

	for off, want := range map[uint64]bool{0: false, 4: false, 5: true, 7: true, 8: true, 11: true, 12: false} {
		require.Equal(t, want, b.ports.NeedsTime(pm+off, false), "offset %d", off)
		require.False(t, b.ports.NeedsTime(pm+off, true))
	}
}

func TestPMTimerStatusAtEachHalfTurn(t *testing.T) {
	b := newBoard(t)
	require.NoError(t, b.c.EnablePM(pm))
	b.ports.Write(PortSMICommand, 1, ACPIEnable)
	half := devices.TicksToTime(1<<31, PMTimerHz)
	require.Equal(t, half, b.clock.Next())
	b.clock.Advance(half - 1)
	require.Zero(t, b.ports.Read(pm+PM1Status, 2))
	b.clock.Advance(half)
	require.EqualValues(t, 1, b.ports.Read(pm+PM1Status, 2))
	require.EqualValues(t, 1<<31, b.ports.Read(pm+PMTimer, 4))
	require.Empty(t, b.highs())
	b.ports.Write(pm+PM1Enable, 2, 1)
	require.Equal(t, []int{9}, b.highs())
	b.ports.Write(pm+PM1Status, 2, 1)
	require.Empty(t, b.highs())
	b.clock.Advance(half * 7) // several at once
	require.Equal(t, []int{9}, b.highs())
	require.Equal(t, devices.TicksToTime(8<<31, PMTimerHz), b.clock.Next())
}

func TestACPIEventsRaiseTheSCI(t *testing.T) {
	b := newBoard(t)
	require.NoError(t, b.c.EnablePM(pm))
	b.ports.Write(pm+PM1Status, 4, 0xffff<<16) // enable everything
	require.EqualValues(t, pm1Enables, b.ports.Read(pm+PM1Enable, 2))
	b.c.PressPowerButton()
	require.EqualValues(t, 1<<8, b.ports.Read(pm+PM1Status, 2))
	require.Empty(t, b.highs(), "ACPI is off")
	b.ports.Write(PortSMICommand, 1, ACPIEnable)
	require.EqualValues(t, 1, b.ports.Read(pm+PM1Control, 2))
	require.Equal(t, []int{9}, b.highs())
	b.ports.Write(pm+PM1Status, 1, 0xff)
	require.Equal(t, []int{9}, b.highs(), "the other byte")
	b.ports.Write(pm+PM1Status+1, 1, 1)
	require.Empty(t, b.highs())
	b.c.PressPowerButton()
	b.ports.Write(PortSMICommand, 1, ACPIDisable)
	require.Empty(t, b.highs())
	require.Zero(t, b.ports.Read(pm+PM1Control, 2))
	b.ports.Write(PortSMICommand, 1, ACPIEnable)
	b.c.Reset()
	require.Empty(t, b.highs())
}

func TestSMIPortsAreReadBack(t *testing.T) {
	b := newBoard(t)
	b.ports.Write(PortSMICommand, 2, 0x1234)
	require.EqualValues(t, 0x1234, b.ports.Read(PortSMICommand, 2))
	b.ports.Write(PortSMICommand+1, 1, 0x56)
	require.EqualValues(t, 0x56, b.ports.Read(PortSMICommand+1, 1))
	require.EqualValues(t, 0x34, b.ports.Read(PortSMICommand, 1)&0xff)
}

func TestGeneralPurposeEventsCanBeEnabled(t *testing.T) {
	b := newBoard(t)
	b.ports.Write(PortGPE0, 4, 0xabcd1234)
	require.EqualValues(t, 0xabcd0000, b.ports.Read(PortGPE0, 4))
	b.ports.Write(PortGPE0+3, 1, 0x55)
	require.EqualValues(t, 0x55cd, b.ports.Read(PortGPE0+2, 2))
	require.EqualValues(t, 0xcd, b.ports.Read(PortGPE0+2, 1)&0xff)
}

func TestSleepIsReported(t *testing.T) {
	b := newBoard(t)
	require.NoError(t, b.c.EnablePM(pm))
	b.ports.Write(pm+PM1Control, 2, 5<<10|1)
	require.Empty(t, b.slept)
	b.ports.Write(pm+PM1Control, 2, 1<<13|1)
	b.ports.Write(pm+PM1Control+1, 1, (1<<13|3<<10)>>8)
	require.Equal(t, []uint8{0, 3}, b.slept)
	require.EqualValues(t, 3<<10|1, b.ports.Read(pm+PM1Control, 2), "the enable bit reads as zero")
}

func TestOnlyOneChipsetFitsABus(t *testing.T) {
	b := newBoard(t)
	_, err := New(devices.NewClock(), b.bus, Config{Interrupts: devices.NewInterrupts()})
	require.Error(t, err)
}

// step is one thing that happens to the board.
type step struct {
	Kind, Size int
	At         uint64
	V          uint64
}

var drawStep = rapid.Custom(func(t *rapid.T) step {
	return step{
		Kind: rapid.IntRange(0, 8).Draw(t, "kind"),
		Size: 1 << rapid.IntRange(0, 2).Draw(t, "size"),
		At:   rapid.Uint64Range(0, 0xffff).Draw(t, "at"),
		V:    rapid.OneOf(rapid.Uint64(), rapid.SampledFrom([]uint64{0xf0, 0xf1, 0x601, 1, 5, 10, 0x80})).Draw(t, "value"),
	}
})

// spots are the ports and registers worth hitting.
var (
	spots     = []uint64{pm, pm + 2, pm + 4, pm + 5, pm + 7, pm + 8, 0xb2, 0xb3, 0xcf9, PortGPE0, PortGPE0 + 2, 0xcf8, 0xcfc}
	registers = []uint64{0x04, 0x40, 0x58, 0x59, 0x60, 0x61, 0x63, 0x72, 0x80, 0x90, 0xd2}
	functions = []uint64{HostBridge, ISABridge, PowerMgmt}
)

func (s step) apply(b *board) (seen uint64) {
	switch s.Kind {
	case 0:
		b.ports.Write(spots[s.At%uint64(len(spots))], s.Size, s.V)
	case 1:
		seen = b.ports.Read(spots[s.At%uint64(len(spots))], s.Size)
	case 2:
		b.write(functions[s.At%3], registers[s.At/3%uint64(len(registers))], s.Size, s.V)
	case 3:
		seen = b.read(functions[s.At%3], s.At/3&0xff, s.Size)
	case 4:
		b.intx[s.At%5].Set(s.V&1 != 0)
	case 5:
		b.clock.Advance(b.clock.Now() + int64(s.V&(1<<40-1)))
	case 6:
		b.c.PressPowerButton()
	case 8:
		_ = b.c.EnablePM(pm)
	case 7:
		b.ports.Write(s.At, s.Size, s.V)
		seen = b.ports.Read(s.At+s.V&3, s.Size)
	}
	return seen
}

func TestSavedStateGoesOnElsewhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, y := newBoard(t), newBoard(t)
		for _, s := range rapid.SliceOfN(drawStep, 30, 100).Draw(t, "before") {
			s.apply(x)
		}
		for _, s := range rapid.SliceOf(drawStep).Draw(t, "elsewhere before") {
			s.apply(y)
		}
		highs := y.highs()
		require.NoError(t, y.clock.Restore(x.clock.Save()))
		require.NoError(t, y.irqs.Restore(x.irqs.Save()))
		require.NoError(t, y.bus.Restore(x.bus.Save()))
		require.NoError(t, y.c.Restore(x.c.Save()))
		require.Equal(t, highs, y.highs(), "restoring drives nothing")
		y.level, y.resets, y.slept = x.level, x.resets, append([]uint8(nil), x.slept...)
		for _, s := range rapid.SliceOfN(drawStep, 30, 100).Draw(t, "after") {
			require.Equal(t, s.apply(x), s.apply(y), "%+v", s)
			require.Equal(t, x.highs(), y.highs())
		}
		require.Equal(t, x.slept, y.slept)
		require.Equal(t, x.resets, y.resets)
		require.Equal(t, x.c.Save(), y.c.Save())
		require.Equal(t, x.clock.Save(), y.clock.Save())

		want := newBoard(t).c.Save()
		want.PIRQ = x.c.Save().PIRQ
		x.c.Reset()
		require.Equal(t, want, x.c.Save())
	})
}

func TestRestoreRefusesImpossibleStates(t *testing.T) {
	b := newBoard(t)
	b.write(HostBridge, 0x59, 1, 0x30)
	before := b.c.Save()
	for name, spoil := range map[string]func(s *State){
		"reset control":       func(s *State) { s.ResetControl = 4 },
		"a source too many":   func(s *State) { s.PIRQ[3] = 2 },
		"reserved status":     func(s *State) { s.Power.PM1Status = 2 },
		"reserved enable":     func(s *State) { s.Power.PM1Enable = 1 << 15 },
		"sleep enable stored": func(s *State) { s.Power.PM1Ctrl = pm1SleepEnable },
		"another host bridge": func(s *State) { s.Host.Config[0] = 0 },
		"another ISA bridge":  func(s *State) { s.Host.Config[regPAM0] = 0; s.ISA.Config[0] = 0 },
		"another PM function": func(s *State) { s.Host.Config[regPAM0] = 0; s.PM.Config[0] = 0 },
	} {
		s := before
		spoil(&s)
		require.Error(t, b.c.Restore(s), name)
		require.Equal(t, before, b.c.Save(), name)
	}
}

func FuzzAccess(f *testing.F) {
	f.Add([]byte{2, 2, 5, 0, 1, 6, 0, 0, 0, 0, 4, 0, 1, 0, 0, 0x20})
	f.Add([]byte{7, 1, 0xf8, 0x0c, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBoard(t)
		for ; len(data) >= 8; data = data[8:] {
			v := uint64(data[4]) | uint64(data[5])<<8 | uint64(data[6])<<16 | uint64(data[7])<<24
			step{int(data[0] % 9), 1 << (data[1] % 3), uint64(data[2]) | uint64(data[3])<<8, v}.apply(b)
		}
		require.NoError(t, newBoard(t).c.Restore(b.c.Save()))
	})
}
