package vmm

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/fwcfg"
	"github.com/ftvmm/ftvmm/devices/ioapic"
	"github.com/ftvmm/ftvmm/devices/lapic"
	"github.com/ftvmm/ftvmm/devices/pci"
	"github.com/ftvmm/ftvmm/devices/pic"
	"github.com/ftvmm/ftvmm/devices/piix"
	"github.com/ftvmm/ftvmm/devices/pit"
	"github.com/ftvmm/ftvmm/devices/rtc"
	"github.com/ftvmm/ftvmm/devices/serial"
	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/console"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/devices/virtio/rng"
	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/vmm/backend"
	"github.com/ftvmm/ftvmm/vmm/kvm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Limits of a machine's configuration.
const (
	MaxCPUs    = 1
	MaxSerial  = 2
	MaxDevices = 28 // disks, NICs and other PCI devices together: slots 3 to 30
)

// DefaultKVM is where Linux offers KVM.
const DefaultKVM = "/dev/kvm"

// Disk is a virtio-blk disk of a machine.
type Disk struct {
	Backend   backend.Disk
	QueueSize uint16 // entries of each queue; 0: the device's default
	Queues    int    // 0: one
	Modern    bool   // offer virtio 1.x only, not the transitional interface
	BootIndex int    // order among boot devices, from 1; 0: not a boot device
}

// NIC is a virtio-net card of a machine.
type NIC struct {
	Backend   backend.NIC
	MAC       [6]byte
	ROM       []byte // option ROM, for booting from the network; nil: none
	Modern    bool
	BootIndex int
}

// Config describes a machine. The zero value of a field means what its comment says.
type Config struct {
	Name   string
	KVM    string // path of the KVM device; DefaultKVM
	Memory uint64 // bytes of RAM; whole pages, at least 2 MiB
	CPUs   int    // 1

	// Firmware is an image such as SeaBIOS; nil boots Kernel directly.
	Firmware []byte
	// Kernel, with Initrd and Cmdline, is a kernel file in one of the formats of package
	// boot. On top of Firmware it is offered by fw_cfg.
	Kernel, Initrd []byte
	KernelKind     boot.Kind
	Cmdline        string

	Disks []Disk
	NICs  []NIC
	// Serial are the ends of COM1 and COM2; a nil one is not connected, and a missing one is not there.
	Serial []Console
	// VirtioConsole is the end of a virtio console; nil: no such device.
	VirtioConsole Console
	RNG           bool // a virtio entropy device

	UUID [16]byte // what SMBIOS tells; stays the same at failover
	// Epoch is the wall-clock time at power-on that the guest's RTC starts from; zero: now.
	Epoch time.Time
	// RTCOffset is added to UTC in the RTC, for guests that keep local time there.
	RTCOffset time.Duration

	// DebugConsole receives what the guest writes to port 0x402 (SeaBIOS's log); nil discards it.
	DebugConsole func(p []byte)
	// ExitOnReset ends the machine when the guest asks for a reset.
	ExitOnReset bool
	// Event is told what happens to the machine, from the vCPU loop; it must not block. nil: nobody.
	Event func(name string, fields map[string]any)
	// Observe is called on the vCPU loop for each synchronous exit. The record is lent for the call.
	Observe func(r *ExitRecord)

	// Source and Sink replace the Live source that New makes from the backends.
	Source InputSource
	Sink   OutputSink
	// Wrap, if set, puts a source and a sink between the machine and those that it would have.
	Wrap func(InputSource, OutputSink) (InputSource, OutputSink)
	// DirtyLog has KVM log the pages that the guest writes, for Machine.TakeDirty. The first write to a page costs more.
	DirtyLog bool
	// Counter gives names to stops between synchronous exits, for a source that is an
	// [AsyncSource]; "" is CounterNone.
	Counter CounterKind
}

