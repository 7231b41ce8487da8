// Package virtiotest is the other side of a virtio device for tests: a small guest
// driver that works through the registers and rings as a real one does, and keeps to the
// specification unless a test pokes at memory or registers itself.
package virtiotest

import (
	"encoding/binary"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/pci"
	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Guest memory of the tests: two regions with a hole between.
const (
	LowSize  = 32 << 20
	HighBase = 64 << 20
	HighSize = 1 << 20
)

// Offsets in the modern BAR and of its registers, written down here a second time so
// that a change of the device's own constants is noticed.
const (
	ModernBAR    = 4
	LegacyBAR    = 0
	Common       = 0x0000
	ISR          = 0x1000
	DeviceConfig = 0x2000
	Notify       = 0x3000
)

// Message is a message-signalled interrupt.
type Message struct {
	Addr uint64
	Data uint32
}

// Driver drives one device.
type Driver struct {
	TB     testing.TB // what failures are reported to
	Mem    *memory.Memory
	T      *virtio.Transport
	Modern devices.Handler // the BARs
	Legacy devices.Handler
	Rings  []*Ring

	Messages []Message // sent so far
	INTx     bool      // level of the line
	heap     uint64
}

// masked is a handler as the CPU sees it: without the bits above the size of the access.
type masked struct{ devices.Handler }

func (m masked) Read(off uint64, size int) uint64 {
	return m.Handler.Read(off, size) & (^uint64(0) >> (64 - 8*size))
}

// Send implements devices.MSI.
func (d *Driver) Send(addr uint64, data uint32) { d.Messages = append(d.Messages, Message{addr, data}) }

// New returns a driver with memory of its own and a device on it, which it has not
// touched but for enabling bus mastering.
func New(tb testing.TB, dev virtio.Device, opts virtio.Options) *Driver {
	mem, err := memory.New(memory.Extent{Base: 0, Size: LowSize}, memory.Extent{Base: HighBase, Size: HighSize})
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, mem.Close()) })
	d := &Driver{TB: tb, Mem: mem, heap: 0x10000}
	d.Plug(dev, opts)
	d.T.Function().WriteConfig(pci.RegCommand, 2, pci.CommandIO|pci.CommandMemory|pci.CommandMaster)
	return d
}

// Plug joins another device to the same guest: one that will be restored to the state of
// the first.
func (d *Driver) Plug(dev virtio.Device, opts virtio.Options) {
	if opts.Name == "" {
		opts.Name = "test"
	}
	d.T = virtio.New(d.Mem, d, dev, opts)
	f := d.T.Function()
	f.SetInterruptPin(devices.LineFunc(func(level bool) { d.INTx = level }))
	d.Modern, d.Legacy = masked{f.BARHandler(ModernBAR)}, nil
	if h := f.BARHandler(LegacyBAR); h != nil {
		d.Legacy = masked{h}
	}
}

// Alloc returns the address of n bytes of guest memory, aligned to a page.
func (d *Driver) Alloc(n uint64) uint64 {
	a := d.heap
	d.heap = (d.heap + n + memory.PageSize - 1) &^ (memory.PageSize - 1)
	require.LessOrEqual(d.TB, d.heap, uint64(LowSize), "the tests' guest memory is used up")
	return a
}

// Put returns the address of a copy of p in guest memory.
func (d *Driver) Put(p []byte) uint64 {
	a := d.Alloc(uint64(len(p)))
	require.NoError(d.TB, d.Mem.Write(a, p))
	return a
}

// Get returns a copy of guest memory.
func (d *Driver) Get(addr uint64, n int) []byte {
	p := make([]byte, n)
	require.NoError(d.TB, d.Mem.Read(addr, p))
	return p
}

// Offered returns the feature bits that the modern interface offers.
func (d *Driver) Offered() uint64 {
	d.Modern.Write(Common+0x00, 4, 0)
	low := d.Modern.Read(Common+0x04, 4)
	d.Modern.Write(Common+0x00, 4, 1)
	return low | d.Modern.Read(Common+0x04, 4)<<32
}

// Status returns the device status.
func (d *Driver) Status() uint8 { return uint8(d.Modern.Read(Common+0x14, 1)) }

// SetStatus writes the device status.
func (d *Driver) SetStatus(v uint8) { d.Modern.Write(Common+0x14, 1, uint64(v)) }

// Negotiate resets the device and offers to accept the features (and VERSION_1); it returns
// whether the device agreed.
func (d *Driver) Negotiate(features uint64) bool {
	d.SetStatus(0)
	d.SetStatus(virtio.StatusAcknowledge)
	d.SetStatus(virtio.StatusAcknowledge | virtio.StatusDriver)
	features |= virtio.FeatureVersion1
	for i := uint64(0); i < 2; i++ {
		d.Modern.Write(Common+0x08, 4, i)
		d.Modern.Write(Common+0x0c, 4, features>>(32*i)&0xffffffff)
	}
	d.SetStatus(virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFeaturesOK)
	return d.Status()&virtio.StatusFeaturesOK != 0
}

