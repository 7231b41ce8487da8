package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/config"
	"github.com/ftvmm/ftvmm/vmm/console"
	"github.com/ftvmm/ftvmm/vmm/control"
	"github.com/ftvmm/ftvmm/vmm/event"
)

func (a *app) runCommand() *cobra.Command {
	var (
		restore string
		rec     recordFlags
		twin    pairFlags
	)
	c := &cobra.Command{
		Use:   "run [FILE]",
		Short: "run a guest in the foreground",
		Long: `Run a guest in the foreground until it switches itself off.

The guest is described by a TOML or JSON file, by environment variables
(FTVMM_MEMORY and so on), and by flags, of which the later win. The first serial
port is connected to this terminal unless said otherwise: every key goes to
the guest, Ctrl-C too.

  Ctrl-] p   press the power button
  Ctrl-] q   end the guest at once
  Ctrl-] ?   help
  Ctrl-] Ctrl-]  type Ctrl-]

SIGTERM and SIGINT press the power button; the second ends the guest at once.
With --json the end of the guest is reported on standard output, and a console
on stdio writes to standard error instead.

Exit codes: 0 the guest powered off; 32+n it wrote the code n (0 to 31) to the
debug-exit device; 1 it was ended by the user; 64 bad configuration; 65 the
host lacks KVM or a feature; 66 the guest crashed.`,
		Example: `  ftvmm run --guest hello
  ftvmm run --kernel vmlinuz --initrd initrd.img --append console=ttyS0 --memory 1G
  ftvmm run --name web --disk path=web.img --nic user,hostfwd=tcp:127.0.0.1:8080-:80`,
		Args: a.arguments(0, 1),
	}
	s := addSettings(c)
	rec.add(c.Flags())
	twin.add(c.Flags())
	c.Flags().StringVar(&restore, "restore", "", "go on with the guest that vm save wrote to this `file`")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		g, origins, err := s.load(args)
		if err == nil {
			how := checks()
			how.Restoring = restore != ""
			how.BareFirmware = origins["firmware"] != config.OriginDefault
			err = g.Check(how)
		}
		if err == nil {
			err = rec.check(g)
		}
		if err == nil {
			err = twin.check(g, &rec)
		}
		if err == nil {
			err = twin.settle(g)
		}
		if err == nil {
			a.exit, err = a.runMachine(cmd.Context(), g, restore, &rec, &twin)
		}
		if err != nil {
			f := classify(err)
			var started *hostFailure
			if !errors.As(err, &started) {
				f.exit = runExit(err)
			}
			return f
		}
		return nil
	}
	return c
}

// hostFailure is an error of the host after the guest has started.
type hostFailure struct{ error }

func (e *hostFailure) Unwrap() error { return e.error }

// exitDocument is what run reports with --json.
type exitDocument struct {
	control.Meta
	Reason   string `json:"reason"`
	Code     uint32 `json:"code"`
	Detail   string `json:"detail,omitempty"`
	ExitCode int    `json:"exit_code"`
}

// ioSlots is how many of Go's scheduler slots there are beyond one for each processor. A thread that
// waits in a system call, as the vCPU's does in the guest and those of disks do for their data, keeps
// its slot until the runtime's monitor comes by: with few slots, requests to the host would wait for it.
const ioSlots = 8

// runMachine runs the guest, again and again if its configuration says so, and returns run's
// exit code.
func (a *app) runMachine(ctx context.Context, g *config.Guest, restore string, rec *recordFlags, twin *pairFlags) (int, error) {
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + ioSlots)
	var events *event.Emitter
	if g.Events != "" {
		var err error
		if events, err = event.Open(g.Events, g.Name); err != nil {
			return 0, err
		}
	}
	defer events.Close()
	r := &runner{app: a, guest: g, events: events, record: rec, pair: twin}
	defer r.signals()()
	// If the user asks for the end while no machine is there, this is how it ended.
	end := vmm.Exit{Reason: vmm.ExitQuit}
	for {
		next, err := r.run(ctx, restore)
		if errors.Is(err, errStopping) {
			return a.ended(end, events)
		}
		end = next
		if err != nil {
			events.Emit(event.Exited, event.Attrs{"reason": "error", "error": err.Error()})
			return 0, err
		}
		if end.Reason == vmm.ExitPowerOff && g.OnGuestShutdown == config.Restart && !r.stopping.Load() {
			a.note("the guest has switched itself off and starts again")
			restore = ""
			continue
		}
		return a.ended(end, events)
	}
}

