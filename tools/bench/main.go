// Command bench compares ftvmm with QEMU on this machine: start-up, the cost of an exit, firmware,
// disk, network and memory.
//
// The two run in turn (A B A B ...), so that what else the machine does meanwhile falls on both, and
// what is compared are medians. A figure that misses its target is reported, and is no failure: another
// host, or a busy one, has other figures. All times are taken on the host; a guest's own
// clock is part of what is measured.
//
//	bench [-n RUNS] [-run REGEX] [-slow] [-lockstep] [-json FILE] [-svg FOLDER] [-ftvmm PATH]
//
// What takes long is measured only with -slow or -lockstep, or if -run names it. The rows "colo" and "migrate"
// are QEMU's alone, for comparison with a pair of ours: they have no target (docs/peers.md).
//
// Figures about the network need root: they run in a network namespace that ends with the program.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// runLimit bounds one run of one virtual machine.
const runLimit = 5 * time.Minute

// options are the command line.
type options struct {
	runs     int
	slow     bool
	lockstep bool
	only     *regexp.Regexp
	json     string
	svg      string
	ftvmm    string
	dir      string
}

func main() {
	var o options
	only := flag.String("run", "", "measure only figures whose name matches this `regexp`")
	flag.IntVar(&o.runs, "n", 5, "`runs` of each program; the figure is their median")
	flag.BoolVar(&o.slow, "slow", false, "measure firmware and boot programs, too")
	flag.BoolVar(&o.lockstep, "lockstep", false, "measure how guests are protected and moved, too")
	flag.StringVar(&o.json, "json", "", "write the figures, with every sample, to this `file`")
	flag.StringVar(&o.svg, "svg", "", "draw distributions into this `folder`")
	flag.StringVar(&o.ftvmm, "ftvmm", "", "`path` of the program to measure; built from this tree if not given")
	flag.StringVar(&o.dir, "dir", "", "`folder` for the disk image; the system's for temporary files if not given")
	flag.Parse()
	var err error
	if o.only, err = regexp.Compile(*only); err != nil || flag.NArg() > 0 || o.runs < 1 {
		fmt.Fprintln(os.Stderr, "bench: bad arguments;", errors.Join(err), "see bench -help")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures what the options select and reports it.
func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp(o.dir, "ftvmm-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	root, err := moduleRoot(ctx)
	if err != nil {
		return err
	}
	b := &bench{dir: dir, root: root, log: os.Stderr}
	if o.ftvmm == "" {
		o.ftvmm = filepath.Join(dir, "ftvmm")
		if err := buildFtvmm(ctx, root, o.ftvmm); err != nil {
			return err
		}
	}
	b.ours = &ftvmm{path: o.ftvmm}
	qemu, err := findQEMU()
	if err != nil {
		b.logf("no comparison: %v", err)
	} else {
		b.qemu = qemu
	}
	results, err := b.measure(ctx, groups, o)
	if len(results) > 0 {
		printTable(os.Stdout, results)
		if o.json != "" {
			err = errors.Join(err, writeJSON(o.json, newDocument(b, o, results)))
		}
		if o.svg != "" {
			err = errors.Join(err, drawPlots(o.svg, results))
		}
	}
	return err
}

func writeJSON(path string, v any) error {
	p, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(p, '\n'), 0o644)
}

// moduleRoot returns the folder of this program's module, where the test guests are.
func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the source tree (run bench within it): %w", err)
	}
	return string(out[:max(len(out)-1, 0)]), nil
}

func buildFtvmm(ctx context.Context, root, to string) error {
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", to, "./tools/ftvmm")
	c.Dir, c.Stderr, c.Env = root, os.Stderr, append(os.Environ(), "CGO_ENABLED=0")
	if err := c.Run(); err != nil {
		return fmt.Errorf("build ftvmm: %w", err)
	}
	return nil
}
