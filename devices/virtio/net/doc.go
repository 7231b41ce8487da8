// Package net is the virtio network device (virtio 1.2, 5.1): one pair of queues and a
// control queue.
//
// A frame crosses the device's boundary with struct virtio_net_hdr_v1 in front, whatever
// the driver has negotiated; the device adapts the header and lets nothing through, in
// either direction, that the driver or the network has not agreed to.
//
//   - Transmission completes at the kick: the frame is gathered into one buffer and
//     handed to the [Transmitter], so it needs no input later.
//   - Reception is an input ([Device.Receive]). A frame that finds no buffers of the
//     driver waits in a backlog of [MaxBacklog] frames, which is part of the state;
//     the driver's next kick delivers it.
//   - What a driver does wrong costs it the frame (and counts in [Counters]) or, where
//     the ring itself is wrong, the device.
//
// Not offered: several queue pairs, RSS, VLAN filtering, UDP offloads.
package net
