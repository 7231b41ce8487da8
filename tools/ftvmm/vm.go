package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/config"
	"github.com/ftvmm/ftvmm/vmm/console"
	"github.com/ftvmm/ftvmm/vmm/control"
)

// vmFlags say which guest is meant, and how long to wait for it.
type vmFlags struct {
	control string
	timeout time.Duration
}

func (f *vmFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.control, "control", "", "`path` of the guest's control socket, instead of its name")
	flags.DurationVar(&f.timeout, "timeout", 30*time.Second, "how `long` to wait for the guest; 0: without end")
}

// target takes the guest's name from the arguments, unless --control names the socket, and returns
// the arguments that are left.
func (f *vmFlags) target(ctx context.Context, cmd *cobra.Command, args []string) (*control.Client, []string, error) {
	if f.control != "" {
		return control.NewClient(f.control), args, nil
	}
	if len(args) == 0 {
		return nil, nil, fail(exitUsage, "usage", "use it as: "+cmd.UseLine(), "the name of the guest is missing")
	}
	if !config.ValidName(args[0]) {
		return nil, nil, fail(exitUsage, "bad-name", "names are lower case letters, digits and dashes; use --control PATH for a guest without a name", "%q is no name of a guest", args[0])
	}
	return control.NewClient(findSocket(ctx, args[0])), args[1:], nil
}

func (a *app) vmCommand() *cobra.Command {
	var f vmFlags
	c := &cobra.Command{
		Use:   "vm",
		Short: "ask and steer a running guest",
		Long: `Ask and steer a running guest through its control socket: that of the guest
with this name, or the one that --control names. Of a pair, NAME is the side that is on this host, of
two the one on which the guest runs; NAME-a and NAME-b name them.`,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	f.add(c.PersistentFlags())
	c.AddCommand(
		a.vmStatus(&f),
		a.vmStats(&f),
		a.vmVerb(&f, "pause", "stop the guest and its time", (*control.Client).Pause),
		a.vmVerb(&f, "resume", "let a paused guest go on", (*control.Client).Resume),
		a.vmVerb(&f, "power-button", "press the power button: the guest shuts down by itself", (*control.Client).PowerButton),
		a.vmVerb(&f, "reset", "press the reset button", (*control.Client).Reset),
		a.vmVerb(&f, "quit", "end the guest at once, as pulling the plug would", (*control.Client).Quit),
		a.vmSave(&f),
		a.vmConsole(&f),
	)
	return c
}

// vmCall runs f with the client that args name, which must leave extra arguments.
func (a *app) vmCall(flags *vmFlags, cmd *cobra.Command, args []string, minExtra, maxExtra int, f func(ctx context.Context, c *control.Client, extra []string) error) error {
	client, extra, err := flags.target(cmd.Context(), cmd, args)
	if err != nil {
		return err
	}
	defer client.Close()
	if len(extra) < minExtra || len(extra) > maxExtra {
		return fail(exitUsage, "usage", "use it as: "+cmd.UseLine(), "%s takes other arguments than %q", cmd.CommandPath(), args)
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if flags.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, flags.timeout)
		defer cancel()
	}
	return f(ctx, client, extra)
}

// done answers a verb that succeeded.
func (a *app) done(verb string) error {
	if a.json {
		return a.document(control.Done{Meta: control.NewMeta(control.KindDone), Verb: verb})
	}
	return nil
}

func (a *app) vmVerb(flags *vmFlags, name, short string, f func(*control.Client, context.Context) error) *cobra.Command {
	return &cobra.Command{
		Use:   name + " NAME",
		Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.vmCall(flags, cmd, args, 0, 0, func(ctx context.Context, c *control.Client, _ []string) error {
				if err := f(c, ctx); err != nil {
					return err
				}
				return a.done(name)
			})
		},
	}
}

func (a *app) vmStatus(flags *vmFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "status NAME",
		Short: "print what the guest is doing",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.vmCall(flags, cmd, args, 0, 0, func(ctx context.Context, c *control.Client, _ []string) error {
				st, err := c.Status(ctx)
				if err != nil {
					return err
				}
				if a.json {
					return a.document(st)
				}
				w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
				fmt.Fprintf(w, "name\t%s\nstate\t%s\nposition\t%s\nvirtual time\t%s\nuptime\t%s\nmemory\t%s\nvCPUs\t%d\nprocess\t%d\nversion\t%s\n",
					st.Name, stateText(st), st.Position, ms(st.VirtualTimeMS), ms(st.UptimeMS), config.Size(st.MemoryBytes), st.CPUs, st.PID, st.Version)
				for _, name := range st.Consoles {
					fmt.Fprintf(w, "console\t%s\n", name)
				}
				return w.Flush()
			})
		},
	}
}

