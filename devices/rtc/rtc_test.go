package rtc

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
)

// rig is a clock with what surrounds it.
type rig struct {
	clock *devices.Clock
	dev   *Device
	level bool
	rises int
}

// epoch is Friday, 31 December 1999, 23:59:50 UTC.
var epoch = time.Date(1999, 12, 31, 23, 59, 50, 0, time.UTC).Unix()

func newRig(cfg Config) *rig {
	r := &rig{clock: devices.NewClock()}
	r.dev = New(r.clock, devices.LineFunc(func(l bool) {
		if l && !r.level {
			r.rises++
		}
		r.level = l
	}), cfg)
	return r
}

// copy returns a new rig restored from r.
func (r *rig) copy(t require.TestingT) *rig {
	c := newRig(r.dev.cfg)
	require.NoError(t, c.dev.Restore(r.dev.Save()))
	require.NoError(t, c.clock.Restore(r.clock.Save()))
	c.level, c.rises = r.level, r.rises
	return c
}

func (r *rig) get(reg uint8) uint8 {
	r.dev.Write(portIndex, 1, uint64(reg))
	return uint8(r.dev.Read(portData, 1))
}

func (r *rig) set(reg, v uint8) {
	r.dev.Write(portIndex, 1, uint64(reg))
	r.dev.Write(portData, 1, uint64(v))
}

// time returns century, year, month, day, hour, minute, second, weekday as they stand.
func (r *rig) time() (v [8]uint8) {
	for i, reg := range []uint8{Century, regYear, regMonth, regDay, regHours, regMinutes, regSeconds, regWeekday} {
		v[i] = r.get(reg)
	}
	return v
}

func TestTimeOfDayFollowsVirtualTime(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	require.Equal(t, [8]uint8{0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x50, 6}, r.time())
	r.clock.Advance(10*second - 1)
	require.Equal(t, [8]uint8{0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 6}, r.time())
	r.clock.Advance(10 * second)
	require.Equal(t, [8]uint8{0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 7}, r.time())
	r.clock.Advance((10 + 59*86400) * second)
	require.Equal(t, [8]uint8{0x20, 0x00, 0x02, 0x29, 0x00, 0x00, 0x00, 3}, r.time(), "a leap year")
	require.Equal(t, devices.Never, r.clock.Next(), "nobody waits")
}

func TestFormats(t *testing.T) {
	for _, c := range []struct {
		b    uint8
		hour int
		want uint8
	}{
		{b24, 0, 0x00}, {b24, 13, 0x13}, {b24 | bBinary, 13, 13}, {b24 | bBinary, 23, 23},
		{0, 0, 0x12}, {0, 1, 0x01}, {0, 11, 0x11}, {0, 12, 0x92}, {0, 13, 0x81}, {0, 23, 0x91},
		{bBinary, 0, 12}, {bBinary, 12, 0x8c}, {bBinary, 23, 0x8b},
	} {
		r := newRig(Config{Epoch: int64(c.hour)*3600 + 34*60 + 56})
		r.set(regB, c.b)
		require.Equal(t, c.want, r.get(regHours), "register B %#x, hour %d", c.b, c.hour)
		wantMinutes := uint8(0x34)
		if c.b&bBinary != 0 {
			wantMinutes = 34
		}
		require.Equal(t, wantMinutes, r.get(regMinutes))
		before := r.time()
		r.set(regB, c.b|bSET)
		r.set(regHours, c.want)
		r.set(regB, c.b)
		require.Equal(t, before, r.time(), "what was read can be written back")
	}
}

func TestLocalTime(t *testing.T) {
	r := newRig(Config{Epoch: epoch, UTCOffset: 3600})
	require.Equal(t, [8]uint8{0x20, 0x00, 0x01, 0x01, 0x00, 0x59, 0x50, 7}, r.time())
}

