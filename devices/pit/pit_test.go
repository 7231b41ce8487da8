package pit

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
)

// rig is a timer with what surrounds it.
type rig struct {
	clock *devices.Clock
	dev   *Device
	p61   devices.Handler
	level bool
	rises int
}

func newRig() *rig {
	r := &rig{clock: devices.NewClock()}
	r.dev = New(r.clock, devices.LineFunc(func(l bool) {
		if l && !r.level {
			r.rises++
		}
		r.level = l
	}))
	r.p61 = r.dev.Port61()
	return r
}

// copy returns a new rig restored from r.
func (r *rig) copy(t require.TestingT) *rig {
	c := newRig()
	require.NoError(t, c.dev.Restore(r.dev.Save()))
	require.NoError(t, c.clock.Restore(r.clock.Save()))
	c.level, c.rises = r.level, r.rises
	return c
}

// to advances to the first moment of an oscillator's tick.
func (r *rig) to(tick uint64) { r.clock.Advance(devices.TicksToTime(tick, Frequency)) }

func (r *rig) out(port uint64, v ...uint8) {
	for _, b := range v {
		r.dev.Write(port, 1, uint64(b))
	}
}

func (r *rig) in(port uint64) uint8 { return uint8(r.dev.Read(port, 1)) }

// word reads a counter's two bytes.
func (r *rig) word(port uint64) int { return int(r.in(port)) | int(r.in(port))<<8 }

func (r *rig) in61() uint8 { return uint8(r.p61.Read(0, 1)) }

// The whole state space that a guest can reach with short counts agrees with the
// pulse by pulse model: outputs, counts, and the edges of IRQ 0.
func TestCountersAgreeWithDataSheetPulseByPulse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRig()
		refs := [2]*reference{{gate: true}, {}}
		ports := [2]uint64{systemTimer, speaker}
		rises := 0
		tick := uint64(0)
		written := [2]bool{}
		for n := rapid.IntRange(20, 80).Draw(t, "steps"); n > 0; n-- {
			k := rapid.IntRange(0, 1).Draw(t, "counter")
			ref, port := refs[k], ports[k]
			was := refs[0].out
			switch rapid.SampledFrom([]string{"control", "count", "count", "gate", "wait", "wait"}).Draw(t, "do") {
			case "control":
				mode := rapid.IntRange(0, 5).Draw(t, "mode")
				ref.control(mode)
				r.out(portControl, uint8(port)<<cwSelect|accessBoth<<cwAccess|uint8(mode)<<cwMode)
				written[k] = true
			case "count":
				if !written[k] {
					continue
				}
				c := rapid.IntRange(2, 9).Draw(t, "count")
				ref.write(c)
				r.out(port, uint8(c), uint8(c>>8))
			case "gate":
				level := rapid.Bool().Draw(t, "gate")
				refs[1].setGate(level)
				r.p61.Write(0, 1, map[bool]uint64{true: p61Gate2}[level])
			case "wait":
				for w := rapid.IntRange(1, 12).Draw(t, "ticks"); w > 0; w-- {
					tick++
					r.to(tick)
					if refs[0].pulse() {
						rises++
					}
					refs[1].pulse()
					require.Equal(t, rises, r.rises, "edges of IRQ 0 at tick %d", tick)
				}
			}
			if refs[0].out && !was && tick == r.dev.now() && r.rises == rises+1 {
				rises++ // a control word or a count raised it at once
			}
			require.Equal(t, rises, r.rises)
			for i, ref := range refs {
				c := &r.dev.s.Counters[ports[i]]
				require.Equal(t, ref.out, c.out(tick), "counter %d, tick %d", i, tick)
				if ref.loaded && !ref.load && ref.running && (written[i]) {
					require.EqualValues(t, ref.ce, c.value(tick), "counter %d, tick %d", i, tick)
					require.Equal(t, ref.fresh, c.null(tick), "null count of counter %d, tick %d", i, tick)
				}
			}
		}
	})
}

