package boot

import (
	"encoding/binary"

	"github.com/ftvmm/ftvmm/firmware"
)

// Multiboot 0.6.96, sections 3.1 to 3.3.
const (
	mbMagic      = 0x1bad_b002 // in the header
	mbEntryMagic = 0x2bad_b002 // in EAX
	mbSearch     = 8192        // bytes in which the header lies, aligned to 4
	mbHeader     = 12
	mbAddresses  = 32 // header with the address fields

	mbFlagAlign     = 1 << 0  // modules on page boundaries: ours always are
	mbFlagMemory    = 1 << 1  // memory information: always there
	mbFlagVideo     = 1 << 2  // a video mode: not to be had
	mbFlagAddresses = 1 << 16 // the header says what to load
	mbFlagRequired  = 0xffff  // the flags that a loader must understand

	mbInfoMemory  = 1 << 0
	mbInfoCmdline = 1 << 2
	mbInfoModules = 1 << 3
	mbInfoMap     = 1 << 6
	mbInfoName    = 1 << 9

	mbInfoSize   = 88 // through the APM table's address; we end before VBE
	mbModuleSize = 16
	mbMapEntry   = 20 // without its own size field

	loaderName = "ftvmm"
)

// findMultiboot returns the offset and the flags of a Multiboot header.
func findMultiboot(file []byte) (off int, flags uint32, ok bool) {
	le := binary.LittleEndian
	for off := 0; off+mbHeader <= min(len(file), mbSearch); off += 4 {
		if le.Uint32(file[off:]) == mbMagic {
			flags := le.Uint32(file[off+4:])
			if mbMagic+flags+le.Uint32(file[off+8:]) == 0 {
				return off, flags, true
			}
		}
	}
	return 0, 0, false
}

// multiboot loads a file with a Multiboot header: by the addresses in the header, or
// as ELF.
func (l *loader) multiboot() (Entry, error) {
	off, flags, ok := findMultiboot(l.Kernel)
	if !ok {
		return Entry{}, bad("it has no Multiboot header in its first %d bytes", mbSearch)
	}
	if flags&mbFlagVideo != 0 {
		return Entry{}, &firmware.Error{Code: codeBad, Problem: "the kernel's Multiboot header demands a video mode, and a direct boot sets none",
			Remedy: "clear bit 2 of the header's flags, or boot it by a boot loader on a disk"}
	}
	if unknown := flags & mbFlagRequired &^ (mbFlagAlign | mbFlagMemory); unknown != 0 {
		return Entry{}, bad("its Multiboot header has the unknown required flags %#x", unknown)
	}
	var entry uint64
	var err error
	if flags&mbFlagAddresses != 0 {
		entry, err = l.placeAddresses(off)
	} else {
		entry, err = l.placeMultibootELF()
	}
	if err != nil {
		return Entry{}, err
	}
	if err := l.multibootInfo(); err != nil {
		return Entry{}, err
	}
	e, err := protected(l.mem, entry)
	e.RAX, e.RBX = mbEntryMagic, infoAddr
	return e, err
}

// placeAddresses loads what the header's address fields name (section 3.1.3).
func (l *loader) placeAddresses(off int) (uint64, error) {
	h, ok := slice(l.Kernel, uint64(off), mbAddresses)
	if !ok {
		return 0, bad("it ends within its Multiboot header")
	}
	field := func(i int) uint64 { return uint64(binary.LittleEndian.Uint32(h[i:])) }
	header, load, loadEnd, bssEnd, entry := field(12), field(16), field(20), field(24), field(28)
	if load > header || header-load > uint64(off) {
		return 0, bad("its Multiboot header at %#x cannot be loaded at %#x when the text is at %#x", off, header, load)
	}
	start := uint64(off) - (header - load)
	size := uint64(len(l.Kernel)) - start
	if loadEnd != 0 {
		if loadEnd < load || loadEnd-load > size {
			return 0, bad("its Multiboot header asks for bytes up to %#x, past its end", loadEnd)
		}
		size = loadEnd - load
	}
	total := size
	if bssEnd != 0 {
		if bssEnd < load+size {
			return 0, bad("its Multiboot header ends the bss at %#x, before the data", bssEnd)
		}
		total = bssEnd - load
	}
	if entry < load || entry-load >= total {
		return 0, bad("its Multiboot entry point %#x is not loaded", entry)
	}
	return entry, l.place("the kernel", load, total, l.Kernel[start:start+size])
}

func (l *loader) placeMultibootELF() (uint64, error) {
	f, err := parseELF(l.Kernel)
	if err != nil {
		return 0, err
	}
	entry, ok := f.physical(f.entry)
	if !ok || entry >= firmware.HighRAMBase {
		return 0, bad("its entry point %#x lies in no segment that is loaded below 4 GiB", f.entry)
	}
	return entry, l.placeELF(f)
}

// multibootInfo writes the information structure with its lists, the module and the
// command line (section 3.3).
func (l *loader) multibootInfo() error {
	module, err := l.placeInitrd(firmware.HighRAMBase)
	if err != nil {
		return err
	}
	if err := l.placeCmdline(); err != nil {
		return err
	}
	const (
		name    = infoAddr + mbInfoSize
		modules = name + 8
		memmap  = modules + mbModuleSize
	)
	flags := uint32(mbInfoMemory | mbInfoCmdline | mbInfoMap | mbInfoName)
	count := uint32(0)
	if len(l.Initrd) > 0 {
		flags |= mbInfoModules
		count = 1
	}
	// mem_upper ends at the first hole above 1 MiB (section 3.3).
	var lower, upper uint64
	for _, e := range l.E820 {
		switch {
		case e.Type != firmware.E820RAM:
		case e.Base == 0:
			lower = min(e.Size, firmware.VGABase) >> 10
		case e.Base == firmware.BIOSEnd:
			upper = min(e.Size, firmware.HighRAMBase-firmware.BIOSEnd) >> 10
		}
	}
	var b records
	b.u32(flags, uint32(lower), uint32(upper), 0, cmdlineAddr, count, modules)
	b.u32(0, 0, 0, 0) // no symbols
	b.u32(uint32(len(l.E820))*(4+mbMapEntry), memmap)
	b.u32(0, 0, 0, name) // no drives, no configuration table
	b = append(b, make([]byte, mbInfoSize-len(b))...)
	b = append(b, loaderName...)
	b = append(b, make([]byte, modules-infoAddr-len(b))...)
	b.u32(uint32(module), uint32(module)+uint32(len(l.Initrd)), 0, 0)
	for _, e := range l.E820 {
		b.u32(mbMapEntry)
		b.u64(e.Base, e.Size)
		b.u32(uint32(e.Type))
	}
	return l.mem.Write(infoAddr, b)
}
