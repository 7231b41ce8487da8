package piix

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/pci"
)

// Registers of the power management function (82371AB data sheet, 7.1).
const (
	regPMBase     = 0x40
	regCountA     = 0x44 // up to 0x57: counters and resume enables, storage
	regDevActB    = 0x58
	regDevResA    = 0x5c // up to 0x7f: device resources, storage
	regPMRegMisc  = 0x80
	regSMBBase    = 0x90
	regSMBHostCfg = 0xd2

	pmBaseMask   = 0xffc0
	pmIOEnable   = 1 << 0  // of PMREGMISC
	apmcEnable   = 1 << 25 // of DEVACTB: writes of port 0xB2 raise an SMI
	smbBaseMask  = 0xfff0
	baseIsPort   = 1 << 0
	smbHostInt   = 0x0e // interrupt select; the enable bit below stays 0
	pmBlockBytes = 64
)

// Ports.
const (
	// PortSMICommand is ACPI's SMI_CMD (APMC); the status port (APMS) follows it.
	PortSMICommand = 0xb2
	// PortGPE0 is the general-purpose event block: 2 bytes status, 2 bytes enable.
	PortGPE0 = 0xafe0

	smiPorts = 2
	gpePorts = 4
)

// Commands of port 0xB2, as the FADT names them.
const (
	ACPIEnable  = 0xf1
	ACPIDisable = 0xf0
)

// The power management block (82371AB, 7.2; ACPI 6.5, 4.8.3): offsets in it.
const (
	PM1Status  = 0x00 // 16 bits, write one to clear
	PM1Enable  = 0x02 // 16 bits
	PM1Control = 0x04 // 16 bits
	PMTimer    = 0x08 // 32 bits, read-only
)

// Bits of PM1 status and enable (ACPI 6.5, 4.8.3.1).
const (
	pm1Timer       = 1 << 0
	pm1BusMaster   = 1 << 4 // status only
	pm1Global      = 1 << 5
	pm1PowerButton = 1 << 8
	pm1SleepButton = 1 << 9
	pm1RTC         = 1 << 10
	pm1Wake        = 1 << 15 // status only

	pm1Enables  = pm1Timer | pm1Global | pm1PowerButton | pm1SleepButton | pm1RTC
	pm1Statuses = pm1Enables | pm1BusMaster | pm1Wake
)

// Bits of PM1 control (ACPI 6.5, 4.8.3.2.1).
const (
	pm1SCIEnable      = 1 << 0
	pm1BusMasterRLD   = 1 << 1
	pm1SleepTypeShift = 10
	pm1SleepType      = 7 << pm1SleepTypeShift
	pm1SleepEnable    = 1 << 13 // write-only

	pm1ControlStored = pm1SCIEnable | pm1BusMasterRLD | pm1SleepType
)

const (
	// sciIRQ is the interrupt of the ACPI events, level-triggered.
	sciIRQ = 9
	// PMTimerHz is the PM timer's frequency.
	PMTimerHz = 3_579_545
	// The timer has 32 bits (TMR_VAL_EXT in the FADT); its status bit is set when the
	// highest changes, that is every half turn.
	halfTurn = 1 << 31
)

// power is the power management function.
type power struct {
	f       *pci.Function
	clock   *devices.Clock
	turn    *devices.Timer // the PM timer's highest bit changes
	sci     devices.Line
	block   *pci.Region
	onSleep func(typ uint8)

	s PowerState
}

// PowerState is the saved form of the ACPI registers.
type PowerState struct {
	APMC, APMS                    uint8 // ports 0xB2 and 0xB3
	PM1Status, PM1Enable, PM1Ctrl uint16
	GPEStatus, GPEEnable          uint16
}

