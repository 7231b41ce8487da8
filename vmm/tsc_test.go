package vmm

import (
	"errors"
	"math"
	"math/big"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// modelTSC is KVM and its processor: ratio and counter in numbers without limit.
type modelTSC struct {
	ratio *big.Int
	frac  uint
}

func newModelTSC(hostKHz, guestKHz uint32, frac uint) modelTSC {
	r := new(big.Int).Lsh(big.NewInt(int64(guestKHz)), frac)
	return modelTSC{ratio: r.Div(r, big.NewInt(int64(hostKHz))), frac: frac}
}

// read is RDTSC in the guest.
func (m modelTSC) read(host, offset uint64) uint64 {
	v := new(big.Int).SetUint64(host)
	v.Mul(v, m.ratio).Rsh(v, m.frac)
	v.Add(v, new(big.Int).SetUint64(offset))
	return v.And(v, new(big.Int).SetUint64(math.MaxUint64)).Uint64()
}

func drawScale(t *rapid.T) (TSCScale, modelTSC, uint32) {
	hostKHz := rapid.Uint32Range(500_000, 6_000_000).Draw(t, "host kHz")
	frac := rapid.SampledFrom([]uint{vmxTSCFraction, svmTSCFraction}).Draw(t, "fraction bits")
	s, err := NewTSCScale(hostKHz, frozenKHz, frac)
	require.NoError(t, err)
	return s, newModelTSC(hostKHz, frozenKHz, frac), hostKHz
}

func TestScaledCounterIsKVMs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, m, _ := drawScale(t)
		require.Equal(t, m.ratio.Uint64(), s.ratio)
		host := rapid.Uint64().Draw(t, "host")
		v := s.Scale(host)
		require.Equal(t, m.read(host, 0), v)
		tick := s.NextTick(host)
		if tick != math.MaxUint64 {
			require.Greater(t, tick, host)
			require.Equal(t, v+1, m.read(tick, 0))
			require.Equal(t, v, m.read(tick-1, 0))
		} else {
			require.Equal(t, v, m.read(math.MaxUint64-1, 0))
		}
	})
}

func TestScalesThatKVMRefuses(t *testing.T) {
	for _, c := range []struct {
		host, guest uint32
		frac        uint
	}{{0, 1, 48}, {1000, 1, 40}, {1, math.MaxUint32, 48}, {1000, 1_000_000, 32}, {1000, 0, 32}} {
		_, err := NewTSCScale(c.host, c.guest, c.frac)
		require.Error(t, err, c)
	}
	s, err := NewTSCScale(2_600_000, 2_600_000, 48)
	require.NoError(t, err)
	require.EqualValues(t, 1<<62, s.Scale(1<<62), "a ratio of one")
	_, err = NewFrozenTSC(s, 1, 0)
	require.Error(t, err, "ticks closer than the guard")
}

// modelTSCHost is a host with a counter that goes on by itself, a guest that reads its own, and a timer.
type modelTSCHost struct {
	m      modelTSC
	rnd    *rand.Rand
	now    uint64
	slow   int // one step in so many takes long; 0: none
	tick   uint64
	offset uint64
	kick   uint64
}

// pass lets time go on.
func (h *modelTSCHost) pass() {
	h.now += 1 + h.rnd.Uint64N(h.tick/20_000) // up to 50 ns
	if h.slow > 0 && h.rnd.IntN(h.slow) == 0 {
		h.now += h.rnd.Uint64N(3 * h.tick)
	}
}

func (h *modelTSCHost) Now() uint64 {
	h.pass()
	v := h.now
	h.pass()
	return v
}

func (h *modelTSCHost) SetOffset(offset uint64) error {
	h.pass()
	h.offset = offset
	h.pass()
	return nil
}

func (h *modelTSCHost) KickIn(ticks uint64) error {
	h.pass()
	// The timer's clock may be a little faster or slower than the counter.
	h.kick = h.now + ticks - ticks/2000 + h.rnd.Uint64N(ticks/1000+1)
	return nil
}

// A slice that is not tainted has read its value and no other; and the guest's time never goes back, be slices
// tainted or not. If nothing on the host takes long, none is tainted.
func TestAnUntaintedSliceReadsOneValue(t *testing.T) {
	tainted, clean := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		s, m, hostKHz := drawScale(t)
		tick := s.NextTick(0)
		h := &modelTSCHost{
			m: m, rnd: rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)), tick: tick,
			now:  rapid.Uint64Range(0, 1<<58).Draw(t, "host's counter"),
			slow: rapid.SampledFrom([]int{0, 0, 20, 1000}).Draw(t, "slow"),
		}
		value := rapid.Uint64Range(0, 1<<60).Draw(t, "value")
		f, err := NewFrozenTSC(s, uint64(hostKHz)*uint64(tscGuard)/uint64(time.Millisecond), value)
		require.NoError(t, err)
		g := &guestTSC{FrozenTSC: f, host: h}
		latency := tick * 15 / 1000 // a kick takes 15 µs at most, but on a slow host
		read := uint64(0)
		taints := uint64(0)
		for range 60 {
			if h.rnd.IntN(3) == 0 {
				value += h.rnd.Uint64N(10)
			}
			require.NoError(t, g.enter(value))
			intended := g.Value()
			require.GreaterOrEqual(t, intended, value)
			if taints == 0 {
				require.Equal(t, value, intended)
			}
			first := read
			only := true
			run := h.now + h.rnd.Uint64N(2*tick) // when the guest makes an exit by itself
			kicked := h.kick
			if kicked != math.MaxUint64 {
				kicked += h.rnd.Uint64N(latency)
			}
			for h.now < run && h.now < kicked {
				v := h.m.read(h.now, h.offset)
				if v < read {
					t.Fatalf("the guest's time goes back from %d to %d", read, v)
				}
				only = only && v == intended
				read = v
				h.now += tick / 400
				h.pass()
			}
			if h.now >= h.kick {
				h.kick = math.MaxUint64 // it comes once
			}
			if g.left() {
				tainted++
				taints++
			} else {
				clean++
				require.True(t, only, "from %d to %d where %d was to be read", first, read, intended)
			}
			require.Equal(t, taints, g.Tainted())
		}
		if h.slow == 0 {
			require.Zero(t, taints)
		}
		g.Clean()
		require.Zero(t, g.Tainted())
	})
	t.Logf("%d slices tainted, %d not", tainted, clean)
	require.NotZero(t, tainted)
	require.NotZero(t, clean)
}

