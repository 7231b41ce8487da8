package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/witness"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/vmm/control"
)

func init() {
	extraCommands = append(extraCommands, (*app).witnessCommand)
}

// witnessDocument is the answer of witness init, and with an address what witness run says when it is ready.
type witnessDocument struct {
	control.Meta
	Directory string   `json:"directory,omitempty"`
	Hosts     []string `json:"hosts,omitempty"`
	Data      string   `json:"data,omitempty"`
	Listen    string   `json:"listen,omitempty"`
	Insecure  bool     `json:"insecure,omitempty"`
}

// grantDocument is the answer of witness grant.
type grantDocument struct {
	control.Meta
	Pair  string      `json:"pair"`
	Sides []grantSide `json:"sides"`
}

// grantSide is one side's credentials.
type grantSide struct {
	Side      string `json:"side"`
	Directory string `json:"directory"`
}

func (a *app) witnessCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "witness",
		Short: "keep the records of pairs, on a third machine",
		Long: `A witness decides, when the two hosts of a pair have lost each other, which one goes on. It runs on
a third machine that both reach, needs no KVM, and serves any number of pairs.`,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(a.witnessInit(), a.witnessRun(), a.witnessGrant())
	return c
}

func (a *app) witnessInit() *cobra.Command {
	var hosts []string
	c := &cobra.Command{
		Use:   "init DIR --host NAME",
		Short: "make the keys of a witness",
		Long: `Make the keys of a witness in DIR: an authority of its own, and a certificate for each name and
address under which the hosts of pairs reach it.`,
		Example: "  ftvmm witness init /etc/ftvmm/witness --host witness.example --host 192.0.2.7",
		Args:    a.arguments(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := witness.Init(args[0], hosts); err != nil {
				return arbiterFailure(err)
			}
			if a.json {
				return a.document(witnessDocument{Meta: control.NewMeta("WitnessKeys"), Directory: args[0], Hosts: hosts})
			}
			fmt.Fprintf(a.out, "keys         %s\n", args[0])
			for _, h := range hosts {
				fmt.Fprintf(a.out, "host         %s\n", h)
			}
			a.note("start it with: ftvmm witness run --data DIR --keys %s", args[0])
			return nil
		},
	}
	c.Flags().StringArrayVar(&hosts, "host", nil, "`name` or address under which hosts reach the witness; may be repeated")
	return c
}

func (a *app) witnessGrant() *cobra.Command {
	var (
		out   string
		force bool
	)
	c := &cobra.Command{
		Use:   "grant DIR PAIR --out OUT",
		Short: "let a pair use the witness",
		Long: `Make credentials for the two hosts of a pair, signed with the keys of the witness in DIR: OUT/a for
one host, OUT/b for the other. With them a host can read and change the record of this pair and no other. OUT may
be the directory that ftvmm pair init made. A witness that runs takes note within a second or two.`,
		Example: "  ftvmm witness grant /etc/ftvmm/witness db --out db-keys",
		Args:    a.arguments(2, 2),
		RunE: func(_ *cobra.Command, args []string) error {
			if out == "" {
				return fail(exitUsage, "usage", "use it as: ftvmm witness grant DIR PAIR --out OUT", "where the credentials shall go is not said")
			}
			if err := witness.Grant(args[0], args[1], out, force); err != nil {
				return arbiterFailure(err)
			}
			doc := grantDocument{Meta: control.NewMeta("WitnessGrant"), Pair: args[1]}
			for _, side := range []link.Side{link.A, link.B} {
				doc.Sides = append(doc.Sides, grantSide{side.String(), filepath.Join(out, side.String())})
			}
			if a.json {
				return a.document(doc)
			}
			fmt.Fprintf(a.out, "pair         %s\n", doc.Pair)
			for _, s := range doc.Sides {
				fmt.Fprintf(a.out, "side %s       %s\n", s.Side, s.Directory)
			}
			a.note("copy %s to one host and %s to the other, each to that host only, and name it there: --arbiter etcd:WITNESS:2379?keys=DIR", doc.Sides[0].Directory, doc.Sides[1].Directory)
			return nil
		},
	}
	c.Flags().StringVar(&out, "out", "", "`directory` for the credentials")
	c.Flags().BoolVar(&force, "force", false, "replace the credentials of this pair: hosts that have the old ones are shut out")
	return c
}

func (a *app) witnessRun() *cobra.Command {
	var cfg witness.Config
	c := &cobra.Command{
		Use:   "run --data DIR --keys DIR",
		Short: "run a witness in the foreground",
		Long: `Run a witness in the foreground until SIGTERM or SIGINT. The records are in the data directory:
a pair does not accept a witness that has lost them.`,
		Example: "  ftvmm witness run --data /var/lib/ftvmm/witness --keys /etc/ftvmm/witness",
		Args:    a.arguments(0, 0),
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.runWitness(cmd.Context(), cfg) },
	}
	c.Flags().StringVar(&cfg.Data, "data", "", "`directory` of the records; made if it is not there")
	c.Flags().StringVar(&cfg.Listen, "listen", ":2379", "`address` to listen on")
	c.Flags().StringVar(&cfg.Keys, "keys", "", "`directory` that ftvmm witness init made")
	c.Flags().BoolVar(&cfg.Insecure, "insecure", false, "without keys, encryption and access control, on a loopback address: for tests")
	return c
}

func (a *app) runWitness(ctx context.Context, cfg witness.Config) error {
	const use = "use it as: ftvmm witness run --data DIR --keys DIR"
	switch {
	case cfg.Data == "":
		return fail(exitUsage, "usage", use, "where the records shall be is not said")
	case cfg.Keys == "" && !cfg.Insecure:
		return fail(exitUsage, "usage", use+"; make keys with ftvmm witness init", "the keys of the witness are not given")
	case cfg.Keys != "" && cfg.Insecure:
		return fail(exitUsage, "usage", "choose one of the two", "--keys and --insecure exclude each other")
	}
	// From here on a signal ends it, also while it starts.
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	cfg.Log = slog.New(slog.NewTextHandler(a.err, nil))
	w, err := witness.Start(ctx, cfg)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return arbiterFailure(err)
	}
	if a.json {
		doc := witnessDocument{Meta: control.NewMeta("WitnessReady"), Data: cfg.Data, Listen: w.Addr().String(), Insecure: cfg.Insecure}
		if err := a.document(doc); err != nil {
			return errors.Join(err, w.Close())
		}
	}
	a.note("the witness is ready on %v", w.Addr())
	select {
	case <-ctx.Done():
	case <-w.Done():
	}
	return w.Close()
}

// arbiterFailure gives an error of an arbiter or a witness its exit code.
func arbiterFailure(err error) error {
	var e *arbiter.Error
	if !errors.As(err, &e) {
		return err
	}
	exit := exitFailed
	switch e.Reason {
	case arbiter.BadSpec, witness.BadHost, witness.BadName, witness.NotLoopback:
		exit = exitUsage
	case witness.KeysExist, witness.DataInUse, witness.NeedsKeys:
		exit = exitConflict
	case arbiter.KeysReadable, arbiter.NotGranted:
		exit = exitNotPermitted
	case arbiter.NoAnswer:
		exit = exitUnreachable
	}
	return fail(exit, e.Reason, e.Remedy, "%v", err)
}
