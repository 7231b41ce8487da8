package serial

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
)

// rig is a UART with what surrounds it.
type rig struct {
	clock *devices.Clock
	dev   *Device
	level bool
	rises int
	sent  []byte
}

func newRig() *rig {
	r := &rig{clock: devices.NewClock()}
	r.dev = New(r.clock, "com1", devices.LineFunc(func(l bool) {
		if l && !r.level {
			r.rises++
		}
		r.level = l
	}), func(p []byte) { r.sent = append(r.sent, p...) })
	return r
}

// copy returns a new rig restored from r.
func (r *rig) copy(t require.TestingT) *rig {
	c := newRig()
	require.NoError(t, c.dev.Restore(r.dev.Save()))
	require.NoError(t, c.clock.Restore(r.clock.Save()))
	c.level, c.rises = r.level, r.rises
	c.sent = append([]byte(nil), r.sent...)
	return c
}

func (r *rig) out(reg uint64, v ...uint8) {
	for _, b := range v {
		r.dev.Write(reg, 1, uint64(b))
	}
}

func (r *rig) in(reg uint64) uint8 { return uint8(r.dev.Read(reg, 1)) }

// drain reads the receiver until it is empty.
func (r *rig) drain() (p []byte) {
	for r.in(regLSR)&lsrReady != 0 {
		p = append(p, r.in(regData))
	}
	return p
}

// open sets 115200 8N1, OUT2 and the given interrupts and FIFO control.
func open(ier, fcr uint8) *rig {
	r := newRig()
	r.out(regLCR, 0x83)
	r.dev.Write(regData, 2, 1)
	r.out(regLCR, 0x03)
	r.out(regIIR, fcr)
	r.out(regMCR, mcrDTR|mcrRTS|mcrOUT2)
	r.out(regIER, ier)
	return r
}

func TestPowerOn(t *testing.T) {
	r := newRig()
	for reg, want := range []uint8{0, 0, iirNone, 0, 0, lsrTHRE | lsrTEMT, msrCTS | msrDSR | msrDCD, 0} {
		require.Equal(t, want, r.in(uint64(reg)), "register %d", reg)
	}
	r.out(regData, []byte("no setup needed")...)
	require.Equal(t, "no setup needed", string(r.sent))
	require.False(t, r.level)
}

func TestRegistersKeepTheirBits(t *testing.T) {
	r := newRig()
	for _, c := range []struct {
		reg  uint64
		want uint8
	}{{regIER, 0x0f}, {regMCR, 0x1f}, {regSCR, 0xff}, {regLCR, 0xff}} {
		r.out(c.reg, 0xff)
		require.Equal(t, c.want, r.in(c.reg), "register %d", c.reg)
	}
	r.dev.Write(regData, 2, 0x1234) // DLAB is set now
	require.EqualValues(t, 0x1234, r.dev.Read(regData, 2)&0xffff)
	r.out(regLCR, 0)
	require.EqualValues(t, 0x0f, r.in(regIER))
	require.Empty(t, r.sent)
	r.out(regMSR, 0xff)
	r.out(regLSR, 0xff)
	require.EqualValues(t, lsrTHRE|lsrTEMT, r.in(regLSR), "read-only")
}

func TestTransmitterEmptyInterrupt(t *testing.T) {
	r := open(0, 0)
	require.False(t, r.level)
	r.out(regIER, ierTHRE)
	require.True(t, r.level, "enabling it while the transmitter is empty")
	require.EqualValues(t, iirTHRE, r.in(regIIR))
	require.False(t, r.level, "reading IIR acknowledges")
	require.EqualValues(t, iirNone, r.in(regIIR))
	r.rises = 0
	r.out(regData, 'a')
	require.True(t, r.level)
	r.out(regData, 'b')
	require.Equal(t, 2, r.rises, "each byte is an edge, acknowledged or not")
	r.out(regIER, 0)
	require.False(t, r.level)
	r.out(regIER, ierTHRE)
	require.True(t, r.level)
	require.Equal(t, "ab", string(r.sent))
}

func TestReceiveWithoutFIFO(t *testing.T) {
	r := open(ierReceive, 0)
	r.dev.Receive([]byte("xyz"))
	require.EqualValues(t, iirReceive, r.in(regIIR))
	for i, want := range []byte("xyz") {
		require.Equal(t, i+1, r.rises, "an edge for each byte")
		require.True(t, r.level)
		require.Equal(t, want, r.in(regData))
	}
	require.False(t, r.level)
	require.EqualValues(t, 'z', r.in(regData), "an empty receiver repeats itself")
	require.EqualValues(t, lsrTHRE|lsrTEMT, r.in(regLSR))
	require.Equal(t, devices.Never, r.clock.Next(), "no time-out without FIFOs")
}

