package pic

import (
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
)

// rig is a pair with what surrounds it.
type rig struct {
	p       *Pair
	handler [3]devices.Handler // master, slave, ELCR
	line    [16]devices.Line
	intr    bool
}

func newRig() *rig {
	r := &rig{}
	r.p = New(devices.LineFunc(func(l bool) { r.intr = l }))
	r.handler = [3]devices.Handler{r.p.Master(), r.p.Slave(), r.p.ELCR()}
	for i := range r.line {
		r.line[i] = r.p.Line(i)
	}
	return r
}

// pc returns a rig initialised as a PC's firmware does it, with ICW4 as given and
// nothing masked: vectors 0x20 and 0x28.
func pc(icw4Master uint8) *rig {
	r := newRig()
	r.master(0, 0x11)
	r.master(1, 0x20, 0x04, icw4Master, 0x00)
	r.slave(0, 0x11)
	r.slave(1, 0x28, 0x02, 0x01, 0x00)
	return r
}

func (r *rig) master(port uint64, v ...uint8) {
	for _, b := range v {
		r.handler[0].Write(port, 1, uint64(b))
	}
}

func (r *rig) slave(port uint64, v ...uint8) {
	for _, b := range v {
		r.handler[1].Write(port, 1, uint64(b))
	}
}

// read returns a register of the master (chip 0) or the slave, through OCW3.
func (r *rig) read(chip int, ocw3 uint64) uint8 {
	r.handler[chip].Write(0, 1, ocw3)
	return uint8(r.handler[chip].Read(0, 1))
}

func (r *rig) pulse(irqs ...int) {
	for _, n := range irqs {
		r.line[n].Set(true)
		r.line[n].Set(false)
	}
}

const (
	readIRR, readISR = 0x0a, 0x0b
	poll             = 0x0c
	eoi              = 0x20
)

func TestVectorsInOrderOfPriority(t *testing.T) {
	r := pc(0x01)
	r.pulse(7, 15, 3, 8, 0)
	require.True(t, r.intr)
	for _, want := range []uint8{0x20, 0x28, 0x2f, 0x23, 0x27} {
		require.True(t, r.p.Pending())
		require.Equal(t, want, r.p.Acknowledge())
		if want >= 0x28 {
			r.slave(0, eoi)
		}
		r.master(0, eoi)
	}
	require.False(t, r.intr)
}

func TestHigherInterruptsLowerUntilEOI(t *testing.T) {
	r := pc(0x01)
	r.pulse(5)
	require.EqualValues(t, 0x25, r.p.Acknowledge())
	r.pulse(6)
	require.False(t, r.intr, "6 waits for 5")
	r.pulse(5)
	require.False(t, r.intr, "5 waits for itself")
	r.pulse(1)
	require.True(t, r.intr)
	require.EqualValues(t, 0x21, r.p.Acknowledge())
	require.EqualValues(t, 0x22, r.read(0, readISR))
	require.EqualValues(t, 0x60, r.read(0, readIRR))
	r.master(0, eoi)
	require.EqualValues(t, 0x20, r.read(0, readISR), "the highest in service ended")
	r.master(0, 0x65) // specific EOI of 5
	require.EqualValues(t, 0x25, r.p.Acknowledge())
}

func TestEdgeNeedsAnotherEdge(t *testing.T) {
	r := pc(0x01)
	r.line[4].Set(true)
	require.EqualValues(t, 0x24, r.p.Acknowledge())
	r.master(0, eoi)
	require.False(t, r.intr, "high is not an edge")
	r.line[4].Set(true)
	require.False(t, r.intr)
	r.pulse(4)
	require.False(t, r.intr, "the level was high already")
	r.line[4].Set(true)
	require.True(t, r.intr)
	r.line[4].Set(false)
	require.True(t, r.intr, "an edge stays")
	r.line[4].Set(true)
	r.master(0, 0x11)
	r.master(1, 0x20, 0x04, 0x01, 0x00)
	require.False(t, r.intr, "initialisation forgets edges, and a high level is none")
}

