package pci

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
)

// bytesAt is a window of plain storage.
type bytesAt []byte

func (b bytesAt) Read(off uint64, size int) (v uint64) {
	for i := range size {
		v |= uint64(b[int(off)+i]) << (8 * i)
	}
	return v
}

func (b bytesAt) Write(off uint64, size int, v uint64) {
	for i := range size {
		b[int(off)+i] = byte(v >> (8 * i))
	}
}

// message is one message-signalled interrupt.
type message struct {
	addr uint64
	data uint32
}

type messages []message

func (m *messages) Send(addr uint64, data uint32) { *m = append(*m, message{addr, data}) }

var testID = Identity{Vendor: 0x1af4, Device: 0x1041, SubVendor: 0x1af4, SubDevice: 0x1100, Class: 0x020000, Revision: 1}

// fixture is a bus with one function, reached through both address spaces like a
// guest's accesses.
type fixture struct {
	bus      *Bus
	f        *Function
	ports    *devices.Bus
	memory   *devices.Bus
	io, mem  bytesAt
	msix     *MSIX
	messages messages
	line     bool
}

const (
	testDevfn = 3 << 3
	ioSize    = 0x40
	memSize   = 0x4000
	tableAt   = 0x1000
	pbaAt     = 0x2000
	vectors   = 70
)

func newFixture(t require.TestingT) *fixture {
	x := &fixture{bus: NewBus(), ports: devices.NewPortBus(), memory: devices.NewMemoryBus()}
	x.io, x.mem = make(bytesAt, ioSize), make(bytesAt, memSize)
	x.f = NewFunction("test", testID)
	x.f.AddBAR(0, IO, ioSize, x.io)
	x.f.AddBAR(4, Mem64, memSize, x.mem)
	x.msix = x.f.AddMSIX(&x.messages, vectors, 4, tableAt, pbaAt)
	x.f.SetROM([]byte{0x55, 0xaa, 0x11})
	x.f.SetInterruptPin(devices.LineFunc(func(l bool) { x.line = l }))
	require.NoError(t, x.bus.Add(testDevfn, x.f))
	require.NoError(t, x.ports.Map(ConfigBase, ConfigPorts, x.bus.ConfigPorts()))
	x.ports.SetResolver(x.bus.IO())
	x.memory.SetResolver(x.bus.Memory())
	return x
}

func (x *fixture) read(reg uint64, size int) uint64 {
	x.ports.Write(0xcf8, 4, 1<<31|testDevfn<<8|reg&^3)
	return x.ports.Read(0xcfc+reg&3, size)
}

func (x *fixture) write(reg uint64, size int, v uint64) {
	x.ports.Write(0xcf8, 4, 1<<31|testDevfn<<8|reg&^3)
	x.ports.Write(0xcfc+reg&3, size, v)
}

func TestHeaderHasTheIdentity(t *testing.T) {
	x := newFixture(t)
	for _, c := range []struct {
		reg  uint64
		size int
		want uint64
	}{
		{RegVendorID, 2, 0x1af4}, {RegDeviceID, 2, 0x1041}, {RegVendorID, 4, 0x10411af4},
		{RegCommand, 2, 0}, {RegStatus, 2, StatusCapabilities},
		{RegRevision, 4, 0x02000001}, {RegHeaderType, 1, 0},
		{RegBAR0, 4, 1}, {0x14, 4, 0}, {0x20, 4, 0xc}, {0x24, 4, 0},
		{RegSubVendorID, 4, 0x11001af4}, {RegCapabilities, 1, 0x40}, {RegInterruptPin, 1, 1},
		{0x40, 4, 0x0045_0011}, {0x44, 4, tableAt | 4}, {0x48, 4, pbaAt | 4},
	} {
		require.Equal(t, c.want, x.read(c.reg, c.size), "register %#x", c.reg)
	}
	x.write(0, 4, 0xffffffff)
	require.EqualValues(t, 0x10411af4, x.read(0, 4), "identifiers are read-only")
}

