package virtio

import "encoding/binary"

var le = binary.LittleEndian

// Common configuration structure (virtio 1.2, 4.1.4.3): offsets.
const (
	commonOfferSelect   = 0x00
	commonOffer         = 0x04
	commonDriverSelect  = 0x08
	commonDriver        = 0x0c
	commonConfigVector  = 0x10
	commonNumQueues     = 0x12
	commonStatus        = 0x14
	commonGeneration    = 0x15
	commonQueueSelect   = 0x16
	commonQueueSize     = 0x18
	commonQueueVector   = 0x1a
	commonQueueEnable   = 0x1c
	commonQueueNotify   = 0x1e
	commonQueueDesc     = 0x20
	commonQueueDriver   = 0x28
	commonQueueDevice   = 0x30
	commonSize          = 0x38 // what is there without the features that add queue_notify_data and queue_reset
	commonRegisterPitch = 4
)

// selected returns the queue that the driver has selected, or nil.
func (t *Transport) selected() *Queue {
	if int(t.queueSelect) < len(t.queues) {
		return &t.queues[t.queueSelect]
	}
	return nil
}

// word returns the 32-bit half of features that sel selects.
func word(features uint64, sel uint32) uint32 {
	switch sel {
	case 0:
		return uint32(features)
	case 1:
		return uint32(features >> 32)
	}
	return 0
}

// commonRegisters is the window of the common configuration structure.
type commonRegisters Transport

// long returns the four bytes at off, a multiple of 4.
func (c *commonRegisters) long(off uint64) uint32 {
	t := (*Transport)(c)
	switch off {
	case commonOfferSelect:
		return t.offerSelect
	case commonOffer:
		return word(t.offered, t.offerSelect)
	case commonDriverSelect:
		return t.driverSelect
	case commonDriver:
		return word(t.driverFeatures, t.driverSelect)
	case commonConfigVector:
		return uint32(t.configVector) | uint32(len(t.queues))<<16
	case commonStatus:
		return uint32(t.readStatus()) | uint32(t.generation)<<8 | uint32(t.queueSelect)<<16
	}
	q := t.selected()
	if q == nil {
		return 0 // size 0 says that there is no such queue
	}
	switch off {
	case commonQueueSize:
		return uint32(q.size) | uint32(q.vector)<<16
	case commonQueueEnable:
		v := uint32(t.queueSelect) << 16 // queue_notify_off
		if q.enabled {
			v |= 1
		}
		return v
	case commonQueueDesc, commonQueueDesc + 4:
		return uint32(q.desc >> (8 * (off - commonQueueDesc)))
	case commonQueueDriver, commonQueueDriver + 4:
		return uint32(q.avail >> (8 * (off - commonQueueDriver)))
	case commonQueueDevice, commonQueueDevice + 4:
		return uint32(q.used >> (8 * (off - commonQueueDevice)))
	}
	return 0
}

// Read implements devices.Handler. The structure reads like memory, in any size.
func (c *commonRegisters) Read(off uint64, size int) (v uint64) {
	for i := 0; i < size; {
		at := off + uint64(i)
		shift := at % commonRegisterPitch
		v |= uint64(c.long(at-shift)) >> (8 * shift) << (8 * i)
		i += commonRegisterPitch - int(shift)
	}
	return v
}

// Write implements devices.Handler. It stores to the field at off, whatever the size;
// drivers must use that of the field (4.1.3.1).
func (c *commonRegisters) Write(off uint64, size int, v uint64) {
	t := (*Transport)(c)
	switch off {
	case commonOfferSelect:
		t.offerSelect = uint32(v)
	case commonDriverSelect:
		t.driverSelect = uint32(v)
	case commonDriver:
		switch {
		case t.status&StatusFeaturesOK != 0: // 3.1.1: no more changes after step 5
		case t.driverSelect == 0:
			t.driverFeatures = t.driverFeatures>>32<<32 | v&0xffffffff
		case t.driverSelect == 1:
			t.driverFeatures = t.driverFeatures&0xffffffff | v<<32
		case v&0xffffffff != 0:
			// There are no features beyond the first 64, so this accepts one that is not
			// offered, and FEATURES_OK must fail.
			t.driverFeatures |= 1 << 63
		}
	case commonConfigVector:
		t.configVector = t.vectorOr(uint16(v))
	case commonStatus:
		t.writeStatus(uint8(v))
	case commonQueueSelect:
		t.queueSelect = uint16(v)
	default:
		if q := t.selected(); q != nil {
			q.write(off, size, v)
		}
	}
}

