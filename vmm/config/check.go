package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/console"
)

// Checks says what [Guest.Check] needs to know from elsewhere.
type Checks struct {
	// Guests are the names of the embedded guests.
	Guests []string
	// NIC checks the network of a card, in the notation of [NIC.Spec]; nil accepts all. An [Error] gives code and remedy.
	NIC func(spec string) error
	// Restoring is set if the state comes from a file, so that there need be nothing to boot.
	Restoring bool
	// BareFirmware is set if the user has asked for the firmware by name, so that there need be nothing for it to boot.
	BareFirmware bool
	// SkipFiles leaves out whether files exist: for a configuration that is meant for another host.
	SkipFiles bool
}

// ValidName tells whether s can be a guest's name: up to 63 lower case letters, digits and dashes, a letter first.
func ValidName(s string) bool {
	if s == "" || len(s) > 63 || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// validUUID tells whether s is written as 8-4-4-4-12 hexadecimal digits.
func validUUID(s string) bool {
	for i := range len(s) {
		switch i {
		case 8, 13, 18, 23:
			if s[i] != '-' {
				return false
			}
		default:
			if !strings.ContainsRune("0123456789abcdefABCDEF", rune(s[i])) {
				return false
			}
		}
	}
	return len(s) == 36
}

// checker collects errors.
type checker struct {
	*Guest
	Checks
	errs Errors
}

func (c *checker) fail(code Code, key, remedy, format string, args ...any) {
	c.errs = append(c.errs, &Error{Code: code, Key: key, Message: fmt.Sprintf(format, args...), Remedy: remedy})
}

// Check returns everything that keeps this guest from being run, as [Errors], or nil.
func (g *Guest) Check(how Checks) error {
	c := &checker{Guest: g, Checks: how}
	c.identity()
	c.board()
	c.boot()
	c.disks()
	c.nics()
	c.ports()
	c.bootOrder()
	return c.errs.err()
}

func (c *checker) identity() {
	if c.Name != "" && !ValidName(c.Name) {
		c.fail(BadValue, "name", "use up to 63 lower case letters, digits and dashes, a letter first", "%q is no name of a guest", c.Name)
	}
	if c.UUID != "" && !validUUID(c.UUID) {
		c.fail(BadValue, "uuid", "write it as 8-4-4-4-12 hexadecimal digits, or leave it out", "%q is no UUID", c.UUID)
	}
	if len(c.Control) > console.MaxSocketPath {
		c.fail(BadValue, "control", "choose a shorter path", "the path is %d bytes long, at most %d are possible", len(c.Control), console.MaxSocketPath)
	}
}

func (c *checker) oneOf(key, value string, words ...string) {
	if slices.Contains(words, value) {
		return
	}
	remedy := "use " + strings.Join(words, " or ")
	if near := Nearest(value, words); near != "" {
		remedy = fmt.Sprintf("did you mean %q?", near)
	}
	c.fail(BadValue, key, remedy, "%q is not possible here", value)
}

func (c *checker) board() {
	switch {
	case c.Memory < MinMemory:
		c.fail(MemoryTooSmall, "memory", "give at least "+MinMemory.String(), "%s is too small for any guest", c.Memory)
	case c.Memory > MaxMemory:
		c.fail(MemoryTooLarge, "memory", "give at most "+MaxMemory.String(), "%s is more than this machine model has room for", c.Memory)
	case c.Memory%MiB != 0:
		c.fail(BadValue, "memory", fmt.Sprintf("round it to %s", (c.Memory/MiB+1)*MiB), "%d bytes are no whole number of MiB", uint64(c.Memory))
	}
	switch {
	case c.CPUs < 1:
		c.fail(BadValue, "cpus", "give 1", "%d vCPUs are not possible", c.CPUs)
	case c.CPUs > 1:
		c.fail(Unsupported, "cpus", "give 1", "this version runs guests with one vCPU, not %d", c.CPUs)
	}
	c.oneOf("cpu", c.CPU, CPUHost)
	c.oneOf("kernel_kind", c.KernelKind, KernelAuto, "linux", "pvh", "multiboot", "elf64", "flat")
	c.oneOf("on_guest_shutdown", c.OnGuestShutdown, Stop, Restart)
	c.oneOf("rtc", c.RTC, RTCUTC, RTCLocal)
	if c.KVM == "" {
		c.fail(BadValue, "kvm", "use /dev/kvm", "the device node is missing")
	}
}

// usable says whether path is a file that can be read, and written if write is set.
func usable(path string, write bool) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return unix.EISDIR
	}
	mode := uint32(unix.R_OK)
	if write {
		mode |= unix.W_OK
	}
	return unix.Faccessat(unix.AT_FDCWD, path, mode, unix.AT_EACCESS)
}

