// Package disk keeps a guest's disk in a raw image: a regular file or a block device.
//
// Requests are carried out by a pool of goroutines that grows on demand to
// [DefaultWorkers]: each makes one blocking system call at a time, as the thread pools of other
// VMMs do, and calls the completion itself, so that a request costs one hand-off on its way in
// and none on its way out.
//
// Three ideas carry the rest:
//
//   - Direct I/O where the file system can do it, so that a completed write has reached the
//     device's queue and the host's page cache does not hold what the guest caches itself.
//     O_DIRECT wants offsets, lengths and buffers aligned; what is not goes through an
//     aligned bounce buffer, and a write smaller than the alignment reads its neighbours first
//     with all other writes held off. The end of an image whose size is no multiple of the
//     alignment goes through the page cache, always, so that the two never meet in a page.
//   - Zero means zero. A discarded range reads as zeros afterwards, on every kind of
//     storage: two replicas of a disk must not differ in what the guest sees. Only operations
//     that promise that are used (fallocate, on block devices too), and where there is none the
//     zeros are written.
//   - One writer. An image is locked for as long as it is open, in the way that QEMU's
//     file driver respects, and a lost flush is never forgotten: after fdatasync has failed
//     once the kernel has dropped the dirty pages, so that every later Flush fails too.
package disk
