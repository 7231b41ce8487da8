// Package twins runs both sides of a pair on one machine, each in a process of its own, for tests,
// benchmarks and the demo: it makes keys, disks, an arbiter and a network, starts, kills and stops sides, and follows
// their events.
//
// The hosts are processes in one network namespace, on one bridge, each with a tap of its own; the clients are in that
// namespace, too. With [Options.Apart] side b has a namespace of its own, with a cable to side a's bridge and another for the link,
// which can be cut. With [Options.Proxied] the link passes through a [Proxy]. Without root, [Options.User] gives each side a user network instead, whose connections die with its process.
package twins

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/vmm/event"
)

// The network of the twins: the clients' address on the bridge, and the guest's.
const (
	HostAddress  = "192.0.2.1"
	GuestAddress = "192.0.2.9"
	prefix       = "/24"
	Bridge       = "br0"   // of both taps
	trunk        = "trunk" // the cable between the bridges of two namespaces
	cable        = "cable" // the cable of the link between them
)

// The link's addresses where the sides have namespaces of their own.
var linkAddresses = [2]string{"198.51.100.1", "198.51.100.2"}

// linkMACs are those of the ends of its cable.
var linkMACs = [2]net.HardwareAddr{{0x52, 0x54, 0, 0, 1, 1}, {0x52, 0x54, 0, 0, 1, 2}}

// Sides are the names of the sides, in order.
var Sides = [2]string{"a", "b"}

// Options describe a pair.
type Options struct {
	Binary   string   // of ftvmm
	Dir      string   // for everything; it must exist
	Guest    string   // the embedded guest; "" where Flags say what runs
	Append   string   // its command line
	Memory   string   // default 64M
	DiskSize int64    // bytes of each side's disk; 0: none
	User     bool     // user networks, with the guest's UDP and TCP ports 7000 at Ports
	NoNIC    bool     // no network card
	Arbiter  string   // default: a directory
	Flags    []string // more flags of ftvmm run
	Link     []string // the addresses of the link; default: one on the loopback
	Apart    bool     // side b in a namespace of its own
	Proxied  bool     // the link passes through Twins.Link
}

// Twins are both sides.
type Twins struct {
	opts  Options
	space string // network namespace; "" with user networks
	far   string // that of side b, if it has one of its own
	dial  []string
	Sides [2]*Side
	Link  *Proxy // with Options.Proxied; side a is its target, side b its client
	ports [2]string
}

// Side is one side. It may be started again and again.
type Side struct {
	twins *Twins
	index int

	mu     sync.Mutex
	cmd    *exec.Cmd
	done   chan struct{}
	exit   error
	events []event.Event
	began  time.Time
	past   []Life
	seen   sync.Cond
}

// Life is one life of a side: from the start of its process to its end.
type Life struct {
	Began, Ended time.Time // Ended is zero while it lasts
	Events       []event.Event
}

// New makes the keys, the disks and the network of a pair. Close removes the network and ends what runs.
func New(o Options) (t *Twins, err error) {
	if o.Memory == "" {
		o.Memory = "64M"
	}
	t = &Twins{opts: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
			t = nil
		}
	}()
	for i := range t.Sides {
		s := &Side{twins: t, index: i}
		s.seen.L = &s.mu
		t.Sides[i] = s
	}
	if _, err = link.CreatePair(filepath.Join(o.Dir, "keys"), "twin", false); err != nil {
		return t, err
	}
	if t.opts.Arbiter == "" {
		arbiter := filepath.Join(o.Dir, "arbiter")
		if err := os.Mkdir(arbiter, 0o700); err != nil {
			return t, err
		}
		t.opts.Arbiter = "file:" + arbiter
	}
	for i := range t.Sides {
		if o.DiskSize > 0 {
			if err := os.WriteFile(t.Disk(i), nil, 0o600); err != nil {
				return t, err
			}
			if err := os.Truncate(t.Disk(i), o.DiskSize); err != nil {
				return t, err
			}
		}
	}
	if o.User || o.NoNIC {
		if len(t.opts.Link) == 0 {
			t.opts.Link, err = freePorts(1)
		}
		if err == nil && o.User {
			var p []string
			p, err = freePorts(2)
			copy(t.ports[:], p)
		}
		t.dial = t.opts.Link
		return t, err
	}
	if len(t.opts.Link) == 0 {
		t.opts.Link = []string{"127.0.0.1:7800"}
		if o.Apart {
			t.opts.Link = []string{net.JoinHostPort(linkAddresses[0], "7800")}
		}
	}
	if err = t.network(); err != nil {
		return t, err
	}
	t.dial = t.opts.Link
	if o.Proxied {
		const address = "127.0.0.1:7801"
		t.dial = []string{address}
		t.Link, err = t.Proxy(address, t.opts.Link[0])
	}
	return t, err
}

