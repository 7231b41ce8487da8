package main

import (
	"errors"
	"os"
	"path"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/mirror/nic"
	"github.com/ftvmm/ftvmm/vmm/config"
)

// settings are the flags that describe a guest, made from the table of package config.
type settings struct {
	flags *pflag.FlagSet
	lists map[string]*[]string
}

// addSettings adds a flag for every setting to cmd.
func addSettings(cmd *cobra.Command) *settings {
	s := &settings{flags: cmd.Flags(), lists: map[string]*[]string{}}
	for _, k := range config.Keys() {
		switch {
		case k.List:
			s.lists[k.Name] = s.flags.StringArray(k.Flag(), nil, k.Doc)
		case k.Bool:
			// A text flag, so that the value is checked and explained in one place for all sources.
			s.flags.String(k.Flag(), "", k.Doc)
			s.flags.Lookup(k.Flag()).NoOptDefVal = "true"
		default:
			s.flags.String(k.Flag(), "", k.Doc)
		}
	}
	return s
}

// load merges the file that args may name with the environment and the flags.
func (s *settings) load(args []string) (*config.Guest, config.Origins, error) {
	src := config.Sources{LookupEnv: os.LookupEnv, Flags: map[string][]string{}, File: os.Getenv("FTVMM_CONFIG")}
	if len(args) > 0 {
		src.File = args[0]
	}
	for _, k := range config.Keys() {
		f := s.flags.Lookup(k.Flag())
		if !f.Changed {
			continue
		}
		if k.List {
			src.Flags[k.Name] = *s.lists[k.Name]
		} else {
			src.Flags[k.Name] = []string{f.Value.String()}
		}
	}
	return config.Load(src)
}

// checks is what the configuration is checked against in this program.
func checks() config.Checks {
	names := guests.Names()
	for _, n := range names {
		if base, ok := strings.CutSuffix(n, ".elf"); ok {
			names = append(names, base)
		}
	}
	// Boot sectors are no kernels.
	var kernels []string
	for _, n := range names {
		if path.Ext(n) != ".bin" {
			kernels = append(kernels, n)
		}
	}
	return config.Checks{Guests: kernels, NIC: checkNIC}
}

func checkNIC(spec string) error {
	_, err := nic.ParseNIC(spec)
	var e *mirror.Error
	if errors.As(err, &e) {
		return &config.Error{Code: config.Code(e.Reason), Message: e.Error(), Remedy: e.Remedy}
	}
	return err
}
