package main

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
)

// loopBenchmark matches the lines of the benchmark of the vCPU loop.
var loopBenchmark = regexp.MustCompile(`(?m)^BenchmarkExit/(\S+)\s+\d+\s+([\d.]+) ns/op.*?(\d+) allocs/op`)

// loopTime is how long each kind of exit is measured.
const loopTime = "200ms"

// measureLoop runs the Go benchmark of the vCPU loop, and returns the slowest kind of exit and
// the most allocations.
func measureLoop(ctx context.Context, b *bench, _ vm) ([]float64, error) {
	c := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkExit$", "-benchtime", loopTime, "-benchmem", "./vmm")
	c.Dir = b.root
	out, err := c.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%v: %w\n%s", c.Args, err, out)
	}
	return parseLoop(out)
}

func parseLoop(out []byte) ([]float64, error) {
	var slowest, most float64
	lines := loopBenchmark.FindAllSubmatch(out, -1)
	for _, l := range lines {
		ns, err := strconv.ParseFloat(string(l[2]), 64)
		if err != nil {
			return nil, err
		}
		allocs, err := strconv.ParseFloat(string(l[3]), 64)
		if err != nil {
			return nil, err
		}
		slowest, most = max(slowest, ns/1e9), max(most, allocs)
	}
	if len(lines) == 0 {
		return nil, fmt.Errorf("no benchmark of the loop in:\n%s", out)
	}
	return []float64{slowest, most}, nil
}