// stateText is the state with the side of a pair.
func stateText(st control.Status) string {
	if st.Role == "" {
		return string(st.State)
	}
	return fmt.Sprintf("%s\nrole\t%s\nside\t%s", st.State, st.Role, st.Side)
}

func ms(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

func (a *app) vmStats(flags *vmFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "stats NAME",
		Short: "print the guest's counters",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.vmCall(flags, cmd, args, 0, 0, func(ctx context.Context, c *control.Client, _ []string) error {
				st, err := c.Stats(ctx)
				if err != nil {
					return err
				}
				if a.json {
					return a.document(st)
				}
				w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
				for _, name := range sortedKeys(st.Counters) {
					fmt.Fprintf(w, "%s\t%d\n", name, st.Counters[name])
				}
				for _, name := range sortedKeys(st.Consoles) {
					s := st.Consoles[name]
					fmt.Fprintf(w, "%s\toutput %d, input %d, dropped %d bytes; %d sessions\n", name, s.Output, s.Input, s.Dropped, s.Sessions)
				}
				return w.Flush()
			})
		},
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

func (a *app) vmSave(flags *vmFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "save NAME FILE",
		Short: "write the guest's state to a file, for run --restore",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.vmCall(flags, cmd, args, 1, 1, func(ctx context.Context, c *control.Client, extra []string) error {
				path, err := filepath.Abs(extra[0])
				if err != nil {
					return fmt.Errorf("save to %s: %w", extra[0], err)
				}
				if err := c.Save(ctx, path); err != nil {
					return err
				}
				return a.done("save")
			})
		},
	}
}

// defaultConsole is the console that is attached if none is named.
const defaultConsole = "serial0"

func (a *app) vmConsole(flags *vmFlags) *cobra.Command {
	var readOnly bool
	c := &cobra.Command{
		Use:   "console NAME [CONSOLE]",
		Short: "attach to a console of the guest",
		Long: `Attach to a console of the guest, serial0 if none is named: print its recent
output and what follows, and type what is typed here. One session at a time
may type; with --read-only any number can look on. The command ends with the
guest.

On a terminal every key goes to the guest, Ctrl-C too. Ctrl-] q detaches;
Ctrl-] Ctrl-] types Ctrl-]. Where standard input is no terminal, its end is no
reason to detach.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.vmCall(flags, cmd, args, 0, 1, func(ctx context.Context, c *control.Client, extra []string) error {
				name := defaultConsole
				if len(extra) == 1 {
					name = extra[0]
				}
				session, err := c.Console(ctx, name, !readOnly)
				if err != nil {
					return err
				}
				defer session.Close()
				return a.interact(cmd.Context(), session, readOnly)
			})
		},
	}
	c.Flags().BoolVar(&readOnly, "read-only", false, "do not type")
	return c
}

// interact connects the terminal with a session until one of them ends.
func (a *app) interact(ctx context.Context, session io.ReadWriteCloser, readOnly bool) error {
	ctx, cancel := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	defer cancel()
	detach := sync.OnceFunc(func() { session.Close() })
	stop := context.AfterFunc(ctx, detach)
	defer stop()

	local, err := console.Open("local", console.Spec{Kind: console.Stdio}, console.Options{
		Stdin: int(os.Stdin.Fd()), Stdout: int(os.Stdout.Fd()),
		OnKey: func(key byte) {
			switch key {
			case console.KeyQuit:
				detach()
			case console.KeyHelp:
				a.note("Ctrl-] q detaches, Ctrl-] Ctrl-] types Ctrl-]\r")
			}
		},
	})
	if err != nil {
		return err
	}
	if console.IsTerminal(int(os.Stdin.Fd())) && !readOnly {
		a.note("attached; Ctrl-] q detaches\r")
	}
	local.Start(func(p []byte) {
		if !readOnly {
			_, _ = session.Write(p) // its end is seen by the reader below
		}
	})
	p := make([]byte, console.MaxInput)
	for {
		n, err := session.Read(p)
		if n > 0 {
			local.Output(slices.Clone(p[:n]))
		}
		if err != nil {
			break
		}
	}
	detach()
	return local.Close()
}
