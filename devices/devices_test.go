package devices

import (
	"math/big"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

type ram [16]byte

func (r *ram) Read(off uint64, size int) (v uint64) {
	for i := 0; i < size; i++ {
		v |= uint64(r[int(off)+i]) << (8 * i)
	}
	return v
}

func (r *ram) Write(off uint64, size int, v uint64) {
	for i := 0; i < size; i++ {
		r[int(off)+i] = byte(v >> (8 * i))
	}
}

type resolver struct {
	at uint64
	h  Handler
}

func (r resolver) Resolve(addr uint64) (Handler, uint64, uint64) {
	if addr >= r.at && addr < r.at+16 {
		return r.h, addr - r.at, r.at + 16 - addr
	}
	return nil, 0, 0
}

func TestBusDecodesSplitsAndFloats(t *testing.T) {
	for name, b := range map[string]*Bus{"ports": NewPortBus(), "memory": NewMemoryBus()} {
		t.Run(name, func(t *testing.T) {
			var lo, hi, moved ram
			require.NoError(t, b.Map(0x110, 16, &hi))
			require.NoError(t, b.Map(0x100, 16, &lo))
			require.Error(t, b.Map(0x10f, 2, &lo))
			b.SetResolver(resolver{0x118, &moved})
			b.Write(0x10e, 4, 0x44332211)
			require.EqualValues(t, 0x2211, lo.Read(14, 2))
			require.EqualValues(t, 0x4433, hi.Read(0, 2))
			require.EqualValues(t, 0x44332211, b.Read(0x10e, 4))
			require.EqualValues(t, 0xffffffff, b.Read(0x300, 4))
			b.Write(0x11e, 4, 0x88776655) // fixed wins below 0x120, the resolver above
			require.EqualValues(t, 0x6655, hi.Read(14, 2))
			require.EqualValues(t, 0x8877, moved.Read(8, 2))
			require.EqualValues(t, 0xffff0000>>0, b.Read(0x126, 4)|0xffff0000)
			b.Write(0xffff, 8, 1)
			require.EqualValues(t, uint64(1<<64-1), b.Read(0xffff, 8))
		})
	}
}

func TestClockFiresInOrderOfDeadlineThenRegistration(t *testing.T) {
	c := NewClock()
	var got []string
	log := func(s string) func() { return func() { got = append(got, s) } }
	var periodic *Timer
	a, b := c.NewTimer("a", log("a")), c.NewTimer("b", log("b"))
	periodic = c.NewTimer("p", func() {
		got = append(got, "p")
		require.Equal(t, periodic.Deadline(), Never)
		next, skipped := NextPeriod(c.Now(), 10, c.Horizon())
		require.EqualValues(t, 2, skipped)
		periodic.Arm(next)
	})
	b.Arm(5)
	a.Arm(5)
	periodic.Arm(7)
	c.Advance(4)
	require.Empty(t, got)
	c.Advance(30)
	require.Equal(t, []string{"a", "b", "p"}, got)
	require.EqualValues(t, 37, c.Next())
	c.Advance(20)
	require.EqualValues(t, 30, c.Now(), "time never goes back")
	s := c.Save()
	d := NewClock()
	require.Error(t, d.Restore(s), "a timer that does not exist")
	d.NewTimer("p", func() {})
	require.NoError(t, d.Restore(s))
	require.Equal(t, s, d.Save())
}

func TestTicksAndTimeAreInverse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		hz := rapid.Uint64Range(1, 1<<32).Draw(t, "hz")
		ns := rapid.Int64Range(0, 1<<60).Draw(t, "ns")
		want := new(big.Int).Mul(big.NewInt(ns), new(big.Int).SetUint64(hz))
		want.Div(want, big.NewInt(1e9))
		ticks := ScaleTime(ns, hz)
		require.Equal(t, want.Uint64(), ticks)
		if hz <= 1e9 {
			back := TicksToTime(ticks, hz)
			require.LessOrEqual(t, back, ns)
			require.Equal(t, ticks, ScaleTime(back, hz))
			if back > 0 {
				require.Less(t, ScaleTime(back-1, hz), ticks+boolToUint(ticks == 0))
			}
		}
	})
}

func boolToUint(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

func TestSharedLineIsTheOrOfItsSources(t *testing.T) {
	i := NewInterrupts()
	var edges []bool
	i.Connect(5, LineFunc(func(l bool) { edges = append(edges, l) }))
	a, b := i.Source(5), i.Source(5)
	a.Set(true)
	b.Set(true)
	a.Set(false)
	s := i.Save()
	b.Set(false)
	require.Equal(t, []bool{true, false}, edges)
	require.NoError(t, i.Restore(s))
	require.Equal(t, s, i.Save())
	s.High[6] = 1
	require.Error(t, i.Restore(s))
}
