package piix

import (
	"encoding/binary"
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/pci"
)

// Device and function numbers (device<<3 | function).
const (
	HostBridge = 0<<3 | 0
	ISABridge  = 1<<3 | 0
	IDE        = 1<<3 | 1 // reserved for the IDE controller
	PowerMgmt  = 1<<3 | 3
)

// Identifiers that firmware matches.
const (
	vendorIntel  = 0x8086
	device82441  = 0x1237
	devicePIIX3  = 0x7000
	devicePIIX4  = 0x7113
	subVendor    = 0x1af4
	subDevice    = 0x1100
	classHost    = 0x060000
	classISA     = 0x060100
	classOther   = 0x068000
	rev82441     = 0x02
	revPIIX3     = 0x00
	revPIIX4     = 0x03
	statusMedium = 0x02 // high byte of the status register: medium DEVSEL timing
	statusFast   = 0x80 // low byte: fast back-to-back
)

// Registers of the host bridge (82441FX data sheet, 3.2).
const (
	regPMCCFG = 0x50 // up to DRAM timing at 0x58: storage
	regPAM0   = 0x59
	regPAM6   = 0x5f
	regDRB0   = 0x60 // up to 0x67: DRAM row boundaries, storage
	regMTT    = 0x70
	regCLT    = 0x71
	regSMRAM  = 0x72

	pam0Writable = 0x30 // PAM0 has the BIOS area in its high half only
	pamWritable  = 0x33 // read and write enable of two segments
)

// Registers of the ISA bridge (82371SB data sheet, 2.2).
const (
	regISARecovery = 0x4c
	regXBCS        = 0x4e
	regPIRQA       = 0x60
	regTopOfMemory = 0x69
	regMBIRQ0      = 0x70
	regMBDMA0      = 0x76
	regPCSC        = 0x78
	regSMIControl  = 0xa0
	regSMIEnable   = 0xa2
	regFastOff     = 0xa8

	numPIRQ      = 4
	pirqDisabled = 0x80
	pirqIRQ      = 0x0f
)

// PortResetControl is the port of the reset control register (82371SB, 2.5.4.2), in
// the middle of the PCI configuration ports.
const PortResetControl = 0xcf9

const (
	resetHard = 1 << 1
	resetCPU  = 1 << 2
)

// maxPIRQSources bounds the functions that share one PIRQ.
const maxPIRQSources = 64

// routable has a bit for each interrupt that a PIRQ can go to; the others are
// reserved (82371SB, 2.2.10).
const routable uint16 = 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<9 | 1<<10 | 1<<11 | 1<<12 | 1<<14 | 1<<15

// Config is what a chipset is connected to.
type Config struct {
	// Interrupts is the board's wiring; PIRQs and the SCI become sources of it.
	Interrupts *devices.Interrupts
	// OnSleep is called when the guest enters a sleep state: typ is SLP_TYP as written, of
	// which 0 is soft off (S5). nil ignores it.
	OnSleep func(typ uint8)
	// OnReset is called when the guest asks for a reset of the machine at port 0xCF9. nil
	// ignores it.
	OnReset func()
}

// Chipset is the three functions.
type Chipset struct {
	host, isa *pci.Function
	power     *power
	onReset   func()

	resetControl uint8
	pirq         [numPIRQ]uint64 // a bit for each source that is high
	sources      [numPIRQ]int
	irq          [16]devices.Line // nil where no PIRQ can go
}

// New returns the chipset in its power-on state, with its functions on the bus.
func New(clock *devices.Clock, bus *pci.Bus, cfg Config) (*Chipset, error) {
	c := &Chipset{host: newHostBridge(), isa: newISABridge(), onReset: cfg.OnReset}
	for n := range c.irq {
		if routable>>n&1 != 0 {
			c.irq[n] = cfg.Interrupts.Source(n)
		}
	}
	c.isa.OnWrite(func(uint64, int) { c.route() })
	c.power = newPower(clock, bus, cfg.Interrupts.Source(sciIRQ), cfg.OnSleep)
	for devfn, f := range []*pci.Function{HostBridge: c.host, ISABridge: c.isa, PowerMgmt: c.power.f} {
		if f == nil {
			continue
		}
		if err := bus.Add(uint8(devfn), f); err != nil {
			return nil, fmt.Errorf("piix: %w", err)
		}
	}
	bus.SetResetControl((*resetPort)(c))
	return c, nil
}