func TestLevelRetriggersAfterEOI(t *testing.T) {
	r := pc(0x01)
	r.handler[2].Write(0, 2, 1<<11|1<<5)
	for _, c := range []struct {
		irq    int
		vector uint8
	}{{5, 0x25}, {11, 0x2b}} {
		r.line[c.irq].Set(true)
		for i := 0; i < 3; i++ {
			require.Equal(t, c.vector, r.p.Acknowledge())
			require.False(t, r.intr, "in service")
			r.slave(0, eoi)
			r.master(0, eoi)
			require.True(t, r.intr, "still high")
		}
		r.line[c.irq].Set(false)
		require.False(t, r.intr, "the level is the request")
	}
}

func TestELCRKeepsSystemInterruptsOnEdge(t *testing.T) {
	r := pc(0x01)
	r.handler[2].Write(0, 2, 0xffff)
	require.EqualValues(t, 0xdef8, r.handler[2].Read(0, 2)&0xffff)
	r.line[8].Set(true)
	r.p.Acknowledge()
	r.slave(0, eoi)
	r.master(0, eoi)
	require.False(t, r.intr)
	r.master(0, 0x11)
	require.EqualValues(t, 0xf8, r.handler[2].Read(0, 1)&0xff, "ICW1 leaves it")

	r = pc(0x01)
	r.line[5].Set(true)
	r.handler[2].Write(0, 1, 0x20)
	require.True(t, r.intr, "level now")
	r.line[5].Set(false)
	require.False(t, r.intr, "and no edge kept")
}

func TestSpuriousVectors(t *testing.T) {
	r := pc(0x01)
	require.EqualValues(t, 0x27, r.p.Acknowledge())
	require.Zero(t, r.read(0, readISR), "nothing is in service")

	r.handler[2].Write(1, 1, 1<<3) // IRQ 11 by level
	r.line[11].Set(true)
	require.True(t, r.intr)
	r.line[11].Set(false)
	require.False(t, r.intr)
	require.EqualValues(t, 0x27, r.p.Acknowledge())

	// The slave withdraws between the master's choice and its own vector.
	r.line[11].Set(true)
	r.p.master.cascadeHigh = true
	r.p.slave.IMR = 0xff
	require.EqualValues(t, 0x2f, r.p.Acknowledge())
	require.EqualValues(t, 0x04, r.read(0, readISR), "the master served its input 2")
	require.Zero(t, r.read(1, readISR))
}

func TestMasks(t *testing.T) {
	r := pc(0x01)
	r.master(1, 0xfb)
	require.EqualValues(t, 0xfb, r.handler[0].Read(1, 1)&0xff)
	r.pulse(1)
	require.False(t, r.intr)
	require.EqualValues(t, 0x02, r.read(0, readIRR), "the request waits")
	r.pulse(12)
	require.EqualValues(t, 0x2c, r.p.Acknowledge())
	r.slave(0, eoi)
	r.master(0, eoi)
	r.master(1, 0x00)
	require.EqualValues(t, 0x21, r.p.Acknowledge())
}

func TestAutomaticEOIAndRotation(t *testing.T) {
	r := pc(0x03) // AEOI
	r.pulse(3)
	require.EqualValues(t, 0x23, r.p.Acknowledge())
	require.Zero(t, r.read(0, readISR))
	r.pulse(3, 1)
	require.EqualValues(t, 0x21, r.p.Acknowledge(), "no rotation yet")
	require.EqualValues(t, 0x23, r.p.Acknowledge())
	r.master(0, 0x80) // rotate in AEOI mode
	r.pulse(3)
	require.EqualValues(t, 0x23, r.p.Acknowledge())
	r.pulse(3, 1, 6)
	require.EqualValues(t, 0x26, r.p.Acknowledge(), "3 is the lowest, 4 the highest")
	require.EqualValues(t, 0x21, r.p.Acknowledge())
	r.pulse(6)
	require.EqualValues(t, 0x23, r.p.Acknowledge())
	r.master(0, 0x00) // and off
	require.EqualValues(t, 0x26, r.p.Acknowledge())
	r.pulse(4, 3)
	require.EqualValues(t, 0x24, r.p.Acknowledge())
}

