// Package tap connects a guest to a tap interface of the host (Documentation/networking/tuntap.rst
// in the kernel's source): what the guest sends, the host receives on the interface, and
// the other way round.
//
// An interface that exists is used as it is, without privilege if its owner is this user;
// one that does not is made, and goes away with the process. Frames carry the virtio header,
// so that the kernel takes large segments and partial checksums from the guest and, once the driver
// has agreed, hands them to it.
package tap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

const (
	devicePath = "/dev/net/tun"
	// minFrame is an Ethernet header: the kernel takes nothing smaller.
	minFrame = net.HeaderSize + 14
	// Offsets in struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6).
	hdrFlags      = 0
	hdrNumBuffers = 10
	// copyLimit is the size in bytes up to which a received frame is copied into a small
	// buffer: cheaper than giving away the large one that it was read into.
	copyLimit = 2048
	// linkQueue bounds the link messages that wait between netlink and us.
	linkQueue = 64
)

// offloads is what the kernel does for frames with a virtio header.
const offloads = net.TxChecksum | net.TxTSO4 | net.TxTSO6 | net.RxChecksum | net.RxTSO4 | net.RxTSO6

// Config says which tap is opened, and how.
type Config struct {
	Name    string // the interface's name, at most 15 bytes
	Bridge  string // the bridge that it is put into; "" leaves it where it is
	Netns   string // the network namespace that both are in, a name or a path; "" is ours
	Create  bool   // make the interface if it does not exist
	MTU     int    // bytes; 0 leaves it as it is
	VnetHdr bool   // offer offloads to the guest
}

// Validate checks what can be known without looking at the host.
func (c *Config) Validate() error {
	if err := checkName(c.Name); err != nil {
		return mirror.Errorf("tap-name", "Use up to 15 letters, digits, dots and hyphens.", "tap: %w", err)
	}
	if c.Bridge != "" {
		if err := checkName(c.Bridge); err != nil {
			return mirror.Errorf("bridge-name", "Use up to 15 letters, digits, dots and hyphens.", "bridge of tap %s: %w", c.Name, err)
		}
	}
	return nil
}

// checkName refuses what the kernel's dev_valid_name does, and a '%', which would have it
// choose a number.
func checkName(name string) error {
	if name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".." {
		return fmt.Errorf("%q is not the name of an interface", name)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c >= 0x7f || c == '/' || c == ':' || c == '%' {
			return fmt.Errorf("%q is not the name of an interface", name)
		}
	}
	return nil
}

// Tap is an open tap; it implements [backend.NIC].
type Tap struct {
	name     string
	index    int
	mtu      int
	vnet     bool
	ns       netns.NsHandle // netns.None() is ours
	file     *os.File       // for reading: through the runtime's poller
	accepted atomic.Uint32  // [net.Offloads] that the guest takes
	dropped  atomic.Uint64  // frames from the guest

	stop  chan struct{}
	tasks sync.WaitGroup

	mu     sync.Mutex // guards what follows, and fd against its closing
	fd     int
	closed bool
}