// freePorts returns addresses on the loopback that nobody listens at.
func freePorts(n int) (addresses []string, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		addresses = append(addresses, l.Addr().String())
	}
	return addresses, nil
}

// network makes the namespaces and the bridges in them.
func (t *Twins) network() (err error) {
	if t.space, err = t.namespace("", HostAddress); err != nil || !t.opts.Apart {
		return err
	}
	if t.far, err = t.namespace("-b", ""); err != nil {
		return err
	}
	// The first cable joins the bridges; a switch between two hosts does no more.
	if err := t.wire(trunk, [2]net.HardwareAddr{}, func(side int, nl *netlink.Handle, end netlink.Link) error {
		br, err := nl.LinkByName(Bridge)
		if err != nil {
			return err
		}
		return nl.LinkSetMaster(end, br)
	}); err != nil {
		return err
	}
	return t.wire(cable, linkMACs, func(side int, nl *netlink.Handle, end netlink.Link) error {
		addr, err := netlink.ParseAddr(linkAddresses[side] + prefix)
		if err != nil {
			return err
		}
		return errors.Join(nl.AddrAdd(end, addr), neighbour(nl, end, side, linkMACs[1-side]))
	})
}

// handle opens netlink in a namespace.
func handle(space string) (*netlink.Handle, error) {
	h, err := netns.GetFromName(space)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return netlink.NewHandleAt(h, unix.NETLINK_ROUTE)
}

// namespace makes a namespace with a bridge in it.
func (t *Twins) namespace(suffix, address string) (string, error) {
	name := fmt.Sprintf("ftvmm-twins-%d-%d%s", os.Getpid(), time.Now().UnixNano()%1e9, suffix)
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which is in the namespace, ends here
		h, err := netns.NewNamed(name)
		if err == nil {
			h.Close()
		}
		made <- err
	}()
	if err := <-made; err != nil {
		return "", fmt.Errorf("make a network namespace: %w", err)
	}
	nl, err := handle(name)
	if err != nil {
		return name, err
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		return name, err
	}
	// A bridge without an address of its own takes that of one of its ports, and another when that port goes.
	mac := net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	if address == "" {
		mac[5]++
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Bridge, HardwareAddr: mac}}
	if err := errors.Join(nl.LinkSetUp(lo), nl.LinkAdd(br)); err != nil {
		return name, err
	}
	if address != "" {
		addr, err := netlink.ParseAddr(address + prefix)
		if err != nil {
			return name, err
		}
		if err := nl.AddrAdd(br, addr); err != nil {
			return name, err
		}
	}
	return name, nl.LinkSetUp(br)
}

