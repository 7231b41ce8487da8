// Package smbios builds the tables by which an operating system learns the make of
// the machine: its UUID, its processor and its memory (DMTF DSP0134, SMBIOS 2.8;
// section numbers are those of version 3.6).
//
// Version 2.8 with the 32-bit entry point is what SeaBIOS, OVMF and every Windows read. The
// tables are a function of their [Config]: a guest sees the same UUID and serial
// number on both hosts of a pair, and after every restart.
package smbios

import (
	"encoding/binary"
	"fmt"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Names of the fw_cfg files that firmware expects.
const (
	FileAnchor = "etc/smbios/smbios-anchor"
	FileTables = "etc/smbios/smbios-tables"
)

// MaxString bounds each string of a [Config], in bytes (6.1.3 has no bound; older
// versions had this one).
const MaxString = 64

// Config describes the machine.
type Config struct {
	UUID [16]byte // in the order in which a UUID is written (RFC 9562)
	CPUs int      // cores of the one processor, 1 to 255
	// LowRAM is the RAM below 4 GiB, from address 0 on, and HighRAM the RAM from 4 GiB
	// on: bytes, in whole MiB or rounded down.
	LowRAM, HighRAM uint64
	Manufacturer    string // empty means "ftvmm"
	Product         string // empty means "ftvmm i440FX PC"
	Serial          string // empty means none
}

// Tables are the entry point, whose address of the structures is missing, and the structures.
type Tables struct {
	Anchor     []byte
	Structures []byte
}

// The entry point (5.2.1).
const (
	anchorSize = 31

	anchorChecksum   = 4
	anchorMaxSize    = 8
	anchorMiddle     = 16 // "_DMI_" and what its own checksum covers begin here
	anchorMiddleSum  = 21
	anchorLength     = 22
	anchorAddress    = 24
	anchorCount      = 28
	versionMajor     = 2
	versionMinor     = 8
	versionBCD       = 0x28
	anchorAlign      = 16
	structuresOffset = 32 // of the structures after the anchor, by Install
)

// Types of structures (chapter 7).
const (
	typeBIOS        = 0
	typeSystem      = 1
	typeChassis     = 3
	typeProcessor   = 4
	typeMemoryArray = 16
	typeMemory      = 17
	typeMemoryMap   = 19
	typeBoot        = 32
	typeEnd         = 127
)

// Handles: one structure refers to another by its handle.
const (
	handleBIOS      = 0x0000
	handleSystem    = 0x0100
	handleChassis   = 0x0300
	handleProcessor = 0x0400
	handleArray     = 0x1000
	handleMemory    = 0x1100
	handleMap       = 0x1300
	handleBoot      = 0x2000
	handleEnd       = 0x7f00
	noHandle        = 0xffff
	noError         = 0xfffe
)

const unknown = 2 // in most enumerations

// builder collects structures.
type builder struct {
	out     []byte
	count   int
	largest int
	body    []byte
	strings []string
}

func (b *builder) u8(v ...byte) { b.body = append(b.body, v...) }
func (b *builder) u16(v ...uint16) {
	for _, v := range v {
		b.body = binary.LittleEndian.AppendUint16(b.body, v)
	}
}
func (b *builder) u32(v ...uint32) {
	for _, v := range v {
		b.body = binary.LittleEndian.AppendUint32(b.body, v)
	}
}
func (b *builder) u64(v ...uint64) {
	for _, v := range v {
		b.body = binary.LittleEndian.AppendUint64(b.body, v)
	}
}

// str adds the number of a string that follows the structure, 0 for none (6.1.3).
func (b *builder) str(s string) {
	if s == "" {
		b.u8(0)
		return
	}
	b.strings = append(b.strings, s)
	b.u8(byte(len(b.strings)))
}

// end closes a structure (6.1.2).
func (b *builder) end(typ byte, handle uint16) {
	start := len(b.out)
	b.out = append(b.out, typ, byte(4+len(b.body)))
	b.out = binary.LittleEndian.AppendUint16(b.out, handle)
	b.out = append(b.out, b.body...)
	for _, s := range b.strings {
		b.out = append(b.out, s...)
		b.out = append(b.out, 0)
	}
	if len(b.strings) == 0 {
		b.out = append(b.out, 0)
	}
	b.out = append(b.out, 0)
	b.count++
	b.largest = max(b.largest, len(b.out)-start)
	b.body, b.strings = nil, nil
}

// Build makes the tables.
func Build(c Config) (Tables, error) {
	const maxCPUs, maxRAM = 255, 1 << 42
	if c.CPUs < 1 || c.CPUs > maxCPUs {
		return Tables{}, fmt.Errorf("smbios: %d CPUs, want 1 to %d", c.CPUs, maxCPUs)
	}
	if c.LowRAM < 1<<20 || c.LowRAM > 1<<32 || c.HighRAM > maxRAM {
		return Tables{}, fmt.Errorf("smbios: no machine has %d bytes of RAM below 4 GiB and %d above", c.LowRAM, c.HighRAM)
	}
	if c.Manufacturer == "" {
		c.Manufacturer = "ftvmm"
	}
	if c.Product == "" {
		c.Product = "ftvmm i440FX PC"
	}
	for _, s := range []string{c.Manufacturer, c.Product, c.Serial} {
		if len(s) > MaxString {
			return Tables{}, fmt.Errorf("smbios: %q is longer than %d bytes", s, MaxString)
		}
		for _, r := range []byte(s) {
			if r < ' ' || r > '~' {
				return Tables{}, fmt.Errorf("smbios: %q has unprintable characters", s)
			}
		}
	}
	var b builder
	c.bios(&b)
	c.system(&b)
	c.processor(&b)
	c.memory(&b)
	b.u8(0, 0, 0, 0, 0, 0, 0) // reserved, then: no error detected
	b.end(typeBoot, handleBoot)
	b.end(typeEnd, handleEnd)

	a := make([]byte, anchorSize)
	copy(a, "_SM_")
	a[5], a[6], a[7] = anchorSize, versionMajor, versionMinor
	binary.LittleEndian.PutUint16(a[anchorMaxSize:], uint16(b.largest))
	copy(a[anchorMiddle:], "_DMI_")
	binary.LittleEndian.PutUint16(a[anchorLength:], uint16(len(b.out)))
	binary.LittleEndian.PutUint16(a[anchorCount:], uint16(b.count))
	a[anchorSize-1] = versionBCD
	sumAnchor(a)
	return Tables{Anchor: a, Structures: b.out}, nil
}

// sumAnchor sets both checksums.
func sumAnchor(a []byte) {
	sum := func(b []byte) (s byte) {
		for _, v := range b {
			s += v
		}
		return s
	}
	a[anchorMiddleSum] -= sum(a[anchorMiddle:])
	a[anchorChecksum] -= sum(a)
}

// Version and date of our BIOS tables, which are part of what a guest sees: they do
// not follow the program's version.
const (
	biosVersion = "1.0"
	biosDate    = "01/01/2026"
	noVersion   = 0xff
)

// bios adds the BIOS information (7.1).
func (c Config) bios(b *builder) {
	const (
		segment        = 0xe800
		romSize        = 0 // 64 KiB
		notSupported   = 1 << 3
		targeted       = 1 << 2 // targeted content distribution: required to be set
		virtualMachine = 1 << 4
	)
	b.str(c.Manufacturer)
	b.str(biosVersion)
	b.u16(segment)
	b.str(biosDate)
	b.u8(romSize)
	b.u64(notSupported)
	b.u8(0, targeted|virtualMachine)
	b.u8(noVersion, noVersion, noVersion, noVersion)
	b.end(typeBIOS, handleBIOS)
}

// system adds the system information (7.2) and the chassis (7.4).
func (c Config) system(b *builder) {
	const powerSwitch = 6
	b.str(c.Manufacturer)
	b.str(c.Product)
	b.str(biosVersion)
	b.str(c.Serial)
	// The first three fields of a UUID are little-endian (7.2.1).
	u := c.UUID
	b.u8(u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6])
	b.u8(u[8:]...)
	b.u8(powerSwitch)
	b.str("") // SKU
	b.str("") // family
	b.end(typeSystem, handleSystem)

	const other, safe = 1, 3
	b.str(c.Manufacturer)
	b.u8(other)
	b.str(biosVersion)
	b.str(c.Serial)
	b.str("") // asset tag
	b.u8(safe, safe, safe, unknown)
	b.u32(0)         // OEM
	b.u8(0, 0, 0, 0) // height, power cords, contained elements
	b.str("")        // SKU
	b.end(typeChassis, handleChassis)
}

