package devices

import (
	"fmt"
	"sort"
)

// Handler is a device's view of one window of I/O ports or of guest-physical
// addresses.
type Handler interface {
	// Read returns the size bytes (1, 2, 4 or, for memory, 8) at offset off of the
	// window, little-endian. Bits above size bytes are ignored.
	Read(off uint64, size int) uint64
	// Write stores the low size bytes of v at offset off.
	Write(off uint64, size int, v uint64)
}

// Timed is implemented by a handler with registers whose reading or writing depends
// on the time of day: the machine samples virtual time before such an access, and
// only then, so that clock readings are the only ones that must be logged for a
// replay.
type Timed interface {
	// NeedsTime says whether this access depends on the present time.
	NeedsTime(off uint64, write bool) bool
}

// window is one decoded range.
type window struct {
	base, size uint64
	h          Handler
	timed      Timed // h, when it implements Timed
}

// Resolver finds the handler of an address that no fixed window decodes: the PCI
// bus, whose windows the guest moves. It returns the handler, the offset within its
// window, and how many bytes the window holds from that offset on.
type Resolver interface {
	Resolve(addr uint64) (h Handler, off, left uint64)
}

// Bus decodes one address space: I/O ports or guest-physical memory. Fixed windows
// win over the resolver's. The zero value decodes nothing.
type Bus struct {
	windows  []window // sorted by base
	ports    []uint8  // for a port bus: index+1 of the window at each port
	resolver Resolver
	last     int // the window that decoded the last access
}

// maxPortWindows bounds the windows of a port bus (an index is one byte).
const maxPortWindows = 255

// NewPortBus returns a bus for the 65,536 I/O ports, with a lookup in constant time.
func NewPortBus() *Bus { return &Bus{ports: make([]uint8, 1<<16)} }

// NewMemoryBus returns a bus for guest-physical addresses outside RAM.
func NewMemoryBus() *Bus { return &Bus{} }

// SetResolver sets what decodes the addresses that no fixed window holds.
func (b *Bus) SetResolver(r Resolver) { b.resolver = r }

// Map adds a fixed window of size bytes at base. Windows are fixed when the machine
// is built; overlapping ones are a defect of the machine's construction and refused.
func (b *Bus) Map(base, size uint64, h Handler) error {
	if size == 0 || base+size < base || (b.ports != nil && base+size > 1<<16) {
		return fmt.Errorf("devices: window %#x+%#x outside the address space", base, size)
	}
	if b.ports != nil && len(b.windows) == maxPortWindows {
		return fmt.Errorf("devices: more than %d port windows", maxPortWindows)
	}
	for _, w := range b.windows {
		if base < w.base+w.size && w.base < base+size {
			return fmt.Errorf("devices: window %#x+%#x overlaps %#x+%#x", base, size, w.base, w.size)
		}
	}
	w := window{base: base, size: size, h: h}
	w.timed, _ = h.(Timed)
	b.windows = append(b.windows, w)
	sort.Slice(b.windows, func(i, j int) bool { return b.windows[i].base < b.windows[j].base })
	for i := range b.windows {
		if b.ports == nil {
			break
		}
		w := &b.windows[i]
		for p := w.base; p < w.base+w.size; p++ {
			b.ports[p] = uint8(i + 1)
		}
	}
	b.last = 0
	return nil
}

// fixed returns the fixed window that holds addr, or nil.
func (b *Bus) fixed(addr uint64) *window {
	if b.ports != nil {
		if addr >= 1<<16 || b.ports[addr] == 0 {
			return nil
		}
		return &b.windows[b.ports[addr]-1]
	}
	if len(b.windows) == 0 {
		return nil
	}
	if w := &b.windows[b.last]; addr >= w.base && addr-w.base < w.size {
		return w
	}
	i := sort.Search(len(b.windows), func(i int) bool { return b.windows[i].base > addr }) - 1
	if i >= 0 && addr-b.windows[i].base < b.windows[i].size {
		b.last = i
		return &b.windows[i]
	}
	return nil
}

// lookup returns the handler for addr, the offset in its window, the bytes left in
// the window from there, and the handler as Timed if it is; h is nil where nothing
// decodes.
func (b *Bus) lookup(addr uint64) (h Handler, off, left uint64, t Timed) {
	if w := b.fixed(addr); w != nil {
		off = addr - w.base
		return w.h, off, w.size - off, w.timed
	}
	if b.resolver != nil {
		h, off, left = b.resolver.Resolve(addr)
		t, _ = h.(Timed)
	}
	return h, off, left, t
}

// NeedsTime says whether an access at addr depends on the present time, so that the
// machine must sample the clock before it dispatches the access.
func (b *Bus) NeedsTime(addr uint64, write bool) bool {
	_, off, _, t := b.lookup(addr)
	return t != nil && t.NeedsTime(off, write)
}

// Read performs a guest's read of size bytes at addr. An access that runs past the
// end of its window is split into bytes, each decoded by itself.
func (b *Bus) Read(addr uint64, size int) uint64 {
	h, off, left, _ := b.lookup(addr)
	switch {
	case h == nil && size == 1:
		return 0xff
	case h == nil || left < uint64(size):
		var v uint64
		for i := 0; i < size; i++ {
			if h, off, _, _ := b.lookup(addr + uint64(i)); h != nil {
				v |= h.Read(off, 1) & 0xff << (8 * i)
			} else {
				v |= 0xff << (8 * i)
			}
		}
		return v
	}
	return h.Read(off, size)
}

// Write performs a guest's write of the low size bytes of v at addr, split like Read.
func (b *Bus) Write(addr uint64, size int, v uint64) {
	h, off, left, _ := b.lookup(addr)
	switch {
	case h == nil && size == 1:
	case h == nil || left < uint64(size):
		for i := 0; i < size; i++ {
			if h, off, _, _ := b.lookup(addr + uint64(i)); h != nil {
				h.Write(off, 1, v>>(8*i)&0xff)
			}
		}
	default:
		h.Write(off, size, v)
	}
}
