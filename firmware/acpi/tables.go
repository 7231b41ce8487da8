package acpi

import (
	"encoding/binary"
	"fmt"
)

// Limits of the machine that the tables can describe.
const (
	// MaxCPUs bounds the CPUs: their local APICs have 8-bit numbers, of which 255 is taken.
	MaxCPUs = 255
)

// PMBase is the usual base port of the PIIX4's power management block.
const PMBase = 0x600

// Config describes the machine to the guest.
type Config struct {
	CPUs int // 1 to MaxCPUs; the number in the MADT is the APIC id
	// LowRAMEnd is the first address after the RAM below 4 GiB: there the PCI memory
	// window begins, which ends below the I/O APIC at 0xfec00000. A multiple of 4096.
	LowRAMEnd uint64
	// PCI64Base and PCI64Size are a second PCI memory window, above 4 GiB; a size of 0
	// means none.
	PCI64Base, PCI64Size uint64
	PMBase               uint16 // base port of the power management block; 0 means the usual one
	COM1, COM2           bool   // serial ports at 0x3f8 and 0x2f8
	I8042                bool   // keyboard and mouse controller
	VGA                  bool   // VGA adapter
}

func (c *Config) check() error {
	const page = 4096
	if c.PMBase == 0 {
		c.PMBase = PMBase
	}
	switch {
	case c.CPUs < 1 || c.CPUs > MaxCPUs:
		return fmt.Errorf("acpi: %d CPUs, want 1 to %d", c.CPUs, MaxCPUs)
	case c.LowRAMEnd%page != 0 || c.LowRAMEnd <= vgaLast || c.LowRAMEnd >= ioapicBase:
		return fmt.Errorf("acpi: low RAM cannot end at %#x", c.LowRAMEnd)
	case c.PCI64Size != 0 && (c.PCI64Base < 1<<32 || c.PCI64Base+c.PCI64Size < c.PCI64Base):
		return fmt.Errorf("acpi: no PCI window possible at %#x+%#x", c.PCI64Base, c.PCI64Size)
	case c.PMBase%pmBlockSize != 0:
		return fmt.Errorf("acpi: power management ports cannot be at %#x", c.PMBase)
	}
	return nil
}

// The header of a table (section 5.2.6).
const (
	headerSize     = 36
	lengthOffset   = 4
	checksumOffset = 9

	oemID      = "FTVMM "
	oemTable   = "FTVMMPC "
	creatorID  = "FTVM"
	tableLevel = 1 // OEM and creator revision
)

// table returns a table with its header; the checksum is left zero.
func table(sig string, revision byte, body []byte) []byte {
	b := append([]byte(sig), make([]byte, 4)...)
	b = append(b, revision, 0)
	b = append(b, oemID...)
	b = append(b, oemTable...)
	b = binary.LittleEndian.AppendUint32(b, tableLevel)
	b = append(b, creatorID...)
	b = binary.LittleEndian.AppendUint32(b, tableLevel)
	b = append(b, body...)
	binary.LittleEndian.PutUint32(b[lengthOffset:], uint32(len(b)))
	return b
}

// FADT of revision 3 (ACPI 2.0, table 5-8; section 5.2.9).
const (
	fadtRevision = 3
	fadtSize     = 244

	fadtFACS       = 36
	fadtDSDT       = 40
	fadtSCI        = 46
	fadtSMI        = 48
	fadtEnable     = 52
	fadtDisable    = 53
	fadtPM1Event   = 56
	fadtPM1Control = 64
	fadtPMTimer    = 76
	fadtGPE0       = 80
	fadtPM1EvLen   = 88
	fadtPM1CtlLen  = 89
	fadtPMTmrLen   = 91
	fadtGPE0Len    = 92
	fadtC2Latency  = 96
	fadtC3Latency  = 98
	fadtCentury    = 108
	fadtBootArch   = 109
	fadtFlags      = 112
	fadtReset      = 116
	fadtResetValue = 128
	fadtXDSDT      = 140
	fadtXPM1Event  = 148
	fadtXPM1Ctl    = 172
	fadtXPMTimer   = 208
	fadtXGPE0      = 220

	acpiEnable  = 0xf1
	acpiDisable = 0xf0
	resetValue  = 0x06 // PIIX3 reset control: hard reset, now
	century     = 0x32 // CMOS byte
	noC2        = 0x0fff

	archLegacy = 1 << 0 // ISA devices
	arch8042   = 1 << 1
	archNoVGA  = 1 << 2

	flagWBINVD      = 1 << 0
	flagC1          = 1 << 2
	flagSleepButton = 1 << 5 // no sleep button among the fixed registers
	flagTimer32     = 1 << 8
	flagReset       = 1 << 10
	flagTimerGood   = 1 << 15 // USE_PLATFORM_CLOCK: Windows prefers the PM timer to the TSC

	pmEventSize   = 4
	pmControlOff  = 4
	pmControlSize = 2
	pmTimerOff    = 8
	pmTimerSize   = 4
)

