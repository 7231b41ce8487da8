package pci

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/ftvmm/ftvmm/devices"
)

// ConfigSize is the size of a function's configuration space in bytes.
const ConfigSize = 256

// Registers of the type 0 header (PCI 3.0, 6.1), offsets in configuration space.
const (
	RegVendorID      = 0x00
	RegDeviceID      = 0x02
	RegCommand       = 0x04
	RegStatus        = 0x06
	RegRevision      = 0x08
	RegClass         = 0x09 // three bytes: programming interface, sub-class, base class
	RegCacheLine     = 0x0c
	RegHeaderType    = 0x0e
	RegBAR0          = 0x10
	RegSubVendorID   = 0x2c
	RegSubDeviceID   = 0x2e
	RegROM           = 0x30
	RegCapabilities  = 0x34
	RegInterruptLine = 0x3c
	RegInterruptPin  = 0x3d
	firstCapability  = 0x40 // where AddCapability begins
)

// Bits of the command register (PCI 3.0, 6.2.2).
const (
	CommandIO               = 1 << 0
	CommandMemory           = 1 << 1
	CommandMaster           = 1 << 2
	CommandSERR             = 1 << 8
	CommandInterruptDisable = 1 << 10

	commandWritable = CommandIO | CommandMemory | CommandMaster | CommandSERR | CommandInterruptDisable
)

// Bits of the status register (PCI 3.0, 6.2.3).
const (
	StatusInterrupt    = 1 << 3
	StatusCapabilities = 1 << 4
)

const (
	headerMultiFunction = 0x80
	romEnable           = 1 << 0 // PCI 3.0, 6.2.5.2
	barIO               = 1 << 0
	barMem64            = 2 << 1
	barPrefetch         = 1 << 3
	minIOBAR            = 4
	maxIOBAR            = 256 // PCI 3.0, 6.2.5.1: what a device may claim of the port space
	minMemBAR           = 16
	minROM              = 2048
	maxROM              = 16 << 20
	numBARs             = 6
	romIndex            = numBARs
)

// Identity is what a function says it is.
type Identity struct {
	Vendor, Device, SubVendor, SubDevice uint16
	Class                                uint32 // 24 bits: base class<<16 | sub-class<<8 | programming interface
	Revision                             uint8
}

// BARKind is the address space and width of a base address register.
type BARKind uint8

// The kinds of BAR.
const (
	IO    BARKind = iota + 1 // I/O ports
	Mem32                    // 32-bit memory, not prefetchable
	Mem64                    // 64-bit memory, prefetchable; takes two registers
)

// barWindow is a part of a BAR with a handler of its own.
type barWindow struct {
	off, size uint64
	h         devices.Handler
}

// bar is one base address register, or the expansion ROM's.
type bar struct {
	kind    BARKind // 0: absent
	size    uint64  // a power of two
	windows []barWindow
}

// capability is an entry of the capability list whose body a handler may own.
type capability struct {
	start, end int // body, in configuration space
	h          devices.Handler
}

// Function is one PCI function: its configuration space and what hangs off it. It is
// not itself a device but a part of one, which owns it, saves it and resets it.
type Function struct {
	name string
	bus  *Bus // nil until added

	config  [ConfigSize]byte
	power   [ConfigSize]byte // the content after a reset
	mask    [ConfigSize]byte // the bits that the guest may write
	bars    [numBARs + 1]bar // the last is the expansion ROM
	caps    []capability
	lastCap int // offset of the last capability, 0 when there is none
	freeCap int // where the next goes

	msix    *MSIX
	line    devices.Line
	intx    bool // the function asserts INTA#, whether or not the line shows it
	onWrite []func(off uint64, size int)
}