// wire makes a cable between the two namespaces and sets up each end.
func (t *Twins) wire(name string, macs [2]net.HardwareAddr, setUp func(side int, nl *netlink.Handle, end netlink.Link) error) error {
	near, err := handle(t.space)
	if err != nil {
		return err
	}
	defer near.Close()
	far, err := handle(t.far)
	if err != nil {
		return err
	}
	defer far.Close()
	h, err := netns.GetFromName(t.far)
	if err != nil {
		return err
	}
	defer h.Close()
	pair := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: macs[0]},
		PeerName:  name, PeerHardwareAddr: macs[1], PeerNamespace: netlink.NsFd(h),
	}
	if err := near.LinkAdd(pair); err != nil {
		return fmt.Errorf("lay the cable %s: %w", name, err)
	}
	for side, nl := range []*netlink.Handle{near, far} {
		end, err := nl.LinkByName(name)
		if err != nil {
			return err
		}
		if err := errors.Join(setUp(side, nl, end), nl.LinkSetUp(end)); err != nil {
			return fmt.Errorf("set up the cable %s: %w", name, err)
		}
	}
	return nil
}

// neighbour says for good where a side finds the other on the link's cable.
func neighbour(nl *netlink.Handle, end netlink.Link, side int, mac net.HardwareAddr) error {
	return nl.NeighSet(&netlink.Neigh{
		LinkIndex: end.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(linkAddresses[1-side]), HardwareAddr: mac,
	})
}

// Cut has the network lose all that a side sends on the link; Heal undoes it. The sides must be apart.
func (t *Twins) Cut(side int) error {
	return t.lead(side, net.HardwareAddr{0x52, 0x54, 0, 0, 1, 0xff}) // nobody is there
}

// Heal has what a side sends on the link arrive again.
func (t *Twins) Heal(side int) error { return t.lead(side, linkMACs[1-side]) }

// lead changes where a side's part of the link leads to.
func (t *Twins) lead(side int, mac net.HardwareAddr) error {
	nl, err := handle(t.spaceOf(side))
	if err != nil {
		return err
	}
	defer nl.Close()
	end, err := nl.LinkByName(cable)
	if err != nil {
		return err
	}
	return neighbour(nl, end, side, mac)
}

// spaceOf returns the namespace of a side.
func (t *Twins) spaceOf(side int) string {
	if side == 1 && t.far != "" {
		return t.far
	}
	return t.space
}

// Close ends both sides and removes the network.
func (t *Twins) Close() error {
	for _, s := range t.Sides {
		if s != nil {
			s.Kill()
		}
	}
	var errs []error
	if t.Link != nil {
		errs = append(errs, t.Link.Close())
		t.Link = nil
	}
	for _, name := range []string{t.space, t.far} {
		if name != "" {
			errs = append(errs, netns.DeleteNamed(name))
		}
	}
	t.space, t.far = "", ""
	return errors.Join(errs...)
}

// Disk returns the path of a side's disk.
func (t *Twins) Disk(side int) string { return t.path("disk-" + Sides[side]) }

// Console returns the path of the file that a side writes the guest's serial output to.
func (t *Twins) Console(side int) string { return t.path("console-" + Sides[side]) }

// Control returns the path of a side's control socket.
func (t *Twins) Control(side int) string { return t.path("control-" + Sides[side]) }

// Errors returns the path of the file that a side's standard output and error go to.
func (t *Twins) Errors(side int) string { return t.path("stderr-" + Sides[side]) }

// Log returns the path of what a side logs for debugging.
func (t *Twins) Log(side int) string { return t.path("log-" + Sides[side]) }

func (t *Twins) path(name string) string { return filepath.Join(t.opts.Dir, name) }

// Dial connects to a port of the guest; with user networks, to the side that answers.
func (t *Twins) Dial(ctx context.Context, network string, port int) (c net.Conn, err error) {
	var d net.Dialer
	if t.opts.User {
		for i := range t.Sides {
			if !t.Sides[i].Running() || !t.Sides[i].Live() {
				continue
			}
			if c, err = d.DialContext(ctx, network, t.ports[i]); err == nil {
				return c, nil
			}
		}
		if err == nil {
			err = errors.New("no side is live")
		}
		return nil, err
	}
	err = t.Enter(func() error {
		c, err = d.DialContext(ctx, network, net.JoinHostPort(GuestAddress, fmt.Sprint(port)))
		return err
	})
	return c, err
}