// file checks a file that must exist.
func (c *checker) file(key, path string, write bool, code Code, remedy string) {
	if c.SkipFiles {
		return
	}
	err := usable(path, write)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
		c.fail(code, key, remedy, "%s does not exist", path)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		verb := "read"
		if write {
			verb = "read and written"
		}
		c.fail(NoPermission, key, "change the file's permissions, or run ftvmm as a user that may use it", "%s may not be %s by this user", path, verb)
	default:
		c.fail(code, key, remedy, "%s cannot be used: %s", path, cause(err))
	}
}

func (c *checker) boot() {
	if c.Kernel != "" && c.Embedded != "" {
		c.fail(Conflict, "kernel", "leave one out", "a kernel and an embedded guest exclude each other")
	}
	if c.Embedded != "" && !slices.Contains(c.Guests, c.Embedded) {
		remedy := "there are " + strings.Join(c.Guests, ", ")
		if near := Nearest(c.Embedded, c.Guests); near != "" {
			remedy = fmt.Sprintf("did you mean %q?", near)
		}
		c.fail(GuestNotFound, "guest", remedy, "there is no embedded guest %q", c.Embedded)
	}
	if c.Kernel != "" {
		c.file("kernel", c.Kernel, false, KernelNotFound, "name a kernel image: bzImage, ELF, multiboot or PVH")
	}
	if c.Initrd != "" {
		if c.Kernel == "" {
			c.fail(Conflict, "initrd", "name the kernel too", "an initrd is of no use without a kernel")
		}
		c.file("initrd", c.Initrd, false, InitrdNotFound, "name an initial RAM disk that exists")
	}
	if c.Append != "" && c.Kernel == "" && c.Embedded == "" {
		c.fail(Conflict, "append", "name the kernel too", "a command line is of no use without a kernel")
	}
	if strings.ContainsRune(c.Append, 0) {
		c.fail(BadValue, "append", "remove it", "the command line contains a NUL")
	}
	hasKernel := c.Kernel != "" || c.Embedded != ""
	if !isWord(c.Firmware) {
		c.file("firmware", c.Firmware, false, FirmwareNotFound, "apt-get install seabios, or name an image that exists")
	}
	if c.Restoring || hasKernel || c.BareFirmware && c.Firmware != FirmwareNone {
		return
	}
	const what = "give --kernel FILE or --disk path=FILE, or try: ftvmm run --guest hello"
	if c.Firmware == FirmwareNone {
		c.fail(NothingToBoot, "", what, "there is neither a kernel nor a firmware")
	} else if len(c.Disks) == 0 && len(c.NICs) == 0 && c.Firmware == FirmwareSeaBIOS {
		c.fail(NothingToBoot, "", what, "there is no kernel, no disk and no network card to boot from")
	}
}

func (c *checker) queue(key string, size int) {
	if size < 2 || size > MaxQueueSize || size&(size-1) != 0 {
		c.fail(BadValue, key+".queue_size", fmt.Sprintf("use a power of two from 2 to %d", MaxQueueSize), "%d is no size of a virtqueue", size)
	}
}