func TestSettingTheTime(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	r.clock.Advance(300_000_000)
	r.set(regB, b24|bSET)
	for reg, v := range map[uint8]uint8{
		Century: 0x20, regYear: 0x24, regMonth: 0x02, regDay: 0x28, regHours: 0x23, regMinutes: 0x59, regSeconds: 0x58, regWeekday: 4,
	} {
		r.set(reg, v)
	}
	want := [8]uint8{0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58, 4}
	require.Equal(t, want, r.time())
	r.clock.Advance(5_500_000_000)
	require.Equal(t, want, r.time(), "it stands still")
	require.Zero(t, r.get(regA)&aUIP)
	r.set(regB, b24)
	r.clock.Advance(6*second - 1)
	require.Equal(t, want, r.time())
	r.clock.Advance(6 * second)
	require.EqualValues(t, 0x59, r.get(regSeconds), "the divider chain went on all the time")
	r.clock.Advance(7 * second)
	require.Equal(t, [8]uint8{0x20, 0x24, 0x02, 0x29, 0, 0, 0, 5}, r.time())
}

func TestWritesWhileTheTimeRuns(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	r.set(regMinutes, 0x10)
	r.set(regWeekday, 2)
	require.Equal(t, [8]uint8{0x19, 0x99, 0x12, 0x31, 0x23, 0x10, 0x50, 2}, r.time())
	r.set(regSeconds, 0x75) // no such second: carries
	require.Equal(t, [8]uint8{0x19, 0x99, 0x12, 0x31, 0x23, 0x11, 0x15, 2}, r.time())
	r.clock.Advance(86400 * second)
	require.EqualValues(t, 3, r.get(regWeekday))
}

func TestDividerReset(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	r.clock.Advance(100_000_000)
	r.set(regA, 0x70)
	r.clock.Advance(3_250_000_000)
	require.EqualValues(t, 0x50, r.get(regSeconds))
	r.get(regC)
	r.set(regA, aPowerOn)
	r.clock.Advance(3_750_000_000 - 1)
	require.EqualValues(t, 0x50, r.get(regSeconds))
	require.NotZero(t, r.get(regA)&aUIP)
	r.clock.Advance(3_750_000_000)
	require.EqualValues(t, 0x51, r.get(regSeconds), "half a second after the release")
}

func TestUIPBeforeEachUpdate(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	for _, c := range []struct {
		at   int64
		uip  uint8
		secs uint8
	}{
		{0, 0, 0x50},
		{second - 244_001, 0, 0x50},
		{second - 244_000, aUIP, 0x50},
		{second - 1, aUIP, 0x50},
		{second, 0, 0x51},
		{2*second - 1000, aUIP, 0x51},
		{2 * second, 0, 0x52},
	} {
		r.clock.Advance(c.at)
		require.Equal(t, c.uip, r.get(regA)&aUIP, "at %d ns", c.at)
		require.Equal(t, c.secs, r.get(regSeconds), "at %d ns", c.at)
	}
	r.clock.Advance(3*second - 1)
	r.set(regB, b24|bSET)
	require.Zero(t, r.get(regA)&aUIP, "no update will come")
}

func TestPeriodicRates(t *testing.T) {
	for rate, hz := range []int{0, 256, 128, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2} {
		r := newRig(Config{Epoch: epoch})
		r.set(regA, 0x20|uint8(rate))
		r.set(regB, b24|bPIE)
		n := 0
		for r.clock.Next() <= second {
			at := r.clock.Next()
			r.clock.Advance(at)
			n++
			require.Equal(t, n, r.rises)
			require.Equal(t, devices.TicksToTime(uint64(n)*crystal/uint64(hz), crystal), at, "no drift, rate %d", rate)
			require.EqualValues(t, cIRQ|cPeriod, r.get(regC)&^cUpdate)
			require.False(t, r.level)
		}
		require.Equal(t, hz, n, "rate %d", rate)
	}
}

func TestInterruptsWaitForRegisterC(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	r.set(regB, b24|bPIE)
	r.clock.Advance(100 * second)
	require.Equal(t, 1, r.rises)
	require.Equal(t, devices.Never, r.clock.Next(), "no more until it is acknowledged")
	require.EqualValues(t, cIRQ|cPeriod|cUpdate|cAlarm, r.get(regC), "midnight was the alarm")
	require.False(t, r.level)
	require.Zero(t, r.get(regC))
	require.Equal(t, devices.TicksToTime(100*crystal+32, crystal), r.clock.Next(), "the phase is that of virtual time")
}

