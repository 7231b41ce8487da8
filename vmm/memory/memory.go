// Package memory is a guest's physical memory.
//
// Two ideas carry it. First, every access names a guest-physical address and a
// length that may come from a hostile guest, so every access is checked, and an
// access outside RAM is an [ErrOutside] that the device turns into the failure
// that its specification names: no method panics on a guest's numbers. Second,
// the virtual machine monitor (VMM) itself writes guest memory (DMA of emulated
// devices) and KVM's dirty log does not see those writes, so every write that goes
// through this package also marks the page in a dirty bitmap of our own; whoever
// copies "all pages that changed" takes the union of both logs.
//
// The package does no locking. Guest memory is written by the vCPU loop alone,
// while the vCPU is stopped (docs/determinism.md); the dirty bitmap belongs to the same
// goroutine.
package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sort"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PageSize is the granule of dirty tracking, in bytes: the 4 KiB page of x86.
const PageSize = 4096

// hugePage is the size of x86's large pages, in bytes.
const hugePage = 2 << 20

// MaxRegions bounds the number of RAM regions of one guest.
const MaxRegions = 16

// ErrOutside reports an access to guest-physical addresses that are not RAM.
var ErrOutside = errors.New("memory: address outside guest RAM")

// Region is one contiguous piece of guest RAM.
type Region struct {
	// Base is the guest-physical address of the first byte; a multiple of PageSize.
	Base uint64
	// Bytes is the host mapping; its length is the region's size.
	Bytes []byte

	mapping []byte   // what Bytes is a part of
	dirty   []uint64 // one bit a page, set by writes through Memory
}

// End returns the guest-physical address just past the region.
func (r *Region) End() uint64 { return r.Base + uint64(len(r.Bytes)) }

// Memory is the RAM of one guest: up to [MaxRegions] regions, sorted, disjoint.
type Memory struct {
	regions []*Region
}

// Extent is a piece of guest-physical address space: Base in bytes, Size in bytes.
type Extent struct {
	Base, Size uint64
}

// New maps anonymous, zeroed, huge-page-advised host memory for each extent.
// Extents must be page-aligned, non-empty and disjoint.
func New(extents ...Extent) (*Memory, error) {
	if len(extents) == 0 || len(extents) > MaxRegions {
		return nil, fmt.Errorf("memory: %d regions, want 1 to %d", len(extents), MaxRegions)
	}
	m := &Memory{}
	for _, e := range extents {
		if e.Base%PageSize != 0 || e.Size%PageSize != 0 || e.Size == 0 || e.Base+e.Size < e.Base {
			m.Close()
			return nil, fmt.Errorf("memory: region %#x+%#x is not a non-empty run of whole pages", e.Base, e.Size)
		}
		// KVM can use a huge page only where guest and host addresses agree modulo its size.
		pad := e.Base % hugePage
		whole, err := unix.Mmap(-1, 0, int(e.Size+pad+hugePage), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			m.Close()
			return nil, fmt.Errorf("memory: map %d bytes of guest memory: %w", e.Size, err)
		}
		at := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(whole))))
		skip := (hugePage-at%hugePage)%hugePage + pad
		b := whole[skip : skip+e.Size : skip+e.Size]
		// Huge pages make the first touch and the re-protection of pages cheap
		// (docs/kvm.md); a host that has none is slower, not wrong.
		_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
		// A core file of the VMM must not carry the guest's memory.
		_ = unix.Madvise(b, unix.MADV_DONTDUMP)
		pages := uint64(len(b)) / PageSize
		m.regions = append(m.regions, &Region{Base: e.Base, Bytes: b, mapping: whole, dirty: make([]uint64, (pages+63)/64)})
	}
	sort.Slice(m.regions, func(i, j int) bool { return m.regions[i].Base < m.regions[j].Base })
	for i := 1; i < len(m.regions); i++ {
		if m.regions[i-1].End() > m.regions[i].Base {
			at := m.regions[i].Base
			m.Close()
			return nil, fmt.Errorf("memory: regions overlap at %#x", at)
		}
	}
	return m, nil
}

// Close unmaps the memory. Nothing may use it afterwards, KVM included.
func (m *Memory) Close() error {
	var first error
	for _, r := range m.regions {
		if err := unix.Munmap(r.mapping); err != nil && first == nil {
			first = err
		}
		r.Bytes = nil
	}
	m.regions = nil
	return first
}

// Regions returns the regions in ascending order of address.
func (m *Memory) Regions() []*Region { return m.regions }

