package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/ftvmm/ftvmm/lockstep/record"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/config"
)

// recordFlags are run's flags about recordings.
type recordFlags struct {
	path    string
	details bool
}

func (f *recordFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.path, "record", "", "record the run to this `file`, for ftvmm replay")
	flags.BoolVar(&f.details, "record-details", false, "record what each exit was about, too, so that a divergence shows both sides")
}

// check refuses what cannot be recorded.
func (f *recordFlags) check(g *config.Guest) error {
	switch {
	case f.path == "" && f.details:
		return fail(runBadConfig, string(config.Conflict), "say where to with --record", "--record-details without --record")
	case f.path != "" && g.OnGuestShutdown == config.Restart:
		return fail(runBadConfig, string(config.Conflict), "leave one of them out", "a recording holds one life of a guest; on_guest_shutdown is %q", config.Restart)
	}
	return nil
}

// tape records one run; nil records none.
type tape struct {
	file     *os.File
	opts     record.Options
	recorder *record.Recorder
	begun    bool
}

// open makes the file. It must not exist: a recording cannot be made again.
func (f *recordFlags) open(g *config.Guest) (*tape, error) {
	if f.path == "" {
		return nil, nil
	}
	counter, err := vmm.ProbeCounter(g.KVM)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // what the guest knows is in it
	if errors.Is(err, os.ErrExist) {
		return nil, fail(runBadConfig, "file-exists", "choose another name, or remove it", "the recording %s exists", f.path)
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	return &tape{file: file, opts: record.Options{Counter: counter, Details: f.details}}, nil
}

// configure puts the recorder into a machine's configuration.
func (t *tape) configure(cfg *vmm.Config) {
	if t != nil {
		t.recorder = record.NewRecorder(cfg, t.opts)
	}
}

func (t *tape) begin(m *vmm.Machine, restored bool) error {
	if t == nil {
		return nil
	}
	t.begun = true
	return t.recorder.Begin(m, t.file, restored)
}

// end completes the recording.
func (t *tape) end(end vmm.Exit) error {
	if t == nil {
		return nil
	}
	return t.recorder.End(end)
}

// Close closes the file; one without a recording in it is removed.
func (t *tape) Close() error {
	if t == nil {
		return nil
	}
	err := t.file.Close()
	if !t.begun {
		err = errors.Join(err, os.Remove(t.file.Name()))
	}
	return err
}
