package acpi

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Names of the fw_cfg files that firmware expects.
const (
	FileRSDP   = "etc/acpi/rsdp"
	FileTables = "etc/acpi/tables"
	FileLoader = "etc/table-loader"
)

// Tables are the machine's tables before they have addresses: three fw_cfg files.
type Tables struct {
	RSDP   []byte // the root pointer
	Tables []byte // everything else
	Loader []byte // the script that places and patches the other two
}

// Commands of the script (QEMU's hw/acpi/bios-linker-loader; SeaBIOS's and OVMF's
// readers). Each is 128 bytes, little-endian.
const (
	commandSize = 128
	fileSize    = 56

	cmdAllocate = 1
	cmdPointer  = 2
	cmdChecksum = 3

	zoneHigh = 1 // anywhere below 4 GiB
	zoneFSeg = 2 // in the BIOS area, where a root pointer is searched

	tablesAlign = 64 // for the FACS
	rsdpAlign   = 16
)

// RSDP of revision 2 (section 5.2.5.3).
const (
	rsdpSize        = 36
	rsdpSizeV1      = 20
	rsdpChecksum    = 8
	rsdpRevision    = 15
	rsdpRSDT        = 16
	rsdpLength      = 20
	rsdpXSDT        = 24
	rsdpExtChecksum = 32
)

// script collects commands.
type script []byte

func (s *script) command(typ uint32, body []byte) {
	b := binary.LittleEndian.AppendUint32(nil, typ)
	b = append(b, body...)
	*s = append(*s, append(b, make([]byte, commandSize-len(b))...)...)
}

func fileName(name string) []byte { return append([]byte(name), make([]byte, fileSize-len(name))...) }

func (s *script) allocate(file string, align uint32, zone byte) {
	s.command(cmdAllocate, append(binary.LittleEndian.AppendUint32(fileName(file), align), zone))
}

// pointer adds the address of FileTables to the size bytes at off of file.
func (s *script) pointer(file string, off int, size byte) {
	b := append(fileName(file), fileName(FileTables)...)
	s.command(cmdPointer, append(binary.LittleEndian.AppendUint32(b, uint32(off)), size))
}

// checksum makes length bytes from start on sum to zero by the byte at off.
func (s *script) checksum(file string, off, start, length int) {
	b := fileName(file)
	for _, v := range []int{off, start, length} {
		b = binary.LittleEndian.AppendUint32(b, uint32(v))
	}
	s.command(cmdChecksum, b)
}

// Build makes the tables.
func Build(c Config) (Tables, error) {
	if err := c.check(); err != nil {
		return Tables{}, err
	}
	var (
		blob []byte
		s    script
	)
	s.allocate(FileRSDP, rsdpAlign, zoneFSeg)
	s.allocate(FileTables, tablesAlign, zoneHigh)
	// add appends a table and returns its offset.
	add := func(t []byte) int {
		const align = 8
		for len(blob)%align != 0 {
			blob = append(blob, 0)
		}
		off := len(blob)
		blob = append(blob, t...)
		return off
	}
	// point makes the size bytes at off of the blob point at the table at target.
	point := func(off, target int, size byte) {
		copy(blob[off:off+int(size)], binary.LittleEndian.AppendUint64(nil, uint64(target)))
		s.pointer(FileTables, off, size)
	}
	sum := func(off int) {
		s.checksum(FileTables, off+checksumOffset, off, int(binary.LittleEndian.Uint32(blob[off+lengthOffset:])))
	}

	facsOff := add(facs())
	dsdtOff := add(table("DSDT", 1, c.dsdt()))
	sum(dsdtOff)
	fadtOff := add(c.fadt())
	point(fadtOff+fadtFACS, facsOff, 4)
	point(fadtOff+fadtDSDT, dsdtOff, 4)
	point(fadtOff+fadtXDSDT, dsdtOff, 8)
	sum(fadtOff)
	roots := []int{fadtOff, add(c.madt()), add(waet())}
	for _, off := range roots[1:] {
		sum(off)
	}
	rsdtOff := add(table("RSDT", 1, make([]byte, 4*len(roots))))
	xsdtOff := add(table("XSDT", 1, make([]byte, 8*len(roots))))
	for i, off := range roots {
		point(rsdtOff+headerSize+4*i, off, 4)
	}
	for i, off := range roots {
		point(xsdtOff+headerSize+8*i, off, 8)
	}
	sum(rsdtOff)
	sum(xsdtOff)

	rsdp := make([]byte, rsdpSize)
	copy(rsdp, "RSD PTR ")
	copy(rsdp[rsdpChecksum+1:], oemID)
	rsdp[rsdpRevision] = 2
	rsdp[rsdpLength] = rsdpSize
	binary.LittleEndian.PutUint32(rsdp[rsdpRSDT:], uint32(rsdtOff))
	binary.LittleEndian.PutUint64(rsdp[rsdpXSDT:], uint64(xsdtOff))
	s.pointer(FileRSDP, rsdpRSDT, 4)
	s.pointer(FileRSDP, rsdpXSDT, 8)
	s.checksum(FileRSDP, rsdpChecksum, 0, rsdpSizeV1)
	s.checksum(FileRSDP, rsdpExtChecksum, 0, rsdpSize)
	return Tables{RSDP: rsdp, Tables: blob, Loader: s}, nil
}