func TestFlagsWithoutInterrupts(t *testing.T) {
	r := newRig(Config{Epoch: epoch + 3600})
	r.clock.Advance(second / 1024)
	require.Zero(t, r.get(regC))
	r.clock.Advance(second/1024 + 1)
	require.EqualValues(t, cPeriod, r.get(regC), "without IRQF")
	r.clock.Advance(second)
	require.EqualValues(t, cPeriod|cUpdate, r.get(regC))
	require.Zero(t, r.rises)
	r.clock.Advance(2 * second)
	r.set(regB, b24|bUIE)
	require.True(t, r.level, "enabled with the flag up")
	r.set(regB, b24)
	require.False(t, r.level)
}

func TestUpdateEndedInterrupt(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	r.clock.Advance(400_000_000)
	r.set(regB, b24|bUIE)
	for i := int64(1); i < 5; i++ {
		require.Equal(t, i*second, r.clock.Next())
		r.clock.Advance(i * second)
		require.EqualValues(t, i, r.rises)
		r.get(regC)
	}
	r.set(regB, b24|bUIE|bSET)
	require.EqualValues(t, b24|bSET, r.get(regB), "SET clears UIE")
	require.Equal(t, devices.Never, r.clock.Next())
}

func TestAlarm(t *testing.T) {
	const any = 0xff
	for _, c := range []struct {
		name    string
		b       uint8
		h, m, s uint8
		at      []int64 // seconds after 23:59:50
	}{
		{"every second", b24, any, any, any, []int64{1, 2, 3}},
		{"once a minute", b24, any, any, 0x05, []int64{15, 75, 135}},
		{"once an hour", b24, any, 0x30, 0x00, []int64{1810, 5410}},
		{"once a day", b24, 0x23, 0x59, 0x50, []int64{86400, 172800}},
		{"the lowest wildcard", b24, 0xc0, 0x00, 0x00, []int64{10, 3610}},
		{"every second of an hour", b24, 0x01, any, any, []int64{3610, 3611}},
		{"last second of it, then next day", b24, 0x00, 0x59, 0x59, []int64{3609, 90009}},
		{"twelve hours", 0, 0x92, 0x00, 0x00, []int64{43210}},
		{"twelve hours, midnight", 0, 0x12, 0x00, 0x00, []int64{10}},
		{"binary", b24 | bBinary, 23, 59, 59, []int64{9, 86409}},
		{"BCD in binary never matches", b24 | bBinary, any, any, 0x60, nil},
		{"no such hour", b24, 0x24, any, any, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(Config{Epoch: epoch})
			r.set(regHoursAlarm, c.h)
			r.set(regMinutesAlarm, c.m)
			r.set(regSecondsAlarm, c.s)
			r.set(regB, c.b|bAIE)
			for i, at := range c.at {
				require.Equal(t, at*second, r.clock.Next())
				r.clock.Advance(r.clock.Next())
				require.Equal(t, i+1, r.rises)
				require.EqualValues(t, cIRQ|cAlarm, r.get(regC)&(cIRQ|cAlarm))
				require.Equal(t, [3]uint8{r.get(regHours), r.get(regMinutes), r.get(regSeconds)},
					[3]uint8{pick(c.h, r.get(regHours)), pick(c.m, r.get(regMinutes)), pick(c.s, r.get(regSeconds))})
			}
			if c.at == nil {
				require.Equal(t, devices.Never, r.clock.Next())
			}
		})
	}
}

// pick returns the alarm byte, or the time's where any will do.
func pick(alarm, now uint8) uint8 {
	if alarm >= alarmAny {
		return now
	}
	return alarm
}

