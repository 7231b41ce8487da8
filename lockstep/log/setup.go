package log

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// Setup is the recorded machine: what it takes to build an equal one, without the images, which
// follow it in the log. Disks have no content: what the guest has read is in the log.
type Setup struct {
	Name       string
	Memory     uint64 // bytes
	KernelKind int
	Cmdline    string
	Disks      []Disk
	NICs       []NIC
	Serial     int // ports
	Console    bool
	RNG        bool
	UUID       [16]byte
	Epoch      int64 // the RTC at power-on, seconds since 1970
	RTCOffset  int64 // seconds
	// ExitOnReset ends the machine when the guest asks for a reset.
	ExitOnReset bool

	Machine vmm.Fingerprint
	Counter vmm.CounterKind
	// State says that a saved machine follows: the recording begins with it, not at power-on.
	State bool
	// Start is where it begins.
	Start vmm.Position
	// Details says that there is a [Record] for each exit.
	Details bool
	Created int64 // seconds since 1970
	// Blobs are the sizes in bytes of firmware, kernel, initrd and each NIC's option ROM; 0: none.
	Blobs []uint64
}

// Disk is what the guest sees of a disk.
type Disk struct {
	Info      backend.DiskInfo
	QueueSize uint16
	Queues    int
	Modern    bool
	BootIndex int
}

// NIC is what the guest sees of a network card.
type NIC struct {
	MAC       [6]byte
	Modern    bool
	BootIndex int
	Offloads  net.Offloads
}

// Limits of a setup.
const (
	maxBlob  = 1 << 30 // bytes of one image
	maxBlobs = 3 + vmm.MaxDevices
	// blobFixed are the images before the option ROMs.
	blobFixed = 3
	maxSetup  = 1 << 20 // bytes of the encoded setup
)

var (
	encMode, _ = cbor.CoreDetEncOptions().EncMode()
	decMode, _ = cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		MaxNestedLevels: 16, MaxArrayElements: 1 << 16, MaxMapPairs: 1 << 12,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
	}.DecMode()
)

// NewSetup describes the machine m that was made from cfg, with its images.
func NewSetup(cfg *vmm.Config, m *vmm.Machine) (*Setup, [][]byte) {
	s := &Setup{
		Name: cfg.Name, Memory: cfg.Memory, KernelKind: int(cfg.KernelKind), Cmdline: cfg.Cmdline, Serial: len(cfg.Serial),
		Console: cfg.VirtioConsole != nil, RNG: cfg.RNG, UUID: cfg.UUID, Epoch: cfg.Epoch.Unix(),
		RTCOffset: int64(cfg.RTCOffset / time.Second), ExitOnReset: cfg.ExitOnReset,
		Machine: m.Fingerprint(), Counter: cfg.Counter, Created: time.Now().Unix(),
	}
	blobs := [][]byte{cfg.Firmware, cfg.Kernel, cfg.Initrd}
	for _, d := range cfg.Disks {
		s.Disks = append(s.Disks, Disk{d.Backend.Info(), d.QueueSize, d.Queues, d.Modern, d.BootIndex})
	}
	for _, n := range cfg.NICs {
		s.NICs = append(s.NICs, NIC{n.MAC, n.Modern, n.BootIndex, n.Backend.Offloads()})
		blobs = append(blobs, n.ROM)
	}
	for _, b := range blobs {
		s.Blobs = append(s.Blobs, uint64(len(b)))
	}
	return s, blobs
}

// check refuses a setup that no machine can have.
func (s *Setup) check() error {
	devices := len(s.Disks) + len(s.NICs)
	switch {
	case devices > vmm.MaxDevices || s.Serial < 0 || s.Serial > vmm.MaxSerial:
		return fmt.Errorf("%w: %d disks, %d NICs, %d serial ports", ErrNotLog, len(s.Disks), len(s.NICs), s.Serial)
	case len(s.Blobs) != blobFixed+len(s.NICs) || len(s.Blobs) > maxBlobs:
		return fmt.Errorf("%w: %d images", ErrNotLog, len(s.Blobs))
	case s.KernelKind < 0 || s.KernelKind > math.MaxUint8:
		return fmt.Errorf("%w: kernel of kind %d", ErrNotLog, s.KernelKind)
	case s.Counter != "" && s.Counter != vmm.CounterNone && s.Counter != vmm.CounterEmulated && s.Counter != vmm.CounterBranches:
		return fmt.Errorf("%w: this version knows no counter %q", ErrNotLog, s.Counter)
	}
	for _, n := range s.Blobs {
		if n > maxBlob {
			return fmt.Errorf("%w: an image of %d bytes", ErrNotLog, n)
		}
	}
	for _, d := range s.Disks {
		i := d.Info
		if i.Size == 0 || i.Size > math.MaxInt64 || i.Size%blk.SectorSize != 0 || i.BlockSize < blk.SectorSize || i.BlockSize > 64<<10 ||
			i.BlockSize&(i.BlockSize-1) != 0 || d.Queues < 0 || d.Queues > blk.MaxQueues || d.QueueSize&(d.QueueSize-1) != 0 || d.QueueSize > virtio.MaxQueueSize {
			return fmt.Errorf("%w: disk %+v", ErrNotLog, d)
		}
	}
	return nil
}

// Config returns the configuration of an equal machine on stand-ins for the backends, which do nothing: its
// source and sink are to be set. kvm is the path of the KVM device, "" for the usual one.
func (s *Setup) Config(blobs [][]byte, kvm string) (vmm.Config, error) {
	if len(blobs) != len(s.Blobs) {
		return vmm.Config{}, errors.New("log: the images are not those of the setup")
	}
	cfg := vmm.Config{
		Name: s.Name, KVM: kvm, Memory: s.Memory, Firmware: blobs[0], Kernel: blobs[1], Initrd: blobs[2],
		KernelKind: boot.Kind(s.KernelKind), Cmdline: s.Cmdline, Serial: make([]vmm.Console, s.Serial), RNG: s.RNG,
		UUID: s.UUID, Epoch: time.Unix(s.Epoch, 0), RTCOffset: time.Duration(s.RTCOffset) * time.Second, ExitOnReset: s.ExitOnReset,
		Counter: s.Counter,
	}
	if s.Console {
		cfg.VirtioConsole = standIn{}
	}
	for _, d := range s.Disks {
		cfg.Disks = append(cfg.Disks, vmm.Disk{
			Backend: standInDisk{info: d.Info}, QueueSize: d.QueueSize, Queues: d.Queues, Modern: d.Modern, BootIndex: d.BootIndex,
		})
	}
	for i, n := range s.NICs {
		cfg.NICs = append(cfg.NICs, vmm.NIC{
			Backend: standInNIC{offloads: n.Offloads}, MAC: n.MAC, ROM: blobs[blobFixed+i], Modern: n.Modern, BootIndex: n.BootIndex,
		})
	}
	return cfg, nil
}

// standIn is in the place of a console, standInDisk of a disk, standInNIC of a network: a machine
// asks what they are, and nothing else, as its source and sink are others.
type (
	standIn     struct{}
	standInDisk struct {
		backend.Disk
		info backend.DiskInfo
	}
	standInNIC struct {
		backend.NIC
		offloads net.Offloads
	}
)

func (standIn) Output([]byte)                 {}
func (standIn) Start(func([]byte))            {}
func (d standInDisk) Info() backend.DiskInfo  { return d.info }
func (d standInDisk) Close() error            { return nil }
func (n standInNIC) Offloads() net.Offloads   { return n.offloads }
func (n standInNIC) SetOffloads(net.Offloads) {}
func (n standInNIC) Close() error             { return nil }
