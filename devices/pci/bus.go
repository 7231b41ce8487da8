package pci

import (
	"fmt"
	"sort"

	"github.com/ftvmm/ftvmm/devices"
)

// The configuration mechanism's ports (82441FX data sheet, 3.1).
const (
	ConfigBase  = 0xcf8 // the first port of ConfigPorts
	ConfigPorts = 8     // how many there are

	offAddress      = 0 // 0xCF8: configuration address, 32 bits
	offResetControl = 1 // 0xCF9: belongs to the ISA bridge
	offData         = 4 // 0xCFC to 0xCFF: configuration data

	addressEnable = 1 << 31
	addressMask   = 0x80fffffc // the rest is reserved and reads as zero
)

// Bus is one PCI bus with its configuration ports and address decoding.
type Bus struct {
	functions [256]*Function
	present   []*Function // in order of device and function number
	address   uint32      // 0xCF8
	reset     devices.Handler
	regions   []*Region
	io, mem   space
}

// NewBus returns a bus without functions.
func NewBus() *Bus {
	b := &Bus{}
	b.io = space{bus: b, io: true, stale: true}
	b.mem = space{bus: b, stale: true}
	return b
}

// Add puts f at device and function number devfn (device<<3 | function).
func (b *Bus) Add(devfn uint8, f *Function) error {
	if b.functions[devfn] != nil || f.bus != nil {
		return fmt.Errorf("pci: cannot add %s as %02x.%d: taken, or on a bus already", f.name, devfn>>3, devfn&7)
	}
	b.functions[devfn], f.bus = f, b
	b.present = b.present[:0]
	for _, f := range b.functions {
		if f != nil {
			b.present = append(b.present, f)
		}
	}
	// A device with functions beside 0 says so in function 0 (PCI 3.0, 6.2.1).
	first := devfn &^ 7
	for n := first + 1; n&7 != 0; n++ {
		if b.functions[n] != nil && b.functions[first] != nil {
			b.functions[first].SetDefault(RegHeaderType, headerMultiFunction)
		}
	}
	b.moved()
	return nil
}

// Function returns the function at devfn, or nil.
func (b *Bus) Function(devfn uint8) *Function { return b.functions[devfn] }

// SetResetControl gives port 0xCF9, which lies amid the configuration ports, to h: a
// window of one byte.
func (b *Bus) SetResetControl(h devices.Handler) { b.reset = h }

// ConfigPorts returns the handler of the eight ports at [ConfigBase].
func (b *Bus) ConfigPorts() devices.Handler { return (*configPorts)(b) }

// configPorts is the handler of the configuration ports.
type configPorts Bus

// target returns the function and the offset that the data port at off refers to.
func (p *configPorts) target(off uint64) (*Function, uint64) {
	const bus = 0xff << 16
	if p.address&addressEnable == 0 || p.address&bus != 0 {
		return nil, 0
	}
	return p.functions[uint8(p.address>>8)], uint64(p.address&0xfc) + off - offData
}

// Read implements [devices.Handler].
func (p *configPorts) Read(off uint64, size int) (v uint64) {
	switch {
	case off == offAddress && size == 4:
		return uint64(p.address)
	case off == offResetControl && size == 1 && p.reset != nil:
		return p.reset.Read(0, 1)
	case off >= offData && size <= 4 && off+uint64(size) <= ConfigPorts:
		if f, reg := p.target(off); f != nil {
			return f.ReadConfig(reg, size)
		}
	case off < offData && off+uint64(size) > offData:
		return p.split(off, size)
	}
	return ones(size)
}

// split reads bytewise across the border of address and data port: only the data
// bytes have an effect there.
func (p *configPorts) split(off uint64, size int) (v uint64) {
	for i := range size {
		v |= p.Read(off+uint64(i), 1) & 0xff << (8 * i)
	}
	return v
}

// Write implements [devices.Handler].
func (p *configPorts) Write(off uint64, size int, v uint64) {
	switch {
	case off == offAddress && size == 4:
		p.address = uint32(v) & addressMask
	case off == offResetControl && size == 1 && p.reset != nil:
		p.reset.Write(0, 1, v)
	case off >= offData && size <= 4 && off+uint64(size) <= ConfigPorts:
		if f, reg := p.target(off); f != nil {
			f.WriteConfig(reg, size, v)
		}
	case off < offData && off+uint64(size) > offData:
		for i := range size {
			p.Write(off+uint64(i), 1, v>>(8*i)&0xff)
		}
	}
}

// NeedsTime implements [devices.Timed].
func (p *configPorts) NeedsTime(off uint64, write bool) bool {
	if off < offData {
		return false
	}
	f, reg := p.target(off)
	return f != nil && f.needsTime(reg, write)
}

// Region is a window of the chipset that configuration registers move but that is
// not a BAR. It starts disabled.
type Region struct {
	bus  *Bus
	io   bool
	h    devices.Handler
	base uint64
	size uint64
}

// AddIORegion adds a region of I/O ports. Regions go before BARs, in the order they
// were added.
func (b *Bus) AddIORegion(h devices.Handler) *Region {
	r := &Region{bus: b, io: true, h: h}
	b.regions = append(b.regions, r)
	return r
}

// Set has the region decode size bytes at base; size 0 turns it off. A range that
// does not fit into the address space decodes nothing.
func (r *Region) Set(base, size uint64) {
	if r.base != base || r.size != size {
		r.base, r.size = base, size
		r.bus.moved()
	}
}

// moved marks the flattened lists as stale.
func (b *Bus) moved() { b.io.stale, b.mem.stale = true, true }

// IO returns the decoder of I/O ports.
func (b *Bus) IO() devices.Resolver { return &b.io }

// Memory returns the decoder of guest-physical addresses.
func (b *Bus) Memory() devices.Resolver { return &b.mem }

// flatRange is a range of addresses [start, end] that one handler serves; off is the
// handler's offset of start. (The last byte, not the one after it, so that a range
// may end with the address space.)
type flatRange struct {
	start, end uint64
	off        uint64
	h          devices.Handler
}

// space is the flattened decoding of one address space.
type space struct {
	bus   *Bus
	io    bool
	stale bool
	flat  []flatRange // disjoint, in ascending order
	spare []flatRange // the other buffer of add
	last  int
}

// Resolve implements [devices.Resolver].
func (s *space) Resolve(addr uint64) (h devices.Handler, off, left uint64) {
	if s.stale {
		s.rebuild()
	}
	if s.last < len(s.flat) {
		if r := &s.flat[s.last]; addr >= r.start && addr <= r.end {
			return r.h, r.off + addr - r.start, r.end - addr + 1
		}
	}
	i := sort.Search(len(s.flat), func(i int) bool { return s.flat[i].end >= addr })
	if i == len(s.flat) || addr < s.flat[i].start {
		return nil, 0, 0
	}
	s.last = i
	r := &s.flat[i]
	return r.h, r.off + addr - r.start, r.end - addr + 1
}

// rebuild flattens all windows in their order of priority.
func (s *space) rebuild() {
	s.stale, s.last, s.flat = false, 0, s.flat[:0]
	for _, r := range s.bus.regions {
		if r.io == s.io && r.size != 0 && r.base+r.size > r.base && (!s.io || r.base+r.size <= 1<<16) {
			s.add(r.base, r.size, 0, r.h)
		}
	}
	for _, f := range s.bus.present {
		for i := range f.bars {
			b := &f.bars[i]
			if (b.kind == IO) != s.io {
				continue
			}
			if base, ok := f.base(i); ok {
				for _, w := range b.windows {
					s.add(base+w.off, w.size, 0, w.h)
				}
			}
		}
	}
}

// add puts the parts of [base, base+size) into the list that nothing in it has yet.
func (s *space) add(base, size, off uint64, h devices.Handler) {
	start, end := base, base+size-1
	out := s.spare[:0]
	done := false // all of the new range is placed
	place := func(last uint64) {
		out = append(out, flatRange{start, last, off + start - base, h})
	}
	for _, r := range s.flat {
		if !done && r.end >= start {
			if r.start > end { // the rest fits before r
				place(end)
				done = true
			} else {
				if r.start > start {
					place(r.start - 1)
				}
				if r.end >= end {
					done = true
				} else {
					start = r.end + 1
				}
			}
		}
		out = append(out, r)
	}
	if !done {
		place(end)
	}
	s.flat, s.spare = out, s.flat
}

// Assign does what firmware does, for a guest that is booted without one: it gives
// every BAR a naturally aligned address, in order of function and register, from
// ioBase (ports, below 64 Ki) and from mmioBase up to mmioEnd (memory, below 4 GiB);
// enables decoding and bus mastering; and stores in each interrupt line register
// what irq returns for the function and its pin (1 for INTA#). Expansion ROMs stay
// disabled.
func (b *Bus) Assign(ioBase, mmioBase, mmioEnd uint64, irq func(devfn uint8, pin int) uint8) error {
	if ioBase == 0 || ioBase >= 1<<16 || mmioBase == 0 || mmioBase > mmioEnd || mmioEnd > 1<<32 {
		return fmt.Errorf("pci: cannot assign addresses from port %#x and memory %#x to %#x", ioBase, mmioBase, mmioEnd)
	}
	ports, memory := ioBase, mmioBase
	for devfn, f := range b.functions {
		if f == nil {
			continue
		}
		for i := range numBARs {
			bar := &f.bars[i]
			if bar.kind == 0 {
				continue
			}
			next, end := &memory, mmioEnd
			if bar.kind == IO {
				next, end = &ports, 1<<16
			}
			base := (*next + bar.size - 1) &^ (bar.size - 1)
			if base < *next || base > end || bar.size > end-base {
				return fmt.Errorf("pci: no addresses left for BAR %d of %s (%#x bytes)", i, f.name, bar.size)
			}
			*next = base + bar.size
			reg := uint8(RegBAR0 + 4*i)
			f.SetLong(reg, uint32(base)|f.Long(reg)&^uint32(-bar.size))
			if bar.kind == Mem64 {
				f.SetLong(reg+4, uint32(base>>32))
			}
		}
		if pin := f.Byte(RegInterruptPin); pin != 0 {
			f.SetByte(RegInterruptLine, irq(uint8(devfn), int(pin)))
		}
		f.SetWord(RegCommand, f.Word(RegCommand)|CommandIO|CommandMemory|CommandMaster)
	}
	return nil
}

// Reset clears the configuration address. Functions and regions are reset by their
// owners.
func (b *Bus) Reset() { b.address = 0 }

// BusState is the saved form of a [Bus]: the configuration address. Functions and
// regions are saved by their owners.
type BusState struct {
	Address uint32
}

// Save returns the bus's state.
func (b *Bus) Save() BusState { return BusState{b.address} }

// Restore sets the bus's state.
func (b *Bus) Restore(s BusState) error {
	if s.Address&^addressMask != 0 {
		return fmt.Errorf("pci: saved configuration address %#x has reserved bits set", s.Address)
	}
	b.address = s.Address
	return nil
}
