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
	Initrd   string `toml:"initrd" json:"initrd"`
	// Append is the kernel's command line.
	Append string `toml:"append" json:"append"`
	// Embedded is the name of a guest that ftvmm carries in itself.
	Embedded string `toml:"guest" json:"guest"`

	Disks   []Disk   `toml:"disk" json:"disk"`
	NICs    []NIC    `toml:"nic" json:"nic"`
	Serials []Serial `toml:"serial" json:"serial"`
	// Console is what the virtio console is connected to; "none": there is no virtio console.
	Console console.Spec `toml:"console" json:"console"`
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
	Size     Size `toml:"size,omitempty" json:"size,omitempty"`
	ReadOnly bool `toml:"readonly" json:"readonly"`
	// Direct says whether the host's page cache is passed by: "auto", "on" or "off".
	Direct string `toml:"direct" json:"direct"`
	// Model is the device that the guest sees: "virtio-blk".
	Model string `toml:"model" json:"model"`
	// Legacy offers the device to drivers from before virtio 1.0.
	Legacy bool `toml:"legacy" json:"legacy"`
	// QueueSize is the entries of a virtqueue, a power of two; Queues is how many queues.
	QueueSize int `toml:"queue_size" json:"queue_size"`
	Queues    int `toml:"queues" json:"queues"`
	// ID is the serial number that the guest reads, at most [MaxID] bytes.
	ID string `toml:"id,omitempty" json:"id,omitempty"`
	// BootIndex orders what the firmware tries to boot from, lowest first; nil: not tried before the others.
	BootIndex *int `toml:"bootindex,omitempty" json:"bootindex,omitempty"`
}

// NIC is one network card.
type NIC struct {
	// Backend is the network and its main argument: "user", "tap=tap0".
	Backend string `toml:"backend" json:"backend"`
	// Options are the backend's own settings, as in "hostfwd=tcp:127.0.0.1:8080-:80".
	Options []string `toml:"options,omitempty" json:"options,omitempty"`
	// MAC is the card's address; empty: derived from the guest's name and the card's number.
	MAC string `toml:"mac,omitempty" json:"mac,omitempty"`
	// ROM is the option ROM from which SeaBIOS boots over the network: a path, or "none". Empty: the
	// host's iPXE if it is installed.
	ROM       string `toml:"rom,omitempty" json:"rom,omitempty"`
	Model     string `toml:"model" json:"model"`
	Legacy    bool   `toml:"legacy" json:"legacy"`
	QueueSize int    `toml:"queue_size" json:"queue_size"`
	ID        string `toml:"id,omitempty" json:"id,omitempty"`
	BootIndex *int   `toml:"bootindex,omitempty" json:"bootindex,omitempty"`
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
		Memory: 256 * MiB, CPUs: 1, CPU: CPUHost, KVM: "/dev/kvm", Firmware: FirmwareAuto,
		Serials: []Serial{{Backend: console.Spec{Kind: console.Stdio}}},
		RNG:     true, OnGuestShutdown: Stop, RTC: RTCUTC,
	}
}

// fill gives the entries of lists the defaults of their fields, and resolves "auto".
func (g *Guest) fill() {
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
	}
	for i := range g.NICs {
		n := &g.NICs[i]
		n.Model = orDefault(n.Model, ModelNIC)
		n.QueueSize = orDefault(n.QueueSize, defaultQueueSize)
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
	switch n.ROM {
	case "":
		if usable(DefaultROM, false) == nil {
			return DefaultROM
		}
		return ""
	case ROMNone:
		return ""
	}
	return n.ROM
}
