package ioapic

import (
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// delivery is one message to the local APICs.
type delivery struct {
	Dest    uint8
	Logical bool
	Mode    uint8
	Vector  uint8
	Level   bool
}

// recorder takes messages, unless it is deaf.
type recorder struct {
	got  []delivery
	deaf bool
}

func (r *recorder) Deliver(dest uint8, logical bool, mode, vector uint8, level bool) bool {
	r.got = append(r.got, delivery{dest, logical, mode, vector, level})
	return !r.deaf
}

func get(a *IOAPIC, reg uint8) uint32 {
	a.Write(offSelect, 4, uint64(reg))
	return uint32(a.Read(offWindow, 4))
}

func put(a *IOAPIC, reg uint8, v uint32) {
	a.Write(offSelect, 4, uint64(reg))
	a.Write(offWindow, 4, uint64(v))
}

func TestRegistersAreTheDataSheets(t *testing.T) {
	a := New(&recorder{})
	require.EqualValues(t, 0x00170020, get(a, 1))
	for pin := uint8(0); pin < Pins; pin++ {
		require.EqualValues(t, 0x00010000, get(a, 0x10+2*pin), "masked after reset")
		require.Zero(t, get(a, 0x11+2*pin))
	}
	require.Zero(t, get(a, 0x40), "no register past the last entry")
	for _, c := range []struct {
		reg         uint8
		write, want uint32
	}{
		{0x00, 0xffffffff, 0x0f000000}, {0x02, 0, 0x0f000000}, // arbitration follows the identifier
		{0x01, 0, 0x00170020},
		{0x3e, 0xffffffff, 0x1afff}, {0x3f, 0xffffffff, 0xff000000},
	} {
		put(a, c.reg, c.write)
		require.Equal(t, c.want, get(a, c.reg), "register %#x", c.reg)
	}
	a.Write(offSelect, 1, 1)
	require.EqualValues(t, 1, a.Read(offSelect, 1))
	require.Zero(t, a.Read(offWindow, 1), "the window is 32 bits wide")
	a.Write(offSelect, 1, 0)
	a.Write(offWindow, 2, 0)
	require.EqualValues(t, 0x0f000000, get(a, 0))
}

func TestAnEdgeSendsOneMessageAndIsLostWhileMasked(t *testing.T) {
	r := &recorder{}
	a := New(r)
	line := a.Line(4)
	line.Set(true)
	put(a, 0x18, 0x0841) // logical, fixed, vector 0x41
	put(a, 0x19, 0x03000000)
	require.Empty(t, r.got)
	line.Set(true)
	require.Empty(t, r.got, "no edge")
	line.Set(false)
	line.Set(true)
	line.Set(true)
	require.Equal(t, []delivery{{3, true, 0, 0x41, false}}, r.got)
	require.EqualValues(t, 0x0841, get(a, 0x18), "no remote IRR for edges")
}

func TestALevelIsServedUntilItsEOI(t *testing.T) {
	for name, eoi := range map[string]func(a *IOAPIC, v uint8){
		"broadcast": (*IOAPIC).EOI,
		"register":  func(a *IOAPIC, v uint8) { a.Write(offEOI, 4, uint64(v)) },
		"edge and back": func(a *IOAPIC, v uint8) { // what software does that has no EOI register
			low := get(a, 0x24)
			put(a, 0x24, low&^levelMode|masked)
			put(a, 0x24, low)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{}
			a := New(r)
			line := a.Line(10)
			line.Set(true)
			put(a, 0x24, 0xa150) // level, active low, lowest priority, vector 0x50
			want := delivery{0, false, 1, 0x50, true}
			require.Equal(t, []delivery{want}, r.got, "a level is seen when it is unmasked")
			require.EqualValues(t, 0xe150, get(a, 0x24))
			line.Set(false)
			line.Set(true)
			a.EOI(0x51)
			require.Len(t, r.got, 1, "one at a time")
			eoi(a, 0x50)
			require.Equal(t, []delivery{want, want}, r.got, "still high")
			line.Set(false)
			eoi(a, 0x50)
			require.Len(t, r.got, 2)
			require.EqualValues(t, 0xa150, get(a, 0x24))
		})
	}
}

func TestALevelThatNobodyTakesStaysDue(t *testing.T) {
	r := &recorder{deaf: true}
	a := New(r)
	put(a, 0x24, 0x8050)
	a.Line(10).Set(true)
	require.EqualValues(t, 0x8050, get(a, 0x24))
	r.deaf = false
	put(a, 0x24, 0x8050)
	require.Len(t, r.got, 2)
	require.EqualValues(t, 0xc050, get(a, 0x24))
}

