package net

// HeaderSize is the size in bytes of struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6),
// which precedes every frame that crosses the boundary of the device, in both
// directions and for every guest: a legacy guest's 10-byte header is widened by the device.
const HeaderSize = 12

// MaxFrame bounds a frame with its header, in bytes: a 64 KiB segment to be cut up by
// the receiver, its Ethernet header and a VLAN tag, and the virtio header.
const MaxFrame = HeaderSize + 65535 + 18

// Offloads is a set of things that a network backend can do for the guest.
type Offloads uint32

// The offloads. Tx ones are about frames from the guest, Rx ones about frames to it.
const (
	TxChecksum Offloads = 1 << iota // completes a partial checksum
	TxTSO4                          // cuts TCP over IPv4 segments
	TxTSO6                          // cuts TCP over IPv6 segments
	RxChecksum                      // the guest takes frames with a partial checksum
	RxTSO4                          // the guest takes large TCP over IPv4 segments
	RxTSO6                          // the guest takes large TCP over IPv6 segments
)

// Transmitter takes what the guest sends, at a stop of the vCPU.
type Transmitter interface {
	// Transmit takes a frame, header first. The buffer is lent for the call.
	Transmit(frame []byte)
	// SetOffloads tells which Rx offloads the driver has accepted, at feature
	// negotiation and when it changes them.
	SetOffloads(o Offloads)
}