func TestWritingOnesToABARShowsItsSize(t *testing.T) {
	x := newFixture(t)
	for _, c := range []struct{ reg, want uint64 }{
		{0x10, 0xffffffff&^(ioSize-1) | 1}, {0x14, 0}, {0x20, 0xffffffff&^(memSize-1) | 0xc}, {0x24, 0xffffffff},
		{RegROM, 0xfffff800 | 1},
	} {
		x.write(c.reg, 4, 0xffffffff)
		require.Equal(t, c.want, x.read(c.reg, 4), "register %#x", c.reg)
	}
	x.write(RegCommand, 2, 0xffff)
	require.EqualValues(t, commandWritable, x.read(RegCommand, 2))
	require.EqualValues(t, 0x55, x.memory.Read(0xfffff800, 1), "a window may end with its space")
}

func TestDecodingFollowsCommandAndBARs(t *testing.T) {
	x := newFixture(t)
	x.mem[8], x.io[3] = 0xab, 0xcd
	x.write(0x10, 4, 0xc000)
	x.write(0x20, 4, 0xe0000000)
	x.write(0x24, 4, 0x12)
	const mem = 0x12_e000_0000
	require.EqualValues(t, 0xff, x.memory.Read(mem+8, 1))
	require.EqualValues(t, 0xff, x.ports.Read(0xc003, 1))
	x.write(RegCommand, 2, CommandMemory)
	require.EqualValues(t, 0xab, x.memory.Read(mem+8, 1))
	require.EqualValues(t, 0xff, x.ports.Read(0xc003, 1))
	x.write(RegCommand, 2, CommandMemory|CommandIO)
	require.EqualValues(t, 0xcd, x.ports.Read(0xc003, 1))
	require.EqualValues(t, 0xff, x.ports.Read(0xc040, 1))
	x.write(0x24, 4, 0x13)
	require.EqualValues(t, 0xff, x.memory.Read(mem+8, 1))
	require.EqualValues(t, 0xab, x.memory.Read(mem+8+1<<32, 1))
	x.write(0x10, 4, 0x1c000) // ports end at 0xffff
	require.EqualValues(t, 0xff, x.ports.Read(0xc003, 1))
	x.write(0x24, 4, 0xffffffff)
	x.write(0x20, 4, 0xffffc000)
	require.NotPanics(t, func() { x.memory.Read(0xffffffff_fffffff8, 8) })
	x.bus.Memory().Resolve(0)
	x.f.SetLong(0x20, 0xe000000c)
	x.f.SetLong(0x24, 0x12)
	placed := x.f.Save()
	x.f.Reset()
	require.EqualValues(t, 0xff, x.memory.Read(mem+8, 1), "reset")
	require.NoError(t, x.f.Restore(placed))
	require.EqualValues(t, 0xab, x.memory.Read(mem+8, 1), "restored")
	require.Zero(t, testing.AllocsPerRun(100, func() {
		x.f.moved()
		x.bus.Memory().Resolve(mem)
	}), "looking up after a move")
}

func TestExpansionROMNeedsBothEnables(t *testing.T) {
	x := newFixture(t)
	x.write(RegROM, 4, 0xd0000000)
	x.write(RegCommand, 2, CommandMemory)
	require.EqualValues(t, 0xffff, x.memory.Read(0xd0000000, 2))
	x.write(RegROM, 4, 0xd0000001)
	require.EqualValues(t, 0xff11aa55, x.memory.Read(0xd0000000, 4))
	x.memory.Write(0xd0000000, 4, 0)
	require.EqualValues(t, 0xaa55, x.memory.Read(0xd0000000, 2))
	require.EqualValues(t, 0xff, x.memory.Read(0xd00007ff, 1))
	require.EqualValues(t, ones(4), x.memory.Read(0xd0000800, 4))
}

