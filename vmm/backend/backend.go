// Package backend defines what a machine asks of the outside world: disks, networks and
// consoles. Implementations live in mirror (disks, network cards) and in the command
// (consoles); they run in goroutines of their own and never touch guest memory or a device:
// they exchange buffers with the vCPU loop, which alone decides at which position an
// input reaches the guest.
package backend

import (
	"sync"

	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
)

// DiskInfo describes a disk.
type DiskInfo struct {
	Size      uint64 // bytes, a multiple of 512
	BlockSize uint32 // the unit of efficient I/O in bytes, a power of two from 512 on
	ReadOnly  bool
	Discard   bool   // Discard and WriteZeroes deallocate
	ID        string // up to 20 bytes, what VIRTIO_BLK_T_GET_ID answers
}

// Disk is a block store.
type Disk interface {
	Info() DiskInfo
	// Submit starts r and returns at once. done is called exactly once, from any goroutine
	// but not from within Submit; until then r and r.Data belong to the disk. A non-nil
	// error means that the operation failed as a whole or in part. Requests in flight together may
	// be carried out in any order; the caller serialises those that overlap.
	Submit(r *blk.Request, done func(err error))
	// Close waits for what is in flight, makes all writes durable and lets go of the image.
	Close() error
}

// NIC is one end of a network.
type NIC interface {
	// Offloads returns what this network can do.
	Offloads() net.Offloads
	// SetOffloads sets which Rx offloads may be used from now on.
	SetOffloads(o net.Offloads)
	// Start begins reception: deliver is called from one goroutine with a frame in a buffer
	// from GetFrame, which it takes over; it blocks while the guest's queue is full. link is called when
	// the carrier changes. Start is called once; before it nothing is delivered.
	Start(deliver func(frame []byte), link func(up bool))
	// Transmit sends one frame, virtio header first. The buffer is the caller's again when it returns.
	// It must not block for long: a network that cannot keep up drops, as a wire does.
	Transmit(frame []byte)
	// Close ends reception; deliver is not called after it returns.
	Close() error
}

const smallFrame = net.HeaderSize + 2048

var (
	small = sync.Pool{New: func() any { b := make([]byte, smallFrame); return &b }}
	large = sync.Pool{New: func() any { b := make([]byte, net.MaxFrame); return &b }}
)

// GetFrame returns a buffer of n bytes, n at most [net.MaxFrame], from a pool.
func GetFrame(n int) []byte {
	if n <= smallFrame {
		return (*small.Get().(*[]byte))[:n]
	}
	return (*large.Get().(*[]byte))[:n]
}

// PutFrame returns a buffer that GetFrame made to its pool.
func PutFrame(b []byte) {
	switch b = b[:cap(b)]; len(b) {
	case smallFrame:
		small.Put(&b)
	case net.MaxFrame:
		large.Put(&b)
	}
}
