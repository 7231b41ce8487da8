package boot

import (
	"encoding/binary"
	"strings"

	"github.com/ftvmm/ftvmm/firmware"
)

// ELF constants (System V ABI, chapters 4 and 5; the AMD64 supplement).
const (
	elfMagic    = "\x7fELF"
	elfClass32  = 1
	elfClass64  = 2
	elfLittle   = 1
	elfExec     = 2
	elfShared   = 3
	elf386      = 3
	elfAMD64    = 62
	elfLoad     = 1
	elfNote     = 4
	elf32Header = 52
	elf64Header = 64
	elf32Phdr   = 32
	elf64Phdr   = 56
)

// Limits of what we read of an ELF file.
const (
	maxSegments = 64
	maxNotes    = 256
)

// The note that holds a PVH entry point (Xen public/elfnote.h).
const (
	pvhNoteName = "Xen"
	pvhNoteType = 18 // XEN_ELFNOTE_PHYS32_ENTRY
)

// segment is one program header.
type segment struct {
	typ                        uint32
	offset                     uint64
	vaddr, paddr, filesz, size uint64
}

// elfFile is what we need of an ELF file for x86.
type elfFile struct {
	file     []byte
	class    byte
	typ      uint16
	entry    uint64
	segments []segment
}

func isELF(file []byte) bool { return strings.HasPrefix(string(file[:min(len(file), 4)]), elfMagic) }

// parseELF reads the headers. The file ranges of the segments are checked, their
// addresses are not.
func parseELF(file []byte) (*elfFile, error) {
	if !isELF(file) {
		return nil, bad("it is no ELF file")
	}
	if len(file) < elf32Header {
		return nil, bad("it ends within the ELF header")
	}
	f := &elfFile{file: file, class: file[4]}
	le := binary.LittleEndian
	machine := le.Uint16(file[18:])
	f.typ = le.Uint16(file[16:])
	switch {
	case file[5] != elfLittle:
		return nil, bad("it is a big-endian ELF file")
	case f.class != elfClass32 && f.class != elfClass64:
		return nil, bad("its ELF class is %d", f.class)
	case machine != elf386 && machine != elfAMD64:
		return nil, bad("it is for ELF machine %d, not for x86", machine)
	case f.class == elfClass64 && machine != elfAMD64:
		return nil, bad("it is a 64-bit ELF file for a 32-bit CPU")
	case f.typ != elfExec && f.typ != elfShared:
		return nil, bad("it is no ELF executable, its type is %d", f.typ)
	}
	var phoff uint64
	var phentsize, phnum int
	want := elf32Phdr
	if f.class == elfClass64 {
		if len(file) < elf64Header {
			return nil, bad("it ends within the ELF header")
		}
		want = elf64Phdr
		f.entry, phoff = le.Uint64(file[24:]), le.Uint64(file[32:])
		phentsize, phnum = int(le.Uint16(file[54:])), int(le.Uint16(file[56:]))
	} else {
		f.entry, phoff = uint64(le.Uint32(file[24:])), uint64(le.Uint32(file[28:]))
		phentsize, phnum = int(le.Uint16(file[42:])), int(le.Uint16(file[44:]))
	}
	if phnum == 0 || phnum > maxSegments || phentsize != want {
		return nil, bad("it has %d program headers of %d bytes, want 1 to %d of %d", phnum, phentsize, maxSegments, want)
	}
	headers, ok := slice(file, phoff, uint64(phnum*phentsize))
	if !ok {
		return nil, bad("its program headers at %#x lie past its end", phoff)
	}
	for i := range phnum {
		h := headers[i*phentsize:]
		s := segment{typ: le.Uint32(h)}
		if f.class == elfClass64 {
			s.offset, s.vaddr, s.paddr = le.Uint64(h[8:]), le.Uint64(h[16:]), le.Uint64(h[24:])
			s.filesz, s.size = le.Uint64(h[32:]), le.Uint64(h[40:])
		} else {
			s.offset, s.vaddr, s.paddr = uint64(le.Uint32(h[4:])), uint64(le.Uint32(h[8:])), uint64(le.Uint32(h[12:]))
			s.filesz, s.size = uint64(le.Uint32(h[16:])), uint64(le.Uint32(h[20:]))
		}
		if s.typ != elfLoad && s.typ != elfNote {
			continue
		}
		if _, ok := slice(file, s.offset, s.filesz); !ok {
			return nil, bad("segment %d, %#x bytes at %#x, lies past its end", i, s.filesz, s.offset)
		}
		if s.typ == elfLoad && s.filesz > s.size {
			return nil, bad("segment %d has %#x bytes in the file and %#x in memory", i, s.filesz, s.size)
		}
		f.segments = append(f.segments, s)
	}
	return f, nil
}

// slice returns file[off : off+n] if that lies within the file.
func slice(file []byte, off, n uint64) ([]byte, bool) {
	if off > uint64(len(file)) || n > uint64(len(file))-off {
		return nil, false
	}
	return file[off : off+n], true
}

