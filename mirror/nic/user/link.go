package user

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/ftvmm/ftvmm/vmm/backend"
)

const (
	// rxQueue bounds the frames that wait for the guest. Most are small; a large one
	// takes 64 KiB.
	rxQueue = 512
	// maxNeighbors bounds the addresses that the guest can make us remember.
	maxNeighbors = 256
	// maxSegment is the size in bytes of the largest IPv4 packet that the stack hands out
	// for someone else to cut up.
	maxSegment = 65535
)

// link is the stack's side of the wire, a [stack.LinkEndpoint] without addresses:
// Ethernet and ARP are done here, with a table that only the guest's own frames fill, so that the
// stack has no state machine for a hostile guest to drive.
type link struct {
	mac   macAddr // of all that we play
	mtu   uint32
	rx    chan []byte
	drops atomic.Uint64 // frames that found rx full or had nowhere to go

	mu         sync.RWMutex // guards what follows
	dispatcher stack.NetworkDispatcher
	neighbors  map[netip.Addr]macAddr
	self       netip.Addr // who asks for an unknown neighbor
}

// send queues a frame for the guest, which it takes over.
func (l *link) send(f []byte) {
	select {
	case l.rx <- f:
	default:
		l.drops.Add(1)
		backend.PutFrame(f)
	}
}

// inject hands an IPv4 packet, lent for the call, to the stack.
func (l *link) inject(packet []byte) {
	l.mu.RLock()
	d := l.dispatcher
	l.mu.RUnlock()
	if d == nil {
		return
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	d.DeliverNetworkPacket(header.IPv4ProtocolNumber, pkt)
	pkt.DecRef()
}

// learn notes which station has an address.
func (l *link) learn(a netip.Addr, m macAddr) {
	l.mu.RLock()
	known, ok := l.neighbors[a]
	full := len(l.neighbors) >= maxNeighbors
	l.mu.RUnlock()
	if ok && known == m || !ok && full {
		return
	}
	l.mu.Lock()
	l.neighbors[a] = m
	l.mu.Unlock()
}

// WritePackets implements [stack.LinkWriter]: it turns packets into frames.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		l.writePacket(pkt)
	}
	// What was dropped was lost on the wire, which a sender is not told.
	return pkts.Len(), nil
}

func (l *link) writePacket(pkt *stack.PacketBuffer) {
	ip := header.IPv4(pkt.NetworkHeader().Slice())
	size := pkt.Size()
	if len(ip) < header.IPv4MinimumSize || size > maxSegment || len(l.rx) == cap(l.rx) {
		l.drops.Add(1)
		return
	}
	dst := netip.AddrFrom4(ip.DestinationAddress().As4())
	l.mu.RLock()
	mac, ok := l.neighbors[dst]
	l.mu.RUnlock()
	if !ok {
		// The stack sends again what matters; by then the answer is here.
		l.drops.Add(1)
		if !dst.IsMulticast() {
			l.send(l.arp(header.ARPRequest, broadcastMAC, macAddr{}, dst, l.self))
		}
		return
	}
	f := newFrame(mac, l.mac, uint16(header.IPv4ProtocolNumber), size)
	n := packetAt
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		n += copy(f[n:], b[skip:])
		skip = 0
	}
	if g := pkt.GSOOptions; g.Type == stack.GSOTCPv4 && g.NeedsCsum {
		headers := header.EthernetMinimumSize + len(ip) + len(pkt.TransportHeader().Slice())
		f[hdrFlags] = flagNeedsCsum
		binary.LittleEndian.PutUint16(f[hdrCsumStart:], uint16(header.EthernetMinimumSize+len(ip)))
		binary.LittleEndian.PutUint16(f[hdrCsumOffset:], g.CsumOffset)
		if size-(headers-header.EthernetMinimumSize) > int(g.MSS) {
			f[hdrGSOType] = gsoTCPv4
			binary.LittleEndian.PutUint16(f[hdrHdrLen:], uint16(headers))
			binary.LittleEndian.PutUint16(f[hdrGSOSize:], g.MSS)
		}
	}
	l.send(f)
}

// arp returns a frame with an ARP message about our address self to a station.
func (l *link) arp(op header.ARPOp, to, target macAddr, targetIP, self netip.Addr) []byte {
	f := newFrame(to, l.mac, uint16(header.ARPProtocolNumber), header.ARPSize)
	a := header.ARP(f[packetAt:])
	a.SetIPv4OverEthernet()
	a.SetOp(op)
	copy(a.HardwareAddressSender(), l.mac[:])
	copy(a.ProtocolAddressSender(), self.AsSlice())
	copy(a.HardwareAddressTarget(), target[:])
	copy(a.ProtocolAddressTarget(), targetIP.AsSlice())
	return f
}

// GSOMaxSize implements [stack.GSOEndpoint], in bytes.
func (*link) GSOMaxSize() uint32 { return maxSegment }

// SupportedGSO implements [stack.GSOEndpoint]: the stack may send large segments with
// partial checksums whatever the guest takes; [finish] does the rest.
func (*link) SupportedGSO() stack.SupportedGSO { return stack.HostGSOSupported }

// Capabilities implements [stack.NetworkLinkEndpoint]. Checksums of what the guest sends
// are not verified: its device does not compute those that it leaves to us, and nothing gets
// damaged in between.
func (*link) Capabilities() stack.LinkEndpointCapabilities { return stack.CapabilityRXChecksumOffload }

// Attach implements [stack.NetworkLinkEndpoint].
func (l *link) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	l.dispatcher = d
	l.mu.Unlock()
}

// IsAttached implements [stack.NetworkLinkEndpoint].
func (l *link) IsAttached() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.dispatcher != nil
}

// The rest of [stack.NetworkLinkEndpoint] says that there is no link layer here.
func (l *link) MTU() uint32                           { return l.mtu }
func (*link) SetMTU(uint32)                           {}
func (*link) MaxHeaderLength() uint16                 { return 0 }
func (*link) LinkAddress() tcpip.LinkAddress          { return "" }
func (*link) SetLinkAddress(tcpip.LinkAddress)        {}
func (*link) Wait()                                   {}
func (*link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (*link) AddHeader(*stack.PacketBuffer)           {}
func (*link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (*link) Close()                                  {}
func (*link) SetOnCloseAction(func())                 {}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

func toStack(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }
