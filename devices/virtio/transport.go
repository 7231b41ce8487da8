package virtio

import (
	"fmt"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/devices/pci"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// Bits of the device status (virtio 1.2, 2.1).
const (
	StatusAcknowledge = 1 << 0
	StatusDriver      = 1 << 1
	StatusDriverOK    = 1 << 2
	StatusFeaturesOK  = 1 << 3
	StatusNeedsReset  = 1 << 6
	StatusFailed      = 1 << 7
)

// Feature bits of the transport and the rings (virtio 1.2, 6). A device adds those of
// its type.
const (
	FeatureNotifyOnEmpty    uint64 = 1 << 24 // legacy only
	FeatureAnyLayout        uint64 = 1 << 27 // legacy only: later it is a matter of course
	FeatureRingIndirectDesc uint64 = 1 << 28
	FeatureRingEventIdx     uint64 = 1 << 29
	FeatureVersion1         uint64 = 1 << 32

	featuresCommon = FeatureRingIndirectDesc | FeatureRingEventIdx
	featuresLegacy = FeatureNotifyOnEmpty | FeatureAnyLayout
)

// Limits of a device.
const (
	// MaxQueues bounds the queues of one device.
	MaxQueues = 16
	// MaxConfig bounds a device type's configuration structure, in bytes.
	MaxConfig = 128
	// MaxVectors bounds the MSI-X vectors of one device.
	MaxVectors = 64
)

// Info is what a device type has to say of itself, once.
type Info struct {
	Type     uint16 // device type (virtio 1.2, 5): 1 is a network card, 2 a disk
	Class    uint32 // PCI class code, 24 bits
	Features uint64 // the feature bits of the type that this device offers
	Queues   int    // 1 to MaxQueues
}

// Device is a device type, seen from its transport. Its methods run at a stop of the
// vCPU, from within an access of the guest.
type Device interface {
	// Info describes the device; it does not change.
	Info() Info
	// Attach is called once, from New: t's queues are where the device finds its work.
	Attach(t *Transport)
	// Negotiate tells which of the offered features the driver accepts. Returning false refuses
	// the combination (virtio 1.2, 2.2.2); a legacy driver cannot be refused and
	// goes on with it, so no combination may do harm.
	Negotiate(features uint64) bool
	// Config returns the configuration structure (2.5), at most MaxConfig bytes and always as many.
	// The device owns it and keeps it up to date; a change is announced by
	// [Transport.ConfigChanged].
	Config() []byte
	// WriteConfig is the driver's write to the configuration structure; it lies
	// within it.
	WriteConfig(off int, p []byte)
	// Kick says that the driver has put chains into a queue.
	Kick(queue int)
	// Clear is the driver's reset of the device (2.4): what was negotiated and queued
	// is forgotten.
	Clear()
}

// Options are what a machine decides about a device.
type Options struct {
	Name         string // for messages
	Transitional bool   // answer legacy drivers, too
	QueueSize    uint16 // offered for each queue: a power of two up to MaxQueueSize; 0 means DefaultQueueSize
	Vectors      int    // MSI-X vectors, up to MaxVectors; 0 means one for each queue and one more
}

// PCI identity (virtio 1.2, 4.1.2).
const (
	pciVendor          = 0x1af4
	pciModern          = 0x1040 // plus the device type
	pciTransitional    = 0x1000 // plus what transitionalID knows
	pciModernSubsystem = 0x1100
	revisionModern     = 1
)

// transitionalID holds the PCI device IDs of transitional devices by device type (4.1.2.1), less
// 0x1000.
var transitionalID = [...]uint16{1: 0, 2: 1, 3: 3, 4: 5, 5: 2}

// Layout of the BARs. BAR 0 is the legacy interface, if there is one.
const (
	barLegacy = 0
	barMSIX   = 1
	barModern = 4

	msixBARSize = 0x1000
	msixTable   = 0
	msixPending = 0x800

	modernBARSize = 0x4000 // a page for each structure
	commonOffset  = 0x0000
	isrOffset     = 0x1000
	deviceOffset  = 0x2000
	notifyOffset  = 0x3000

	notifyMultiplier = 4 // bytes between the notify registers of two queues
)

// Vendor-specific capabilities (4.1.4): the body after the two-byte header.
const (
	capVendor = 0x09

	capCommon = 1
	capNotify = 2
	capISR    = 3
	capDevice = 4
	capPCI    = 5

	capBodySize   = 14 // cap_len to length
	capLen        = 0
	capType       = 1
	capBAR        = 2
	capOffset     = 6
	capLength     = 10
	capData       = 14 // pci_cfg_data, after the body
	capHeaderSize = 2
)

// ISR status (4.1.4.5).
const (
	isrQueue  = 1 << 0
	isrConfig = 1 << 1
)

// noVector is the vector of an event that no message reports (4.1.5.1.2).
const noVector = 0xffff

// Transport is a virtio device on the PCI bus: the registers between a driver and a
// [Device].
type Transport struct {
	dev      Device
	f        *pci.Function
	msix     *pci.MSIX
	queues   []Queue
	offered  uint64 // to a modern driver
	vectors  int
	onLegacy bool // there is a legacy interface

	status         uint8
	isr            uint8
	generation     uint8 // of the device's configuration
	broken         bool  // until the driver resets the device
	legacy         bool  // the driver uses the legacy interface
	features       uint64
	driverFeatures uint64 // as written, not yet accepted
	offerSelect    uint32
	driverSelect   uint32
	queueSelect    uint16
	configVector   uint16
	window         [capBodySize + 4]byte // body of the configuration access capability
	bar            devices.Handler       // what it accesses
	scratch        [8]byte
}

// New joins a device to a PCI function, which the machine adds to its bus (and gives an
// interrupt pin, and perhaps an expansion ROM): see [Transport.Function]. msi takes the
// messages of MSI-X. It panics on options outside their limits: a defect of the
// machine's construction.
func New(mem *memory.Memory, msi devices.MSI, dev Device, opts Options) *Transport {
	info := dev.Info()
	if opts.QueueSize == 0 {
		opts.QueueSize = DefaultQueueSize
	}
	if opts.Vectors == 0 {
		opts.Vectors = info.Queues + 1
	}
	if !validSize(opts.QueueSize, MaxQueueSize) || info.Queues < 1 || info.Queues > MaxQueues ||
		opts.Vectors < 1 || opts.Vectors > MaxVectors || len(dev.Config()) > MaxConfig ||
		(opts.Transitional && int(info.Type) >= len(transitionalID)) {
		panic(fmt.Sprintf("virtio: %s: cannot build %+v with %+v", opts.Name, info, opts))
	}
	t := &Transport{
		dev:      dev,
		queues:   make([]Queue, info.Queues),
		offered:  info.Features | featuresCommon | FeatureVersion1,
		vectors:  opts.Vectors,
		onLegacy: opts.Transitional,
	}
	for i := range t.queues {
		q := &t.queues[i]
		q.t, q.mem, q.max = t, mem, opts.QueueSize
	}
	id := pci.Identity{
		Vendor: pciVendor, Device: pciModern + info.Type,
		SubVendor: pciVendor, SubDevice: pciModernSubsystem,
		Class: info.Class, Revision: revisionModern,
	}
	if opts.Transitional {
		id.Device, id.SubDevice, id.Revision = pciTransitional+transitionalID[info.Type], info.Type, 0
	}
	t.f = pci.NewFunction(opts.Name, id)
	if opts.Transitional {
		size := uint64(1)
		for size < legacyConfigMSIX+uint64(len(dev.Config())) {
			size *= 2
		}
		t.f.AddBAR(barLegacy, pci.IO, size, (*legacyRegisters)(t))
	}
	t.f.AddBAR(barMSIX, pci.Mem32, msixBARSize, nil)
	t.msix = t.f.AddMSIX(msi, opts.Vectors, barMSIX, msixTable, msixPending)
	t.f.AddBAR(barModern, pci.Mem32, modernBARSize, nil)
	t.bar = t.f.BARHandler(barModern)
	t.addStructure(capCommon, commonOffset, commonSize, (*commonRegisters)(t))
	t.addStructure(capISR, isrOffset, 1, (*isrRegister)(t))
	if n := len(dev.Config()); n > 0 {
		t.addStructure(capDevice, deviceOffset, uint32(n), (*deviceRegisters)(t))
	}
	t.addStructure(capNotify, notifyOffset, uint32(info.Queues)*notifyMultiplier, (*notifyRegisters)(t))
	t.f.CapabilityHandler(t.addCapability(capPCI, 0, 0, 0), (*configAccess)(t))
	dev.Attach(t)
	t.reset()
	return t
}

// addStructure serves one of the structures of 4.1.4 in the modern BAR.
func (t *Transport) addStructure(kind uint8, offset, length uint32, h devices.Handler) {
	t.f.AddBARWindow(barModern, uint64(offset), uint64(length), h)
	t.addCapability(kind, barModern, offset, length)
}

// addCapability announces a structure.
func (t *Transport) addCapability(kind, bar uint8, offset, length uint32) uint8 {
	body := make([]byte, capBodySize, capBodySize+4)
	body[capType], body[capBAR] = kind, bar
	le.PutUint32(body[capOffset:], offset)
	le.PutUint32(body[capLength:], length)
	switch kind {
	case capNotify:
		body = le.AppendUint32(body, notifyMultiplier)
	case capPCI:
		body = le.AppendUint32(body, 0) // pci_cfg_data
	}
	body[capLen] = uint8(len(body) + capHeaderSize)
	if kind == capPCI {
		copy(t.window[:], body)
	}
	return t.f.AddCapability(capVendor, body, nil)
}

// Function returns the PCI function, for the bus.
func (t *Transport) Function() *pci.Function { return t.f }

// Queue returns a queue by its number, which must exist.
func (t *Transport) Queue(i int) *Queue { return &t.queues[i] }

// Has says whether the driver has accepted all features of f.
func (t *Transport) Has(f uint64) bool { return t.features&f == f }

// Legacy says whether the driver is one from before version 1 of the specification.
func (t *Transport) Legacy() bool { return !t.Has(FeatureVersion1) }

// Running says whether the driver has set up the device, and neither has given up since.
func (t *Transport) Running() bool {
	return !t.broken && t.status&StatusDriverOK != 0 && t.status&StatusFailed == 0
}

// ConfigChanged tells the driver that Config has changed (virtio 1.2, 2.3).
func (t *Transport) ConfigChanged() {
	t.generation++
	if t.status&StatusDriverOK != 0 {
		t.interruptConfig()
	}
}

func (t *Transport) interruptConfig() {
	t.isr |= isrConfig
	if t.msix.Enabled() {
		t.msix.Trigger(t.configVector) // noVector is none that exists
		return
	}
	t.f.SetINTx(true)
}

func (t *Transport) interruptQueue(q *Queue) {
	if t.msix.Enabled() {
		t.msix.Trigger(q.vector)
		return
	}
	t.isr |= isrQueue
	t.f.SetINTx(true)
}

// Fail breaks the device for a driver that does not keep to the specification: nothing
// is processed until the driver resets it, and a modern one is told (2.1.2).
func (t *Transport) Fail() {
	if t.broken {
		return
	}
	t.broken = true
	if !t.Legacy() && t.status&StatusDriverOK != 0 {
		t.interruptConfig()
	}
}

// kick runs the device for a queue.
func (t *Transport) kick(i uint64) {
	if i < uint64(len(t.queues)) && t.queues[i].Live() {
		t.dev.Kick(int(i))
	}
}

// readStatus returns the device status as the driver sees it.
func (t *Transport) readStatus() uint8 {
	if t.broken && !t.Legacy() {
		return t.status | StatusNeedsReset
	}
	return t.status
}

// writeStatus is the driver's step through initialisation (3.1), or its reset.
func (t *Transport) writeStatus(v uint8) {
	if v == 0 {
		t.reset()
		return
	}
	v &^= StatusNeedsReset
	set := v &^ t.status
	if set&StatusFeaturesOK != 0 && !t.accept() {
		v &^= StatusFeaturesOK
	}
	t.status = v
	if set&StatusDriverOK != 0 {
		// A queue that was filled and announced too early is not lost.
		for i := range t.queues {
			t.kick(uint64(i))
		}
	}
}

// accept decides about the features that a modern driver has written (2.2.2).
func (t *Transport) accept() bool {
	f := t.driverFeatures
	if f&^t.offered != 0 || f&FeatureVersion1 == 0 || !t.dev.Negotiate(f) {
		return false
	}
	t.features = f
	return true
}

// acceptLegacy takes the features of a legacy driver, which has no second step.
func (t *Transport) acceptLegacy(v uint32) {
	t.features = uint64(v) & t.offeredLegacy()
	t.driverFeatures = t.features
	t.dev.Negotiate(t.features)
}

func (t *Transport) offeredLegacy() uint64 {
	return uint64(uint32(t.offered | featuresLegacy))
}

// reset is the driver's reset (2.4, 4.1.4.3.1): everything but the PCI function.
func (t *Transport) reset() {
	t.status, t.isr, t.broken, t.legacy = 0, 0, false, false
	t.features, t.driverFeatures = 0, 0
	t.offerSelect, t.driverSelect, t.queueSelect = 0, 0, 0
	t.configVector = noVector
	for i := range t.queues {
		t.queues[i].reset()
	}
	t.f.SetINTx(false)
	t.dev.Clear()
}

// Reset puts the PCI function, the transport and the device into the power-on state.
func (t *Transport) Reset() {
	t.f.Reset()
	t.msix.Reset()
	t.generation = 0
	clear(t.window[capBAR:])
	t.reset()
}

func (t *Transport) validVector(v uint16) bool { return v == noVector || int(v) < t.vectors }

// vectorOr returns v if it is a vector of this device, else noVector: what reading the
// register back tells a driver that its vector was not taken (4.1.5.1.2).
func (t *Transport) vectorOr(v uint16) uint16 {
	if t.validVector(v) {
		return v
	}
	return noVector
}

// State is the saved form of a [Transport]: the PCI function, the registers and the
// queues. The device's State holds it beside its own.
type State struct {
	Function       pci.FunctionState
	MSIX           pci.MSIXState
	Status         uint8
	ISR            uint8
	Generation     uint8
	Broken         bool // needs a reset by the driver
	LegacyDriver   bool
	Features       uint64 // accepted
	DriverFeatures uint64 // written
	OfferSelect    uint32
	DriverSelect   uint32
	QueueSelect    uint16
	ConfigVector   uint16
	Window         [capBodySize + 4]byte // body of the configuration access capability
	Queues         []QueueState
}

// Save returns the state of function, registers and queues.
func (t *Transport) Save() State {
	s := State{
		Function: t.f.Save(), MSIX: t.msix.Save(),
		Status: t.status, ISR: t.isr, Generation: t.generation, Broken: t.broken, LegacyDriver: t.legacy,
		Features: t.features, DriverFeatures: t.driverFeatures,
		OfferSelect: t.offerSelect, DriverSelect: t.driverSelect, QueueSelect: t.queueSelect,
		ConfigVector: t.configVector, Window: t.window,
		Queues: make([]QueueState, len(t.queues)),
	}
	for i := range t.queues {
		s.Queues[i] = t.queues[i].save()
	}
	return s
}

// Restore sets the state of function, registers and queues, or none of it.
func (t *Transport) Restore(s State) error {
	if len(s.Queues) != len(t.queues) {
		return fmt.Errorf("virtio: %s: saved state has %d queues, want %d", t.f.Name(), len(s.Queues), len(t.queues))
	}
	for i, q := range s.Queues {
		if err := t.queues[i].check(q); err != nil {
			return fmt.Errorf("virtio: %s: queue %d: %w", t.f.Name(), i, err)
		}
	}
	if s.Features&^(t.offered|t.offeredLegacy()) != 0 || !t.validVector(s.ConfigVector) || (s.LegacyDriver && !t.onLegacy) ||
		s.ISR&^(isrQueue|isrConfig) != 0 || s.Status&StatusNeedsReset != 0 {
		return fmt.Errorf("virtio: %s: saved state does not fit: features %#x, vector %#x, legacy %t, ISR %#x, status %#x",
			t.f.Name(), s.Features, s.ConfigVector, s.LegacyDriver, s.ISR, s.Status)
	}
	if [2]byte(s.Window[:2]) != [2]byte(t.window[:2]) {
		return fmt.Errorf("virtio: %s: saved configuration access capability of another kind", t.f.Name())
	}
	before := t.f.Save()
	if err := t.f.Restore(s.Function); err != nil {
		return fmt.Errorf("virtio: %w", err)
	}
	if err := t.msix.Restore(s.MSIX); err != nil {
		if back := t.f.Restore(before); back != nil {
			panic("virtio: cannot go back to the state before a restore: " + back.Error())
		}
		return fmt.Errorf("virtio: %w", err)
	}
	t.status, t.isr, t.generation, t.broken, t.legacy = s.Status, s.ISR, s.Generation, s.Broken, s.LegacyDriver
	t.features, t.driverFeatures = s.Features, s.DriverFeatures
	t.offerSelect, t.driverSelect, t.queueSelect = s.OfferSelect, s.DriverSelect, s.QueueSelect
	t.configVector, t.window = s.ConfigVector, s.Window
	for i, q := range s.Queues {
		t.queues[i].restore(q)
	}
	return nil
}
