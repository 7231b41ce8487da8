package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/ftvmm/ftvmm/tools/bench/plot"
)

// drawPlots draws the distributions that there are samples of into dir.
func drawPlots(dir string, results []result) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, p := range plots {
		series, unit := plotSeries(p.name, results)
		if len(series) == 0 {
			continue
		}
		var b bytes.Buffer
		if err := plot.CDF(&b, p.title, unit, series); err != nil {
			return fmt.Errorf("draw %q: %w", p.name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, p.name+".svg"), b.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// plotSeries returns the distributions of one picture and their unit. Figures whose series have the same name
// are one distribution.
func plotSeries(name string, results []result) (series []plot.Series, unit string) {
	for i := range results {
		r := &results[i]
		if r.plot != name {
			continue
		}
		unit = r.unit // the same in all figures of a picture
		for _, of := range []struct {
			program string
			samples []float64
		}{{"ftvmm", r.ours}, {"QEMU", r.qemu}} {
			if len(of.samples) == 0 {
				continue
			}
			name := of.program + " " + r.series
			at := slices.IndexFunc(series, func(s plot.Series) bool { return s.Name == name })
			if at < 0 {
				at, series = len(series), append(series, plot.Series{Name: name})
			}
			series[at].Samples = append(series[at].Samples, scaled(of.samples, r.scale)...)
		}
	}
	return series, unit
}