// The next alarm is the one that looking at every second finds.
func TestNextAlarmIsTheFirstMatch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRig(Config{Epoch: rapid.Int64Range(-1e10, 1e10).Draw(t, "epoch")})
		r.set(regB, rapid.SampledFrom([]uint8{0, b24, bBinary, b24 | bBinary}).Draw(t, "format"))
		field := func(values uint8, name string) uint8 {
			if rapid.Bool().Draw(t, name+" any") {
				return alarmAny
			}
			return r.dev.encode(int(rapid.Uint8Range(0, values).Draw(t, name)))
		}
		r.set(regHoursAlarm, field(25, "hour"))
		r.set(regMinutesAlarm, field(60, "minute"))
		r.set(regSecondsAlarm, field(60, "second"))
		want := devices.Never
		for s := int64(1); s <= 86400; s++ {
			tod := (((r.dev.s.Base + s) % 86400) + 86400) % 86400
			if h := r.dev.encodeHour(int(tod / 3600)); pick(r.dev.s.CMOS[regHoursAlarm], h) != h {
				s += 3599 - tod%3600
				continue
			}
			m, sec := r.dev.encode(int(tod/60%60)), r.dev.encode(int(tod%60))
			if pick(r.dev.s.CMOS[regMinutesAlarm], m) == m && pick(r.dev.s.CMOS[regSecondsAlarm], sec) == sec {
				want = s * second
				break
			}
		}
		require.Equal(t, want, r.dev.nextAlarm(0))
	})
}

func TestCMOSDescribesTheMachine(t *testing.T) {
	const mib = 1 << 20
	word := func(r *rig, at uint8) int { return int(r.get(at)) | int(r.get(at+1))<<8 }
	r := newRig(Config{BelowFourGiB: 48 * mib, AboveFourGiB: 0, CPUs: 1, Boot: [3]uint8{BootCD, BootDisk, BootNetwork}})
	require.Equal(t, 640, word(r, 0x15))
	require.Equal(t, 47*1024, word(r, 0x17))
	require.Equal(t, 47*1024, word(r, 0x30))
	require.Equal(t, 32*16, word(r, 0x34))
	require.EqualValues(t, 0x23, r.get(0x3d))
	require.EqualValues(t, 0x40, r.get(0x38))
	require.Zero(t, r.get(0x5f))

	r = newRig(Config{BelowFourGiB: 3072 * mib, AboveFourGiB: 5 << 30, CPUs: 4})
	require.Equal(t, 0xffff, word(r, 0x30), "saturates")
	require.Equal(t, (3072-16)*16, word(r, 0x34))
	require.Equal(t, 5<<30>>16, word(r, 0x5b)|int(r.get(0x5d))<<16)
	require.EqualValues(t, 3, r.get(0x5f))
	sum := 0
	for i := uint8(0x10); i <= 0x2d; i++ {
		sum += int(r.get(i))
	}
	require.Equal(t, sum, int(r.get(0x2e))<<8|int(r.get(0x2f)))

	r = newRig(Config{BelowFourGiB: mib / 2})
	require.Equal(t, 512, word(r, 0x15))
	require.Zero(t, word(r, 0x30))
}

func TestIndexPort(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	r.set(0x80|0x7f, 0x5a)
	require.EqualValues(t, 0x5a, r.get(0x7f), "bit 7 is the NMI mask")
	require.EqualValues(t, 0xff, r.dev.Read(portIndex, 1)&0xff)
	require.EqualValues(t, 0x5aff, r.dev.Read(portIndex, 2)&0xffff)
	r.dev.Write(portIndex, 2, 0xa57e)
	require.EqualValues(t, 0xa5, r.get(0x7e), "a wide write is index and data")
	r.set(regD, 0)
	r.set(regC, 0xff)
	require.EqualValues(t, dValid, r.get(regD), "read-only")
	require.Zero(t, r.get(regC))
}

func TestNeedsTime(t *testing.T) {
	r := newRig(Config{})
	for reg, want := range map[uint8][2]bool{ // read, write
		regSeconds: {true, true}, Century: {true, true}, regA: {true, true}, regC: {true, true},
		regB: {false, true}, regHoursAlarm: {false, true}, regD: {false, false}, 0x40: {false, false},
	} {
		r.dev.Write(portIndex, 1, uint64(reg))
		require.Equal(t, want, [2]bool{r.dev.NeedsTime(portData, false), r.dev.NeedsTime(portData, true)}, "register %#x", reg)
	}
	require.True(t, r.dev.NeedsTime(portIndex, true))
}

