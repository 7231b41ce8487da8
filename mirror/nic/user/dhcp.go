package user

import (
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	// leaseTime is long because nothing is gained by renewing.
	leaseTime = 24 * time.Hour
	// maxLeases bounds the clients that a guest can make up.
	maxLeases = 256
)

// dhcpServer answers DHCP (RFC 2131) and BOOTP (RFC 951). It is a function of the
// messages that it has seen: a station has the address that it asks for, if that is free, and
// else the first free one, which for the first station is the first lease. Its messages come one at a
// time, under Network.tx.
type dhcpServer struct {
	net     netip.Prefix
	server  netip.Addr
	options []dhcpv4.Modifier // in every reply
	boot    []dhcpv4.Modifier
	leases  map[macAddr]netip.Addr
	taken   map[netip.Addr]bool
}

func newDHCPServer(n *Network) dhcpServer {
	c := &n.config
	d := dhcpServer{net: c.Net, server: n.gateway, leases: map[macAddr]netip.Addr{}, taken: map[netip.Addr]bool{}}
	add := func(o dhcpv4.Option) { d.options = append(d.options, dhcpv4.WithOption(o)) }
	add(dhcpv4.OptServerIdentifier(n.gateway.AsSlice()))
	add(dhcpv4.OptSubnetMask(net.CIDRMask(c.Net.Bits(), 32)))
	add(dhcpv4.OptBroadcastAddress(n.broadcast.AsSlice()))
	if !c.Restrict {
		add(dhcpv4.OptRouter(n.gateway.AsSlice()))
		add(dhcpv4.OptDNS(n.dns.AsSlice()))
	}
	if c.MTU != DefaultMTU {
		add(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{byte(c.MTU >> 8), byte(c.MTU)}))
	}
	if c.Hostname != "" {
		add(dhcpv4.OptHostName(c.Hostname))
	}
	if c.Domain != "" {
		add(dhcpv4.OptDomainName(c.Domain))
	}
	next := n.gateway
	if c.NextServer.IsValid() {
		next = c.NextServer
	}
	if c.BootFile != "" || c.NextServer.IsValid() || c.TFTP != "" {
		// Firmware looks at the fields of BOOTP, at the options, or at both.
		d.boot = append(d.boot, dhcpv4.WithServerIP(next.AsSlice()), dhcpv4.WithOption(dhcpv4.OptTFTPServerName(next.String())))
	}
	if c.BootFile != "" {
		d.boot = append(d.boot, func(m *dhcpv4.DHCPv4) { m.BootFileName = c.BootFile },
			dhcpv4.WithOption(dhcpv4.OptBootFileName(c.BootFile)))
	}
	return d
}

// answer returns the reply to a message, nil if there is none.
func (d *dhcpServer) answer(message []byte) *dhcpv4.DHCPv4 {
	m, err := dhcpv4.FromBytes(message)
	if err != nil || m.OpCode != dhcpv4.OpcodeBootRequest || m.HWType != iana.HWTypeEthernet || len(m.ClientHWAddr) != 6 {
		return nil
	}
	mac := macAddr(m.ClientHWAddr)
	if mac[0]&1 != 0 || !m.GatewayIPAddr.IsUnspecified() { // there is no relay on this network
		return nil
	}
	if id := m.ServerIdentifier(); id != nil && !id.Equal(d.server.AsSlice()) {
		return nil // meant for another server
	}
	wish, _ := netip.AddrFromSlice(m.RequestedIPAddress().To4())
	client, _ := netip.AddrFromSlice(m.ClientIPAddr.To4())
	if !wish.IsValid() && client.IsValid() && !client.IsUnspecified() {
		wish = client
	}

	var kind dhcpv4.MessageType
	switch m.MessageType() {
	case dhcpv4.MessageTypeNone, dhcpv4.MessageTypeDiscover:
		lease := d.lease(mac, wish)
		if !lease.IsValid() {
			return nil
		}
		if m.MessageType() == dhcpv4.MessageTypeDiscover {
			kind = dhcpv4.MessageTypeOffer
		}
		return d.reply(m, kind, lease)
	case dhcpv4.MessageTypeRequest:
		if lease := d.lease(mac, wish); lease.IsValid() && lease == wish {
			return d.reply(m, dhcpv4.MessageTypeAck, lease)
		}
		nak, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(dhcpv4.MessageTypeNak),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(d.server.AsSlice())))
		if err != nil {
			return nil
		}
		nak.SetBroadcast()
		return nak
	case dhcpv4.MessageTypeInform:
		return d.reply(m, dhcpv4.MessageTypeAck, netip.Addr{})
	}
	// Release and decline: there is no other station that would get the address.
	return nil
}

