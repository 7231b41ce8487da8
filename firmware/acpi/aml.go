package acpi

import (
	"encoding/binary"
	"strings"
)

// An encoder of ACPI machine language (section 20.2). Each function returns the bytes
// of one term; terms nest by concatenation.

// Opcodes (section 20.2.5 and table 20.1). Those above 0xff have the prefix 0x5b.
const (
	opName       = 0x08
	opByte       = 0x0a
	opWord       = 0x0b
	opDWord      = 0x0c
	opScope      = 0x10
	opBuffer     = 0x11
	opPackage    = 0x12
	opMethod     = 0x14
	opDualName   = 0x2e
	opMultiName  = 0x2f
	opArg0       = 0x68
	opStore      = 0x70
	opAnd        = 0x7b
	opOr         = 0x7d
	opDWordField = 0x8a
	opLess       = 0x95
	opIf         = 0xa0
	opElse       = 0xa1
	opReturn     = 0xa4

	opExtended  = 0x5b
	extRegion   = 0x80
	extField    = 0x81
	extDevice   = 0x82
	extProcess  = 0x83
	spacePCI    = 0x02 // PCI_Config, of an operation region
	byteAccess  = 0x01 // of a field
	serialized  = 0x08 // flag of a method
	nameSegSize = 4
)

// cat concatenates terms.
func cat(terms ...[]byte) []byte {
	var b []byte
	for _, t := range terms {
		b = append(b, t...)
	}
	return b
}

// pkgLength encodes a length (section 20.2.4). A package counts the encoding itself, a field does not.
func pkgLength(n int, self bool) []byte {
	for extra := 0; extra < 4; extra++ {
		total := n
		if self {
			total += 1 + extra
		}
		if extra == 0 {
			if total < 1<<6 {
				return []byte{byte(total)}
			}
			continue
		}
		if total < 1<<(4+8*extra) {
			b := []byte{byte(extra<<6 | total&0xf)}
			for i := range extra {
				b = append(b, byte(total>>(4+8*i)))
			}
			return b
		}
	}
	panic("acpi: an AML package of 256 MiB") // the DSDT's size is bounded by its construction
}

// pkg returns op, the length of what follows, and the terms.
func pkg(op []byte, terms ...[]byte) []byte {
	body := cat(terms...)
	return cat(op, pkgLength(len(body), true), body)
}

