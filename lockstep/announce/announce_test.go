package announce_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/stretchr/testify/require"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/lockstep/announce"
)

var (
	guest    = announce.MAC{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	other    = announce.MAC{0x52, 0x54, 0, 0x65, 0x43, 0x21}
	everyone = announce.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

func link(m announce.MAC) tcpip.LinkAddress { return tcpip.LinkAddress(m[:]) }

func octets(ip string) []byte { return netip.MustParseAddr(ip).AsSlice() }

func address(ip string) tcpip.Address { return tcpip.AddrFromSlice(octets(ip)) }

// frame puts an Ethernet header before a packet.
func frame(from announce.MAC, kind tcpip.NetworkProtocolNumber, packet []byte) []byte {
	b := make([]byte, header.EthernetMinimumSize, header.EthernetMinimumSize+len(packet))
	header.Ethernet(b).Encode(&header.EthernetFields{SrcAddr: link(from), DstAddr: link(everyone), Type: kind})
	return append(b, packet...)
}

// tagged inserts a VLAN tag.
func tagged(tci uint16, frame []byte) []byte {
	return slices.Insert(slices.Clone(frame), 12, 0x81, 0, byte(tci>>8), byte(tci))
}

func arp(from, sender announce.MAC, op header.ARPOp, ip string) []byte {
	p := make(header.ARP, header.ARPSize)
	p.SetIPv4OverEthernet()
	p.SetOp(op)
	copy(p.HardwareAddressSender(), sender[:])
	copy(p.ProtocolAddressSender(), octets(ip))
	copy(p.ProtocolAddressTarget(), octets("10.9.9.9"))
	return frame(from, header.ARPProtocolNumber, p)
}

func ipv4(from announce.MAC, ip string) []byte {
	p := make(header.IPv4, header.IPv4MinimumSize)
	p.Encode(&header.IPv4Fields{TotalLength: header.IPv4MinimumSize, TTL: 64, SrcAddr: address(ip), DstAddr: address("10.9.9.9")})
	return frame(from, header.IPv4ProtocolNumber, p)
}

func ipv6(from announce.MAC, ip string, hops uint8, next tcpip.TransportProtocolNumber, payload []byte) []byte {
	p := make(header.IPv6, header.IPv6MinimumSize, header.IPv6MinimumSize+len(payload))
	p.Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(payload)), TransportProtocol: next, HopLimit: hops, SrcAddr: address(ip), DstAddr: address("ff02::1"),
	})
	return frame(from, header.IPv6ProtocolNumber, append(p, payload...))
}

func neighbor(kind header.ICMPv6Type, target string, router bool) []byte {
	m := make(header.ICMPv6, 8+16)
	m.SetType(kind)
	header.NDPNeighborAdvert(m[4:]).SetTargetAddress(address(target))
	header.NDPNeighborAdvert(m[4:]).SetRouterFlag(router)
	return m
}

func solicit(from announce.MAC, ip string) []byte {
	return ipv6(from, ip, 255, header.ICMPv6ProtocolNumber, neighbor(header.ICMPv6NeighborSolicit, "fe80::99", false))
}

func advertise(from announce.MAC, ip, target string, router bool) []byte {
	return ipv6(from, ip, 255, header.ICMPv6ProtocolNumber, neighbor(header.ICMPv6NeighborAdvert, target, router))
}

