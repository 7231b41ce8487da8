package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/fxamacker/cbor/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/record"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/control"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

func init() {
	extraCommands = append(extraCommands, (*app).replayCommand)
}

func (a *app) replayCommand() *cobra.Command {
	var (
		until, device string
		opts          record.ReplayOptions
	)
	c := &cobra.Command{
		Use:   "replay FILE",
		Short: "play a recorded guest again",
		Long: `Play a guest again that "ftvmm run --record FILE" has recorded: on any day, without its
disks, networks and images, which are in the recording as far as it takes.

What the guest writes to its consoles goes to standard output (to standard
error with --json). At the end it is said how far the guest came. With --verify it
is compared with the recorded one at every exit, and the first difference ends
the replay, with what both sides did: completely if the recording was made with
--record-details, else as far as the recording tells.

--until stops at a position, written EXIT, EXIT.ROUND in the waits of a HLT, or
EXIT+COUNT between two exits, and shows the registers and the state of all
devices there.

Exit codes: 0 the guest did as recorded; 1 it did not, or the file is no recording;
13 this host cannot run it.`,
		Example: `  ftvmm run --guest hello --record hello.log
  ftvmm replay hello.log --verify
  ftvmm replay hello.log --until 100`,
		Args: a.arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if until != "" {
				pos, err := vmm.ParsePosition(until)
				if err != nil {
					return fail(exitUsage, "bad-value", "write EXIT, EXIT.ROUND or EXIT+COUNT", "%q is no position", until)
				}
				opts.Until = &pos
			}
			opts.KVM = device
			return a.replay(cmd.Context(), args[0], opts)
		},
	}
	c.Flags().StringVar(&until, "until", "", "stop at this `position`, and show registers and devices")
	c.Flags().BoolVar(&opts.Verify, "verify", false, "compare the guest with the recorded one at every exit")
	c.Flags().StringVar(&device, "kvm", vmm.DefaultKVM, "the hypervisor's device `node`")
	return c
}

// replayDocument is what replay reports with --json.
type replayDocument struct {
	control.Meta
	Position   string         `json:"position"`
	Complete   bool           `json:"complete"` // the recording is whole
	Reason     string         `json:"reason"`   // of the replayed machine's end
	Code       uint32         `json:"code"`     //
	Verified   *uint64        `json:"verified"` // the last exit at which both sides were equal
	Digest     string         `json:"digest"`   //
	Divergence *divergence    `json:"divergence"`
	Registers  *kvm.Regs      `json:"registers,omitempty"`
	Special    *kvm.Sregs     `json:"special_registers,omitempty"`
	Devices    map[string]any `json:"devices,omitempty"`
}

type divergence struct {
	Position string `json:"position"`
	What     string `json:"what"`
	Recorded string `json:"recorded"`
	Replayed string `json:"replayed"`
}

