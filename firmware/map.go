package firmware

import (
	"encoding/binary"
	"fmt"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// The map of guest-physical addresses, in bytes.
//
//	         0 … 0x9ffff      RAM; direct boots keep their tables here (package boot)
//	   0xa0000 … 0xbffff      no RAM: the window of a VGA adapter
//	   0xc0000 … 0xfffff      RAM that holds option ROMs, tables and the BIOS
//	  0x100000 … low RAM end  RAM, up to 3 GiB
//	low RAM end … 0xfebfffff  PCI memory
//	0xfec00000                I/O APIC; 0xfee00000: local APICs
//	4 GiB - image … 4 GiB     RAM that holds the firmware image, where there is one
//	     4 GiB …              the rest of the RAM
//
// The ROM areas are RAM that nothing write-protects: the i440FX's PAM registers
// would have to change KVM's memory slots while the guest runs, which a lockstep
// pair must not do. A guest that scribbles there harms only itself, and a reset loads
// the image anew.
const (
	VGABase     = 0xa_0000
	VGAEnd      = 0xc_0000
	BIOSBase    = 0xe_0000 // the copy of the last 128 KiB of the firmware image
	BIOSEnd     = 0x10_0000
	EBDABase    = 0x9_fc00    // the extended BIOS data area of a direct boot: reserved, 1 KiB
	LowRAMMax   = 0xc000_0000 // RAM above continues at HighRAMBase
	IOAPICBase  = 0xfec0_0000 // end of the PCI memory window
	HighRAMBase = 1 << 32
)

// Limits of the map.
const (
	// MinRAM is the least RAM of a guest, in bytes.
	MinRAM = 2 << 20
	// MaxRAM is the most RAM of a guest, in bytes. A host's CPU may reach less.
	MaxRAM = 1 << 40
	// MaxImage is the size of the largest firmware image, in bytes.
	MaxImage = 8 << 20
)

// LowRAM returns how many of a guest's bytes of RAM lie below 4 GiB.
func LowRAM(ram uint64) uint64 { return min(ram, LowRAMMax) }

// HighRAM returns how many of a guest's bytes of RAM lie from 4 GiB on.
func HighRAM(ram uint64) uint64 { return ram - LowRAM(ram) }

// Layout returns the pieces of memory of a guest with ram bytes of RAM and a firmware
// image of image bytes, 0 for none. The RAM hidden by the window of a VGA adapter
// counts as present.
func Layout(ram, image uint64) ([]memory.Extent, error) {
	if ram < MinRAM || ram > MaxRAM || ram%memory.PageSize != 0 {
		return nil, &Error{Code: "memory-size", Problem: fmt.Sprintf("a guest cannot have %d bytes of memory", ram),
			Remedy: fmt.Sprintf("choose %d MiB to %d GiB, in whole pages of 4 KiB", MinRAM>>20, uint64(MaxRAM)>>30)}
	}
	if err := checkImageSize(image); image != 0 && err != nil {
		return nil, err
	}
	e := []memory.Extent{{Base: 0, Size: VGABase}, {Base: VGAEnd, Size: LowRAM(ram) - VGAEnd}}
	if image > 0 {
		e = append(e, memory.Extent{Base: HighRAMBase - image, Size: image})
	}
	if high := HighRAM(ram); high > 0 {
		e = append(e, memory.Extent{Base: HighRAMBase, Size: high})
	}
	return e, nil
}

// E820Type is the kind of a range of addresses in the map that a BIOS gives to an
// operating system (ACPI 6.4, table 15.4).
type E820Type uint32

// The kinds of ranges.
const (
	E820RAM      E820Type = 1
	E820Reserved E820Type = 2
	E820ACPI     E820Type = 3 // ACPI tables, to be reclaimed
)

// E820Entry is one range of addresses: Base and Size in bytes.
type E820Entry struct {
	Base, Size uint64
	Type       E820Type
}

// E820 returns the map for a guest that boots without firmware: its RAM less the EBDA
// and the area of ROMs and tables below 1 MiB. Entries ascend and do not overlap.
func E820(ram uint64) []E820Entry {
	m := []E820Entry{
		{0, EBDABase, E820RAM},
		{EBDABase, VGABase - EBDABase, E820Reserved},
		{BIOSBase, BIOSEnd - BIOSBase, E820Reserved},
		{BIOSEnd, LowRAM(ram) - BIOSEnd, E820RAM},
	}
	if high := HighRAM(ram); high > 0 {
		m = append(m, E820Entry{HighRAMBase, high, E820RAM})
	}
	return m
}

// e820File returns the content of the fw_cfg file etc/e820: all RAM, from which the
// firmware takes what it needs for itself. Each entry is base and size of 8 bytes and
// a type of 4, little-endian.
func e820File(ram uint64) []byte {
	m := []E820Entry{{0, LowRAM(ram), E820RAM}}
	if high := HighRAM(ram); high > 0 {
		m = append(m, E820Entry{HighRAMBase, high, E820RAM})
	}
	var b []byte
	for _, e := range m {
		b = binary.LittleEndian.AppendUint64(b, e.Base)
		b = binary.LittleEndian.AppendUint64(b, e.Size)
		b = binary.LittleEndian.AppendUint32(b, uint32(e.Type))
	}
	return b
}