func TestResetKeepsWhatTheBatteryKeeps(t *testing.T) {
	r := newRig(Config{Epoch: epoch, CPUs: 2})
	fresh := r.dev.Save()
	r.dev.Reset()
	require.Equal(t, fresh, r.dev.Save())
	r.set(regYear, 0x42)
	r.set(0x0f, 0x0a) // shutdown code
	r.set(0x5f, 0x77)
	r.set(regB, b24|bPIE|bAIE|bUIE|bSQWE)
	r.clock.Advance(second)
	require.True(t, r.level)
	r.dev.Reset()
	require.False(t, r.level)
	require.Equal(t, devices.Never, r.clock.Next())
	require.EqualValues(t, 0x42, r.get(regYear))
	require.EqualValues(t, 0x0a, r.get(0x0f))
	require.EqualValues(t, 1, r.get(0x5f), "the machine is described anew")
	require.EqualValues(t, b24, r.get(regB))
	require.Zero(t, r.get(regC))
}

func TestRestoreRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*State){
		"index":     func(s *State) { s.Index = 128 },
		"A":         func(s *State) { s.CMOS[regA] |= aUIP },
		"C":         func(s *State) { s.CMOS[regC] = cIRQ },
		"base":      func(s *State) { s.Base = 1 << 50 },
		"base low":  func(s *State) { s.Base = -1 << 50 },
		"divider":   func(s *State) { s.Divider = 1 },
		"divider <": func(s *State) { s.Divider = -second },
		"looked at": func(s *State) { s.LookedAt = -1 },
		"weekday":   func(s *State) { s.Weekday = 7 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(Config{})
			before := r.dev.Save()
			s := before
			spoil(&s)
			require.Error(t, r.dev.Restore(s))
			require.Equal(t, before, r.dev.Save())
		})
	}
}

// maxScript bounds a script in bytes, so that none runs for long.
const maxScript = 4096

// exercise runs a script of operations, four bytes each, on a clock and on copies
// restored from it at arbitrary points, which must behave the same.
func exercise(t require.TestingT, script []byte) {
	cfg := Config{Epoch: epoch, BelowFourGiB: 1 << 30, CPUs: 1}
	a, b := newRig(cfg), newRig(cfg)
	script = script[:min(len(script), maxScript)]
	for ; len(script) >= 4; script = script[4:] {
		kind, x, v := script[0], script[1], binary.LittleEndian.Uint16(script[2:])
		size := 1 << (kind >> 4 & 3)
		reg := x & 0xf // mostly the registers that do something
		if x&0x80 != 0 {
			reg = Century
		}
		var got [2]uint64
		for i, r := range []*rig{a, b} {
			switch kind & 7 {
			case 0:
				r.set(reg, uint8(v))
			case 1:
				got[i] = uint64(r.get(reg))
			case 2:
				r.clock.Advance(r.clock.Now() + int64(v)*(1<<(x&31)))
			case 3:
				r.clock.Advance(max(r.clock.Now(), min(r.clock.Next(), r.clock.Now()+1e14)))
			case 4:
				r.dev.Write(uint64(x&1), size, uint64(v))
			case 5:
				got[i] = r.dev.Read(uint64(x&1), size)
			case 6:
				if x == 0 {
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
	f.Add([]byte{0, regB, 0x72, 0, 2, 25, 255, 255, 7, 0, 0, 0, 1, regC, 0, 0, 3, 0, 0, 0, 1, regC, 0, 0})
	f.Add([]byte{0, regB, 0x86, 0, 0, regYear, 0xff, 0, 0, 0x80, 0xff, 0, 0, regB, 0x06, 0, 7, 0, 0, 0, 1, regDay, 0, 0})
	f.Add([]byte{0, regA, 0x70, 0, 2, 20, 9, 9, 0, regA, 0x2f, 0, 0, 1, 0xff, 0, 0, 3, 0xc0, 0, 0, regB, 0x20, 0, 3, 0, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) { exercise(t, script) })
}

func TestRegisterAccessDoesNotAllocate(t *testing.T) {
	r := newRig(Config{Epoch: epoch})
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		r.clock.Advance(r.clock.Now() + second)
		r.set(regSeconds, 1)
		r.get(regHours)
		r.get(regC)
	}))
}
