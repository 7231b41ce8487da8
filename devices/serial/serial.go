// Package serial is the 16550A UART with its FIFOs, as the COM ports of a PC carry it.
//
// Sending takes no time: a byte written to THR is handed out at once, and the
// transmitter is empty again when the write returns. The interrupts are nevertheless
// those of the chip, edge for edge, since drivers are written for them.
//
// Receiving is paced by the guest: bytes that come in from outside wait in a bounded
// backlog, which is part of the state, and move on into the receiver's FIFO as it is
// read. So an overrun happens only where the sender ignores [Device.Room], and in the
// loopback mode, where the guest sends to itself.
//
// The word length, parity and speed that the guest programs matter only for the time
// in which the character time-out counts; the bytes are passed on whole, also by a
// guest that never set the line up.
//
// Reference: National Semiconductor PC16550D data sheet, section 8. The gate between
// the chip's INTR and the interrupt line, opened by OUT2, is the PC's.
package serial

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
)

// Size is the number of ports.
const Size = 8

// MaxBacklog bounds the bytes, in number, that wait to enter the receiver.
const MaxBacklog = 64 << 10

// fifoSize is the depth of the receiver's FIFO.
const fifoSize = 16

// Registers by offset. With LCR.DLAB set, the first two are the divisor.
const (
	regData = 0 // RBR on read, THR on write; DLL
	regIER  = 1 // DLM
	regIIR  = 2 // on read; FCR on write
	regLCR  = 3
	regMCR  = 4
	regLSR  = 5
	regMSR  = 6
	regSCR  = 7
)

// IER, the interrupt enable register.
const (
	ierReceive = 1 << 0 // data available, and the time-out
	ierTHRE    = 1 << 1
	ierLine    = 1 << 2
	ierModem   = 1 << 3
	ierMask    = 0x0f
)

// IIR, the interrupt identification register.
const (
	iirModem   = 0x00
	iirNone    = 0x01
	iirTHRE    = 0x02
	iirReceive = 0x04
	iirLine    = 0x06
	iirTimeout = 0x0c
	iirFIFO    = 0xc0
)

// FCR, the FIFO control register.
const (
	fcrEnable       = 1 << 0
	fcrClearReceive = 1 << 1
	fcrKept         = 0xc9 // enable, DMA mode, trigger level
	fcrTriggerShift = 6
)

// triggers are the levels in bytes that FCR's trigger field names.
var triggers = [4]uint8{1, 4, 8, 14}

// LCR, the line control register.
const (
	lcrWordLength = 0x03 // 5 bits and up
	lcrStop       = 1 << 2
	lcrParity     = 1 << 3
	lcrDLAB       = 1 << 7
)

// MCR, the modem control register.
const (
	mcrDTR  = 1 << 0
	mcrRTS  = 1 << 1
	mcrOUT1 = 1 << 2
	mcrOUT2 = 1 << 3
	mcrLoop = 1 << 4
	mcrMask = 0x1f
)

// LSR, the line status register.
const (
	lsrReady   = 1 << 0
	lsrOverrun = 1 << 1
	lsrFraming = 1 << 3
	lsrBreak   = 1 << 4
	lsrErrors  = 0x1e // overrun, parity, framing, break
	lsrTHRE    = 1 << 5
	lsrTEMT    = 1 << 6
	lsrInFIFO  = 1 << 7 // an error is in the FIFO
)

// MSR, the modem status register: levels above, their changes below.
const (
	msrDCTS   = 1 << 0
	msrDDSR   = 1 << 1
	msrTERI   = 1 << 2 // the ring indicator's end
	msrDDCD   = 1 << 3
	msrDeltas = 0x0f
	msrCTS    = 1 << 4
	msrDSR    = 1 << 5
	msrRI     = 1 << 6
	msrDCD    = 1 << 7
	msrLevels = 0xf0
)

// The baud rate generator.
const (
	crystal        = 1843200 // Hz
	clocksPerBit   = 16
	defaultDivisor = 12 // 9600 baud; the chip's is undefined
	second         = 1_000_000_000

	// timeoutChars is how many character times without traffic make the time-out.
	timeoutChars = 4
)

