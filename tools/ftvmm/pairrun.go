package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"github.com/ftvmm/ftvmm/lockstep/arbiter/open"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/lockstep/pair"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/config"
	"github.com/ftvmm/ftvmm/vmm/event"
)

// pairFlags are run's flags about the other side.
type pairFlags struct {
	keys    string
	listen  []string
	peer    []string
	arbiter string
	commit  string
	engine  string
	tsc     string
	log     string
	verify  bool
	scrub   time.Duration
}

// Choices of the flags.
const (
	engineAuto, engineLockstep, engineCheckpoint = "auto", "lockstep", "checkpoint"
	tscAuto, tscUnused                           = "auto", "unused"
)

func (f *pairFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.keys, "pair", "", "run one side of a pair, with the keys in this `directory` (see ftvmm pair init)")
	flags.StringSliceVar(&f.listen, "listen", nil, "wait for the other side at this `address`; a second one is a second path")
	flags.StringSliceVar(&f.peer, "peer", nil, "find the other side at this `address`; a second one is a second path")
	flags.StringVar(&f.arbiter, "arbiter", "", "what decides who goes on alone: file:DIR or etcd:HOST:PORT?keys=DIR")
	flags.StringVar(&f.engine, "engine", engineAuto, "how the other side follows: lockstep, checkpoint or auto")
	flags.StringVar(&f.commit, "commit", "auto", "when an output may leave: executed, received or auto")
	flags.StringVar(&f.tsc, "guest-tsc", tscAuto, "unused says that the guest does not use RDTSC to tell time, or lets it be; auto takes no chances")
	flags.DurationVar(&f.scrub, "scrub", pair.DefaultScrubPeriod, "the `time` within which both sides compare all memory and device state once")
	flags.BoolVar(&f.verify, "verify-cuts", false, "compare all memory and state after each copy, for debugging: the guest stands meanwhile")
	flags.StringVar(&f.log, "pair-log", "", "write what the pair does to this `file`, for debugging")
}

// check refuses what does not go together.
func (f *pairFlags) check(g *config.Guest, rec *recordFlags) error {
	wrong := func(remedy, format string, args ...any) error {
		return fail(runBadConfig, string(config.Conflict), remedy, format, args...)
	}
	switch {
	case f.keys == "" && (len(f.listen) > 0 || len(f.peer) > 0 || f.arbiter != ""):
		return wrong("give it with --pair, after ftvmm pair init", "a side of a pair needs its keys")
	case f.keys == "":
		return nil
	case (len(f.listen) == 0) == (len(f.peer) == 0):
		return wrong("give one side --listen and the other --peer", "one side of a pair waits, the other finds it")
	case f.arbiter == "":
		return wrong("set up an arbiter: file:DIR on storage that both hosts see, or ftvmm witness on a third machine", "a pair without an arbiter could end with two live sides")
	case rec.path != "":
		return wrong("leave one of them out", "--record does not go together with --pair")
	case g.OnGuestShutdown == config.Restart:
		return wrong("leave one of them out", "on_guest_shutdown = %q does not go together with --pair", config.Restart)
	}
	if _, err := f.rule(); err != nil {
		return err
	}
	if f.scrub < time.Second {
		return wrong("take a second or more", "--scrub %v", f.scrub)
	}
	if f.tsc != tscAuto && f.tsc != tscUnused {
		return wrong("say auto or unused", "--guest-tsc %q", f.tsc)
	}
	return nil
}

// settle gives this side a control socket of its own, so that both sides can be on one host.
func (f *pairFlags) settle(g *config.Guest) error {
	if f.keys == "" || g.Control != config.ControlPath(g.Name) {
		return nil
	}
	keys, err := link.LoadKeys(f.keys)
	if err != nil {
		return err
	}
	g.Control = filepath.Join(filepath.Dir(g.Control), g.Name+"-"+keys.Side.String()+".sock")
	return nil
}

// rule returns the commit rule.
func (f *pairFlags) rule() (protocol.Commit, error) {
	wrong := func(remedy, format string, args ...any) error {
		return fail(runBadConfig, string(config.Conflict), remedy, format, args...)
	}
	switch f.engine {
	case engineCheckpoint:
		return protocol.Checkpointed, nil
	case engineAuto, engineLockstep:
	default:
		return 0, wrong("say lockstep, checkpoint or auto", "--engine %q", f.engine)
	}
	switch f.commit {
	case "auto", "executed":
		return protocol.Executed, nil
	case "received":
		if f.tsc != tscUnused {
			return 0, wrong("say --guest-tsc unused if it does not, or leave --commit alone", "outputs may leave on receipt only if the guest uses no clock that cannot be trapped")
		}
		return protocol.Received, nil
	}
	return 0, wrong("say executed, received or auto", "--commit %q", f.commit)
}

// side is one side of a pair, nil for a guest that runs alone.
type side struct {
	*pair.Pair
	keys    *link.Keys
	arbiter io.Closer
	log     io.Closer
}

// open prepares this side for the machine of cfg.
func (f *pairFlags) open(g *config.Guest, cfg *vmm.Config, events *event.Emitter) (s *side, err error) {
	if f.keys == "" {
		return nil, nil
	}
	s = &side{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
			s = nil
		}
	}()
	keys, err := link.LoadKeys(f.keys)
	if err != nil {
		return s, err
	}
	s.keys = keys
	a, closer, err := open.Arbiter(f.arbiter, keys.Pair)
	if err != nil {
		return s, err
	}
	s.arbiter = closer
	commit, err := f.rule()
	if err != nil {
		return s, err
	}
	var logger *slog.Logger
	if f.log != "" {
		file, err := os.OpenFile(f.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return s, fmt.Errorf("pair log: %w", err)
		}
		s.log = file
		logger = slog.New(slog.NewTextHandler(file, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	counter, err := vmm.ProbeCounter(g.KVM)
	if err != nil {
		return s, err
	}
	cfg.Counter = counter
	s.Pair, err = pair.New(cfg, pair.Options{
		Keys: keys, Listen: f.listen, Peer: f.peer, Arbiter: a, Commit: commit, Taint: f.tsc != tscUnused,
		VerifyCuts: f.verify, ScrubPeriod: f.scrub, StaleMark: filepath.Join(f.keys, "disks-not-whole"), Log: logger,
		Event: func(name string, fields map[string]any) { events.Emit(event.Kind(name), fields) },
	})
	return s, err
}

// start begins to look for the peer.
func (s *side) start(m *vmm.Machine) error {
	if s == nil {
		return nil
	}
	return s.Start(m)
}

// Close ends this side.
func (s *side) Close() error {
	if s == nil {
		return nil
	}
	var errs []error
	if s.Pair != nil {
		errs = append(errs, s.Pair.Close())
	}
	for _, c := range []io.Closer{s.arbiter, s.log} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// name is which side this is: a or b.
func (s *side) name() string { return s.keys.Side.String() }