// NewFunction returns a function without BARs and capabilities, in its power-on
// state. The name is for messages.
func NewFunction(name string, id Identity) *Function {
	f := &Function{name: name, freeCap: firstCapability}
	f.SetDefault(RegVendorID, byte(id.Vendor), byte(id.Vendor>>8), byte(id.Device), byte(id.Device>>8))
	f.SetDefault(RegRevision, id.Revision, byte(id.Class), byte(id.Class>>8), byte(id.Class>>16))
	f.SetDefault(RegSubVendorID, byte(id.SubVendor), byte(id.SubVendor>>8), byte(id.SubDevice), byte(id.SubDevice>>8))
	f.SetMask(RegCommand, commandWritable&0xff, commandWritable>>8)
	f.SetMask(RegCacheLine, 0xff)
	f.SetMask(RegInterruptLine, 0xff)
	return f
}

// Name returns the name given to NewFunction.
func (f *Function) Name() string { return f.name }

// defect stops a machine that is built wrongly.
func (f *Function) defect(format string, args ...any) {
	panic("pci: " + f.name + ": " + fmt.Sprintf(format, args...))
}

// AddBAR adds base address register i (0 to 5) with a window of size bytes, a power
// of two. h serves what no AddBARWindow does; with h nil, the rest decodes nothing.
// Mem64 takes registers i and i+1.
func (f *Function) AddBAR(i int, kind BARKind, size uint64, h devices.Handler) {
	last := i
	if kind == Mem64 {
		last++
	}
	if i < 0 || last >= numBARs || f.bars[i].kind != 0 || f.bars[last].kind != 0 ||
		(i > 0 && f.bars[i-1].kind == Mem64) {
		f.defect("no room for BAR %d", i)
	}
	var flags, lo, hi uint64
	switch kind {
	case IO:
		flags, lo, hi = barIO, minIOBAR, maxIOBAR
	case Mem32:
		lo, hi = minMemBAR, 1<<31
	case Mem64:
		flags, lo, hi = barMem64|barPrefetch, minMemBAR, 1<<62
	default:
		f.defect("BAR %d of unknown kind %d", i, kind)
	}
	if bits.OnesCount64(size) != 1 || size < lo || size > hi {
		f.defect("BAR %d of %#x bytes", i, size)
	}
	b := &f.bars[i]
	b.kind, b.size = kind, size
	if h != nil {
		b.windows = []barWindow{{0, size, h}}
	}
	reg := uint8(RegBAR0 + 4*i)
	f.setDefaultLong(reg, uint32(flags))
	f.setMaskLong(reg, uint32(-size))
	if kind == Mem64 {
		f.setMaskLong(reg+4, uint32(-size>>32))
	}
}

// AddBARWindow gives the range [off, off+size) of BAR bar a handler of its own, which
// sees offsets from off. It goes before the handler given to AddBAR; two such windows
// must not overlap.
func (f *Function) AddBARWindow(bar int, off, size uint64, h devices.Handler) {
	if bar < 0 || bar >= numBARs || f.bars[bar].kind == 0 {
		f.defect("window in BAR %d, which does not exist", bar)
	}
	b := &f.bars[bar]
	if h == nil || size == 0 || off >= b.size || size > b.size-off {
		f.defect("window %#x+%#x of BAR %d, which has %#x bytes", off, size, bar, b.size)
	}
	// The background, if any, stays the last of the list: earlier ones win.
	at := len(b.windows)
	for i, w := range b.windows {
		if w.size == b.size {
			at = i
			break
		}
		if off < w.off+w.size && w.off < off+size {
			f.defect("window %#x+%#x of BAR %d overlaps %#x+%#x", off, size, bar, w.off, w.size)
		}
	}
	b.windows = append(b.windows, barWindow{})
	copy(b.windows[at+1:], b.windows[at:])
	b.windows[at] = barWindow{off, size, h}
	f.moved()
}

