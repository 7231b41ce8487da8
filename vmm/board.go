package vmm

import (
	"errors"
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/debug"
	"github.com/ftvmm/ftvmm/devices/fwcfg"
	"github.com/ftvmm/ftvmm/devices/ioapic"
	"github.com/ftvmm/ftvmm/devices/lapic"
	"github.com/ftvmm/ftvmm/devices/pci"
	"github.com/ftvmm/ftvmm/devices/pic"
	"github.com/ftvmm/ftvmm/devices/piix"
	"github.com/ftvmm/ftvmm/devices/pit"
	"github.com/ftvmm/ftvmm/devices/rtc"
	"github.com/ftvmm/ftvmm/devices/serial"
	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/console"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/devices/virtio/rng"
	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// Where the board's devices are (docs/machine.md).
const (
	portMasterPIC = 0x20
	portPIT       = 0x40
	portSystemB   = 0x61
	portRTC       = 0x70
	portPOST      = 0x80
	portSlavePIC  = 0xa0
	portDebugExit = 0xf4
	portCOM2      = 0x2f8
	portCOM1      = 0x3f8
	portDebugCon  = 0x402
	portELCR      = 0x4d0
	portFwCfg     = 0x510
	portPCIConfig = 0xcf8

	mmioIOAPIC = 0xfec0_0000
	mmioLAPIC  = 0xfee0_0000
	apicWindow = 0x1000

	gsiTimer      = 0
	gsiTimerPin   = 2 // of the I/O APIC, by the MADT's override
	gsiCOM2       = 3
	gsiCOM1       = 4
	gsiRTC        = 8
	isaInterrupts = 16

	firstSlot = 3 // of the virtio devices; 2 is a display adapter's

	// What firmware sets up, for a kernel that is booted without one.
	directPMBase   = 0x600
	directIOBase   = 0xc000
	directMMIOBase = 0xe000_0000
	directELCR     = 0x0c // IRQ 10 and 11 are level-triggered
	lapicSVR       = 0xf0
	lapicLINT0     = 0x350
	lapicLINT1     = 0x360
	svrEnabled     = 0x1ff // APIC on, spurious vector 0xff
	lvtExtINT      = 0x700
	lvtNMI         = 0x400
)

// directPIRQ routes PIRQA to PIRQD for a kernel without firmware.
var directPIRQ = [4]uint8{10, 10, 11, 11}

// board builds the devices and wires them.
func (m *Machine) board() error {
	m.clock = devices.NewClock()
	m.irqs = devices.NewInterrupts()
	m.ports, m.mmio = devices.NewPortBus(), devices.NewMemoryBus()

	m.apics = lapic.NewBus()
	m.apic = lapic.New(m.clock, 0, (*processor)(m))
	m.ioapic = ioapic.New(m.apics)
	m.pic = pic.New(m.apic.LINT0())
	for n := range devices.NumGSI {
		switch {
		case n == gsiTimer:
			m.irqs.Connect(n, m.pic.Line(n))
			m.irqs.Connect(n, m.ioapic.Line(gsiTimerPin))
		case n == gsiTimerPin: // the PIC's cascade
		default:
			if n < isaInterrupts {
				m.irqs.Connect(n, m.pic.Line(n))
			}
			m.irqs.Connect(n, m.ioapic.Line(n))
		}
	}
	m.pit = pit.New(m.clock, m.irqs.Source(gsiTimer))
	m.rtc = rtc.New(m.clock, m.irqs.Source(gsiRTC), rtc.Config{
		Epoch: m.cfg.Epoch.Unix(), UTCOffset: int64(m.cfg.RTCOffset.Seconds()),
		BelowFourGiB: firmware.LowRAM(m.cfg.Memory), AboveFourGiB: firmware.HighRAM(m.cfg.Memory), CPUs: m.cfg.CPUs,
	})
	m.pci = pci.NewBus()
	var err error
	m.chipset, err = piix.New(m.clock, m.pci, piix.Config{
		Interrupts: m.irqs,
		OnSleep:    m.onSleep,
		OnReset:    func() { m.resetWanted = true },
	})
	if err != nil {
		return err
	}
	m.fwcfg = fwcfg.New(m.mem)
	post := debug.NewPOST()

	add(m, "clock", m.clock, nil)
	add(m, "interrupts", m.irqs, nil)
	add(m, "lapic0", m.apic, m.apic.Reset)
	add(m, "ioapic", m.ioapic, m.ioapic.Reset)
	add(m, "pic", m.pic, m.pic.Reset)
	add(m, "pit", m.pit, m.pit.Reset)
	add(m, "rtc", m.rtc, m.rtc.Reset)
	add(m, "pci", m.pci, m.pci.Reset)
	add(m, "piix", m.chipset, m.chipset.Reset)
	add(m, "fw_cfg", m.fwcfg, m.fwcfg.Reset)
	add(m, "post", post, post.Reset)

	debugOut := m.cfg.DebugConsole
	if debugOut == nil {
		debugOut = func([]byte) {}
	}
	for _, w := range []struct {
		base, size uint64
		h          devices.Handler
	}{
		{portMasterPIC, 2, m.pic.Master()}, {portSlavePIC, 2, m.pic.Slave()}, {portELCR, 2, m.pic.ELCR()},
		{portPIT, 4, m.pit}, {portSystemB, 1, m.pit.Port61()}, {portRTC, 2, m.rtc},
		{portPOST, 1, post}, {portDebugCon, 1, debug.NewConsole(debugOut)},
		{portDebugExit, 4, debug.NewExit(m.onDebugExit)},
		{portFwCfg, 12, m.fwcfg}, {portPCIConfig, 8, m.pci.ConfigPorts()},
	} {
		if err := m.ports.Map(w.base, w.size, w.h); err != nil {
			return err
		}
	}
	if len(m.cfg.Firmware) > 0 {
		d := m.description()
		if len(m.cfg.Kernel) > 0 {
			rom, err := boot.OnBIOS(m.fwcfg, boot.Params{
				Kind: m.cfg.KernelKind, Kernel: m.cfg.Kernel, Initrd: m.cfg.Initrd, Cmdline: m.cfg.Cmdline,
				E820: firmware.E820(m.cfg.Memory),
			})
			if err != nil {
				return err
			}
			d.ROMs = append(d.ROMs, rom)
			d.BootOrder = append([]string{firmware.BootROM(boot.ROMName)}, d.BootOrder...)
		}
		if err := firmware.Configure(m.fwcfg, d); err != nil {
			return err
		}
	}
	m.ports.SetResolver(m.pci.IO())
	m.mmio.SetResolver(m.pci.Memory())
	if err := errors.Join(
		m.mmio.Map(mmioIOAPIC, apicWindow, m.ioapic),
		m.mmio.Map(mmioLAPIC, apicWindow, m.apic),
		m.apics.Add(m.apic),
	); err != nil {
		return err
	}
	if err := m.serialPorts(); err != nil {
		return err
	}
	return m.virtioDevices()
}

func (m *Machine) serialPorts() error {
	for i := range m.cfg.Serial {
		base, gsi := uint64(portCOM1), gsiCOM1
		if i == 1 {
			base, gsi = portCOM2, gsiCOM2
		}
		name := fmt.Sprintf("serial%d", i)
		u := serial.New(m.clock, name, m.irqs.Source(gsi), func(p []byte) { m.sink.Console(i, p) })
		if err := m.ports.Map(base, serial.Size, u); err != nil {
			return err
		}
		add(m, name, u, u.Reset)
		m.uarts = append(m.uarts, u)
	}
	return nil
}

// virtioDevices puts disks, NICs, random device and console on the PCI bus, in this order.
func (m *Machine) virtioDevices() error {
	slot := uint8(firstSlot)
	var err error
	attach := func(name string, dev virtio.Device, opts virtio.Options, rom []byte) {
		if slot >= firstSlot+MaxDevices {
			err = fmt.Errorf("vmm: more than %d disks, NICs and other PCI devices", MaxDevices)
			return
		}
		opts.Name = name
		t := virtio.New(m.mem, m.apics, dev, opts)
		f := t.Function()
		devfn := slot << 3
		f.SetInterruptPin(m.chipset.INTx(devfn, 1))
		if rom != nil {
			f.SetROM(rom)
		}
		err = errors.Join(err, m.pci.Add(devfn, f))
		slot++
	}
	for i, d := range m.cfg.Disks {
		info := d.Backend.Info()
		b := blk.New(blk.Config{
			Capacity: info.Size, BlockSize: info.BlockSize, ReadOnly: info.ReadOnly, Discard: info.Discard,
			ID: info.ID, Queues: max(d.Queues, 1),
		}, diskPort{m, i})
		name := fmt.Sprintf("disk%d", i)
		attach(name, b, virtio.Options{Transitional: !d.Modern, QueueSize: d.QueueSize}, nil)
		add(m, name, b, b.Reset)
		m.disks = append(m.disks, b)
	}
	for i, n := range m.cfg.NICs {
		d := net.New(net.Config{MAC: n.MAC, Offloads: n.Backend.Offloads()}, nicPort{m, i})
		name := fmt.Sprintf("nic%d", i)
		attach(name, d, virtio.Options{Transitional: !n.Modern}, n.ROM)
		add(m, name, d, d.Reset)
		m.nics = append(m.nics, d)
	}
	if m.cfg.RNG {
		m.entropy = rng.New(entropyPort{m})
		attach("rng", m.entropy, virtio.Options{Transitional: true}, nil)
		add(m, "rng", m.entropy, m.entropy.Reset)
	}
	if m.cfg.VirtioConsole != nil {
		m.vcon = console.New(func(p []byte) { m.sink.Console(len(m.cfg.Serial), p) })
		attach("console", m.vcon, virtio.Options{Transitional: true}, nil)
		add(m, "console", m.vcon, m.vcon.Reset)
	}
	return err
}

// The devices' way to the output sink.
type (
	diskPort struct {
		m *Machine
		i int
	}
	nicPort struct {
		m *Machine
		i int
	}
	entropyPort struct{ m *Machine }
)

func (p diskPort) Submit(r *blk.Request)        { p.m.sink.Disk(p.i, r) }
func (p nicPort) Transmit(frame []byte)         { p.m.sink.Frame(p.i, frame) }
func (p nicPort) SetOffloads(o net.Offloads)    { p.m.sink.Offloads(p.i, o) }
func (p entropyPort) Entropy(tag uint64, n int) { p.m.sink.Entropy(tag, n) }

// processor is what the local APIC does to the vCPU.
type processor Machine

// INIT of the processor that booted begins anew at the reset vector (SDM vol. 3, 9.4.2).
func (p *processor) INIT(uint32)           { p.resetWanted = true }
func (p *processor) StartUp(uint32, uint8) {}
func (p *processor) NMI(uint32)            { p.nmi = true }
func (p *processor) EOI(vector uint8)      { p.ioapic.EOI(vector) }

// onSleep ends the machine when the guest enters S5; other sleep states are not offered by
// the ACPI tables and are ignored.
func (m *Machine) onSleep(typ uint8) {
	if typ == 0 {
		m.event("powered-off", nil)
		m.end(Exit{Reason: ExitPowerOff})
	}
}

func (m *Machine) onDebugExit(code uint32) { m.end(Exit{Reason: ExitDebugExit, Code: code}) }

// powerOn loads what the machine boots and puts the vCPU at its first instruction.
func (m *Machine) powerOn() error {
	if m.powerOnCPU == nil {
		s, err := m.cpuState()
		if err != nil {
			return err
		}
		m.powerOnCPU = &s
	}
	s := *m.powerOnCPU
	var (
		entry boot.Entry
		err   error
	)
	if len(m.cfg.Firmware) > 0 {
		entry, err = m.loadFirmware()
	} else {
		entry, err = m.loadKernel()
	}
	if err != nil {
		return err
	}
	enter(&s, entry)
	return m.setCPU(&s)
}

// loadFirmware places the firmware image.
func (m *Machine) loadFirmware() (boot.Entry, error) {
	if err := firmware.LoadImage(m.mem, m.cfg.Firmware); err != nil {
		return boot.Entry{}, err
	}
	return boot.ResetVector(), nil
}

// loadKernel does what firmware would do, and loads the kernel.
func (m *Machine) loadKernel() (boot.Entry, error) {
	if err := m.chipset.EnablePM(directPMBase); err != nil {
		return boot.Entry{}, err
	}
	m.chipset.Route(directPIRQ)
	m.ports.Write(portELCR+1, 1, directELCR)
	if err := m.pci.Assign(directIOBase, directMMIOBase, firmware.IOAPICBase, m.chipset.IRQ); err != nil {
		return boot.Entry{}, err
	}
	m.apic.Write(lapicSVR, 4, svrEnabled)
	m.apic.Write(lapicLINT0, 4, lvtExtINT)
	m.apic.Write(lapicLINT1, 4, lvtNMI)
	rsdp, err := firmware.Install(m.mem, m.description())
	if err != nil {
		return boot.Entry{}, err
	}
	return boot.Load(m.mem, boot.Params{
		Kind: m.cfg.KernelKind, Kernel: m.cfg.Kernel, Initrd: m.cfg.Initrd, Cmdline: m.cfg.Cmdline,
		E820: firmware.E820(m.cfg.Memory), RSDP: rsdp,
	})
}

// enter sets the registers that a boot protocol prescribes.
func enter(s *CPUState, e boot.Entry) {
	r, sr := &s.Regs, &s.Sregs
	r.RIP, r.RSP, r.RFLAGS = e.RIP, e.RSP, e.RFLAGS|1<<1
	r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI = e.RAX, e.RBX, e.RCX, e.RDX, e.RSI, e.RDI
	for _, p := range []struct {
		to   *kvm.Segment
		from *boot.Segment
	}{
		{&sr.CS, &e.CS}, {&sr.DS, &e.DS}, {&sr.ES, &e.ES}, {&sr.FS, &e.FS}, {&sr.GS, &e.GS},
		{&sr.SS, &e.SS}, {&sr.TR, &e.TR}, {&sr.LDT, &e.LDT},
	} {
		*p.to = kvm.Segment{
			Base: p.from.Base, Limit: p.from.Limit, Selector: p.from.Selector, Typ: p.from.Type,
			DPL: p.from.DPL, S: boolByte(p.from.S), Present: boolByte(p.from.Present), DB: boolByte(p.from.DB),
			L: boolByte(p.from.L), G: boolByte(p.from.G), Unusable: boolByte(!p.from.Present),
		}
	}
	sr.GDT.Base, sr.GDT.Limit = e.GDT.Base, e.GDT.Limit
	sr.IDT.Base, sr.IDT.Limit = e.IDT.Base, e.IDT.Limit
	sr.CR0, sr.CR3, sr.CR4, sr.EFER = e.CR0, e.CR3, e.CR4, e.EFER
}
