// Package virtio is what all virtio devices share: the split virtqueue and the PCI
// transport (virtio 1.2, 2.7 and 4.1). The devices are in the packages below.
//
// Three ideas carry it:
//
//   - A device type implements [Device], a handful of methods, and knows nothing of
//     registers, capabilities and vectors: those are the [Transport]'s. The two are
//     joined once, by [New]. All devices have the same shape: New(config, outside), the
//     calls that bring inputs in, Reissue for what the outside has to be told again after a
//     restore, Save, Restore and Reset, which cover the transport too.
//   - A [Queue] hands out descriptor chains as [Chain], fully parsed, checked and
//     resolved to ranges of guest RAM, in storage of the caller that is used again and
//     again. Nothing is allocated on the way of a request.
//   - Whatever the driver puts into a ring either means something or breaks the
//     device: a chain that loops or leaves RAM, an index that runs away. A broken device
//     stops until the driver resets it, and tells a modern driver so
//     (DEVICE_NEEDS_RESET, 2.1.2).
//
// A transport can be modern only or transitional: then it also answers at BAR 0 as a
// legacy device (4.1.4.8), for drivers and firmware from before version 1.
//
// Not offered: packed virtqueues, a reset of single queues, shared memory, an IOMMU.
package virtio