// lease returns the address of a station, the zero value if all are taken.
func (d *dhcpServer) lease(mac macAddr, wish netip.Addr) netip.Addr {
	if a, ok := d.leases[mac]; ok {
		return a
	}
	if len(d.leases) >= maxLeases {
		return netip.Addr{}
	}
	first, end := host(d.net, firstLeaseHost), broadcast(d.net)
	if !wish.IsValid() || wish.Less(first) || !wish.Less(end) || d.taken[wish] {
		for wish = first; d.taken[wish]; wish = wish.Next() {
		}
		if !wish.Less(end) {
			return netip.Addr{}
		}
	}
	d.leases[mac], d.taken[wish] = wish, true
	return wish
}

// reply returns a reply of the given kind (none for BOOTP) with the station's address,
// if it gets one.
func (d *dhcpServer) reply(m *dhcpv4.DHCPv4, kind dhcpv4.MessageType, lease netip.Addr) *dhcpv4.DHCPv4 {
	mods := append([]dhcpv4.Modifier{}, d.options...)
	mods = append(mods, d.boot...)
	if kind != dhcpv4.MessageTypeNone {
		mods = append(mods, dhcpv4.WithMessageType(kind))
		if lease.IsValid() {
			mods = append(mods, dhcpv4.WithLeaseTime(uint32(leaseTime/time.Second)))
		}
	}
	if lease.IsValid() {
		mods = append(mods, dhcpv4.WithYourIP(lease.AsSlice()))
	}
	r, err := dhcpv4.NewReplyFromRequest(m, mods...)
	if err != nil {
		return nil
	}
	r.ClientIPAddr = m.ClientIPAddr
	return r
}

// handleDHCP answers an IPv4 packet if it is a message to the DHCP server, and reports
// whether it was.
func (n *Network) handleDHCP(src macAddr, from netip.Addr, ip header.IPv4) bool {
	if ip.TransportProtocol() != header.UDPProtocolNumber || ip.More() || ip.FragmentOffset() != 0 {
		return false
	}
	udp := header.UDP(ip.Payload())
	if len(udp) < header.UDPMinimumSize || udp.DestinationPort() != dhcpServerPort {
		return false
	}
	size := int(udp.Length())
	if size < header.UDPMinimumSize || size > len(udp) {
		return true
	}
	r := n.dhcp.answer(udp[header.UDPMinimumSize:size])
	if r == nil {
		return true
	}
	// RFC 2131, 4.1: to the address that the client has; else to all if it asks for that
	// (or is refused), else to the address that it gets, at its station.
	to, station := netip.AddrFrom4([4]byte{255, 255, 255, 255}), broadcastMAC
	client, _ := netip.AddrFromSlice(r.ClientIPAddr.To4())
	yours, _ := netip.AddrFromSlice(r.YourIPAddr.To4())
	switch nak := r.MessageType() == dhcpv4.MessageTypeNak; {
	case !nak && n.isGuest(client) && client == from:
		to, station = client, src
		n.link.learn(client, src)
	case !nak && !r.IsBroadcast() && n.isGuest(yours):
		to, station = yours, macAddr(r.ClientHWAddr)
	}
	if n.isGuest(yours) {
		n.link.learn(yours, macAddr(r.ClientHWAddr))
	}
	payload := r.ToBytes()
	if len(payload)+header.IPv4MinimumSize+header.UDPMinimumSize <= n.config.MTU {
		n.link.send(newUDPFrame(station, n.link.mac, netip.AddrPortFrom(to, dhcpClientPort),
			netip.AddrPortFrom(n.gateway, dhcpServerPort), payload))
	}
	return true
}
