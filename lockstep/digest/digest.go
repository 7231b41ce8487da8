// Package digest folds what a guest does into one number, so that two runs can be
// compared exit by exit.
//
// A [Digest] takes every synchronous exit of a machine (what it was, where, the data, the
// general registers) into a running XXH3-128 hash. Two machines that are in the same state and
// get the same inputs at the same positions have the same digest at every exit; the first exit
// at which digests differ is where they parted. The hash finds divergences, not forgers:
// both ends of it are ours, and the link between them is authenticated.
package digest

import (
	"encoding/binary"
	"fmt"

	"github.com/zeebo/xxh3"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/vmm"
)

// Sum is a digest's value.
type Sum [16]byte

// String returns the value in hexadecimal.
func (s Sum) String() string { return fmt.Sprintf("%x", s[:]) }

// Digest is a running hash. The zero value is the digest of no exits.
type Digest struct {
	sum xxh3.Uint128
	buf [8 * 24]byte
}

// rflagsRF is the resume flag: the one bit of RFLAGS that a host may set or clear between
// two equal runs (docs/kvm.md).
const rflagsRF = 1 << 16

// Exit folds one record in. Its signature is that of vmm.Config.Observe.
func (d *Digest) Exit(r *vmm.ExitRecord) {
	b := d.buf[:0]
	b = binary.LittleEndian.AppendUint64(b, d.sum.Lo)
	b = binary.LittleEndian.AppendUint64(b, d.sum.Hi)
	b = binary.LittleEndian.AppendUint64(b, r.Pos.Exit)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Kind)|uint64(r.Size)<<8)
	b = binary.LittleEndian.AppendUint64(b, r.Addr)
	b = binary.LittleEndian.AppendUint64(b, r.Data)
	g := r.Regs
	for _, v := range [...]uint64{
		g.RAX, g.RBX, g.RCX, g.RDX, g.RSI, g.RDI, g.RSP, g.RBP,
		g.R8, g.R9, g.R10, g.R11, g.R12, g.R13, g.R14, g.R15, g.RIP, g.RFLAGS &^ rflagsRF,
	} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	d.sum = xxh3.Hash128(b)
}

// Sum returns the digest of all exits so far.
func (d *Digest) Sum() Sum { return d.sum.Bytes() }

// What is folded in beside exits, so that equal bytes of different meaning differ.
const (
	foldDisk = iota + 1
	foldRead
	foldFrame
	foldConsole
	foldEntropy
)

func (d *Digest) fold(what, device, a, b, c uint64, data []byte) {
	p := d.buf[:0]
	h := xxh3.Hash128(data)
	for _, v := range [...]uint64{d.sum.Lo, d.sum.Hi, what << 56, device, a, b, c, uint64(len(data)), h.Lo, h.Hi} {
		p = binary.LittleEndian.AppendUint64(p, v)
	}
	d.sum = xxh3.Hash128(p)
}

// Disk folds in a request that the guest has made, with the data that it writes.
func (d *Digest) Disk(device int, r *vmm.DiskRequest) {
	var data []byte
	if r.Op == blk.Write {
		data = r.Data
	}
	how := uint64(r.Op)
	if r.Unmap {
		how |= 1 << 8
	}
	d.fold(foldDisk, uint64(device), r.Tag<<16|how, r.Offset, r.Length, data)
}

// Read folds in the completion of a request: its status, and the data that it has read.
func (d *Digest) Read(device int, tag uint64, status uint8, data []byte) {
	d.fold(foldRead, uint64(device), tag, uint64(status), 0, data)
}

// Frame folds in a frame that the guest sends.
func (d *Digest) Frame(nic int, frame []byte) { d.fold(foldFrame, uint64(nic), 0, 0, 0, frame) }

// Console folds in bytes that the guest writes to a console.
func (d *Digest) Console(console int, p []byte) { d.fold(foldConsole, uint64(console), 0, 0, 0, p) }

// Entropy folds in a request for random bytes.
func (d *Digest) Entropy(tag uint64, n int) { d.fold(foldEntropy, 0, tag, uint64(n), 0, nil) }