// State is the saved form of a [Device].
type State struct {
	IER, FCR, LCR, MCR, SCR uint8
	Errors                  uint8 // LSR's error bits
	MSR                     uint8
	Lines                   uint8 // modem inputs from outside, as in MSR's upper half
	Divisor                 uint16

	FIFO     [fifoSize]uint8 // received, oldest first; one byte while FIFOs are off
	Flags    [fifoSize]uint8 // LSR's error bits of each byte, until they have been read
	Count    uint8           // bytes in FIFO
	RBR      uint8           // last byte read: what an empty receiver reads as
	THRI     bool            // "transmitter empty" waits to be acknowledged
	TimedOut bool            // the time-out has come

	Backlog []byte // received, not yet in FIFO
	Break   bool   // a break comes after the first BreakAt bytes of Backlog
	BreakAt uint32
}

// Device is one UART.
type Device struct {
	clock   *devices.Clock
	irq     devices.Line
	out     func([]byte)
	timer   *devices.Timer // character time-out
	scratch [1]byte
	s       State
}

// New returns a UART in its power-on state, with a modem that is connected and ready.
// name distinguishes its timer from that of other UARTs. out is called from within
// Write with what the guest sends; the buffer is lent for the call.
func New(clock *devices.Clock, name string, irq devices.Line, out func([]byte)) *Device {
	d := &Device{clock: clock, irq: irq, out: out}
	d.timer = clock.NewTimer(name+".timeout", d.timeout)
	d.s.Lines = msrCTS | msrDSR | msrDCD
	d.Reset()
	return d
}

// Reset returns to the power-on state. The modem's lines stay as they are, and so does
// the backlog: both are outside the chip. That the backlog survives lets input be
// given before the guest has booted.
func (d *Device) Reset() {
	d.s = State{
		Divisor: defaultDivisor, Lines: d.s.Lines, MSR: d.s.Lines,
		Backlog: d.s.Backlog, Break: d.s.Break, BreakAt: d.s.BreakAt,
	}
	d.timer.Disarm()
	d.pump()
	d.update()
}

// Room returns how many bytes [Device.Receive] takes without loss.
func (d *Device) Room() int { return MaxBacklog - len(d.s.Backlog) }

// Receive takes bytes from outside. What exceeds Room is lost, which the guest sees
// as an overrun.
func (d *Device) Receive(p []byte) {
	if n := d.Room(); len(p) > n {
		p = p[:n]
		d.s.Errors |= lsrOverrun
	}
	d.s.Backlog = append(d.s.Backlog, p...)
	d.pump()
	d.update()
}

// ReceiveBreak takes a break from outside. It comes to the guest in its place among
// the bytes received; a break that comes while another waits is one with it.
func (d *Device) ReceiveBreak() {
	if !d.s.Break {
		d.s.Break, d.s.BreakAt = true, uint32(len(d.s.Backlog))
	}
	d.pump()
	d.update()
}

// SetModem sets the levels of the modem's outputs: clear to send, data set ready, data
// carrier detect and ring indicator.
func (d *Device) SetModem(cts, dsr, dcd, ri bool) {
	d.s.Lines = bit(cts, msrCTS) | bit(dsr, msrDSR) | bit(dcd, msrDCD) | bit(ri, msrRI)
	d.modem()
	d.update()
}

func bit(b bool, v uint8) uint8 {
	if b {
		return v
	}
	return 0
}

// Read handles a read of the registers.
func (d *Device) Read(off uint64, size int) uint64 {
	v := ^uint64(0)
	for i := 0; i < size && i < 8; i++ {
		v = v&^(0xff<<(8*i)) | uint64(d.read(off+uint64(i)))<<(8*i)
	}
	return v
}

// Write handles a write of the registers.
func (d *Device) Write(off uint64, size int, v uint64) {
	for i := 0; i < size; i++ {
		d.write(off+uint64(i), uint8(v>>(8*i)))
	}
}

func (d *Device) read(reg uint64) uint8 {
	s := &d.s
	dlab := s.LCR&lcrDLAB != 0
	switch reg {
	case regData:
		if dlab {
			return uint8(s.Divisor)
		}
		return d.readData()
	case regIER:
		if dlab {
			return uint8(s.Divisor >> 8)
		}
		return s.IER
	case regIIR:
		id := d.interrupt()
		if id == iirTHRE {
			s.THRI = false
			d.update()
		}
		if s.FCR&fcrEnable != 0 {
			id |= iirFIFO
		}
		return id
	case regLCR:
		return s.LCR
	case regMCR:
		return s.MCR
	case regLSR:
		v := d.lineStatus()
		s.Errors, s.Flags[0] = 0, 0
		d.update()
		return v
	case regMSR:
		v := s.MSR
		s.MSR &^= msrDeltas
		d.update()
		return v
	case regSCR:
		return s.SCR
	}
	return 0xff
}