// Machine is one guest. See the package comment.
type Machine struct {
	cfg  Config
	sys  *kvm.System
	vm   *kvm.VM
	vcpu *kvm.VCPU
	run  *kvm.Run
	mem  *memory.Memory

	// Guest-visible state, written by the vCPU loop alone.
	ports      *devices.Bus
	mmio       *devices.Bus
	clock      *devices.Clock
	irqs       *devices.Interrupts
	pic        *pic.Pair
	pit        *pit.Device
	rtc        *rtc.Device
	apics      *lapic.Bus
	apic       *lapic.APIC
	ioapic     *ioapic.IOAPIC
	pci        *pci.Bus
	chipset    *piix.Chipset
	fwcfg      *fwcfg.Device
	uarts      []*serial.Device
	disks      []*blk.Device
	nics       []*net.Device
	entropy    *rng.Device
	vcon       *console.Device
	components []component // everything that is saved, in a fixed order
	cpuid      []kvm.CPUIDEntry
	pvm        bool // the host's KVM is KVM-PVM (emulate32.go)

	// State of the loop.
	slice        slice
	record       ExitRecord // lent to Config.Observe
	pos          Position
	incomplete   bool // the last exit's instruction is not complete
	dangling     bool // KVM may wait for the result of the last exit
	halted       bool // in a HLT
	nmi          bool // an NMI is to be injected
	inputsRung   bool // inputs may wait for the next synchronous exit
	commandsRung bool // commands may wait for the end of this stop
	inputs       []Input
	resetWanted  bool // the guest has asked for a reset, which happens at the end of this stop
	stopWanted   bool // the source has asked for the end of the run
	named        bool // this stop has a position that another run of the guest reaches too
	opening      opening
	noWindow     bool // until the next exit: where the guest can take interrupts has no name
	fresh        bool // a term begins at this stop: its inputs are taken first
	frozen       bool // by Freeze
	quitting     bool // Quit was called
	exit         *Exit
	stats        Stats
	powerOnCPU   *CPUState // the vCPU as KVM creates it

	source  InputSource
	sink    OutputSink
	counter Counter     // nil: none
	async   AsyncSource // the source, of a machine with a counter
	stuck   Stucker     // the source, if it is one
	lingers Lingerer    // the same
	live    *Live       // the source and sink, when New made them
	bell    Bell
	queue   chan command
	started atomic.Bool
	paused  atomic.Bool
	done    chan struct{} // closed when the loop has ended
}

