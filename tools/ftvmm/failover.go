package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm/config"
	"github.com/ftvmm/ftvmm/vmm/control"
)

func init() {
	extraCommands = append(extraCommands, (*app).failoverCommand)
}

// Times of those who look at a pair.
const (
	knockTimeout = time.Second            // for a side's socket to answer when a name is looked up
	watchPeriod  = 200 * time.Millisecond // between two looks at a pair
	hastePeriod  = 5 * time.Millisecond   // and while something is awaited
)

// sideSocket is the control socket of one side of the named guest.
func sideSocket(name, side string) string { return config.ControlPath(name + "-" + side) }

// findSocket returns the control socket of the named guest on this host: its own, or that of a side of its pair. If both sides
// are here it is that on which the guest runs.
func findSocket(ctx context.Context, name string) string {
	own := config.ControlPath(name)
	if answers(ctx, own) {
		return own
	}
	var found []string
	for _, side := range []string{"a", "b"} {
		if path := sideSocket(name, side); answers(ctx, path) {
			found = append(found, path)
		}
	}
	switch len(found) {
	case 0:
		return own // what there is to say about it is said when it is used
	case 1:
		return found[0]
	}
	for _, path := range found {
		if runsHere(ctx, path) {
			return path
		}
	}
	return found[0]
}

// answers reports whether somebody listens at a socket.
func answers(ctx context.Context, path string) bool {
	d := net.Dialer{Timeout: knockTimeout}
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		// What exists and may not be opened is there, too.
		return errors.Is(err, os.ErrPermission)
	}
	c.Close()
	return true
}

// runsHere reports whether the guest runs on the side with this socket.
func runsHere(ctx context.Context, path string) bool {
	ctx, cancel := context.WithTimeout(ctx, knockTimeout)
	defer cancel()
	client := control.NewClient(path)
	defer client.Close()
	p, err := client.Pair(ctx)
	return err == nil && p.Role == control.Primary
}

// failoverDocument is the answer of failover.
type failoverDocument struct {
	control.Meta
	Name     string `json:"name"`
	From     string `json:"from"`
	To       string `json:"to"`
	Complete bool   `json:"complete"` // false: it was not waited for
	TookMS   int64  `json:"took_ms"`
}

func (a *app) failoverCommand() *cobra.Command {
	var (
		f    vmFlags
		wait bool
	)
	c := &cobra.Command{
		Use:   "failover NAME",
		Short: "hand a guest over to the other side of its pair",
		Long: `Hand a guest over to the other side of its pair while it runs: for work on this host, or to move
it. The guest stands for a moment, nothing is lost, and this side becomes the backup of the other. The pair must be
complete (see ftvmm pair status). Ask the side on which the guest runs; NAME finds it if it is on this host.`,
		Example: "  ftvmm failover db\n  ftvmm failover --control /run/ftvmm/db-a.sock",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.vmCall(&f, cmd, args, 0, 0, func(ctx context.Context, c *control.Client, _ []string) error {
				return a.failover(ctx, c, wait)
			})
		},
	}
	f.add(c.Flags())
	c.Flags().BoolVar(&wait, "wait", true, "wait until the other side runs the guest and this one protects it")
	return c
}

func (a *app) failover(ctx context.Context, c *control.Client, wait bool) error {
	before, err := c.Pair(ctx)
	if err != nil {
		return err
	}
	doc := failoverDocument{Meta: control.NewMeta("Failover"), Name: before.Name, From: before.Side, To: otherSide(before.Side)}
	began := time.Now()
	if err := c.Failover(ctx); err != nil {
		return err
	}
	a.note("%s goes from side %s to side %s", doc.Name, doc.From, doc.To)
	if wait {
		if err := awaitFailover(ctx, c, doc); err != nil {
			return err
		}
		doc.Complete, doc.TookMS = true, time.Since(began).Milliseconds()
	}
	if a.json {
		return a.document(doc)
	}
	if wait {
		fmt.Fprintf(a.out, "%s runs on side %s, and side %s protects it (%d ms)\n", doc.Name, doc.To, doc.From, doc.TookMS)
	}
	return nil
}

// awaitFailover waits until a side that hands over is the other's backup.
func awaitFailover(ctx context.Context, c *control.Client, doc failoverDocument) error {
	return awaitPair(ctx, c, func(p control.Pair) (bool, error) {
		switch p.Phase {
		case protocol.Backup.String():
			return true, nil
		case protocol.Protected.String():
			return false, fail(exitConflict, "not-handed-over", "try again", "side %s runs the guest as before: side %s did not take it", doc.From, doc.To)
		case protocol.Alone.String(), protocol.Syncing.String():
			return false, fail(exitFailed, "peer-lost", "look at the other host; the pair completes itself when it is back", "side %s was lost meanwhile; side %s runs the guest", doc.To, doc.From)
		}
		return false, nil
	})
}

// awaitPair looks at a side until ready says that there is no more to wait for.
func awaitPair(ctx context.Context, c *control.Client, ready func(control.Pair) (bool, error)) error {
	for {
		p, err := c.Pair(ctx)
		if err != nil {
			return err
		}
		if ok, err := ready(p); ok || err != nil {
			return err
		}
		if err := sleep(ctx, hastePeriod); err != nil {
			return err
		}
	}
}