// processor adds the processor (7.5): one socket, so that editions of Windows that
// are licensed for one or two sockets use all cores.
func (c Config) processor(b *builder) {
	const (
		central   = 3
		other     = 1
		speed     = 2000 // MHz; a number must be given
		enabled   = 0x41 // populated, enabled
		is64Bit   = 1 << 2
		multiCore = 1 << 3
	)
	b.str("CPU 0")
	b.u8(central, other)
	b.str(c.Manufacturer)
	b.u64(0) // CPUID: the guest reads it itself
	b.str(biosVersion)
	b.u8(0)             // voltage
	b.u16(0)            // external clock
	b.u16(speed, speed) // maximum, current
	b.u8(enabled, other)
	b.u16(noHandle, noHandle, noHandle) // caches
	b.str("")                           // serial
	b.str("")                           // asset tag
	b.str("")                           // part
	n := byte(c.CPUs)
	b.u8(n, n, n)
	characteristics := uint16(is64Bit)
	if n > 1 {
		characteristics |= multiCore
	}
	b.u16(characteristics)
	b.u16(other) // family
	b.end(typeProcessor, handleProcessor)
}

// memory adds the array of memory (7.17), its one device (7.18) and the addresses at
// which it appears (7.20).
func (c Config) memory(b *builder) {
	const (
		systemBoard  = 3
		systemMemory = 3
		multiBitECC  = 6
		extendedKB   = 0x8000_0000
		extendedMB   = 0x7fff
		dimm         = 9
		ram          = 7
		otherDetail  = 1 << 1
		noWidth      = 0xffff
	)
	total := c.LowRAM + c.HighRAM
	b.u8(systemBoard, systemMemory, multiBitECC)
	b.u32(extendedKB)
	b.u16(noError, 1)
	b.u64(total)
	b.end(typeMemoryArray, handleArray)

	mb := total >> 20
	b.u16(handleArray, noError, noWidth, noWidth)
	if mb < extendedMB {
		b.u16(uint16(mb))
	} else {
		b.u16(extendedMB)
	}
	b.u8(dimm, 0)
	b.str("DIMM 0")
	b.str("") // bank
	b.u8(ram)
	b.u16(otherDetail)
	b.u16(0) // speed
	b.str(c.Manufacturer)
	b.str("") // serial
	b.str("") // asset tag
	b.str("") // part
	b.u8(0)   // rank
	if mb < extendedMB {
		b.u32(0)
	} else {
		b.u32(uint32(mb))
	}
	b.u16(0, 0, 0, 0) // configured speed, voltages
	b.end(typeMemory, handleMemory)

	for i, r := range []struct{ base, size uint64 }{{0, c.LowRAM}, {1 << 32, c.HighRAM}} {
		if r.size == 0 {
			continue
		}
		b.u32(uint32(r.base>>10), uint32((r.base+r.size)>>10-1))
		b.u16(handleArray)
		b.u8(1)     // devices
		b.u64(0, 0) // addresses that do not fit above: none
		b.end(typeMemoryMap, handleMap+uint16(i))
	}
}

// Install places the tables at base, for a guest that boots without firmware. For the
// guest to find them, base lies between 0xf0000 and 0xfffff; it is a multiple of 16.
func (t Tables) Install(mem *memory.Memory, base uint64) error {
	if base%anchorAlign != 0 || base > 1<<32-structuresOffset-uint64(len(t.Structures)) {
		return fmt.Errorf("smbios: tables cannot be placed at %#x", base)
	}
	a := append([]byte(nil), t.Anchor...)
	binary.LittleEndian.PutUint32(a[anchorAddress:], uint32(base+structuresOffset))
	sumAnchor(a)
	if err := mem.Write(base, a); err != nil {
		return fmt.Errorf("smbios: place the entry point: %w", err)
	}
	if err := mem.Write(base+structuresOffset, t.Structures); err != nil {
		return fmt.Errorf("smbios: place the structures: %w", err)
	}
	return nil
}
