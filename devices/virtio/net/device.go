package net

import (
	"encoding/binary"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// Limits of a network card.
const (
	// MaxBacklog bounds the received frames that wait for buffers of the driver.
	MaxBacklog = 256
	// MaxFilter bounds the addresses of the MAC filter; a driver that sets more receives
	// everything of the kind that does not fit.
	MaxFilter = 64

	minMTU = 68 // RFC 791; what 5.1.4.1 demands of a device
)

// Feature bits (virtio 1.2, 5.1.3).
const (
	featureChecksum      uint64 = 1 << 0
	featureGuestChecksum uint64 = 1 << 1
	featureGuestOffloads uint64 = 1 << 2 // VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
	featureMTU           uint64 = 1 << 3
	featureMAC           uint64 = 1 << 5
	featureGuestTSO4     uint64 = 1 << 7
	featureGuestTSO6     uint64 = 1 << 8
	featureGuestECN      uint64 = 1 << 9
	featureHostTSO4      uint64 = 1 << 11
	featureHostTSO6      uint64 = 1 << 12
	featureHostECN       uint64 = 1 << 13
	featureMergeable     uint64 = 1 << 15
	featureStatus        uint64 = 1 << 16
	featureControl       uint64 = 1 << 17
	featureControlRx     uint64 = 1 << 18
	featureControlRxMore uint64 = 1 << 20
	featureAnnounce      uint64 = 1 << 21
	featureControlMAC    uint64 = 1 << 23

	// What a driver may switch on and off at run time (5.1.6.5.6.1).
	guestOffloads = featureGuestChecksum | featureGuestTSO4 | featureGuestTSO6 | featureGuestECN
)

// requires holds, for each feature, those that it makes no sense without (5.1.3.1).
var requires = [...]struct{ feature, needs uint64 }{
	{featureGuestTSO4, featureGuestChecksum},
	{featureGuestTSO6, featureGuestChecksum},
	{featureHostTSO4, featureChecksum},
	{featureHostTSO6, featureChecksum},
	{featureGuestOffloads, featureControl},
	{featureControlRx, featureControl},
	{featureControlRxMore, featureControl},
	{featureAnnounce, featureControl},
	{featureControlMAC, featureControl},
}

// Identity (5.1.1) and queues (5.1.2).
const (
	deviceType = 1
	pciClass   = 0x020000 // Ethernet controller

	queueRx      = 0
	queueTx      = 1
	queueControl = 2
	numQueues    = 3
)

// Configuration structure (5.1.4): offsets.
const (
	configMAC    = 0
	configStatus = 6
	configPairs  = 8
	configMTU    = 10
	configSize   = 12

	statusLinkUp   = 1 << 0
	statusAnnounce = 1 << 1
)

// Header of a frame (5.1.6): offsets and values. A legacy driver without mergeable buffers
// leaves the last field out.
const (
	headerFlags         = 0
	headerGSOType       = 1
	headerGSOSize       = 4
	headerChecksumStart = 6
	headerChecksumAt    = 8 // from there
	headerBuffers       = 10
	headerLegacySize    = 10

	flagNeedsChecksum = 1 << 0
	flagDataValid     = 1 << 1

	gsoNone = 0
	gsoTCP4 = 1
	gsoTCP6 = 4
	gsoECN  = 0x80
)

const (
	addressSize    = 6
	ethernetHeader = 14
)

// MAC is an Ethernet address.
type MAC [addressSize]byte

func (m MAC) multicast() bool { return m[0]&1 != 0 }

var broadcast = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// Config is what a network card is.
type Config struct {
	MAC      MAC
	Offloads Offloads // what the network behind it can do
	MTU      uint16   // told to the driver, in bytes, from 68 on; 0 leaves it to the driver
}

// Counters count frames since power-on. They are no part of the guest's state.
type Counters struct {
	Sent, Received uint64
	TxDropped      uint64 // sent with a header that was not agreed on, too long or too short, or while the link was down
	RxDropped      uint64 // received while the driver was not ready, the link down or the backlog full, or not fit for the driver
	RxFiltered     uint64 // received for somebody else
}

// filter is what the driver wants to receive (5.1.6.5.1, 5.1.6.5.2).
type filter struct {
	promiscuous, allMulticast, allUnicast bool
	noMulticast, noUnicast, noBroadcast   bool
	unicast, multicast                    []MAC
	tooManyUnicast, tooManyMulticast      bool // for the tables: take all
}

// Device is a virtio network card.
type Device struct {
	cfg Config
	out Transmitter
	t   *virtio.Transport

	config   [configSize]byte
	offloads uint64 // of guestOffloads: what is on
	filter   filter
	backlog  backlog
	counters Counters

	chain, first virtio.Chain
	frame        [MaxFrame]byte // what is being sent
	control      [controlMax]byte
}

// New returns a network card without a transport: see [virtio.New].
func New(cfg Config, out Transmitter) *Device {
	if cfg.MTU != 0 {
		cfg.MTU = max(cfg.MTU, minMTU)
	}
	d := &Device{cfg: cfg, out: out}
	d.setStatus(statusLinkUp)
	binary.LittleEndian.PutUint16(d.config[configPairs:], 1)
	binary.LittleEndian.PutUint16(d.config[configMTU:], cfg.MTU)
	return d
}

// Info implements [virtio.Device].
func (d *Device) Info() virtio.Info {
	f := featureMAC | featureStatus | featureMergeable | featureControl | featureControlRx | featureControlRxMore |
		featureAnnounce | featureControlMAC
	o := d.cfg.Offloads
	for _, c := range [...]struct {
		needs    Offloads
		features uint64
	}{
		{TxChecksum, featureChecksum},
		{TxChecksum | TxTSO4, featureHostTSO4 | featureHostECN},
		{TxChecksum | TxTSO6, featureHostTSO6 | featureHostECN},
		{RxChecksum, featureGuestChecksum | featureGuestOffloads},
		{RxChecksum | RxTSO4, featureGuestTSO4 | featureGuestECN},
		{RxChecksum | RxTSO6, featureGuestTSO6 | featureGuestECN},
	} {
		if o&c.needs == c.needs {
			f |= c.features
		}
	}
	if d.cfg.MTU != 0 {
		f |= featureMTU
	}
	return virtio.Info{Type: deviceType, Class: pciClass, Features: f, Queues: numQueues}
}

// Attach implements [virtio.Device].
func (d *Device) Attach(t *virtio.Transport) { d.t = t }

// Negotiate implements [virtio.Device].
func (d *Device) Negotiate(f uint64) bool {
	ok := true
	for _, r := range requires {
		ok = ok && (f&r.feature == 0 || f&r.needs != 0)
	}
	ok = ok && (f&featureGuestECN == 0 || f&(featureGuestTSO4|featureGuestTSO6) != 0) &&
		(f&featureHostECN == 0 || f&(featureHostTSO4|featureHostTSO6) != 0)
	if !ok && f&virtio.FeatureVersion1 != 0 {
		return false
	}
	d.setOffloads(f)
	return true
}

// setOffloads switches the driver's offloads and tells the network.
func (d *Device) setOffloads(f uint64) {
	d.offloads = f & guestOffloads
	d.out.SetOffloads(d.rxOffloads())
}

// rxOffloads returns what the driver takes, in the network's terms.
func (d *Device) rxOffloads() (o Offloads) {
	if d.offloads&featureGuestChecksum == 0 {
		return 0
	}
	o = RxChecksum
	if d.offloads&featureGuestTSO4 != 0 {
		o |= RxTSO4
	}
	if d.offloads&featureGuestTSO6 != 0 {
		o |= RxTSO6
	}
	return o & d.cfg.Offloads
}

// Config implements [virtio.Device].
func (d *Device) Config() []byte { return d.config[:] }

// WriteConfig implements [virtio.Device]: a driver without the command for it sets its
// address here (5.1.4.3).
func (d *Device) WriteConfig(off int, p []byte) {
	if d.t.Legacy() && !d.t.Has(featureControlMAC) && off < addressSize {
		copy(d.config[off:addressSize], p)
	}
}

func (d *Device) mac() MAC { return MAC(d.config[configMAC:]) }

func (d *Device) setMAC(m MAC) { copy(d.config[configMAC:], m[:]) }

func (d *Device) status() uint16 { return binary.LittleEndian.Uint16(d.config[configStatus:]) }

func (d *Device) setStatus(v uint16) { binary.LittleEndian.PutUint16(d.config[configStatus:], v) }

func (d *Device) linkUp() bool { return d.status()&statusLinkUp != 0 }

// Clear implements [virtio.Device]. The link is the network's, and stays.
func (d *Device) Clear() {
	d.setMAC(d.cfg.MAC)
	d.setStatus(d.status() &^ statusAnnounce)
	// Nothing filters before the driver asks for it, which a legacy one may never do.
	d.filter = filter{promiscuous: true, unicast: d.filter.unicast[:0], multicast: d.filter.multicast[:0]}
	d.backlog.clear()
	d.setOffloads(0)
}

// SetLink is an input: the carrier came or went. The driver sees the status change.
func (d *Device) SetLink(up bool) {
	if up == d.linkUp() {
		return
	}
	d.setStatus(d.status() ^ statusLinkUp)
	if d.t.Has(featureStatus) {
		d.t.ConfigChanged()
	}
}

// Announce is an input: the card is at a new place in the network, and the driver is asked to
// say so (5.1.6.5.4). It returns false when the driver does not know how; then the
// machine may announce the address for it.
func (d *Device) Announce() bool {
	if !d.t.Running() || !d.t.Has(featureAnnounce|featureStatus|featureControl) {
		return false
	}
	d.setStatus(d.status() | statusAnnounce)
	d.t.ConfigChanged()
	return true
}

// MAC returns the card's present address, which the driver can change.
func (d *Device) MAC() MAC { return d.mac() }

// Counters returns the frames counted so far.
func (d *Device) Counters() Counters { return d.counters }

// Kick implements [virtio.Device].
func (d *Device) Kick(queue int) {
	switch queue {
	case queueRx:
		d.drain()
	case queueTx:
		d.transmit()
	case queueControl:
		d.command()
	}
}

// headerSize returns the size of the header in the driver's buffers (5.1.6).
func (d *Device) headerSize() int {
	if d.t.Legacy() && !d.t.Has(featureMergeable) {
		return headerLegacySize
	}
	return HeaderSize
}

// transmit sends what is in the transmit queue.
func (d *Device) transmit() {
	q := d.t.Queue(queueTx)
	for q.Next(&d.chain) {
		if n := d.gather(q); n > 0 && d.linkUp() {
			d.counters.Sent++
			d.out.Transmit(d.frame[:n])
		} else {
			d.counters.TxDropped++
		}
		q.Push(d.chain.Head, 0)
	}
	q.Interrupt()
}

// gather copies the chain to d.frame, with a header as the network expects it, and
// returns the length with the header; 0 when it is not a frame that may be sent.
func (d *Device) gather(q *virtio.Queue) int {
	size, have := d.chain.OutLen, uint64(d.headerSize())
	if size < have+ethernetHeader || size-have > MaxFrame-HeaderSize {
		return 0
	}
	header := d.frame[:HeaderSize]
	q.Read(d.chain.Out, 0, header[:have])
	binary.LittleEndian.PutUint16(header[headerBuffers:], 0) // has no meaning here
	n := HeaderSize + int(size-have)
	q.Read(d.chain.Out, have, d.frame[HeaderSize:n])
	allowed := gsoAllowed{d.t.Has(featureChecksum), d.t.Has(featureHostTSO4), d.t.Has(featureHostTSO6), d.t.Has(featureHostECN)}
	if !allowed.header(header, n-HeaderSize) {
		return 0
	}
	return n
}

// gsoAllowed is what one side has agreed to take in a header.
type gsoAllowed struct{ checksum, tcp4, tcp6, ecn bool }

// header says whether the header of a frame of n bytes keeps to it, and to itself. It
// clears what is left without meaning.
func (a gsoAllowed) header(h []byte, n int) bool {
	le := binary.LittleEndian
	h[headerFlags] &= flagNeedsChecksum | flagDataValid
	if h[headerFlags]&flagNeedsChecksum != 0 {
		if !a.checksum || int(le.Uint16(h[headerChecksumStart:]))+int(le.Uint16(h[headerChecksumAt:]))+2 > n {
			return false
		}
	} else {
		le.PutUint32(h[headerChecksumStart:], 0)
	}
	kind := h[headerGSOType]
	if kind&gsoECN != 0 && !a.ecn {
		return false
	}
	switch kind &^ gsoECN {
	case gsoNone:
		if kind != gsoNone {
			return false
		}
		clear(h[headerGSOType+1 : headerChecksumStart]) // header length and segment size
		return true
	case gsoTCP4:
		if !a.tcp4 {
			return false
		}
	case gsoTCP6:
		if !a.tcp6 {
			return false
		}
	default:
		return false
	}
	return h[headerFlags]&flagNeedsChecksum != 0 && le.Uint16(h[headerGSOSize:]) != 0
}

// Reissue tells the network again which offloads the driver takes: after Restore, when
// the network is a new one.
func (d *Device) Reissue() { d.out.SetOffloads(d.rxOffloads()) }
