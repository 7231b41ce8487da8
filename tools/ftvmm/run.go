package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/mirror/disk"
	"github.com/ftvmm/ftvmm/mirror/nic"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
	"github.com/ftvmm/ftvmm/vmm/config"
)

// maxFileInMemory bounds a kernel, initrd or option ROM in bytes.
const maxFileInMemory = 1 << 30

// built is a machine with everything that it owns on the host but its consoles.
type built struct {
	*vmm.Machine
	disks []backend.Disk
	nics  []backend.NIC
}

// build makes the machine that g describes, after configure has had its way with the configuration. It ends
// with no machine and nothing open, or with all.
func build(g *config.Guest, ports *ports, event func(string, map[string]any), configure func(*vmm.Config) error) (b *built, err error) {
	b = &built{}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
			b = nil
		}
	}()
	cfg := vmm.Config{
		Name: g.Name, KVM: g.KVM, Memory: uint64(g.Memory), CPUs: g.CPUs, Cmdline: g.Append, RNG: g.RNG,
		UUID: guestUUID(g), Event: event,
	}
	if cfg.KernelKind, err = boot.ParseKind(g.KernelKind); err != nil {
		return b, err
	}
	if g.RTC == config.RTCLocal {
		_, seconds := time.Now().Zone()
		cfg.RTCOffset = time.Duration(seconds) * time.Second
	}
	if cfg.Firmware, err = readFirmware(g.Firmware); err != nil {
		return b, err
	}
	if g.Embedded != "" {
		cfg.Kernel, err = guests.Image(g.Embedded)
	} else {
		cfg.Kernel, err = readFile(g.Kernel)
	}
	if err != nil {
		return b, err
	}
	if cfg.Initrd, err = readFile(g.Initrd); err != nil {
		return b, err
	}
	for i, d := range g.Disks {
		dev, err := openDisk(d, i)
		if err != nil {
			return b, fmt.Errorf("disk[%d]: %w", i, err)
		}
		b.disks = append(b.disks, dev)
		cfg.Disks = append(cfg.Disks, vmm.Disk{
			Backend: dev, QueueSize: uint16(d.QueueSize), Queues: d.Queues, Modern: !*d.Legacy, BootIndex: d.BootIndex,
		})
	}
	for i, n := range g.NICs {
		card, err := openNIC(g.Name, i, n)
		if err != nil {
			return b, fmt.Errorf("nic[%d]: %w", i, err)
		}
		b.nics = append(b.nics, card.Backend)
		cfg.NICs = append(cfg.NICs, card)
	}
	for _, c := range ports.serials {
		cfg.Serial = append(cfg.Serial, c)
	}
	if ports.virtio != nil {
		cfg.VirtioConsole = ports.virtio
	}
	if ports.debug != nil {
		cfg.DebugConsole = ports.debug.Output
	}
	if err := configure(&cfg); err != nil {
		return b, err
	}
	b.Machine, err = vmm.New(cfg)
	return b, err
}

// Close frees the machine, then lets go of networks and disks; the disks' writes are durable afterwards.
func (b *built) Close() error {
	var errs []error
	if b.Machine != nil {
		errs = append(errs, b.Machine.Close())
	}
	for _, n := range b.nics {
		errs = append(errs, n.Close())
	}
	for _, d := range b.disks {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}

func readFirmware(setting string) ([]byte, error) {
	switch setting {
	case config.FirmwareNone:
		return nil, nil
	case config.FirmwareSeaBIOS:
		path, err := firmware.FindSeaBIOS()
		if err != nil {
			return nil, err
		}
		return firmware.ReadImage(path)
	}
	return firmware.ReadImage(setting)
}

// readFile reads a file of bounded size; no path, no content.
func readFile(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFileInMemory+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) > maxFileInMemory {
		return nil, fmt.Errorf("read %s: the file is larger than %d bytes", path, maxFileInMemory)
	}
	return b, nil
}

func openDisk(d config.Disk, index int) (backend.Disk, error) {
	opts := disk.Options{ReadOnly: d.ReadOnly, Create: uint64(d.Size), ID: d.ID}
	if opts.ID == "" {
		opts.ID = fmt.Sprintf("ftvmm-disk%d", index)
	}
	if err := opts.Direct.UnmarshalText([]byte(d.Direct)); err != nil {
		return nil, err
	}
	return disk.Open(d.Path, opts)
}

func openNIC(guest string, index int, n config.NIC) (vmm.NIC, error) {
	spec, err := nic.ParseNIC(n.Spec())
	if err != nil {
		return vmm.NIC{}, err
	}
	card := vmm.NIC{MAC: spec.MAC, Modern: !*n.Legacy, BootIndex: n.BootIndex}
	if spec.MAC == (nic.MAC{}) {
		card.MAC = nic.DefaultMAC(guest, index)
	}
	if card.ROM, err = readFile(n.ROMPath()); err != nil {
		return vmm.NIC{}, err
	}
	card.Backend, err = nic.Open(spec)
	return card, err
}

// guestUUID is the UUID of the configuration, or one that follows from the guest's name, so that it is the same
// on every host.
func guestUUID(g *config.Guest) (id [16]byte) {
	if g.UUID != "" {
		b, err := hex.DecodeString(strings.ReplaceAll(g.UUID, "-", ""))
		if err == nil && len(b) == len(id) { // the configuration was checked
			copy(id[:], b)
			return id
		}
	}
	sum := sha256.Sum256([]byte("ftvmm UUID\x00" + g.Name))
	copy(id[:], sum[:])
	id[6] = id[6]&0x0f | 0x80 // version 8: by whatever method (RFC 9562, 5.8)
	id[8] = id[8]&0x3f | 0x80 // the RFC's variant
	return id
}