// SetROM gives the function an expansion ROM (PCI 3.0, 6.2.5.2): image, padded with
// ones to a power of two. Writes to it go nowhere. An image for PCs is made the
// function's own, as [claimROM] says.
func (f *Function) SetROM(image []byte) {
	size := uint64(minROM)
	for size < uint64(len(image)) {
		size *= 2
	}
	if len(image) == 0 || size > maxROM || f.bars[romIndex].kind != 0 {
		f.defect("expansion ROM of %d bytes", len(image))
	}
	content := append(make([]byte, 0, size), image...)
	claimROM(content, f.Word(RegVendorID), f.Word(RegDeviceID))
	content = append(content, bytes.Repeat([]byte{0xff}, int(size)-len(image))...)
	f.bars[romIndex] = bar{kind: Mem32, size: size, windows: []barWindow{{0, size, rom(content)}}}
	f.setMaskLong(RegROM, uint32(-size)|romEnable)
}

// Where an expansion ROM's first image describes itself (PCI 3.0, 6.3.1): the header of
// the ROM, then the PCI data structure that it points to.
const (
	romSignature   = 0xaa55
	romBlocks      = 0x02 // length of a PC's image in units of 512 bytes
	romData        = 0x18 // offset of the PCI data structure
	romHeaderSize  = 0x1a
	romBlock       = 512
	pcirSignature  = "PCIR"
	pcirVendor     = 0x04
	pcirDevice     = 0x06
	pcirImageLevel = 0x12 // the vendor's revision of the image; nothing depends on it
	pcirCodeType   = 0x14
	pcirSize       = 0x18
	codeTypePC     = 0
)

// claimROM makes the first image of a ROM say that it is for the given function, if it
// is one for PCs: firmware runs an image only for the vendor and device that it names,
// and an image that drives several devices names but one of them. The revision takes
// up the difference to the image's checksum, so that it is as right as it was.
func claimROM(rom []byte, vendor, device uint16) {
	le := binary.LittleEndian
	if len(rom) < romHeaderSize || le.Uint16(rom) != romSignature {
		return
	}
	at, end := int(le.Uint16(rom[romData:])), int(rom[romBlocks])*romBlock
	if end > len(rom) || at < romHeaderSize || at+pcirSize > end {
		return
	}
	d := rom[at : at+pcirSize]
	if string(d[:len(pcirSignature)]) != pcirSignature || d[pcirCodeType] != codeTypePC {
		return
	}
	ids := d[pcirVendor : pcirDevice+2]
	d[pcirImageLevel] += sum8(ids)
	le.PutUint16(d[pcirVendor:], vendor)
	le.PutUint16(d[pcirDevice:], device)
	d[pcirImageLevel] -= sum8(ids)
}

func sum8(p []byte) (sum byte) {
	for _, b := range p {
		sum += b
	}
	return sum
}

// rom serves an expansion ROM.
type rom []byte

func (r rom) Read(off uint64, size int) (v uint64) {
	for i := size - 1; i >= 0; i-- {
		b := byte(0xff)
		if at := off + uint64(i); at < uint64(len(r)) {
			b = r[at]
		}
		v = v<<8 | uint64(b)
	}
	return v
}

func (rom) Write(uint64, int, uint64) {}

// AddCapability appends a capability (PCI 3.0, 6.7) with the given identifier. body
// is what follows the two-byte header; mask has its bits that the guest may write and
// may be shorter than body. It returns the capability's offset in configuration space.
func (f *Function) AddCapability(id uint8, body []byte, mask []byte) (offset uint8) {
	at := f.freeCap
	end := at + 2 + len(body)
	if end > ConfigSize || len(mask) > len(body) {
		f.defect("no room for capability %#x of %d bytes", id, len(body))
	}
	f.SetDefault(uint8(at), append([]byte{id, 0}, body...)...)
	if len(mask) > 0 {
		f.SetMask(uint8(at+2), mask...)
	}
	if f.lastCap == 0 {
		f.SetDefault(RegCapabilities, byte(at))
		f.SetDefault(RegStatus, f.power[RegStatus]|StatusCapabilities)
	} else {
		f.SetDefault(uint8(f.lastCap+1), byte(at))
	}
	f.caps = append(f.caps, capability{start: at + 2, end: end})
	f.lastCap = at
	f.freeCap = (end + 3) &^ 3
	return uint8(at)
}

