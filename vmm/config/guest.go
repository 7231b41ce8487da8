package config

import (
	"github.com/ftvmm/ftvmm/vmm/console"
)

// Limits of a machine.
const (
	MinMemory    = 2 * MiB
	MaxMemory    = 1 * TiB
	MaxDisks     = 16
	MaxNICs      = 8
	MaxSerials   = 2 // COM1 and COM2
	MaxQueueSize = 1024
	MaxQueues    = 16
	MaxID        = 20 // what VIRTIO_BLK_T_GET_ID carries (virtio 1.2, 5.2.6)
	MaxBootIndex = 1 << 16
)

// Guest describes one guest. The zero value of a field means its default in [Default] only
// where that says so; start from Default.
type Guest struct {
	// Name is how other commands refer to the guest; it also places the control socket.
	Name string `toml:"name" json:"name"`
	// UUID is shown to the guest by SMBIOS; empty: derived from the name.
	UUID   string `toml:"uuid" json:"uuid"`
	Memory Size   `toml:"memory" json:"memory"`
	CPUs   int    `toml:"cpus" json:"cpus"`
	// CPU is the processor's model; "host" is the host's with what determinism forbids masked out.
	CPU string `toml:"cpu" json:"cpu"`
	// KVM is the device node of the hypervisor.
	KVM string `toml:"kvm" json:"kvm"`

	// Firmware is "seabios", "none" (the kernel is entered directly), the path of an image, or
	// "auto": none if there is a kernel or an embedded guest, else seabios.
	Firmware string `toml:"firmware" json:"firmware"`
	Kernel   string `toml:"kernel" json:"kernel"`
	// KernelKind is the format of the kernel file, KernelAuto to detect it; a flat file cannot be detected.
	KernelKind string `toml:"kernel_kind" json:"kernel_kind"`
	Initrd     string `toml:"initrd" json:"initrd"`
	// Append is the kernel's command line.
	Append string `toml:"append" json:"append"`
	// Embedded is the name of a guest that ftvmm carries in itself.
	Embedded string `toml:"guest" json:"guest"`

	Disks   []Disk   `toml:"disk" json:"disk"`
	NICs    []NIC    `toml:"nic" json:"nic"`
	Serials []Serial `toml:"serial" json:"serial"`
	// Console is what the virtio console is connected to; "none": there is no virtio console.
	Console console.Spec `toml:"console" json:"console"`
	// DebugCon is where SeaBIOS's log goes, which it writes to port 0x402.
	DebugCon console.Spec `toml:"debugcon" json:"debugcon"`
	// RNG gives the guest a virtio entropy device.
	RNG bool `toml:"rng" json:"rng"`

	// Control is the path of the control socket; empty: [ControlPath] of the name, or no
	// socket if the guest has no name.
	Control string `toml:"control" json:"control"`
	// Events is where events go, as JSON lines: a path or "fd:N"; empty: nowhere.
	Events string `toml:"events" json:"events"`
	// OnGuestShutdown says what happens when the guest switches itself off: "stop" or "restart".
	OnGuestShutdown string `toml:"on_guest_shutdown" json:"on_guest_shutdown"`
	// RTC is what the real-time clock shows: "utc" (Linux) or "local" (Windows).
	RTC string `toml:"rtc" json:"rtc"`
}

// Disk is one disk.
type Disk struct {
	// Path is the image: a raw file or a block device.
	Path string `toml:"path" json:"path"`
	// Size, if not 0, creates an image that does not exist, with that many bytes.
	Size     Size `toml:"size,omitzero" json:"size,omitzero"`
	ReadOnly bool `toml:"readonly" json:"readonly"`
	// Direct says whether the host's page cache is passed by: "auto", "on" or "off".
	Direct string `toml:"direct" json:"direct"`
	// Model is the device that the guest sees: "virtio-blk".
	Model string `toml:"model" json:"model"`
	// Legacy also offers the interface from before virtio 1.0, for old drivers; default true.
	Legacy *bool `toml:"legacy" json:"legacy"`
	// QueueSize is the entries of a virtqueue, a power of two; Queues is how many queues.
	QueueSize int `toml:"queue_size" json:"queue_size"`
	Queues    int `toml:"queues" json:"queues"`
	// ID is the serial number that the guest reads, at most [MaxID] bytes.
	ID string `toml:"id,omitempty" json:"id,omitempty"`
	// BootIndex orders what the firmware tries to boot from, from 1; 0: not a boot device.
	BootIndex int `toml:"bootindex,omitzero" json:"bootindex,omitzero"`
}