func TestRotation(t *testing.T) {
	for _, c := range []struct {
		name    string
		command uint8
		order   []uint8 // of 0, 4 and 5 after 4 was served and ended by command
	}{
		{"non-specific EOI", 0x20, []uint8{0x20, 0x24, 0x25}},
		{"rotate on non-specific EOI", 0xa0, []uint8{0x25, 0x20, 0x24}},
		{"rotate on specific EOI", 0xe4, []uint8{0x25, 0x20, 0x24}},
		{"set priority, then EOI", 0xc0 | 7, []uint8{0x20, 0x24, 0x25}},
		{"set priority of 0", 0xc0, []uint8{0x24, 0x25, 0x20}},
		{"no operation", 0x40, []uint8{0x20, 0x24, 0x25}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := pc(0x01)
			r.pulse(4)
			r.p.Acknowledge()
			r.master(0, c.command)
			if r.read(0, readISR) != 0 {
				r.master(0, eoi)
			}
			r.pulse(0, 4, 5)
			for _, want := range c.order {
				require.Equal(t, want, r.p.Acknowledge())
				r.master(0, 0x60|want&7)
			}
		})
	}
}

func TestSpecialMaskMode(t *testing.T) {
	r := pc(0x01)
	r.pulse(3)
	r.p.Acknowledge()
	r.pulse(6)
	r.master(1, 0x08) // mask 3, in service
	require.False(t, r.intr)
	r.master(0, 0x68) // special mask mode
	require.True(t, r.intr, "lower ones get through")
	require.EqualValues(t, 0x26, r.p.Acknowledge())
	r.master(0, eoi)
	require.EqualValues(t, 0x08, r.read(0, readISR), "a masked one is not ended unnamed")
	r.master(0, eoi)
	require.EqualValues(t, 0x08, r.read(0, readISR))
	r.pulse(7)
	require.True(t, r.intr)
	r.master(0, 0x48)
	require.False(t, r.intr, "off again")
}

func TestSpecialFullyNestedMode(t *testing.T) {
	for _, c := range []struct {
		icw4 uint8
		want bool
	}{{0x01, false}, {0x11, true}} {
		r := pc(c.icw4)
		r.pulse(12)
		require.EqualValues(t, 0x2c, r.p.Acknowledge())
		r.pulse(9)
		require.Equal(t, c.want, r.intr, "a higher one of the slave in service, ICW4 %#x", c.icw4)
		if c.want {
			require.EqualValues(t, 0x29, r.p.Acknowledge())
			r.pulse(13)
			require.False(t, r.intr)
		}
	}
}

func TestPoll(t *testing.T) {
	r := pc(0x01)
	require.EqualValues(t, 0x07, r.read(0, poll), "nothing")
	r.pulse(9, 4)
	require.EqualValues(t, 0x82, r.read(0, poll), "the cascade")
	require.EqualValues(t, 0x81, r.read(1, poll))
	require.EqualValues(t, 0x10, r.handler[0].Read(0, 1)&0xff, "one read only; IRR again")
	require.EqualValues(t, 0x04, r.read(0, readISR))
	require.EqualValues(t, 0x02, r.read(1, readISR))
	require.False(t, r.intr)
	r.slave(0, eoi)
	r.master(0, eoi)
	require.EqualValues(t, 0x24, r.p.Acknowledge())
}

func TestInitialisationSequences(t *testing.T) {
	r := newRig()
	r.master(0, 0x10) // ICW4 is not wanted
	r.master(1, 0x4f, 0x04, 0xa5)
	require.EqualValues(t, 0xa5, r.handler[0].Read(1, 1)&0xff, "OCW1 after ICW3")
	r.master(0, 0x13) // single: no ICW3
	require.Zero(t, r.handler[0].Read(1, 1)&0xff, "ICW1 clears the mask")
	r.master(1, 0x30, 0x01, 0x5a)
	require.EqualValues(t, 0x5a, r.handler[0].Read(1, 1)&0xff, "OCW1 after ICW4")
	r.master(1, 0)
	r.pulse(1)
	require.EqualValues(t, 0x31, r.p.Acknowledge())
	r.master(0, 0x12) // neither
	r.master(1, 0x40, 0xa5)
	require.EqualValues(t, 0xa5, r.handler[0].Read(1, 1)&0xff)
}

func TestCascadeInputIsNotWiredToALine(t *testing.T) {
	r := pc(0x01)
	r.line[2].Set(true)
	require.False(t, r.intr)
	require.Zero(t, r.p.Save().Master.Lines)
}