func TestNMIAndExtINTAreEdgeTriggered(t *testing.T) {
	for _, mode := range []uint32{2, 4, 5, 7} {
		r := &recorder{}
		a := New(r)
		put(a, 0x10, levelMode|mode<<8)
		a.Line(0).Set(true)
		require.Equal(t, []delivery{{Mode: uint8(mode)}}, r.got)
		require.Zero(t, get(a, 0x10)&remoteIRR)
	}
}

// step is one thing that happens to an I/O APIC.
type step struct {
	Kind int
	At   uint64
	Size int
	V    uint64
}

var drawStep = rapid.Custom(func(t *rapid.T) step {
	return step{
		Kind: rapid.IntRange(0, 4).Draw(t, "kind"),
		At:   rapid.Uint64Range(0, 0x4f).Draw(t, "at"),
		Size: 1 << rapid.IntRange(0, 3).Draw(t, "size"),
		V:    rapid.OneOf(rapid.Uint64(), rapid.Uint64Range(0, 0x1ffff)).Draw(t, "value"),
	}
})

func (s step) apply(a *IOAPIC) uint64 {
	switch s.Kind {
	case 0:
		a.Write(s.At, s.Size, s.V)
	case 1:
		return a.Read(s.At, s.Size)
	case 2:
		put(a, uint8(s.At), uint32(s.V))
	case 3:
		a.Line(int(s.At % Pins)).Set(s.V&1 != 0)
	case 4:
		a.EOI(uint8(s.V))
	}
	return 0
}

func TestSavedStateGoesOnElsewhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rx, ry := &recorder{}, &recorder{}
		x, y := New(rx), New(ry)
		for _, s := range rapid.SliceOfN(drawStep, 30, 100).Draw(t, "before") {
			s.apply(x)
		}
		require.NoError(t, y.Restore(x.Save()))
		require.Empty(t, ry.got, "restoring sends nothing")
		rx.got = nil
		for _, s := range rapid.SliceOfN(drawStep, 30, 100).Draw(t, "after") {
			require.Equal(t, s.apply(x), s.apply(y))
		}
		require.Equal(t, rx.got, ry.got)
		require.Equal(t, x.Save(), y.Save())
		x.Reset()
		want := New(rx).Save()
		want.Level = y.Save().Level
		require.Equal(t, want, x.Save())
	})
}

// TestLevelsAreNeverLost: whenever a level-triggered input is high and unmasked, its
// message is being served.
func TestLevelsAreNeverLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := New(&recorder{})
		for _, s := range rapid.SliceOfN(drawStep, 30, 100).Draw(t, "steps") {
			s.apply(a)
			for n, e := range a.Save().Redirection {
				if isLevel(e) && e&masked == 0 && a.Save().Level>>n&1 != 0 {
					require.NotZero(t, e&remoteIRR, "pin %d", n)
				}
			}
		}
	})
}

func TestRestoreRefusesImpossibleStates(t *testing.T) {
	a := New(&recorder{})
	for name, spoil := range map[string]func(s *State){
		"a pin too many":     func(s *State) { s.Level = 1 << Pins },
		"identifier":         func(s *State) { s.ID = 1 },
		"reserved bit":       func(s *State) { s.Redirection[3] = 1 << 20 },
		"edge in service":    func(s *State) { s.Redirection[3] = remoteIRR },
		"NMI in service":     func(s *State) { s.Redirection[3] = remoteIRR | levelMode | 4<<modeShift },
		"reserved high half": func(s *State) { s.Redirection[3] = 1 << 40 },
	} {
		s := a.Save()
		spoil(&s)
		require.Error(t, a.Restore(s), name)
	}
}

func FuzzAccess(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0x24, 0, 0, 0, 0x10, 2, 0x50, 0x80, 0, 3, 10, 0, 1, 4, 0, 0, 0x50})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &recorder{}
		a := New(r)
		for ; len(data) >= 7; data = data[7:] {
			v := uint64(data[3]) | uint64(data[4])<<8 | uint64(data[5])<<16 | uint64(data[6])<<24
			step{int(data[0] % 5), uint64(data[1]), 1 << (data[2] % 4), v}.apply(a)
		}
		require.NoError(t, New(r).Restore(a.Save()))
	})
}
