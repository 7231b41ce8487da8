package boot

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Kind is the kind of a kernel file.
type Kind uint8

// The kinds. Auto asks [Load] to detect it.
const (
	Auto Kind = iota
	Linux
	PVH
	Multiboot
	ELF64
	Flat
)

var kindNames = [...]string{"auto", "linux", "pvh", "multiboot", "elf64", "flat"}

// String returns the name that [ParseKind] takes.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return "unknown"
}

// ParseKind returns the kind of that name.
func ParseKind(name string) (Kind, error) {
	for k, n := range kindNames {
		if n == name {
			return Kind(k), nil
		}
	}
	return Auto, &firmware.Error{Code: "kernel-kind", Problem: fmt.Sprintf("no kind of kernel is called %q", name),
		Remedy: fmt.Sprintf("choose one of %q", kindNames)}
}

// Codes of the errors of this package, all of type [firmware.Error].
const (
	codeUnknown = "kernel-unknown"
	codeBad     = "kernel-bad"
	codeRoom    = "kernel-memory"
	codeCmdline = "kernel-cmdline"
)

func bad(format string, args ...any) error {
	return &firmware.Error{Code: codeBad, Problem: "the kernel file is damaged or of another kind: " + fmt.Sprintf(format, args...),
		Remedy: "compare it with its origin, or name its kind"}
}

func noRoom(what string, base, size uint64) error {
	return &firmware.Error{Code: codeRoom, Problem: fmt.Sprintf("%s needs %#x bytes at %#x, where this guest has no free memory", what, size, base),
		Remedy: fmt.Sprintf("give the guest more memory, and link kernels at %#x or above", firmware.BIOSEnd)}
}

func noRoomForInitrd(size, kernelEnd, limit uint64) error {
	return &firmware.Error{Code: codeRoom, Problem: fmt.Sprintf("no room for an initial RAM disk of %d bytes between the kernel's end at %#x and %#x", size, kernelEnd, limit),
		Remedy: "give the guest more memory"}
}

// Detect returns the kind of a kernel file. It never returns [Flat].
func Detect(file []byte) (Kind, error) {
	switch {
	case isLinux(file):
		return Linux, nil
	case isELF(file):
		f, err := parseELF(file)
		if err != nil {
			return Auto, err
		}
		if _, ok, err := f.pvhEntry(); err != nil {
			return Auto, err
		} else if ok {
			return PVH, nil
		}
		if _, _, ok := findMultiboot(file); ok {
			return Multiboot, nil
		}
		if f.class == elfClass64 {
			return ELF64, nil
		}
		return Auto, &firmware.Error{Code: codeUnknown, Problem: "a 32-bit ELF file without a PVH note or a Multiboot header says not how to enter it",
			Remedy: "add a Multiboot header, or link it for x86-64"}
	}
	if _, _, ok := findMultiboot(file); ok {
		return Multiboot, nil
	}
	return Auto, &firmware.Error{Code: codeUnknown, Problem: "the kernel is no bzImage, no ELF file, and has no Multiboot header",
		Remedy: "choose another file, or ask for kind flat if it is code to be loaded at 1 MiB"}
}

// Params says what to load.
type Params struct {
	Kind    Kind   // of Kernel; Auto detects it
	Kernel  []byte // the file
	Initrd  []byte // initial RAM disk or first module; nil or empty for none
	Cmdline string // without a terminating zero
	// E820 is the map that the kernel is given and that room is found in, ascending;
	// see [firmware.E820].
	E820 []firmware.E820Entry
	RSDP uint64 // address of the ACPI root pointer; 0 for none
}

// MaxE820 bounds the entries of Params.E820: Linux's boot_params hold that many.
const MaxE820 = 128

