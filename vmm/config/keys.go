package config

import (
	"reflect"
	"strings"

	"github.com/ftvmm/ftvmm/vmm/console"
)

// Key is one setting of a guest.
type Key struct {
	Name string // in files; the flag has dashes for underscores, the variable is FTVMM_ and upper case
	Doc  string // one line; a word in backquotes names the value
	List bool   // may be given more than once; in the variable, entries are separated by ";"
	Bool bool
	// set parses the values, one unless List, into the guest.
	set func(g *Guest, values []string) error
}

// Flag returns the setting's flag without its dashes.
func (k Key) Flag() string { return strings.ReplaceAll(k.Name, "_", "-") }

// Env returns the setting's environment variable.
func (k Key) Env() string { return "FTVMM_" + strings.ToUpper(k.Name) }

// Keys returns all settings, in the order in which they are shown.
func Keys() []Key { return keys }

var keys = []Key{
	text("name", "`name` of the guest: lower case letters, digits and dashes", func(g *Guest) *string { return &g.Name }),
	text("guest", "run the embedded `guest`, such as hello or ledger", func(g *Guest) *string { return &g.Embedded }),
	{Name: "memory", Doc: "`size` of the guest's memory, as in 256M or 4G", set: one(func(g *Guest, v string) (err error) {
		g.Memory, err = ParseSize(v)
		return err
	})},
	{Name: "cpus", Doc: "`number` of vCPUs", set: one(func(g *Guest, v string) (err error) {
		g.CPUs, err = parseInt(v)
		return err
	})},
	text("cpu", "processor `model`: host", func(g *Guest) *string { return &g.CPU }),
	text("firmware", "auto, seabios, none or the `file` of an image", func(g *Guest) *string { return &g.Firmware }),
	text("kernel", "`file` of a kernel to enter directly: bzImage, ELF, multiboot or PVH", func(g *Guest) *string { return &g.Kernel }),
	text("kernel_kind", "the kernel's `format`: auto, linux, pvh, multiboot, elf64 or flat (at 1 MiB, never detected)", func(g *Guest) *string { return &g.KernelKind }),
	text("initrd", "`file` of the initial RAM disk", func(g *Guest) *string { return &g.Initrd }),
	text("append", "the kernel's command `line`", func(g *Guest) *string { return &g.Append }),
	list("disk", "add a `disk`: path=FILE[,readonly][,id=…][,bootindex=…][,size=…][,direct=auto|on|off][,queues=…][,queue_size=…][,legacy]",
		ParseDisk, func(g *Guest) *[]Disk { return &g.Disks }),
	list("nic", "add a network `card`: user[,hostfwd=tcp:ADDR:PORT-:PORT][,tftp=DIR] or tap=NAME[,bridge=…], [,mac=…][,mtu=…][,rom=FILE|none][,bootindex=…]",
		ParseNIC, func(g *Guest) *[]NIC { return &g.NICs }),
	list("serial", "connect the next serial `port`: stdio, file:PATH, unix:PATH, pty or none",
		ParseSerial, func(g *Guest) *[]Serial { return &g.Serials }),
	{Name: "console", Doc: "connect a virtio console to this `port`, as for --serial", set: one(func(g *Guest, v string) (err error) {
		g.Console, err = console.ParseSpec(v)
		return err
	})},
	{Name: "debugcon", Doc: "write the firmware's log to this `port`, as for --serial", set: one(func(g *Guest, v string) (err error) {
		g.DebugCon, err = console.ParseSpec(v)
		return err
	})},
	{Name: "rng", Doc: "give the guest a virtio entropy device", Bool: true, set: one(func(g *Guest, v string) (err error) {
		g.RNG, err = parseBool(v)
		return err
	})},
	text("control", "`path` of the control socket", func(g *Guest) *string { return &g.Control }),
	text("events", "write events as JSON lines to this `file`, or to fd:N", func(g *Guest) *string { return &g.Events }),
	text("on_guest_shutdown", "`action` when the guest switches itself off: stop or restart", func(g *Guest) *string { return &g.OnGuestShutdown }),
	text("rtc", "`clock` that the guest's real-time clock shows: utc or local", func(g *Guest) *string { return &g.RTC }),
	text("uuid", "the guest's `UUID`", func(g *Guest) *string { return &g.UUID }),
	text("kvm", "`device` node of KVM", func(g *Guest) *string { return &g.KVM }),
}

func one(set func(g *Guest, v string) error) func(*Guest, []string) error {
	return func(g *Guest, values []string) error { return set(g, values[len(values)-1]) }
}

func text(name, doc string, field func(*Guest) *string) Key {
	return Key{Name: name, Doc: doc, set: one(func(g *Guest, v string) error {
		*field(g) = v
		return nil
	})}
}

func list[T any](name, doc string, parse func(string) (T, error), field func(*Guest) *[]T) Key {
	return Key{Name: name, Doc: doc, List: true, set: func(g *Guest, values []string) error {
		var out []T
		for _, v := range values {
			e, err := parse(v)
			if err != nil {
				return err
			}
			out = append(out, e)
		}
		*field(g) = out
		return nil
	}}
}

// keysBelow returns the keys that a file may have in the table named by path ("" is the top, "disk" a
// disk's), nil if there is no such table.
func keysBelow(path string) []string {
	t := reflect.TypeFor[Guest]()
	for path != "" {
		var part string
		part, path, _ = strings.Cut(path, ".")
		f, ok := fieldOf(t, part)
		if !ok || f.Type.Kind() != reflect.Slice || f.Type.Elem().Kind() != reflect.Struct {
			return nil
		}
		t = f.Type.Elem()
	}
	return keysOf(t)
}

func keysOf(t reflect.Type) []string {
	var names []string
	for i := range t.NumField() {
		names = append(names, fileKey(t.Field(i)))
	}
	return names
}

func fieldOf(t reflect.Type, key string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if f := t.Field(i); fileKey(f) == key {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

func fileKey(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}
