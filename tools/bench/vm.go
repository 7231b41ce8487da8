package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/ftvmm/ftvmm/integration/guests"
)

// guest is a virtual machine to start, in words that both programs have.
type guest struct {
	kernel string // file; "" boots firmware alone
	append string
	disk   string // file of a raw disk; "" for none
	tap    string // name of a tap; "" for no network card
}

const (
	memoryMiB = 128
	// macAddress is the same for both, so that the host's neighbour table holds for both.
	macAddress = "52:54:00:12:34:56"
)

// vm is one of the programs that are compared.
type vm interface {
	name() string
	// command returns the command line that runs g with its serial port on standard output.
	command(g guest) []string
	// status translates an exit code into what the guest wrote to the debug exit port.
	status(code int) (int, bool)
}

// ftvmm is our program.
type ftvmm struct{ path string }

func (*ftvmm) name() string { return "ftvmm" }

// debugExitBase is what ftvmm adds to the guest's status.
const debugExitBase = 32

func (*ftvmm) status(code int) (int, bool) {
	return code - debugExitBase, code >= debugExitBase && code < 64
}

func (f *ftvmm) command(g guest) []string {
	c := []string{f.path, "run", "--memory", fmt.Sprint(memoryMiB, "M"), "--serial", "stdio"}
	if g.kernel != "" {
		c = append(c, "--kernel", g.kernel, "--append", g.append)
	} else {
		c = append(c, "--firmware", "seabios")
	}
	if g.disk != "" {
		c = append(c, "--disk", "path="+g.disk)
	}
	if g.tap != "" {
		c = append(c, "--nic", "tap="+g.tap+",mac="+macAddress)
	}
	return c
}

// qemu is what ftvmm is compared with: with the interrupt controllers in user space too, since ftvmm
// has to have them there.
type qemu struct{ path, version string }

func findQEMU() (*qemu, error) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	out, err := exec.Command(path, "-version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s -version: %w", path, err)
	}
	version, _, _ := strings.Cut(string(out), "\n")
	return &qemu{path, version}, nil
}

func (*qemu) name() string { return "QEMU" }

func (*qemu) status(code int) (int, bool) { return guests.ExitStatus(code) }

func (q *qemu) command(g guest) []string {
	machine := "pc,accel=kvm,kernel-irqchip=off"
	if g.kernel == "" {
		machine += ",graphics=off" // SeaBIOS then uses the serial port
	}
	c := []string{q.path, "-machine", machine, "-cpu", "qemu64", "-m", fmt.Sprint(memoryMiB), "-nodefaults", "-display", "none",
		"-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"}
	if g.kernel != "" {
		c = append(c, "-kernel", g.kernel, "-append", g.append)
	}
	if g.disk != "" {
		c = append(c, "-drive", "if=virtio,format=raw,cache=none,aio=threads,file="+g.disk)
	}
	if g.tap != "" {
		c = append(c, "-netdev", "tap,id=n,script=no,downscript=no,vhost=off,ifname="+g.tap, "-device", "virtio-net-pci,netdev=n,romfile=,mac="+macAddress)
	}
	return c
}

// guestFile returns the path of a test guest's image, written to the run's folder.
func (b *bench) guestFile(name string) (string, error) {
	return b.file(name+".elf", func() ([]byte, error) { return guests.Image(name) })
}

// machine is a running virtual machine and what it has written to its serial port.
type machine struct {
	v      vm
	cmd    *exec.Cmd
	cancel context.CancelFunc
	log    bytes.Buffer // of standard error
	ended  chan struct{}

	mu      sync.Mutex
	changed sync.Cond
	out     []byte
	stamps  []stamp
	eof     bool
}

// stamp says when the output grew to size bytes.
type stamp struct {
	size int
	at   time.Time
}

// start starts the program on g.
func start(ctx context.Context, v vm, g guest) (*machine, error) {
	ctx, cancel := context.WithCancel(ctx)
	args := v.command(g)
	m := &machine{v: v, cmd: exec.CommandContext(ctx, args[0], args[1:]...), cancel: cancel, ended: make(chan struct{})}
	m.changed.L = &m.mu
	m.cmd.Stderr = &m.log
	stdout, err := m.cmd.StdoutPipe()
	if err == nil {
		err = m.cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	go func() {
		defer close(m.ended)
		p := make([]byte, 64<<10)
		for {
			n, err := stdout.Read(p)
			now := time.Now()
			m.mu.Lock()
			if n > 0 {
				m.out = append(m.out, p[:n]...)
				m.stamps = append(m.stamps, stamp{len(m.out), now})
			}
			m.eof = err != nil
			m.changed.Broadcast()
			m.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return m, nil
}

// startGuest starts one of our test guests.
func (b *bench) startGuest(ctx context.Context, v vm, name string, g guest) (*machine, error) {
	var err error
	if g.kernel, err = b.guestFile(name); err != nil {
		return nil, err
	}
	return start(ctx, v, g)
}

// when waits until the guest has written text and returns when its first and its last byte came.
func (m *machine) when(text string) (first, last time.Time, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		if i := bytes.Index(m.out, []byte(text)); i >= 0 {
			return m.at(i), m.at(i + len(text) - 1), nil
		}
		if m.eof {
			return first, last, fmt.Errorf("the guest ended without %q; it wrote:\n%s%s", text, m.out, m.log.Bytes())
		}
		m.changed.Wait()
	}
}

// at returns when byte i of the output came. The lock is held.
func (m *machine) at(i int) time.Time {
	for _, s := range m.stamps {
		if s.size > i {
			return s.at
		}
	}
	return time.Time{}
}

// wait waits for the end and checks that the guest reports success.
func (m *machine) wait() error {
	<-m.ended // the pipe must be read to its end first
	err := m.cmd.Wait()
	m.cancel()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	code := m.cmd.ProcessState.ExitCode()
	if status, ok := m.v.status(code); !ok || status != 0 {
		return fmt.Errorf("%s ended with code %d:\n%s%s", m.cmd.Args[0], code, m.out, m.log.Bytes())
	}
	return nil
}

// kill ends the virtual machine.
func (m *machine) kill() {
	m.cancel()
	<-m.ended
	_ = m.cmd.Wait() // it was killed
}
