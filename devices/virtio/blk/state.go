package blk

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// State is the saved form of a [Device] with its transport.
type State struct {
	Transport virtio.State
	NextTag   uint64
	Writeback bool // the cache mode that the driver has set
	Requests  []RequestState
}

// RequestState is a request of the driver that is not complete. States hold them in
// order of arrival.
type RequestState struct {
	Queue, Head    uint16
	Out, In        []virtio.Segment // the buffers of the chain; none for an orphan
	Op             Op
	Offset, Length uint64 // bytes
	Done           uint64 // bytes that are complete
	Unmap          bool
	Orphan         bool   // the driver has reset the device since
	Tag            uint64 // of the part that the backend has; 0 while the request is held back
	Part           uint64 // length of that part in bytes
	Flushing       bool   // that part is the flush after a write
	Data           []byte // what that part writes
}

// Save returns the state of disk and transport, with the data of all writes in flight.
func (d *Device) Save() State {
	s := State{
		Transport: d.t.Save(),
		NextTag:   d.nextTag,
		Writeback: d.config[configWriteback] != 0,
		Requests:  make([]RequestState, 0, len(d.table)),
	}
	for _, r := range d.table {
		rs := RequestState{
			Queue: uint16(r.queue), Head: r.chain.Head,
			Op: r.op, Offset: r.offset, Length: r.length, Done: r.done, Unmap: r.unmap, Orphan: r.orphan,
			Tag: r.part.Tag, Part: r.part.Length, Flushing: r.part.Op != r.op && !r.held(),
		}
		if !r.orphan {
			rs.Out = append(rs.Out, r.chain.Out...)
			rs.In = append(rs.In, r.chain.In...)
		}
		if r.part.Op == Write {
			rs.Data = append(rs.Data, r.part.Data...)
		}
		s.Requests = append(s.Requests, rs)
	}
	return s
}

// check refuses what the device could not have saved.
func (d *Device) check(s State) error {
	if s.NextTag == 0 || len(s.Requests) > d.limit || len(s.Transport.Queues) != d.cfg.Queues {
		return fmt.Errorf("blk: saved next tag %d, %d requests, %d queues", s.NextTag, len(s.Requests), len(s.Transport.Queues))
	}
	var inUse [MaxQueues]int
	var bytes uint64
	tags := make(map[uint64]bool, len(s.Requests))
	for i, r := range s.Requests {
		if err := d.checkRequest(r); err != nil {
			return fmt.Errorf("blk: saved request %d: %w", i, err)
		}
		if r.Tag != 0 && (r.Tag >= s.NextTag || tags[r.Tag]) {
			return fmt.Errorf("blk: saved request %d has tag %d of %d", i, r.Tag, s.NextTag)
		}
		tags[r.Tag] = true
		if !r.Orphan {
			inUse[r.Queue]++
		}
		if r.Tag != 0 && r.Op.moves() {
			bytes += minBuffer << class(min(r.Length, MaxTransfer))
		}
	}
	for i, q := range s.Transport.Queues {
		// A completion that found the queue dead has left its chain in use.
		if inUse[i] > int(q.InUse) {
			return fmt.Errorf("blk: saved queue %d has %d chains in use and %d requests", i, q.InUse, inUse[i])
		}
	}
	if bytes > MaxInFlight+MaxTransfer {
		return fmt.Errorf("blk: saved requests hold %d bytes", bytes)
	}
	return nil
}

func (d *Device) checkRequest(r RequestState) error {
	if int(r.Queue) >= d.cfg.Queues {
		return fmt.Errorf("queue %d", r.Queue)
	}
	if err := d.t.Queue(int(r.Queue)).CheckSegments(r.Head, r.Out, r.In); err != nil {
		return err
	}
	var c virtio.Chain
	c.Set(r.Head, r.Out, r.In)
	switch {
	case r.Op > WriteZeroes, d.cfg.ReadOnly && r.Op.modifies(), (r.Op == Flush) != (r.Length == 0),
		r.Length%SectorSize != 0, r.Offset%SectorSize != 0, r.Length > d.cfg.Capacity, r.Offset > d.cfg.Capacity-r.Length,
		r.Done%SectorSize != 0, r.Done > r.Length:
		return fmt.Errorf("operation %d on %#x+%#x, %#x done", r.Op, r.Offset, r.Length, r.Done)
	case r.Orphan && r.Tag == 0, r.Orphan && len(r.Out)+len(r.In) > 0,
		!r.Orphan && (c.InLen < statusSize || c.OutLen < headerSize),
		!r.Orphan && r.Op == Read && c.InLen != r.Length+statusSize,
		!r.Orphan && r.Op == Write && c.OutLen != r.Length+headerSize:
		return fmt.Errorf("operation %d on %#x bytes in buffers of %#x and %#x", r.Op, r.Length, c.OutLen, c.InLen)
	}
	part, data := r.Length-r.Done, uint64(0)
	switch {
	case r.Tag == 0 && r.Done != 0, r.Flushing && (!r.Op.modifies() || r.Tag == 0 || part != 0),
		!r.Flushing && part == 0 && r.Op != Flush:
		return fmt.Errorf("%#x of %#x bytes done, tag %d, flushing %t", r.Done, r.Length, r.Tag, r.Flushing)
	case r.Tag == 0:
		part = 0
	case r.Op.moves():
		part = min(part, MaxTransfer)
		if r.Op == Write {
			data = part
		}
	}
	if r.Part != part || uint64(len(r.Data)) != data {
		return fmt.Errorf("part of %#x bytes with %#x bytes of data, want %#x and %#x", r.Part, len(r.Data), part, data)
	}
	return nil
}

// Restore sets the state of disk and transport, or none of it. It submits nothing: see
// Reissue. What the backend had before must have been completed, or its completions
// must be kept away from the device.
func (d *Device) Restore(s State) error {
	if err := d.check(s); err != nil {
		return err
	}
	if err := d.t.Restore(s.Transport); err != nil {
		return fmt.Errorf("blk: %w", err)
	}
	// What a backend may still have is not used again, nor is it touched.
	clear(d.table)
	d.table, d.held, d.bytes = d.table[:0], 0, 0
	d.nextTag = s.NextTag
	d.config[configWriteback] = 0
	if s.Writeback {
		d.config[configWriteback] = 1
	}
	for _, rs := range s.Requests {
		r := d.take()
		r.queue, r.op, r.offset, r.length, r.done = int(rs.Queue), rs.Op, rs.Offset, rs.Length, rs.Done
		r.unmap, r.orphan = rs.Unmap, rs.Orphan
		r.chain.Set(rs.Head, rs.Out, rs.In)
		d.table = append(d.table, r)
		switch {
		case rs.Tag == 0:
			d.held++
			continue
		case rs.Flushing:
			r.part = Request{Tag: rs.Tag, Op: Flush}
		default:
			r.part = Request{Tag: rs.Tag, Op: r.op, Offset: r.offset + r.done, Length: rs.Part, Unmap: r.unmap}
		}
		if r.op.moves() {
			d.lend(r, min(r.length, MaxTransfer))
			if !rs.Flushing {
				r.part.Data = r.buffer[:rs.Part]
				copy(r.part.Data, rs.Data)
			}
		}
	}
	return nil
}

// Reset puts the disk with its transport into the power-on state. Tags go on, and
// requests that the backend has stay its own, as with a reset by the driver.
func (d *Device) Reset() { d.t.Reset() }