// Init brings the device up as a modern driver does, with those of the features that
// it offers, queues of the given size (0: as large as offered), and interrupts by MSI-X: vector 0
// for the configuration, i+1 for queue i.
func (d *Driver) Init(features uint64, size uint16) {
	require.True(d.TB, d.Negotiate(features&d.Offered()))
	d.EnableMSIX()
	d.SetQueues(size)
	d.SetStatus(virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFeaturesOK | virtio.StatusDriverOK)
}

// SetQueues sets up the queues of a modern device.
func (d *Driver) SetQueues(size uint16) {
	d.Modern.Write(Common+0x10, 2, 0)
	n := d.Modern.Read(Common+0x12, 2)
	d.Rings = nil
	for i := uint64(0); i < n; i++ {
		d.Modern.Write(Common+0x16, 2, i)
		d.Modern.Write(Common+0x1a, 2, i+1)
		if size != 0 {
			d.Modern.Write(Common+0x18, 2, uint64(size))
		}
		r := newRing(d, uint16(d.Modern.Read(Common+0x18, 2)), d.T.Has(virtio.FeatureRingEventIdx))
		r.kick = func(i uint64) func() {
			return func() { d.Modern.Write(Notify+4*i, 2, i) }
		}(i)
		d.Modern.Write(Common+0x20, 8, r.Desc)
		d.Modern.Write(Common+0x28, 4, r.Avail&0xffffffff)
		d.Modern.Write(Common+0x2c, 4, r.Avail>>32)
		d.Modern.Write(Common+0x30, 8, r.Used)
		d.Modern.Write(Common+0x1c, 2, 1)
		require.EqualValues(d.TB, 1, d.Modern.Read(Common+0x1c, 2))
		d.Rings = append(d.Rings, r)
	}
}

// InitLegacy brings the device up as a driver from before version 1 does, with the
// interrupt pin.
func (d *Driver) InitLegacy(features uint64) {
	d.Legacy.Write(0x12, 1, 0)
	d.Legacy.Write(0x12, 1, virtio.StatusAcknowledge|virtio.StatusDriver)
	d.Legacy.Write(0x04, 4, features&d.Legacy.Read(0x00, 4))
	d.Rings = nil
	for i := uint64(0); ; i++ {
		d.Legacy.Write(0x0e, 2, i)
		size := uint16(d.Legacy.Read(0x0c, 2))
		if size == 0 {
			break
		}
		r := newRing(d, size, d.T.Has(virtio.FeatureRingEventIdx))
		r.kick = func(i uint64) func() {
			return func() { d.Legacy.Write(0x10, 2, i) }
		}(i)
		d.Legacy.Write(0x08, 4, r.Desc/memory.PageSize)
		d.Rings = append(d.Rings, r)
	}
	d.Legacy.Write(0x12, 1, virtio.StatusAcknowledge|virtio.StatusDriver|virtio.StatusDriverOK)
}

// EnableMSIX enables MSI-X and gives vector i the message (0xfee00000, 0x40+i).
func (d *Driver) EnableMSIX() {
	f := d.T.Function()
	at := uint64(f.Byte(pci.RegCapabilities))
	for f.Byte(uint8(at)) != 0x11 {
		at = uint64(f.Byte(uint8(at + 1)))
		require.NotZero(d.TB, at, "no MSI-X")
	}
	n := f.ReadConfig(at+2, 2)&0x7ff + 1
	table := f.BARHandler(1)
	for i := uint64(0); i < n; i++ {
		table.Write(16*i, 8, 0xfee00000)
		table.Write(16*i+8, 4, 0x40+i)
		table.Write(16*i+12, 4, 0)
	}
	f.WriteConfig(at+2, 2, 0x8000)
}

// TakeMessages returns the data of the messages since the last call.
func (d *Driver) TakeMessages() (data []uint32) {
	for _, m := range d.Messages {
		data = append(data, m.Data)
	}
	d.Messages = d.Messages[:0]
	return data
}

// Buf is one buffer of a chain.
type Buf struct {
	Addr  uint64
	Len   uint32
	Write bool // by the device
}

// Out is a buffer that the device reads, In one that it writes.
func Out(addr uint64, n int) Buf { return Buf{addr, uint32(n), false} }

// In is a buffer that the device writes.
func In(addr uint64, n int) Buf { return Buf{addr, uint32(n), true} }

// Ring is the driver's side of a queue.
type Ring struct {
	d                 *Driver
	Size              uint16
	Desc, Avail, Used uint64
	eventIdx          bool
	free              []uint16
	chain             []uint16 // for each descriptor, how many follow it in its chain
	next              []uint16
	availIdx, seen    uint16
	kick              func()
}

func newRing(d *Driver, size uint16, eventIdx bool) *Ring {
	n := uint64(size)
	r := &Ring{d: d, Size: size, eventIdx: eventIdx, chain: make([]uint16, n), next: make([]uint16, n)}
	r.Desc = d.Alloc(16*n + 6 + 2*n + 4095 + 6 + 8*n)
	r.Avail = r.Desc + 16*n
	r.Used = (r.Avail + 6 + 2*n + 4095) &^ 4095
	for i := int(size) - 1; i >= 0; i-- {
		r.free = append(r.free, uint16(i))
	}
	return r
}

