// Package announce tells a network where a guest has gone.
//
// When a backup goes live, the guest's network card appears on another port of the switches, with the
// addresses that it had. Nobody knows: switches go on sending to the dead host's port until the guest
// happens to say something, and a guest that only answers says nothing. So the host speaks for it.
//
// A [Learner] sees each frame that the guest sends or gets, and remembers which addresses the guest claims as its own:
//
//   - IPv4: the sender of its ARP packets (RFC 826);
//   - IPv6: the source of its solicitations and advertisements of neighbours and routers, and the target of
//     neighbour advertisements (RFC 4861).
//
// That is enough, since whoever has the guest in a cache of neighbours has it from there. The sources
// of its other packets count only as long as it has claimed nothing: a guest that routes sends packets from everybody's
// addresses, and to announce those would take them from their owners. For the same reason an address is forgotten
// when another host claims it.
//
// [Learner.Frames] are then the announcements: a RARP request for the switches, which need no address to learn a
// port, and for its neighbours two forms of gratuitous ARP for each IPv4 address and an unsolicited
// neighbour advertisement for each IPv6 address. A guest that uses a VLAN is announced there.
//
// A Learner is a function of the frames that it is shown, so those of both sides of a pair are equal; its
// [State] travels in a cut. What a guest sends is not trusted: nothing is announced but from the card's own MAC
// address, and the tables are bounded.
package announce

import (
	"encoding/binary"
	"fmt"
	"time"
)

// MaxAddresses bounds the addresses of each family that are remembered; beyond, the one that was
// not used for longest is forgotten.
const MaxAddresses = 16

// A frame may be lost, and a port may take its time to forward. Announcements are sent so often, at this
// distance: MAX_NEIGHBOR_ADVERTISEMENT and RETRANS_TIMER of RFC 4861, section 10.
const (
	Repeats  = 3
	Interval = time.Second
)

// MAC is an Ethernet address.
type MAC = [6]byte

// Address is an address of the guest.
type Address struct {
	IP     [16]byte // an IPv4 address stands in the first 4 bytes
	Tagged bool     // its frames carry a VLAN tag (IEEE 802.1Q)
	TCI    uint16   // that tag's priority and VLAN
}

// same reports whether two addresses are one: priority makes no difference.
func (a *Address) same(b *Address) bool {
	return a.IP == b.IP && a.sameVLAN(b)
}

func (a *Address) sameVLAN(b *Address) bool {
	return a.Tagged == b.Tagged && (a.TCI^b.TCI)&vlanMask == 0
}

// State is what a Learner knows. Addresses come in the order in which they were last used, the latest first.
type State struct {
	IPv4, IPv6         []Address
	Claimed4, Claimed6 bool // the addresses are claimed ones, not mere sources
	Router             bool // the guest advertises itself as an IPv6 router
}

// Learner learns a guest's addresses on one network card.
type Learner struct {
	mac    MAC
	v4, v6 table
	router bool
}

// table holds addresses, the one last used first.
type table struct {
	claimed bool
	n       int
	list    [MaxAddresses]Address
}

// New returns a Learner for a card with a MAC address.
func New(mac MAC) *Learner { return &Learner{mac: mac} }

// Reset forgets all.
func (l *Learner) Reset() { *l = Learner{mac: l.mac} }

// Save returns what the learner knows.
func (l *Learner) Save() State {
	return State{
		IPv4: append([]Address(nil), l.v4.all()...), IPv6: append([]Address(nil), l.v6.all()...),
		Claimed4: l.v4.claimed, Claimed6: l.v6.claimed, Router: l.router,
	}
}

// Restore sets what the learner knows. It refuses what a learner cannot have learnt.
func (l *Learner) Restore(s State) error {
	v4, v6 := table{claimed: s.Claimed4}, table{claimed: s.Claimed6}
	for _, f := range []struct {
		t    *table
		list []Address
		ok   func(*Address) bool
	}{
		{&v4, s.IPv4, func(a *Address) bool { return unicast4(a.IP[:4]) && a.IP == ip4(a.IP[:4]) }},
		{&v6, s.IPv6, func(a *Address) bool { return unicast6(a.IP[:]) }},
	} {
		if len(f.list) > MaxAddresses {
			return fmt.Errorf("announce: %d addresses, at most %d are kept", len(f.list), MaxAddresses)
		}
		for i := range f.list {
			a := &f.list[i]
			if !f.ok(a) || !a.Tagged && a.TCI != 0 || f.t.find(a) >= 0 {
				return fmt.Errorf("announce: address %x twice, or no host's", a.IP)
			}
			f.t.list[i] = *a
			f.t.n++
		}
	}
	l.v4, l.v6, l.router = v4, v6, s.Router
	return nil
}

