// Package rtc is the MC146818 real-time clock of a PC with its 128 bytes of CMOS RAM.
//
// The clock does not tick: everything follows from virtual time when it is asked for.
// The divider chain began at some moment; the seconds since then, added to a base, are
// the time of day, and the taps of the chain are the periodic interrupt. The flags of
// register C are brought up to date at an access by asking whether an update, an alarm
// or a period lies between the last look and now. A timer is armed only for the next
// event whose interrupt is enabled, and only while the interrupt line is low, so that a
// guest that does not acknowledge costs nothing.
//
// Setting the time changes the base, which is part of the state; virtual time itself is
// never touched.
//
// Reference: Motorola MC146818 data sheet. An update here takes no time: the bit that
// announces it (UIP) is set for the 244 us before, in which a reader must not begin,
// and the time changes as it clears. The daylight saving bit is kept and has no effect,
// as on the PIIX.
package rtc

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
)

// Ports of the clock.
const (
	Port = 0x70
	Size = 2
)

// Offsets of the ports.
const (
	portIndex = 0 // write-only; bit 7 masks the NMI, which this machine does not have
	portData  = 1

	indexMask = 0x7f
)

// Registers, by index. Below 10 and Century they are time and alarm.
const (
	regSeconds      = 0x00
	regSecondsAlarm = 0x01
	regMinutes      = 0x02
	regMinutesAlarm = 0x03
	regHours        = 0x04
	regHoursAlarm   = 0x05
	regWeekday      = 0x06
	regDay          = 0x07
	regMonth        = 0x08
	regYear         = 0x09
	regA            = 0x0a
	regB            = 0x0b
	regC            = 0x0c
	regD            = 0x0d

	numRegisters = 128
)

// Century is the index of the century byte, to which the FADT's CENTURY field points.
const Century = 0x32

// Register A.
const (
	aRate       = 0x0f // of the periodic interrupt
	aDivider    = 0x70
	aDividerMax = 0x20 // above it the divider chain is held in reset
	aUIP        = 0x80 // update in progress
	aPowerOn    = 0x26 // 32768 Hz crystal, 1024 Hz rate
)

// Register B. The interrupt enables sit where register C has the flags.
const (
	bSET     = 1 << 7 // updates are halted, the time may be set
	bPIE     = 1 << 6
	bAIE     = 1 << 5
	bUIE     = 1 << 4
	bSQWE    = 1 << 3
	bBinary  = 1 << 2 // else BCD
	b24      = 1 << 1 // else 12 hours, with hourPM
	bPowerOn = b24

	hourPM = 0x80
)

// Register C.
const (
	cIRQ    = 1 << 7
	cPeriod = 1 << 6
	cAlarm  = 1 << 5
	cUpdate = 1 << 4
	cEvents = cPeriod | cAlarm | cUpdate
)

// dValid is register D: the battery is good.
const dValid = 0x80

// alarmAny is the lowest alarm byte that matches every time.
const alarmAny = 0xc0

const (
	second  = 1_000_000_000 // ns
	crystal = 32768         // Hz

	// uipLead is how long before an update UIP is set.
	uipLead = 244_000 // ns
	// restartLead is the time from the end of the divider's reset to the first update.
	restartLead = second / 2
)

// CMOS RAM that firmware reads, by the conventions of Bochs, QEMU and SeaBIOS.
const (
	cmosEquipment = 0x14
	cmosBase      = 0x15 // 2 bytes: KiB of RAM below 1 MiB
	cmosExtended  = 0x17 // 2 bytes: KiB above 1 MiB, the same again in
	cmosExtended2 = 0x30
	cmosAbove16M  = 0x34 // 2 bytes: 64 KiB units above 16 MiB and below 4 GiB
	cmosBoot3     = 0x38 // third boot device in the upper half
	cmosBoot12    = 0x3d // first and second boot device
	cmosAbove4G   = 0x5b // 3 bytes: 64 KiB units above 4 GiB
	cmosCPUs      = 0x5f // CPUs less one
	cmosSum       = 0x2e // 2 bytes, big-endian: sum of the bytes from
	cmosSumFirst  = 0x10
	cmosSumLast   = 0x2d

	equipment = 0x06 // coprocessor, PS/2 mouse
	baseKiB   = 640
)

// Boot devices of [Config].
const (
	BootNone = iota
	BootFloppy
	BootDisk
	BootCD
	BootNetwork
)