// Open opens the tap and puts it into service. Errors are of type [*mirror.Error].
func Open(c Config) (*Tap, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	ns, err := openNetns(c.Netns)
	if err != nil {
		return nil, mirror.Errorf("netns-missing", "Check the name: ip netns list shows those that exist.", "tap %s: network namespace %s: %w", c.Name, c.Netns, err)
	}
	t := &Tap{name: c.Name, vnet: c.VnetHdr, ns: ns, fd: -1, stop: make(chan struct{})}
	if err := t.open(c); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func openNetns(name string) (netns.NsHandle, error) {
	switch {
	case name == "":
		return netns.None(), nil
	case strings.Contains(name, "/"):
		return netns.GetFromPath(name)
	}
	return netns.GetFromName(name)
}

func (t *Tap) open(c Config) error {
	nl, err := netlink.NewHandleAt(t.ns, unix.NETLINK_ROUTE)
	if err != nil {
		return mirror.Errorf("tap-netlink", "Check that this user may use the network namespace.", "tap %s: %w", c.Name, err)
	}
	defer nl.Close()
	if _, err := nl.LinkByName(c.Name); err != nil {
		if !errors.As(err, &netlink.LinkNotFoundError{}) {
			return mirror.Errorf("tap-netlink", "Check that this user may use the network namespace.", "tap %s: %w", c.Name, err)
		}
		if !c.Create {
			return mirror.Errorf("tap-missing", "Make it: "+t.recipe(c)+".", "tap %s does not exist", c.Name)
		}
	}
	if err := t.inNetns(func() error { return t.attach(c) }); err != nil {
		return err
	}
	link, err := nl.LinkByName(c.Name)
	if err != nil {
		return mirror.Errorf("tap-netlink", "Start again: something renamed or removed the interface.", "tap %s: %w", c.Name, err)
	}
	t.index = link.Attrs().Index
	if err := t.configure(nl, link, c); err != nil {
		return err
	}
	if link, err = nl.LinkByIndex(t.index); err != nil {
		return mirror.Errorf("tap-netlink", "Start again: something removed the interface.", "tap %s: %w", c.Name, err)
	}
	t.mtu = link.Attrs().MTU
	return nil
}

// recipe is what root has to type for this configuration to work without root.
func (t *Tap) recipe(c Config) string {
	in := ""
	if c.Netns != "" {
		in = "-n " + c.Netns + " "
	}
	r := fmt.Sprintf("sudo ip %stuntap add dev %s mode tap user $USER && sudo ip %slink set %s up", in, c.Name, in, c.Name)
	if c.Bridge != "" {
		r += " master " + c.Bridge
	}
	return r
}

// inNetns calls f on a thread in the tap's namespace: an open tun device belongs to that of
// the thread that opened it.
func (t *Tap) inNetns(f func() error) error {
	if !t.ns.IsOpen() {
		return f()
	}
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so that no other
		// goroutine can ever run in the wrong namespace.
		runtime.LockOSThread()
		if err := netns.Set(t.ns); err != nil {
			result <- mirror.Errorf("netns-not-permitted", "Run as root, or make the tap in your own namespace.", "tap %s: enter its network namespace: %w", t.name, err)
			return
		}
		result <- f()
	}()
	return <-result
}

// attach opens the tun device and connects it to the interface, making it if need be.
func (t *Tap) attach(c Config) error {
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		reason, remedy := "tun-missing", "Load the module: sudo modprobe tun."
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			reason, remedy = "tap-not-permitted", "Give this user access to "+devicePath+", or use the network kind \"user\"."
		}
		return mirror.Errorf(reason, remedy, "tap %s: open %s: %w", c.Name, devicePath, err)
	}
	t.fd = fd
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if c.VnetHdr {
		flags |= unix.IFF_VNET_HDR
	}
	err = setInterface(fd, c.Name, flags)
	if errors.Is(err, unix.EINVAL) {
		// An existing tap that was made with several queues; we use one.
		err = setInterface(fd, c.Name, flags|unix.IFF_MULTI_QUEUE)
	}
	switch {
	case err == nil:
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return mirror.Errorf("tap-not-permitted", "Let root make it for this user: "+t.recipe(c)+".", "tap %s: %w", c.Name, err)
	case errors.Is(err, unix.EBUSY):
		return mirror.Errorf("tap-in-use", "Stop the program that uses it, or choose another tap.", "tap %s is in use: %w", c.Name, err)
	case errors.Is(err, unix.EINVAL):
		return mirror.Errorf("tap-not-a-tap", "Choose another name.", "tap %s: an interface of another type has this name: %w", c.Name, err)
	default:
		return mirror.Errorf("tap-open", "Check the kernel's log.", "tap %s: %w", c.Name, err)
	}
	if c.VnetHdr {
		err = errors.Join(
			unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, net.HeaderSize),
			unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 1),
			unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0),
		)
		if err != nil {
			return mirror.Errorf("tap-offload", "Use vnet=off.", "tap %s: set up offloads: %w", c.Name, err)
		}
	}
	t.file = os.NewFile(uintptr(fd), devicePath)
	return nil
}

