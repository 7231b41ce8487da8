package selftest

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	vnet "github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// The network of the guest "net" is one host, which is here: no socket, no privilege. It sends datagrams
// to the guest's echo service, each as soon as the one before has come back or was given up, and then the
// one that ends the guest.
const (
	netCmdline = "ip=10.0.2.15/24"

	echoPort    = 7
	discardPort = 9
	peerPort    = 2007
	peerEchoes  = 60
	maxPayload  = 1400
	peerAgain   = 20 * time.Millisecond
	// virtio_net_hdr_v1.num_buffers (virtio 1.2, 5.1.6)
	numBuffersAt = 10
	packetAt     = vnet.HeaderSize + header.EthernetMinimumSize
	payloadAt    = packetAt + header.IPv4MinimumSize + header.UDPMinimumSize
)

var (
	peerGuestMAC = [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	peerMAC      = [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x57}
	peerAddr     = tcpip.AddrFrom4([4]byte{10, 0, 2, 2})
	guestAddr    = tcpip.AddrFrom4([4]byte{10, 0, 2, 15})
)

// peer is the other end of the wire.
type peer struct {
	rng    *rand.Rand
	answer chan []byte // ARP answers; a full one loses, as a wire does
	echoed chan uint32 // numbers of datagrams that came back
	done   chan struct{}
	wg     sync.WaitGroup
	once   sync.Once
}

func newPeer(seed uint64) *peer {
	return &peer{
		rng: rand.New(rand.NewPCG(seed, 2)), answer: make(chan []byte, 8), echoed: make(chan uint32, 8), done: make(chan struct{}),
	}
}

// Offloads, SetOffloads: this network has none.
func (p *peer) Offloads() vnet.Offloads     { return 0 }
func (p *peer) SetOffloads(o vnet.Offloads) {}

// Start begins to send.
func (p *peer) Start(deliver func(frame []byte), _ func(up bool)) {
	p.wg.Go(func() { p.talk(deliver) })
}

// Close ends it.
func (p *peer) Close() error {
	p.once.Do(func() { close(p.done) })
	p.wg.Wait()
	return nil
}

// talk sends until it is closed.
func (p *peer) talk(deliver func([]byte)) {
	t := time.NewTimer(0) // to send again
	defer t.Stop()
	next := uint32(1)
	for {
		select {
		case <-p.done:
			return
		case f := <-p.answer:
			deliver(f)
			continue
		case n := <-p.echoed:
			if n != next {
				continue // one that was given up
			}
			next++
		case <-t.C:
		}
		t.Reset(peerAgain)
		if next > peerEchoes {
			deliver(datagram(discardPort, []byte("quit")))
			continue
		}
		payload := make([]byte, 4+p.rng.IntN(maxPayload))
		for i := range payload {
			payload[i] = byte(p.rng.Uint32())
		}
		binary.BigEndian.PutUint32(payload, next)
		deliver(datagram(echoPort, payload))
	}
}

// Transmit takes what the guest sends.
func (p *peer) Transmit(frame []byte) {
	if len(frame) < packetAt {
		return
	}
	b := frame[packetAt:]
	switch header.Ethernet(frame[vnet.HeaderSize:]).Type() {
	case header.ARPProtocolNumber:
		arp := header.ARP(b)
		if !arp.IsValid() || arp.Op() != header.ARPRequest || tcpip.AddrFromSlice(arp.ProtocolAddressTarget()) != peerAddr {
			return
		}
		f := newFrame(header.ARPProtocolNumber, header.ARPSize)
		a := header.ARP(f[packetAt:])
		a.SetIPv4OverEthernet()
		a.SetOp(header.ARPReply)
		copy(a.HardwareAddressSender(), peerMAC[:])
		copy(a.ProtocolAddressSender(), peerAddr.AsSlice())
		copy(a.HardwareAddressTarget(), peerGuestMAC[:])
		copy(a.ProtocolAddressTarget(), guestAddr.AsSlice())
		select {
		case p.answer <- f:
		default:
		}
	case header.IPv4ProtocolNumber:
		ip := header.IPv4(b)
		if !ip.IsValid(len(b)) || ip.TransportProtocol() != header.UDPProtocolNumber {
			return
		}
		u := header.UDP(ip.Payload())
		if len(u) < header.UDPMinimumSize+4 || u.SourcePort() != echoPort {
			return
		}
		select {
		case p.echoed <- binary.BigEndian.Uint32(u.Payload()):
		default:
		}
	}
}

// newFrame returns a frame to the guest with room for n bytes of packet.
func newFrame(kind tcpip.NetworkProtocolNumber, n int) []byte {
	f := backend.GetFrame(packetAt + n)
	clear(f)
	binary.LittleEndian.PutUint16(f[numBuffersAt:], 1)
	header.Ethernet(f[vnet.HeaderSize:]).Encode(&header.EthernetFields{
		SrcAddr: tcpip.LinkAddress(peerMAC[:]), DstAddr: tcpip.LinkAddress(peerGuestMAC[:]), Type: kind,
	})
	return f
}

// datagram returns a frame with a UDP datagram to a port of the guest. It has no checksum (RFC 768: 0).
func datagram(to uint16, payload []byte) []byte {
	f := newFrame(header.IPv4ProtocolNumber, payloadAt-packetAt+len(payload))
	ip := header.IPv4(f[packetAt:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(f) - packetAt), TTL: 64, Protocol: uint8(header.UDPProtocolNumber), SrcAddr: peerAddr, DstAddr: guestAddr,
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.UDP(ip.Payload()).Encode(&header.UDPFields{SrcPort: peerPort, DstPort: to, Length: uint16(header.UDPMinimumSize + len(payload))})
	copy(f[payloadAt:], payload)
	return f
}