// write stores to a field of the selected queue.
func (q *Queue) write(off uint64, size int, v uint64) {
	if off == commonQueueVector {
		q.vector = q.t.vectorOr(uint16(v))
		return
	}
	if q.enabled { // 4.1.4.3.2: the rest is fixed by then
		return
	}
	switch off {
	case commonQueueSize:
		if validSize(uint16(v), q.max) {
			q.size = uint16(v)
		}
	case commonQueueEnable:
		q.enabled = uint16(v) == 1
	case commonQueueDesc, commonQueueDesc + 4:
		q.desc = merge(q.desc, off-commonQueueDesc, size, v)
	case commonQueueDriver, commonQueueDriver + 4:
		q.avail = merge(q.avail, off-commonQueueDriver, size, v)
	case commonQueueDevice, commonQueueDevice + 4:
		q.used = merge(q.used, off-commonQueueDevice, size, v)
	}
}

// merge stores v in the half of a 64-bit field at off (0 or 4), or in both when it is
// eight bytes wide.
func merge(old, off uint64, size int, v uint64) uint64 {
	switch {
	case off != 0:
		return old&0xffffffff | v<<32
	case size == 8:
		return v
	}
	return old>>32<<32 | v&0xffffffff
}

// notifyRegisters is the window of the notification structure (4.1.4.4): four bytes for each
// queue. The value written is the queue's number, which the address says already.
type notifyRegisters Transport

// Read implements devices.Handler.
func (*notifyRegisters) Read(uint64, int) uint64 { return 0 }

// Write implements devices.Handler.
func (n *notifyRegisters) Write(off uint64, _ int, _ uint64) {
	(*Transport)(n).kick(off / notifyMultiplier)
}

// isrRegister is the window of the ISR status (4.1.4.5), which reading clears.
type isrRegister Transport

// Read implements devices.Handler.
func (r *isrRegister) Read(uint64, int) uint64 {
	t := (*Transport)(r)
	v := t.isr
	t.isr = 0
	t.f.SetINTx(false)
	return uint64(v)
}

// Write implements devices.Handler.
func (*isrRegister) Write(uint64, int, uint64) {}

// deviceRegisters is the window of the device type's configuration (4.1.4.6).
type deviceRegisters Transport

// Read implements devices.Handler.
func (d *deviceRegisters) Read(off uint64, size int) (v uint64) {
	config := d.dev.Config()
	for i := range size {
		b := byte(0xff)
		if at := off + uint64(i); at < uint64(len(config)) {
			b = config[at]
		}
		v |= uint64(b) << (8 * i)
	}
	return v
}

// Write implements devices.Handler.
func (d *deviceRegisters) Write(off uint64, size int, v uint64) {
	if n := uint64(len(d.dev.Config())); off < n {
		le.PutUint64(d.scratch[:], v)
		d.dev.WriteConfig(int(off), d.scratch[:min(uint64(size), n-off)])
	}
}

// configAccess is the body of the PCI configuration access capability (4.1.4.9): a
// window on the modern BAR for firmware that cannot reach memory-mapped registers.
type configAccess Transport

// access returns what the window points at: offset and size of an access of the BAR.
func (c *configAccess) access() (off uint64, size int, ok bool) {
	n := le.Uint32(c.window[capLength:])
	return uint64(le.Uint32(c.window[capOffset:])), int(n), c.window[capBAR] == barModern && (n == 1 || n == 2 || n == 4)
}