// TestExpansionROMIsTheFunctions: an image for PCs of another device of the family says that
// it is for this function, and its sum stays zero; anything else is served as it is.
func TestExpansionROMIsTheFunctions(t *testing.T) {
	const at = 0x1c
	image := func(edit func(b []byte)) []byte {
		b := make([]byte, 1024)
		copy(b, []byte{0x55, 0xaa, 2})
		b[0x18] = at
		copy(b[at:], "PCIR\x34\x12\x78\x56")
		b[at+0x12] = 0x80
		b[6] = -sum8(b)
		if edit != nil {
			edit(b)
		}
		return b
	}
	serve := func(b []byte) []byte {
		f := NewFunction("test", testID)
		f.SetROM(b)
		got := make([]byte, len(b))
		for i := range got {
			got[i] = byte(f.bars[romIndex].windows[0].h.Read(uint64(i), 1))
		}
		return got
	}
	got := serve(image(nil))
	require.Equal(t, []byte("PCIR\xf4\x1a\x41\x10"), got[at:at+8])
	require.Zero(t, sum8(got))
	for name, b := range map[string][]byte{
		"no ROM":                   image(func(b []byte) { b[0] = 0 }),
		"for another processor":    image(func(b []byte) { b[at+0x14] = 3 }),
		"no PCI data structure":    image(func(b []byte) { b[at] = 'Q' }),
		"data within the header":   image(func(b []byte) { b[0x18] = 0x10; copy(b[0x10:], "PCIR") }),
		"data beyond the image":    image(func(b []byte) { b[2] = 0 }),
		"data across the end":      image(func(b []byte) { copy(b[0x3f0:], "PCIR"); b[0x18], b[0x19] = 0xf0, 3 }),
		"image longer than itself": image(func(b []byte) { b[2] = 3 }),
		"nearly nothing":           {0x55, 0xaa, 0},
	} {
		require.Equal(t, b, serve(b), name)
	}
	require.NotPanics(t, func() { serve(image(func(b []byte) { b[0x18], b[0x19] = 0xff, 0xff })) })
}

func TestConfigurationMechanism(t *testing.T) {
	x := newFixture(t)
	id := func() uint64 { return x.ports.Read(0xcfc, 4) }
	x.ports.Write(0xcf8, 4, 1<<31|testDevfn<<8)
	require.EqualValues(t, 0x10411af4, id())

	for name, c := range map[string]struct{ address, want uint64 }{
		"disabled":            {testDevfn << 8, ones(4)},
		"another bus":         {1<<31 | 1<<16 | testDevfn<<8, ones(4)},
		"another device":      {1<<31 | (testDevfn+8)<<8, ones(4)},
		"another function":    {1<<31 | (testDevfn+1)<<8, ones(4)},
		"reserved bits":       {1<<31 | 0x7f<<24 | testDevfn<<8 | 3, 0x10411af4},
		"the last register":   {1<<31 | testDevfn<<8 | 0xfc, 0},
		"sub-device as dword": {1<<31 | testDevfn<<8 | 0x2c, 0x11001af4},
	} {
		x.ports.Write(0xcf8, 4, c.address)
		require.Equal(t, c.want, id(), name)
		require.Equal(t, c.address&addressMask, x.ports.Read(0xcf8, 4), name)
	}

	x.ports.Write(0xcf8, 4, 1<<31|testDevfn<<8)
	for _, size := range []int{1, 2} { // narrow accesses go to ISA, not to the register
		require.Equal(t, ones(size), x.ports.Read(0xcf8, size))
		x.ports.Write(0xcf8, size, 0)
	}
	x.ports.Write(0xcfb, 1, 0)
	require.EqualValues(t, 1<<31|testDevfn<<8, x.ports.Read(0xcf8, 4))
	require.EqualValues(t, 0x41, x.ports.Read(0xcfe, 1))
	require.EqualValues(t, 0x411a, x.ports.Read(0xcfd, 2))
	require.EqualValues(t, 0xf4ff, x.ports.Read(0xcfb, 2), "across the border only data bytes answer")
	require.EqualValues(t, 0xff10411a, x.ports.Read(0xcfd, 4), "past the end of the window")

	reset := make(bytesAt, 1)
	require.EqualValues(t, 0xff, x.ports.Read(0xcf9, 1))
	x.bus.SetResetControl(reset)
	x.ports.Write(0xcf9, 1, 6)
	require.EqualValues(t, 6, reset[0])
	require.EqualValues(t, 6, x.ports.Read(0xcf9, 1))
}