func (a *app) replay(ctx context.Context, path string, opts record.ReplayOptions) (err error) {
	l, err := log.Open(path)
	if errors.Is(err, log.ErrNotLog) || errors.Is(err, log.ErrFormat) {
		return fail(exitFailed, "not-a-recording", "make one with ftvmm run --record", "%v", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	var out io.Writer = os.Stdout
	if a.json {
		out = os.Stderr
	}
	opts.Output = func(console int, p []byte) { _, _ = out.Write(p) }
	r, err := record.NewReplayer(l, opts)
	if err != nil {
		if errors.Is(err, kvm.ErrNoKVM) || errors.Is(err, kvm.ErrPermission) || errors.Is(err, kvm.ErrFeature) {
			return err
		}
		return fail(exitUnsupported, "cannot-replay", "play it on a host of the same kind, with the same version of ftvmm", "%v", err)
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	defer stop()
	end, err := r.Machine().Run(ctx)
	res, err := r.Finish(end, err)
	if errors.Is(err, log.ErrNotLog) || errors.Is(err, log.ErrFormat) {
		return fail(exitFailed, "not-a-recording", "make one with ftvmm run --record", "the recording is damaged after %v: %v", res.Position, err)
	}
	if err != nil {
		return err
	}
	var state *vmm.State
	if opts.Until != nil {
		if state, err = r.Machine().State(); err != nil {
			return err
		}
	}
	if res.Divergence != nil {
		a.exit = exitFailed
	}
	if a.json {
		return a.replayJSON(l, opts, res, state)
	}
	return a.replayText(l, opts, res, state)
}

func (a *app) replayText(l *log.Reader, opts record.ReplayOptions, res record.Result, state *vmm.State) error {
	if l.Truncated {
		a.note("the end of the recording is missing; what is complete was played")
	}
	switch {
	case res.Divergence != nil:
		a.note("%v", res.Divergence)
	case opts.Verify:
		a.note("replayed to %v (%s %d), equal up to exit %d, digest %s", res.Position, res.Exit.Reason, res.Exit.Code, res.Verified, res.Digest)
	default:
		a.note("replayed to %v (%s %d)", res.Position, res.Exit.Reason, res.Exit.Code)
	}
	if state == nil {
		return nil
	}
	g, s := &state.CPU.Regs, &state.CPU.Sregs
	fmt.Fprintf(a.out, "rax %016x  rbx %016x  rcx %016x  rdx %016x\n", g.RAX, g.RBX, g.RCX, g.RDX)
	fmt.Fprintf(a.out, "rsi %016x  rdi %016x  rsp %016x  rbp %016x\n", g.RSI, g.RDI, g.RSP, g.RBP)
	fmt.Fprintf(a.out, "r8  %016x  r9  %016x  r10 %016x  r11 %016x\n", g.R8, g.R9, g.R10, g.R11)
	fmt.Fprintf(a.out, "r12 %016x  r13 %016x  r14 %016x  r15 %016x\n", g.R12, g.R13, g.R14, g.R15)
	fmt.Fprintf(a.out, "rip %016x  rflags %08x  halted %v\n", g.RIP, g.RFLAGS, state.Halted)
	fmt.Fprintf(a.out, "cs %04x base %x  ss %04x  ds %04x  es %04x  fs %04x base %x  gs %04x base %x\n", s.CS.Selector, s.CS.Base,
		s.SS.Selector, s.DS.Selector, s.ES.Selector, s.FS.Selector, s.FS.Base, s.GS.Selector, s.GS.Base)
	fmt.Fprintf(a.out, "cr0 %x  cr2 %x  cr3 %x  cr4 %x  cr8 %x  efer %x\n", s.CR0, s.CR2, s.CR3, s.CR4, s.CR8, s.EFER)
	for _, c := range state.Components {
		text, err := cbor.Diagnose(c.Data)
		if err != nil {
			return fmt.Errorf("show %s: %w", c.Name, err)
		}
		fmt.Fprintf(a.out, "%s %s\n", c.Name, text)
	}
	return nil
}

func (a *app) replayJSON(l *log.Reader, opts record.ReplayOptions, res record.Result, state *vmm.State) error {
	doc := replayDocument{
		Meta: control.NewMeta("Replay"), Position: res.Position.String(), Complete: !l.Truncated && res.Recorded.Reason != "",
		Reason: string(res.Exit.Reason), Code: res.Exit.Code, Digest: res.Digest,
	}
	if opts.Verify {
		doc.Verified = &res.Verified
	}
	if d := res.Divergence; d != nil {
		doc.Divergence = &divergence{d.Position.String(), d.What, d.Recorded, d.Replayed}
	}
	if state != nil {
		doc.Registers, doc.Special, doc.Devices = &state.CPU.Regs, &state.CPU.Sregs, map[string]any{}
		for _, c := range state.Components {
			var v map[string]any
			if err := cbor.Unmarshal(c.Data, &v); err != nil {
				return fmt.Errorf("show %s: %w", c.Name, err)
			}
			doc.Devices[c.Name] = jsonable(v)
		}
	}
	return a.document(doc)
}

// jsonable turns what a CBOR decoder makes of nested maps into what a JSON encoder takes.
func jsonable(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = jsonable(v[k])
		}
	case map[any]any:
		m := make(map[string]any, len(v))
		for k, x := range v {
			m[fmt.Sprint(k)] = jsonable(x)
		}
		return m
	case []any:
		for i := range v {
			v[i] = jsonable(v[i])
		}
	}
	return v
}