// ended reports how the guest ended.
func (a *app) ended(e vmm.Exit, events *event.Emitter) (int, error) {
	exit := guestExit(e)
	switch e.Reason {
	case vmm.ExitDebugExit:
		events.Emit(event.DebugExit, event.Attrs{"code": e.Code})
	case vmm.ExitCrash:
		events.Emit(event.Crashed, event.Attrs{"detail": e.Detail})
	}
	events.Emit(event.Exited, event.Attrs{"reason": string(e.Reason), "code": e.Code, "exit_code": exit})
	if e.Reason == vmm.ExitCrash {
		p := problem{"guest-crashed", "the guest has crashed: " + e.Detail, "look at the guest's last output"}
		fmt.Fprintf(a.err, "error: %s (%s)\n  remedy: %s\n", p.Message, p.Code, p.Remedy)
	}
	if a.json {
		return exit, a.document(exitDocument{control.NewMeta("Exit"), string(e.Reason), e.Code, e.Detail, exit})
	}
	return exit, nil
}

// ports are a guest's consoles.
type ports struct {
	all     []*console.Console
	serials []*console.Console
	virtio  *console.Console // nil: none
	debug   *console.Console // nil: none
}

func (p *ports) named(name string) *console.Console {
	for _, c := range p.all {
		if c.Name() == name {
			return c
		}
	}
	return nil
}

