// Package pic is the pair of 8259A interrupt controllers of a PC, as they sit in the
// PIIX3: a master whose input 2 is the slave's output, and the edge/level control
// registers (ELCR) that the PIIX adds.
//
// A chip is three bytes and a priority. IRR holds the requests, IMR the masked ones,
// ISR those that the CPU has acknowledged and not ended. A request is offered to the
// CPU when it is not masked and of higher priority than everything in service; the
// output is a function of the registers, recomputed after every change. In this
// package IRR is not stored: it is the latched edges of the edge-triggered inputs, and
// the plain level of the level-triggered ones, so that a level that is still high
// after the end of interrupt (EOI) requests again by itself.
//
// Where this differs from the 8259A data sheet (Intel order 231468):
//
//   - Edges stay latched when the input falls before the acknowledge. The chip drops
//     them and answers with a spurious IRQ 7; but here the timer's output may have
//     risen and fallen between two stops of the vCPU, and its tick would be lost.
//   - Trigger modes come from the ELCR; ICW1.LTIM is ignored, as in the PIIX
//     (82371SB data sheet, ICW1). ICW3 is ignored: the cascade is soldered.
//   - The 8080 mode (ICW4.uPM = 0) is not there; the vector is always the 8086's.
package pic

import (
	"fmt"
	"math/bits"

	"github.com/ftvmm/ftvmm/devices"
)

// Ports of the pair.
const (
	MasterPort = 0x20
	SlavePort  = 0xa0
	ChipSize   = 2 // ports of each chip
	ELCRPort   = 0x4d0
	ELCRSize   = 2
)

// Offsets of a chip's two ports.
const (
	portCommand = 0 // ICW1, OCW2, OCW3; reads IRR, ISR or the poll word
	portData    = 1 // ICW2..4, OCW1; reads IMR
)

// Cascade is the master's input that the slave drives.
const Cascade = 2

// spurious is the input whose vector answers an acknowledge that finds no request.
const spurious = 7

// Command words, told apart by bits 4 and 3 of a write to the command port.
const (
	icw1     = 1 << 4
	icw1IC4  = 1 << 0 // ICW4 follows
	icw1SNGL = 1 << 1 // ICW3 does not follow

	icw4AEOI = 1 << 1 // end of interrupt at the acknowledge
	icw4SFNM = 1 << 4 // special fully nested mode

	ocw3      = 1 << 3
	ocw3RIS   = 1 << 0 // with RR: read ISR, else IRR
	ocw3RR    = 1 << 1
	ocw3Poll  = 1 << 2
	ocw3SMM   = 1 << 5 // with ESMM: the special mask mode's new value
	ocw3ESMM  = 1 << 6
	pollFound = 1 << 7 // poll word: there was a request
)

// OCW2's operations: bits 7..5, R, SL and EOI.
const (
	ocw2RotateAEOIOff     = 0
	ocw2EOI               = 1
	ocw2SpecificEOI       = 3
	ocw2RotateAEOIOn      = 4
	ocw2RotateEOI         = 5
	ocw2SetPriority       = 6
	ocw2RotateSpecificEOI = 7
)

// Initialisation: which command word the data port expects.
const (
	stepReady = iota // none: the data port is IMR
	stepICW2
	stepICW3
	stepICW4
	numSteps
)

// The ELCR's writable bits: IRQ 0, 1, 2, 8 and 13 are always edge-triggered
// (82371SB data sheet, ELCR1 and ELCR2).
const (
	elcrMaster = 0xf8
	elcrSlave  = 0xde
)

// Chip is the saved form of one 8259A.
type Chip struct {
	Lines   uint8 // levels of the inputs; on the master, not of the cascade
	Latch   uint8 // edges seen on edge-triggered inputs and not acknowledged
	ELCR    uint8 // level-triggered inputs
	IMR     uint8
	ISR     uint8
	Base    uint8 // vector of input 0 (ICW2), a multiple of 8
	Lowest  uint8 // input of the lowest priority; the next one has the highest
	Step    uint8 // of the initialisation; 0 when there is none
	WantIC4 bool  // ICW4 will follow
	Single  bool  // ICW3 will not follow

	AutoEOI     bool
	RotateAEOI  bool // rotate at automatic ends of interrupt
	SpecialMask bool
	SpecialNest bool // special fully nested mode
	ReadISR     bool // the command port reads ISR, not IRR
	Poll        bool // the next read is a poll
}

// State is the saved form of a [Pair].
type State struct {
	Master, Slave Chip
}

// Pair is the two chips.
type Pair struct {
	out           devices.Line
	master, slave chip
}

// New returns the pair in its power-on state. out follows the master's INTR output,
// which the board wires to the CPU's LINT0.
func New(out devices.Line) *Pair {
	p := &Pair{out: out}
	p.master = chip{pair: p, cascade: 1 << Cascade, elcrMask: elcrMaster}
	p.slave = chip{pair: p, elcrMask: elcrSlave}
	p.Reset()
	return p
}