func (t *table) all() []Address { return t.list[:t.n] }

// find returns an address's index, or -1.
func (t *table) find(a *Address) int {
	for i := range t.all() {
		if t.list[i].same(a) {
			return i
		}
	}
	return -1
}

// learn takes an address that the guest has claimed, or was only seen to use.
func (t *table) learn(a *Address, claimed bool) {
	if claimed && !t.claimed {
		t.claimed, t.n = true, 0 // what was seen is no longer needed, and may be others'
	}
	i := t.find(a)
	if i < 0 {
		if t.claimed && !claimed {
			return
		}
		t.n = min(t.n+1, MaxAddresses)
		i = t.n - 1
	}
	copy(t.list[1:i+1], t.list[:i])
	t.list[0] = *a
}

// claim takes an address that the guest or another host has claimed.
func (t *table) claim(a *Address, own bool) {
	if own {
		t.learn(a, true)
	} else if i := t.find(a); i >= 0 {
		copy(t.list[i:], t.list[i+1:t.n])
		t.n--
	}
}

// Ethernet II and IEEE 802.1Q.
const (
	ethSource = 6
	ethType   = 12
	ethHeader = 14
	tagSize   = 4
	vlanMask  = 0x0fff
	// minFrame is the shortest frame without its checksum; what is shorter is filled with zeros.
	minFrame = 60

	typeIPv4 = 0x0800
	typeARP  = 0x0806
	typeRARP = 0x8035
	typeVLAN = 0x8100
	typeIPv6 = 0x86dd
)

// ARP (RFC 826) and RARP (RFC 903), of IPv4 over Ethernet.
const (
	arpHardware  = 0
	arpProtocol  = 2
	arpLengths   = 4 // of addresses: 1 byte each
	arpOp        = 6
	arpSenderMAC = 8
	arpSenderIP  = 14
	arpTargetMAC = 18
	arpTargetIP  = 24
	arpSize      = 28

	hardwareEthernet = 1
	lengthsIPv4      = 6<<8 | 4

	opRequest        = 1
	opReply          = 2
	opRequestReverse = 3
)

// IPv4 (RFC 791).
const (
	ip4Source = 12
	ip4Header = 20
)

// IPv6 (RFC 8200).
const (
	ip6PayloadLength = 4
	ip6NextHeader    = 6
	ip6HopLimit      = 7
	ip6Source        = 8
	ip6Destination   = 24
	ip6Header        = 40
)

// ICMPv6 (RFC 4443) and neighbour discovery (RFC 4861, section 4).
const (
	protocolICMPv6 = 58
	ndHopLimit     = 255 // proves that no router has forwarded it

	icmpType     = 0
	icmpCode     = 1
	icmpChecksum = 2
	icmpHeader   = 8 // with what depends on the type

	typeRouterSolicitation    = 133
	typeRouterAdvertisement   = 134
	typeNeighborSolicitation  = 135
	typeNeighborAdvertisement = 136

	naFlags      = 4
	naTarget     = 8
	naOptions    = 24
	naSize       = naOptions + 8
	flagRouter   = 1 << 7
	flagOverride = 1 << 5

	optionTargetMAC = 2
)

var (
	broadcast = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	// All nodes on the link (RFC 4291, section 2.7.1), and the Ethernet address of that (RFC 2464, section 7).
	allNodes    = [16]byte{0: 0xff, 1: 0x02, 15: 1}
	allNodesMAC = MAC{0x33, 0x33, 0, 0, 0, 1}
)

// unicast4 reports whether an IPv4 address can be a host's on a network (RFC 6890, section 2.2.2): not of the
// networks 0 and 127, not multicast, not reserved.
func unicast4(ip []byte) bool { return ip[0] != 0 && ip[0] != 127 && ip[0] < 224 }

// unicast6 reports whether an IPv6 address can be a host's on a network (RFC 4291, section 2.4): not multicast,
// and not of ::/8, where the unspecified, the loopback and the mapped addresses are.
func unicast6(ip []byte) bool { return ip[0] != 0 && ip[0] != 0xff }

