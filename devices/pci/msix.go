package pci

import (
	"encoding/binary"
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
)

// MaxVectors is the largest MSI-X table (PCI 3.0, 6.8.2.3).
const MaxVectors = 2048

const (
	capMSIX = 0x11

	msixEnable       = 1 << 15 // of message control
	msixFunctionMask = 1 << 14
	msixEntrySize    = 16
	msixEntryMask    = 1 << 0 // of vector control, the one bit that exists there
)

// MSIXEntry is one entry of an MSI-X table (PCI 3.0, 6.8.2.6 to 6.8.2.9).
type MSIXEntry struct {
	Addr    uint64
	Data    uint32
	Control uint32
}

// MSIX is a function's message-signalled interrupts: the table of messages and the
// array of pending bits. Its enable and mask bits are in the function's configuration
// space.
type MSIX struct {
	f       *Function
	control int // offset of message control
	msi     devices.MSI
	entries []MSIXEntry
	pending []uint64
}

// AddMSIX gives the function MSI-X with the given number of vectors. Table and
// pending bits are windows at tableOffset and pbaOffset (multiples of 8) of BAR bar, which
// must exist.
func (f *Function) AddMSIX(msi devices.MSI, vectors int, bar int, tableOffset, pbaOffset uint32) *MSIX {
	if vectors < 1 || vectors > MaxVectors || tableOffset%8 != 0 || pbaOffset%8 != 0 || f.msix != nil {
		f.defect("MSI-X with %d vectors at %#x and %#x", vectors, tableOffset, pbaOffset)
	}
	m := &MSIX{
		f:       f,
		msi:     msi,
		entries: make([]MSIXEntry, vectors),
		pending: make([]uint64, (vectors+63)/64),
	}
	f.AddBARWindow(bar, uint64(tableOffset), uint64(vectors)*msixEntrySize, (*msixTable)(m))
	f.AddBARWindow(bar, uint64(pbaOffset), uint64(len(m.pending))*8, (*msixPending)(m))
	body := binary.LittleEndian.AppendUint16(nil, uint16(vectors-1))
	body = binary.LittleEndian.AppendUint32(body, tableOffset|uint32(bar))
	body = binary.LittleEndian.AppendUint32(body, pbaOffset|uint32(bar))
	const writable = msixEnable | msixFunctionMask
	m.control = int(f.AddCapability(capMSIX, body, []byte{writable & 0xff, writable >> 8})) + 2
	f.msix = m
	m.Reset()
	return m
}

// Enabled says whether the guest uses MSI-X; INTA# is silent then.
func (m *MSIX) Enabled() bool { return m.f.Word(uint8(m.control))&msixEnable != 0 }

// Masked says whether the guest has masked all vectors of the function.
func (m *MSIX) Masked() bool { return m.f.Word(uint8(m.control))&msixFunctionMask != 0 }

// open says whether messages may leave: a message is a memory write of the function,
// so it also needs bus mastering.
func (m *MSIX) open() bool { return m.Enabled() && !m.Masked() && m.f.BusMaster() }

// Trigger sends the message of a vector, or makes it pending until the guest unmasks
// it (or lets the function write to memory). Without MSI-X enabled, and for a vector
// that does not exist, it does nothing.
func (m *MSIX) Trigger(vector uint16) {
	if int(vector) >= len(m.entries) || !m.Enabled() {
		return
	}
	if e := &m.entries[vector]; m.open() && e.Control&msixEntryMask == 0 {
		m.msi.Send(e.Addr, e.Data)
		return
	}
	m.pending[vector/64] |= 1 << (vector % 64)
}

// sendPending sends what may leave by now, lowest vector first.
func (m *MSIX) sendPending() {
	if !m.open() {
		return
	}
	for i, word := range m.pending {
		if word == 0 {
			continue
		}
		for bit := range 64 {
			if v := i*64 + bit; word>>bit&1 != 0 {
				m.sendIfPending(v)
			}
		}
	}
}

func (m *MSIX) sendIfPending(v int) {
	bit := uint64(1) << (v % 64)
	if e := &m.entries[v]; m.open() && m.pending[v/64]&bit != 0 && e.Control&msixEntryMask == 0 {
		m.pending[v/64] &^= bit
		m.msi.Send(e.Addr, e.Data)
	}
}