func TestTriggerLevels(t *testing.T) {
	for i, level := range []int{1, 4, 8, 14} {
		r := open(ierReceive, fcrEnable|uint8(i)<<fcrTriggerShift)
		r.dev.Receive(make([]byte, level-1))
		require.False(t, r.level, "level %d", level)
		r.dev.Receive([]byte{1})
		require.True(t, r.level, "level %d", level)
		require.EqualValues(t, iirFIFO|iirReceive, r.in(regIIR))
		r.in(regData)
		require.False(t, r.level, "below level %d", level)
	}
}

func TestCharacterTimeout(t *testing.T) {
	const char = 10 * second / 115200 // 8N1
	r := open(ierReceive, fcrEnable|3<<fcrTriggerShift)
	r.clock.Advance(1000)
	r.dev.Receive([]byte("abc"))
	require.InDelta(t, 1000+4*char, r.clock.Next(), 4, "four characters")
	r.clock.Advance(1000 + 2*char)
	require.EqualValues(t, 'a', r.in(regData))
	require.InDelta(t, 1000+6*char, r.clock.Next(), 4, "starts anew with a read")
	r.clock.Advance(r.clock.Next() - 1)
	require.False(t, r.level)
	r.clock.Advance(r.clock.Next())
	require.True(t, r.level)
	require.EqualValues(t, iirFIFO|iirTimeout, r.in(regIIR))
	require.True(t, r.level, "reading IIR does not acknowledge")
	require.EqualValues(t, 'b', r.in(regData))
	require.False(t, r.level)
	require.EqualValues(t, 'c', r.in(regData))
	require.Equal(t, devices.Never, r.clock.Next(), "nothing left to wait for")

	r.out(regLCR, 0x80|0x1f) // slower and longer: 12 bits at 9600
	r.dev.Write(regData, 2, 12)
	r.out(regLCR, 0x1f)
	r.dev.Receive([]byte("d"))
	require.InDelta(t, r.clock.Now()+4*12*second/9600, r.clock.Next(), 4)
}

func TestInterruptPriority(t *testing.T) {
	r := open(ierReceive|ierTHRE|ierLine|ierModem, fcrEnable)
	r.dev.SetModem(false, true, true, false)
	r.dev.Receive([]byte("a"))
	r.dev.ReceiveBreak()
	require.EqualValues(t, iirFIFO|iirReceive, r.in(regIIR), "the break is not at the top yet")
	require.EqualValues(t, 'a', r.in(regData))
	require.EqualValues(t, iirFIFO|iirLine, r.in(regIIR))
	require.EqualValues(t, lsrInFIFO|lsrTEMT|lsrTHRE|lsrBreak|lsrFraming|lsrReady, r.in(regLSR))
	require.EqualValues(t, lsrTEMT|lsrTHRE|lsrReady, r.in(regLSR), "reading clears")
	require.EqualValues(t, iirFIFO|iirReceive, r.in(regIIR))
	require.Zero(t, r.in(regData))
	require.EqualValues(t, iirFIFO|iirTHRE, r.in(regIIR))
	require.EqualValues(t, iirFIFO|iirModem, r.in(regIIR))
	require.EqualValues(t, msrDCTS|msrDSR|msrDCD, r.in(regMSR))
	require.EqualValues(t, iirFIFO|iirNone, r.in(regIIR))
	require.False(t, r.level)
}

func TestOUT2GatesTheLine(t *testing.T) {
	r := open(ierTHRE, 0)
	require.True(t, r.level)
	r.out(regMCR, mcrDTR)
	require.False(t, r.level)
	r.out(regMCR, mcrOUT2)
	require.True(t, r.level)
	r.out(regMCR, mcrOUT2|mcrLoop)
	require.False(t, r.level, "outputs are inactive in loopback")
	require.EqualValues(t, iirTHRE, r.in(regIIR), "but the chip's interrupts work")
}

func TestModemStatus(t *testing.T) {
	r := open(ierModem, 0)
	for _, c := range []struct {
		name               string
		cts, dsr, dcd, ri  bool
		want               uint8
		interruptsExpected bool
	}{
		{"all lost", false, false, false, false, msrDCTS | msrDDSR | msrDDCD, true},
		{"ring begins", false, false, false, true, msrRI, false},
		{"ring ends", false, false, false, false, msrTERI, true},
		{"nothing", false, false, false, false, 0, false},
		{"carrier", false, false, true, false, msrDCD | msrDDCD, true},
	} {
		r.dev.SetModem(c.cts, c.dsr, c.dcd, c.ri)
		require.Equal(t, c.interruptsExpected, r.level, c.name)
		require.Equal(t, c.want, r.in(regMSR), c.name)
		require.False(t, r.level, c.name)
	}
}