// Enter calls f on a thread in the pair's namespace; sockets that it opens and processes that it starts stay there.
func (t *Twins) Enter(f func() error) error { return enter(t.space, f) }

// enter calls f on a thread in a namespace.
func enter(space string, f func() error) error {
	if space == "" {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		h, err := netns.GetFromName(space)
		if err == nil {
			err = netns.Set(h)
			h.Close()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// Start starts a side.
func (s *Side) Start() error {
	t, o := s.twins, &s.twins.opts
	name := Sides[s.index]
	socket := t.path("control-" + name)
	_ = os.Remove(socket)
	args := []string{
		"run", "--name", "twin", "--memory", o.Memory, "--pair", t.path("keys/" + name), "--arbiter", o.Arbiter,
		"--control", socket, "--serial", "file:" + t.Console(s.index), "--events", "fd:3", "--pair-log", t.Log(s.index),
	}
	if o.Guest != "" {
		args = append(args, "--guest", o.Guest)
	}
	if o.Append != "" || o.Guest != "" && !o.User && !o.NoNIC {
		line := o.Append
		if !o.User && !o.NoNIC {
			line += " ip=" + GuestAddress + prefix
		}
		args = append(args, "--append", strings.TrimSpace(line))
	}
	if o.DiskSize > 0 {
		args = append(args, "--disk", "path="+t.Disk(s.index))
	}
	switch {
	case o.NoNIC:
	case o.User:
		args = append(args, "--nic", fmt.Sprintf("user,hostfwd=tcp:%s-:7000,hostfwd=udp:%s-:7000", t.ports[s.index], t.ports[s.index]))
	default:
		args = append(args, "--nic", fmt.Sprintf("tap=tap-%s,bridge=%s", name, Bridge))
	}
	if s.index == 0 {
		args = append(args, "--listen", strings.Join(o.Link, ","))
	} else {
		args = append(args, "--peer", strings.Join(t.dial, ","))
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command(o.Binary, append(args, o.Flags...)...)
	cmd.ExtraFiles = []*os.File{w}
	stderr, err := os.OpenFile(t.path("stderr-"+name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return errors.Join(err, r.Close(), w.Close())
	}
	cmd.Stdout, cmd.Stderr = stderr, stderr
	began := time.Now()
	ended, err := run(t.spaceOf(s.index), cmd)
	err = errors.Join(err, w.Close(), stderr.Close())
	if err != nil {
		r.Close()
		return err
	}
	done := make(chan struct{})
	s.mu.Lock()
	s.cmd, s.done, s.events, s.began = cmd, done, nil, began
	s.mu.Unlock()
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer r.Close()
		for in := bufio.NewScanner(r); in.Scan(); {
			var e event.Event
			if json.Unmarshal(in.Bytes(), &e) == nil {
				s.mu.Lock()
				s.events = append(s.events, e)
				s.seen.Broadcast()
				s.mu.Unlock()
			}
		}
	}()
	go func() {
		err := <-ended
		<-read
		s.mu.Lock()
		s.exit = err
		s.past = append(s.past, Life{began, time.Now(), s.events})
		close(done)
		s.seen.Broadcast()
		s.mu.Unlock()
	}()
	return nil
}

// run starts a command in a namespace, and tells its end. The command is killed if this process dies, however that
// happens; Linux takes the death of the thread that started it for that (prctl(2), PR_SET_PDEATHSIG), so the thread stays.
func run(space string, cmd *exec.Cmd) (ended <-chan error, err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true, // Ctrl-C is not for it
		Pdeathsig: syscall.SIGKILL,
	}
	started, end := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		runs := false
		err := enter(space, func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			runs = true
			started <- nil
			return cmd.Wait()
		})
		if !runs {
			started <- err
		}
		end <- err
	}()
	return end, <-started
}

// Running says whether the side's process is there.
func (s *Side) Running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.running()
}