func setInterface(fd int, name string, flags uint16) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(flags)
	return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
}

// configure brings the interface into the state that c asks for. What is so already is
// left alone: then it takes no privilege.
func (t *Tap) configure(nl *netlink.Handle, link netlink.Link, c Config) error {
	failed := func(what string, err error) error {
		reason, remedy := "tap-configure", "Check the interface with: ip -d link show "+c.Name+"."
		if errors.Is(err, unix.EPERM) {
			reason, remedy = "tap-not-permitted", "Let root set it up: "+t.recipe(c)+"."
		}
		return mirror.Errorf(reason, remedy, "tap %s: %s: %w", c.Name, what, err)
	}
	if c.MTU != 0 && link.Attrs().MTU != c.MTU {
		if err := nl.LinkSetMTU(link, c.MTU); err != nil {
			return failed(fmt.Sprintf("set the MTU to %d", c.MTU), err)
		}
	}
	if c.Bridge != "" {
		bridge, err := nl.LinkByName(c.Bridge)
		if err != nil {
			return mirror.Errorf("bridge-missing", "Make it: sudo ip link add "+c.Bridge+" type bridge && sudo ip link set "+c.Bridge+" up.", "tap %s: bridge %s: %w", c.Name, c.Bridge, err)
		}
		if bridge.Type() != "bridge" && bridge.Type() != "openvswitch" {
			return mirror.Errorf("bridge-not-a-bridge", "Name a bridge.", "tap %s: %s is of type %s", c.Name, c.Bridge, bridge.Type())
		}
		if link.Attrs().MasterIndex != bridge.Attrs().Index {
			if err := nl.LinkSetMaster(link, bridge); err != nil {
				return failed("put it into bridge "+c.Bridge, err)
			}
		}
	}
	if link.Attrs().RawFlags&unix.IFF_UP == 0 {
		if err := nl.LinkSetUp(link); err != nil {
			return failed("set it up", err)
		}
	}
	return nil
}

// Name returns the interface's name.
func (t *Tap) Name() string { return t.name }

// MTU returns the interface's MTU in bytes, as it was when it was opened.
func (t *Tap) MTU() int { return t.mtu }

// Dropped returns how many frames from the guest the kernel did not take.
func (t *Tap) Dropped() uint64 { return t.dropped.Load() }

// Offloads implements [backend.NIC].
func (t *Tap) Offloads() net.Offloads {
	if !t.vnet {
		return 0
	}
	return offloads
}

// SetOffloads implements [backend.NIC].
func (t *Tap) SetOffloads(o net.Offloads) {
	if !t.vnet {
		return
	}
	var flags int
	if o&net.RxChecksum != 0 {
		flags |= unix.TUN_F_CSUM
		// The kernel refuses segmentation without checksums.
		if o&net.RxTSO4 != 0 {
			flags |= unix.TUN_F_TSO4
		}
		if o&net.RxTSO6 != 0 {
			flags |= unix.TUN_F_TSO6
		}
	} else {
		o &^= net.RxTSO4 | net.RxTSO6
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	// It cannot fail: these are flags that Open has found to be known, and nothing else is.
	if unix.IoctlSetInt(t.fd, unix.TUNSETOFFLOAD, flags) == nil {
		t.accepted.Store(uint32(o))
	}
}

// Start implements [backend.NIC]. link is called at once if there is no carrier.
func (t *Tap) Start(deliver func([]byte), link func(bool)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	t.tasks.Add(2)
	go func() {
		defer t.tasks.Done()
		t.receive(deliver)
	}()
	go func() {
		defer t.tasks.Done()
		t.watch(link)
	}()
}

// receive reads frames until Close. While deliver blocks, the kernel queues frames up to
// the interface's txqueuelen and then drops.
func (t *Tap) receive(deliver func([]byte)) {
	room := 0
	if !t.vnet {
		room = net.HeaderSize
	}
	buf := backend.GetFrame(net.MaxFrame)
	defer func() { backend.PutFrame(buf) }()
	for {
		n, err := t.file.Read(buf[room:])
		if err != nil {
			if t.isClosed() {
				return
			}
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
				continue
			}
			// EBADFD: the interface was deleted. The watcher reports that the link is down.
			return
		}
		n += room
		if n < minFrame {
			continue
		}
		if t.vnet {
			// The kernel leaves num_buffers as the buffer was, and may say DATA_VALID to
			// a guest that does not take checksums.
			if net.Offloads(t.accepted.Load())&net.RxChecksum == 0 {
				buf[hdrFlags] = 0
			}
		} else {
			clear(buf[:net.HeaderSize])
		}
		binary.LittleEndian.PutUint16(buf[hdrNumBuffers:], 1)
		frame := buf[:n]
		if n <= copyLimit {
			frame = backend.GetFrame(n)
			copy(frame, buf)
		} else {
			buf = backend.GetFrame(net.MaxFrame)
		}
		if t.isClosed() {
			backend.PutFrame(frame)
			return
		}
		deliver(frame)
	}
}

