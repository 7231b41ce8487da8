// Package fwcfg is QEMU's firmware configuration device ("fw_cfg", QEMU
// docs/specs/fw_cfg.rst): the channel through which SeaBIOS and OVMF learn what
// machine they are on. It holds read-only items, each under a 16-bit key; the keys
// from [FileFirst] on are files with names, listed by the item [KeyFileDir].
//
// A guest selects a key at port 0x510 and then reads the item byte by byte at
// port 0x511, or it hands the address of a descriptor to the DMA register at port
// 0x514 and the device copies the item, or the part that it asks for, into guest
// memory before the OUT instruction ends.
//
// What the items say is the business of package firmware; here is only the
// transport. Items are set while the machine is built. Their keys depend on the set
// of names alone and not on the order of the calls, so that two machines with
// equal configurations answer alike.
package fwcfg

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// The device's window of I/O ports.
const (
	Base = 0x510 // first port
	Size = 12    // number of ports
)

// Offsets of the registers in the window.
const (
	regSelector = 0 // 16 bits, little-endian, write only
	regData     = 1 // 8 bits, read only
	regDMAHigh  = 4 // upper 32 bits of the descriptor's address, big-endian
	regDMALow   = 8 // lower 32 bits, big-endian; writing them starts the transfer
)

// Keys of the items whose meaning the specification fixes.
const (
	KeySignature   uint16 = 0x00 // "QEMU"
	KeyID          uint16 = 0x01 // uint32: features of the interface
	KeyUUID        uint16 = 0x02 // 16 bytes
	KeyRAMSize     uint16 = 0x03 // uint64, bytes
	KeyNoGraphic   uint16 = 0x04 // uint16, 1: no display
	KeyCPUs        uint16 = 0x05 // uint16, CPUs present at power-on
	KeyKernelAddr  uint16 = 0x07 // uint32
	KeyKernelSize  uint16 = 0x08 // uint32
	KeyInitrdAddr  uint16 = 0x0a // uint32
	KeyInitrdSize  uint16 = 0x0b // uint32
	KeyNUMA        uint16 = 0x0d // uint64 number of nodes, then their tables
	KeyBootMenu    uint16 = 0x0e // uint16, 1: offer the boot menu
	KeyMaxCPUs     uint16 = 0x0f // uint16, one more than the highest APIC id
	KeyKernelEntry uint16 = 0x10 // uint32
	KeyKernelData  uint16 = 0x11
	KeyInitrdData  uint16 = 0x12
	KeyCmdlineAddr uint16 = 0x13 // uint32
	KeyCmdlineSize uint16 = 0x14 // uint32, with the terminating zero
	KeyCmdlineData uint16 = 0x15
	KeySetupAddr   uint16 = 0x16 // uint32
	KeySetupSize   uint16 = 0x17 // uint32
	KeySetupData   uint16 = 0x18
	KeyFileDir     uint16 = 0x19 // the directory of files
	FileFirst      uint16 = 0x20 // key of the first file

	// KeyIRQ0Override is local to x86: one byte, 1 where ISA interrupt 0 (the PIT)
	// reaches pin 2 of the I/O APIC.
	KeyIRQ0Override uint16 = 0x8002
)

const (
	keyWriteChannel = 0x4000 // a bit of the selector that the specification has retired
	keyMask         = ^uint16(keyWriteChannel)
)

// Features in the item KeyID.
const (
	featureTraditional = 1 << 0
	featureDMA         = 1 << 1
)

// Bits of the control word of a DMA descriptor; its upper half is a key.
const (
	ctlError  = 1 << 0
	ctlRead   = 1 << 1
	ctlSkip   = 1 << 2
	ctlSelect = 1 << 3
	ctlWrite  = 1 << 4
)

const (
	signature    = "QEMU"
	dmaSignature = "QEMU CFG" // what the DMA register reads as
	dmaDescSize  = 16         // control uint32, length uint32, address uint64, big-endian
	nameSize     = 56         // of a name in the directory, with the terminating zero
	dirEntrySize = 4 + 2 + 2 + nameSize
)

// Limits of the device.
const (
	// MaxFiles bounds the named files.
	MaxFiles = 0x1000
	// MaxItem bounds the size of an item, in bytes.
	MaxItem = 1 << 30
	// MaxTransfer bounds the length of one DMA transfer, in bytes; a longer one fails.
	// It keeps a guest from holding its vCPU loop for long with one OUT.
	MaxTransfer = 1 << 30
)

// item is the content of one key.
type item struct {
	name     string // of a file
	data     []byte
	initial  []byte // of a writable file: its content at power-on
	writable bool
}

// Device is one fw_cfg device.
type Device struct {
	mem   *memory.Memory
	fixed map[uint16]*item // by key, below FileFirst or local to the architecture
	files []*item          // in order of name; the key of files[i] is FileFirst+i

	key     uint16
	current *item // the item of key, or nil where there is none
	offset  uint32
	dmaHigh uint32
}