// Load places a kernel and all that it needs in guest memory and returns the state of
// the first CPU. Errors that a user can do something about are of type [firmware.Error].
// After an error the memory's content is undefined.
func Load(mem *memory.Memory, p Params) (Entry, error) {
	if len(p.E820) == 0 || len(p.E820) > MaxE820 {
		return Entry{}, fmt.Errorf("boot: %d entries in the memory map, want 1 to %d", len(p.E820), MaxE820)
	}
	if len(p.Cmdline) >= cmdlineMax || bytes.IndexByte([]byte(p.Cmdline), 0) >= 0 {
		return Entry{}, &firmware.Error{Code: codeCmdline, Problem: "the kernel's command line is too long or has a zero byte",
			Remedy: fmt.Sprintf("use at most %d bytes", cmdlineMax-1)}
	}
	kind := p.Kind
	if kind == Auto {
		var err error
		if kind, err = Detect(p.Kernel); err != nil {
			return Entry{}, err
		}
	}
	l := loader{mem: mem, Params: p}
	switch kind {
	case Linux:
		return l.linux()
	case PVH:
		return l.pvh()
	case Multiboot:
		return l.multiboot()
	case ELF64:
		return l.elf64()
	case Flat:
		return l.flat()
	}
	return Entry{}, fmt.Errorf("boot: kind %d of kernel does not exist", kind)
}

// loader is one call of Load.
type loader struct {
	mem *memory.Memory
	Params
	end uint64 // end of what has been loaded so far of the kernel
}

// place copies a piece of a kernel to RAM at base, zeroes what follows up to size
// bytes, and keeps the scratch area and what lies outside the memory map free of it.
func (l *loader) place(what string, base, size uint64, data []byte) error {
	if uint64(len(data)) > size || base+size < base || !l.isRAM(base, size) || base < ScratchEnd && base+size > ScratchBase {
		return noRoom(what, base, size)
	}
	b, err := l.mem.Mutable(base, size)
	if err != nil {
		return noRoom(what, base, size)
	}
	clear(b[copy(b, data):])
	l.end = max(l.end, base+size)
	return nil
}

// isRAM says whether one entry of the memory map offers all of [base, base+size).
func (l *loader) isRAM(base, size uint64) bool {
	for _, e := range l.E820 {
		if e.Type == firmware.E820RAM && base >= e.Base && base-e.Base < e.Size {
			return size <= e.Size-(base-e.Base)
		}
	}
	return false
}

// placeInitrd copies the initial RAM disk as high as possible in RAM above the kernel, so
// that it ends at limit or below, and returns its address, 0 where there is none.
func (l *loader) placeInitrd(limit uint64) (uint64, error) {
	size := uint64(len(l.Initrd))
	if size == 0 {
		return 0, nil
	}
	for i := len(l.E820) - 1; i >= 0; i-- {
		e := l.E820[i]
		end := min(e.Base+e.Size, limit)
		if e.Type != firmware.E820RAM || end < e.Base || end-e.Base < size {
			continue
		}
		base := (end - size) &^ (memory.PageSize - 1)
		if base < max(e.Base, l.end, firmware.BIOSEnd) {
			continue
		}
		if err := l.mem.Write(base, l.Initrd); err == nil {
			return base, nil
		}
	}
	return 0, noRoomForInitrd(size, l.end, limit)
}

// placeCmdline copies the command line with its terminating zero.
func (l *loader) placeCmdline() error {
	return l.mem.Write(cmdlineAddr, append([]byte(l.Cmdline), 0))
}

// flat loads bytes without a header at 1 MiB.
func (l *loader) flat() (Entry, error) {
	if len(l.Kernel) == 0 {
		return Entry{}, bad("it is empty")
	}
	if err := l.place("the kernel", firmware.BIOSEnd, uint64(len(l.Kernel)), l.Kernel); err != nil {
		return Entry{}, err
	}
	return l.enterPVH(firmware.BIOSEnd)
}

// records appends little-endian numbers of 4 and 8 bytes to a structure.
type records []byte

func (r *records) u32(v ...uint32) {
	for _, v := range v {
		*r = binary.LittleEndian.AppendUint32(*r, v)
	}
}

func (r *records) u64(v ...uint64) {
	for _, v := range v {
		*r = binary.LittleEndian.AppendUint64(*r, v)
	}
}
