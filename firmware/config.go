package firmware

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/ftvmm/ftvmm/devices/fwcfg"
	"github.com/ftvmm/ftvmm/firmware/acpi"
	"github.com/ftvmm/ftvmm/firmware/smbios"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Config describes the machine to its firmware and, by tables, to its operating system.
type Config struct {
	RAM    uint64   // bytes, as in [Layout]
	CPUs   int      // 1 to acpi.MaxCPUs
	UUID   [16]byte // in the order in which a UUID is written
	Serial string   // serial number in the SMBIOS tables; empty for none

	COM1, COM2 bool   // serial ports at 0x3f8 and 0x2f8
	I8042      bool   // keyboard and mouse controller
	VGA        bool   // VGA adapter
	PMBase     uint16 // base port of the PIIX4's power management; 0 means acpi.PMBase
	// PCI64Base and PCI64Size are a window for PCI memory above 4 GiB and above the RAM;
	// a size of 0 means none.
	PCI64Base, PCI64Size uint64

	// BootOrder names what to boot from, best first, as [BootDisk] and its siblings spell it.
	BootOrder []string
	// ConsolePort is the serial port on which SeaBIOS shows its text screen, such as
	// 0x3f8; 0 for none.
	ConsolePort uint16
	// ROMs are option ROMs that SeaBIOS runs after those of the PCI devices.
	ROMs []ROM
}

// ROM is an option ROM without a device.
type ROM struct {
	Name string // of the file, such as "kernel.bin"
	Data []byte
}

// maxBootOrder bounds the entries of Config.BootOrder.
const maxBootOrder = 64

// pciRoot is the name of the PCI bus in a boot order (Open Firmware's device paths).
const pciRoot = "/pci@i0cf8"

// BootDisk names the virtio disk in a PCI slot, for Config.BootOrder.
func BootDisk(slot int) string { return fmt.Sprintf(pciRoot+"/scsi@%x/disk@0,0", slot) }

// BootNIC names the network card in a PCI slot, for Config.BootOrder.
func BootNIC(slot int) string { return fmt.Sprintf(pciRoot+"/ethernet@%x/ethernet-phy@0", slot) }

// BootIDE names a drive of the PIIX3's IDE controller, for Config.BootOrder: channel
// and unit are 0 or 1.
func BootIDE(channel, unit int) string {
	return fmt.Sprintf(pciRoot+"/ide@1,1/drive@%x/disk@%x", channel, unit)
}

// BootROM names an option ROM of Config.ROMs, for Config.BootOrder.
func BootROM(name string) string { return "/rom@" + romDir + name }

const romDir = "genroms/"

// systemStates is the file etc/system-states: for S0 to S5, bit 7 says that the
// state exists and the rest is its SLP_TYP. We have S0 and S5.
var systemStates = []byte{0x80, 0, 0, 1, 2, 0x80}

// noReboot is the file etc/boot-fail-wait, milliseconds until a reboot when nothing
// was bootable: never.
const noReboot = 0xffff_ffff

func (c Config) tables() (acpi.Tables, smbios.Tables, error) {
	a, err := acpi.Build(acpi.Config{
		CPUs: c.CPUs, LowRAMEnd: LowRAM(c.RAM), PCI64Base: c.PCI64Base, PCI64Size: c.PCI64Size,
		PMBase: c.PMBase, COM1: c.COM1, COM2: c.COM2, I8042: c.I8042, VGA: c.VGA,
	})
	if err != nil {
		return a, smbios.Tables{}, err
	}
	s, err := smbios.Build(smbios.Config{
		UUID: c.UUID, CPUs: c.CPUs, LowRAM: LowRAM(c.RAM), HighRAM: HighRAM(c.RAM), Serial: c.Serial,
	})
	return a, s, err
}

// Configure fills the fw_cfg device of a guest that SeaBIOS or OVMF starts.
func Configure(d *fwcfg.Device, c Config) error {
	if _, err := Layout(c.RAM, 0); err != nil {
		return err
	}
	a, s, err := c.tables()
	if err != nil {
		return err
	}
	order, err := bootOrder(c.BootOrder)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	noGraphic := uint16(1)
	if c.VGA {
		noGraphic = 0
	}
	type item struct {
		key  uint16
		data []byte
	}
	items := []item{
		{fwcfg.KeyRAMSize, le.AppendUint64(nil, c.RAM)},
		{fwcfg.KeyCPUs, le.AppendUint16(nil, uint16(c.CPUs))},
		{fwcfg.KeyMaxCPUs, le.AppendUint16(nil, uint16(c.CPUs))},
		{fwcfg.KeyUUID, c.UUID[:]},
		{fwcfg.KeyNoGraphic, le.AppendUint16(nil, noGraphic)},
		{fwcfg.KeyNUMA, le.AppendUint64(nil, 0)},
		{fwcfg.KeyBootMenu, le.AppendUint16(nil, 0)}, // no menu, and so no wait for a key
		{fwcfg.KeyIRQ0Override, []byte{1}},
	}
	for _, i := range items {
		if err := d.SetItem(i.key, i.data); err != nil {
			return err
		}
	}
	type file struct {
		name string
		data []byte
	}
	files := []file{
		{"etc/e820", e820File(c.RAM)},
		{"etc/system-states", systemStates},
		{"etc/boot-fail-wait", le.AppendUint32(nil, noReboot)},
		{acpi.FileRSDP, a.RSDP},
		{acpi.FileTables, a.Tables},
		{acpi.FileLoader, a.Loader},
		{smbios.FileAnchor, s.Anchor},
		{smbios.FileTables, s.Structures},
	}
	if len(c.BootOrder) > 0 {
		files = append(files, file{"bootorder", order})
	}
	if c.ConsolePort != 0 {
		files = append(files, file{"etc/sercon-port", le.AppendUint16(nil, c.ConsolePort)})
	}
	for _, r := range c.ROMs {
		files = append(files, file{romDir + r.Name, r.Data})
	}
	for _, f := range files {
		if err := d.AddFile(f.name, f.data); err != nil {
			return err
		}
	}
	return nil
}

// bootOrder returns the file bootorder: lines, of which the last ends with a zero.
func bootOrder(order []string) ([]byte, error) {
	if len(order) > maxBootOrder {
		return nil, fmt.Errorf("firmware: %d entries in the boot order, at most %d are possible", len(order), maxBootOrder)
	}
	for _, o := range order {
		if !strings.HasPrefix(o, "/") || strings.ContainsAny(o, "\n\x00") {
			return nil, fmt.Errorf("firmware: %q in the boot order is no device path", o)
		}
	}
	return append([]byte(strings.Join(order, "\n")), 0), nil
}

// Where the tables of a guest without firmware lie: in the area below 1 MiB that
// [E820] reserves and that every operating system searches.
const (
	acpiBase   = 0xe_0000
	smbiosBase = 0xf_0000
)

// Install places the ACPI and SMBIOS tables for a guest that boots without firmware,
// and returns the address of the ACPI root pointer.
func Install(mem *memory.Memory, c Config) (rsdp uint64, err error) {
	a, s, err := c.tables()
	if err != nil {
		return 0, err
	}
	if a.Size() > smbiosBase-acpiBase || len(s.Structures) > BIOSEnd-smbiosBase {
		return 0, fmt.Errorf("firmware: ACPI tables of %d bytes and SMBIOS tables of %d do not fit below 1 MiB", a.Size(), len(s.Structures))
	}
	if err := s.Install(mem, smbiosBase); err != nil {
		return 0, err
	}
	return a.Install(mem, acpiBase)
}
