// Package scripted is an outside world that is a function of the guest's position: time
// advances by a fixed step at each exit, disks are memory and complete at the next exit,
// random bytes are a hash. A guest that runs on it does the same on every run, on any
// machine and at any speed, which makes it the ground that replay, save and restore and
// self-tests are proved on.
package scripted

import (
	"fmt"

	"github.com/zeebo/xxh3"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// World is both source and sink of one machine.
type World struct {
	// Step is how much virtual time passes from one exit to the next, in nanoseconds.
	Step int64
	// Disks hold the content of each disk.
	Disks []*Disk
	// Output, if set, gets the bytes of all consoles, and Frames every frame sent.
	Output func(console int, p []byte)
	Frames func(nic int, frame []byte)

	bell *vmm.Bell
	due  []vmm.Input // what completes at the next exit
	now  int64
}

// Disk is a disk in memory. As a backend it describes itself only: the World carries out the
// requests.
type Disk struct{ Data []byte }

// Info describes the disk.
func (d *Disk) Info() backend.DiskInfo {
	return backend.DiskInfo{Size: uint64(len(d.Data)), BlockSize: 512, Discard: true, ID: "scripted"}
}

// Submit is never called: the machine's sink is the World.
func (d *Disk) Submit(r *blk.Request, _ func(error)) {
	panic(fmt.Sprintf("scripted: request %d reached the backend", r.Tag))
}

// Close does nothing.
func (d *Disk) Close() error { return nil }

// Attach keeps the bell.
func (w *World) Attach(bell *vmm.Bell) { w.bell = bell }

// Take returns what was asked for at earlier exits, and the time where a timer is due.
func (w *World) Take(pos vmm.Position, next int64, buf []vmm.Input) []vmm.Input {
	if now := w.Sample(pos); next <= now {
		buf = append(buf, vmm.Input{Kind: vmm.InputTime, Time: now})
	}
	buf = append(buf, w.due...)
	w.due = w.due[:0]
	return buf
}

// Sample is the time at a position: steps for exits, and what HLTs have skipped.
func (w *World) Sample(pos vmm.Position) int64 {
	w.now = max(w.now, int64(pos.Exit)*w.Step)
	return w.now
}

// SetTime sets the time: a restored guest goes on where it was.
func (w *World) SetTime(t int64) { w.now = max(w.now, t) }

// Wait skips to the next timer; if there is none and nothing is due the guest sleeps until
// somebody rings.
func (w *World) Wait(_ vmm.Position, next int64) {
	switch {
	case len(w.due) > 0:
	case next != devices.Never:
		w.now = max(w.now, next)
	default:
		w.bell.Sleep(-1)
	}
}

// The rest of vmm.InputSource: nothing happens between positions.
func (w *World) Arm(int64)           {}
func (w *World) Applied([]vmm.Input) {}
func (w *World) Anywhere() bool      { return false }
func (w *World) EveryStop() bool     { return true }
func (w *World) Pause()              {}
func (w *World) Resume()             {}

// Disk carries the request out and lets it complete at the next exit.
func (w *World) Disk(device int, r *vmm.DiskRequest) {
	d := w.Disks[device].Data[r.Offset : r.Offset+r.Length]
	switch r.Op {
	case blk.Read:
		copy(r.Data, d)
	case blk.Write:
		copy(d, r.Data)
	case blk.Discard, blk.WriteZeroes:
		clear(d)
	}
	w.due = append(w.due, vmm.Input{Kind: vmm.InputDisk, Device: uint16(device), Tag: r.Tag})
}

// Frame passes a frame to Frames.
func (w *World) Frame(nic int, frame []byte) {
	if w.Frames != nil {
		w.Frames(nic, frame)
	}
}

// Offloads does nothing: no frames are received.
func (w *World) Offloads(int, vmm.Offloads) {}

// Console passes bytes to Output.
func (w *World) Console(console int, p []byte) {
	if w.Output != nil {
		w.Output(console, p)
	}
}

// Entropy answers with bytes that are a hash of the request.
func (w *World) Entropy(tag uint64, n int) {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(xxh3.HashSeed([]byte{byte(i), byte(i >> 8)}, tag))
	}
	w.due = append(w.due, vmm.Input{Kind: vmm.InputEntropy, Tag: tag, Data: b})
}