// fadt returns the FADT without its pointers.
func (c Config) fadt() []byte {
	b := table("FACP", fadtRevision, make([]byte, fadtSize-headerSize))
	le := binary.LittleEndian
	register := func(off, xoff int, port uint16, size byte) {
		if off != 0 {
			le.PutUint32(b[off:], uint32(port))
		}
		// Generic address structure (section 5.2.3.2): I/O space, width in bits.
		b[xoff], b[xoff+1] = spaceIO, size*8
		le.PutUint64(b[xoff+4:], uint64(port))
	}
	le.PutUint16(b[fadtSCI:], sciInterrupt)
	le.PutUint32(b[fadtSMI:], smiPort)
	b[fadtEnable], b[fadtDisable] = acpiEnable, acpiDisable
	register(fadtPM1Event, fadtXPM1Event, c.PMBase, pmEventSize)
	register(fadtPM1Control, fadtXPM1Ctl, c.PMBase+pmControlOff, pmControlSize)
	register(fadtPMTimer, fadtXPMTimer, c.PMBase+pmTimerOff, pmTimerSize)
	register(fadtGPE0, fadtXGPE0, gpeBase, gpeSize)
	register(0, fadtReset, resetPort, 1)
	b[fadtPM1EvLen], b[fadtPM1CtlLen], b[fadtPMTmrLen], b[fadtGPE0Len] = pmEventSize, pmControlSize, pmTimerSize, gpeSize
	le.PutUint16(b[fadtC2Latency:], noC2)
	le.PutUint16(b[fadtC3Latency:], noC2)
	b[fadtCentury] = century
	b[fadtResetValue] = resetValue
	arch := uint16(archLegacy)
	if c.I8042 {
		arch |= arch8042
	}
	if !c.VGA {
		arch |= archNoVGA
	}
	le.PutUint16(b[fadtBootArch:], arch)
	le.PutUint32(b[fadtFlags:], flagWBINVD|flagC1|flagSleepButton|flagTimer32|flagReset|flagTimerGood)
	return b
}

// facs returns the FACS (section 5.2.10), which has no checksum.
func facs() []byte {
	const size, versionOffset = 64, 32
	b := make([]byte, size)
	copy(b, "FACS")
	b[lengthOffset] = size
	b[versionOffset] = 1
	return b
}

// MADT of revision 1 (ACPI 1.0b; section 5.2.12).
const (
	madtRevision = 1
	madtDual8259 = 1 // flag

	madtLAPIC    = 0
	madtIOAPIC   = 1
	madtOverride = 2
	madtLocalNMI = 4

	ioapicID   = 0
	enabled    = 1
	levelHighF = 0x0d // flags of an override: active high, level-triggered
	allCPUs    = 0xff
	nmiPin     = 1 // LINT1
	pitGSI     = 2
)

// madt returns the MADT.
func (c Config) madt() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, lapicBase)
	b = le.AppendUint32(b, madtDual8259)
	for i := range c.CPUs {
		b = append(b, madtLAPIC, 8, byte(i), byte(i))
		b = le.AppendUint32(b, enabled)
	}
	b = append(b, madtIOAPIC, 12, ioapicID, 0)
	b = le.AppendUint32(b, ioapicBase)
	b = le.AppendUint32(b, 0) // its first interrupt
	override := func(isa byte, gsi uint32, flags uint16) {
		b = append(b, madtOverride, 10, 0, isa)
		b = le.AppendUint32(b, gsi)
		b = le.AppendUint16(b, flags)
	}
	override(0, pitGSI, 0)
	for _, n := range []byte{5, 9, 10, 11} {
		override(n, uint32(n), levelHighF)
	}
	b = append(b, madtLocalNMI, 6, allCPUs, 0, 0, nmiPin)
	return table("APIC", madtRevision, b)
}

// waet returns the Windows ACPI Emulated Devices Table: the RTC needs no extra read to
// acknowledge an interrupt, and one read of the PM timer suffices.
func waet() []byte {
	const rtcGood, timerGood = 1 << 0, 1 << 1
	return table("WAET", 1, binary.LittleEndian.AppendUint32(nil, rtcGood|timerGood))
}