// Config is what the CMOS RAM and the clock hold at first power-on.
type Config struct {
	Epoch     int64 // Unix time in seconds at virtual time 0
	UTCOffset int64 // seconds east of UTC, for guests whose clock keeps local time

	BelowFourGiB uint64 // bytes of RAM from address 0 on, below the hole under 4 GiB
	AboveFourGiB uint64 // bytes of RAM from 4 GiB on
	Boot         [3]uint8
	CPUs         int
}

// State is the saved form of a [Device].
type State struct {
	Index uint8 // register selected
	// CMOS holds all registers but the running time: while updates go on the bytes of
	// the time are not up to date, and bit 7 of register A and of register C is
	// derived.
	CMOS [numRegisters]uint8

	Base     int64 // time of day in seconds since 1970, in the guest's zone, at Divider
	Divider  int64 // virtual time in ns at which the divider chain stood at 0
	Weekday  uint8 // days by which the weekday register is ahead of the calendar
	LookedAt int64 // virtual time in ns up to which register C accounts for events
}

// Device is the clock.
type Device struct {
	clock *devices.Clock
	irq8  devices.Line
	timer *devices.Timer // next event whose interrupt is enabled
	cfg   Config
	s     State
}

// New returns the clock at first power-on.
func New(clock *devices.Clock, irq8 devices.Line, cfg Config) *Device {
	d := &Device{clock: clock, irq8: irq8, cfg: cfg}
	d.timer = clock.NewTimer("rtc.irq8", d.event)
	d.s.CMOS[regA], d.s.CMOS[regB] = aPowerOn, bPowerOn
	d.s.Base = cfg.Epoch + cfg.UTCOffset
	d.Reset()
	return d
}

// Reset does what the chip's RESET pin does: interrupts are disabled and the flags
// cleared. The rest has a battery and stays, the time above all. The bytes that
// describe the machine are written again, as a firmware does that finds them wrong.
func (d *Device) Reset() {
	d.s.Index = 0
	d.s.CMOS[regB] &^= bPIE | bAIE | bUIE | bSQWE
	d.s.CMOS[regC] = 0
	d.s.CMOS[regD] = dValid
	d.s.LookedAt = d.clock.Now()
	d.describe()
	d.update()
}

// describe fills in the bytes that describe the machine.
func (d *Device) describe() {
	const (
		kib  = 1 << 10
		unit = 64 << 10
		ext  = 1 << 20
		mid  = 16 << 20
	)
	above := func(from uint64, by uint64) uint64 {
		if d.cfg.BelowFourGiB <= from {
			return 0
		}
		return min((d.cfg.BelowFourGiB-from)/by, 0xffff)
	}
	put := func(at int, v uint64, size int) {
		for i := 0; i < size; i++ {
			d.s.CMOS[at+i] = uint8(v >> (8 * i))
		}
	}
	put(cmosEquipment, equipment, 1)
	put(cmosBase, min(baseKiB, d.cfg.BelowFourGiB/kib), 2)
	put(cmosExtended, above(ext, kib), 2)
	put(cmosExtended2, above(ext, kib), 2)
	put(cmosAbove16M, above(mid, unit), 2)
	put(cmosAbove4G, min(d.cfg.AboveFourGiB/unit, 0xffffff), 3)
	put(cmosBoot12, uint64(d.cfg.Boot[1]&0xf<<4|d.cfg.Boot[0]&0xf), 1)
	put(cmosBoot3, uint64(d.cfg.Boot[2]&0xf<<4), 1)
	put(cmosCPUs, uint64(max(d.cfg.CPUs, 1)-1), 1)
	var sum uint16
	for _, b := range d.s.CMOS[cmosSumFirst : cmosSumLast+1] {
		sum += uint16(b)
	}
	put(cmosSum, uint64(sum>>8), 1)
	put(cmosSum+1, uint64(sum), 1)
}

// NeedsTime says whether an access depends on the present time: reads of the running
// time and of the flags, and writes that start or stop something. A write of the index
// counts as one, as it may be the lower half of a wide write whose upper half is data.
func (d *Device) NeedsTime(off uint64, write bool) bool {
	if off == portIndex && write {
		return true
	}
	i := d.s.Index
	return isTime(i) || i == regA || i == regC || write && (isAlarm(i) || i == regB)
}

// Read handles a read of the two ports.
func (d *Device) Read(off uint64, size int) uint64 {
	v := ^uint64(0)
	for i := 0; i < size && i < 8; i++ {
		if off+uint64(i) == portData {
			v = v&^(0xff<<(8*i)) | uint64(d.read())<<(8*i)
		}
	}
	return v
}

// Write handles a write of the two ports.
func (d *Device) Write(off uint64, size int, v uint64) {
	for i := 0; i < size; i++ {
		switch b := uint8(v >> (8 * i)); off + uint64(i) {
		case portIndex:
			d.s.Index = b & indexMask
		case portData:
			d.write(b)
		}
	}
}

