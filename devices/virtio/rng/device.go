package rng

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// MaxEntropy bounds one question, in bytes; what a driver asks beyond is not filled.
const MaxEntropy = 1024

// Identity (virtio 1.2, 5.4.1; PCI class "other") and queue (5.4.2).
const (
	deviceType = 4
	pciClass   = 0x00ff00

	queueRequests = 0
	numQueues     = 1
)

// Source is where entropy comes from.
type Source interface {
	// Entropy asks for n bytes, 1 to MaxEntropy, at a stop of the vCPU. The answer is an input
	// of a later stop: see [Device.Complete]. Tags ascend from 1 since power-on.
	Entropy(tag uint64, n int)
}

// Device is a virtio entropy device.
type Device struct {
	out Source
	t   *virtio.Transport

	nextTag uint64
	open    uint64       // tag of the open question, 0 if there is none
	orphan  bool         // the driver has reset the device since it was asked
	chain   virtio.Chain // what it is for
}

// New returns an entropy device without a transport: see [virtio.New].
func New(out Source) *Device { return &Device{out: out, nextTag: 1} }

// Info implements [virtio.Device].
func (d *Device) Info() virtio.Info {
	return virtio.Info{Type: deviceType, Class: pciClass, Queues: numQueues}
}

// Attach implements [virtio.Device].
func (d *Device) Attach(t *virtio.Transport) { d.t = t }

// Negotiate implements [virtio.Device].
func (d *Device) Negotiate(uint64) bool { return true }

// Config implements [virtio.Device]: there is none.
func (d *Device) Config() []byte { return nil }

// WriteConfig implements [virtio.Device].
func (d *Device) WriteConfig(int, []byte) {}

// Clear implements [virtio.Device]. The source still owes the answer to an open question.
func (d *Device) Clear() { d.orphan = d.open != 0 }

// Kick implements [virtio.Device].
func (d *Device) Kick(int) {
	q := d.t.Queue(queueRequests)
	for d.open == 0 && q.Next(&d.chain) {
		if d.chain.InLen == 0 {
			q.Push(d.chain.Head, 0)
			continue
		}
		d.open, d.orphan = d.nextTag, false
		d.nextTag++
		d.out.Entropy(d.open, d.want())
	}
	q.Interrupt()
}

// want returns how many bytes the open question is about; for an orphan it does not matter.
func (d *Device) want() int {
	if d.orphan {
		return 1
	}
	return int(min(d.chain.InLen, MaxEntropy))
}

// Complete is an input: the answer to a question. Fewer bytes than asked for are fine, more
// are ignored. It fails on a tag that is not open.
func (d *Device) Complete(tag uint64, data []byte) error {
	if tag == 0 || tag != d.open {
		return fmt.Errorf("rng: no question with tag %d is open", tag)
	}
	q := d.t.Queue(queueRequests)
	if n := min(len(data), d.want()); !d.orphan && q.Live() {
		q.Write(d.chain.In, 0, data[:n])
		q.Push(d.chain.Head, uint32(n))
	}
	d.open, d.orphan = 0, false
	d.Kick(queueRequests)
	return nil
}

// Reissue asks the open question again: after Restore, when the source is a new one.
func (d *Device) Reissue() {
	if d.open != 0 {
		d.out.Entropy(d.open, d.want())
	}
}

// State is the saved form of a [Device] with its transport.
type State struct {
	Transport virtio.State
	NextTag   uint64
	Open      uint64 // tag of the open question, 0 if there is none
	Orphan    bool   // the driver has reset the device since
	Head      uint16 // the chain that the question is for
	In        []virtio.Segment
}

// Save returns the state of device and transport.
func (d *Device) Save() State {
	s := State{Transport: d.t.Save(), NextTag: d.nextTag, Open: d.open, Orphan: d.orphan}
	if d.open != 0 && !d.orphan {
		s.Head = d.chain.Head
		s.In = append(s.In, d.chain.In...)
	}
	return s
}

// Restore sets the state of device and transport, or none of it. It asks nothing: see Reissue.
func (d *Device) Restore(s State) error {
	live := s.Open != 0 && !s.Orphan
	if s.NextTag == 0 || s.Open >= s.NextTag || (s.Orphan && s.Open == 0) || live != (len(s.In) > 0) ||
		len(s.Transport.Queues) != numQueues || (live && s.Transport.Queues[queueRequests].InUse == 0) {
		return fmt.Errorf("rng: saved question %d of %d with %d buffers", s.Open, s.NextTag, len(s.In))
	}
	if err := d.t.Queue(queueRequests).CheckSegments(s.Head, s.In); err != nil {
		return fmt.Errorf("rng: %w", err)
	}
	if err := d.t.Restore(s.Transport); err != nil {
		return fmt.Errorf("rng: %w", err)
	}
	d.nextTag, d.open, d.orphan = s.NextTag, s.Open, s.Orphan
	d.chain.Set(s.Head, nil, s.In)
	return nil
}

// Reset puts the device with its transport into the power-on state. Tags go on, and an
// open question stays open, as with a reset by the driver.
func (d *Device) Reset() { d.t.Reset() }