// path encodes a name such as "_CRS", "\\_SB" or "\\_SB.PCI0.ISA.PRQ0" (section
// 20.2.2). Segments shorter than four characters are padded with underscores.
func path(name string) []byte {
	var b []byte
	if strings.HasPrefix(name, `\`) {
		b = append(b, '\\')
		name = name[1:]
	}
	segs := strings.Split(name, ".")
	switch len(segs) {
	case 1:
	case 2:
		b = append(b, opDualName)
	default:
		b = append(b, opMultiName, byte(len(segs)))
	}
	for _, s := range segs {
		b = append(b, (s + "____")[:nameSegSize]...)
	}
	return b
}

// integer encodes a constant of up to 32 bits in its shortest form.
func integer(v uint32) []byte {
	switch {
	case v <= 1: // ZeroOp and OneOp are their values
		return []byte{byte(v)}
	case v <= 0xff:
		return []byte{opByte, byte(v)}
	case v <= 0xffff:
		return binary.LittleEndian.AppendUint16([]byte{opWord}, uint16(v))
	}
	return binary.LittleEndian.AppendUint32([]byte{opDWord}, v)
}

// eisaID encodes an identifier such as "PNP0A03" as a number (section 19.6.36).
func eisaID(id string) []byte {
	v := uint16(id[0]-'@')<<10 | uint16(id[1]-'@')<<5 | uint16(id[2]-'@')
	var product uint16
	for _, c := range []byte(id[3:7]) {
		d := c - '0'
		if c >= 'A' {
			d = c - 'A' + 10
		}
		product = product<<4 | uint16(d)
	}
	var b [4]byte
	binary.BigEndian.PutUint16(b[:], v)
	binary.BigEndian.PutUint16(b[2:], product)
	return integer(binary.LittleEndian.Uint32(b[:]))
}

func scope(name string, terms ...[]byte) []byte {
	return pkg([]byte{opScope}, path(name), cat(terms...))
}

func device(name string, terms ...[]byte) []byte {
	return pkg([]byte{opExtended, extDevice}, path(name), cat(terms...))
}

// processor declares a CPU without a control block (section 19.6.108 of ACPI 6.3):
// the form that every Windows knows.
func processor(name string, id byte) []byte {
	return pkg([]byte{opExtended, extProcess}, path(name), []byte{id, 0, 0, 0, 0, 0})
}

// method declares a serialized method.
func method(name string, args byte, terms ...[]byte) []byte {
	return pkg([]byte{opMethod}, path(name), []byte{args | serialized}, cat(terms...))
}

func named(name string, value []byte) []byte { return cat([]byte{opName}, path(name), value) }

func list(elems ...[]byte) []byte {
	return pkg([]byte{opPackage}, []byte{byte(len(elems))}, cat(elems...))
}

func buffer(data []byte) []byte {
	return pkg([]byte{opBuffer}, integer(uint32(len(data))), data)
}

func ret(v []byte) []byte            { return cat([]byte{opReturn}, v) }
func store(v, target []byte) []byte  { return cat([]byte{opStore}, v, target) }
func less(a, b []byte) []byte        { return cat([]byte{opLess}, a, b) }
func and(a, b, target []byte) []byte { return cat([]byte{opAnd}, a, b, target) }
func or(a, b, target []byte) []byte  { return cat([]byte{opOr}, a, b, target) }
func arg0() []byte                   { return []byte{opArg0} }

func ifElse(cond, then, otherwise []byte) []byte {
	b := pkg([]byte{opIf}, cond, then)
	if otherwise != nil {
		b = cat(b, pkg([]byte{opElse}, otherwise))
	}
	return b
}

// dwordField names 32 bits at an offset of a buffer.
func dwordField(buf []byte, off uint32, name string) []byte {
	return cat([]byte{opDWordField}, buf, integer(off), path(name))
}

// pciRegion declares a range of the PCI configuration space of the enclosing device.
func pciRegion(name string, off, size uint32) []byte {
	return cat([]byte{opExtended, extRegion}, path(name), []byte{spacePCI}, integer(off), integer(size))
}

// byteFields names the bytes of a region in turn.
func byteFields(region string, names ...string) []byte {
	var fields []byte
	for _, n := range names {
		fields = cat(fields, path(n), pkgLength(8, false))
	}
	return pkg([]byte{opExtended, extField}, path(region), []byte{byteAccess}, fields)
}

// Resource descriptors (section 6.4).
const (
	resIRQ       = 0x22
	resIO        = 0x47
	resEnd       = 0x79
	resDWord     = 0x87
	resWord      = 0x88
	resInterrupt = 0x89
	resQWord     = 0x8a

	spaceMemory, spaceIO, spaceBus = 0, 1, 2

	fixedProducer  = 0x0c // general flags: produced, minimum and maximum fixed
	memoryWritable = 0x01
	memoryCached   = 0x02
	ioEntireRange  = 0x03
	decode16       = 0x01
	levelHigh      = 0x09 // consumer, level, active high, shared
)

// resources makes a resource template of descriptors. A checksum of zero is not checked.
func resources(descriptors ...[]byte) []byte {
	return buffer(cat(cat(descriptors...), []byte{resEnd, 0}))
}

// ports describes size I/O ports at base.
func ports(base uint16, size byte) []byte {
	return []byte{resIO, decode16, byte(base), byte(base >> 8), byte(base), byte(base >> 8), 1, size}
}

// irq describes one edge-triggered ISA interrupt.
func irq(n int) []byte {
	return binary.LittleEndian.AppendUint16([]byte{resIRQ}, 1<<n)
}

// interrupts describes a choice of shared level-triggered interrupts.
func interrupts(n ...uint32) []byte {
	b := []byte{resInterrupt, byte(2 + 4*len(n)), 0, levelHigh, byte(len(n))}
	for _, v := range n {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// interruptOffset is where a descriptor of interrupts has its first number.
const interruptOffset = 5

// window describes the addresses from first to last that a bridge passes on, in
// words of 2, 4 or 8 bytes.
func window(width int, space, flags byte, first, last uint64) []byte {
	var b []byte
	for _, v := range []uint64{0, first, last, 0, last - first + 1} { // granularity, range, translation, length
		b = append(b, binary.LittleEndian.AppendUint64(nil, v)[:width]...)
	}
	tag := map[int]byte{2: resWord, 4: resDWord, 8: resQWord}[width]
	size := 3 + len(b)
	return cat([]byte{tag, byte(size), byte(size >> 8), space, fixedProducer, flags}, b)
}