func TestDeviceWithSeveralFunctionsSaysSo(t *testing.T) {
	b := NewBus()
	zero, one := NewFunction("zero", testID), NewFunction("one", testID)
	require.NoError(t, b.Add(8|1, one))
	require.NoError(t, b.Add(8, zero))
	require.Error(t, b.Add(8, NewFunction("again", testID)))
	require.Error(t, b.Add(9<<3, one))
	require.EqualValues(t, 0x80, zero.Byte(RegHeaderType))
	require.Zero(t, one.Byte(RegHeaderType))
	zero.Reset()
	require.EqualValues(t, 0x80, zero.Byte(RegHeaderType))
}

func TestCapabilityHandlerOwnsTheBody(t *testing.T) {
	f := NewFunction("test", testID)
	first := f.AddCapability(9, []byte{1, 2, 3, 4, 5, 6}, []byte{0, 0xf0})
	second := f.AddCapability(5, []byte{7}, nil)
	require.EqualValues(t, 0x40, first)
	require.EqualValues(t, 0x48, second)
	require.EqualValues(t, 0x02014809, f.ReadConfig(0x40, 4))
	require.EqualValues(t, 0x00070005, f.ReadConfig(0x48, 4))
	f.WriteConfig(0x40, 4, 0xffffffff)
	require.EqualValues(t, 0xf2014809, f.ReadConfig(0x40, 4))

	body := bytesAt{10, 11, 12, 13, 14, 15}
	var written []string
	f.CapabilityHandler(first, body)
	f.OnWrite(func(off uint64, size int) { written = append(written, fmt.Sprintf("%#x+%d", off, size)) })
	require.EqualValues(t, 0x0b0a4809, f.ReadConfig(0x40, 4), "header from the space, body from the handler")
	require.EqualValues(t, 0x0f0e0d0c, f.ReadConfig(0x44, 4))
	f.WriteConfig(0x44, 4, 0x01020304)
	f.WriteConfig(0x40, 4, 0x07060504)
	require.Equal(t, bytesAt{6, 7, 4, 3, 2, 1}, body)
	require.Equal(t, []string{"0x44+4", "0x40+4"}, written)
	require.Equal(t, ones(2)<<16, f.ReadConfig(0xfe, 4), "bytes past the end are ones")
}

func TestINTxIsGatedAndShown(t *testing.T) {
	x := newFixture(t)
	x.f.SetINTx(true)
	require.True(t, x.line)
	require.EqualValues(t, StatusInterrupt|StatusCapabilities, x.read(RegStatus, 2))
	x.write(RegCommand, 2, CommandInterruptDisable)
	require.False(t, x.line)
	require.EqualValues(t, StatusInterrupt|StatusCapabilities, x.read(RegStatus, 2), "status shows what the line does not")
	x.write(RegCommand, 2, 0)
	require.True(t, x.line)
	x.write(0x42, 2, msixEnable)
	require.False(t, x.line, "MSI-X replaces INTA#")
	x.write(0x42, 2, 0)
	require.True(t, x.line)
	x.f.Reset()
	require.False(t, x.line)
	require.EqualValues(t, StatusCapabilities, x.read(RegStatus, 2))
}