func TestCountReadsBackOverTime(t *testing.T) {
	for _, c := range []struct {
		name    string
		control uint8
		count   uint16
		at      map[uint64]int // ticks since the write: value
	}{
		{"mode 0 goes on below zero", 0x30, 5, map[uint64]int{1: 5, 2: 4, 6: 0, 7: 0xffff}},
		{"mode 2 reloads", 0x34, 1000, map[uint64]int{1: 1000, 2: 999, 1000: 1, 1001: 1000, 2000: 1}},
		{"mode 3 even goes by two", 0x36, 1000, map[uint64]int{1: 1000, 2: 998, 500: 2, 501: 1000, 1000: 2, 1001: 1000}},
		{"mode 3 odd has a longer high half", 0x36, 5, map[uint64]int{1: 4, 2: 2, 3: 0, 4: 4, 5: 2, 6: 4}},
		{"mode 2 with the largest count", 0x34, 0, map[uint64]int{1: 0, 2: 0xffff, 65536: 1, 65537: 0}},
		{"mode 2 in BCD", 0x35, 0x1000, map[uint64]int{1: 0x1000, 2: 0x0999, 1000: 1, 1001: 0x1000}},
		{"mode 0 in BCD wraps at 9999", 0x31, 0x0001, map[uint64]int{2: 0, 3: 0x9999}},
		{"mode 2 in BCD with the largest count", 0x35, 0, map[uint64]int{1: 0, 2: 0x9999, 10001: 0}},
		{"mode 6 is mode 2", 0x3c, 3, map[uint64]int{1: 3, 3: 1, 4: 3}},
		{"mode 7 is mode 3", 0x3e, 4, map[uint64]int{1: 4, 2: 2, 3: 4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for tick, want := range c.at {
				r := newRig()
				r.to(777)
				r.out(portControl, c.control)
				r.out(0, uint8(c.count), uint8(c.count>>8))
				r.to(777 + tick)
				require.Equal(t, want, r.word(0), "%d ticks after the write", tick)
			}
		})
	}
}

func TestIRQ0NeitherDriftsNorLosesEdges(t *testing.T) {
	r := newRig()
	r.clock.Advance(12345)
	start := r.dev.now() + 1
	const n = 1193 // 1 kHz, as nearly as a PC has it
	r.out(portControl, 0x34)
	r.out(0, n&0xff, n>>8)
	r.rises = 0 // the control word itself raised the output
	for k := uint64(1); k <= 100_000; k++ {
		at := r.clock.Next()
		require.Equal(t, devices.TicksToTime(start+k*n, Frequency), at)
		r.clock.Advance(at)
		require.EqualValues(t, k, r.rises)
	}
}

func TestPeriodsBeforeTheHorizonAreOneEdgeInPhase(t *testing.T) {
	for _, mode := range []uint8{2, 3} {
		r := newRig()
		r.out(portControl, accessBoth<<cwAccess|mode<<cwMode)
		r.out(0, 0xe8, 0x03)
		r.rises = 0
		r.to(1 + 50*1000 + 17)
		require.Equal(t, 1, r.rises)
		require.Equal(t, devices.TicksToTime(1+51*1000, Frequency), r.clock.Next())
	}
}

func TestOneShotsOnIRQ0(t *testing.T) {
	for _, c := range []struct {
		name     string
		mode     uint8
		at       uint64 // ticks from the write to the edge
		lowAfter bool   // level just after the write
	}{
		{"mode 0 rises at terminal count", 0, 101, true},
		{"mode 4 rises at the end of its strobe", 4, 102, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig()
			r.out(portControl, accessBoth<<cwAccess|c.mode<<cwMode)
			r.out(0, 100, 0)
			require.Equal(t, c.lowAfter, !r.level)
			r.rises = 0
			r.to(c.at - 1)
			require.Zero(t, r.rises)
			r.to(c.at)
			require.Equal(t, 1, r.rises)
			require.Equal(t, devices.Never, r.clock.Next(), "only once")
			r.out(0, 100, 0)
			require.Equal(t, c.lowAfter, !r.level, "a new count")
			r.to(2*c.at + 10)
			require.Equal(t, 2, r.rises)
		})
	}
}

