// Package console is the virtio console (virtio 1.2, 5.3) with one port.
//
// What the guest writes leaves at the kick. What is typed is an input ([Device.Receive]);
// as much of it as the driver has no buffers for waits in a backlog of [MaxBacklog]
// bytes, which is part of the state.
//
// Not offered: several ports.
package console