func (d *Device) write(reg uint64, v uint8) {
	s := &d.s
	dlab := s.LCR&lcrDLAB != 0
	switch {
	case reg == regData && dlab:
		s.Divisor = s.Divisor&0xff00 | uint16(v)
	case reg == regIER && dlab:
		s.Divisor = s.Divisor&0x00ff | uint16(v)<<8
	case reg == regData:
		d.send(v)
	case reg == regIER:
		v &= ierMask
		if v&^s.IER&ierTHRE != 0 {
			s.THRI = true // the transmitter is empty, always
		}
		s.IER = v
	case reg == regIIR:
		d.control(v)
	case reg == regLCR:
		s.LCR = v
	case reg == regMCR:
		s.MCR = v & mcrMask
		d.modem()
		d.pump() // input waited while the chip was looped back
	case reg == regSCR:
		s.SCR = v
	}
	d.update()
}

// send transmits a byte. The THRE interrupt goes away while the byte is in the holding
// register and comes back, an edge even when the last was not acknowledged.
func (d *Device) send(v uint8) {
	d.s.THRI = false
	d.update()
	if d.s.MCR&mcrLoop != 0 {
		d.put(v, 0)
		d.restart()
	} else {
		d.scratch[0] = v
		d.out(d.scratch[:])
	}
	d.s.THRI = true
}

// control takes a write of FCR.
func (d *Device) control(v uint8) {
	s := &d.s
	if (v^s.FCR)&fcrEnable != 0 {
		v |= fcrClearReceive // either way the FIFOs lose their data
	}
	if v&fcrClearReceive != 0 && (v|s.FCR)&fcrEnable != 0 {
		s.Count, s.FIFO, s.Flags = 0, [fifoSize]uint8{}, [fifoSize]uint8{}
	}
	if v &= fcrKept; v&fcrEnable == 0 {
		v = 0 // the other bits are not programmed without this one
	}
	s.FCR = v
	d.restart()
	d.pump()
}

// lineStatus returns LSR.
func (d *Device) lineStatus() uint8 {
	s := &d.s
	v := s.Errors | lsrTHRE | lsrTEMT
	if s.Count > 0 {
		v |= lsrReady
	}
	if s.FCR&fcrEnable != 0 {
		for _, f := range s.Flags[:s.Count] {
			if f != 0 {
				v |= lsrInFIFO
			}
		}
	}
	return v
}

// depth returns how many bytes the receiver holds.
func (d *Device) depth() uint8 {
	if d.s.FCR&fcrEnable != 0 {
		return fifoSize
	}
	return 1
}

// trigger returns the level in bytes of the data available interrupt.
func (d *Device) trigger() uint8 { return triggers[d.s.FCR>>fcrTriggerShift] }

// put receives a byte with its error bits. A full FIFO keeps what it has and loses the
// byte; a full buffer register is overwritten.
func (d *Device) put(v, flags uint8) {
	s := &d.s
	if s.Count == d.depth() {
		s.Errors |= lsrOverrun
		if s.FCR&fcrEnable != 0 {
			return
		}
		s.Count = 0
	}
	s.FIFO[s.Count], s.Flags[s.Count] = v, flags
	s.Count++
	if s.Count == 1 {
		s.Errors |= flags // an error shows when its byte is the next to be read
	}
}

// readData reads RBR.
func (d *Device) readData() uint8 {
	s := &d.s
	if s.Count == 0 {
		return s.RBR
	}
	s.RBR = s.FIFO[0]
	copy(s.FIFO[:], s.FIFO[1:s.Count])
	copy(s.Flags[:], s.Flags[1:s.Count])
	s.Count--
	s.FIFO[s.Count], s.Flags[s.Count] = 0, 0
	if s.Count > 0 {
		s.Errors |= s.Flags[0]
	}
	// The line falls before the next byte raises it: an edge-triggered controller must
	// see an interrupt for a byte that a driver does not stay to fetch.
	d.restart()
	d.update()
	d.pump()
	d.update()
	return s.RBR
}

// pump moves the backlog into the receiver as far as it goes. While the chip is looped
// back its input is disconnected.
func (d *Device) pump() {
	s := &d.s
	if s.MCR&mcrLoop != 0 || s.Count == d.depth() {
		return
	}
	moved := false
	for s.Count < d.depth() {
		switch {
		case s.Break && s.BreakAt == 0:
			s.Break = false
			d.put(0, lsrBreak|lsrFraming)
		case len(s.Backlog) > 0:
			d.put(s.Backlog[0], 0)
			s.Backlog = s.Backlog[1:]
			if s.Break {
				s.BreakAt--
			}
		default:
			if moved {
				d.restart()
			}
			s.Backlog = nil
			return
		}
		moved = true
	}
	d.restart()
}