func (p *ports) Close() error {
	var errs []error
	for _, c := range p.all {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// runner runs a guest, once or more often.
type runner struct {
	*app
	guest  *config.Guest
	events *event.Emitter
	record *recordFlags
	pair   *pairFlags
	// stopping is set when the user has asked for the end, so that the guest is not started again.
	stopping atomic.Bool

	// Of the present life of the guest:
	started time.Time
	ports   ports
	twin    atomic.Pointer[side]        // nil if it runs alone
	machine atomic.Pointer[vmm.Machine] // nil while there is none; keys and signals come at any time
}

// errStopping says that the user has asked for the end before the guest was started.
var errStopping = errors.New("stopping")

// run is one life of the guest, from power-on to its end.
func (r *runner) run(ctx context.Context, restore string) (end vmm.Exit, err error) {
	// Terminal and sockets are in order again whatever happens. First the machine ends, which takes no
	// more input then; then the consoles hand over the guest's last words; then the
	// control socket closes, over which some of them leave.
	closing := func(what string, f func() error) {
		if e := f(); e != nil && err == nil {
			err = &hostFailure{fmt.Errorf("%s: %w", what, e)}
		}
	}
	r.started, r.ports = time.Now(), ports{}
	var server *control.Server
	defer closing("close the control socket", func() error {
		if server == nil {
			return nil
		}
		return server.Close()
	})
	if err := r.openPorts(); err != nil {
		return end, errors.Join(err, r.ports.Close())
	}
	defer closing("close the consoles", r.ports.Close)
	tape, err := r.record.open(r.guest)
	if err != nil {
		return end, err
	}
	defer closing("close the recording", tape.Close)
	var twin *side
	m, err := build(r.guest, &r.ports, r.event, func(cfg *vmm.Config) (err error) {
		tape.configure(cfg)
		twin, err = r.pair.open(r.guest, cfg, r.events)
		return err
	})
	if err != nil {
		return end, errors.Join(err, twin.Close())
	}
	defer closing("close the machine", m.Close)
	defer closing("leave the pair", twin.Close)
	if restore != "" {
		if err := m.Restore(restore); err != nil {
			return end, err
		}
		r.events.Emit(event.Restored, event.Attrs{"path": restore})
	}
	if err := tape.begin(m.Machine, restore != ""); err != nil {
		return end, err
	}
	if err := twin.start(m.Machine); err != nil {
		return end, err
	}
	r.twin.Store(twin)
	defer r.twin.Store(nil)
	r.machine.Store(m.Machine)
	defer r.machine.Store(nil)
	if r.stopping.Load() {
		return end, errStopping
	}

	if r.guest.Control != "" {
		if filepath.Dir(r.guest.Control) == config.RuntimeDir() {
			if err := makeRuntimeDir(filepath.Dir(r.guest.Control)); err != nil {
				return end, err
			}
		}
		if server, err = control.Listen(r.guest.Control, &steering{r, m.Machine}); err != nil {
			return end, err
		}
		r.events.Emit(event.ControlReady, event.Attrs{"path": server.Path()})
	}
	end, err = m.Run(ctx)
	if e := tape.end(end); err == nil {
		err = e
	}
	if err != nil {
		return end, &hostFailure{err}
	}
	return end, nil
}

// openPorts opens the consoles of the guest.
func (r *runner) openPorts() error {
	open := func(name string, spec console.Spec) (*console.Console, error) {
		opt := console.Options{Stdin: int(os.Stdin.Fd()), Stdout: int(os.Stdout.Fd()), OnKey: r.key}
		if r.json {
			opt.Stdout = int(os.Stderr.Fd())
		}
		c, err := console.Open(name, spec, opt)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		r.ports.all = append(r.ports.all, c)
		if spec.Kind == console.PTY || spec.Kind == console.Unix {
			r.note("%s is %s", name, c.Where())
			r.events.Emit(event.ConsoleReady, event.Attrs{"console": name, "path": c.Where()})
		}
		return c, nil
	}
	for i, s := range r.guest.Serials {
		c, err := open(fmt.Sprintf("serial%d", i), s.Backend)
		if err != nil {
			return err
		}
		r.ports.serials = append(r.ports.serials, c)
	}
	var err error
	if r.guest.Console.Kind != console.None {
		if r.ports.virtio, err = open("console0", r.guest.Console); err != nil {
			return err
		}
	}
	if r.guest.DebugCon.Kind != console.None {
		r.ports.debug, err = open("debugcon", r.guest.DebugCon)
	}
	return err
}

// event takes the machine's own events. Its end is reported by ended, with the exit code.
func (r *runner) event(name string, fields map[string]any) {
	if kind := event.Kind(name); kind != event.Exited {
		r.events.Emit(kind, fields)
	}
}

// key carries out a command that was typed after Ctrl-].
func (r *runner) key(key byte) {
	switch key {
	case console.KeyPower:
		r.pressPower()
	case console.KeyQuit:
		r.quit()
	case console.KeyHelp:
		r.note("Ctrl-] p presses the power button, Ctrl-] q ends the guest, Ctrl-] Ctrl-] types Ctrl-]\r")
	}
}

func (r *runner) pressPower() {
	if s := r.twin.Load(); s != nil && !s.Live() {
		r.quit() // the guest's power button is on the other side
		return
	}
	r.stopping.Store(true)
	if m := r.machine.Load(); m != nil {
		if err := m.PowerButton(); err != nil {
			r.note("press the power button: %v\r", err)
		}
	}
}

func (r *runner) quit() {
	r.stopping.Store(true)
	if m := r.machine.Load(); m != nil {
		m.Quit()
	}
}

// signals lets SIGTERM, SIGINT and SIGHUP press the power button, and the second of them end the guest; a
// third has its usual effect.
func (r *runner) signals() (stop func()) {
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, ok := <-ch; !ok {
			return
		}
		if s := r.twin.Load(); s != nil && !s.Live() {
			r.note("this side ends; it does not run the guest\r")
		} else {
			r.note("power button pressed; once more ends the guest at once\r")
		}
		r.pressPower()
		if _, ok := <-ch; !ok {
			return
		}
		signal.Stop(ch)
		r.quit()
	}()
	return func() {
		signal.Stop(ch)
		close(ch)
		<-done
	}
}

// makeRuntimeDir makes the directory of control sockets, and refuses one that belongs to somebody else.
func makeRuntimeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory for control sockets: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() {
		return fail(runBadConfig, "bad-runtime-dir", "set XDG_RUNTIME_DIR, or choose a socket with --control", "%s does not belong to this user", dir)
	}
	return nil
}
