// Package debug holds the ports through which firmware and test programs talk to
// whoever runs the machine, not to hardware: the debug console (0x402), on which
// SeaBIOS and OVMF log; the debug exit (0xf4), with which a test program ends the VMM
// with a status; and the POST diagnostic port (0x80), whose last code says how far a
// firmware came.
//
// The console and the exit keep nothing that a guest could notice, so only POST has a
// State.
package debug

// The ports at which the machine maps the devices, and the number of ports of each.
const (
	ConsolePort = 0x402
	ConsoleSize = 1
	ExitPort    = 0xf4
	ExitSize    = 4
	POSTPort    = 0x80
	POSTSize    = 1
)

// ConsolePresent is what a read of the console returns: firmware takes it as the sign
// that somebody listens (the convention of Bochs and QEMU).
const ConsolePresent = 0xe9

// Console is the debug console: every byte written is output.
type Console struct {
	out     func([]byte)
	scratch [1]byte
}

// NewConsole returns a console. out is called from within Write, with a buffer that is
// lent for the call.
func NewConsole(out func([]byte)) *Console { return &Console{out: out} }

// Read returns [ConsolePresent] for the byte at offset 0, ones above it.
func (c *Console) Read(off uint64, size int) uint64 {
	if off != 0 {
		return ^uint64(0)
	}
	return ^uint64(0xff) | ConsolePresent
}

// Write outputs the low byte.
func (c *Console) Write(off uint64, size int, v uint64) {
	if off == 0 {
		c.scratch[0] = byte(v)
		c.out(c.scratch[:])
	}
}

// Exit is the debug exit: a write at its first port asks for the end of the VMM.
type Exit struct {
	exit func(code uint32)
}

// NewExit returns a debug exit. exit is called from within Write with the value
// written, 1, 2 or 4 bytes wide; what status of the process that becomes is the
// caller's affair.
func NewExit(exit func(code uint32)) *Exit { return &Exit{exit: exit} }

// Read returns ones: the port is write-only.
func (e *Exit) Read(off uint64, size int) uint64 { return ^uint64(0) }

// Write reports the low size bytes of v.
func (e *Exit) Write(off uint64, size int, v uint64) {
	if off != 0 {
		return
	}
	switch size {
	case 1:
		v &= 0xff
	case 2:
		v &= 0xffff
	}
	e.exit(uint32(v))
}

// POST is the diagnostic port. It reads back what was written, like the unused DMA
// page register that a PC has there.
type POST struct {
	s POSTState
}

// POSTState is the saved form of [POST].
type POSTState struct {
	Code uint8 // last written
}

// NewPOST returns a diagnostic port with code 0.
func NewPOST() *POST { return &POST{} }

// Read returns the last code, with ones above it.
func (p *POST) Read(off uint64, size int) uint64 {
	if off != 0 {
		return ^uint64(0)
	}
	return ^uint64(0xff) | uint64(p.s.Code)
}

// Write keeps the low byte as the code.
func (p *POST) Write(off uint64, size int, v uint64) {
	if off == 0 {
		p.s.Code = uint8(v)
	}
}

// Code returns the last code written.
func (p *POST) Code() uint8 { return p.s.Code }

// Reset forgets the code.
func (p *POST) Reset() { p.s = POSTState{} }

// Save returns the state.
func (p *POST) Save() POSTState { return p.s }

// Restore sets the state; every value is valid.
func (p *POST) Restore(s POSTState) error {
	p.s = s
	return nil
}