// said checks a frame with gVisor's eyes, and returns what it says.
func said(t require.TestingT, b []byte) string {
	vlan := ""
	if binary.BigEndian.Uint16(b[12:]) == 0x8100 {
		vlan = fmt.Sprintf("vlan %#x: ", binary.BigEndian.Uint16(b[14:]))
		b = slices.Delete(slices.Clone(b), 12, 16)
	}
	require.GreaterOrEqual(t, len(b), 60, "the least that Ethernet allows, also without the tag")
	eth := header.Ethernet(b)
	require.Equal(t, link(guest), eth.SourceAddress())
	p := b[header.EthernetMinimumSize:]
	switch eth.Type() {
	case 0x8035:
		require.Equal(t, link(everyone), eth.DestinationAddress())
		require.True(t, header.ARP(p).IsValid())
		require.EqualValues(t, 3, header.ARP(p).Op())
		require.Equal(t, guest[:], header.ARP(p).HardwareAddressSender())
		require.Equal(t, guest[:], header.ARP(p).HardwareAddressTarget())
		require.Equal(t, make([]byte, 4), header.ARP(p).ProtocolAddressSender())
		require.Equal(t, make([]byte, 4), header.ARP(p).ProtocolAddressTarget())
		return vlan + "rarp"
	case header.ARPProtocolNumber:
		require.Equal(t, link(everyone), eth.DestinationAddress())
		a := header.ARP(p)
		require.True(t, a.IsValid())
		require.Equal(t, guest[:], a.HardwareAddressSender())
		require.Equal(t, a.ProtocolAddressSender(), a.ProtocolAddressTarget(), "about itself")
		ip, _ := netip.AddrFromSlice(a.ProtocolAddressSender())
		if a.Op() == header.ARPRequest {
			require.Equal(t, make([]byte, 6), a.HardwareAddressTarget())
			return fmt.Sprintf("%swho has %v", vlan, ip)
		}
		require.Equal(t, header.ARPReply, a.Op())
		require.Equal(t, guest[:], a.HardwareAddressTarget())
		return fmt.Sprintf("%shere is %v", vlan, ip)
	case header.IPv6ProtocolNumber:
		require.Equal(t, header.EthernetAddressFromMulticastIPv6Address(header.IPv6AllNodesMulticastAddress), eth.DestinationAddress())
		packet := header.IPv6(p)
		require.True(t, packet.IsValid(len(p)))
		require.Equal(t, header.ICMPv6ProtocolNumber, tcpip.TransportProtocolNumber(packet.NextHeader()))
		require.EqualValues(t, header.NDPHopLimit, packet.HopLimit())
		require.Equal(t, header.IPv6AllNodesMulticastAddress, packet.DestinationAddress())
		m := header.ICMPv6(packet.Payload())
		require.Equal(t, header.ICMPv6NeighborAdvert, m.Type())
		require.EqualValues(t, 0, m.Code())
		require.Equal(t, header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
			Header: m[:header.ICMPv6MinimumSize], Src: packet.SourceAddress(), Dst: packet.DestinationAddress(),
			PayloadCsum: checksum.Checksum(m[header.ICMPv6MinimumSize:], 0), PayloadLen: len(m) - header.ICMPv6MinimumSize,
		}), m.Checksum())
		na := header.NDPNeighborAdvert(m.MessageBody())
		require.True(t, na.OverrideFlag())
		require.False(t, na.SolicitedFlag())
		require.Equal(t, packet.SourceAddress(), na.TargetAddress())
		options, err := na.Options().Iter(true)
		require.NoError(t, err)
		option, done, err := options.Next()
		require.NoError(t, err)
		require.False(t, done)
		require.Equal(t, link(guest), option.(header.NDPTargetLinkLayerAddressOption).EthernetAddress())
		_, done, err = options.Next()
		require.NoError(t, err)
		require.True(t, done)
		what := "here is"
		if na.RouterFlag() {
			what = "here is router"
		}
		return fmt.Sprintf("%s%s %v", vlan, what, na.TargetAddress())
	}
	require.Failf(t, "a frame of another type", "%#x", eth.Type())
	return ""
}

func announced(t require.TestingT, l *announce.Learner) []string {
	var out []string
	for _, f := range l.Frames() {
		out = append(out, said(t, f))
	}
	return out
}