func TestChannel2FollowsVirtualTimeOnly(t *testing.T) {
	r := newRig()
	r.p61.Write(0, 1, 0)
	r.out(portControl, 0xb0) // mode 0
	r.out(2, 100, 0)
	r.to(5000)
	require.Zero(t, r.in61()&p61Out2)
	require.Equal(t, 100, r.word(2), "the gate is low")
	r.p61.Write(0, 1, p61Gate2)
	for i := 0; i < 1000; i++ {
		require.Equal(t, 100, r.word(2), "reading takes no time")
	}
	r.to(5060)
	require.Equal(t, 40, r.word(2))
	r.p61.Write(0, 1, 0)
	r.to(6000)
	require.Equal(t, 40, r.word(2), "the gate stopped it")
	r.p61.Write(0, 1, p61Gate2)
	r.to(6039)
	require.Zero(t, r.in61()&p61Out2)
	r.to(6040)
	require.NotZero(t, r.in61()&p61Out2)
	require.Equal(t, devices.Never, r.clock.Next(), "no timer is needed for it")
}

func TestPort61(t *testing.T) {
	r := newRig()
	r.p61.Write(0, 1, 0xff)
	require.EqualValues(t, 0x0f, r.in61()&^uint8(p61Refresh|p61Out2))
	changes, last := 0, r.in61()&p61Refresh
	for us := int64(0); us < 1000; us++ {
		r.clock.Advance(us * 1000)
		if v := r.in61() & p61Refresh; v != last {
			changes, last = changes+1, v
		}
	}
	require.Equal(t, 66, changes, "every 15 us in a millisecond")
}

func TestLatchKeepsCountAndStatus(t *testing.T) {
	r := newRig()
	r.out(portControl, 0x34)
	r.out(portControl, 0xe2) // read-back: status of counter 0
	require.EqualValues(t, statusOut|statusNull|0x34, r.in(0), "no count yet")
	r.out(0, 0x34, 0x12)
	r.to(1)
	r.out(portControl, 0x00) // latch
	require.False(t, r.dev.NeedsTime(0, false), "a latched count does not need the time")
	r.to(100)
	r.out(portControl, 0x00) // ignored: one is latched
	r.out(portControl, 0xc2) // read-back: status too
	require.EqualValues(t, statusOut|0x34, r.in(0), "status comes first")
	require.Equal(t, 0x1234, r.word(0))
	require.True(t, r.dev.NeedsTime(0, false))
	require.Equal(t, 0x1234-99, r.word(0), "running again")

	r.in(0) // the low byte of a running count
	r.out(portControl, 0x00)
	require.Equal(t, 0x1234-99, r.word(0), "a latched count begins with its low byte")
	r.in(0)

	r.out(portControl, 0xda) // read-back: counts of counters 0 and 2
	r.out(portControl, 0x34)
	r.to(200)
	r.out(0, 0x50, 0x00)
	r.to(201)
	require.Equal(t, 0x50, r.word(0), "a control word forgets the latch")
	require.EqualValues(t, 0xff, r.in(portControl))
}

func TestAccessModes(t *testing.T) {
	r := newRig()
	r.out(portControl, 0x14) // low byte, mode 2
	r.out(0, 0x40)
	r.to(1)
	require.EqualValues(t, 0x40, r.in(0))
	require.EqualValues(t, 0x40, r.in(0))
	r.out(portControl, 0x24) // high byte
	r.out(0, 0x12)
	r.to(2)
	require.EqualValues(t, 0x12, r.in(0))
	r.out(portControl, 0x00)
	require.EqualValues(t, 0x12, r.in(0))
	r.out(portControl, 0x30) // mode 0, both: the first byte stops the count
	r.out(0, 10, 0)
	r.to(5)
	r.out(0, 20)
	r.to(100)
	require.False(t, r.level, "the count of 10 does not end")
	r.out(0, 0)
	r.to(121)
	require.True(t, r.level)
}

func TestRestoreRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*State){
		"mode":    func(s *State) { s.Counters[0].Mode = 6 },
		"access":  func(s *State) { s.Counters[1].Access = 0 },
		"count":   func(s *State) { s.Counters[0].Count = 1<<16 + 1 },
		"zero":    func(s *State) { s.Counters[0].Armed = true },
		"next":    func(s *State) { s.Counters[2].Next = 1 << 20 },
		"start":   func(s *State) { s.Counters[0].Start = 1 << 60 },
		"held":    func(s *State) { s.Counters[2].Held = 1 << 60 },
		"latch":   func(s *State) { s.Counters[0].LatchedBytes = 3 },
		"gate 0":  func(s *State) { s.Counters[0].Gate = false },
		"gate 2":  func(s *State) { s.Counters[2].Gate = true },
		"port 61": func(s *State) { s.Port61 = 0x10 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig()
			before := r.dev.Save()
			s := before
			spoil(&s)
			require.Error(t, r.dev.Restore(s))
			require.Equal(t, before, r.dev.Save())
		})
	}
}

func TestResetIsPowerOn(t *testing.T) {
	r := newRig()
	fresh := r.dev.Save()
	r.out(portControl, 0x34, 0xb6)
	r.out(0, 1, 2)
	r.p61.Write(0, 1, 3)
	r.dev.Reset()
	require.Equal(t, fresh, r.dev.Save())
	require.False(t, r.level)
	require.Equal(t, devices.Never, r.clock.Next())
}

// maxScript bounds a script in bytes, so that none runs for long.
const maxScript = 4096

// exercise runs a script of operations, four bytes each, on a machine and on copies
// restored from it at arbitrary points, which must behave the same.
func exercise(t require.TestingT, script []byte) {
	a, b := newRig(), newRig()
	script = script[:min(len(script), maxScript)]
	for ; len(script) >= 4; script = script[4:] {
		kind, off, v := script[0], uint64(script[1]), binary.LittleEndian.Uint16(script[2:])
		size := 1 << (kind >> 4 & 3)
		var got [2]uint64
		for i, r := range []*rig{a, b} {
			switch kind & 7 {
			case 0:
				r.dev.Write(off&7, size, uint64(v))
			case 1:
				got[i] = r.dev.Read(off&7, size)
			case 2:
				r.clock.Advance(r.clock.Now() + int64(v)*(1<<(off&15)))
			case 3:
				r.clock.Advance(max(r.clock.Now(), min(r.clock.Next(), r.clock.Now()+1e9)))
			case 4:
				r.p61.Write(0, 1, uint64(v))
			case 5:
				got[i] = r.p61.Read(0, size)
			case 6:
				if off == 0 {
					r.dev.Reset()
				}
			}
		}
		require.Equal(t, got[0], got[1])
		require.Equal(t, a.rises, b.rises)
		require.Equal(t, a.level, b.level)
		require.Equal(t, a.clock.Next(), b.clock.Next())
		if kind&7 == 7 {
			b = a.copy(t)
		}
	}
	require.Equal(t, a.dev.Save(), b.dev.Save())
}

func TestRestoredCopyBehavesTheSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		exercise(t, rapid.SliceOfN(rapid.Byte(), 200, 800).Draw(t, "script"))
	})
}

func FuzzDevice(f *testing.F) {
	f.Add([]byte{0, 3, 0x34, 0, 0, 0, 0xe8, 0, 0, 0, 3, 0, 2, 10, 200, 0, 7, 0, 0, 0, 1, 0, 0, 0})
	f.Add([]byte{4, 0, 1, 0, 0, 3, 0xb6, 0, 0, 2, 5, 0, 0, 2, 0, 0, 2, 4, 9, 0, 0, 2, 7, 0, 7, 0, 0, 0, 5, 0, 0, 0})
	f.Add([]byte{0, 3, 0x36, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 15, 255, 255, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) { exercise(t, script) })
}

func TestRegisterAccessDoesNotAllocate(t *testing.T) {
	r := newRig()
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		r.dev.Write(portControl, 1, 0x34)
		r.dev.Write(0, 1, 1)
		r.dev.Write(0, 1, 1)
		r.dev.Write(portControl, 1, 0)
		r.dev.Read(0, 1)
	}))
}
