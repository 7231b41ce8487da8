package console

import (
	"encoding/binary"
	"fmt"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// Limits of a console.
const (
	// MaxBacklog bounds the bytes received that wait for buffers of the driver.
	MaxBacklog = 4096
	// MaxWrite bounds what one chain of the driver writes, in bytes; the rest of it is lost.
	MaxWrite = 64 << 10
)

// Feature bits (virtio 1.2, 5.3.3).
const (
	featureSize           uint64 = 1 << 0
	featureEmergencyWrite uint64 = 1 << 2
)

// Identity (5.3.1; PCI class "other communication device"), queues (5.3.2) and
// configuration structure (5.3.4).
const (
	deviceType = 3
	pciClass   = 0x078000

	queueRx   = 0
	queueTx   = 1
	numQueues = 2

	configColumns   = 0
	configRows      = 2
	configEmergency = 8 // the low byte of what is written comes out
	configSize      = 12
)

// Device is a virtio console.
type Device struct {
	out func(p []byte)
	t   *virtio.Transport

	config  [configSize]byte
	backlog []byte
	chain   virtio.Chain
	buffer  [4096]byte // what is being written
}

// New returns a console without a transport: see [virtio.New]. out takes what the guest
// writes, at a stop of the vCPU; the buffer is lent for the call.
func New(out func(p []byte)) *Device {
	d := &Device{out: out, backlog: make([]byte, 0, MaxBacklog)}
	d.setSize(80, 25)
	return d
}

// Info implements [virtio.Device].
func (d *Device) Info() virtio.Info {
	return virtio.Info{Type: deviceType, Class: pciClass, Features: featureSize | featureEmergencyWrite, Queues: numQueues}
}

// Attach implements [virtio.Device].
func (d *Device) Attach(t *virtio.Transport) { d.t = t }

// Negotiate implements [virtio.Device].
func (d *Device) Negotiate(uint64) bool { return true }

// Config implements [virtio.Device].
func (d *Device) Config() []byte { return d.config[:] }

// WriteConfig implements [virtio.Device]: the emergency write, which a driver may use before
// anything is negotiated (5.3.4).
func (d *Device) WriteConfig(off int, p []byte) {
	if off == configEmergency {
		d.buffer[0] = p[0]
		d.out(d.buffer[:1])
	}
}

// Clear implements [virtio.Device]. What was typed before is not for the next driver.
func (d *Device) Clear() { d.backlog = d.backlog[:0] }

func (d *Device) setSize(columns, rows uint16) {
	binary.LittleEndian.PutUint16(d.config[configColumns:], columns)
	binary.LittleEndian.PutUint16(d.config[configRows:], rows)
}

// Resize is an input: the terminal has another size. The driver sees it change.
func (d *Device) Resize(columns, rows uint16) {
	before := d.config
	if d.setSize(columns, rows); d.config != before && d.t.Has(featureSize) {
		d.t.ConfigChanged()
	}
}

// Room returns how many bytes Receive takes at least.
func (d *Device) Room() int { return MaxBacklog - len(d.backlog) }

// Receive is an input: bytes for the guest. It returns how many were taken, from the
// front of p; the rest is the caller's to bring again.
func (d *Device) Receive(p []byte) (n int) {
	for len(p) > 0 && d.Room() > 0 {
		part := min(len(p), d.Room())
		d.backlog = append(d.backlog, p[:part]...)
		p, n = p[part:], n+part
		d.drain()
	}
	d.t.Queue(queueRx).Interrupt()
	return n
}

// drain gives the driver what it has buffers for.
func (d *Device) drain() {
	q := d.t.Queue(queueRx)
	for len(d.backlog) > 0 && q.Next(&d.chain) {
		n := q.Write(d.chain.In, 0, d.backlog)
		d.backlog = d.backlog[:copy(d.backlog, d.backlog[n:])]
		q.Push(d.chain.Head, uint32(n))
	}
}

// Kick implements [virtio.Device].
func (d *Device) Kick(queue int) {
	q := d.t.Queue(queue)
	if queue == queueRx {
		d.drain()
		q.Interrupt()
		return
	}
	for q.Next(&d.chain) {
		for at := uint64(0); at < MaxWrite; {
			n := q.Read(d.chain.Out, at, d.buffer[:])
			if n == 0 {
				break
			}
			d.out(d.buffer[:n])
			at += uint64(n)
		}
		q.Push(d.chain.Head, 0)
	}
	q.Interrupt()
}

// Reissue is there because all devices have it: nothing outside waits for a console.
func (d *Device) Reissue() {}

// State is the saved form of a [Device] with its transport.
type State struct {
	Transport     virtio.State
	Columns, Rows uint16
	Backlog       []byte
}

// Save returns the state of console and transport.
func (d *Device) Save() State {
	return State{
		Transport: d.t.Save(),
		Columns:   binary.LittleEndian.Uint16(d.config[configColumns:]),
		Rows:      binary.LittleEndian.Uint16(d.config[configRows:]),
		Backlog:   append([]byte(nil), d.backlog...),
	}
}

// Restore sets the state of console and transport, or none of it.
func (d *Device) Restore(s State) error {
	if len(s.Backlog) > MaxBacklog {
		return fmt.Errorf("console: saved backlog of %d bytes", len(s.Backlog))
	}
	if err := d.t.Restore(s.Transport); err != nil {
		return fmt.Errorf("console: %w", err)
	}
	d.setSize(s.Columns, s.Rows)
	d.backlog = append(d.backlog[:0], s.Backlog...)
	return nil
}

// Reset puts the console with its transport into the power-on state. The size is the
// terminal's, and stays.
func (d *Device) Reset() { d.t.Reset() }