func TestWhatIsAnnounced(t *testing.T) {
	const icmp, ns, na = header.ICMPv6ProtocolNumber, header.ICMPv6NeighborSolicit, header.ICMPv6NeighborAdvert
	double := tagged(5, tagged(6, arp(guest, guest, header.ARPRequest, "10.0.0.5")))
	badOp := arp(guest, guest, 3, "10.0.0.5")
	longMAC := arp(guest, guest, header.ARPRequest, "10.0.0.5")
	longMAC[14+4] = 8
	for _, c := range []struct {
		name   string
		frames [][]byte
		want   []string
	}{
		{"a silent guest: switches are told", nil, []string{"rarp"}},
		{"an ARP request", [][]byte{arp(guest, guest, header.ARPRequest, "10.0.0.5")}, []string{"rarp", "who has 10.0.0.5", "here is 10.0.0.5"}},
		{"an ARP reply", [][]byte{arp(guest, guest, header.ARPReply, "10.0.0.5")}, []string{"rarp", "who has 10.0.0.5", "here is 10.0.0.5"}},
		{"an ARP probe claims nothing", [][]byte{arp(guest, guest, header.ARPRequest, "0.0.0.0")}, []string{"rarp"}},
		{"nor does what is bridged", [][]byte{arp(other, other, header.ARPRequest, "10.0.0.5"), arp(guest, other, header.ARPRequest, "10.0.0.6"), ipv4(other, "10.0.0.7"), solicit(other, "fe80::5")}, []string{"rarp"}},
		{"nor RARP in ARP, nor other hardware", [][]byte{badOp, longMAC}, []string{"rarp"}},
		{"no host's addresses", [][]byte{
			ipv4(guest, "0.0.0.0"), ipv4(guest, "224.0.0.1"), ipv4(guest, "255.255.255.255"), ipv4(guest, "127.0.0.1"),
			arp(guest, guest, header.ARPRequest, "239.1.1.1"),
			solicit(guest, "::"), solicit(guest, "ff02::1"), solicit(guest, "::1"), advertise(guest, "::", "ff02::5", false),
		}, []string{"rarp"}},
		{"sources, until something is claimed", [][]byte{ipv4(guest, "10.0.0.5"), ipv4(guest, "10.0.0.6")},
			[]string{"rarp", "who has 10.0.0.6", "here is 10.0.0.6", "who has 10.0.0.5", "here is 10.0.0.5"}},
		{"a router's sources are others'", [][]byte{ipv4(guest, "192.0.2.1"), arp(guest, guest, header.ARPReply, "10.0.0.1"), ipv4(guest, "192.0.2.2")},
			[]string{"rarp", "who has 10.0.0.1", "here is 10.0.0.1"}},
		{"the latest first", [][]byte{arp(guest, guest, header.ARPReply, "10.0.0.1"), arp(guest, guest, header.ARPReply, "10.0.0.2"), ipv4(guest, "10.0.0.1")},
			[]string{"rarp", "who has 10.0.0.1", "here is 10.0.0.1", "who has 10.0.0.2", "here is 10.0.0.2"}},
		{"IPv6 sources, until something is claimed", [][]byte{ipv6(guest, "2001:db8::5", 64, 6, make([]byte, 20))}, []string{"rarp", "here is 2001:db8::5"}},
		{"a solicitation", [][]byte{ipv6(guest, "2001:db8::9", 64, 6, nil), solicit(guest, "fe80::5"), ipv6(guest, "2001:db8::7", 64, 6, nil)}, []string{"rarp", "here is fe80::5"}},
		{"a search for duplicates claims nothing", [][]byte{ipv6(guest, "::", 255, icmp, neighbor(ns, "fe80::5", false))}, []string{"rarp"}},
		{"an advertisement", [][]byte{advertise(guest, "fe80::5", "2001:db8::5", false)}, []string{"rarp", "here is fe80::5", "here is 2001:db8::5"}},
		{"a router's advertisement", [][]byte{advertise(guest, "fe80::5", "fe80::5", true)}, []string{"rarp", "here is router fe80::5"}},
		{"one that has stopped routing", [][]byte{advertise(guest, "fe80::5", "fe80::5", true), advertise(guest, "fe80::5", "fe80::5", false)}, []string{"rarp", "here is fe80::5"}},
		{"a router advertisement", [][]byte{ipv6(guest, "fe80::5", 255, icmp, neighbor(header.ICMPv6RouterAdvert, "::", false))}, []string{"rarp", "here is router fe80::5"}},
		{"an advertisement from elsewhere", [][]byte{ipv6(guest, "fe80::5", 254, icmp, neighbor(na, "2001:db8::5", true))}, []string{"rarp", "here is fe80::5"}},
		{"an advertisement cut short", [][]byte{ipv6(guest, "fe80::5", 255, icmp, neighbor(na, "2001:db8::5", true)[:20])}, []string{"rarp"}},
		{"in a VLAN", [][]byte{tagged(0x6005, arp(guest, guest, header.ARPRequest, "10.0.0.5")), tagged(5, solicit(guest, "fe80::5"))},
			[]string{"rarp", "vlan 0x6005: rarp", "vlan 0x6005: who has 10.0.0.5", "vlan 0x6005: here is 10.0.0.5", "vlan 0x5: here is fe80::5"}},
		{"the same address in two", [][]byte{arp(guest, guest, header.ARPRequest, "10.0.0.5"), tagged(5, arp(guest, guest, header.ARPRequest, "10.0.0.5"))},
			[]string{"rarp", "vlan 0x5: rarp", "vlan 0x5: who has 10.0.0.5", "vlan 0x5: here is 10.0.0.5", "who has 10.0.0.5", "here is 10.0.0.5"}},
		{"with another priority", [][]byte{tagged(0x6005, arp(guest, guest, header.ARPRequest, "10.0.0.5")), tagged(5, arp(guest, guest, header.ARPRequest, "10.0.0.5"))},
			[]string{"rarp", "vlan 0x5: rarp", "vlan 0x5: who has 10.0.0.5", "vlan 0x5: here is 10.0.0.5"}},
		{"not in two tags", [][]byte{double}, []string{"rarp"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := announce.New(guest)
			for _, f := range c.frames {
				l.Observe(f)
			}
			require.Equal(t, c.want, announced(t, l))
			l.Reset()
			require.Equal(t, []string{"rarp"}, announced(t, l))
			require.Zero(t, l.Save())
		})
	}
}

