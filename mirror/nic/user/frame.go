package user

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	vnet "github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6): offsets and values.
const (
	hdrFlags      = 0
	hdrGSOType    = 1
	hdrHdrLen     = 2
	hdrGSOSize    = 4
	hdrCsumStart  = 6
	hdrCsumOffset = 8
	hdrNumBuffers = 10

	flagNeedsCsum = 1
	gsoNone       = 0
	gsoTCPv4      = 1
)

// Offsets in a frame.
const (
	etherAt  = vnet.HeaderSize
	packetAt = etherAt + header.EthernetMinimumSize
)

type macAddr [6]byte

var broadcastMAC = macAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// newFrame returns a frame with room for n bytes of packet, its headers filled in.
func newFrame(dst, src macAddr, etherType uint16, n int) []byte {
	f := backend.GetFrame(packetAt + n)
	clear(f[:vnet.HeaderSize])
	binary.LittleEndian.PutUint16(f[hdrNumBuffers:], 1)
	copy(f[etherAt:], dst[:])
	copy(f[etherAt+6:], src[:])
	binary.BigEndian.PutUint16(f[etherAt+12:], etherType)
	return f
}

// newUDPFrame returns a frame with a UDP datagram.
func newUDPFrame(dstMAC, srcMAC macAddr, dst, src netip.AddrPort, payload []byte) []byte {
	const headers = header.IPv4MinimumSize + header.UDPMinimumSize
	f := newFrame(dstMAC, srcMAC, uint16(header.IPv4ProtocolNumber), headers+len(payload))
	ip := header.IPv4(f[packetAt:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(headers + len(payload)),
		TTL:         64,
		Protocol:    uint8(header.UDPProtocolNumber),
		SrcAddr:     toStack(src.Addr()),
		DstAddr:     toStack(dst.Addr()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	udp := header.UDP(ip[header.IPv4MinimumSize:])
	udp.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(header.UDPMinimumSize + len(payload))})
	copy(udp[header.UDPMinimumSize:], payload)
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, toStack(src.Addr()), toStack(dst.Addr()), uint16(len(udp)))
	sum = ^checksum.Checksum(udp, sum)
	if sum == 0 {
		sum = 0xffff // 0 means that there is none (RFC 768)
	}
	udp.SetChecksum(sum)
	return f
}

// finish does for a frame of the stack what the guest has not agreed to do itself, and
// calls emit with each frame that results. It takes the frame over, as emit does with those.
func finish(f []byte, accepted vnet.Offloads, emit func([]byte)) {
	if f[hdrFlags]&flagNeedsCsum == 0 {
		emit(f)
		return
	}
	tso := f[hdrGSOType] == gsoTCPv4
	switch {
	case tso && accepted&(vnet.RxTSO4|vnet.RxChecksum) != vnet.RxTSO4|vnet.RxChecksum:
		segment(f, emit)
		backend.PutFrame(f)
		return
	case accepted&vnet.RxChecksum == 0:
		start := int(binary.LittleEndian.Uint16(f[hdrCsumStart:])) + etherAt
		at := start + int(binary.LittleEndian.Uint16(f[hdrCsumOffset:]))
		// The field holds the sum of the pseudo-header, and counts.
		binary.BigEndian.PutUint16(f[at:], ^checksum.Checksum(f[start:], 0))
		clear(f[:hdrNumBuffers])
	}
	emit(f)
}

// segment cuts a frame with a large TCP segment of our own stack as a network card would.
func segment(f []byte, emit func([]byte)) {
	mss := int(binary.LittleEndian.Uint16(f[hdrGSOSize:]))
	ip := header.IPv4(f[packetAt:])
	ipLen := int(ip.HeaderLength())
	tcp := header.TCP(ip[ipLen:])
	headers := ipLen + int(tcp.DataOffset())
	payload := f[packetAt+headers:]
	src, dst := ip.SourceAddress(), ip.DestinationAddress()
	seq, id, flags := tcp.SequenceNumber(), ip.ID(), tcp.Flags()

	for i := 0; len(payload) > 0 && mss > 0; i++ {
		n := min(mss, len(payload))
		s := backend.GetFrame(packetAt + headers + n)
		copy(s, f[:packetAt+headers])
		copy(s[packetAt+headers:], payload[:n])
		payload = payload[n:]
		clear(s[:hdrNumBuffers])

		sip := header.IPv4(s[packetAt:])
		sip.SetTotalLength(uint16(headers + n))
		sip.SetID(id + uint16(i))
		sip.SetChecksum(0)
		sip.SetChecksum(^sip.CalculateChecksum())
		stcp := header.TCP(sip[ipLen:])
		stcp.SetSequenceNumber(seq)
		seq += uint32(n)
		if len(payload) > 0 {
			stcp.SetFlags(uint8(flags &^ (header.TCPFlagFin | header.TCPFlagPsh)))
		}
		stcp.SetChecksum(0)
		sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(len(stcp)))
		stcp.SetChecksum(^checksum.Checksum(stcp, sum))
		emit(s)
	}
}