// pvhEntry returns the entry point that a PVH note names, and whether there is one.
func (f *elfFile) pvhEntry() (uint64, bool, error) {
	le := binary.LittleEndian
	notes := 0
	for _, s := range f.segments {
		if s.typ != elfNote {
			continue
		}
		rest := f.file[s.offset : s.offset+s.filesz]
		for len(rest) >= 12 {
			if notes++; notes > maxNotes {
				return 0, false, bad("it has more than %d notes", maxNotes)
			}
			namesz, descsz, typ := uint64(le.Uint32(rest)), uint64(le.Uint32(rest[4:])), le.Uint32(rest[8:])
			name, ok := slice(rest, 12, namesz)
			descOff := 12 + (namesz+3)&^3
			desc, ok2 := slice(rest, descOff, descsz)
			if !ok || !ok2 {
				return 0, false, bad("a note runs past its segment")
			}
			if typ == pvhNoteType && strings.TrimRight(string(name), "\x00") == pvhNoteName {
				switch len(desc) {
				case 4:
					return uint64(le.Uint32(desc)), true, nil
				case 8:
					return le.Uint64(desc), true, nil
				}
				return 0, false, bad("its PVH entry point has %d bytes", len(desc))
			}
			next := descOff + (descsz+3)&^3
			rest = rest[min(next, uint64(len(rest))):]
		}
	}
	return 0, false, nil
}

// placeELF copies the loadable segments to their physical addresses.
func (l *loader) placeELF(f *elfFile) error {
	loaded := false
	for _, s := range f.segments {
		if s.typ != elfLoad || s.size == 0 {
			continue
		}
		if err := l.place("a segment of the kernel", s.paddr, s.size, f.file[s.offset:s.offset+s.filesz]); err != nil {
			return err
		}
		loaded = true
	}
	if !loaded {
		return bad("it has no segment to load")
	}
	return nil
}

// physical returns the physical address of a virtual one in a loadable segment.
func (f *elfFile) physical(vaddr uint64) (uint64, bool) {
	for _, s := range f.segments {
		if s.typ == elfLoad && vaddr >= s.vaddr && vaddr-s.vaddr < s.size {
			return s.paddr + (vaddr - s.vaddr), true
		}
	}
	return 0, false
}

// holds says whether a physical address lies in a loadable segment.
func (f *elfFile) holds(paddr uint64) bool {
	for _, s := range f.segments {
		if s.typ == elfLoad && paddr >= s.paddr && paddr-s.paddr < s.size {
			return true
		}
	}
	return false
}

// elf64 loads a plain ELF file, to be entered in 64-bit mode.
func (l *loader) elf64() (Entry, error) {
	f, err := parseELF(l.Kernel)
	if err != nil {
		return Entry{}, err
	}
	if f.class != elfClass64 {
		return Entry{}, bad("it is a 32-bit ELF file")
	}
	if f.typ != elfExec {
		return Entry{}, bad("it is position-independent; link it with -static -no-pie")
	}
	entry, ok := f.physical(f.entry)
	if !ok || entry >= identityGiB<<30 {
		return Entry{}, bad("its entry point %#x lies in no segment that is loaded below 4 GiB", f.entry)
	}
	if err := l.placeELF(f); err != nil {
		return Entry{}, err
	}
	if err := l.startInfo(); err != nil {
		return Entry{}, err
	}
	e, err := long(l.mem, entry)
	e.RDI, e.RBX = infoAddr, infoAddr
	return e, err
}

// Xen's start information (public/arch-x86/hvm/start_info.h).
const (
	startMagic      = 0x336e_c578
	startVersion    = 1
	startSize       = 56
	startModuleSize = 32
)

// startInfo writes an hvm_start_info with its lists, the initial RAM disk and the
// command line.
func (l *loader) startInfo() error {
	initrd, err := l.placeInitrd(firmware.HighRAMBase)
	if err != nil {
		return err
	}
	if err := l.placeCmdline(); err != nil {
		return err
	}
	var b records
	modules := uint32(0)
	if len(l.Initrd) > 0 {
		modules = 1
	}
	const list, memmap = infoAddr + startSize, infoAddr + startSize + startModuleSize
	b.u32(startMagic, startVersion, 0, modules)
	b.u64(list, cmdlineAddr, l.RSDP, memmap)
	b.u32(uint32(len(l.E820)), 0)
	b.u64(initrd, uint64(len(l.Initrd)), 0, 0)
	for _, e := range l.E820 {
		b.u64(e.Base, e.Size)
		b.u32(uint32(e.Type), 0)
	}
	return l.mem.Write(infoAddr, b)
}

// pvh loads an ELF file with a PVH note.
func (l *loader) pvh() (Entry, error) {
	f, err := parseELF(l.Kernel)
	if err != nil {
		return Entry{}, err
	}
	entry, ok, err := f.pvhEntry()
	if err != nil {
		return Entry{}, err
	}
	if !ok {
		return Entry{}, bad("it has no PVH note")
	}
	if entry >= firmware.HighRAMBase || !f.holds(entry) {
		return Entry{}, bad("its PVH entry point %#x lies in no segment that is loaded below 4 GiB", entry)
	}
	if err := l.placeELF(f); err != nil {
		return Entry{}, err
	}
	return l.enterPVH(entry)
}

// enterPVH returns the state that PVH prescribes, at entry.
func (l *loader) enterPVH(entry uint64) (Entry, error) {
	if err := l.startInfo(); err != nil {
		return Entry{}, err
	}
	e, err := protected(l.mem, entry)
	e.RBX = infoAddr
	return e, err
}