func (d *Device) read() uint8 {
	i := d.s.Index
	switch {
	case i == regA:
		v := d.s.CMOS[regA]
		if d.updateNear() {
			v |= aUIP
		}
		return v
	case i == regC:
		d.look()
		v := d.s.CMOS[regC] | d.irqFlag()
		d.s.CMOS[regC] = 0
		d.update()
		return v
	case isTime(i) && d.running():
		f := d.fields(d.time())
		return f[i]
	}
	return d.s.CMOS[i]
}

func (d *Device) write(v uint8) {
	i := d.s.Index
	switch {
	case i == regA || i == regB:
		d.look()
		d.control(i, v)
		d.update()
	case i == regC || i == regD: // read-only
	case isTime(i):
		d.look()
		if !d.running() {
			d.s.CMOS[i] = v
			return
		}
		d.freeze()
		d.s.CMOS[i] = v
		d.thaw()
		d.update()
	case isAlarm(i):
		d.look()
		d.s.CMOS[i] = v
		d.update()
	default:
		d.s.CMOS[i] = v
	}
}

// control writes register A or B and stops or restarts what that stops or restarts.
func (d *Device) control(reg, v uint8) {
	if reg == regA {
		v &^= aUIP
	} else if v&bSET != 0 {
		v &^= bUIE
	}
	was, chained := d.running(), d.dividing()
	if was {
		d.freeze()
	}
	if was && reg == regB && v&bSET == 0 {
		// The time goes on, so it is converted to a new format.
		t := d.time()
		d.s.CMOS[regB] = v
		d.store(t)
	}
	d.s.CMOS[reg] = v
	if d.dividing() && !chained {
		d.s.Divider = d.now() - restartLead
	}
	if d.running() {
		d.thaw()
	}
}

// event is the timer's function.
func (d *Device) event() {
	d.look()
	d.update()
}

// look brings the flags of register C up to date.
func (d *Device) look() {
	from, to := d.s.LookedAt, d.clock.Now()
	if to <= from {
		return
	}
	d.s.LookedAt = to
	for _, e := range [...]struct {
		flag uint8
		next func(int64) int64
	}{{cPeriod, d.nextPeriod}, {cAlarm, d.nextAlarm}, {cUpdate, d.nextUpdate}} {
		if d.s.CMOS[regC]&e.flag == 0 && e.next(from) <= to {
			d.s.CMOS[regC] |= e.flag
		}
	}
}

// irqFlag returns cIRQ if a flag is set whose interrupt is enabled.
func (d *Device) irqFlag() uint8 {
	if d.s.CMOS[regC]&d.s.CMOS[regB]&cEvents != 0 {
		return cIRQ
	}
	return 0
}

// update drives the line and arms the timer for what may raise it.
func (d *Device) update() {
	high := d.irqFlag() != 0
	d.irq8.Set(high)
	at := devices.Never
	if !high {
		from, enabled := d.s.LookedAt, d.s.CMOS[regB]
		if enabled&bPIE != 0 {
			at = min(at, d.nextPeriod(from))
		}
		if enabled&bAIE != 0 {
			at = min(at, d.nextAlarm(from))
		}
		if enabled&bUIE != 0 {
			at = min(at, d.nextUpdate(from))
		}
	}
	d.timer.Arm(at)
}

// Save returns the state.
func (d *Device) Save() State { return d.s }

// Limits of what [Device.Restore] takes: what the year and century registers can say,
// in seconds.
const maxBase = 1 << 40

// Restore sets the state. It refuses one that no sequence of accesses leads to, where
// that matters.
func (d *Device) Restore(s State) error {
	switch {
	case s.Index >= numRegisters:
		return fmt.Errorf("rtc: saved index %#x", s.Index)
	case s.CMOS[regA]&aUIP != 0 || s.CMOS[regC]&^cEvents != 0:
		return fmt.Errorf("rtc: saved registers A and C are %#02x, %#02x", s.CMOS[regA], s.CMOS[regC])
	case s.Base > maxBase || s.Base < -maxBase:
		return fmt.Errorf("rtc: saved time of day %d", s.Base)
	case s.LookedAt < 0 || s.Divider < -restartLead || s.Divider > s.LookedAt:
		return fmt.Errorf("rtc: saved times %d and %d", s.Divider, s.LookedAt)
	case s.Weekday > 6:
		return fmt.Errorf("rtc: saved weekday offset %d", s.Weekday)
	}
	d.s = s
	return nil
}