// sleep waits for a time, or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *app) pairStatus() *cobra.Command {
	var (
		f     vmFlags
		watch bool
	)
	c := &cobra.Command{
		Use:   "status NAME",
		Short: "print what one side of a pair is doing",
		Long: `Print what one side of a pair is doing: its phase, what the arbiter's record says, and the paths to the other
side. NAME finds the side that is on this host, of two the one on which the guest runs; NAME-a and NAME-b name them.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if watch {
				return a.watchPair(cmd, &f, args)
			}
			return a.vmCall(&f, cmd, args, 0, 0, func(ctx context.Context, c *control.Client, _ []string) error {
				p, err := c.Pair(ctx)
				if err != nil {
					return err
				}
				if a.json {
					return a.document(p)
				}
				return a.printPair(p)
			})
		},
	}
	f.add(c.Flags())
	c.Flags().BoolVar(&watch, "watch", false, "go on, and print each change in one line")
	return c
}

func (a *app) printPair(p control.Pair) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "name\t%s\nside\t%s\nrole\t%s\nphase\t%s\nprotected\t%s\nlinked\t%s\n", p.Name, p.Side, p.Role, p.Phase, yes(p.Protected), yes(p.Linked))
	for _, path := range p.Paths {
		fmt.Fprintf(w, "path %d\t%s\n", path.Path, pathText(path))
	}
	fmt.Fprintf(w, "term\t%d\nrecord\t%s\nheld outputs\t%d\ncopies\t%d\n", p.Term, recordText(p.Record), p.HeldOutputs, p.Cuts)
	return w.Flush()
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func pathText(p control.PairPath) string {
	text := fmt.Sprintf("round trip %.2f ms", float64(p.RTT)/1e3)
	if p.Log {
		text += ", carries the log"
	}
	if p.Bulk {
		text += ", carries copies"
	}
	if p.Quiet {
		text += ", quiet"
	}
	return text
}

func recordText(r control.PairRecord) string {
	if r.Epoch == 0 {
		return "none"
	}
	return fmt.Sprintf("%d: in sync %s, primary %s", r.Epoch, strings.Join(r.InSync, " and "), r.Primary)
}

// watchPair prints each change of a side, until it is interrupted. A side that goes is looked for again.
func (a *app) watchPair(cmd *cobra.Command, f *vmFlags, args []string) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, unix.SIGTERM)
	defer stop()
	lines := json.NewEncoder(a.out)
	last, first := "", true
	for {
		client, extra, err := f.target(ctx, cmd, args)
		if err == nil && len(extra) > 0 {
			err = fail(exitUsage, "usage", "use it as: "+cmd.UseLine(), "%s takes other arguments than %q", cmd.CommandPath(), args)
		}
		if err != nil {
			return err
		}
		for ctx.Err() == nil {
			p, err := client.Pair(ctx)
			if err != nil {
				if first && ctx.Err() == nil {
					client.Close()
					return err
				}
				break
			}
			first = false
			text := fmt.Sprintf("side %s  %s  %s  protected %s  linked %s  term %d  record %s", p.Side, p.Role, p.Phase, yes(p.Protected), yes(p.Linked), p.Term, recordText(p.Record))
			if text != last {
				last = text
				if a.json {
					err = lines.Encode(p)
				} else {
					_, err = fmt.Fprintf(a.out, "%s  %s\n", time.Now().Format("15:04:05.000"), text)
				}
				if err != nil {
					client.Close()
					return fmt.Errorf("write the answer: %w", err)
				}
			}
			if sleep(ctx, watchPeriod) != nil {
				break
			}
		}
		client.Close()
		if ctx.Err() != nil {
			return nil
		}
		if last != "" {
			a.note("nobody answers")
			last = ""
		}
		if sleep(ctx, watchPeriod) != nil {
			return nil
		}
	}
}

func (a *app) pairForce() *cobra.Command {
	var (
		f   vmFlags
		yes bool
	)
	c := &cobra.Command{
		Use:   "force-start NAME --yes",
		Short: "start a side that may not start by itself, against the arbiter's record",
		Long: `Start a side that waits because the arbiter's record says that the other side may know more.

DANGER. Only for when the other host is gone for good. What the guest has promised on the other side since this
one fell behind is lost: answered requests, sent messages. If the other side still runs, or starts again with its
old state, its part is lost instead. The order is kept as the event pair-forced.`,
		Example: "  ftvmm pair status db\n  ftvmm pair force-start db --yes",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.vmCall(&f, cmd, args, 0, 0, func(ctx context.Context, c *control.Client, _ []string) error {
				return a.forcePair(ctx, c, yes)
			})
		},
	}
	f.add(c.Flags())
	c.Flags().BoolVar(&yes, "yes", false, "what the other side has promised may be lost: I know")
	return c
}

func (a *app) forcePair(ctx context.Context, c *control.Client, yes bool) error {
	p, err := c.Pair(ctx)
	if err != nil {
		return err
	}
	if p.Linked {
		return fail(exitUnsafe, "peer-alive", "nothing: the sides agree by themselves who runs the guest", "side %s talks to side %s, which is not gone", p.Side, otherSide(p.Side))
	}
	if !yes {
		return fail(exitUnsafe, "needs-yes", "make sure that side "+otherSide(p.Side)+" is gone for good, then say --yes",
			"side %s is %s and the record is %s: to start it now may lose what side %s has promised", p.Side, p.Phase, recordText(p.Record), otherSide(p.Side))
	}
	if err := c.Force(ctx); err != nil {
		return err
	}
	a.note("side %s of %s is forced against the record (%s)", p.Side, p.Name, recordText(p.Record))
	if err := awaitPair(ctx, c, func(p control.Pair) (bool, error) { return p.Role == control.Primary, nil }); err != nil {
		return err
	}
	return a.done("force-start")
}