func TestMSIXSendsOrHolds(t *testing.T) {
	x := newFixture(t)
	const base = 0xe0000000
	x.write(0x20, 4, base)
	x.write(RegCommand, 2, CommandMemory|CommandMaster)
	entry := func(v uint64) uint64 { return base + tableAt + 16*v }
	require.EqualValues(t, 1, x.memory.Read(entry(69)+12, 4), "vectors start masked")
	for _, v := range []uint64{0, 69} {
		x.memory.Write(entry(v), 4, 0xfee01003) // the low two bits do not exist
		x.memory.Write(entry(v)+8, 4, 0x40+v)
		x.memory.Write(entry(v)+12, 4, 0xfffffffe)
	}
	first, last := message{0xfee01000, 0x40}, message{0xfee01000, 0x40 + 69}
	require.EqualValues(t, 0x40<<32>>32, x.memory.Read(entry(0)+8, 8), "reserved bits of vector control stay zero")

	x.msix.Trigger(0)
	require.Empty(t, x.messages, "not enabled: the function uses INTA#")
	x.write(0x42, 2, msixEnable)
	x.msix.Trigger(0)
	x.msix.Trigger(70)
	require.Equal(t, messages{first}, x.messages)

	x.write(0x42, 2, msixEnable|msixFunctionMask)
	require.True(t, x.msix.Masked())
	x.msix.Trigger(69)
	x.msix.Trigger(0)
	x.msix.Trigger(0)
	require.Len(t, x.messages, 1)
	require.EqualValues(t, 1, x.memory.Read(base+pbaAt, 8))
	require.EqualValues(t, 1<<5, x.memory.Read(base+pbaAt+8, 8))
	x.memory.Write(base+pbaAt, 8, 0)
	require.EqualValues(t, 1, x.memory.Read(base+pbaAt, 8), "read-only")
	x.write(0x42, 2, msixEnable)
	require.Equal(t, messages{first, first, last}, x.messages, "held once, sent in order")
	require.Zero(t, x.memory.Read(base+pbaAt, 8))

	x.memory.Write(entry(69)+12, 4, 1)
	x.msix.Trigger(69)
	require.Len(t, x.messages, 3)
	x.memory.Write(entry(69)+8, 8, 0x77) // new data and the mask bit in one access
	require.Equal(t, message{0xfee01000, 0x77}, x.messages[3])

	x.write(RegCommand, 2, CommandMemory)
	x.msix.Trigger(0)
	require.Len(t, x.messages, 4, "a message is a memory write of the function")
	x.write(RegCommand, 2, CommandMemory|CommandMaster)
	require.Len(t, x.messages, 5)
}

func TestWindowsOfABARComeBeforeItsHandler(t *testing.T) {
	for _, inBus := range []bool{true, false} {
		f, b := NewFunction("test", testID), NewBus()
		rest, lo, hi := make(bytesAt, 0x100), make(bytesAt, 0x10), timed{make(bytesAt, 0x20)}
		f.AddBAR(0, Mem32, 0x100, rest)
		f.AddBARWindow(0, 0x40, 0x20, hi)
		f.AddBARWindow(0, 0x10, 0x10, lo)
		require.NoError(t, b.Add(0, f))
		require.NoError(t, b.Assign(0xc000, 0xe0000000, 1<<32, nil))
		bus, base := devices.NewMemoryBus(), uint64(0xe0000000)
		if inBus {
			bus.SetResolver(b.Memory())
		} else {
			base = 0
			require.NoError(t, bus.Map(0, 0x100, f.BARHandler(0)))
		}
		bus.Write(base+0xe, 4, 0x04030201)
		bus.Write(base+0x1e, 4, 0x08070605)
		bus.Write(base+0x5c, 8, 0x100f0e0d0c0b0a09)
		require.EqualValues(t, 0x0201, rest.Read(0xe, 2))
		require.EqualValues(t, 0x0403, lo.Read(0, 2))
		require.EqualValues(t, 0x0605, lo.Read(0xe, 2))
		require.EqualValues(t, 0x0807, rest.Read(0x20, 2))
		require.EqualValues(t, 0x0c0b0a09, hi.Read(0x1c, 4))
		require.EqualValues(t, 0x100f0e0d, rest.Read(0x60, 4))
		require.EqualValues(t, 0x100f0e0d0c0b0a09, bus.Read(base+0x5c, 8))
		require.True(t, bus.NeedsTime(base+0x44, false), "a window's timing shows through")
		require.False(t, bus.NeedsTime(base+0x48, false))
		require.False(t, bus.NeedsTime(base+0x14, false))
	}
	require.Nil(t, NewFunction("test", testID).BARHandler(0))
}

// timed needs the time for its register at 4.
type timed struct{ bytesAt }

func (timed) NeedsTime(off uint64, _ bool) bool { return off == 4 }