// CapabilityHandler hands the body of the capability at offset over to h: the guest's
// reads and writes of it go to h with offsets from the start of the body (two bytes
// into the capability), and the stored bytes and mask no longer matter. An access
// that only partly lies in the body arrives in bytes.
func (f *Function) CapabilityHandler(offset uint8, h devices.Handler) {
	for i := range f.caps {
		if f.caps[i].start == int(offset)+2 {
			f.caps[i].h = h
			return
		}
	}
	f.defect("no capability at %#x", offset)
}

// OnWrite adds a function that runs after each write of the guest to configuration
// space, with the offset and size in bytes of the write.
func (f *Function) OnWrite(fn func(off uint64, size int)) { f.onWrite = append(f.onWrite, fn) }

// SetDefault sets bytes of configuration space from offset off on, now and after
// each reset. It is for construction.
func (f *Function) SetDefault(off uint8, b ...byte) {
	if copy(f.power[off:], b) < len(b) {
		f.defect("configuration space ends before %#x+%#x", off, len(b))
	}
	copy(f.config[off:], b)
	f.moved()
}

// SetMask sets the bits that the guest may write, from offset off on. It is for
// construction.
func (f *Function) SetMask(off uint8, mask ...byte) {
	if copy(f.mask[off:], mask) < len(mask) {
		f.defect("configuration space ends before %#x+%#x", off, len(mask))
	}
}

func (f *Function) setDefaultLong(off uint8, v uint32) {
	f.SetDefault(off, binary.LittleEndian.AppendUint32(nil, v)...)
}

func (f *Function) setMaskLong(off uint8, v uint32) {
	f.SetMask(off, binary.LittleEndian.AppendUint32(nil, v)...)
}

// Byte returns the byte of configuration space at off.
func (f *Function) Byte(off uint8) uint8 { return f.config[off] }

// Word returns 16 bits of configuration space at off, at most 0xfe.
func (f *Function) Word(off uint8) uint16 { return binary.LittleEndian.Uint16(f.config[off:]) }

// Long returns 32 bits of configuration space at off, at most 0xfc.
func (f *Function) Long(off uint8) uint32 { return binary.LittleEndian.Uint32(f.config[off:]) }

// SetByte stores a byte for the function's owner: masks do not apply and OnWrite
// functions do not run.
func (f *Function) SetByte(off uint8, v uint8) {
	f.config[off] = v
	f.changed(int(off), 1)
}

// SetWord stores 16 bits like SetByte.
func (f *Function) SetWord(off uint8, v uint16) {
	binary.LittleEndian.PutUint16(f.config[off:], v)
	f.changed(int(off), 2)
}

// SetLong stores 32 bits like SetByte.
func (f *Function) SetLong(off uint8, v uint32) {
	binary.LittleEndian.PutUint32(f.config[off:], v)
	f.changed(int(off), 4)
}

// BusMaster says whether the guest lets the function write to memory.
func (f *Function) BusMaster() bool { return f.Word(RegCommand)&CommandMaster != 0 }

// handled returns the capability with a handler that the byte at off belongs to.
func (f *Function) handled(off int) *capability {
	for i := range f.caps {
		if c := &f.caps[i]; c.h != nil && off >= c.start && off < c.end {
			return c
		}
	}
	return nil
}

// ReadConfig performs a guest's read of size (1, 2 or 4) bytes at off. Bytes past the
// end of the space read as ones.
func (f *Function) ReadConfig(off uint64, size int) (v uint64) {
	if off >= ConfigSize {
		return ones(size)
	}
	if c := f.handled(int(off)); c != nil && int(off)+size <= c.end {
		return c.h.Read(off-uint64(c.start), size) & ones(size)
	}
	for i := range size {
		b := byte(0xff)
		if at := int(off) + i; at < ConfigSize {
			b = f.config[at]
			if c := f.handled(at); c != nil {
				b = byte(c.h.Read(uint64(at-c.start), 1))
			}
		}
		v |= uint64(b) << (8 * i)
	}
	return v
}