// Reset masks every vector, empties the table and forgets what is pending.
func (m *MSIX) Reset() {
	for i := range m.entries {
		m.entries[i] = MSIXEntry{Control: msixEntryMask}
	}
	clear(m.pending)
}

// MSIXState is the saved form of an [MSIX]: the table and the pending bits, 64 to a
// word.
type MSIXState struct {
	Entries []MSIXEntry
	Pending []uint64
}

// Save returns a copy of the table and the pending bits.
func (m *MSIX) Save() MSIXState {
	return MSIXState{append([]MSIXEntry(nil), m.entries...), append([]uint64(nil), m.pending...)}
}

// Restore sets table and pending bits. It sends nothing.
func (m *MSIX) Restore(s MSIXState) error {
	if len(s.Entries) != len(m.entries) || len(s.Pending) != len(m.pending) {
		return fmt.Errorf("pci: %s: saved MSI-X has %d vectors, want %d", m.f.name, len(s.Entries), len(m.entries))
	}
	for i, e := range s.Entries {
		if e.Control&^msixEntryMask != 0 || e.Addr%4 != 0 {
			return fmt.Errorf("pci: %s: saved MSI-X vector %d has reserved bits set", m.f.name, i)
		}
	}
	if spare := len(m.entries) % 64; spare != 0 && s.Pending[len(s.Pending)-1]>>spare != 0 {
		return fmt.Errorf("pci: %s: saved MSI-X vector is pending beyond the table", m.f.name)
	}
	copy(m.entries, s.Entries)
	copy(m.pending, s.Pending)
	return nil
}

// word returns the table's 32-bit word n, four to an entry.
func (m *MSIX) word(n uint64) uint32 {
	e := &m.entries[n/4]
	switch n % 4 {
	case 0:
		return uint32(e.Addr)
	case 1:
		return uint32(e.Addr >> 32)
	case 2:
		return e.Data
	}
	return e.Control
}

// setWord stores the bits of v that mask has in the table's word n.
func (m *MSIX) setWord(n uint64, v, mask uint32) {
	v = m.word(n)&^mask | v&mask
	e := &m.entries[n/4]
	switch n % 4 {
	case 0:
		e.Addr = e.Addr>>32<<32 | uint64(v&^3) // PCI 3.0, 6.8.2.7: a message is aligned
	case 1:
		e.Addr = e.Addr&(1<<32-1) | uint64(v)<<32
	case 2:
		e.Data = v
	case 3:
		e.Control = v & msixEntryMask
	}
}

// msixTable is the window of the table. The specification knows aligned accesses of 4
// and 8 bytes (6.8.2); others work here as one expects of memory.
type msixTable MSIX

// Read implements [devices.Handler].
func (t *msixTable) Read(off uint64, size int) (v uint64) {
	m := (*MSIX)(t)
	for i := range size {
		at := off + uint64(i)
		if at >= uint64(len(m.entries))*msixEntrySize {
			break
		}
		v |= uint64(m.word(at/4)>>(8*(at%4))&0xff) << (8 * i)
	}
	return v
}

// Write implements [devices.Handler].
func (t *msixTable) Write(off uint64, size int, v uint64) {
	m := (*MSIX)(t)
	end := min(off+uint64(size), uint64(len(m.entries))*msixEntrySize)
	for at := off; at < end; at++ {
		shift := 8 * (at % 4)
		m.setWord(at/4, uint32(v>>(8*(at-off)))<<shift, 0xff<<shift)
	}
	// Only now, so that a message is never sent half-written: an access may touch the
	// entry before its mask bit, and two entries when it is not aligned.
	for e := off / msixEntrySize; e*msixEntrySize < end; e++ {
		m.sendIfPending(int(e))
	}
}

// msixPending is the window of the pending bits, read-only to the guest (6.8.2.10).
type msixPending MSIX

// Read implements [devices.Handler].
func (p *msixPending) Read(off uint64, size int) (v uint64) {
	for i := range size {
		if at := off + uint64(i); at/8 < uint64(len(p.pending)) {
			v |= p.pending[at/8] >> (8 * (at % 8)) & 0xff << (8 * i)
		}
	}
	return v
}

// Write implements [devices.Handler].
func (*msixPending) Write(uint64, int, uint64) {}