func newHostBridge() *pci.Function {
	f := pci.NewFunction("host bridge", pci.Identity{
		Vendor: vendorIntel, Device: device82441, SubVendor: subVendor, SubDevice: subDevice,
		Class: classHost, Revision: rev82441,
	})
	f.SetDefault(pci.RegStatus, statusFast, statusMedium)
	for reg := uint8(regPMCCFG); reg < regPAM0; reg++ {
		f.SetMask(reg, 0xff)
	}
	f.SetMask(regPAM0, pam0Writable)
	for reg := uint8(regPAM0 + 1); reg <= regPAM6; reg++ {
		f.SetMask(reg, pamWritable)
	}
	for reg := uint8(regDRB0); reg < regDRB0+8; reg++ {
		f.SetMask(reg, 0xff)
		f.SetDefault(reg, 1)
	}
	f.SetMask(regMTT, 0xf8)
	f.SetMask(regCLT, 0xff)
	f.SetDefault(regSMRAM, 0x02)
	f.SetMask(regSMRAM, 0x78)
	return f
}

func newISABridge() *pci.Function {
	f := pci.NewFunction("ISA bridge", pci.Identity{
		Vendor: vendorIntel, Device: devicePIIX3, SubVendor: subVendor, SubDevice: subDevice,
		Class: classISA, Revision: revPIIX3,
	})
	// A bridge to ISA always decodes and masters: its command bits cannot be cleared.
	f.SetDefault(pci.RegCommand, pci.CommandIO|pci.CommandMemory|pci.CommandMaster)
	f.SetMask(pci.RegCommand, 0, 0)
	f.SetDefault(pci.RegStatus+1, statusMedium)
	for _, r := range []struct {
		reg        uint8
		value, set byte
	}{
		{regISARecovery, 0x4d, 0xff},
		{regXBCS, 0x03, 0xff},
		{regXBCS + 1, 0x00, 0x01},
		{regTopOfMemory, 0x02, 0xff},
		{regMBIRQ0, 0x80, 0xef},
		{regMBIRQ0 + 1, 0x80, 0xef},
		{regMBDMA0, 0x0c, 0x8f},
		{regMBDMA0 + 1, 0x0c, 0x8f},
		{regPCSC, 0x02, 0xff},
		{regPCSC + 1, 0x00, 0xff},
		{regSMIControl, 0x08, 0x1f},
		{regSMIEnable, 0x00, 0xff},
		{regSMIEnable + 1, 0x00, 0x01},
		{regFastOff, 0x0f, 0xff},
	} {
		f.SetDefault(r.reg, r.value)
		f.SetMask(r.reg, r.set)
	}
	for n := uint8(0); n < numPIRQ; n++ {
		f.SetDefault(regPIRQA+n, pirqDisabled)
		f.SetMask(regPIRQA+n, pirqDisabled|pirqIRQ)
	}
	return f
}

// pirqOf returns which PIRQ (0 for PIRQA) a function's pin (1 for INTA#) is wired to:
// the pins of successive slots rotate, and INTA# of slot 1 is PIRQA.
func pirqOf(devfn uint8, pin int) int { return (pin - 1 + int(devfn>>3) - 1) & (numPIRQ - 1) }

// INTx returns the line that a function drives with its interrupt pin (1 for INTA#, 4
// for INTD#). It leads wherever the guest routes the PIRQ. It panics on a pin that
// does not exist and on more than 64 functions on one PIRQ: defects of construction.
func (c *Chipset) INTx(devfn uint8, pin int) devices.Line {
	n := pirqOf(devfn, pin)
	if pin < 1 || pin > numPIRQ || c.sources[n] == maxPIRQSources {
		panic(fmt.Sprintf("piix: pin %d of function %02x.%d", pin, devfn>>3, devfn&7))
	}
	bit := uint64(1) << c.sources[n]
	c.sources[n]++
	return devices.LineFunc(func(level bool) {
		was := c.pirq[n]
		if level {
			c.pirq[n] |= bit
		} else {
			c.pirq[n] &^= bit
		}
		if (was != 0) != (c.pirq[n] != 0) {
			c.route()
		}
	})
}