// Reset returns to the power-on state; the levels of the inputs, which belong to
// their drivers, stay. The data sheet leaves the registers undefined; here everything
// is masked, so that no vector appears that nobody has chosen.
func (p *Pair) Reset() {
	for _, c := range []*chip{&p.master, &p.slave} {
		c.Chip = Chip{Lines: c.Lines, IMR: 0xff, Lowest: 7}
	}
	p.update()
}

// Master returns the handler of the two ports at [MasterPort].
func (p *Pair) Master() devices.Handler { return &p.master }

// Slave returns the handler of the two ports at [SlavePort].
func (p *Pair) Slave() devices.Handler { return &p.slave }

// ELCR returns the handler of the two ports at [ELCRPort].
func (p *Pair) ELCR() devices.Handler { return elcr{p} }

// Line returns the input of IRQ n, 0 to 15. IRQ 2 is the cascade: its line is wired
// to nothing.
func (p *Pair) Line(n int) devices.Line {
	c := &p.master
	if n >= 8 {
		c, n = &p.slave, n-8
	}
	bit := uint8(1) << n
	if bit&c.cascade != 0 {
		return devices.LineFunc(func(bool) {})
	}
	return devices.LineFunc(func(level bool) { c.setLine(bit, level) })
}

// Pending says whether INTR is high: the CPU has something to acknowledge.
func (p *Pair) Pending() bool { return p.master.request() >= 0 }

// Acknowledge is the CPU's interrupt acknowledge cycle: the request of the highest
// priority goes into service and its vector is returned. Without a request the answer
// is the spurious vector of input 7, of the chip that was asked, and that chip's ISR
// does not change.
func (p *Pair) Acknowledge() uint8 {
	n := p.master.request()
	if n < 0 {
		return p.master.Base + spurious
	}
	vector := p.master.Base + uint8(n)
	p.master.serve(n)
	if n == Cascade {
		n = p.slave.request()
		if n < 0 {
			vector = p.slave.Base + spurious
		} else {
			vector = p.slave.Base + uint8(n)
			p.slave.serve(n)
		}
	}
	p.update()
	return vector
}

// update lets the slave's output reach the master and the master's the CPU.
func (p *Pair) update() {
	p.master.cascadeHigh = p.slave.request() >= 0
	p.out.Set(p.Pending())
}

// Save returns the state.
func (p *Pair) Save() State { return State{p.master.Chip, p.slave.Chip} }

// Restore sets the state. It refuses one that no sequence of accesses leads to, where
// that matters.
func (p *Pair) Restore(s State) error {
	if err := p.master.check(s.Master); err != nil {
		return fmt.Errorf("pic: saved master: %w", err)
	}
	if err := p.slave.check(s.Slave); err != nil {
		return fmt.Errorf("pic: saved slave: %w", err)
	}
	p.master.Chip, p.slave.Chip = s.Master, s.Slave
	p.master.cascadeHigh = p.slave.request() >= 0
	return nil
}

// chip is one 8259A; it handles its two ports.
type chip struct {
	Chip
	pair        *Pair
	cascade     uint8 // the input that a slave drives, as a bit; none on the slave
	cascadeHigh bool  // the slave's output
	elcrMask    uint8
}

func (c *chip) check(s Chip) error {
	switch {
	case s.Lowest > 7:
		return fmt.Errorf("lowest priority %d", s.Lowest)
	case s.Step >= numSteps:
		return fmt.Errorf("initialisation step %d", s.Step)
	case s.ELCR&^c.elcrMask != 0:
		return fmt.Errorf("ELCR %#02x has bits that are not writable", s.ELCR)
	case s.Latch&(s.ELCR|c.cascade) != 0 || s.Lines&c.cascade != 0:
		return fmt.Errorf("latched edges %#02x and lines %#02x are of inputs without", s.Latch, s.Lines)
	case s.Base%8 != 0:
		return fmt.Errorf("vector base %#02x", s.Base)
	}
	return nil
}

// irr returns the requests.
func (c *chip) irr() uint8 {
	r := c.Latch | c.Lines&c.ELCR
	if c.cascadeHigh {
		r |= c.cascade
	}
	return r
}

// setLine changes the level of the input named by bit.
func (c *chip) setLine(bit uint8, level bool) {
	if level == (c.Lines&bit != 0) {
		return
	}
	c.Lines ^= bit
	if level && c.ELCR&bit == 0 {
		c.Latch |= bit
	}
	c.pair.update()
}

// rank returns the priority of the highest of the inputs in mask: 0 is the highest, 8
// means that mask is empty.
func (c *chip) rank(mask uint8) int {
	return bits.TrailingZeros8(bits.RotateLeft8(mask, -int(c.Lowest+1)))
}

// input returns the input of the given rank.
func (c *chip) input(rank int) int { return (rank + int(c.Lowest) + 1) & 7 }

// request returns the input that the chip offers for acknowledge, or -1.
func (c *chip) request() int {
	serving := c.ISR
	if c.SpecialMask {
		serving &^= c.IMR // a masked input in service holds nothing back
	}
	if c.SpecialNest {
		serving &^= c.cascade // a slave in service may request again
	}
	if r := c.rank(c.irr() &^ c.IMR); r < c.rank(serving) {
		return c.input(r)
	}
	return -1
}

