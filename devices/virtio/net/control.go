package net

import (
	"encoding/binary"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// Commands of the control queue (virtio 1.2, 5.1.6.5): class and command, then data, and a
// byte for the answer.
const (
	controlHeader = 2
	controlMax    = controlHeader + 8 // the longest command but for MAC tables

	classRx         = 0
	rxPromiscuous   = 0
	rxAllMulticast  = 1
	rxAllUnicast    = 2
	rxNoMulticast   = 3
	rxNoUnicast     = 4
	rxNoBroadcast   = 5
	classMAC        = 1
	macTableSet     = 0
	macAddressSet   = 1
	classAnnounce   = 3
	announceAck     = 0
	classOffloads   = 5
	offloadsSet     = 0
	controlOK       = 0
	controlError    = 1
	tableHeaderSize = 4 // the number of addresses that follow
)

// command carries out what is in the control queue.
func (d *Device) command() {
	q := d.t.Queue(queueControl)
	for q.Next(&d.chain) {
		answer := byte(controlError)
		if d.t.Has(featureControl) && d.execute(q, &d.chain) {
			answer = controlOK
		}
		d.control[0] = answer
		written := q.Write(d.chain.In, 0, d.control[:1])
		q.Push(d.chain.Head, uint32(written))
	}
	q.Interrupt()
}

// execute carries out one command, wholly or not at all.
func (d *Device) execute(q *virtio.Queue, c *virtio.Chain) bool {
	n := q.Read(c.Out, 0, d.control[:])
	if n < controlHeader || c.InLen < 1 {
		return false
	}
	class, command, data := d.control[0], d.control[1], d.control[controlHeader:n]
	exact := func(size uint64) bool { return c.OutLen == controlHeader+size }
	switch {
	case class == classRx && exact(1):
		return d.setMode(command, data[0] != 0)
	case class == classMAC && command == macAddressSet && exact(addressSize) && d.t.Has(featureControlMAC):
		d.setMAC(MAC(data))
		return true
	case class == classMAC && command == macTableSet && d.t.Has(featureControlRx):
		return d.setTables(q, c)
	case class == classAnnounce && command == announceAck && exact(0) && d.t.Has(featureAnnounce):
		d.setStatus(d.status() &^ statusAnnounce)
		return true
	case class == classOffloads && command == offloadsSet && exact(8) && d.t.Has(featureGuestOffloads):
		f := binary.LittleEndian.Uint64(data)
		if f&^guestOffloads != 0 || !d.t.Has(f) {
			return false // 5.1.6.5.6.1: only what was negotiated
		}
		d.setOffloads(f)
		return true
	}
	return false
}

// setMode switches one of the modes of reception.
func (d *Device) setMode(command byte, on bool) bool {
	f := &d.filter
	modes := [...]*bool{
		rxPromiscuous: &f.promiscuous, rxAllMulticast: &f.allMulticast, rxAllUnicast: &f.allUnicast,
		rxNoMulticast: &f.noMulticast, rxNoUnicast: &f.noUnicast, rxNoBroadcast: &f.noBroadcast,
	}
	needs := featureControlRx
	if command > rxAllMulticast {
		needs = featureControlRxMore
	}
	if int(command) >= len(modes) || !d.t.Has(needs) {
		return false
	}
	*modes[command] = on
	return true
}

// setTables takes the two tables of the filter: unicast, then multicast addresses.
func (d *Device) setTables(q *virtio.Queue, c *virtio.Chain) bool {
	offsets, counts := [2]uint64{}, [2]uint64{}
	at := uint64(controlHeader)
	for i := range counts {
		p := d.control[:tableHeaderSize]
		if q.Read(c.Out, at, p) < len(p) {
			return false
		}
		offsets[i], counts[i] = at+tableHeaderSize, uint64(binary.LittleEndian.Uint32(p))
		at = offsets[i] + counts[i]*addressSize
		if at > c.OutLen {
			return false
		}
	}
	if at != c.OutLen {
		return false
	}
	f := &d.filter
	for i, list := range [...]*[]MAC{&f.unicast, &f.multicast} {
		*list = (*list)[:0]
		if counts[i] > MaxFilter {
			continue
		}
		for n := range counts[i] {
			p := d.control[:addressSize]
			q.Read(c.Out, offsets[i]+n*addressSize, p)
			*list = append(*list, MAC(p))
		}
	}
	f.tooManyUnicast, f.tooManyMulticast = counts[0] > MaxFilter, counts[1] > MaxFilter
	return true
}