func TestAnAddressThatMovesToAnotherHostIsForgotten(t *testing.T) {
	l := announce.New(guest)
	own := [][]byte{
		arp(guest, guest, header.ARPReply, "10.0.0.5"), arp(guest, guest, header.ARPReply, "10.0.0.6"), arp(guest, guest, header.ARPReply, "10.0.0.7"),
		solicit(guest, "fe80::5"), solicit(guest, "2001:db8::5"),
	}
	for _, f := range own {
		l.Observe(f)
		l.Received(f) // a reflection changes nothing
	}
	before := l.Save()
	for _, f := range [][]byte{
		arp(other, other, header.ARPRequest, "10.0.0.8"), arp(other, guest, header.ARPRequest, "10.0.0.6"), ipv4(other, "10.0.0.6"),
		arp(other, other, header.ARPRequest, "0.0.0.0"), tagged(5, arp(other, other, header.ARPRequest, "10.0.0.6")),
		ipv6(other, "fe80::5", 64, 6, nil), ipv6(other, "::", 255, header.ICMPv6ProtocolNumber, neighbor(header.ICMPv6NeighborSolicit, "fe80::5", false)),
		advertise(other, "fe80::7", "fe80::7", true), {}, make([]byte, 14),
	} {
		l.Received(f)
		require.Equal(t, before, l.Save(), "%x", f)
	}
	l.Received(arp(other, other, header.ARPRequest, "10.0.0.6"))
	l.Received(advertise(other, "fe80::7", "2001:db8::5", false))
	require.Equal(t, []string{"rarp", "who has 10.0.0.7", "here is 10.0.0.7", "who has 10.0.0.5", "here is 10.0.0.5", "here is fe80::5"}, announced(t, l))
	l.Received(solicit(other, "fe80::5"))
	l.Received(arp(other, other, header.ARPReply, "10.0.0.5"))
	l.Received(arp(other, other, header.ARPReply, "10.0.0.7"))
	require.Equal(t, []string{"rarp"}, announced(t, l))
	l.Observe(ipv4(guest, "10.0.0.6"))
	require.Equal(t, []string{"rarp"}, announced(t, l), "to go on using it is no claim")
	l.Observe(arp(guest, guest, header.ARPRequest, "10.0.0.6"))
	require.Equal(t, []string{"rarp", "who has 10.0.0.6", "here is 10.0.0.6"}, announced(t, l), "to defend it is")
}

func TestTheAddressUsedLongestAgoIsForgotten(t *testing.T) {
	l := announce.New(guest)
	for i := range announce.MaxAddresses {
		l.Observe(arp(guest, guest, header.ARPReply, fmt.Sprintf("10.0.0.%d", i+1)))
	}
	l.Observe(ipv4(guest, "10.0.0.1"))
	l.Observe(arp(guest, guest, header.ARPReply, "10.0.1.1"))
	got := announced(t, l)
	require.Len(t, got, 1+2*announce.MaxAddresses)
	require.Contains(t, got, "here is 10.0.0.1")
	require.Contains(t, got, "here is 10.0.1.1")
	require.NotContains(t, got, "here is 10.0.0.2")
}

func TestShortFramesAreIgnored(t *testing.T) {
	for _, f := range [][]byte{arp(guest, guest, header.ARPRequest, "10.0.0.5"), ipv4(guest, "10.0.0.5"), tagged(7, solicit(guest, "fe80::5")[:54])} {
		for n := range f {
			l := announce.New(guest)
			l.Observe(f[:n])
			l.Received(f[:n])
			require.Zero(t, l.Save(), "%d bytes", n)
		}
	}
}