func TestConstructionDefectsPanic(t *testing.T) {
	for name, build := range map[string]func(f *Function){
		"size not a power of two": func(f *Function) { f.AddBAR(0, Mem32, 0x30, nil) },
		"too many ports":          func(f *Function) { f.AddBAR(0, IO, 512, nil) },
		"64 bits in the last":     func(f *Function) { f.AddBAR(5, Mem64, 0x1000, nil) },
		"twice":                   func(f *Function) { f.AddBAR(0, IO, 4, nil); f.AddBAR(0, IO, 4, nil) },
		"upper half":              func(f *Function) { f.AddBAR(0, Mem64, 4096, nil); f.AddBAR(1, IO, 4, nil) },
		"window outside":          func(f *Function) { f.AddBAR(0, Mem32, 16, nil); f.AddBARWindow(0, 8, 16, rom{}) },
		"window of no BAR":        func(f *Function) { f.AddBARWindow(0, 8, 16, rom{}) },
		"windows overlap": func(f *Function) {
			f.AddBAR(0, Mem32, 32, nil)
			f.AddBARWindow(0, 8, 8, rom{})
			f.AddBARWindow(0, 15, 2, rom{})
		},
		"capability too long":      func(f *Function) { f.AddCapability(1, make([]byte, 200), nil) },
		"handler of no capability": func(f *Function) { f.CapabilityHandler(0x40, rom{}) },
		"empty ROM":                func(f *Function) { f.SetROM(nil) },
		"no vectors":               func(f *Function) { f.AddBAR(0, Mem32, 4096, nil); f.AddMSIX(nil, 0, 0, 0, 2048) },
	} {
		f := NewFunction("test", testID)
		require.Panics(t, func() { build(f) }, name)
	}
}

func TestAssignDoesWhatFirmwareDoes(t *testing.T) {
	x := newFixture(t)
	other := NewFunction("other", testID)
	other.AddBAR(0, Mem32, 0x100000, nil)
	other.AddBAR(1, IO, 0x80, nil)
	other.AddBAR(2, Mem32, 0x1000, nil)
	require.NoError(t, x.bus.Add(2<<3, other))
	irq := func(devfn uint8, pin int) uint8 { return devfn>>3 + uint8(pin) }
	require.NoError(t, x.bus.Assign(0xc010, 0xe0001000, 0xf0000000, irq))
	for _, c := range []struct {
		f    *Function
		reg  uint8
		want uint32
	}{
		{other, 0x10, 0xe0100000}, {other, 0x14, 0xc081}, {other, 0x18, 0xe0200000},
		{x.f, 0x10, 0xc101}, {x.f, 0x20, 0xe0204000 | 0xc}, {x.f, 0x24, 0}, {x.f, RegROM, 0},
	} {
		require.Equal(t, c.want, c.f.Long(c.reg), "%s %#x", c.f.Name(), c.reg)
	}
	require.EqualValues(t, CommandIO|CommandMemory|CommandMaster, x.f.Word(RegCommand))
	require.True(t, x.f.BusMaster())
	require.EqualValues(t, 4, x.f.Byte(RegInterruptLine))
	require.Zero(t, other.Byte(RegInterruptLine), "it has no pin")
	x.io[1] = 0x5a
	require.EqualValues(t, 0x5a, x.ports.Read(0xc101, 1))
	require.Error(t, x.bus.Assign(0xc000, 0xe0000000, 0xe0010000, irq), "memory runs out")
	require.Error(t, x.bus.Assign(0xfff0, 0xe0000000, 0xf0000000, irq), "ports run out")
	require.Error(t, x.bus.Assign(0xc000, 0xe0000000, 1<<33, irq))
}