// WriteConfig performs a guest's write of the low size (1, 2 or 4) bytes of v at off.
func (f *Function) WriteConfig(off uint64, size int, v uint64) {
	if off >= ConfigSize {
		return
	}
	if c := f.handled(int(off)); c != nil && int(off)+size <= c.end {
		c.h.Write(off-uint64(c.start), size, v&ones(size))
	} else {
		for i := range size {
			at, b := int(off)+i, byte(v>>(8*i))
			if at >= ConfigSize {
				break
			}
			if c := f.handled(at); c != nil {
				c.h.Write(uint64(at-c.start), 1, uint64(b))
				continue
			}
			f.config[at] = f.config[at]&^f.mask[at] | b&f.mask[at]
		}
		f.changed(int(off), size)
	}
	for _, fn := range f.onWrite {
		fn(off, size)
	}
}

// needsTime says whether an access of the configuration space at off depends on time.
func (f *Function) needsTime(off uint64, write bool) bool {
	if off >= ConfigSize {
		return false
	}
	if c := f.handled(int(off)); c != nil {
		t, ok := c.h.(devices.Timed)
		return ok && t.NeedsTime(off-uint64(c.start), write)
	}
	return false
}

// changed brings what derives from the bytes [off, off+size) up to date.
func (f *Function) changed(off, size int) {
	if overlaps(off, size, RegCommand, 2) || overlaps(off, size, RegBAR0, 4*numBARs) || overlaps(off, size, RegROM, 4) {
		f.moved()
	}
	if overlaps(off, size, RegCommand, 2) || (f.msix != nil && overlaps(off, size, f.msix.control, 2)) {
		f.driveINTx()
		if f.msix != nil {
			f.msix.sendPending()
		}
	}
}

func overlaps(off, size, at, n int) bool { return off < at+n && at < off+size }

// moved has the bus look at the windows again.
func (f *Function) moved() {
	if f.bus != nil {
		f.bus.moved()
	}
}

// SetInterruptPin connects the function's INTA# to line.
func (f *Function) SetInterruptPin(line devices.Line) {
	f.line = line
	f.SetDefault(RegInterruptPin, 1)
}

// SetINTx asserts or releases INTA#. The status register shows it always, the line
// unless the guest has disabled it (PCI 3.0, 6.2.2) or uses MSI-X instead (6.8.2).
func (f *Function) SetINTx(level bool) {
	f.intx = level
	if level {
		f.config[RegStatus] |= StatusInterrupt
	} else {
		f.config[RegStatus] &^= StatusInterrupt
	}
	f.driveINTx()
}

func (f *Function) driveINTx() {
	if f.line != nil {
		f.line.Set(f.intx && f.Word(RegCommand)&CommandInterruptDisable == 0 && (f.msix == nil || !f.msix.Enabled()))
	}
}

// BARHandler returns BAR i as one window, at its offsets and wherever the guest has
// put it or not: the view of virtio's PCI configuration access capability. What no
// window serves reads as ones. It returns nil when there is no such BAR.
func (f *Function) BARHandler(i int) devices.Handler {
	if i < 0 || i >= numBARs || f.bars[i].kind == 0 {
		return nil
	}
	return &f.bars[i]
}

// find returns the window that serves off and the bytes that it serves from there.
func (b *bar) find(off uint64) (w *barWindow, left uint64) {
	if off >= b.size {
		return nil, 0
	}
	left = b.size - off
	for i := range b.windows {
		w := &b.windows[i]
		if off >= w.off && off-w.off < w.size {
			return w, min(left, w.size-(off-w.off))
		}
		if w.off > off { // a window before this one in the list may cut it short
			left = min(left, w.off-off)
		}
	}
	return nil, 0
}