func newPower(clock *devices.Clock, bus *pci.Bus, sci devices.Line, onSleep func(uint8)) *power {
	p := &power{
		f: pci.NewFunction("power management", pci.Identity{
			Vendor: vendorIntel, Device: devicePIIX4, SubVendor: subVendor, SubDevice: subDevice,
			Class: classOther, Revision: revPIIX4,
		}),
		clock:   clock,
		sci:     sci,
		onSleep: onSleep,
	}
	f := p.f
	f.SetDefault(pci.RegStatus, statusFast, statusMedium)
	f.SetDefault(pci.RegInterruptPin, 1)
	f.SetDefault(regPMBase, le32(baseIsPort)...)
	f.SetMask(regPMBase, le32(pmBaseMask)...)
	for reg := regCountA; reg < regPMRegMisc; reg++ {
		f.SetMask(uint8(reg), 0xff)
	}
	// Firmware that finds this bit set takes SMM for set up and leaves it alone; if it
	// were clear, SeaBIOS would wait forever for its SMM handler to run.
	f.SetDefault(regDevActB, le32(apmcEnable)...)
	f.SetMask(regPMRegMisc, pmIOEnable)
	f.SetDefault(regSMBBase, le32(baseIsPort)...)
	f.SetMask(regSMBBase, le32(smbBaseMask)...)
	f.SetMask(regSMBHostCfg, smbHostInt)
	f.OnWrite(func(uint64, int) { p.place() })

	p.block = bus.AddIORegion((*pmBlock)(p))
	bus.AddIORegion((*gpeBlock)(p)).Set(PortGPE0, gpePorts)
	bus.AddIORegion((*smiPort)(p)).Set(PortSMICommand, smiPorts)
	p.turn = clock.NewTimer("piix pm timer", p.turned)
	p.armTurn()
	return p
}

// place has the PM block decode where configuration space says.
func (p *power) place() {
	base := uint64(p.f.Word(regPMBase) & pmBaseMask)
	if p.f.Byte(regPMRegMisc)&pmIOEnable == 0 || base == 0 {
		p.block.Set(0, 0)
		return
	}
	p.block.Set(base, pmBlockBytes)
}

// EnablePM does what firmware does: it puts the PM block at base, a multiple of 64,
// and enables it.
func (c *Chipset) EnablePM(base uint16) error {
	if base == 0 || base&^pmBaseMask != 0 {
		return fmt.Errorf("piix: PM block at port %#x", base)
	}
	c.power.f.SetLong(regPMBase, uint32(base)|baseIsPort)
	c.power.f.SetByte(regPMRegMisc, pmIOEnable)
	c.power.place()
	return nil
}

// PressPowerButton reports a press of the power button to the guest, as an ACPI fixed
// event: a request to shut down.
func (c *Chipset) PressPowerButton() {
	c.power.s.PM1Status |= pm1PowerButton
	c.power.update()
}

// armTurn sets the timer to the next change of the PM timer's highest bit.
func (p *power) armTurn() {
	turns := devices.ScaleTime(max(p.clock.Now(), p.clock.Horizon()), PMTimerHz)/halfTurn + 1
	p.turn.Arm(devices.TicksToTime(turns*halfTurn, PMTimerHz))
}

func (p *power) turned() {
	p.s.PM1Status |= pm1Timer
	p.armTurn()
	p.update()
}

// update drives the SCI. While ACPI is off, events would be SMIs, which go nowhere.
func (p *power) update() {
	event := p.s.PM1Status&p.s.PM1Enable&pm1Enables != 0 || p.s.GPEStatus&p.s.GPEEnable != 0
	p.sci.Set(event && p.s.PM1Ctrl&pm1SCIEnable != 0)
}

// control stores a write of PM1 control, in which SLP_EN asks for the sleep state.
func (p *power) control(v uint16) {
	p.s.PM1Ctrl = v & pm1ControlStored
	p.update()
	if v&pm1SleepEnable != 0 && p.onSleep != nil {
		p.onSleep(uint8(v & pm1SleepType >> pm1SleepTypeShift))
	}
}

// pmBlock is the PM block.
type pmBlock power