func ip4(b []byte) (ip [16]byte) {
	copy(ip[:4], b)
	return ip
}

// Observe takes a frame that the guest sends, from the Ethernet header on, and learns from it. It
// allocates nothing, and keeps nothing of frame.
func (l *Learner) Observe(frame []byte) {
	if len(frame) >= ethHeader && MAC(frame[ethSource:]) == l.mac {
		l.look(frame, true)
	}
}

// Received takes a frame that comes for the guest, as Observe does. If another host claims an address, the guest has
// given it up: it has a new one, or hands a shared one to another member of a cluster. It is forgotten, until the
// guest claims it again.
func (l *Learner) Received(frame []byte) {
	if len(frame) >= ethHeader && MAC(frame[ethSource:]) != l.mac {
		l.look(frame, false)
	}
}

// look takes a frame of the guest, or of another host.
func (l *Learner) look(frame []byte, own bool) {
	var a Address
	kind, p := binary.BigEndian.Uint16(frame[ethType:]), frame[ethHeader:]
	if kind == typeVLAN {
		if len(p) < tagSize {
			return
		}
		a.Tagged, a.TCI = true, binary.BigEndian.Uint16(p)
		kind, p = binary.BigEndian.Uint16(p[2:]), p[tagSize:]
	}
	switch kind {
	case typeARP:
		// Another sender than the frame's would be somebody for whom it is bridged.
		if ip := arpSender(p); ip != nil && MAC(p[arpSenderMAC:]) == MAC(frame[ethSource:]) {
			a.IP = ip4(ip)
			l.v4.claim(&a, own)
		}
	case typeIPv4:
		if own && len(p) >= ip4Header && p[0]>>4 == 4 && unicast4(p[ip4Source:]) {
			a.IP = ip4(p[ip4Source:])
			l.v4.learn(&a, false)
		}
	case typeIPv6:
		l.lookIPv6(p, a, own)
	}
}

// arpSender returns the sender's IPv4 address of an ARP packet; nil if there is none. That of a probe is
// zero: its sender does not yet use what it asks for (RFC 5227, section 2.1.1).
func arpSender(p []byte) []byte {
	be := binary.BigEndian
	if len(p) < arpSize || be.Uint16(p[arpHardware:]) != hardwareEthernet || be.Uint16(p[arpProtocol:]) != typeIPv4 ||
		be.Uint16(p[arpLengths:]) != lengthsIPv4 {
		return nil
	}
	if op := be.Uint16(p[arpOp:]); op != opRequest && op != opReply || !unicast4(p[arpSenderIP:]) {
		return nil
	}
	return p[arpSenderIP:arpTargetMAC]
}

// lookIPv6 takes the source, and the target of an advertisement. Solicitations that look for a duplicate of an
// address have no source: the sender does not yet use it (RFC 4862, section 5.4).
func (l *Learner) lookIPv6(p []byte, a Address, own bool) {
	if len(p) < ip6Header || p[0]>>4 != 6 {
		return
	}
	claimed := false
	if m := p[ip6Header:]; p[ip6NextHeader] == protocolICMPv6 && p[ip6HopLimit] == ndHopLimit &&
		len(m) >= icmpHeader && m[icmpCode] == 0 {
		switch m[icmpType] {
		case typeRouterSolicitation, typeNeighborSolicitation:
			claimed = true
		case typeRouterAdvertisement:
			claimed = true
			l.router = l.router || own
		case typeNeighborAdvertisement:
			if len(m) < naOptions {
				return
			}
			claimed = true
			if own {
				l.router = m[naFlags]&flagRouter != 0
			}
			if unicast6(m[naTarget:]) {
				target := a
				target.IP = [16]byte(m[naTarget:])
				l.v6.claim(&target, own)
			}
		}
	}
	if unicast6(p[ip6Source:]) {
		a.IP = [16]byte(p[ip6Source:])
		switch {
		case claimed:
			l.v6.claim(&a, own)
		case own:
			l.v6.learn(&a, false)
		}
	}
}