// Read implements [devices.Handler].
func (b *bar) Read(off uint64, size int) (v uint64) {
	if w, left := b.find(off); w != nil && left >= uint64(size) {
		return w.h.Read(off-w.off, size)
	}
	for i := range size {
		byt := uint64(0xff)
		if w, _ := b.find(off + uint64(i)); w != nil {
			byt = w.h.Read(off+uint64(i)-w.off, 1) & 0xff
		}
		v |= byt << (8 * i)
	}
	return v
}

// Write implements [devices.Handler].
func (b *bar) Write(off uint64, size int, v uint64) {
	if w, left := b.find(off); w != nil && left >= uint64(size) {
		w.h.Write(off-w.off, size, v)
		return
	}
	for i := range size {
		if w, _ := b.find(off + uint64(i)); w != nil {
			w.h.Write(off+uint64(i)-w.off, 1, v>>(8*i)&0xff)
		}
	}
}

// NeedsTime implements [devices.Timed].
func (b *bar) NeedsTime(off uint64, write bool) bool {
	if w, _ := b.find(off); w != nil {
		t, ok := w.h.(devices.Timed)
		return ok && t.NeedsTime(off-w.off, write)
	}
	return false
}

// base returns where the guest has put BAR i (romIndex for the expansion ROM), and
// whether the function decodes it there. Address zero means "not assigned".
func (f *Function) base(i int) (base uint64, ok bool) {
	b := &f.bars[i]
	command := f.Word(RegCommand)
	need, limit := uint16(CommandMemory), uint64(1<<32-1)
	switch {
	case b.kind == 0:
		return 0, false
	case i == romIndex:
		reg := f.Long(RegROM)
		base, ok = uint64(reg), reg&romEnable != 0
	default:
		reg := uint8(RegBAR0 + 4*i)
		base, ok = uint64(f.Long(reg)), true
		switch b.kind {
		case IO:
			need, limit = CommandIO, 1<<16-1
		case Mem64:
			base |= uint64(f.Long(reg+4)) << 32
			limit = 1<<64 - 1
		}
	}
	base &^= b.size - 1 // so aligned, a window that begins below the limit ends there, too
	return base, ok && command&need != 0 && base != 0 && base <= limit
}

// Reset puts configuration space into its power-on state and releases INTA#. The
// MSI-X table has a Reset of its own.
func (f *Function) Reset() {
	f.config = f.power
	f.SetINTx(false)
	f.moved()
}

// FunctionState is the saved form of a [Function], without its MSI-X table.
type FunctionState struct {
	Config [ConfigSize]byte
	INTx   bool // the function asserts INTA#
}

// Save returns the function's state.
func (f *Function) Save() FunctionState { return FunctionState{f.config, f.intx} }

// Restore sets the function's state. It refuses one of a different function: other
// identifiers, BARs or capabilities.
func (f *Function) Restore(s FunctionState) error {
	for i := range ConfigSize {
		fixed := ^f.mask[i]
		switch {
		case i >= RegCommand && i < RegRevision, i >= firstCapability && !f.inHeaderOfCapability(i):
			continue // the owner may change these
		}
		if (s.Config[i]^f.power[i])&fixed != 0 {
			return fmt.Errorf("pci: %s: saved configuration byte %#02x is %#02x, want the fixed bits of %#02x",
				f.name, i, s.Config[i], f.power[i])
		}
	}
	if s.INTx != (s.Config[RegStatus]&StatusInterrupt != 0) {
		return fmt.Errorf("pci: %s: saved interrupt status disagrees with INTA#", f.name)
	}
	f.config, f.intx = s.Config, s.INTx
	f.moved()
	return nil
}

// inHeaderOfCapability says whether byte i is a capability's identifier or link.
func (f *Function) inHeaderOfCapability(i int) bool {
	for _, c := range f.caps {
		if i == c.start-1 || i == c.start-2 {
			return true
		}
	}
	return false
}

func ones(size int) uint64 { return ^uint64(0) >> (64 - 8*size) }