// New returns a device that holds only its signature, its features and an empty
// directory of files. mem is what DMA transfers reach.
func New(mem *memory.Memory) *Device {
	d := &Device{mem: mem, fixed: make(map[uint16]*item)}
	d.fixed[KeySignature] = &item{data: []byte(signature)}
	d.fixed[KeyID] = &item{data: binary.LittleEndian.AppendUint32(nil, featureTraditional|featureDMA)}
	d.fixed[KeyFileDir] = &item{}
	d.rebuild()
	return d
}

// SetItem sets the content of a key that is not a file's. The data is not copied;
// nobody may change it afterwards.
func (d *Device) SetItem(key uint16, data []byte) error {
	switch {
	case key&keyWriteChannel != 0, key >= FileFirst && key < 0x8000:
		return fmt.Errorf("fwcfg: key %#x is not for items without a name", key)
	case key == KeySignature || key == KeyID || key == KeyFileDir:
		return fmt.Errorf("fwcfg: item %#x is the device's own", key)
	case len(data) > MaxItem:
		return fmt.Errorf("fwcfg: item %#x has %d bytes, at most %d are possible", key, len(data), MaxItem)
	}
	d.fixed[key] = &item{data: data}
	d.selectKey(d.key)
	return nil
}

// SetUint16 sets an item that is a 16-bit little-endian number.
func (d *Device) SetUint16(key uint16, v uint16) error {
	return d.SetItem(key, binary.LittleEndian.AppendUint16(nil, v))
}

// SetUint32 sets an item that is a 32-bit little-endian number.
func (d *Device) SetUint32(key uint16, v uint32) error {
	return d.SetItem(key, binary.LittleEndian.AppendUint32(nil, v))
}

// SetUint64 sets an item that is a 64-bit little-endian number.
func (d *Device) SetUint64(key uint16, v uint64) error {
	return d.SetItem(key, binary.LittleEndian.AppendUint64(nil, v))
}

// AddFile adds a file that the guest can read. The data is not copied; nobody may
// change it afterwards. Names are 1 to 55 bytes of ASCII and unique.
func (d *Device) AddFile(name string, data []byte) error {
	return d.add(&item{name: name, data: data})
}

// AddWritableFile adds a file that the guest can also write, by DMA, within its
// size. What the guest has written is read by [Device.File] and is part of the
// device's state.
func (d *Device) AddWritableFile(name string, data []byte) error {
	return d.add(&item{name: name, data: slices.Clone(data), initial: slices.Clone(data), writable: true})
}

func (d *Device) add(f *item) error {
	if len(f.name) == 0 || len(f.name) >= nameSize || strings.ContainsFunc(f.name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("fwcfg: file name %q is not 1 to %d printable characters", f.name, nameSize-1)
	}
	if len(f.data) > MaxItem {
		return fmt.Errorf("fwcfg: file %s has %d bytes, at most %d are possible", f.name, len(f.data), MaxItem)
	}
	if len(d.files) == MaxFiles {
		return fmt.Errorf("fwcfg: no room for file %s: there are %d already", f.name, MaxFiles)
	}
	i, found := d.find(f.name)
	if found {
		return fmt.Errorf("fwcfg: file %s exists already", f.name)
	}
	d.files = slices.Insert(d.files, i, f)
	d.rebuild()
	return nil
}

func (d *Device) find(name string) (int, bool) {
	return slices.BinarySearchFunc(d.files, name, func(f *item, name string) int { return strings.Compare(f.name, name) })
}

// File returns the present content of a file, or nil where there is none of that
// name. The caller must not change it, nor keep it past the current stop of the vCPU.
func (d *Device) File(name string) []byte {
	if i, ok := d.find(name); ok {
		return d.files[i].data
	}
	return nil
}

// rebuild makes the directory anew: a big-endian count, then for each file its size,
// its key, two reserved bytes and its name.
func (d *Device) rebuild() {
	dir := binary.BigEndian.AppendUint32(nil, uint32(len(d.files)))
	for i, f := range d.files {
		dir = binary.BigEndian.AppendUint32(dir, uint32(len(f.data)))
		dir = binary.BigEndian.AppendUint16(dir, FileFirst+uint16(i))
		dir = append(dir, 0, 0)
		dir = append(dir, f.name...)
		dir = append(dir, make([]byte, nameSize-len(f.name))...)
	}
	d.fixed[KeyFileDir].data = dir
	d.selectKey(d.key)
}

// Reset reaches the power-on state: the signature is selected, and writable files
// hold what they were added with.
func (d *Device) Reset() {
	for _, f := range d.files {
		if f.writable {
			copy(f.data, f.initial)
		}
	}
	d.dmaHigh = 0
	d.selectKey(KeySignature)
}

// selectKey makes key current, from its first byte on.
func (d *Device) selectKey(key uint16) {
	d.key, d.offset = key&keyMask, 0
	if i := int(d.key) - int(FileFirst); i >= 0 && i < len(d.files) {
		d.current = d.files[i]
	} else {
		d.current = d.fixed[d.key]
	}
}