// A state that is loaded brings its own time.
func TestLoadedValueMayGoBack(t *testing.T) {
	s, err := NewTSCScale(3_000_000, frozenKHz, vmxTSCFraction)
	require.NoError(t, err)
	f, err := NewFrozenTSC(s, 1000, 500)
	require.NoError(t, err)
	f.Set(400)
	require.EqualValues(t, 500, f.Value(), "time does not go back")
	e, ok := f.Before(10)
	require.True(t, ok)
	require.True(t, f.After(e.Kick+2000))
	require.EqualValues(t, 501, f.Value(), "nor by what a tainted slice may have read")
	require.EqualValues(t, 1, f.Tainted())
	f.Load(100)
	require.EqualValues(t, 100, f.Value())
	require.Zero(t, f.Tainted())
}

func TestAnErrorOfTheHardwareEndsTheEntry(t *testing.T) {
	s, err := NewTSCScale(3_000_000, frozenKHz, vmxTSCFraction)
	require.NoError(t, err)
	f, err := NewFrozenTSC(s, 1000, 0)
	require.NoError(t, err)
	h := &brokenTSCHost{failures: 2}
	g := &guestTSC{FrozenTSC: f, host: h}
	require.Error(t, g.enter(1))
	require.Error(t, g.enter(1))
	require.NoError(t, g.enter(1), "what failed is tried again")
	require.NoError(t, g.enter(1))
	require.Equal(t, []string{"offset", "offset", "kick", "kick"}, h.calls, "and what is set already is not set again")
}

// brokenTSCHost fails once at each thing.
type brokenTSCHost struct {
	failures int
	calls    []string
}

func (h *brokenTSCHost) Now() uint64               { return 1 }
func (h *brokenTSCHost) SetOffset(uint64) error    { return h.fail("offset", 2) }
func (h *brokenTSCHost) KickIn(ticks uint64) error { return h.fail("kick", 1) }
func (h *brokenTSCHost) fail(what string, at int) error {
	h.calls = append(h.calls, what)
	if h.failures == at {
		h.failures--
		return errors.New(what)
	}
	return nil
}

// What KVM says is compared with what the host's counter makes of it, closely enough to tell processors' fractions apart.
func TestAWrongScaleIsSeen(t *testing.T) {
	const kHz, offset = 2_600_000, 1<<64 - 77
	for name, c := range map[string]struct {
		real   modelTSC
		offset uint64
		ok     bool
	}{
		"right":                {newModelTSC(kHz, 1, svmTSCFraction), offset, true},
		"VMX's fraction":       {newModelTSC(kHz, 1, vmxTSCFraction), offset, false},
		"not scaled":           {newModelTSC(kHz, kHz, svmTSCFraction), offset, false},
		"another host's rate":  {newModelTSC(kHz+2000, 1, svmTSCFraction), offset, false},
		"the offset forgotten": {newModelTSC(kHz, 1, svmTSCFraction), 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := NewTSCScale(kHz, frozenKHz, svmTSCFraction)
			require.NoError(t, err)
			h := &modelTSCHost{m: c.real, rnd: rand.New(rand.NewPCG(1, 2)), tick: s.NextTick(0), now: 1 << 45}
			err = verifyScale(s, offset, h.Now, func() (uint64, error) {
				h.pass()
				return h.m.read(h.now, c.offset), nil
			})
			if c.ok {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, errTSC)
			}
		})
	}
}

func TestHostCounterGoesOn(t *testing.T) {
	last := readTSC()
	for range 1000 {
		now := readTSC()
		require.Greater(t, now, last)
		last = now
	}
	require.Equal(t, time.Millisecond, ticksToDuration(2_600_000, 2_600_000))
	require.Equal(t, time.Hour, ticksToDuration(math.MaxUint64, 1))
}

// The probe says what this host can; and its guest notices a counter that is not frozen.
func TestFrozenTSCOfThisHost(t *testing.T) {
	r := ProbeTSC("")
	t.Logf("%+v", r)
	require.NotEmpty(t, r.Reason)
	require.False(t, ProbeTSC("/dev/null").Available)
	if r.Available {
		return
	}
	g, err := newProbeGuest("", tscProbe)
	require.NoError(t, err)
	defer g.close()
	require.NoError(t, g.restart())
	done, err := g.enter()
	require.NoError(t, err)
	require.True(t, done)
	regs, err := g.vcpu.Regs()
	require.NoError(t, err)
	require.ErrorIs(t, readOnce(&regs, regs.RDI<<32|regs.RSI), errTSC)
	require.NoError(t, readOnce(&kvm.Regs{RSI: 0x55667788, RDI: 0x11223344}, 0x1122334455667788))
}