func TestWideAccessIsTwoBytes(t *testing.T) {
	r := newRig()
	r.handler[0].Write(0, 2, 0x4811)
	r.handler[0].Write(1, 1, 4)
	r.handler[0].Write(1, 1, 1)
	require.EqualValues(t, 0x48, r.p.Save().Master.Base)
	r.handler[0].Write(1, 1, 0x77)
	require.EqualValues(t, 0x7700, r.handler[0].Read(0, 2)&0xffff)
	require.EqualValues(t, 0xffff, r.handler[0].Read(2, 2)&0xffff)
}

func TestRestoreRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*State){
		"priority":        func(s *State) { s.Slave.Lowest = 8 },
		"step":            func(s *State) { s.Master.Step = 4 },
		"ELCR":            func(s *State) { s.Master.ELCR = 1 },
		"base":            func(s *State) { s.Slave.Base = 9 },
		"edge of a level": func(s *State) { s.Slave.ELCR, s.Slave.Latch = 2, 2 },
		"cascade edge":    func(s *State) { s.Master.Latch = 4 },
		"cascade line":    func(s *State) { s.Master.Lines = 4 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig()
			before := r.p.Save()
			s := before
			spoil(&s)
			require.Error(t, r.p.Restore(s))
			require.Equal(t, before, r.p.Save())
		})
	}
}

func TestResetIsPowerOn(t *testing.T) {
	r := newRig()
	fresh := r.p.Save()
	r = pc(0x03)
	r.handler[2].Write(0, 2, 0xffff)
	r.pulse(1)
	r.p.Reset()
	require.Equal(t, fresh, r.p.Save())
	require.False(t, r.intr)
}

// maxScript bounds a script in bytes, so that none runs for long.
const maxScript = 4096

// exercise runs a script of operations, three bytes each, on a pair and on copies
// restored from it at arbitrary points, which must behave the same; the output is at
// all times what Pending says, and an acknowledge takes back what it answered.
func exercise(t require.TestingT, script []byte) {
	a, b := pc(0x01), pc(0x01)
	script = script[:min(len(script), maxScript)]
	for ; len(script) >= 3; script = script[3:] {
		kind, x, v := script[0], script[1], script[2]
		size := 1 << (kind >> 4 & 3)
		var got [2]uint64
		for i, r := range []*rig{a, b} {
			switch kind & 7 {
			case 0, 1:
				r.handler[x%3].Write(uint64(x>>2&3), size, uint64(v)*0x0101_0101)
			case 2:
				got[i] = r.handler[x%3].Read(uint64(x>>2&3), size)
			case 3, 4:
				r.line[x&15].Set(v&1 != 0)
			case 5:
				got[i] = uint64(r.p.Acknowledge())
			case 6:
				if v == 0 {
					r.p.Reset()
				}
			}
			require.Equal(t, r.p.Pending(), r.intr)
		}
		require.Equal(t, got[0], got[1])
		if kind&7 == 7 {
			b = newRig()
			require.NoError(t, b.p.Restore(a.p.Save()))
			b.intr = a.intr
		}
	}
	require.Equal(t, a.p.Save(), b.p.Save())
}

func TestRestoredCopyBehavesTheSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		exercise(t, rapid.SliceOfN(rapid.Byte(), 150, 600).Draw(t, "script"))
	})
}

func FuzzPair(f *testing.F) {
	f.Add([]byte{3, 4, 1, 5, 0, 0, 7, 0, 0, 0, 0, eoi, 2, 0, 0})
	f.Add([]byte{0, 2, 0xff, 3, 11, 1, 7, 0, 0, 5, 0, 0, 0, 1, eoi, 0, 0, eoi, 5, 0, 0})
	f.Add([]byte{0, 0, 0x11, 0, 4, 0x40, 7, 0, 0, 0, 4, 4, 0, 4, 3, 3, 3, 1, 5, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) { exercise(t, script) })
}

func TestInterruptPathDoesNotAllocate(t *testing.T) {
	r := pc(0x01)
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		r.line[12].Set(true)
		r.line[12].Set(false)
		r.p.Acknowledge()
		r.handler[1].Write(0, 1, eoi)
		r.handler[0].Write(0, 1, eoi)
	}))
}
