package boot

import (
	"encoding/binary"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Mode is the mode that a CPU starts in.
type Mode uint8

// The modes.
const (
	Real      Mode = iota // 16-bit, at the reset vector
	Protected             // 32-bit, without paging
	Long                  // 64-bit
)

// String returns the mode's name.
func (m Mode) String() string {
	switch m {
	case Real:
		return "real mode"
	case Protected:
		return "32-bit protected mode"
	case Long:
		return "64-bit mode"
	}
	return "unknown mode"
}

// Segment is a segment register with its hidden part (Intel SDM vol. 3, 3.4.3).
type Segment struct {
	Selector uint16
	Base     uint64
	Limit    uint32 // in bytes, granularity applied
	Type     uint8  // bits 43..40 of the descriptor
	DPL      uint8
	S        bool // code or data, not a system segment
	Present  bool
	DB       bool // 32-bit
	L        bool // 64-bit code
	G        bool // the limit counts pages
}

// Table is the register of a descriptor table.
type Table struct {
	Base  uint64
	Limit uint16
}

// Entry is the state of the first CPU at its first instruction. Registers that it
// does not name are zero or as after a reset.
type Entry struct {
	Mode Mode

	RIP, RSP, RFLAGS             uint64
	RAX, RBX, RCX, RDX, RSI, RDI uint64

	CS, DS, ES, FS, GS, SS, TR, LDT Segment
	GDT, IDT                        Table
	CR0, CR3, CR4, EFER             uint64
}

// Bits of control registers and flags (Intel SDM vol. 3, 2.5 and 2.2.1).
const (
	cr0PE = 1 << 0
	cr0ET = 1 << 4
	cr0NW = 1 << 29
	cr0CD = 1 << 30
	cr0PG = 1 << 31

	cr4PAE = 1 << 5

	eferLME = 1 << 8
	eferLMA = 1 << 10

	rflagsOne = 1 << 1 // reads as one
)

// Types of segments.
const (
	typeData = 0x3 // read and write, accessed
	typeCode = 0xb // execute and read, accessed
	typeLDT  = 0x2
	typeTSS  = 0xb // busy 32-bit or 64-bit TSS
)

// Selectors: Linux asks for these two (boot.rst, "32-bit boot protocol").
const (
	selCode = 0x10
	selData = 0x18
	selTSS  = 0x20
)

// ResetVector returns the state of a CPU after power-on (Intel SDM vol. 3, table
// 10-1): what a firmware image starts from.
func ResetVector() Entry {
	data := Segment{Limit: 0xffff, Type: typeData, S: true, Present: true}
	code := data
	code.Selector, code.Base, code.Type = 0xf000, 0xffff_0000, typeCode
	return Entry{
		Mode: Real, RIP: 0xfff0, RFLAGS: rflagsOne,
		CS: code, DS: data, ES: data, FS: data, GS: data, SS: data,
		TR:  Segment{Limit: 0xffff, Type: typeTSS, Present: true},
		LDT: Segment{Limit: 0xffff, Type: typeLDT, Present: true},
		GDT: Table{Limit: 0xffff}, IDT: Table{Limit: 0xffff},
		CR0: cr0ET | cr0NW | cr0CD,
	}
}

// Where the loaders keep what a kernel finds at its entry, in guest-physical bytes.
const (
	ScratchBase = 0x1000
	ScratchEnd  = 0x4_0000

	gdtAddr     = 0x1000
	infoAddr    = 0x2000 // hvm_start_info or Multiboot information, with their lists
	infoEnd     = 0x6000
	zeroPage    = 0x6000 // Linux's boot_params, one page
	pageTables  = 0x8000 // one PML4, one PDPT, four page directories
	stackTop    = 0x1_4000
	cmdlineAddr = 0x2_0000
	cmdlineMax  = 0x1_0000 // with the terminating zero
)

// identityGiB is how much of the address space a long mode entry maps, in GiB.
const identityGiB = 4

// flat returns the descriptor of a segment that covers 4 GiB.
func flat(selector uint16, typ uint8) Segment {
	return Segment{Selector: selector, Limit: 0xffff_ffff, Type: typ, S: true, Present: true, DB: true, G: true}
}

// descriptor returns a segment's entry in a descriptor table (Intel SDM vol. 3,
// figure 3-8).
func (s Segment) descriptor() uint64 {
	limit := uint64(s.Limit)
	if s.G {
		limit >>= 12
	}
	bit := func(b bool, n uint) uint64 {
		if b {
			return 1 << n
		}
		return 0
	}
	return limit&0xffff | s.Base&0xff_ffff<<16 | uint64(s.Type&0xf)<<40 | bit(s.S, 44) | uint64(s.DPL&3)<<45 |
		bit(s.Present, 47) | limit>>16&0xf<<48 | bit(s.L, 53) | bit(s.DB, 54) | bit(s.G, 55) | s.Base>>24&0xff<<56
}

// protected returns an entry in 32-bit protected mode at rip, and writes its GDT.
func protected(mem *memory.Memory, rip uint64) (Entry, error) {
	e := Entry{
		Mode: Protected, RIP: rip, RSP: stackTop, RFLAGS: rflagsOne,
		CS:  flat(selCode, typeCode),
		TR:  Segment{Selector: selTSS, Limit: 0x67, Type: typeTSS, Present: true},
		LDT: Segment{Type: typeLDT, Present: false},
		CR0: cr0PE | cr0ET,
	}
	data := flat(selData, typeData)
	e.DS, e.ES, e.FS, e.GS, e.SS = data, data, data, data, data
	return e.withGDT(mem)
}

// long returns an entry in 64-bit mode at rip, and writes its GDT and page tables.
func long(mem *memory.Memory, rip uint64) (Entry, error) {
	e, err := protected(mem, rip)
	if err != nil {
		return e, err
	}
	e.Mode = Long
	e.CS.L, e.CS.DB = true, false
	e.CR0 |= cr0PG
	e.CR3 = pageTables
	e.CR4 = cr4PAE
	e.EFER = eferLME | eferLMA
	const (
		presentWritable = 3
		largePage       = 1 << 7
		pdpt            = pageTables + memory.PageSize
		pds             = pdpt + memory.PageSize
	)
	tables := make([]byte, (2+identityGiB)*memory.PageSize)
	put := func(table, i, v uint64) { binary.LittleEndian.PutUint64(tables[table-pageTables+8*i:], v) }
	put(pageTables, 0, pdpt|presentWritable)
	for i := range uint64(identityGiB) {
		put(pdpt, i, pds+i*memory.PageSize|presentWritable)
	}
	for i := range uint64(identityGiB * 512) {
		put(pds, i, i<<21|largePage|presentWritable)
	}
	if err := mem.Write(pageTables, tables); err != nil {
		return e, err
	}
	return e.withGDT(mem)
}

// withGDT writes the GDT that the entry's segments come from.
func (e Entry) withGDT(mem *memory.Memory) (Entry, error) {
	gdt := []uint64{selCode / 8: e.CS.descriptor(), selData / 8: e.DS.descriptor(), selTSS / 8: e.TR.descriptor(), selTSS/8 + 1: 0}
	b := make([]byte, 0, 8*len(gdt))
	for _, d := range gdt {
		b = binary.LittleEndian.AppendUint64(b, d)
	}
	e.GDT = Table{Base: gdtAddr, Limit: uint16(len(b) - 1)}
	return e, mem.Write(gdtAddr, b)
}
