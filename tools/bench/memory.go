package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
)

// measureMemory adds up what the process holds in memory (Rss, shared pages included) in all
// mappings but the guest's RAM. The guest waits meanwhile, so that start-up is over.
func measureMemory(ctx context.Context, b *bench, v vm) ([]float64, error) {
	m, err := b.startGuest(ctx, v, "acpi", guest{append: "wait=power off"})
	if err != nil {
		return nil, err
	}
	defer m.kill()
	if _, _, err := m.when("waiting for the power button"); err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", m.cmd.Process.Pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := residentBeyond(f, memoryMiB<<20)
	return []float64{float64(n)}, err
}

// residentBeyond adds up Rss over the mappings in smaps (proc(5)), in bytes. Guest RAM is what
// has three quarters of its size or more: the smaller pieces that it may be made of, such as
// ftvmm's first 640 KiB, count as the program's own.
func residentBeyond(smaps io.Reader, ram uint64) (uint64, error) {
	var total, ours, size uint64
	s := bufio.NewScanner(smaps)
	for s.Scan() {
		name, value, ok := strings.Cut(s.Text(), ":")
		if !ok || strings.Contains(name, " ") {
			continue // the header of a mapping
		}
		var kib uint64
		if _, err := fmt.Sscanf(value, "%d kB", &kib); err != nil {
			continue
		}
		switch name {
		case "Size":
			size = kib << 10
		case "Rss":
			if size >= ram/4*3 && kib > 0 {
				ours += kib << 10
			} else {
				total += kib << 10
			}
		}
	}
	if err := s.Err(); err != nil {
		return 0, err
	}
	if ours == 0 {
		return 0, fmt.Errorf("no mapping of nearly %d bytes: the guest's RAM cannot be told from the rest", ram)
	}
	return total, nil
}
