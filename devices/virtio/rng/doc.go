// Package rng is the virtio entropy device (virtio 1.2, 5.4).
//
// Entropy comes from outside the machine, so it is an input: at the driver's kick the
// device asks its [Source], and the answer arrives at a later stop
// ([Device.Complete]), for every twin of the machine the same. One question is open at a time; the
// driver's other buffers stay in the queue meanwhile.
package rng
