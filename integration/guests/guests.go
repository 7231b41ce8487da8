// Package guests holds the test guests: small kernels, each of which makes claims about
// the machine that it runs on and ends with an exit status.
//
// They boot by PVH, so the same image runs under ftvmm and under QEMU, which is the
// oracle: what QEMU answers otherwise than ftvmm needs a datasheet on ftvmm's side. Each
// prints lines "ok NAME detail" and "FAIL NAME detail" on COM1, and writes 0 to port
// 0xf4 at the end if every claim held ([ExitStatus] for QEMU, 32 and up for ftvmm).
// Lines that begin with "# " may differ from run to run; all others are the
// same each time.
//
// The images are committed, because they have to be equal on both hosts of a pair;
// the script build makes them again, byte for byte, from the C and assembly sources
// beside this file. rt is the runtime, whose header rt/rt.h documents it; what
// each guest does and takes on its command line stands at the top of its main.c:
//
//	first        the exit status at once: start-up time
//	hello        what the loader told; also for multiboot (hello-mb.elf) and flat
//	storm        exits, as many as asked for: port I/O, device memory, MSR, HLT
//	spin         interrupts into a loop without exits
//	compute      a long run that writes memory, nearly without exits
//	timers       PIT, RTC, PM timer and APIC timer against each other
//	irq          the interrupt controllers as ordered traces
//	pci          configuration space
//	acpi         tables, ACPI mode, power button, power-off, resets
//	ports        every port and odd memory accesses, from a hostile guest
//	irq32        interrupts in 32-bit protected mode; flat (irq32.bin)
//	bootsector   BIOS boot and disk reads ([BootSector])
//
// and those that drive virtio devices, which say so in their own main.c.
package guests

import (
	"embed"
	"encoding/binary"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

//go:embed bin
var bin embed.FS

// compilerFile says in bin which compiler and linker made the images.
const compilerFile = "compiler"

// Image returns a guest's image: by its file name, or without an extension that of
// NAME.elf. The caller owns the bytes.
func Image(name string) ([]byte, error) {
	if path.Ext(name) == "" {
		name += ".elf"
	}
	b, err := fs.ReadFile(bin, path.Join("bin", name))
	if err != nil || name == compilerFile {
		return nil, fmt.Errorf("guests: no image %q; there are %s", name, strings.Join(Names(), ", "))
	}
	return b, nil
}

// Names returns the file names of all images, sorted.
func Names() []string {
	entries, err := fs.ReadDir(bin, "bin")
	if err != nil {
		panic(err) // the folder is part of the binary
	}
	var names []string
	for _, e := range entries {
		if e.Name() != compilerFile {
			names = append(names, e.Name())
		}
	}
	return names
}

// ExitStatus translates the exit code of QEMU with "-device isa-debug-exit" to the
// status that a guest wrote to port 0xf4; false if it ended in another way.
func ExitStatus(qemu int) (status int, ok bool) { return qemu >> 1, qemu&1 == 1 }

// SectorSize is what INT 13h counts disks in, in bytes.
const SectorSize = 512

// BootRead says what the boot sector reads before it ends.
type BootRead struct {
	First   uint64 // sector
	Stride  uint32 // sectors from the start of one block to that of the next
	Blocks  uint16 // blocks to read, one INT 13h call each
	Sectors uint8  // sectors a block, 1 to 64
	Sum     bool   // add up what was read; slow on a host that emulates real mode
}

// bootParams is where flat/bootsector.S has its parameters.
const bootParams = 0x1e0

// BootSector returns the first sector of a disk from which a BIOS can boot: it says
// "bootsector", does the reads and prints "ok read BLOCKS sum SUM", both in hexadecimal, on
// COM1. SUM is that of the little-endian 32-bit words.
func BootSector(r BootRead) ([]byte, error) {
	if r.Sectors < 1 || r.Sectors > 64 {
		return nil, fmt.Errorf("guests: blocks of %d sectors, want 1 to 64", r.Sectors)
	}
	b, err := Image("bootsector.bin")
	if err != nil {
		return nil, err
	}
	p := b[bootParams:]
	binary.LittleEndian.PutUint64(p, r.First)
	binary.LittleEndian.PutUint32(p[8:], r.Stride)
	binary.LittleEndian.PutUint16(p[12:], r.Blocks)
	p[14] = r.Sectors
	p[15] = 0
	if r.Sum {
		p[15] = 1
	}
	return b, nil
}