// Frames returns what to send to the network when the card has moved, Repeats times at each Interval; each frame
// begins with its Ethernet header:
//
//   - for the switches a RARP request (RFC 903) in which the guest asks for nobody's address but its own,
//     without a tag and in each VLAN that is known;
//   - for each IPv4 address an ARP announcement (RFC 5227, section 2.3), and the same as a reply, since some heed
//     only the one and some only the other;
//   - for each IPv6 address an unsolicited neighbour advertisement (RFC 4861, section 7.2.6).
func (l *Learner) Frames() [][]byte {
	var untagged Address
	frames := [][]byte{l.arp(&untagged, typeRARP, opRequestReverse, l.mac)}
	vlans := []*Address{&untagged}
	for _, t := range []*table{&l.v4, &l.v6} {
	addresses:
		for i := range t.all() {
			a := &t.list[i]
			for _, v := range vlans {
				if v.sameVLAN(a) {
					continue addresses
				}
			}
			vlans = append(vlans, a)
			where := Address{Tagged: true, TCI: a.TCI}
			frames = append(frames, l.arp(&where, typeRARP, opRequestReverse, l.mac))
		}
	}
	for i := range l.v4.all() {
		a := &l.v4.list[i]
		// The target's MAC address has no meaning in a request, and is the sender's in a reply to oneself (RFC
		// 5944, section 4.6).
		frames = append(frames, l.arp(a, typeARP, opRequest, MAC{}), l.arp(a, typeARP, opReply, l.mac))
	}
	for i := range l.v6.all() {
		frames = append(frames, l.advertisement(&l.v6.list[i]))
	}
	return frames
}

// header returns a new frame up to its payload.
func (l *Learner) header(to MAC, a *Address, kind uint16) []byte {
	b := append(make([]byte, 0, 128), to[:]...)
	b = append(b, l.mac[:]...)
	if a.Tagged {
		b = binary.BigEndian.AppendUint16(b, typeVLAN)
		b = binary.BigEndian.AppendUint16(b, a.TCI)
	}
	return binary.BigEndian.AppendUint16(b, kind)
}

// pad fills a frame up to the shortest allowed, which it also is when a switch has taken off its tag.
func pad(b []byte, a *Address) []byte {
	n := minFrame
	if a.Tagged {
		n += tagSize
	}
	return append(b, make([]byte, max(0, n-len(b)))...)
}

// arp returns an ARP or RARP packet about a, to everybody.
func (l *Learner) arp(a *Address, kind, op uint16, target MAC) []byte {
	be := binary.BigEndian
	var p [arpSize]byte
	be.PutUint16(p[arpHardware:], hardwareEthernet)
	be.PutUint16(p[arpProtocol:], typeIPv4)
	be.PutUint16(p[arpLengths:], lengthsIPv4)
	be.PutUint16(p[arpOp:], op)
	copy(p[arpSenderMAC:], l.mac[:])
	copy(p[arpSenderIP:], a.IP[:4])
	copy(p[arpTargetMAC:], target[:])
	copy(p[arpTargetIP:], a.IP[:4])
	return pad(append(l.header(broadcast, a, kind), p[:]...), a)
}

// advertisement returns an unsolicited neighbour advertisement of a, to all nodes.
func (l *Learner) advertisement(a *Address) []byte {
	var p [ip6Header + naSize]byte
	p[0] = 6 << 4
	binary.BigEndian.PutUint16(p[ip6PayloadLength:], naSize)
	p[ip6NextHeader], p[ip6HopLimit] = protocolICMPv6, ndHopLimit
	copy(p[ip6Source:], a.IP[:])
	copy(p[ip6Destination:], allNodes[:])
	m := p[ip6Header:]
	m[icmpType] = typeNeighborAdvertisement
	m[naFlags] = flagOverride
	if l.router {
		m[naFlags] |= flagRouter // without it, neighbours would drop their default router
	}
	copy(m[naTarget:], a.IP[:])
	m[naOptions], m[naOptions+1] = optionTargetMAC, 1 // in units of 8 bytes
	copy(m[naOptions+2:], l.mac[:])
	binary.BigEndian.PutUint16(m[icmpChecksum:], checksum(p[ip6Source:ip6Header], m))
	return pad(append(l.header(allNodesMAC, a, typeIPv6), p[:]...), a)
}

// checksum is that of ICMPv6 (RFC 4443, section 2.3) over a pseudo-header of the addresses (RFC 8200, section 8.1) and
// a message of even length whose checksum is zero.
func checksum(addresses, m []byte) uint16 {
	sum := uint32(len(m)) + protocolICMPv6
	for _, b := range [][]byte{addresses, m} {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