// Read implements devices.Handler. Reading pci_cfg_data reads the BAR.
func (c *configAccess) Read(off uint64, size int) (v uint64) {
	if off+uint64(size) > capData {
		if at, n, ok := c.access(); ok {
			le.PutUint32(c.window[capData:], uint32(c.bar.Read(at, n)))
		}
	}
	for i := range size {
		if at := off + uint64(i); at < uint64(len(c.window)) {
			v |= uint64(c.window[at]) << (8 * i)
		}
	}
	return v
}

// Write implements devices.Handler. Writing pci_cfg_data writes the BAR.
func (c *configAccess) Write(off uint64, size int, v uint64) {
	for i := range size {
		at := off + uint64(i)
		switch {
		case at == capBAR, at >= capOffset && at < uint64(len(c.window)):
			c.window[at] = byte(v >> (8 * i))
		}
	}
	if off+uint64(size) > capData {
		if at, n, ok := c.access(); ok {
			c.bar.Write(at, n, uint64(le.Uint32(c.window[capData:])))
		}
	}
}

// Legacy interface (4.1.4.8): offsets in BAR 0. While MSI-X is enabled two registers for
// vectors precede the device's configuration.
const (
	legacyOffer        = 0x00
	legacyDriver       = 0x04
	legacyQueueAddress = 0x08 // in units of legacyAlign
	legacyQueueSize    = 0x0c
	legacyQueueSelect  = 0x0e
	legacyQueueNotify  = 0x10
	legacyStatus       = 0x12
	legacyISR          = 0x13
	legacyConfig       = 0x14
	legacyConfigVector = 0x14
	legacyQueueVector  = 0x16
	legacyConfigMSIX   = 0x18
)

// legacyRegisters is the window of the legacy interface.
type legacyRegisters Transport

// config returns where the device's configuration begins at present.
func (l *legacyRegisters) config() uint64 {
	if l.msix.Enabled() {
		return legacyConfigMSIX
	}
	return legacyConfig
}

// Read implements devices.Handler.
func (l *legacyRegisters) Read(off uint64, size int) uint64 {
	t := (*Transport)(l)
	if start := l.config(); off >= start {
		return (*deviceRegisters)(t).Read(off-start, size)
	}
	q := t.selected()
	switch off {
	case legacyOffer:
		return t.offeredLegacy()
	case legacyDriver:
		return uint64(uint32(t.features))
	case legacyQueueAddress:
		if q != nil && q.enabled {
			return q.desc / legacyAlign & 0xffffffff
		}
	case legacyQueueSize:
		if q != nil {
			return uint64(q.max)
		}
	case legacyQueueSelect:
		return uint64(t.queueSelect)
	case legacyStatus:
		return uint64(t.readStatus())
	case legacyISR:
		return (*isrRegister)(t).Read(0, 1)
	case legacyConfigVector:
		return uint64(t.configVector)
	case legacyQueueVector:
		if q != nil {
			return uint64(q.vector)
		}
		return noVector
	}
	return 0
}

// Write implements devices.Handler.
func (l *legacyRegisters) Write(off uint64, size int, v uint64) {
	t := (*Transport)(l)
	if start := l.config(); off >= start {
		(*deviceRegisters)(t).Write(off-start, size, v)
		return
	}
	q := t.selected()
	switch off {
	case legacyDriver:
		t.acceptLegacy(uint32(v))
	case legacyQueueAddress:
		switch {
		case uint32(v) == 0: // how some drivers put the device away
			t.reset()
		case q != nil:
			t.legacy = true
			q.placeLegacy(uint64(uint32(v)) * legacyAlign)
		}
	case legacyQueueSelect:
		t.queueSelect = uint16(v)
	case legacyQueueNotify:
		t.kick(v & 0xffff)
	case legacyStatus:
		t.writeStatus(uint8(v))
	case legacyConfigVector:
		t.configVector = t.vectorOr(uint16(v))
	case legacyQueueVector:
		if q != nil {
			q.vector = t.vectorOr(uint16(v))
		}
	}
}