// restart starts the time-out anew: a byte came or was read. It counts only where the
// FIFO holds something that is too little for the data available interrupt.
func (d *Device) restart() {
	s := &d.s
	s.TimedOut = false
	if s.FCR&fcrEnable == 0 || s.Count == 0 || s.Count >= d.trigger() {
		if d.timer.Deadline() != devices.Never {
			d.timer.Disarm()
		}
		return
	}
	bits := int64(1 + 5 + s.LCR&lcrWordLength + 1 + s.LCR&lcrStop/lcrStop + s.LCR&lcrParity/lcrParity)
	divisor := int64(max(s.Divisor, 1))
	d.timer.Arm(d.clock.Now() + timeoutChars*bits*divisor*clocksPerBit*second/crystal)
}

// timeout is the timer's function.
func (d *Device) timeout() {
	d.s.TimedOut = true
	d.update()
}

// modem derives MSR from the modem's lines, or from the chip's own outputs when it is
// looped back, and notes what changed.
func (d *Device) modem() {
	s := &d.s
	lines := s.Lines
	if s.MCR&mcrLoop != 0 {
		lines = bit(s.MCR&mcrRTS != 0, msrCTS) | bit(s.MCR&mcrDTR != 0, msrDSR) |
			bit(s.MCR&mcrOUT1 != 0, msrRI) | bit(s.MCR&mcrOUT2 != 0, msrDCD)
	}
	changed := s.MSR ^ lines
	deltas := bit(changed&msrCTS != 0, msrDCTS) | bit(changed&msrDSR != 0, msrDDSR) |
		bit(changed&msrDCD != 0, msrDDCD) | bit(changed&s.MSR&msrRI != 0, msrTERI)
	s.MSR = s.MSR&msrDeltas | deltas | lines
}

// interrupt returns the identification of the pending interrupt of the highest
// priority.
func (d *Device) interrupt() uint8 {
	s := &d.s
	switch {
	case s.IER&ierLine != 0 && s.Errors != 0:
		return iirLine
	case s.IER&ierReceive != 0 && s.Count > 0 && s.Count >= d.trigger():
		return iirReceive
	case s.IER&ierReceive != 0 && s.TimedOut:
		return iirTimeout
	case s.IER&ierTHRE != 0 && s.THRI:
		return iirTHRE
	case s.IER&ierModem != 0 && s.MSR&msrDeltas != 0:
		return iirModem
	}
	return iirNone
}

// update drives the interrupt line. The gate on it is closed while OUT2 is inactive,
// as all outputs are in loopback.
func (d *Device) update() {
	open := d.s.MCR&(mcrOUT2|mcrLoop) == mcrOUT2
	d.irq.Set(open && d.interrupt() != iirNone)
}

// Save returns the state; it shares no memory with the device.
func (d *Device) Save() State {
	s := d.s
	s.Backlog = append([]byte(nil), s.Backlog...)
	return s
}

// Restore sets the state; it keeps no reference to s. It refuses one that no sequence
// of events leads to, where that matters.
func (d *Device) Restore(s State) error {
	depth := uint8(1)
	if s.FCR&fcrEnable != 0 {
		depth = fifoSize
	}
	switch {
	case s.Count > depth:
		return fmt.Errorf("serial: saved FIFO holds %d bytes, more than %d", s.Count, depth)
	case s.FCR&^fcrKept != 0 || s.FCR&fcrEnable == 0 && s.FCR != 0:
		return fmt.Errorf("serial: saved FCR is %#02x", s.FCR)
	case len(s.Backlog) > MaxBacklog:
		return fmt.Errorf("serial: saved backlog of %d bytes exceeds %d", len(s.Backlog), MaxBacklog)
	case s.Break && s.BreakAt > uint32(len(s.Backlog)):
		return fmt.Errorf("serial: saved break after byte %d of %d", s.BreakAt, len(s.Backlog))
	case s.IER&^ierMask != 0 || s.MCR&^mcrMask != 0 || s.Lines&^msrLevels != 0 || s.Errors&^lsrErrors != 0:
		return fmt.Errorf("serial: saved registers have bits that do not exist")
	}
	for _, f := range s.Flags {
		if f&^lsrErrors != 0 {
			return fmt.Errorf("serial: saved error bits %#02x of a byte", f)
		}
	}
	s.Backlog = append([]byte(nil), s.Backlog...)
	d.s = s
	return nil
}
