package boot

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

const testRAM = 64 << 20

func newMemory(t testing.TB) *memory.Memory {
	layout, err := firmware.Layout(testRAM, 0)
	require.NoError(t, err)
	m, err := memory.New(layout...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func params(kernel []byte) Params {
	return Params{Kernel: kernel, Initrd: []byte("initial"), Cmdline: "console=ttyS0 quiet",
		E820: firmware.E820(testRAM), RSDP: 0xe_0000}
}

// le packs numbers of the widths of their types.
func le(v ...any) []byte {
	var b bytes.Buffer
	for _, v := range v {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

// phdr is a program header of a synthetic ELF file.
type phdr struct {
	typ                   uint32
	vaddr, paddr, memsize uint64
	data                  []byte
}

const codeOffset = 0x1000 // of the first segment's data in a synthetic ELF file

func elfWith(class byte, machine uint16, entry uint64, segments ...phdr) []byte {
	var headers, data []byte
	for _, s := range segments {
		off := codeOffset + uint64(len(data))
		n := uint64(len(s.data))
		if class == elfClass64 {
			headers = append(headers, le(s.typ, uint32(7), off, s.vaddr, s.paddr, n, s.memsize, uint64(16))...)
		} else {
			headers = append(headers, le(s.typ, uint32(off), uint32(s.vaddr), uint32(s.paddr), uint32(n), uint32(s.memsize), uint32(7), uint32(16))...)
		}
		data = append(data, s.data...)
	}
	file := append([]byte("\x7fELF"), class, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	file = append(file, le(uint16(elfExec), machine, uint32(1))...)
	n := uint16(len(segments))
	if class == elfClass64 {
		file = append(file, le(entry, uint64(elf64Header), uint64(0), uint32(0), uint16(elf64Header), uint16(elf64Phdr), n, uint16(0), uint16(0), uint16(0))...)
	} else {
		file = append(file, le(uint32(entry), uint32(elf32Header), uint32(0), uint32(0), uint16(elf32Header), uint16(elf32Phdr), n, uint16(0), uint16(0), uint16(0))...)
	}
	file = append(file, headers...)
	file = append(file, make([]byte, codeOffset-len(file))...)
	return append(file, data...)
}

var code = []byte{0xf4, 0xeb, 0xfd} // hlt; jmp -3

func load(vaddr, paddr, size uint64) phdr {
	return phdr{typ: elfLoad, vaddr: vaddr, paddr: paddr, memsize: size, data: code}
}

func pvhNote(desc []byte) phdr {
	b := le(uint32(4), uint32(len(desc)), uint32(pvhNoteType))
	b = append(b, "Xen\x00"...)
	return phdr{typ: elfNote, data: append(b, desc...)}
}

// mbHeader packs a Multiboot header with the right checksum.
func mbHeaderWith(flags uint32, addresses ...uint32) []byte {
	magic := uint32(mbMagic)
	return le(magic, flags, -magic-flags, addresses)
}

// bzImage makes a kernel whose protected-mode part is code at its entry points.
func bzImage(version uint16, xload uint16, pref uint64, relocatable uint8) []byte {
	file := make([]byte, 5*sector)
	file[headerOffset] = 4
	copy(file[bootFlagOffset:], le(uint16(bootFlag)))
	file[0x200], file[0x201] = 0xeb, 0x6a // the header ends at 0x26c
	copy(file[0x202:], "HdrS")
	copy(file[0x206:], le(version))
	file[0x211] = 1                                   // LOADED_HIGH
	copy(file[0x22c:], le(uint32(0x7fff_ffff)))       // initrd_addr_max
	copy(file[0x230:], le(uint32(2<<20)))             // kernel_alignment
	file[0x234] = relocatable                         //
	copy(file[0x236:], le(xload))                     //
	copy(file[0x238:], le(uint32(255)))               // cmdline_size
	copy(file[0x258:], le(pref))                      //
	copy(file[0x260:], le(uint32(8<<20)))             // init_size
	copy(file[0x268:], le(uint32(0)))                 //
	body := bytes.Repeat([]byte{0x90}, 2*entry64)     //
	copy(body, code)                                  // the 32-bit entry
	copy(body[entry64:], []byte{0x48, 0x89, 0xf0, 1}) // the 64-bit entry
	return append(file, body...)
}

var (
	testPVH       = elfWith(elfClass64, elfAMD64, 0xffff_ffff_8010_0000, load(0xffff_ffff_8010_0000, 0x10_0000, 0x3000), pvhNote(le(uint32(0x10_0001))))
	testPVH32     = elfWith(elfClass32, elf386, 0x10_0000, load(0x10_0000, 0x10_0000, 0x3000), pvhNote(le(uint32(0x10_0001))))
	testELF       = elfWith(elfClass64, elfAMD64, 0xffff_ffff_8020_0001, load(0xffff_ffff_8020_0000, 0x20_0000, 0x3000))
	testMultiboot = elfWith(elfClass32, elf386, 0x10_000c, phdr{typ: elfLoad, vaddr: 0x10_0000, paddr: 0x10_0000, memsize: 0x2000, data: append(mbHeaderWith(3), code...)})
	testKludge    = append(append(make([]byte, 16), mbHeaderWith(mbFlagAddresses, 0x10_0010, 0x10_0000, 0, 0x10_4000, 0x10_0030)...), code...)
	testLinux     = bzImage(0x020f, xloadKernel64, 0x100_0000, 1)
	testLinux32   = bzImage(0x020a, 0, 0, 0)
)

func TestDetect(t *testing.T) {
	for name, c := range map[string]struct {
		file []byte
		want Kind
	}{
		"PVH": {testPVH, PVH}, "32-bit PVH": {testPVH32, PVH}, "ELF": {testELF, ELF64},
		"multiboot": {testMultiboot, Multiboot}, "multiboot without ELF": {testKludge, Multiboot},
		"linux": {testLinux, Linux}, "32-bit linux": {testLinux32, Linux},
	} {
		got, err := Detect(c.file)
		require.NoError(t, err, name)
		require.Equal(t, c.want, got, name)
		named, err := ParseKind(got.String())
		require.NoError(t, err)
		require.Equal(t, got, named)
	}
	for name, file := range map[string][]byte{
		"empty": nil, "text": []byte("#!/bin/sh\n"), "cut off ELF": testELF[:40], "cut off headers": testELF[:100],
		"cut off segment": testELF[:codeOffset+1],
		"32-bit ELF":      elfWith(elfClass32, elf386, 0x10_0000, load(0x10_0000, 0x10_0000, 0x3000)),
		"ARM":             elfWith(elfClass64, 183, 0, load(0, 0x10_0000, 3)),
	} {
		_, err := Detect(file)
		var e *firmware.Error
		require.ErrorAs(t, err, &e, name)
		require.NotEmpty(t, e.Remedy, name)
	}
	_, err := ParseKind("windows")
	require.Error(t, err)
}

// checkProtected checks what PVH and Multiboot prescribe for the segments.
func checkProtected(t *testing.T, m *memory.Memory, e Entry) {
	require.Equal(t, Protected, e.Mode)
	require.EqualValues(t, cr0PE|cr0ET, e.CR0)
	require.Zero(t, e.CR4|e.EFER|e.CR3)
	require.EqualValues(t, rflagsOne, e.RFLAGS)
	checkGDT(t, m, e)
	require.True(t, e.CS.DB && !e.CS.L)
}

// The visible and the hidden part of each segment register agree.
func checkGDT(t *testing.T, m *memory.Memory, e Entry) {
	for _, s := range []Segment{e.CS, e.DS, e.ES, e.FS, e.GS, e.SS, e.TR} {
		require.LessOrEqual(t, s.Selector+7, e.GDT.Limit)
		d, err := m.Uint64(e.GDT.Base + uint64(s.Selector))
		require.NoError(t, err)
		require.Equal(t, s.descriptor(), d)
	}
}

func TestDescriptorsAreTheWellKnownOnes(t *testing.T) {
	require.EqualValues(t, uint64(0x00cf9b000000ffff), flat(selCode, typeCode).descriptor())
	require.EqualValues(t, uint64(0x00cf93000000ffff), flat(selData, typeData).descriptor())
	long := flat(selCode, typeCode)
	long.L, long.DB = true, false
	require.EqualValues(t, uint64(0x00af9b000000ffff), long.descriptor())
}

func TestResetVector(t *testing.T) {
	e := ResetVector()
	require.EqualValues(t, 0xffff_fff0, e.CS.Base+e.RIP)
	require.EqualValues(t, 0x6000_0010, e.CR0)
}

func at(t *testing.T, m *memory.Memory, gpa uint64, n int) []byte {
	b, err := m.View(gpa, uint64(n))
	require.NoError(t, err)
	return b
}

func u32(t *testing.T, m *memory.Memory, gpa uint64) uint64 {
	v, err := m.Uint32(gpa)
	require.NoError(t, err)
	return uint64(v)
}

func u64(t *testing.T, m *memory.Memory, gpa uint64) uint64 {
	v, err := m.Uint64(gpa)
	require.NoError(t, err)
	return v
}

// checkStartInfo reads the structure as a PVH guest does.
func checkStartInfo(t *testing.T, m *memory.Memory, info uint64) {
	require.EqualValues(t, startMagic, u32(t, m, info))
	require.EqualValues(t, 1, u32(t, m, info+4))
	require.EqualValues(t, 1, u32(t, m, info+12), "modules")
	list, cmdline := u64(t, m, info+16), u64(t, m, info+24)
	require.EqualValues(t, 0xe_0000, u64(t, m, info+32))
	memmap, n := u64(t, m, info+40), u32(t, m, info+48)
	require.Equal(t, "initial", string(at(t, m, u64(t, m, list), int(u64(t, m, list+8)))))
	require.Equal(t, "console=ttyS0 quiet\x00", string(at(t, m, cmdline, 20)))
	var got []firmware.E820Entry
	for i := range n {
		e := memmap + 24*i
		got = append(got, firmware.E820Entry{Base: u64(t, m, e), Size: u64(t, m, e+8), Type: firmware.E820Type(u32(t, m, e+16))})
	}
	require.Equal(t, firmware.E820(testRAM), got)
}

func TestPVH(t *testing.T) {
	for name, file := range map[string][]byte{"64-bit": testPVH, "32-bit": testPVH32} {
		t.Run(name, func(t *testing.T) {
			m := newMemory(t)
			require.NoError(t, m.Write(0x10_2ff0, []byte{1, 2, 3}))
			e, err := Load(m, params(file))
			require.NoError(t, err)
			checkProtected(t, m, e)
			require.EqualValues(t, 0x10_0001, e.RIP)
			require.Equal(t, append(bytes.Clone(code), 0), at(t, m, 0x10_0000, 4))
			require.Equal(t, make([]byte, 3), at(t, m, 0x10_2ff0, 3), "the bss is zero")
			checkStartInfo(t, m, e.RBX)
		})
	}
}

func TestFlat(t *testing.T) {
	m := newMemory(t)
	p := params(code)
	p.Kind = Flat
	e, err := Load(m, p)
	require.NoError(t, err)
	checkProtected(t, m, e)
	require.EqualValues(t, 1<<20, e.RIP)
	require.Equal(t, code, at(t, m, e.RIP, len(code)))
	checkStartInfo(t, m, e.RBX)
}

func TestELF64(t *testing.T) {
	m := newMemory(t)
	e, err := Load(m, params(testELF))
	require.NoError(t, err)
	checkLong(t, m, e)
	require.EqualValues(t, 0x20_0001, e.RIP, "the entry point is virtual, the CPU starts at the physical address")
	require.Equal(t, e.RDI, e.RBX)
	checkStartInfo(t, m, e.RDI)
}

// checkLong walks the page tables for addresses up to 4 GiB, and no further.
func checkLong(t *testing.T, m *memory.Memory, e Entry) {
	require.Equal(t, Long, e.Mode)
	require.EqualValues(t, uint64(cr0PE|cr0ET|cr0PG), e.CR0)
	require.EqualValues(t, cr4PAE, e.CR4)
	require.EqualValues(t, eferLME|eferLMA, e.EFER)
	require.True(t, e.CS.L && !e.CS.DB)
	checkGDT(t, m, e)
	const frame = ^uint64(0xfff)
	walk := func(addr uint64) (uint64, bool) {
		table := e.CR3
		for shift := 39; ; shift -= 9 {
			entry := u64(t, m, table+8*(addr>>shift&511))
			if entry&1 == 0 {
				return 0, false
			}
			if shift == 21 {
				require.NotZero(t, entry&0x80)
				return entry&^0x1f_ffff | addr&0x1f_ffff, true
			}
			table = entry & frame
		}
	}
	for _, addr := range []uint64{0, 0x1234, 2 << 20, 1<<30 + 5, 3<<30 | 0x1ff_ffff, 1<<32 - 1} {
		got, ok := walk(addr)
		require.True(t, ok, "%#x", addr)
		require.Equal(t, addr, got)
	}
	for _, addr := range []uint64{1 << 32, 1 << 39, 1 << 47} {
		_, ok := walk(addr)
		require.False(t, ok, "%#x", addr)
	}
}

func TestMultiboot(t *testing.T) {
	for name, c := range map[string]struct {
		file  []byte
		entry uint64
	}{"ELF": {testMultiboot, 0x10_000c}, "addresses": {testKludge, 0x10_0030}} {
		t.Run(name, func(t *testing.T) {
			m := newMemory(t)
			e, err := Load(m, params(c.file))
			require.NoError(t, err)
			checkProtected(t, m, e)
			require.Equal(t, c.entry, e.RIP)
			require.EqualValues(t, mbEntryMagic, e.RAX)
			require.Equal(t, code, at(t, m, e.RIP, len(code)))
			info := e.RBX
			require.EqualValues(t, mbInfoMemory|mbInfoCmdline|mbInfoModules|mbInfoMap|mbInfoName, u32(t, m, info))
			require.EqualValues(t, 639, u32(t, m, info+4))
			require.EqualValues(t, testRAM>>10-1024, u32(t, m, info+8))
			require.Equal(t, "console=ttyS0 quiet\x00", string(at(t, m, u32(t, m, info+16), 20)))
			require.EqualValues(t, 1, u32(t, m, info+20))
			mods := u32(t, m, info+24)
			start, end := u32(t, m, mods), u32(t, m, mods+4)
			require.Zero(t, start%memory.PageSize)
			require.Equal(t, "initial", string(at(t, m, start, int(end-start))))
			length, addr := u32(t, m, info+44), u32(t, m, info+48)
			var got []firmware.E820Entry
			for off := uint64(0); off < length; off += u32(t, m, addr+off) + 4 {
				got = append(got, firmware.E820Entry{Base: u64(t, m, addr+off+4), Size: u64(t, m, addr+off+12), Type: firmware.E820Type(u32(t, m, addr+off+20))})
			}
			require.Equal(t, firmware.E820(testRAM), got)
			require.Equal(t, "ftvmm\x00", string(at(t, m, u32(t, m, info+64), 6)))
		})
	}
}

// checkZeroPage reads boot_params at the offsets of boot.rst and zero-page.rst.
func checkZeroPage(t *testing.T, m *memory.Memory, page uint64) {
	require.EqualValues(t, 0xe_0000, u64(t, m, page+0x70), "acpi_rsdp_addr")
	require.Equal(t, []byte{5 - 1}, at(t, m, page+0x1e8, 1), "e820_entries")
	require.Equal(t, "HdrS", string(at(t, m, page+0x202, 4)))
	require.Equal(t, []byte{0xff, 0x81}, at(t, m, page+0x210, 2), "type_of_loader, loadflags")
	require.Equal(t, "initial", string(at(t, m, u32(t, m, page+0x218), int(u32(t, m, page+0x21c)))))
	require.Equal(t, "console=ttyS0 quiet\x00", string(at(t, m, u32(t, m, page+0x228), 20)))
	for i, want := range firmware.E820(testRAM) {
		e := page + 0x2d0 + 20*uint64(i)
		require.Equal(t, want, firmware.E820Entry{Base: u64(t, m, e), Size: u64(t, m, e+8), Type: firmware.E820Type(u32(t, m, e+16))})
	}
}

func TestLinux(t *testing.T) {
	m := newMemory(t)
	e, err := Load(m, params(testLinux))
	require.NoError(t, err)
	checkLong(t, m, e)
	require.EqualValues(t, 0x100_0200, e.RIP)
	require.Equal(t, []byte{0x48, 0x89, 0xf0, 1}, at(t, m, e.RIP, 4))
	checkZeroPage(t, m, e.RSI)
	require.EqualValues(t, 0x10, e.CS.Selector)
	require.EqualValues(t, 0x18, e.DS.Selector)
	require.EqualValues(t, 8<<20, u32(t, m, e.RSI+0x260), "the header is the kernel's own")
	require.EqualValues(t, 0x100_0000, u32(t, m, e.RSI+0x214))
}

func TestLinux32(t *testing.T) {
	m := newMemory(t)
	e, err := Load(m, params(testLinux32))
	require.NoError(t, err)
	checkProtected(t, m, e)
	require.EqualValues(t, 0x10_0000, e.RIP)
	checkZeroPage(t, m, e.RSI)
}

func TestRelocatableLinuxMovesIntoASmallGuest(t *testing.T) {
	m := newMemory(t)
	p := params(bzImage(0x020f, xloadKernel64, 0x4000_0000, 1))
	e, err := Load(m, p)
	require.NoError(t, err)
	require.EqualValues(t, 0x20_0200, e.RIP)
	p.Kernel = bzImage(0x020f, xloadKernel64, 0x4000_0000, 0)
	_, err = Load(m, p)
	require.ErrorContains(t, err, "0x40000000")
}

func TestInitrdLiesAboveTheKernelAndBelowTheLimit(t *testing.T) {
	m := newMemory(t)
	p := params(testLinux)
	p.Initrd = bytes.Repeat([]byte{7}, 30<<20)
	e, err := Load(m, p)
	require.NoError(t, err)
	addr := u32(t, m, e.RSI+0x218)
	require.EqualValues(t, testRAM-30<<20, addr)
	p.Initrd = make([]byte, 50<<20)
	_, err = Load(m, p)
	require.ErrorContains(t, err, "give the guest more memory")
	limited := bytes.Clone(testLinux)
	copy(limited[0x22c:], le(uint32(0x2ff_ffff)))
	p.Kernel, p.Initrd = limited, []byte("x")
	e, err = Load(m, p)
	require.NoError(t, err)
	require.EqualValues(t, 0x2ff_f000, u32(t, m, e.RSI+0x218))
}

func TestBadFilesAreRefusedWithARemedy(t *testing.T) {
	elf := func(s ...phdr) []byte { return elfWith(elfClass64, elfAMD64, 0x10_0000, s...) }
	edit := func(file []byte, off int, b ...byte) []byte {
		file = bytes.Clone(file)
		copy(file[off:], b)
		return file
	}
	for name, c := range map[string]struct {
		kind Kind
		file []byte
	}{
		"flat empty":               {Flat, nil},
		"flat too large":           {Flat, make([]byte, testRAM)},
		"ELF outside RAM":          {ELF64, elf(load(0x10_0000, 0x10_0000, 3), load(0, testRAM, 3))},
		"ELF over the VGA hole":    {ELF64, elf(load(0x10_0000, 0x10_0000, 3), load(0, 0x9_f000, 0x2000))},
		"ELF over the scratch":     {ELF64, elf(load(0x10_0000, 0x10_0000, 3), load(0, 0x500, 0x1000))},
		"ELF wraps":                {ELF64, elf(load(0x10_0000, 0x10_0000, 3), load(0, 1<<64-2, 4))},
		"ELF huge bss":             {ELF64, elf(load(0x10_0000, 0x10_0000, 1<<60))},
		"ELF without entry":        {ELF64, elf(load(0x20_0000, 0x20_0000, 3))},
		"ELF without segment":      {ELF64, elf(phdr{typ: 6})},
		"ELF data over memory":     {ELF64, elf(load(0x10_0000, 0x10_0000, 2))},
		"ELF position independent": {ELF64, edit(testELF, 16, elfShared)},
		"ELF 32-bit":               {ELF64, testPVH32},
		"PVH without note":         {PVH, testELF},
		"PVH entry elsewhere":      {PVH, elf(load(0x10_0000, 0x10_0000, 3), pvhNote(le(uint32(0x20_0000))))},
		"PVH entry odd":            {PVH, elf(load(0x10_0000, 0x10_0000, 3), pvhNote([]byte{1, 2}))},
		"PVH note cut off":         {PVH, elf(load(0x10_0000, 0x10_0000, 3), phdr{typ: elfNote, data: le(uint32(4), uint32(400), uint32(18), uint32(0))})},
		"multiboot missing":        {Multiboot, testELF},
		"multiboot video":          {Multiboot, append(mbHeaderWith(mbFlagVideo), make([]byte, 64)...)},
		"multiboot unknown":        {Multiboot, append(mbHeaderWith(1<<5), make([]byte, 64)...)},
		"multiboot no ELF":         {Multiboot, append(mbHeaderWith(0), make([]byte, 64)...)},
		"multiboot cut off":        {Multiboot, mbHeaderWith(mbFlagAddresses)},
		"multiboot load":           {Multiboot, mbHeaderWith(mbFlagAddresses, 0x10_0000, 0x10_0010, 0, 0, 0x10_0010)},
		"multiboot header":         {Multiboot, mbHeaderWith(mbFlagAddresses, 0x10_0010, 0x10_0000, 0, 0, 0x10_0010)},
		"multiboot end":            {Multiboot, mbHeaderWith(mbFlagAddresses, 0x10_0000, 0x10_0000, 0x20_0000, 0, 0x10_0010)},
		"multiboot bss":            {Multiboot, mbHeaderWith(mbFlagAddresses, 0x10_0000, 0x10_0000, 0, 0x10_0001, 0x10_0010)},
		"multiboot entry":          {Multiboot, mbHeaderWith(mbFlagAddresses, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020)},
		"linux old":                {Linux, bzImage(0x0202, 0, 0, 0)},
		"linux low":                {Linux, edit(testLinux, 0x211, 0)},
		"linux cut off":            {Linux, testLinux[:5*sector]},
		"linux without code":       {Linux, testLinux[:5*sector+8]},
		"linux command line":       {Linux, edit(testLinux, 0x238, 5, 0)},
		"linux is text":            {Linux, []byte(strings.Repeat("x", 4096))},
	} {
		t.Run(name, func(t *testing.T) {
			p := params(c.file)
			p.Kind = c.kind
			_, err := Load(newMemory(t), p)
			var e *firmware.Error
			require.ErrorAs(t, err, &e)
			require.NotEmpty(t, e.Remedy)
		})
	}
}

func TestParamsAreChecked(t *testing.T) {
	m := newMemory(t)
	for name, f := range map[string]func(*Params){
		"no map":    func(p *Params) { p.E820 = nil },
		"large map": func(p *Params) { p.E820 = make([]firmware.E820Entry, MaxE820+1) },
		"long":      func(p *Params) { p.Cmdline = strings.Repeat("x", cmdlineMax) },
		"zero byte": func(p *Params) { p.Cmdline = "a\x00b" },
		"kind":      func(p *Params) { p.Kind = 99 },
	} {
		p := params(testPVH)
		f(&p)
		_, err := Load(m, p)
		require.Error(t, err, name)
	}
	p := params(testPVH)
	p.E820 = append(p.E820, make([]firmware.E820Entry, MaxE820-len(p.E820))...)
	_, err := Load(m, p)
	require.NoError(t, err)
	require.LessOrEqual(t, infoAddr+startSize+startModuleSize+24*MaxE820, infoEnd)
	require.LessOrEqual(t, infoAddr+mbInfoSize+8+mbModuleSize+24*MaxE820, infoEnd)
}

// fuzz loads whatever the bytes are as one kind, and checks what is promised of an
// entry: that it lies in RAM, outside the loader's own area.
func fuzz(f *testing.F, kind Kind, seeds ...[]byte) {
	for _, s := range seeds {
		f.Add(s)
		f.Add(s[:len(s)/2])
	}
	const small = 4 << 20 // so that a case costs little
	layout, err := firmware.Layout(small, 0)
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, file []byte) {
		m, err := memory.New(layout...)
		require.NoError(t, err)
		defer m.Close()
		_, _ = Detect(file)
		e, err := Load(m, Params{Kind: kind, Kernel: file, Initrd: []byte("x"), E820: firmware.E820(small)})
		if err == nil {
			require.True(t, m.Contains(e.RIP, 1), "%#x", e.RIP)
			require.True(t, e.RIP < ScratchBase || e.RIP >= ScratchEnd, "%#x", e.RIP)
		}
	})
}

func FuzzLinux(f *testing.F)     { fuzz(f, Linux, testLinux, testLinux32, bzImage(0x020f, 1, 0, 0)) }
func FuzzPVH(f *testing.F)       { fuzz(f, PVH, testPVH, testPVH32) }
func FuzzMultiboot(f *testing.F) { fuzz(f, Multiboot, testMultiboot, testKludge) }
func FuzzELF64(f *testing.F)     { fuzz(f, ELF64, testELF) }
func FuzzFlat(f *testing.F)      { fuzz(f, Flat, code) }
