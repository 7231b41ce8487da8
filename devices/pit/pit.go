// Package pit is the 8254 programmable interval timer of a PC with its three
// counters, and port 0x61, which gates the third one and shows its output.
//
// A counter is a pure function of virtual time. The oscillator's tick number follows
// from the clock's nanoseconds by one multiplication and division, never by adding up
// rounded periods, so that it does not drift; a counter keeps the tick at which its
// count was loaded and derives value and output from the ticks since. A new count that
// takes effect only at the end of the present cycle (modes 2 and 3) is kept beside the
// old one with the tick of the change.
//
// Counter 0 drives IRQ 0, whose rising edges are what matters to any interrupt
// controller. Only for them is there a timer: the line is lowered just before it
// rises, or when the guest touches the counter, so that a guest is not disturbed twice
// in each period. When the vCPU stopped late and several periods have gone by, there
// is one edge for all of them, as there is on a PC whose CPU was busy.
//
// The behaviour of the modes is that of the Intel 8254 data sheet (order 231164),
// "Mode Definitions"; counts change one tick after the write, as there. Port 0x61 is
// the NMI status and control register (NMISC) of the 82371SB (PIIX3) data sheet.
package pit

import (
	"fmt"
	"math"

	"github.com/ftvmm/ftvmm/devices"
)

// Frequency of the counters' input, in Hz.
const Frequency = 1193182

// Ports of the timer and of the control register that goes with it.
const (
	Port       = 0x40
	Size       = 4
	Port61Port = 0x61
	Port61Size = 1
)

// portControl is the offset of the control word register; below it are the counters.
const portControl = 3

// NumCounters is the number of counters: 0 is the system timer on IRQ 0, 1 was the
// refresh of the DRAM, 2 is the speaker.
const NumCounters = 3

const (
	systemTimer = 0
	speaker     = 2
)

// The control word.
const (
	cwSelect = 6 // shift of the counter's number
	cwAccess = 4 // shift of the access mode, 0 being the counter latch command
	cwMode   = 1 // shift of the mode
	cwBCD    = 1 << 0

	selectReadBack = 3
	accessLatch    = 0
	accessLow      = 1
	accessHigh     = 2
	accessBoth     = 3

	// The read-back command: what to latch (active low) and of which counters.
	rbNoCount   = 1 << 5
	rbNoStatus  = 1 << 4
	rbCounter0  = 1 << 1
	statusOut   = 1 << 7
	statusNull  = 1 << 6 // a count was written that is not in the counter yet
	accessShift = 4
)

// Port 0x61.
const (
	p61Gate2    = 1 << 0
	p61Writable = 0x0f // gate 2, speaker, and the masks of two error checks
	p61Refresh  = 1 << 4
	p61Out2     = 1 << 5

	// refreshTicks is how long the refresh bit keeps its value: 15 us.
	refreshTicks = 18
)

// maxTick bounds saved tick numbers and those a timer is armed for (239 years), so
// that sums of them and their nanoseconds do not overflow.
const maxTick = 1 << 53

// Counter is the saved form of one counter.
type Counter struct {
	Mode   uint8 // 0 to 5
	Access uint8 // 1 low byte, 2 high byte, 3 low then high
	BCD    bool
	Gate   bool

	// Armed says that a count is or was running: it has been written, in modes 1 and
	// 5 also triggered. Before that the output is at its first level and the counting
	// element stands at Idle.
	Armed bool
	Idle  uint16

	Count    uint32 // initial count of this cycle, 1 to 65536
	Start    uint64 // tick at which it was loaded, which may be the coming one
	LowFirst bool   // mode 3: the cycle's low half is first; 1, 4, 5: the output was low before Start
	Held     uint64 // ticks since Start at which a low gate stopped the count

	Next   uint32 // count that was written and is not in use yet; 0 is none
	NextAt uint64 // modes 2 and 3, gate high: tick at which it is loaded

	WriteHigh bool  // access 3: the low byte has been written
	WriteLow  uint8 // and was this
	ReadHigh  bool  // access 3: the low byte has been read

	Latched       uint16 // latched count
	LatchedBytes  uint8  // of it not yet read
	Status        uint8  // latched status
	StatusLatched bool
}

// State is the saved form of a [Device].
type State struct {
	Counters [NumCounters]Counter
	Port61   uint8 // its writable bits
}

// Device is the timer. It handles the four ports at [Port].
type Device struct {
	clock *devices.Clock
	irq0  devices.Line
	timer *devices.Timer // the next rising edge of IRQ 0
	s     State
}

// New returns the timer in its power-on state: all counters await a control word, the
// gates of counters 0 and 1 are wired high. irq0 follows counter 0's output.
func New(clock *devices.Clock, irq0 devices.Line) *Device {
	d := &Device{clock: clock, irq0: irq0}
	d.timer = clock.NewTimer("pit.irq0", d.tick)
	d.Reset()
	return d
}

// Reset returns to the power-on state.
func (d *Device) Reset() {
	d.s = State{}
	for i := range d.s.Counters {
		d.s.Counters[i] = Counter{Access: accessBoth, Gate: i != speaker}
	}
	d.irq0.Set(false)
	d.timer.Disarm()
}

// NeedsTime says that every access but the read of a latched value or of the control
// port depends on the present time.
func (d *Device) NeedsTime(off uint64, write bool) bool {
	if write {
		return true
	}
	if off >= NumCounters {
		return false
	}
	c := &d.s.Counters[off]
	return !c.StatusLatched && c.LatchedBytes == 0
}

