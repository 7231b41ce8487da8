package net

import (
	"encoding/binary"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// backlog is a ring of frames; their buffers are used again.
type backlog struct {
	frames   [MaxBacklog][]byte
	first, n int
}

func (b *backlog) clear() { b.first, b.n = 0, 0 }

// at returns the i-th frame.
func (b *backlog) at(i int) []byte { return b.frames[(b.first+i)%MaxBacklog] }

// push keeps a copy of the frame; there must be room.
func (b *backlog) push(frame []byte) {
	slot := &b.frames[(b.first+b.n)%MaxBacklog]
	*slot = append((*slot)[:0], frame...)
	b.n++
}

func (b *backlog) pop() {
	b.first = (b.first + 1) % MaxBacklog
	b.n--
}

// Room returns how many frames Receive can still keep if the driver has no buffers.
func (d *Device) Room() int { return MaxBacklog - d.backlog.n }

// Receive is an input: a frame from the network, header first. It returns whether the
// frame was delivered to the driver or kept until the driver has buffers; false means
// that it was dropped. The frame is the caller's again afterwards.
func (d *Device) Receive(frame []byte) bool {
	switch {
	case len(frame) < HeaderSize+ethernetHeader || len(frame) > MaxFrame,
		!d.t.Running(), !d.linkUp(), d.backlog.n == MaxBacklog:
		d.counters.RxDropped++
		return false
	case !d.wanted(MAC(frame[HeaderSize:])):
		d.counters.RxFiltered++
		return false
	}
	if d.backlog.n > 0 {
		d.backlog.push(frame)
		return true
	}
	switch d.deliver(frame) {
	case noRoom:
		d.backlog.push(frame)
	case unfit:
		d.counters.RxDropped++
		return false
	}
	d.t.Queue(queueRx).Interrupt()
	return true
}

// drain delivers what the driver has buffers for by now.
func (d *Device) drain() {
	for d.backlog.n > 0 {
		switch d.deliver(d.backlog.at(0)) {
		case noRoom:
			d.t.Queue(queueRx).Interrupt()
			return
		case unfit:
			d.counters.RxDropped++
		}
		d.backlog.pop()
	}
	d.t.Queue(queueRx).Interrupt()
}

// wanted applies the driver's filter to a destination address.
func (d *Device) wanted(to MAC) bool {
	f := &d.filter
	switch {
	case to == broadcast:
		return !f.noBroadcast
	case to.multicast():
		return !f.noMulticast && (f.promiscuous || f.allMulticast || f.tooManyMulticast || contains(f.multicast, to))
	default:
		return !f.noUnicast && (f.promiscuous || f.allUnicast || f.tooManyUnicast || to == d.mac() || contains(f.unicast, to))
	}
}

func contains(list []MAC, m MAC) bool {
	for _, have := range list {
		if have == m {
			return true
		}
	}
	return false
}

// outcome is what became of a frame.
type outcome uint8

const (
	delivered outcome = iota
	noRoom            // the driver has too few buffers for now
	unfit             // the driver will never take it
)

// deliver copies a frame into the driver's buffers.
func (d *Device) deliver(frame []byte) outcome {
	var header [HeaderSize]byte
	copy(header[:], frame)
	ecn, on := d.offloads&featureGuestECN != 0, d.rxOffloads()
	allowed := gsoAllowed{on&RxChecksum != 0, on&RxTSO4 != 0, on&RxTSO6 != 0, ecn}
	if !allowed.header(header[:], len(frame)-HeaderSize) {
		return unfit
	}
	if !allowed.checksum {
		header[headerFlags] &^= flagDataValid
	}
	size := d.headerSize()
	body := frame[HeaderSize:]
	q := d.t.Queue(queueRx)
	if !d.t.Has(featureMergeable) {
		if !q.Next(&d.first) {
			return noRoom
		}
		if d.first.InLen < uint64(size+len(body)) {
			q.Rewind(1)
			return unfit
		}
		binary.LittleEndian.PutUint16(header[headerBuffers:], 1)
		q.Write(d.first.In, 0, header[:size])
		q.Write(d.first.In, uint64(size), body)
		q.Push(d.first.Head, uint32(size+len(body)))
		return delivered
	}
	return d.merge(q, header[:], body)
}

// merge spreads a frame over as many chains as it takes (5.1.6.4). The header goes into
// the first, with their number, last.
func (d *Device) merge(q *virtio.Queue, header, body []byte) outcome {
	var room uint64 // for the body, in the first chain
	for n := 0; ; n++ {
		c := &d.chain
		if n == 0 {
			c = &d.first
		}
		if !q.Next(c) {
			q.Rewind(n)
			if n == q.Size() { // all of the queue is not enough: waiting will not change that
				return unfit
			}
			return noRoom
		}
		var written int
		switch {
		case n > 0:
			written = q.Write(c.In, 0, body)
		case c.InLen < HeaderSize: // 5.1.6.3.1
			d.t.Fail()
			return unfit
		default:
			room = c.InLen - HeaderSize
			written = q.Write(c.In, HeaderSize, body[:min(room, uint64(len(body)))])
		}
		body = body[written:]
		if n == 0 {
			written += HeaderSize
		}
		q.Fill(c.Head, uint32(written))
		if len(body) == 0 {
			binary.LittleEndian.PutUint16(header[headerBuffers:], uint16(n+1))
			q.Write(d.first.In, 0, header)
			q.Publish()
			return delivered
		}
	}
}
