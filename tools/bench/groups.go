package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Units of samples: seconds, bytes and events a second are scaled for the table.
const (
	perMilli = 1e-3
	perMicro = 1e-6
	perKiB   = 1 << 10
	perMB    = 1e6
	perCent  = 0.01
)

// groups are all measurements, in the order of the table.
var groups = append([]group{
	{
		figures: []figure{{name: "start", what: "process start to end, with a guest that ends at once", unit: "ms", scale: perMilli, target: 0.25}},
		measure: measureStart,
	},
	exits("pio", 0, 1.05), exits("pio", 3, 1), exits("mmio", 0, 1.05), exits("mmio", 3, 1),
	blocks("read", 1, 2000), blocks("write", 1, 2000), blocks("read", 32, 10000), blocks("write", 32, 10000),
	{
		figures: []figure{
			{name: "net-udp", what: "UDP echo, one at a time", unit: "req/s", scale: 1, target: 1, more: true},
			{name: "net-tcp", what: "TCP echo, one at a time", unit: "req/s", scale: 1, target: 1, more: true},
			{name: "net-in", what: "TCP into the guest", unit: "MB/s", scale: perMB, target: 1, more: true},
			{name: "net-out", what: "TCP out of the guest", unit: "MB/s", scale: perMB, target: 1, more: true},
		},
		measure: measureNetwork,
	},
	{
		figures: []figure{{name: "memory", what: "resident beyond the guest's RAM", unit: "KiB", scale: perKiB, target: 1}},
		measure: measureMemory,
	},
	{
		figures: []figure{{name: "seabios", what: "process start to SeaBIOS finding nothing to boot", unit: "s", scale: 1, target: 1}},
		slow:    true,
		measure: measureSeaBIOS,
	},
	{
		figures: []figure{{name: "grub", what: "process start to GRUB's prompt", unit: "s", scale: 1, target: 1}},
		slow:    true,
		measure: measureGRUB,
	},
	{
		figures: []figure{
			{name: "loop", what: "our own time for an exit, outside KVM_RUN", unit: "us", scale: perMicro, target: 0.5, absolute: true},
			{name: "loop-allocs", what: "allocations for an exit", unit: "", scale: 1, target: 0, absolute: true},
		},
		measure: measureLoop,
	},
	colo(overTCP, 500), colo(overTCP, 100), colo(overTCP, 20), colo(overUNIX, 500), colo(overUNIX, 100), colo(overUNIX, 20),
	migrate(64), migrate(256), migrate(1024),
}, lockstepGroups()...)

// plots are the pictures that -svg draws, of all samples of the figures that name them.
var plots = []struct{ name, title string }{
	{"pauses", "How long a guest stands still while it is protected"},
	{"takeover", "How long nothing comes from a guest that goes on elsewhere"},
	{"delay", "From a request to its answer"},
}

func measureStart(ctx context.Context, b *bench, v vm) ([]float64, error) {
	if _, err := b.guestFile("first"); err != nil {
		return nil, err
	}
	begun := time.Now()
	m, err := b.startGuest(ctx, v, "first", guest{})
	if err != nil {
		return nil, err
	}
	err = m.wait()
	return []float64{time.Since(begun).Seconds()}, err
}

// exitsMeasured is how many exits one sample averages.
const exitsMeasured = 20_000

// exits measures the time of one exit of the storm guest: from the line that says that the loop
// begins to the first byte of the one that says that it has ended.
func exits(mode string, cpl int, target float64) group {
	return group{
		figures: []figure{{
			name: fmt.Sprintf("exit-%s-cpl%d", mode, cpl), what: fmt.Sprintf("one %s exit from CPL %d", mode, cpl),
			unit: "us", scale: perMicro, target: target,
		}},
		measure: func(ctx context.Context, b *bench, v vm) ([]float64, error) {
			m, err := b.startGuest(ctx, v, "storm", guest{append: fmt.Sprintf("mode=%s cpl=%d n=%d", mode, cpl, exitsMeasured)})
			if err != nil {
				return nil, err
			}
			took, err := m.between("# storm "+mode+"\n", "ok "+mode)
			if err = errors.Join(err, m.wait()); err != nil {
				return nil, err
			}
			return []float64{took.Seconds() / exitsMeasured}, nil
		},
	}
}

// between returns the time from the last byte of one text to the first byte of another.
func (m *machine) between(from, to string) (time.Duration, error) {
	_, begun, err := m.when(from)
	if err != nil {
		return 0, err
	}
	ended, _, err := m.when(to)
	if err != nil {
		return 0, err
	}
	return ended.Sub(begun), nil
}