func TestLoopback(t *testing.T) {
	r := open(0, fcrEnable)
	r.dev.Receive([]byte("before"))
	r.drain()
	r.in(regMSR)
	for i, want := range map[uint8]uint8{
		mcrDTR: msrDSR, mcrRTS: msrCTS, mcrOUT1: msrRI, mcrOUT2: msrDCD,
	} {
		r.out(regMCR, mcrLoop|i)
		require.Equal(t, want, r.in(regMSR)&msrLevels)
	}
	r.out(regMCR, mcrLoop)
	r.in(regMSR)
	r.out(regMCR, mcrLoop|mcrRTS)
	require.EqualValues(t, msrCTS|msrDCTS, r.in(regMSR))

	r.dev.Receive([]byte("outside"))
	r.out(regData, []byte("0123456789abcdef")...)
	require.Zero(t, r.in(regLSR)&lsrOverrun)
	r.out(regData, 'X')
	require.NotZero(t, r.in(regLSR)&lsrOverrun, "the 17th byte")
	require.Equal(t, "0123456789abcdef", string(r.drain()), "the FIFO keeps what it had")
	require.Empty(t, r.sent)
	r.out(regMCR, 0)
	require.EqualValues(t, msrCTS|msrDSR|msrDCD, r.in(regMSR)&msrLevels)
	require.Equal(t, "outside", string(r.drain()), "input waited")

	r.out(regIIR, 0)
	r.out(regMCR, mcrLoop)
	r.out(regData, 'a', 'b')
	require.EqualValues(t, lsrReady|lsrOverrun|lsrTHRE|lsrTEMT, r.in(regLSR))
	require.EqualValues(t, 'b', r.in(regData), "without FIFO the newer byte stays")
}

func TestBacklogIsBoundedAndInOrder(t *testing.T) {
	r := open(0, fcrEnable)
	all := make([]byte, MaxBacklog+fifoSize)
	for i := range all {
		all[i] = byte(i * 7)
	}
	r.dev.Receive(all[:fifoSize])
	require.Equal(t, MaxBacklog, r.dev.Room())
	r.dev.Receive(all[fifoSize:])
	require.Zero(t, r.dev.Room())
	require.Zero(t, r.in(regLSR)&lsrOverrun)
	r.dev.Receive([]byte("lost"))
	require.NotZero(t, r.in(regLSR)&lsrOverrun)
	require.True(t, bytes.Equal(all, r.drain()))
	require.Equal(t, MaxBacklog, r.dev.Room())
}

func TestBreakKeepsItsPlace(t *testing.T) {
	for _, fcr := range []uint8{0, fcrEnable} {
		r := open(0, fcr)
		r.dev.Receive([]byte("one"))
		r.dev.ReceiveBreak()
		r.dev.Receive([]byte("two"))
		var got []byte
		for {
			lsr := r.in(regLSR)
			if lsr&lsrReady == 0 {
				break
			}
			b := r.in(regData)
			if lsr&lsrBreak != 0 {
				require.Zero(t, b)
				b = '!'
			}
			got = append(got, b)
		}
		require.Equal(t, "one!two", string(got))
	}
}

func TestFIFOControl(t *testing.T) {
	r := open(0, 0xc6)
	require.EqualValues(t, iirNone, r.in(regIIR), "nothing is programmed without the enable bit")
	r.out(regIIR, 0xc1)
	require.EqualValues(t, iirFIFO|iirNone, r.in(regIIR))
	r.dev.Receive([]byte("gone"))
	r.out(regIIR, 0xc1)
	require.NotZero(t, r.in(regLSR)&lsrReady)
	r.out(regIIR, 0xc3)
	require.Zero(t, r.in(regLSR)&lsrReady, "cleared")
	require.Equal(t, devices.Never, r.clock.Next())
	r.dev.Receive([]byte("gone too"))
	r.out(regIIR, 0)
	require.Zero(t, r.in(regLSR)&lsrReady, "a change of mode clears")
}

func TestResetKeepsBacklogAndModem(t *testing.T) {
	r := newRig()
	fresh := r.dev.Save()
	r.out(regIER, 0x0f)
	r.out(regMCR, 0x0f)
	r.out(regIIR, 0xc1)
	r.out(regLCR, 0x83)
	r.dev.Write(0, 2, 7)
	r.dev.Reset()
	require.Equal(t, fresh, r.dev.Save())
	require.False(t, r.level)

	r.out(regIIR, 0xc1)
	r.dev.SetModem(false, false, true, false)
	r.dev.Receive(make([]byte, 20))
	r.dev.Reset()
	require.Equal(t, devices.Never, r.clock.Next())
	require.EqualValues(t, msrDCD, r.in(regMSR))
	require.Len(t, r.drain(), 4, "what was in the chip is lost")
}

