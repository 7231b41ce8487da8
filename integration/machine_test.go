// Package integration tests the whole machine on real KVM, with test guests of ours
// (integration/guests) and with firmware and boot programs that nobody here wrote.
package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/lockstep/scripted"
	"github.com/ftvmm/ftvmm/vmm"
)

// guest returns a test guest's image.
func guest(t testing.TB, name string) []byte {
	b, err := os.ReadFile(filepath.Join("guests", "bin", name+".elf"))
	require.NoError(t, err)
	return b
}

// terminal is a console that keeps what the guest writes and can be waited on.
type terminal struct {
	mu      sync.Mutex
	changed sync.Cond
	out     bytes.Buffer
	deliver func(p []byte)
}

func newTerminal() *terminal {
	c := &terminal{}
	c.changed.L = &c.mu
	return c
}

func (c *terminal) Output(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out.Write(p)
	c.changed.Broadcast()
}

func (c *terminal) Start(deliver func(p []byte)) { c.deliver = deliver }

func (c *terminal) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.String()
}

// waitFor waits until the guest has written text after position from, and returns the position after it.
func (c *terminal) waitFor(t testing.TB, from int, text string, limit time.Duration) int {
	t.Helper()
	deadline := time.Now().Add(limit)
	stop := time.AfterFunc(limit, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changed.Broadcast()
	})
	defer stop.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if i := bytes.Index(c.out.Bytes()[from:], []byte(text)); i >= 0 {
			return from + i + len(text)
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %q within %v; the guest wrote:\n%s", text, limit, c.out.Bytes()[from:])
		}
		c.changed.Wait()
	}
}

// run runs a machine to its end within the limit.
func run(t testing.TB, m *vmm.Machine, limit time.Duration) vmm.Exit {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	e, err := m.Run(ctx)
	require.NoError(t, err)
	require.NotEqual(t, vmm.ExitQuit, e.Reason, "the guest did not end within %v", limit)
	return e
}

// trace is what a scripted run did: the digest of each exit by itself, and the console.
type trace struct {
	exits   []digest.Sum // index 0 is exit first
	records []string     // beside each digest, what it is about
	first   uint64
	console bytes.Buffer
}

func (tr *trace) observe(r *vmm.ExitRecord) {
	if tr.exits == nil {
		tr.first = r.Pos.Exit
	}
	var d digest.Digest
	d.Exit(r)
	// The items of one string instruction share an exit: fold them.
	if i := int(r.Pos.Exit - tr.first); i < len(tr.exits) {
		for j, b := range d.Sum() {
			tr.exits[i][j] ^= b
		}
		return
	}
	tr.exits = append(tr.exits, d.Sum())
	tr.records = append(tr.records, fmt.Sprintf("exit %v: kind %d at %#x, %d bytes %#x, registers %x", r.Pos, r.Kind, r.Addr, r.Size, r.Data, *r.Regs))
}

// requireSameExits fails at the first exit that is not the same in two traces, from the
// later of their beginnings on.
func requireSameExits(t testing.TB, a, b *trace) {
	t.Helper()
	from := max(a.first, b.first)
	ea, eb := a.exits[from-a.first:], b.exits[from-b.first:]
	ra, rb := a.records[from-a.first:], b.records[from-b.first:]
	for i := range min(len(ea), len(eb)) {
		if ea[i] != eb[i] {
			t.Fatalf("the runs part at exit %d:\n%s\n%s\nbefore that\n%s", from+uint64(i), ra[i], rb[i], ra[max(i-1, 0)])
		}
	}
	require.Equal(t, len(ea), len(eb), "exits")
}

// scriptedConfig is a machine in a scripted world, observed by tr.
func scriptedConfig(kernel []byte, cmdline string, disks [][]byte, tr *trace) vmm.Config {
	w := &scripted.World{Step: 20_000, Output: func(_ int, p []byte) { tr.console.Write(p) }}
	cfg := vmm.Config{
		Memory: 64 << 20, Kernel: kernel, Cmdline: cmdline, Serial: []vmm.Console{nil}, RNG: true,
		Epoch: time.Unix(1_700_000_000, 0), Observe: tr.observe, Source: w, Sink: w,
	}
	for _, d := range disks {
		disk := &scripted.Disk{Data: d}
		w.Disks = append(w.Disks, disk)
		cfg.Disks = append(cfg.Disks, vmm.Disk{Backend: disk})
	}
	return cfg
}