func TestObserveAllocatesNothing(t *testing.T) {
	l := announce.New(guest)
	frames := [][]byte{arp(guest, guest, header.ARPRequest, "10.0.0.5"), ipv4(guest, "10.0.0.5"), advertise(guest, "fe80::5", "2001:db8::5", false)}
	require.Zero(t, testing.AllocsPerRun(100, func() {
		for _, f := range frames {
			l.Observe(f)
			l.Received(f)
		}
	}))
}

func TestRestoreRefusesWhatCannotBeLearnt(t *testing.T) {
	four := func(b ...byte) (a announce.Address) { copy(a.IP[:], b); return a }
	long := make([]announce.Address, announce.MaxAddresses+1)
	for i := range long {
		long[i] = four(10, 0, 0, byte(i))
	}
	for name, s := range map[string]announce.State{
		"too many":            {IPv4: long},
		"IPv4 with more":      {IPv4: []announce.Address{four(10, 0, 0, 1, 1)}},
		"IPv4 multicast":      {IPv4: []announce.Address{four(224, 0, 0, 1)}},
		"nobody's":            {IPv6: []announce.Address{{}}},
		"IPv6 multicast":      {IPv6: []announce.Address{four(0xff, 2)}},
		"a tag without a tag": {IPv6: []announce.Address{{IP: four(0xfe, 0x80).IP, TCI: 5}}},
		"one address twice":   {IPv4: []announce.Address{{IP: four(10).IP, Tagged: true, TCI: 5}, {IP: four(10).IP, Tagged: true, TCI: 0x6005}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := announce.New(guest)
			l.Observe(solicit(guest, "fe80::5"))
			before := l.Save()
			require.Error(t, l.Restore(s))
			require.Equal(t, before, l.Save(), "as it was")
		})
	}
	require.NoError(t, announce.New(guest).Restore(announce.State{IPv4: long[:announce.MaxAddresses]}))
}

// drawFrame draws a frame of the guest or of another host.
func drawFrame(t *rapid.T) []byte {
	from := rapid.SampledFrom([]announce.MAC{guest, guest, other}).Draw(t, "from")
	n := rapid.IntRange(1, 20).Draw(t, "host")
	v4, v6 := fmt.Sprintf("10.0.0.%d", n), fmt.Sprintf("fe80::%d", n)
	f := rapid.SampledFrom([][]byte{
		arp(from, from, header.ARPReply, v4), ipv4(from, v4), solicit(from, v6), advertise(from, v6, fmt.Sprintf("2001:db8::%d", n), n%2 == 0),
		ipv6(from, v6, 64, 6, nil),
	}).Draw(t, "frame")
	if rapid.Bool().Draw(t, "vlan") {
		return tagged(rapid.Uint16().Draw(t, "tci"), f)
	}
	return f
}

func TestSavedLearnerGoesOnAsBefore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := announce.New(guest), announce.New(guest)
		for i, n := range []int{30, 30} {
			for range rapid.IntRange(0, n).Draw(t, "frames") {
				f := drawFrame(t)
				a.Observe(f)
				a.Received(f)
				if i == 1 {
					b.Observe(f)
					b.Received(f)
				}
			}
			if i == 0 {
				p, err := cbor.Marshal(a.Save())
				require.NoError(t, err)
				var s announce.State
				require.NoError(t, cbor.Unmarshal(p, &s))
				require.NoError(t, b.Restore(s))
			}
		}
		require.Equal(t, a.Save(), b.Save())
		require.Equal(t, a.Frames(), b.Frames())
		announced(t, a) // all of it is well-formed
	})
}

func FuzzObserve(f *testing.F) {
	f.Add(arp(guest, guest, header.ARPRequest, "10.0.0.5"), arp(other, other, header.ARPReply, "10.0.0.5"))
	f.Add(ipv4(guest, "10.0.0.5"), tagged(5, ipv4(guest, "10.0.0.6")))
	f.Add(solicit(guest, "fe80::5"), advertise(guest, "fe80::5", "2001:db8::5", true))
	f.Add(tagged(5, solicit(guest, "fe80::5")), tagged(0xf005, advertise(other, "fe80::6", "fe80::5", true)))
	f.Add(ipv6(guest, "2001:db8::5", 64, 6, nil), []byte{})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		l := announce.New(guest)
		was := bytes.Clone(a)
		l.Observe(a)
		l.Received(b)
		l.Observe(b)
		l.Received(a)
		require.Equal(t, was, bytes.Clone(a), "what is observed is not changed")
		announced(t, l)
		again := announce.New(guest)
		require.NoError(t, again.Restore(l.Save()))
		require.Equal(t, l.Save(), again.Save())
	})
}