// SetDesc writes a descriptor.
func (r *Ring) SetDesc(table uint64, i uint16, addr uint64, n uint32, flags, next uint16) {
	b, err := r.d.Mem.Mutable(table+16*uint64(i), 16)
	require.NoError(r.d.TB, err)
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], n)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// Add makes a chain of the buffers available and returns its head.
func (r *Ring) Add(bufs ...Buf) uint16 {
	n := len(bufs)
	require.LessOrEqual(r.d.TB, n, len(r.free), "ring is full")
	var head, next uint16
	for i := n - 1; i >= 0; i-- {
		head = r.free[len(r.free)-1]
		r.free = r.free[:len(r.free)-1]
		var flags uint16
		if bufs[i].Write {
			flags |= 2
		}
		if i < n-1 {
			flags |= 1
		}
		r.SetDesc(r.Desc, head, bufs[i].Addr, bufs[i].Len, flags, next)
		r.chain[head], r.next[head] = uint16(n-1-i), next
		next = head
	}
	r.Offer(head)
	return head
}

// AddIndirect makes a chain of one descriptor available, which refers to a table at a
// fresh address.
func (r *Ring) AddIndirect(bufs ...Buf) uint16 {
	table := r.d.Alloc(uint64(16 * len(bufs)))
	for i, b := range bufs {
		var flags uint16
		if b.Write {
			flags |= 2
		}
		if i < len(bufs)-1 {
			flags |= 1
		}
		r.SetDesc(table, uint16(i), b.Addr, b.Len, flags, uint16(i+1))
	}
	head := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	r.SetDesc(r.Desc, head, table, uint32(16*len(bufs)), 4, 0)
	r.chain[head] = 0
	r.Offer(head)
	return head
}

// Offer puts a head into the available ring.
func (r *Ring) Offer(head uint16) {
	require.NoError(r.d.TB, r.d.Mem.PutUint16(r.Avail+4+2*uint64(r.availIdx%r.Size), head))
	r.SetAvailIdx(r.availIdx + 1)
}

// SetAvailIdx sets the index of the available ring.
func (r *Ring) SetAvailIdx(i uint16) {
	r.availIdx = i
	require.NoError(r.d.TB, r.d.Mem.PutUint16(r.Avail+2, i))
}

// Room returns how many descriptors are free.
func (r *Ring) Room() int { return len(r.free) }

// Kick notifies the device.
func (r *Ring) Kick() { r.kick() }

// AvailEvent returns the index at whose passing the device wants to be notified.
func (r *Ring) AvailEvent() uint16 {
	v, err := r.d.Mem.Uint16(r.Used + 4 + 8*uint64(r.Size))
	require.NoError(r.d.TB, err)
	return v
}

// SetUsedEvent sets the index at whose passing the driver wants an interrupt.
func (r *Ring) SetUsedEvent(v uint16) {
	require.NoError(r.d.TB, r.d.Mem.PutUint16(r.Avail+4+2*uint64(r.Size), v))
}

// SetNoInterrupt sets or clears the flag by which the driver asks for silence.
func (r *Ring) SetNoInterrupt(on bool) {
	var v uint16
	if on {
		v = 1
	}
	require.NoError(r.d.TB, r.d.Mem.PutUint16(r.Avail, v))
}

// Done is a chain that the device has given back.
type Done struct {
	Head uint16
	Len  uint32
}

// Take returns the next chain that the device has given back, and asks for an interrupt
// with the one after.
func (r *Ring) Take() (done Done, ok bool) {
	idx, err := r.d.Mem.Uint16(r.Used + 2)
	require.NoError(r.d.TB, err)
	if idx == r.seen {
		return Done{}, false
	}
	at := r.Used + 4 + 8*uint64(r.seen%r.Size)
	id, err := r.d.Mem.Uint32(at)
	require.NoError(r.d.TB, err)
	n, err := r.d.Mem.Uint32(at + 4)
	require.NoError(r.d.TB, err)
	require.Less(r.d.TB, id, uint32(r.Size))
	head := uint16(id)
	for i, left := head, int(r.chain[head]); left >= 0; left-- {
		r.free = append(r.free, i)
		i = r.next[i]
	}
	r.seen++
	if r.eventIdx {
		r.SetUsedEvent(r.seen)
	}
	return Done{head, n}, true
}

// TakeAll returns everything that the device has given back.
func (r *Ring) TakeAll() (all []Done) {
	for {
		d, ok := r.Take()
		if !ok {
			return all
		}
		all = append(all, d)
	}
}

// Encoded returns s after a trip through the encoding that states travel in.
func Encoded[T any](tb testing.TB, s T) T {
	b, err := cbor.Marshal(s)
	require.NoError(tb, err)
	var back T
	require.NoError(tb, cbor.Unmarshal(b, &back))
	return back
}