// TestPriorityIsFirstComeFirstServed compares the flattened list with a search
// through all windows in order of priority.
func TestPriorityIsFirstComeFirstServed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := NewBus()
		type win struct {
			base, size uint64
			h          devices.Handler
		}
		var order []win
		handler := func() devices.Handler { return &timed{make(bytesAt, 1)} } // distinct pointers
		region, h := b.AddIORegion(handler()), handler()
		region.h = h
		regionBase := rapid.Uint64Range(0, 0x140).Draw(t, "region")
		region.Set(regionBase, 0x21)
		order = append(order, win{regionBase, 0x21, h})
		for n := range rapid.IntRange(1, 5).Draw(t, "functions") {
			f := NewFunction("f", testID)
			for i := range rapid.IntRange(1, 4).Draw(t, "BARs") {
				size := uint64(1) << rapid.IntRange(2, 7).Draw(t, "size")
				base := rapid.Uint64Range(0, 0x13f).Draw(t, "base") &^ (size - 1)
				var back devices.Handler
				var inner []win
				if rapid.Bool().Draw(t, "background") {
					back = handler()
				}
				f.AddBAR(i, IO, size, back)
				for off := uint64(0); off < size && rapid.Bool().Draw(t, "window"); {
					off += rapid.Uint64Range(0, 8).Draw(t, "gap")
					n := rapid.Uint64Range(1, 8).Draw(t, "size of window")
					if off+n >= size {
						break
					}
					w := win{base + off, n, handler()}
					f.AddBARWindow(i, off, n, w.h)
					inner = append(inner, w)
					off += n
				}
				f.SetLong(uint8(RegBAR0+4*i), uint32(base)|1)
				if base == 0 {
					continue // not assigned
				}
				order = append(order, inner...)
				if back != nil {
					order = append(order, win{base, size, back})
				}
			}
			f.SetWord(RegCommand, CommandIO)
			require.NoError(t, b.Add(uint8(n)<<3, f))
		}
		var prevLeft uint64
		for addr := uint64(0x200); addr < 0x1000; addr-- {
			var want devices.Handler
			var wantOff uint64
			for _, w := range order {
				if addr-w.base < w.size {
					want, wantOff = w.h, addr-w.base
					break
				}
			}
			h, off, left := b.IO().Resolve(addr)
			require.Equal(t, want == nil, h == nil, "address %#x", addr)
			if want != nil {
				require.Same(t, want, h, "address %#x", addr)
				require.Equal(t, wantOff, off)
				require.True(t, left == 1 || left == prevLeft+1, "left counts down to the end of the range")
			}
			prevLeft = left
		}
	})
}

// op is one thing that happens to a function.
type op struct {
	Kind, Size int
	At         uint64
	Value      uint64
}

var drawOp = rapid.Custom(func(t *rapid.T) op {
	return op{
		Kind: rapid.IntRange(0, 6).Draw(t, "kind"),
		Size: 1 << rapid.IntRange(0, 3).Draw(t, "size"),
		At:   rapid.Uint64().Draw(t, "at"),
		Value: rapid.OneOf(
			rapid.Uint64(),
			rapid.SampledFrom([]uint64{0, ones(4), 7, 0xc001, 0xe0000000, msixEnable, msixEnable | msixFunctionMask}),
		).Draw(t, "value"),
	}
})

// apply performs an operation and returns all that can be seen of its effect.
func (x *fixture) apply(o op) (seen []uint64) {
	size := min(o.Size, 4)
	switch o.Kind {
	case 0:
		x.ports.Write(ConfigBase+o.At%(ConfigPorts+4), size, o.Value)
	case 1:
		seen = append(seen, x.ports.Read(ConfigBase+o.At%(ConfigPorts+4), size))
	case 2:
		x.write(o.At&0xff, size, o.Value)
	case 3:
		base, _ := x.f.base(4)
		x.memory.Write(base+o.At%memSize, o.Size, o.Value)
	case 4:
		x.memory.Read(o.At, o.Size)
		base, _ := x.f.base(4)
		seen = append(seen, x.memory.Read(base+o.At%memSize, o.Size), x.ports.Read(0xc000+o.At%ioSize, size))
	case 5:
		x.msix.Trigger(uint16(o.At % 80))
	case 6:
		x.f.SetINTx(o.Value&1 != 0)
	}
	level := uint64(0)
	if x.line {
		level = 1
	}
	return append(seen, level, uint64(len(x.messages)), x.read(o.At&0xfc, 4))
}