// NeedsTime implements [devices.Timed]: reads that can touch the timer do.
func (*pmBlock) NeedsTime(off uint64, write bool) bool {
	const longest = 4 // bytes of a port access
	return !write && off+longest > PMTimer && off < PMTimer+4
}

// Read implements [devices.Handler]. What the block does not have reads as zero.
func (b *pmBlock) Read(off uint64, size int) (v uint64) {
	for i := range size {
		at := off + uint64(i)
		var reg uint32
		switch at &^ 3 {
		case PM1Status:
			reg = uint32(b.s.PM1Status) | uint32(b.s.PM1Enable)<<16
		case PM1Control:
			reg = uint32(b.s.PM1Ctrl)
		case PMTimer:
			reg = uint32(devices.ScaleTime(b.clock.Now(), PMTimerHz))
		}
		v |= uint64(reg>>(8*(at%4))&0xff) << (8 * i)
	}
	return v
}

// Write implements [devices.Handler].
func (b *pmBlock) Write(off uint64, size int, v uint64) {
	p := (*power)(b)
	control, controlled := p.s.PM1Ctrl, false
	for i := range size {
		at, shift := off+uint64(i), 8*((off+uint64(i))%2)
		bits, mask := uint16(v>>(8*i)&0xff)<<shift, uint16(0xff)<<shift
		switch at &^ 1 {
		case PM1Status:
			p.s.PM1Status &^= bits
		case PM1Enable:
			p.s.PM1Enable = (p.s.PM1Enable&^mask | bits) & pm1Enables
		case PM1Control:
			control, controlled = control&^mask|bits, true
		}
	}
	if controlled {
		p.control(control)
		return
	}
	p.update()
}

// gpeBlock is the general-purpose event block. No event is wired to it: it is there
// because the FADT must name one, and its enable bits can be written.
type gpeBlock power

// Read implements [devices.Handler].
func (b *gpeBlock) Read(off uint64, _ int) uint64 {
	return (uint64(b.s.GPEStatus) | uint64(b.s.GPEEnable)<<16) >> (8 * off)
}

// Write implements [devices.Handler].
func (b *gpeBlock) Write(off uint64, size int, v uint64) {
	mask := uint32(1<<(8*size)-1) << (8 * off)
	bits := uint32(v) << (8 * off) & mask
	b.s.GPEStatus &^= uint16(bits)
	b.s.GPEEnable = b.s.GPEEnable&^uint16(mask>>16) | uint16(bits>>16)
	(*power)(b).update()
}

// smiPort is the pair of ports by which software talks to SMM. Both can be read back.
type smiPort power

// Read implements [devices.Handler].
func (b *smiPort) Read(off uint64, _ int) uint64 {
	return (uint64(b.s.APMC) | uint64(b.s.APMS)<<8) >> (8 * off)
}

// Write implements [devices.Handler].
func (b *smiPort) Write(off uint64, size int, v uint64) {
	p := (*power)(b)
	if off+uint64(size) > 1 { // the second port is written
		p.s.APMS = uint8(v >> (8 * (1 - off)))
	}
	if off > 0 {
		return
	}
	p.s.APMC = uint8(v)
	switch p.s.APMC {
	case ACPIEnable:
		p.s.PM1Ctrl |= pm1SCIEnable
	case ACPIDisable:
		p.s.PM1Ctrl &^= pm1SCIEnable
	}
	p.update()
}

func (p *power) reset() {
	p.f.Reset()
	p.s = PowerState{}
	p.place()
	p.armTurn()
	p.update()
}

func (p *power) save() PowerState { return p.s }

func (s *PowerState) check() error {
	if s.PM1Status&^pm1Statuses != 0 || s.PM1Enable&^pm1Enables != 0 || s.PM1Ctrl&^pm1ControlStored != 0 {
		return fmt.Errorf("piix: saved ACPI registers %#x, %#x, %#x have reserved bits set", s.PM1Status, s.PM1Enable, s.PM1Ctrl)
	}
	return nil
}

func (p *power) restore(s PowerState) {
	p.s = s
	p.place()
}