func (s *Side) running() bool {
	if s.done == nil {
		return false
	}
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the side's process.
func (s *Side) Signal(sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running() {
		return os.ErrProcessDone
	}
	return s.cmd.Process.Signal(sig)
}

// Kill ends the side as the loss of its host would, and waits for its end.
func (s *Side) Kill() {
	s.mu.Lock()
	cmd, done := s.cmd, s.done
	s.mu.Unlock()
	if done == nil {
		return
	}
	_ = cmd.Process.Kill()
	<-done
}

// Wait waits for the side's own end, and returns its exit code.
func (s *Side) Wait(ctx context.Context) (int, error) {
	s.mu.Lock()
	cmd, done := s.cmd, s.done
	s.mu.Unlock()
	select {
	case <-done:
		return cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("side %s does not end: %w", Sides[s.index], ctx.Err())
	}
}

// Events returns the events of the side's present life.
func (s *Side) Events() []event.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]event.Event(nil), s.events...)
}

// Lives returns all lives of the side so far, the present one last.
func (s *Side) Lives() []Life {
	s.mu.Lock()
	defer s.mu.Unlock()
	lives := append([]Life(nil), s.past...)
	if s.running() {
		lives = append(lives, Life{Began: s.began, Events: append([]event.Event(nil), s.events...)})
	}
	return lives
}

// Happens waits for an event of the side's present life, from the nth on, that ready accepts, and returns its index.
func (s *Side) Happens(ctx context.Context, what string, n int, ready func(event.Event) bool) (int, error) {
	err := s.await(ctx, what, func() bool {
		for ; n < len(s.events); n++ {
			if ready(s.events[n]) {
				return true
			}
		}
		return false
	})
	return n, err
}

// Phase returns the side's phase as its events tell, "" before the first.
func (s *Side) Phase() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase()
}

func (s *Side) phase() string {
	for i := len(s.events) - 1; i >= 0; i-- {
		if e := &s.events[i]; e.Kind == event.PairPhase {
			text, _ := e.Attrs["text"].(string)
			_, to, _ := strings.Cut(text, " -> ")
			return to
		}
	}
	return ""
}

// Live says whether the side's guest is the one that the world sees.
func (s *Side) Live() bool {
	switch s.Phase() {
	case "alone", "syncing", "protected", "switching":
		return true
	}
	return false
}

// Count returns how many events of a kind the side's present life has seen.
func (s *Side) Count(kind event.Kind) int {
	n := 0
	for _, e := range s.Events() {
		if e.Kind == kind {
			n++
		}
	}
	return n
}

// Await waits until the side is in one of these phases.
func (s *Side) Await(ctx context.Context, phases ...string) error {
	return s.await(ctx, "phase "+strings.Join(phases, " or "), func() bool {
		now := s.phase()
		for _, p := range phases {
			if p == now {
				return true
			}
		}
		return false
	})
}

func (s *Side) await(ctx context.Context, what string, ready func() bool) error {
	defer context.AfterFunc(ctx, func() {
		s.mu.Lock()
		s.seen.Broadcast()
		s.mu.Unlock()
	})()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !ready() {
		if ctx.Err() != nil || !s.running() {
			return fmt.Errorf("side %s: no %s (it is %q, running %v): %w", Sides[s.index], what, s.phase(), s.running(), ctx.Err())
		}
		s.seen.Wait()
	}
	return nil
}

// Protected waits until the pair is complete, and returns the index of its primary.
func (t *Twins) Protected(ctx context.Context) (int, error) {
	for ctx.Err() == nil {
		for i, s := range t.Sides {
			if s.Phase() == "protected" && t.Sides[1-i].Phase() == "backup" {
				return i, nil
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Millisecond):
		}
	}
	return 0, fmt.Errorf("the pair is not complete: a is %q, b is %q: %w", t.Sides[0].Phase(), t.Sides[1].Phase(), ctx.Err())
}