// rest returns what follows the current offset of the current item.
func (d *Device) rest() []byte {
	if d.current == nil || d.offset >= uint32(len(d.current.data)) {
		return nil
	}
	return d.current.data[d.offset:]
}

// Read implements devices.Handler. Data past the end of an item, or of a key without
// one, reads as zero.
func (d *Device) Read(off uint64, size int) uint64 {
	switch {
	case off == regData && size == 1:
		rest := d.rest()
		if len(rest) == 0 {
			return 0
		}
		d.offset++
		return uint64(rest[0])
	case off >= regDMAHigh && off+uint64(size) <= Size:
		var v uint64
		for i := 0; i < size; i++ {
			v |= uint64(dmaSignature[off-regDMAHigh+uint64(i)]) << (8 * i)
		}
		return v
	}
	return 1<<(8*uint(size)) - 1
}

// Write implements devices.Handler. A write of another size than the register's has
// no effect, and nor has one to the data register.
func (d *Device) Write(off uint64, size int, v uint64) {
	switch {
	case off == regSelector && size == 2:
		d.selectKey(uint16(v))
	case off == regDMAHigh && size == 4:
		d.dmaHigh = swap(v)
	case off == regDMALow && size == 4:
		addr := uint64(d.dmaHigh)<<32 | uint64(swap(v))
		d.dmaHigh = 0
		d.dma(addr)
	}
}

// swap returns the value of a big-endian register as the guest meant it.
func swap(v uint64) uint32 {
	w := uint32(v)
	return w>>24 | w>>8&0xff00 | w<<8&0xff0000 | w<<24
}

// dma carries out the descriptor at addr and stores the outcome in its control word:
// zero, or ctlError. A descriptor outside RAM has no effect.
func (d *Device) dma(addr uint64) {
	desc, err := d.mem.View(addr, dmaDescSize)
	if err != nil {
		return
	}
	control := binary.BigEndian.Uint32(desc)
	length := binary.BigEndian.Uint32(desc[4:])
	buffer := binary.BigEndian.Uint64(desc[8:])
	if control&ctlSelect != 0 {
		d.selectKey(uint16(control >> 16))
	}
	var result uint32
	if !d.transfer(control, length, buffer) {
		result = ctlError
	}
	// The descriptor is inside RAM, so this succeeds; the transfer may have overwritten it.
	if desc, err := d.mem.Mutable(addr, 4); err == nil {
		binary.BigEndian.PutUint32(desc, result)
	}
}

// transfer moves length bytes between the current item and guest memory at addr, or
// skips them, and says whether it could. Of several operations in one control word
// the first of read, write and skip counts.
func (d *Device) transfer(control, length uint32, addr uint64) bool {
	if control&(ctlRead|ctlWrite|ctlSkip) == 0 || length == 0 {
		return true
	}
	if length > MaxTransfer {
		return false
	}
	rest := d.rest()
	n := min(length, uint32(len(rest)))
	switch {
	case control&ctlRead != 0:
		buf, err := d.mem.Mutable(addr, uint64(length))
		if err != nil {
			return false
		}
		clear(buf[copy(buf, rest):])
	case control&ctlWrite != 0:
		if n < length || !d.current.writable {
			return false
		}
		if d.mem.Read(addr, rest[:n]) != nil {
			return false
		}
	}
	d.offset += n
	return true
}

// State is the saved form of a [Device]: what the guest has changed. The items
// themselves belong to the machine's configuration.
type State struct {
	Key     uint16 // the selected key
	Offset  uint32 // of the next byte within its item
	DMAHigh uint32 // the upper half of a descriptor's address, between its two writes
	// Writable holds the contents of the writable files, in order of name.
	Writable []File
}

// File is the content of one writable file.
type File struct {
	Name string
	Data []byte
}

// Save returns the device's state.
func (d *Device) Save() State {
	s := State{Key: d.key, Offset: d.offset, DMAHigh: d.dmaHigh}
	for _, f := range d.files {
		if f.writable {
			s.Writable = append(s.Writable, File{f.name, slices.Clone(f.data)})
		}
	}
	return s
}

// Restore sets the device's state. The writable files must be the ones that this
// device has, of the same sizes.
func (d *Device) Restore(s State) error {
	if s.Key&keyWriteChannel != 0 {
		return fmt.Errorf("fwcfg: saved key %#x is not a key", s.Key)
	}
	n := 0
	for _, f := range d.files {
		if !f.writable {
			continue
		}
		if n == len(s.Writable) || s.Writable[n].Name != f.name || len(s.Writable[n].Data) != len(f.data) {
			return fmt.Errorf("fwcfg: saved state lacks %d bytes of writable file %s", len(f.data), f.name)
		}
		n++
	}
	if n != len(s.Writable) {
		return fmt.Errorf("fwcfg: saved writable file %s does not exist in this machine", s.Writable[n].Name)
	}
	n = 0
	for _, f := range d.files {
		if f.writable {
			copy(f.data, s.Writable[n].Data)
			n++
		}
	}
	d.selectKey(s.Key)
	d.offset, d.dmaHigh = s.Offset, s.DMAHigh
	return nil
}
