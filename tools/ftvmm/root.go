package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ftvmm/ftvmm/vmm/config"
	"github.com/ftvmm/ftvmm/vmm/control"
)

// app is what all commands share.
type app struct {
	out, err io.Writer
	json     bool
	// exit is the exit code of a command that did what it should: run carries the guest's code here.
	exit int
	// usageExit is the exit code of usage errors: run has its own.
	usageExit int
}

// execute runs one command line and returns the exit code.
func execute(args []string, stdout, stderr io.Writer) int {
	a := &app{out: stdout, err: stderr, usageExit: exitUsage}
	root := a.root()
	root.SetArgs(args)
	// Cobra finds the command before it reads flags, so that a bad flag of run gets run's exit code.
	if cmd, _, err := root.Find(args); err == nil && cmd.CommandPath() == "ftvmm run" {
		a.usageExit = runBadConfig
	}
	if err := root.Execute(); err != nil {
		return a.report(err)
	}
	return a.exit
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "ftvmm",
		Short: "run virtual machines that survive faults",
		Long: `ftvmm runs virtual machines under KVM.

Try:
  ftvmm demo
  ftvmm run --guest hello`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noSuchCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.PersistentFlags().BoolVar(&a.json, "json", false, "write one JSON document to standard output")
	root.SetFlagErrorFunc(a.flagError)
	root.AddCommand(a.runCommand(), a.vmCommand(), a.configCommand(), a.versionCommand())
	for _, extra := range extraCommands {
		root.AddCommand(extra(a))
	}
	return root
}

// extraCommands are commands that other files of this package add.
var extraCommands []func(*app) *cobra.Command

// noSuchCommand refuses a word that is no command, and names the nearest that is.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	var names []string
	for _, c := range cmd.Commands() {
		names = append(names, c.Name())
	}
	return fail(exitUsage, "unknown-command", didYouMean(args[0], names, "see "+cmd.CommandPath()+" --help"), "%s has no command %q", cmd.CommandPath(), args[0])
}

func didYouMean(word string, candidates []string, otherwise string) string {
	if near := config.Nearest(word, candidates); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return otherwise
}

// flagError names the flag that is nearest to one that does not exist.
func (a *app) flagError(cmd *cobra.Command, err error) error {
	remedy := "see " + cmd.CommandPath() + " --help"
	if word, ok := strings.CutPrefix(err.Error(), "unknown flag: --"); ok {
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
		if near := config.Nearest(word, names); near != "" {
			remedy = fmt.Sprintf("did you mean --%s?", near)
		}
	}
	return fail(a.usageExit, "usage", remedy, "%v", err)
}

// arguments checks how many words follow the command.
func (a *app) arguments(minimum, maximum int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < minimum || len(args) > maximum {
			return fail(a.usageExit, "usage", "use it as: "+cmd.UseLine(), "%s takes other arguments than %q", cmd.CommandPath(), args)
		}
		return nil
	}
}

// document writes one JSON document.
func (a *app) document(doc any) error {
	enc := json.NewEncoder(a.out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(doc); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}

// errorDocument is a failed command's answer to --json.
type errorDocument struct {
	control.Meta
	ExitCode int       `json:"exit_code"`
	Errors   []problem `json:"errors"`
}

// report prints an error and returns the exit code.
func (a *app) report(err error) int {
	f := classify(err)
	for _, p := range f.problems {
		fmt.Fprintf(a.err, "error: %s (%s)\n", p.Message, p.Code)
		if p.Remedy != "" {
			fmt.Fprintf(a.err, "  remedy: %s\n", p.Remedy)
		}
	}
	if a.json {
		_ = a.document(errorDocument{control.NewMeta(control.KindError), f.exit, f.problems})
	}
	return f.exit
}

// note writes a line for the person at the terminal.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.err, "ftvmm: "+format+"\n", args...)
}
