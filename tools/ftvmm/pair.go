package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/vmm/control"
)

func init() {
	extraCommands = append(extraCommands, (*app).pairCommand)
}

// pairDocument is the answer of pair init.
type pairDocument struct {
	control.Meta
	Name        string     `json:"name"`
	Fingerprint string     `json:"fingerprint"`
	Directory   string     `json:"directory"`
	Sides       []pairSide `json:"sides"`
}

// pairSide is one side's keys.
type pairSide struct {
	Side      string    `json:"side"`
	Directory string    `json:"directory"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

func (a *app) pairCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pair",
		Short: "prepare and steer two hosts that run one guest",
		Long: `Prepare and steer two hosts that run one guest. Make keys with pair init, run one side on each host with
ftvmm run --pair, look at them with pair status; ftvmm failover changes sides.`,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(a.pairInit(), a.pairStatus(), a.pairForce())
	return c
}

func (a *app) pairInit() *cobra.Command {
	var (
		out   string
		force bool
	)
	c := &cobra.Command{
		Use:   "init NAME --out DIR",
		Short: "make the keys that the two hosts of a pair prove themselves with",
		Long: `Make the keys of a pair: DIR/a for one host, DIR/b for the other. Only they will speak to
each other, because what signed them is forgotten. Copy each directory to its host over a channel that
you trust, and delete it here.`,
		Example: "  ftvmm pair init db --out db-keys",
		Args:    a.arguments(1, 1),
		RunE:    func(_ *cobra.Command, args []string) error { return a.makePair(args[0], out, force) },
	}
	c.Flags().StringVar(&out, "out", "", "`directory` to make for the keys")
	c.Flags().BoolVar(&force, "force", false, "replace the keys that are there: hosts that have the old ones are shut out")
	return c
}

func (a *app) makePair(name, out string, force bool) error {
	if out == "" {
		return fail(exitUsage, "usage", "use it as: ftvmm pair init NAME --out DIR", "where the keys shall go is not said")
	}
	fingerprint, err := link.CreatePair(out, name, force)
	if err != nil {
		return pairFailure(err)
	}
	doc := pairDocument{Meta: control.NewMeta("Pair"), Name: name, Fingerprint: fingerprint.String(), Directory: out}
	for _, side := range []link.Side{link.A, link.B} {
		dir := filepath.Join(out, side.String())
		// Read back what a host will read.
		k, err := link.LoadKeys(dir)
		if err != nil {
			return pairFailure(err)
		}
		doc.Sides = append(doc.Sides, pairSide{side.String(), dir, k.NotBefore.UTC(), k.NotAfter.UTC()})
	}
	if a.json {
		return a.document(doc)
	}
	fmt.Fprintf(a.out, "pair         %s\nfingerprint  %s\n", doc.Name, doc.Fingerprint)
	for _, s := range doc.Sides {
		fmt.Fprintf(a.out, "side %s       %s, valid until %s\n", s.Side, s.Directory, s.NotAfter.Format(time.DateOnly))
	}
	a.note("copy %s to one host and %s to the other, each to that host only, then delete %s", doc.Sides[0].Directory, doc.Sides[1].Directory, out)
	return nil
}

// pairFailure gives a refusal of the keys or of the link its exit code and remedy.
func pairFailure(err error) error {
	var e *link.Error
	if !errors.As(err, &e) {
		return err
	}
	exit, remedy := exitFailed, ""
	switch e.Reason {
	case link.BadName:
		exit, remedy = exitUsage, "take the guest's name"
	case link.KeysExist:
		exit, remedy = exitConflict, "choose another directory, or replace the keys with --force"
	case link.NotKeys:
		exit, remedy = exitConflict, "choose another directory"
	case link.KeysMissing, link.KeysUnreadable:
		remedy = "make new keys with ftvmm pair init"
	case link.KeysReadable:
		exit, remedy = exitNotPermitted, "run chmod 600 on the file"
	case link.Unreachable:
		exit, remedy = exitUnreachable, "start the other side, and check the address and the network"
	case link.RefusedByPeer:
		exit, remedy = exitUnreachable, "look at what the other side says"
	case link.Untrusted, link.WrongPair, link.SameSide, link.BadCertificate, link.NotTLS:
		exit, remedy = exitNotPermitted, "give each host its own directory of one ftvmm pair init"
	case link.Expired, link.NotYetValid:
		exit, remedy = exitNotPermitted, "set both hosts' clocks, or make new keys with ftvmm pair init --force"
	case link.WrongVersion, link.BadHello:
		exit, remedy = exitVersionSkew, "run the same version of ftvmm on both hosts"
	}
	return fail(exit, string(e.Reason), remedy, "%v", e.Err)
}