// Read handles a read of the counters; the control port reads as ones.
func (d *Device) Read(off uint64, size int) uint64 {
	v := ^uint64(0)
	t := d.now()
	for i := 0; i < size && i < 8; i++ {
		if n := off + uint64(i); n < NumCounters {
			v = v&^(0xff<<(8*i)) | uint64(d.s.Counters[n].read(t))<<(8*i)
		}
	}
	return v
}

// Write handles a write of counts and control words.
func (d *Device) Write(off uint64, size int, v uint64) {
	t := d.now()
	for i := 0; i < size; i++ {
		n, b := off+uint64(i), uint8(v>>(8*i))
		switch {
		case n < NumCounters:
			d.change(int(n), t, func(c *Counter) { c.write(t, b) })
		case n > portControl:
		case b>>cwSelect == selectReadBack:
			for k := range d.s.Counters {
				if b&(rbCounter0<<k) != 0 {
					d.s.Counters[k].readBack(t, b)
				}
			}
		case b>>cwAccess&3 == accessLatch:
			d.s.Counters[b>>cwSelect].latch(t)
		default:
			d.change(int(b>>cwSelect), t, func(c *Counter) { c.control(t, b) })
		}
	}
}

// now returns the oscillator's tick number.
func (d *Device) now() uint64 { return devices.ScaleTime(d.clock.Now(), Frequency) }

// change applies f to counter n at tick t. Counter 0's line is brought to the output's
// level before and after, so that a change of level by f is an edge.
func (d *Device) change(n int, t uint64, f func(*Counter)) {
	c := &d.s.Counters[n]
	if n != systemTimer {
		f(c)
		return
	}
	d.irq0.Set(c.out(t))
	f(c)
	d.irq0.Set(c.out(t))
	d.arm(c.nextRise(t))
}

// tick is the timer's function: counter 0's output rises.
func (d *Device) tick() {
	d.irq0.Set(false)
	d.irq0.Set(true)
	// Edges up to the horizon are one with this.
	t := max(d.now(), devices.ScaleTime(d.clock.Horizon(), Frequency))
	d.arm(d.s.Counters[systemTimer].nextRise(t))
}

func (d *Device) arm(tick uint64) {
	if tick > maxTick {
		d.timer.Disarm()
		return
	}
	d.timer.Arm(devices.TicksToTime(tick, Frequency))
}

// Port61 returns the handler of the port at [Port61Port].
func (d *Device) Port61() devices.Handler { return port61{d} }

// port61 is the part of the device that answers at port 0x61.
type port61 struct{ d *Device }

// NeedsTime says that the bits read, and the effect of the gate, depend on the time.
func (port61) NeedsTime(off uint64, write bool) bool { return true }

// Read returns the control bits, the refresh bit and counter 2's output. The bits of
// the two error sources read as 0: there are none.
func (p port61) Read(off uint64, size int) uint64 {
	if off != 0 {
		return ^uint64(0)
	}
	t := p.d.now()
	v := p.d.s.Port61
	if t/refreshTicks&1 != 0 {
		v |= p61Refresh
	}
	if p.d.s.Counters[speaker].out(t) {
		v |= p61Out2
	}
	return ^uint64(0xff) | uint64(v)
}

// Write sets the control bits. There is no speaker to be heard; its bit is kept.
func (p port61) Write(off uint64, size int, v uint64) {
	if off != 0 {
		return
	}
	p.d.s.Port61 = uint8(v) & p61Writable
	p.d.s.Counters[speaker].setGate(p.d.now(), v&p61Gate2 != 0)
}

// Save returns the state.
func (d *Device) Save() State { return d.s }

// Restore sets the state. It refuses one that no sequence of accesses leads to, where
// that matters.
func (d *Device) Restore(s State) error {
	for i := range s.Counters {
		if err := s.Counters[i].check(); err != nil {
			return fmt.Errorf("pit: saved counter %d: %w", i, err)
		}
		if i != speaker && !s.Counters[i].Gate {
			return fmt.Errorf("pit: saved counter %d: its gate is wired high", i)
		}
	}
	if s.Port61&^p61Writable != 0 || s.Counters[speaker].Gate != (s.Port61&p61Gate2 != 0) {
		return fmt.Errorf("pit: saved port 0x61 is %#02x, gate 2 %t", s.Port61, s.Counters[speaker].Gate)
	}
	d.s = s
	return nil
}

func (c *Counter) check() error {
	switch {
	case c.Mode > 5:
		return fmt.Errorf("mode %d", c.Mode)
	case c.Access < accessLow || c.Access > accessBoth:
		return fmt.Errorf("access mode %d", c.Access)
	case c.Count > 1<<16 || c.Armed && c.Count == 0 || c.Next > 1<<16:
		return fmt.Errorf("counts %d and %d", c.Count, c.Next)
	case c.Start > maxTick || c.NextAt > maxTick || c.Held > maxTick:
		return fmt.Errorf("ticks %d, %d, %d", c.Start, c.NextAt, c.Held)
	case c.LatchedBytes > 2:
		return fmt.Errorf("%d latched bytes", c.LatchedBytes)
	}
	return nil
}

// never is the tick of an edge that does not come.
const never = math.MaxUint64
