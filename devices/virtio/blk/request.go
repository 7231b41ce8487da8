package blk

// Op is what a [Request] asks of the disk.
type Op uint8

// The operations of virtio-blk (virtio 1.2, 5.2.6) that reach a backend.
const (
	Read        Op = iota // fill Data from the disk
	Write                 // store Data
	Flush                 // make every completed write durable
	Discard               // the range's content is no longer needed; it reads as zeros afterwards
	WriteZeroes           // the range reads as zeros afterwards
)

// Request is one disk operation, from the guest's kick to its completion.
type Request struct {
	// Tag names the request within its device: ascending from 1 since power-on, the
	// same on every replay of the guest.
	Tag uint64
	Op  Op
	// Offset and Length are the range in bytes, multiples of 512 that lie within the disk
	// (checked by the device). Both are 0 for Flush.
	Offset, Length uint64
	// Data holds Length bytes for Read (the backend fills it) and Write (a copy of the
	// guest's buffers made at the kick); nil otherwise. The device owns it and lends it
	// to the backend until the completion.
	Data []byte
	// Unmap allows WriteZeroes to deallocate the range.
	Unmap bool
}

// Status is the outcome of a request as virtio-blk reports it (virtio 1.2, 5.2.6).
type Status uint8

// The values of the status byte.
const (
	StatusOK          Status = 0
	StatusIOErr       Status = 1
	StatusUnsupported Status = 2
)

// Submitter takes requests from the device at a stop of the vCPU. Submit must not
// block and must not complete the request before it returns: the completion is an input
// of a later stop, delivered through [Device.Complete].
type Submitter interface {
	Submit(r *Request)
}