// Size returns the amount of RAM in bytes.
func (m *Memory) Size() uint64 {
	var n uint64
	for _, r := range m.regions {
		n += uint64(len(r.Bytes))
	}
	return n
}

// find returns the region that holds all of [gpa, gpa+n), or nil.
func (m *Memory) find(gpa, n uint64) *Region {
	for _, r := range m.regions {
		if gpa >= r.Base && gpa-r.Base < uint64(len(r.Bytes)) {
			if n <= uint64(len(r.Bytes))-(gpa-r.Base) {
				return r
			}
			return nil
		}
	}
	return nil
}

func outside(gpa, n uint64) error {
	return fmt.Errorf("%w: %#x+%#x", ErrOutside, gpa, n)
}

// Contains says whether all of [gpa, gpa+n) lies in one region of RAM.
func (m *Memory) Contains(gpa, n uint64) bool { return m.find(gpa, n) != nil }

// View returns guest memory [gpa, gpa+n) for reading, without copying. The caller
// must not write to it (writes would escape dirty tracking) nor keep it past the
// current stop of the vCPU.
func (m *Memory) View(gpa, n uint64) ([]byte, error) {
	r := m.find(gpa, n)
	if r == nil {
		return nil, outside(gpa, n)
	}
	o := gpa - r.Base
	return r.Bytes[o : o+n : o+n], nil
}

// Mutable returns guest memory [gpa, gpa+n) for writing and marks it dirty. The
// caller must not keep it past the current stop of the vCPU.
func (m *Memory) Mutable(gpa, n uint64) ([]byte, error) {
	r := m.find(gpa, n)
	if r == nil {
		return nil, outside(gpa, n)
	}
	o := gpa - r.Base
	r.mark(o, n)
	return r.Bytes[o : o+n : o+n], nil
}

// Read copies len(p) bytes from guest-physical address gpa.
func (m *Memory) Read(gpa uint64, p []byte) error {
	b, err := m.View(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(p, b)
	return nil
}

// Write copies p to guest-physical address gpa and marks the pages dirty. It
// writes all of p or nothing.
func (m *Memory) Write(gpa uint64, p []byte) error {
	b, err := m.Mutable(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(b, p)
	return nil
}

// Uint16 reads a little-endian 16-bit word.
func (m *Memory) Uint16(gpa uint64) (uint16, error) {
	b, err := m.View(gpa, 2)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint16(b), nil
}

// Uint32 reads a little-endian 32-bit word.
func (m *Memory) Uint32(gpa uint64) (uint32, error) {
	b, err := m.View(gpa, 4)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b), nil
}

// Uint64 reads a little-endian 64-bit word.
func (m *Memory) Uint64(gpa uint64) (uint64, error) {
	b, err := m.View(gpa, 8)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

// PutUint16 writes a little-endian 16-bit word.
func (m *Memory) PutUint16(gpa uint64, v uint16) error {
	b, err := m.Mutable(gpa, 2)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint16(b, v)
	return nil
}

// PutUint32 writes a little-endian 32-bit word.
func (m *Memory) PutUint32(gpa uint64, v uint32) error {
	b, err := m.Mutable(gpa, 4)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(b, v)
	return nil
}

// PutUint64 writes a little-endian 64-bit word.
func (m *Memory) PutUint64(gpa uint64, v uint64) error {
	b, err := m.Mutable(gpa, 8)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(b, v)
	return nil
}

// mark sets the dirty bits of [off, off+n) within the region.
func (r *Region) mark(off, n uint64) {
	if n == 0 {
		return
	}
	for p := off / PageSize; p <= (off+n-1)/PageSize; p++ {
		r.dirty[p/64] |= 1 << (p % 64)
	}
}

// TakeDirty calls f with the guest-physical address of every page that was written
// through this package since the last call, in ascending order, and clears the marks.
func (m *Memory) TakeDirty(f func(gpa uint64)) {
	for _, r := range m.regions {
		for i, w := range r.dirty {
			r.dirty[i] = 0
			for ; w != 0; w &= w - 1 {
				f(r.Base + uint64(i*64+bits.TrailingZeros64(w))*PageSize)
			}
		}
	}
}

// Clear makes all memory read as zeros and gives its pages back to the host. The dirty
// marks stay as they are.
func (m *Memory) Clear() error {
	for _, r := range m.regions {
		// Private anonymous memory reads as zeros after MADV_DONTNEED.
		if err := unix.Madvise(r.Bytes, unix.MADV_DONTNEED); err != nil {
			return fmt.Errorf("memory: clear: %w", err)
		}
	}
	return nil
}