// New makes a machine in its power-on state. The caller closes it.
func New(cfg Config) (*Machine, error) {
	if cfg.KVM == "" {
		cfg.KVM = DefaultKVM
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 1
	}
	if cfg.CPUs != 1 {
		return nil, fmt.Errorf("vmm: %d vCPUs asked for, this version runs %d", cfg.CPUs, MaxCPUs)
	}
	if cfg.Epoch.IsZero() {
		cfg.Epoch = time.Now()
	}
	if len(cfg.Firmware) == 0 && len(cfg.Kernel) == 0 {
		return nil, errors.New("vmm: a machine needs firmware or a kernel to boot")
	}
	if len(cfg.Serial) > MaxSerial {
		return nil, fmt.Errorf("vmm: %d serial ports asked for, at most %d", len(cfg.Serial), MaxSerial)
	}
	m := &Machine{cfg: cfg, named: true, queue: make(chan command, maxCommands), done: make(chan struct{})}
	if err := m.build(); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (m *Machine) build() error {
	var err error
	if m.sys, err = kvm.Open(m.cfg.KVM); err != nil {
		return err
	}
	if m.vm, err = m.sys.CreateVM(); err != nil {
		return err
	}
	if err := m.vm.DisablePMU(); err != nil {
		return err
	}
	// Before the memory slots: each of them begins a grace period in the kernel (SRCU), and
	// the filter would wait for the next one, which takes 12 ms.
	if err := m.vm.FilterMSRs(kernelMSRs); err != nil {
		return err
	}
	extents, err := firmware.Layout(m.cfg.Memory, uint64(len(m.cfg.Firmware)))
	if err != nil {
		return err
	}
	if m.mem, err = memory.New(extents...); err != nil {
		return err
	}
	var flags uint32
	if m.cfg.DirtyLog {
		flags = kvm.MemLogDirtyPages
	}
	for i, r := range m.mem.Regions() {
		if err := m.vm.SetMemory(uint32(i), r.Base, r.Bytes, flags); err != nil {
			return err
		}
	}
	if m.vcpu, err = m.vm.CreateVCPU(0); err != nil {
		return err
	}
	m.run = m.vcpu.RunPage()
	m.bell.run, m.bell.pid = m.run, os.Getpid()
	supported, err := m.sys.SupportedCPUID()
	if err != nil {
		return err
	}
	m.cpuid = CPUIDTable(supported, 0)
	if err := m.vcpu.SetCPUID(m.cpuid); err != nil {
		return err
	}
	if m.cfg.Observe != nil {
		m.run.ValidRegs = kvm.SyncRegsBit
	}
	if _, err := os.Stat(pvmModule); err == nil {
		m.pvm = true
		m.run.ValidRegs |= kvm.SyncSregsBit
	}
	if err := m.connect(); err != nil {
		return err
	}
	if err := m.board(); err != nil {
		return err
	}
	if err := m.count(); err != nil {
		return err
	}
	m.source.Attach(&m.bell)
	return m.powerOn()
}

// connect makes the source and sink.
func (m *Machine) connect() error {
	m.source, m.sink = m.cfg.Source, m.cfg.Sink
	if (m.source == nil) != (m.sink == nil) {
		return errors.New("vmm: Config.Source and Config.Sink are set together or not at all")
	}
	if m.source == nil {
		disks := make([]backend.Disk, len(m.cfg.Disks))
		for i := range disks {
			disks[i] = m.cfg.Disks[i].Backend
		}
		nics := make([]backend.NIC, len(m.cfg.NICs))
		for i := range nics {
			nics[i] = m.cfg.NICs[i].Backend
		}
		consoles := append([]Console(nil), m.cfg.Serial...)
		consoles = append(consoles, m.cfg.VirtioConsole)
		live, err := NewLive(disks, nics, consoles)
		if err != nil {
			return err
		}
		live.frameRoom = func(nic int) int { return m.nics[nic].Room() }
		live.consoleRoom = m.consoleRoom
		m.live, m.source, m.sink = live, live, live
	}
	if m.cfg.Wrap != nil {
		m.source, m.sink = m.cfg.Wrap(m.source, m.sink)
	}
	m.stuck, _ = m.source.(Stucker)
	m.lingers, _ = m.source.(Lingerer)
	return nil
}

// count makes the counter.
func (m *Machine) count() error {
	switch m.cfg.Counter {
	case "", CounterNone:
		return nil
	case CounterEmulated:
		c, err := newEmulated(m.vcpu)
		if err != nil {
			return err
		}
		m.counter = c
		m.async, _ = m.source.(AsyncSource)
		return c.Restart()
	case CounterBranches:
		// It counts from the first exit on, on the thread that runs the guest.
		c, err := newBranches(m.vcpu)
		if err != nil {
			return err
		}
		m.counter = c
		m.async, _ = m.source.(AsyncSource)
		return nil
	}
	return fmt.Errorf("vmm: there is no counter %q", m.cfg.Counter)
}

// consoleRoom returns how many bytes a console's device can take now.
func (m *Machine) consoleRoom(i int) int {
	switch {
	case i < len(m.uarts):
		return m.uarts[i].Room()
	case m.vcon != nil:
		return m.vcon.Room()
	}
	return 0
}

// Close frees the machine. It must not be running; backends are closed by their owner afterwards.
func (m *Machine) Close() error {
	var errs []error
	if m.live != nil {
		errs = append(errs, m.live.Close())
	}
	if m.counter != nil {
		errs = append(errs, m.counter.Close())
	}
	if m.vcpu != nil {
		errs = append(errs, m.vcpu.Close())
	}
	if m.vm != nil {
		errs = append(errs, m.vm.Close())
	}
	if m.mem != nil {
		errs = append(errs, m.mem.Close())
	}
	if m.sys != nil {
		errs = append(errs, m.sys.Close())
	}
	return errors.Join(errs...)
}

// Memory returns the guest's memory, for reading by a caller that has paused the machine
// or seen it end.
func (m *Machine) Memory() *memory.Memory { return m.mem }

func (m *Machine) event(name string, fields map[string]any) {
	if m.cfg.Event != nil {
		m.cfg.Event(name, fields)
	}
}

// unknownMSR counts an access that raises #GP, and reports the first few.
func (m *Machine) unknownMSR(index uint32, write bool, v uint64) {
	const reported = 16
	if m.stats.UnknownMSRs++; m.stats.UnknownMSRs <= reported {
		m.event("unknown-msr", map[string]any{"msr": fmt.Sprintf("%#x", index), "write": write, "value": fmt.Sprintf("%#x", v)})
	}
}

// completed reports a completion of a request that its device does not know: a backend that
// answers twice, or a log of another guest. The guest does not notice.
func (m *Machine) completed(err error) {
	if err != nil {
		m.event("stray-completion", map[string]any{"error": err.Error()})
	}
}

// apply brings one input to its device.
func (m *Machine) apply(in *Input) {
	switch in.Kind {
	case InputTime:
		m.clock.Advance(in.Time)
	case InputDisk:
		m.completed(m.disks[in.Device].Complete(in.Tag, blk.Status(in.Status)))
	case InputFrame:
		m.nics[in.Device].Receive(in.Data)
	case InputLink:
		m.nics[in.Device].SetLink(in.Up)
	case InputConsole:
		if int(in.Device) < len(m.uarts) {
			m.uarts[in.Device].Receive(in.Data)
		} else if m.vcon != nil {
			m.vcon.Receive(in.Data)
		}
	case InputEntropy:
		m.completed(m.entropy.Complete(in.Tag, in.Data))
	case InputPowerButton:
		m.chipset.PressPowerButton()
	case InputReset:
		m.resetWanted = true
	case InputStop:
		m.stopWanted = true
	}
}

// reset is a system reset: every device as at power-on, memory as it is.
func (m *Machine) reset() error {
	if m.cfg.ExitOnReset {
		m.end(Exit{Reason: ExitReset})
		return nil
	}
	if err := m.completeAll(); err != nil {
		return err
	}
	m.stats.Resets++
	m.event("reset", nil)
	for i := range m.components {
		if r := m.components[i].reset; r != nil {
			r()
		}
	}
	m.halted, m.nmi, m.resetWanted = false, false, false
	return m.powerOn()
}