// routed returns the interrupt that a PIRQ goes to, and false when it goes nowhere.
func (c *Chipset) routed(pirq int) (irq int, ok bool) {
	reg := c.isa.Byte(uint8(regPIRQA + pirq))
	irq = int(reg & pirqIRQ)
	return irq, reg&pirqDisabled == 0 && routable>>irq&1 != 0
}

// route drives every interrupt that a PIRQ can go to.
func (c *Chipset) route() {
	var high uint16
	for n := range c.pirq {
		if irq, ok := c.routed(n); ok && c.pirq[n] != 0 {
			high |= 1 << irq
		}
	}
	for irq, line := range c.irq {
		if line != nil {
			line.Set(high>>irq&1 != 0)
		}
	}
}

// Route does what firmware does: it routes PIRQA to PIRQD to the given interrupts.
// Those must be level-triggered in the ELCR, which is the caller's to set.
func (c *Chipset) Route(irqs [4]uint8) {
	for n, irq := range irqs {
		c.isa.SetByte(uint8(regPIRQA+n), irq&pirqIRQ)
	}
	c.route()
}

// IRQ returns the interrupt that a function's pin is routed to at present, for the
// function's interrupt line register; 0xff ("no connection") when to none.
func (c *Chipset) IRQ(devfn uint8, pin int) uint8 {
	if irq, ok := c.routed(pirqOf(devfn, pin)); ok {
		return uint8(irq)
	}
	return 0xff
}

// resetPort is port 0xCF9.
type resetPort Chipset

// Read implements [devices.Handler].
func (p *resetPort) Read(uint64, int) uint64 { return uint64(p.resetControl) }

// Write implements [devices.Handler]. Setting the CPU reset bit resets the machine,
// be it by the hard or the soft reset: a processor that is reset alone would find
// devices in a state that no firmware expects.
func (p *resetPort) Write(_ uint64, _ int, v uint64) {
	p.resetControl = uint8(v) & resetHard
	if v&resetCPU != 0 && p.onReset != nil {
		p.onReset()
	}
}

// Reset puts the chipset into its power-on state. Levels of the PIRQs stay: they are
// the devices', which release them when they are reset.
func (c *Chipset) Reset() {
	c.host.Reset()
	c.isa.Reset()
	c.resetControl = 0
	c.route()
	c.power.reset()
}

// State is the saved form of a [Chipset].
type State struct {
	Host, ISA, PM pci.FunctionState
	ResetControl  uint8
	PIRQ          [numPIRQ]uint64 // a bit for each source that is high
	Power         PowerState
}

// Save returns the chipset's state.
func (c *Chipset) Save() State {
	return State{c.host.Save(), c.isa.Save(), c.power.f.Save(), c.resetControl, c.pirq, c.power.save()}
}

// Restore sets the chipset's state, or refuses it and changes nothing.
func (c *Chipset) Restore(s State) error {
	if s.ResetControl&^resetHard != 0 {
		return fmt.Errorf("piix: saved reset control is %#x", s.ResetControl)
	}
	for n, high := range s.PIRQ {
		if have := c.sources[n]; have < maxPIRQSources && high>>have != 0 {
			return fmt.Errorf("piix: saved level of a source that PIRQ%c does not have", 'A'+n)
		}
	}
	if err := s.Power.check(); err != nil {
		return err
	}
	// The functions check before they change; whoever has changed already is put back.
	host, isa := c.host.Save(), c.isa.Save()
	err := c.host.Restore(s.Host)
	if err == nil {
		err = c.isa.Restore(s.ISA)
	}
	if err == nil {
		err = c.power.f.Restore(s.PM)
	}
	if err != nil {
		_ = c.host.Restore(host) // its own state, which it accepts
		_ = c.isa.Restore(isa)
		return fmt.Errorf("piix: %w", err)
	}
	c.resetControl, c.pirq = s.ResetControl, s.PIRQ
	c.power.restore(s.Power)
	return nil
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