// NIC is one network card and its network. The settings of the network are those of package
// mirror/nic under the same names, which also defines their defaults and what they can be: here they
// are carried as they were written, to [NIC.Spec].
type NIC struct {
	// ROM is the option ROM from which SeaBIOS boots over the network: a path, or "none". Empty: the
	// host's iPXE if it is installed and the card has a boot index.
	ROM string `toml:"rom,omitempty" json:"rom,omitempty"`
	// Model is the device that the guest sees: "virtio-net".
	Model  string `toml:"model" json:"model"`
	Legacy *bool  `toml:"legacy" json:"legacy"` // as for a disk
	// BootIndex orders what the firmware tries to boot from, from 1; 0: not a boot device.
	BootIndex int `toml:"bootindex,omitzero" json:"bootindex,omitzero"`

	Kind string `toml:"kind" json:"kind"` // "user" or "tap"
	MAC  string `toml:"mac,omitempty" json:"mac,omitempty"`
	MTU  int    `toml:"mtu,omitzero" json:"mtu,omitzero"`

	Tap    string `toml:"tap,omitempty" json:"tap,omitempty"`
	Bridge string `toml:"bridge,omitempty" json:"bridge,omitempty"`
	Netns  string `toml:"netns,omitempty" json:"netns,omitempty"`
	Create *bool  `toml:"create,omitempty" json:"create,omitempty"`
	Vnet   *bool  `toml:"vnet,omitempty" json:"vnet,omitempty"`

	Net          string   `toml:"net,omitempty" json:"net,omitempty"`
	HostForwards []string `toml:"hostfwd,omitempty" json:"hostfwd,omitempty"`
	TFTP         string   `toml:"tftp,omitempty" json:"tftp,omitempty"`
	BootFile     string   `toml:"bootfile,omitempty" json:"bootfile,omitempty"`
	NextServer   string   `toml:"next_server,omitempty" json:"next_server,omitempty"`
	Hostname     string   `toml:"hostname,omitempty" json:"hostname,omitempty"`
	Domain       string   `toml:"domain,omitempty" json:"domain,omitempty"`
	Resolvers    []string `toml:"resolver,omitempty" json:"resolver,omitempty"`
	Restrict     bool     `toml:"restrict,omitempty" json:"restrict,omitempty"`
	HostLoopback *bool    `toml:"host_loopback,omitempty" json:"host_loopback,omitempty"`
}

// Serial is one serial port, COM1 first.
type Serial struct {
	Backend console.Spec `toml:"backend" json:"backend"`
}

// The models and words that settings take.
const (
	FirmwareAuto    = "auto"
	FirmwareSeaBIOS = "seabios"
	FirmwareNone    = "none"
	CPUHost         = "host"
	ModelDisk       = "virtio-blk"
	ModelNIC        = "virtio-net"
	ROMNone         = "none"
	Stop            = "stop"
	Restart         = "restart"
	RTCUTC          = "utc"
	KernelAuto      = "auto"
	RTCLocal        = "local"
	DirectAuto      = "auto"
	DirectOn        = "on"
	DirectOff       = "off"
)

// defaultQueueSize is the number of entries of a virtqueue, as in other VMMs.
const defaultQueueSize = 256

// DefaultROM is the iPXE option ROM for virtio-net, of Debian's ipxe-qemu.
const DefaultROM = "/usr/lib/ipxe/qemu/pxe-virtio.rom"

// Default returns a guest with every setting at its default.
func Default() *Guest {
	return &Guest{
		Memory: 256 * MiB, CPUs: 1, CPU: CPUHost, KVM: "/dev/kvm", Firmware: FirmwareAuto, KernelKind: KernelAuto,
		Serials: []Serial{{Backend: console.Spec{Kind: console.Stdio}}}, Console: console.Spec{Kind: console.None}, DebugCon: console.Spec{Kind: console.None},
		RNG: true, OnGuestShutdown: Stop, RTC: RTCUTC,
	}
}

// fill gives the entries of lists the defaults of their fields, and resolves "auto".
func (g *Guest) fill() {
	yes := true
	if g.Firmware == FirmwareAuto {
		g.Firmware = FirmwareSeaBIOS
		if g.Kernel != "" || g.Embedded != "" {
			g.Firmware = FirmwareNone
		}
	}
	for i := range g.Disks {
		d := &g.Disks[i]
		d.Direct = orDefault(d.Direct, DirectAuto)
		d.Model = orDefault(d.Model, ModelDisk)
		d.QueueSize = orDefault(d.QueueSize, defaultQueueSize)
		d.Queues = orDefault(d.Queues, 1)
		d.Legacy = orDefault(d.Legacy, &yes)
	}
	for i := range g.NICs {
		n := &g.NICs[i]
		n.Model = orDefault(n.Model, ModelNIC)
		n.Legacy = orDefault(n.Legacy, &yes)
		if n.Kind == "" && n.Tap != "" {
			n.Kind = "tap"
		}
	}
	if g.Control == "" && g.Name != "" {
		g.Control = ControlPath(g.Name)
	}
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}

// ROMPath returns the option ROM to give to the card, or "" for none.
func (n NIC) ROMPath() string {
	switch {
	case n.ROM == ROMNone, n.ROM == "" && n.BootIndex == 0:
		return ""
	case n.ROM != "":
		return n.ROM
	case usable(DefaultROM, false) == nil:
		return DefaultROM
	}
	return ""
}