// serve moves the request of input n into service.
func (c *chip) serve(n int) {
	bit := uint8(1) << n
	c.Latch &^= bit
	if !c.AutoEOI {
		c.ISR |= bit
	} else if c.RotateAEOI {
		c.Lowest = uint8(n)
	}
}

// Read handles a read of the command and data ports.
func (c *chip) Read(off uint64, size int) uint64 {
	v := ^uint64(0)
	for i := 0; i < size && i < 8; i++ {
		v = v&^(0xff<<(8*i)) | uint64(c.read(off+uint64(i)))<<(8*i)
	}
	return v
}

// Write handles a write of the command and data ports.
func (c *chip) Write(off uint64, size int, v uint64) {
	for i := 0; i < size; i++ {
		c.write(off+uint64(i), uint8(v>>(8*i)))
	}
}

func (c *chip) read(off uint64) uint8 {
	switch {
	case off > portData:
		return 0xff
	case c.Poll:
		return c.poll()
	case off == portData:
		return c.IMR
	case c.ReadISR:
		return c.ISR
	}
	return c.irr()
}

// poll is the read that follows OCW3's poll command: an acknowledge by software of
// this chip alone. It returns the input served, or, like an acknowledge, input 7.
func (c *chip) poll() uint8 {
	c.Poll = false
	n := c.request()
	if n < 0 {
		return spurious
	}
	c.serve(n)
	c.pair.update()
	return pollFound | uint8(n)
}

func (c *chip) write(off uint64, v uint8) {
	switch {
	case off > portData:
		return
	case off == portData:
		c.writeData(v)
	case v&icw1 != 0:
		// ICW1 clears the edge sense, masks and modes, but not the ELCR, and puts
		// input 7 last. An input that is high must fall before it can latch again.
		c.Chip = Chip{
			Lines: c.Lines, ELCR: c.ELCR, Base: c.Base, Lowest: 7,
			Step: stepICW2, WantIC4: v&icw1IC4 != 0, Single: v&icw1SNGL != 0,
		}
	case v&ocw3 != 0:
		if v&ocw3RR != 0 {
			c.ReadISR = v&ocw3RIS != 0
		}
		if v&ocw3ESMM != 0 {
			c.SpecialMask = v&ocw3SMM != 0
		}
		c.Poll = v&ocw3Poll != 0
	default:
		c.endOfInterrupt(v>>5, v&7)
	}
	c.pair.update()
}

// writeData takes ICW2..4 while the chip is being initialised, OCW1 otherwise.
func (c *chip) writeData(v uint8) {
	switch c.Step {
	case stepReady:
		c.IMR = v
		return
	case stepICW2:
		c.Base = v &^ 7
	case stepICW4:
		c.AutoEOI = v&icw4AEOI != 0
		c.SpecialNest = v&icw4SFNM != 0
	}
	c.Step++
	if c.Step == stepICW3 && c.Single {
		c.Step++
	}
	if c.Step == stepICW4 && !c.WantIC4 || c.Step == numSteps {
		c.Step = stepReady
	}
}

// endOfInterrupt performs OCW2's operation on the named input, or on the one of the
// highest priority in service.
func (c *chip) endOfInterrupt(op, named uint8) {
	switch op {
	case ocw2RotateAEOIOff, ocw2RotateAEOIOn:
		c.RotateAEOI = op == ocw2RotateAEOIOn
	case ocw2EOI, ocw2RotateEOI:
		serving := c.ISR
		if c.SpecialMask {
			serving &^= c.IMR // spared by the data sheet's special mask mode
		}
		if serving == 0 {
			return
		}
		n := c.input(c.rank(serving))
		c.ISR &^= 1 << n
		if op == ocw2RotateEOI {
			c.Lowest = uint8(n)
		}
	case ocw2SpecificEOI:
		c.ISR &^= 1 << named
	case ocw2RotateSpecificEOI:
		c.ISR &^= 1 << named
		c.Lowest = named
	case ocw2SetPriority:
		c.Lowest = named
	}
}

// elcr handles the two edge/level control registers.
type elcr struct{ p *Pair }

func (e elcr) chip(off uint64) *chip {
	switch off {
	case 0:
		return &e.p.master
	case 1:
		return &e.p.slave
	}
	return nil
}

// Read returns the registers.
func (e elcr) Read(off uint64, size int) uint64 {
	v := ^uint64(0)
	for i := 0; i < size && i < 8; i++ {
		if c := e.chip(off + uint64(i)); c != nil {
			v = v&^(0xff<<(8*i)) | uint64(c.ELCR)<<(8*i)
		}
	}
	return v
}

// Write sets the registers. An input that becomes level-triggered forgets its edge.
func (e elcr) Write(off uint64, size int, v uint64) {
	for i := 0; i < size; i++ {
		if c := e.chip(off + uint64(i)); c != nil {
			c.ELCR = uint8(v>>(8*i)) & c.elcrMask
			c.Latch &^= c.ELCR
		}
	}
	e.p.update()
}