func TestSaveSharesNothing(t *testing.T) {
	r := newRig()
	r.dev.Receive([]byte("abcd"))
	s := r.dev.Save()
	other := newRig()
	require.NoError(t, other.dev.Restore(s))
	s.Backlog[0] = 'X'
	require.Equal(t, "abcd", string(other.drain()))
	require.Equal(t, "abcd", string(r.drain()))
}

func TestRestoreRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*State){
		"count":          func(s *State) { s.FCR, s.Count = fcrEnable, 17 },
		"count, no FIFO": func(s *State) { s.Count = 2 },
		"FCR":            func(s *State) { s.FCR = 0xc0 },
		"backlog":        func(s *State) { s.Backlog = make([]byte, MaxBacklog+1) },
		"break":          func(s *State) { s.Break, s.BreakAt = true, 1 },
		"IER":            func(s *State) { s.IER = 0x10 },
		"MCR":            func(s *State) { s.MCR = 0x20 },
		"lines":          func(s *State) { s.Lines = 1 },
		"errors":         func(s *State) { s.Errors = lsrTHRE },
		"flags":          func(s *State) { s.Flags[3] = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig()
			before := r.dev.Save()
			s := r.dev.Save()
			spoil(&s)
			require.Error(t, r.dev.Restore(s))
			require.Equal(t, before, r.dev.Save())
		})
	}
}

// maxScript bounds a script in bytes, so that none runs for long.
const maxScript = 4096

// exercise runs a script of operations, four bytes each, on a UART and on copies
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
			case 0, 1:
				r.dev.Write(off&7, size, uint64(v))
			case 2:
				got[i] = r.dev.Read(off&7, size)
			case 3:
				r.clock.Advance(r.clock.Now() + int64(v)*(1<<(off&7)))
			case 4:
				r.dev.Receive(bytes.Repeat([]byte{byte(v)}, int(off)))
			case 5:
				switch {
				case off == 0:
					r.dev.Reset()
				case off == 1:
					r.dev.Receive(make([]byte, int(v)*2)) // up to twice the bound
				case off&1 == 0:
					r.dev.ReceiveBreak()
				default:
					r.dev.SetModem(v&1 != 0, v&2 != 0, v&4 != 0, v&8 != 0)
				}
			case 6:
				for n := v & 0x3ff; n > 0; n-- {
					got[i] = got[i]*31 + r.dev.Read(regData, 1)
				}
			}
			require.LessOrEqual(t, 0, r.dev.Room())
		}
		require.Equal(t, got[0], got[1])
		require.Equal(t, a.rises, b.rises)
		require.Equal(t, a.level, b.level)
		require.Equal(t, a.clock.Next(), b.clock.Next())
		if kind&7 == 7 {
			b = a.copy(t)
		}
	}
	require.Equal(t, a.sent, b.sent)
	require.Equal(t, a.dev.Save(), b.dev.Save())
}

func TestRestoredCopyBehavesTheSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		exercise(t, rapid.SliceOfN(rapid.Byte(), 200, 800).Draw(t, "script"))
	})
}

func FuzzDevice(f *testing.F) {
	f.Add([]byte{0, 2, 0xc1, 0, 0, 1, 0x0f, 0, 0, 4, 8, 0, 4, 30, 'x', 0, 7, 0, 0, 0, 6, 0, 40, 0, 3, 7, 255, 255})
	f.Add([]byte{0, 4, 0x10, 0, 0, 0, 'a', 0, 0, 0, 'b', 0, 7, 0, 0, 0, 2, 5, 0, 0, 2, 0, 0, 0})
	f.Add([]byte{5, 2, 0, 0, 4, 3, 1, 0, 5, 2, 0, 0, 5, 1, 255, 255, 7, 0, 0, 0, 6, 0, 255, 3, 2, 5, 0, 0})
	f.Fuzz(func(t *testing.T, script []byte) { exercise(t, script) })
}

func TestRegisterAccessDoesNotAllocate(t *testing.T) {
	r := open(ierTHRE, fcrEnable)
	r.sent = make([]byte, 0, 1<<16)
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		r.dev.Write(regData, 1, 'x')
		r.dev.Read(regIIR, 1)
		r.dev.Read(regLSR, 1)
	}))
}