// Size returns how many bytes of memory [Tables.Install] fills.
func (t Tables) Size() uint64 { return tablesAlign + uint64(len(t.Tables)) }

// Install places the tables at base, for a guest that boots without firmware, and
// returns the address of the root pointer, which is base. For the guest to find it, base
// lies between 0xe0000 and 0xfffff; it is a multiple of 64.
func (t Tables) Install(mem *memory.Memory, base uint64) (rsdp uint64, err error) {
	if base%tablesAlign != 0 || base+t.Size() > 1<<32 {
		return 0, fmt.Errorf("acpi: tables cannot be placed at %#x", base)
	}
	root, blob, err := t.link(base, base+tablesAlign)
	if err != nil {
		return 0, err
	}
	for _, w := range []struct {
		at   uint64
		data []byte
	}{{base, root}, {base + tablesAlign, blob}} {
		if err := mem.Write(w.at, w.data); err != nil {
			return 0, fmt.Errorf("acpi: place the tables: %w", err)
		}
	}
	return base, nil
}

// link runs the script on copies of the blobs for the given addresses.
func (t Tables) link(rsdpAt, tablesAt uint64) (rsdp, tables []byte, err error) {
	rsdp, tables = bytes.Clone(t.RSDP), bytes.Clone(t.Tables)
	file := func(name []byte) ([]byte, uint64, error) {
		switch string(bytes.TrimRight(name, "\x00")) {
		case FileRSDP:
			return rsdp, rsdpAt, nil
		case FileTables:
			return tables, tablesAt, nil
		}
		return nil, 0, fmt.Errorf("acpi: the script names file %q", name)
	}
	le := binary.LittleEndian
	for i := 0; i+commandSize <= len(t.Loader); i += commandSize {
		cmd := t.Loader[i : i+commandSize]
		typ, body := le.Uint32(cmd), cmd[4:]
		dst, _, err := file(body[:fileSize])
		if err != nil {
			return nil, nil, err
		}
		body = body[fileSize:]
		switch typ {
		case cmdAllocate:
		case cmdPointer:
			_, addr, err := file(body[:fileSize])
			if err != nil {
				return nil, nil, err
			}
			off, size := uint64(le.Uint32(body[fileSize:])), uint64(body[fileSize+4])
			if size > 8 || off+size > uint64(len(dst)) {
				return nil, nil, fmt.Errorf("acpi: the script patches %d bytes at %#x, past the end", size, off)
			}
			var word [8]byte
			copy(word[:], dst[off:off+size])
			le.PutUint64(word[:], le.Uint64(word[:])+addr)
			copy(dst[off:off+size], word[:])
		case cmdChecksum:
			off, start, length := uint64(le.Uint32(body)), uint64(le.Uint32(body[4:])), uint64(le.Uint32(body[8:]))
			if off >= uint64(len(dst)) || start+length > uint64(len(dst)) {
				return nil, nil, fmt.Errorf("acpi: the script sums %d bytes at %#x, past the end", length, start)
			}
			var sum byte
			for _, b := range dst[start : start+length] {
				sum += b
			}
			dst[off] -= sum
		default:
			return nil, nil, fmt.Errorf("acpi: the script has the unknown command %d", typ)
		}
	}
	return rsdp, tables, nil
}