func (t *Tap) isClosed() bool {
	select {
	case <-t.stop:
		return true
	default:
		return false
	}
}

// watch reports changes of the carrier until Close.
func (t *Tap) watch(link func(bool)) {
	up := true // what the guest assumes
	report := func(now bool) {
		if now != up && !t.isClosed() {
			up = now
			link(now)
		}
	}
	for !t.isClosed() {
		updates := make(chan netlink.LinkUpdate, linkQueue)
		done := make(chan struct{})
		ns := t.ns
		err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{Namespace: &ns})
		if err != nil {
			return
		}
		// What changed before the subscription began.
		if nl, err := netlink.NewHandleAt(t.ns, unix.NETLINK_ROUTE); err == nil {
			l, err := nl.LinkByIndex(t.index)
			nl.Close()
			report(err == nil && hasCarrier(l.Attrs()))
		}
		for open := true; open; {
			select {
			case u, ok := <-updates:
				// The subscription ends when messages were lost: begin a new one.
				if open = ok; !ok || int(u.Index) != t.index {
					break
				}
				report(u.Header.Type != unix.RTM_DELLINK && hasCarrier(u.Attrs()))
			case <-t.stop:
				open = false
			}
		}
		close(done)
		for range updates { // until the subscription's goroutine has ended
		}
	}
}

func hasCarrier(a *netlink.LinkAttrs) bool {
	const up = unix.IFF_UP | unix.IFF_LOWER_UP
	return a.RawFlags&up == up && a.OperState != netlink.OperDown && a.OperState != netlink.OperLowerLayerDown
}

// Transmit implements [backend.NIC].
func (t *Tap) Transmit(frame []byte) {
	if len(frame) < minFrame || len(frame) > net.MaxFrame {
		t.dropped.Add(1)
		return
	}
	if !t.vnet {
		frame = frame[net.HeaderSize:]
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	for {
		// Not through file, whose Write would wait for room.
		_, err := unix.Write(t.fd, frame)
		if err == nil {
			return
		}
		if !errors.Is(err, unix.EINTR) {
			t.dropped.Add(1)
			return
		}
	}
}

// Close implements [backend.NIC]. A deliver that blocks must be let go first. An
// interface that Open made goes away.
func (t *Tap) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	close(t.stop)
	var err error
	switch {
	case t.file != nil:
		err = t.file.Close()
	case t.fd >= 0:
		err = unix.Close(t.fd)
	}
	t.mu.Unlock()
	t.tasks.Wait()
	if t.ns.IsOpen() {
		err = errors.Join(err, t.ns.Close())
	}
	if err != nil {
		return fmt.Errorf("close tap %s: %w", t.name, err)
	}
	return nil
}

var _ backend.NIC = (*Tap)(nil)
