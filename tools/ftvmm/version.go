package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/ftvmm/ftvmm/vmm/control"
)

type versionDocument struct {
	control.Meta
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	// Modules are the versions of what is built in.
	Modules map[string]string `json:"modules"`
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "print the version",
		Args:  a.arguments(0, 0),
		RunE: func(*cobra.Command, []string) error {
			doc := versionDocument{control.NewMeta("Version"), version, runtime.Version(), runtime.GOOS, runtime.GOARCH, map[string]string{}}
			if !a.json {
				fmt.Fprintf(a.out, "ftvmm %s (%s, %s/%s)\n", doc.Version, doc.Go, doc.OS, doc.Arch)
				return nil
			}
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, m := range info.Deps {
					doc.Modules[m.Path] = m.Version
				}
			}
			return a.document(doc)
		},
	}
}
