package main

import (
	"github.com/spf13/cobra"

	"github.com/ftvmm/ftvmm/vmm/config"
	"github.com/ftvmm/ftvmm/vmm/control"
)

func (a *app) configCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "config",
		Short: "show and check the configuration of a guest",
		Args:  noSuchCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(a.configShow(), a.configCheck())
	return c
}

type configDocument struct {
	control.Meta
	Guest   *config.Guest  `json:"guest"`
	Origins config.Origins `json:"origins,omitempty"`
}

func (a *app) configShow() *cobra.Command {
	var effective, origin bool
	c := &cobra.Command{
		Use:   "show [FILE]",
		Short: "print the settings of a guest as run would take them",
		Long: `Print the settings that ftvmm run would take from the file, the environment
(FTVMM_MEMORY and so on) and the flags, as TOML that can be used as a file.
Without --effective those that nobody set are left out.`,
		Args: a.arguments(0, 1),
	}
	s := addSettings(c)
	c.Flags().BoolVar(&effective, "effective", false, "also print the settings that have their default")
	c.Flags().BoolVar(&origin, "origin", false, "also say where each setting comes from")
	c.RunE = func(_ *cobra.Command, args []string) error {
		g, origins, err := s.load(args)
		if err != nil {
			return err
		}
		if !a.json {
			return g.Show(a.out, origins, effective, origin)
		}
		doc := configDocument{control.NewMeta("Guest"), g, nil}
		if origin {
			doc.Origins = origins
		}
		return a.document(doc)
	}
	return c
}

func (a *app) configCheck() *cobra.Command {
	var skipFiles bool
	c := &cobra.Command{
		Use:   "check [FILE]",
		Short: "find out whether a guest could be run",
		Args:  a.arguments(0, 1),
	}
	s := addSettings(c)
	c.Flags().BoolVar(&skipFiles, "skip-files", false, "do not look for kernels and images: the guest is for another host")
	c.RunE = func(_ *cobra.Command, args []string) error {
		g, _, err := s.load(args)
		if err != nil {
			return err
		}
		how := checks()
		how.SkipFiles = skipFiles
		if err := g.Check(how); err != nil {
			return err
		}
		if a.json {
			return a.document(configDocument{control.NewMeta("Guest"), g, nil})
		}
		a.note("the configuration is good")
		return nil
	}
	return c
}
