// Package blk is the virtio block device (virtio 1.2, 5.2).
//
// A request of the driver becomes one or more [Request] for a [Submitter] at the kick,
// and is answered when their completions come in, at later stops of the vCPU
// ([Device.Complete]). Three ideas carry what lies between:
//
//   - The device keeps every request in one table, in order of arrival, until it is
//     complete. One that overlaps an earlier one, where either modifies the disk, waits in
//     the table until that has completed: the backend may carry out what it has in any
//     order.
//   - Data is copied: a write's when it is submitted, a read's when it completes. A
//     request of more than [MaxTransfer] bytes goes in parts, one after the other, and
//     one that would take the buffers over [MaxInFlight] waits, so that a guest's
//     numbers do not become the machine's memory.
//   - A reset by the driver cannot call back what the backend has. Such requests stay in
//     the table as orphans, still holding back what overlaps them, and their
//     completions reach no guest.
//
// The cache is a writeback one with FLUSH; for a driver that cannot flush, or asks for
// writethrough, the device flushes after each write before it reports it done.
//
// Not offered: SCSI commands, secure erase, zoned devices, lifetime, resizing.
package blk