func (c *checker) disks() {
	if len(c.Disks) > MaxDisks {
		c.fail(TooMany, "disk", "remove some", "%d disks, there is room for %d", len(c.Disks), MaxDisks)
	}
	paths, ids := map[string]int{}, map[string]bool{}
	for i, d := range c.Disks {
		key := fmt.Sprintf("disk[%d]", i)
		c.oneOf(key+".model", d.Model, ModelDisk)
		c.oneOf(key+".direct", d.Direct, DirectAuto, DirectOn, DirectOff)
		c.queue(key, d.QueueSize)
		if d.Queues < 1 || d.Queues > MaxQueues {
			c.fail(BadValue, key+".queues", fmt.Sprintf("use 1 to %d", MaxQueues), "%d queues are not possible", d.Queues)
		}
		if len(d.ID) > MaxID || !printable(d.ID) {
			c.fail(BadValue, key+".id", fmt.Sprintf("use at most %d printable ASCII characters", MaxID), "%q is no ID of a disk", d.ID)
		}
		if d.ID != "" && ids[d.ID] {
			c.fail(Conflict, key+".id", "give each disk an ID of its own", "the ID %q is used twice", d.ID)
		}
		ids[d.ID] = true
		if d.Path == "" {
			c.fail(BadValue, key+".path", "name an image, as in path=root.img", "the path is missing")
			continue
		}
		clean, err := filepath.Abs(d.Path)
		if err != nil {
			clean = d.Path
		}
		if j, twice := paths[clean]; twice && (!d.ReadOnly || !c.Disks[j].ReadOnly) {
			c.fail(Conflict, key+".path", "make both read-only, or copy the image", "%s is also disk[%d]", d.Path, j)
		}
		paths[clean] = i
		if d.Size%512 != 0 {
			c.fail(BadValue, key+".size", "use a multiple of 512 bytes", "%d bytes are no whole number of sectors", uint64(d.Size))
		}
		if d.Size != 0 && d.ReadOnly {
			c.fail(Conflict, key+".size", "leave size or readonly out", "a new image that is read-only would stay empty")
		}
		_, missing := os.Stat(d.Path)
		dir := filepath.Dir(d.Path)
		switch {
		case d.Size == 0 || missing == nil:
			c.file(key+".path", d.Path, !d.ReadOnly, ImageNotFound, "name an image that exists, or add size=10G (say) to create it")
		case c.SkipFiles:
		case unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS) != nil:
			c.fail(NoPermission, key+".path", "create the directory, or change its permissions", "no image can be created in %s", dir)
		}
	}
}

func printable(s string) bool {
	for _, r := range s {
		if r < 0x20 || r > 0x7e {
			return false
		}
	}
	return true
}

func (c *checker) nics() {
	if len(c.NICs) > MaxNICs {
		c.fail(TooMany, "nic", "remove some", "%d network cards, there is room for %d", len(c.NICs), MaxNICs)
	}
	macs := map[string]bool{}
	for i, n := range c.NICs {
		key := fmt.Sprintf("nic[%d]", i)
		c.oneOf(key+".model", n.Model, ModelNIC)
		if c.NIC != nil {
			var e *Error
			if err := c.NIC(n.Spec()); errors.As(err, &e) {
				c.errs = append(c.errs, &Error{Code: e.Code, Key: key, Message: e.Message, Remedy: e.Remedy})
			} else if err != nil {
				c.fail(BadValue, key, "see ftvmm run --help for --nic", "%v", err)
			}
		}
		if mac, err := net.ParseMAC(n.MAC); err == nil {
			if macs[mac.String()] {
				c.fail(Conflict, key+".mac", "give each card an address of its own", "%s is used twice", mac)
			}
			macs[mac.String()] = true
		}
		if n.ROM != "" && n.ROM != ROMNone {
			c.file(key+".rom", n.ROM, false, ROMNotFound, "apt-get install ipxe-qemu, or use rom=none")
		}
	}
}

func (c *checker) ports() {
	if len(c.Serials) > MaxSerials {
		c.fail(TooMany, "serial", "remove some", "%d serial ports, there are %d", len(c.Serials), MaxSerials)
	}
	used := map[string]string{}
	port := func(key string, s console.Spec) {
		switch s.Kind {
		case console.Stdio, console.Unix, console.File:
			if first, twice := used[s.String()]; twice {
				c.fail(Conflict, key, "connect one of them to something else, or to none", "%s is connected to %s already", first, s)
			}
			used[s.String()] = key
		}
	}
	for i, s := range c.Serials {
		port(fmt.Sprintf("serial[%d]", i), s.Backend)
	}
	port("console", c.Console)
	port("debugcon", c.DebugCon)
	if c.Control != "" {
		port("control", console.Spec{Kind: console.Unix, Path: c.Control})
	}
}

func (c *checker) bootOrder() {
	used := map[int]string{}
	index := func(key string, n int) {
		if n == 0 {
			return
		}
		if n < 0 || n > MaxBootIndex {
			c.fail(BadValue, key+".bootindex", fmt.Sprintf("use 1 to %d, or 0 for none", MaxBootIndex), "%d is no place in the boot order", n)
		}
		if first, twice := used[n]; twice {
			c.fail(Conflict, key+".bootindex", "give each device a place of its own", "%s has boot index %d already", first, n)
		}
		used[n] = key
	}
	for i, d := range c.Disks {
		index(fmt.Sprintf("disk[%d]", i), d.BootIndex)
	}
	for i, n := range c.NICs {
		index(fmt.Sprintf("nic[%d]", i), n.BootIndex)
	}
}