func TestSavedFunctionGoesOnElsewhere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, y := newFixture(t), newFixture(t)
		for _, o := range rapid.SliceOfN(drawOp, 30, 100).Draw(t, "before") {
			x.apply(o)
		}
		for _, o := range rapid.SliceOf(drawOp).Draw(t, "elsewhere before") {
			y.apply(o)
		}
		require.NoError(t, y.f.Restore(x.f.Save()))
		require.NoError(t, y.msix.Restore(x.msix.Save()))
		require.NoError(t, y.bus.Restore(x.bus.Save()))
		copy(y.mem, x.mem)
		copy(y.io, x.io)
		y.line, y.messages = x.line, append(messages(nil), x.messages...)
		for _, o := range rapid.SliceOfN(drawOp, 30, 100).Draw(t, "after") {
			require.Equal(t, x.apply(o), y.apply(o), "%+v", o)
		}
		require.Equal(t, x.messages, y.messages)
		require.Equal(t, x.f.Save(), y.f.Save())
		require.Equal(t, x.msix.Save(), y.msix.Save())

		fresh := newFixture(t)
		x.f.Reset()
		x.msix.Reset()
		x.bus.Reset()
		require.Equal(t, fresh.f.Save(), x.f.Save())
		require.Equal(t, fresh.msix.Save(), x.msix.Save())
		require.Equal(t, fresh.bus.Save(), x.bus.Save())
	})
}

func TestRestoreRefusesWhatIsNotThisFunction(t *testing.T) {
	x := newFixture(t)
	for name, spoil := range map[string]func(s *FunctionState){
		"another vendor":    func(s *FunctionState) { s.Config[0]++ },
		"another BAR kind":  func(s *FunctionState) { s.Config[0x20] = 4 },
		"misplaced BAR":     func(s *FunctionState) { s.Config[0x21] = 1 },
		"another list":      func(s *FunctionState) { s.Config[0x34] = 0x50 },
		"another cap":       func(s *FunctionState) { s.Config[0x40] = 5 },
		"INTx disagreement": func(s *FunctionState) { s.INTx = true },
	} {
		s, before := x.f.Save(), x.f.Save()
		spoil(&s)
		require.Error(t, x.f.Restore(s), name)
		require.Equal(t, before, x.f.Save(), name)
	}
	for name, spoil := range map[string]func(s *MSIXState){
		"too few vectors":    func(s *MSIXState) { s.Entries = s.Entries[1:] },
		"no pending":         func(s *MSIXState) { s.Pending = nil },
		"pending beyond":     func(s *MSIXState) { s.Pending[1] = 1 << 6 },
		"reserved control":   func(s *MSIXState) { s.Entries[3].Control = 2 },
		"unaligned messages": func(s *MSIXState) { s.Entries[3].Addr = 2 },
	} {
		s, before := x.msix.Save(), x.msix.Save()
		spoil(&s)
		require.Error(t, x.msix.Restore(s), name)
		require.Equal(t, before, x.msix.Save(), name)
	}
	require.Error(t, x.bus.Restore(BusState{Address: 1}))
}

// FuzzAccess lets a guest do anything with the ports of the bus and the windows of a
// function: nothing may panic, and what it makes must be a state that restores.
func FuzzAccess(f *testing.F) {
	f.Add([]byte{0, 4, 0, 0x80, 0, 0x18, 0, 2, 2, 0x20, 0xff, 3, 4, 5})
	f.Add([]byte{2, 1, 4, 7, 0, 0, 0, 3, 8, 0x10, 0, 0, 0, 0x55})
	f.Fuzz(func(t *testing.T, data []byte) {
		x := newFixture(t)
		for len(data) >= 9 {
			at := uint64(data[2]) | uint64(data[3])<<8
			value := uint64(data[4]) | uint64(data[5])<<8 | uint64(data[6])<<16 | uint64(data[7])<<24 | uint64(data[8])<<60
			x.apply(op{Kind: int(data[0] % 7), Size: 1 << (data[1] % 4), At: at, Value: value})
			data = data[9:]
		}
		y := newFixture(t)
		require.NoError(t, y.f.Restore(x.f.Save()))
		require.NoError(t, y.msix.Restore(x.msix.Save()))
		require.NoError(t, y.bus.Restore(x.bus.Save()))
		for off := uint64(0); off < ConfigSize; off++ { // all offsets, all sizes
			for _, size := range []int{1, 2, 4} {
				require.Equal(t, x.f.ReadConfig(off, size), y.f.ReadConfig(off, size))
				x.f.WriteConfig(off, size, off*0x01010101)
				y.f.WriteConfig(off, size, off*0x01010101)
			}
		}
	})
}
