package blk

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"

	"github.com/ftvmm/ftvmm/devices/virtio"
)

// Limits of a disk.
const (
	// SectorSize is the unit of virtio-blk addresses and capacities, in bytes.
	SectorSize = 512
	// MaxQueues bounds the queues of one disk.
	MaxQueues = 8
	// MaxTransfer bounds the data of one Request, in bytes.
	MaxTransfer = 4 << 20
	// MaxInFlight bounds the data buffers with the backend, in bytes: none is submitted while
	// they hold as much.
	MaxInFlight = 64 << 20
	// MaxID is the length of the answer to VIRTIO_BLK_T_GET_ID.
	MaxID = 20

	maxDiscard     = 1 << 22 // sectors of one Discard: 2 GiB
	maxWriteZeroes = 1 << 17 // sectors of one WriteZeroes: 64 MiB
)

// Feature bits (virtio 1.2, 5.2.3).
const (
	featureSegMax      uint64 = 1 << 2
	featureReadOnly    uint64 = 1 << 5
	featureBlockSize   uint64 = 1 << 6
	featureFlush       uint64 = 1 << 9
	featureTopology    uint64 = 1 << 10
	featureConfigWCE   uint64 = 1 << 11
	featureMultiQueue  uint64 = 1 << 12
	featureDiscard     uint64 = 1 << 13
	featureWriteZeroes uint64 = 1 << 14
)

// Identity (virtio 1.2, 5.2.1; PCI class "SCSI storage controller", which is what guests
// know this device by).
const (
	deviceType = 2
	pciClass   = 0x010000
)

// Configuration structure (5.2.4): offsets.
const (
	configCapacity       = 0 // in sectors
	configSegMax         = 12
	configBlockSize      = 20
	configPhysicalExp    = 24 // log2 of logical blocks in a physical one
	configMinIO          = 26 // in logical blocks
	configWriteback      = 32
	configQueues         = 34
	configMaxDiscard     = 36
	configMaxDiscardSeg  = 40
	configDiscardAlign   = 44 // in sectors
	configMaxZeroes      = 48
	configMaxZeroesSeg   = 52
	configZeroesMayUnmap = 56
	configSize           = 60
)

// Request layout (5.2.6): a header, data, a status byte at the very end.
const (
	headerSize   = 16
	headerType   = 0
	headerSector = 8
	statusSize   = 1

	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13

	rangeSize  = 16 // struct virtio_blk_discard_write_zeroes
	rangeCount = 8  // offset of the number of sectors
	rangeFlags = 12
	rangeUnmap = 1 << 0
)

// Config is what a disk is.
type Config struct {
	Capacity  uint64 // bytes, a multiple of SectorSize
	BlockSize uint32 // the unit of efficient I/O in bytes, a power of two from SectorSize to 64 KiB; 0 means SectorSize
	ReadOnly  bool
	Discard   bool   // Discard and WriteZeroes deallocate
	ID        string // the first MaxID bytes answer VIRTIO_BLK_T_GET_ID
	Queues    int    // 1 to MaxQueues; 0 means 1
}

// request is one request of the driver.
type request struct {
	chain  virtio.Chain
	queue  int
	op     Op
	offset uint64 // in bytes, like length: the whole of what the driver asks for
	length uint64
	done   uint64 // bytes of the parts that are complete
	unmap  bool
	orphan bool    // the driver has reset the device since
	buffer []byte  // holds the data of a part
	part   Request // what the backend has; its Tag is 0 while the request is held back
}

func (r *request) held() bool { return r.part.Tag == 0 }

func (o Op) modifies() bool { return o == Write || o == Discard || o == WriteZeroes }

func (o Op) moves() bool { return o == Read || o == Write }

// conflicts says whether the order of two requests matters.
func (r *request) conflicts(s *request) bool {
	return (r.op.modifies() || s.op.modifies()) && r.offset < s.offset+s.length && s.offset < r.offset+r.length
}

// Device is a virtio disk.
type Device struct {
	cfg Config
	out Submitter
	t   *virtio.Transport

	config  [configSize]byte
	id      [MaxID]byte
	nextTag uint64
	table   []*request // in order of arrival
	held    int        // how many of them wait
	bytes   uint64     // of buffers in the table
	limit   int        // of len(table)

	spare   []*request
	buffers pool
	scratch [headerSize + rangeSize]byte
}

// New returns a disk without a transport: see [virtio.New]. It panics on a
// configuration outside its limits, a defect of the machine's construction.
func New(cfg Config, out Submitter) *Device {
	cfg.Queues = max(cfg.Queues, 1)
	if cfg.BlockSize == 0 {
		cfg.BlockSize = SectorSize
	}
	if cfg.Capacity%SectorSize != 0 || cfg.Capacity > math.MaxInt64 || cfg.Queues > MaxQueues ||
		cfg.BlockSize < SectorSize || cfg.BlockSize > 64<<10 || bits.OnesCount32(cfg.BlockSize) != 1 {
		panic(fmt.Sprintf("blk: cannot build a disk with %+v", cfg))
	}
	d := &Device{cfg: cfg, out: out, nextTag: 1}
	copy(d.id[:], cfg.ID)
	le := binary.LittleEndian
	c := d.config[:]
	perBlock := cfg.BlockSize / SectorSize
	le.PutUint64(c[configCapacity:], cfg.Capacity/SectorSize)
	le.PutUint32(c[configBlockSize:], SectorSize)
	c[configPhysicalExp] = uint8(bits.TrailingZeros32(perBlock))
	le.PutUint16(c[configMinIO:], uint16(perBlock))
	le.PutUint16(c[configQueues:], uint16(cfg.Queues))
	if cfg.Discard {
		le.PutUint32(c[configMaxDiscard:], maxDiscard)
		le.PutUint32(c[configMaxDiscardSeg:], 1)
		le.PutUint32(c[configDiscardAlign:], perBlock)
		c[configZeroesMayUnmap] = 1
	}
	le.PutUint32(c[configMaxZeroes:], maxWriteZeroes)
	le.PutUint32(c[configMaxZeroesSeg:], 1)
	return d
}

// Info implements [virtio.Device].
func (d *Device) Info() virtio.Info {
	f := featureSegMax | featureBlockSize | featureFlush | featureTopology | featureConfigWCE
	if d.cfg.ReadOnly {
		f |= featureReadOnly
	} else {
		f |= featureWriteZeroes
		if d.cfg.Discard {
			f |= featureDiscard
		}
	}
	if d.cfg.Queues > 1 {
		f |= featureMultiQueue
	}
	return virtio.Info{Type: deviceType, Class: pciClass, Features: f, Queues: d.cfg.Queues}
}

// Attach implements [virtio.Device].
func (d *Device) Attach(t *virtio.Transport) {
	d.t = t
	d.limit = d.cfg.Queues * t.Queue(0).Max()
	// Header and status take two of the buffers that a chain may have.
	binary.LittleEndian.PutUint32(d.config[configSegMax:], uint32(max(t.Queue(0).Max()-2, 1)))
}

// Negotiate implements [virtio.Device].
func (d *Device) Negotiate(uint64) bool { return true }

// Config implements [virtio.Device].
func (d *Device) Config() []byte { return d.config[:] }

// WriteConfig implements [virtio.Device]: the cache mode is the only thing to write.
func (d *Device) WriteConfig(off int, p []byte) {
	if at := configWriteback - off; at >= 0 && at < len(p) && d.t.Has(featureConfigWCE) {
		d.config[configWriteback] = p[at] & 1
	}
}

// writethrough says whether a write must be durable when it is reported done (5.2.6.2).
func (d *Device) writethrough() bool {
	if d.t.Has(featureConfigWCE) {
		return d.config[configWriteback] == 0
	}
	return !d.t.Has(featureFlush)
}

// Clear implements [virtio.Device].
func (d *Device) Clear() {
	d.config[configWriteback] = 1
	kept := d.table[:0]
	for _, r := range d.table {
		if r.held() {
			d.release(r)
			continue
		}
		r.orphan = true
		kept = append(kept, r)
	}
	clear(d.table[len(kept):])
	d.table, d.held = kept, 0
}

// Kick implements [virtio.Device].
func (d *Device) Kick(queue int) {
	q := d.t.Queue(queue)
	// The table is full only with orphans in it: a queue hands out no more chains than
	// it has descriptors. Complete looks at the queues again.
	for len(d.table) < d.limit {
		r := d.take()
		if !q.Next(&r.chain) {
			d.release(r)
			break
		}
		r.queue = queue
		if status, now := d.parse(q, r); now {
			d.finish(r, status)
			continue
		}
		d.table = append(d.table, r)
		d.held++
		if d.ready(len(d.table) - 1) {
			d.submit(r)
		}
	}
	q.Interrupt()
}

// parse reads the driver's request into r. When now is true, the request is done, with the
// status returned.
func (d *Device) parse(q *virtio.Queue, r *request) (status Status, now bool) {
	c := &r.chain
	if c.OutLen < headerSize || c.InLen < statusSize {
		return StatusIOErr, true
	}
	header := d.scratch[:headerSize]
	q.Read(c.Out, 0, header)
	sector := binary.LittleEndian.Uint64(header[headerSector:])
	out, in := c.OutLen-headerSize, c.InLen-statusSize
	switch binary.LittleEndian.Uint32(header[headerType:]) {
	case typeIn:
		if out != 0 {
			return StatusIOErr, true
		}
		return d.setRange(r, Read, sector, in)
	case typeOut:
		if in != 0 || d.cfg.ReadOnly {
			return StatusIOErr, true
		}
		return d.setRange(r, Write, sector, out)
	case typeFlush:
		r.op = Flush
		return 0, false
	case typeGetID:
		q.Write(c.In, 0, d.id[:min(in, MaxID)])
		return StatusOK, true
	case typeDiscard:
		if d.cfg.Discard {
			return d.parseRange(q, r, Discard, maxDiscard)
		}
	case typeWriteZeroes:
		return d.parseRange(q, r, WriteZeroes, maxWriteZeroes)
	}
	return StatusUnsupported, true
}

// parseRange reads the range of a Discard or WriteZeroes of at most limit sectors.
func (d *Device) parseRange(q *virtio.Queue, r *request, op Op, limit uint32) (status Status, now bool) {
	if d.cfg.ReadOnly || r.chain.OutLen != headerSize+rangeSize || r.chain.InLen != statusSize {
		return StatusIOErr, true
	}
	p := d.scratch[headerSize:]
	q.Read(r.chain.Out, headerSize, p)
	sector := binary.LittleEndian.Uint64(p)
	count := binary.LittleEndian.Uint32(p[rangeCount:])
	flags := binary.LittleEndian.Uint32(p[rangeFlags:])
	if flags&^rangeUnmap != 0 || (op == Discard && flags != 0) {
		return StatusUnsupported, true // 5.2.6.2
	}
	if count > limit {
		return StatusIOErr, true
	}
	r.unmap = flags&rangeUnmap != 0
	return d.setRange(r, op, sector, uint64(count)*SectorSize)
}

// setRange makes r an operation on length bytes from sector on, which must be on the disk.
func (d *Device) setRange(r *request, op Op, sector, length uint64) (status Status, now bool) {
	sectors := d.cfg.Capacity / SectorSize
	if length%SectorSize != 0 || sector > sectors || length/SectorSize > sectors-sector {
		return StatusIOErr, true
	}
	if length == 0 {
		return StatusOK, true
	}
	r.op, r.offset, r.length = op, sector*SectorSize, length
	return 0, false
}

// ready says whether the request at index i of the table may go to the backend.
func (d *Device) ready(i int) bool {
	r := d.table[i]
	if r.op.moves() && d.bytes >= MaxInFlight {
		return false
	}
	for _, s := range d.table[:i] {
		if r.conflicts(s) {
			return false
		}
	}
	return true
}

// submit gives the next part of r to the backend.
func (d *Device) submit(r *request) {
	if r.held() {
		d.held--
	}
	r.part = Request{Tag: d.nextTag, Op: r.op, Offset: r.offset + r.done, Length: r.length - r.done, Unmap: r.unmap}
	d.nextTag++
	if r.op.moves() {
		r.part.Length = min(r.part.Length, MaxTransfer)
		if r.buffer == nil {
			d.lend(r, r.part.Length)
		}
		r.part.Data = r.buffer[:r.part.Length]
		if r.op == Write {
			d.t.Queue(r.queue).Read(r.chain.Out, headerSize+r.done, r.part.Data)
		}
	}
	d.out.Submit(&r.part)
}

// Complete is an input: the backend has finished the request with this tag. It fails on a tag
// that the backend does not have.
func (d *Device) Complete(tag uint64, status Status) error {
	i := d.find(tag)
	if i < 0 {
		return fmt.Errorf("blk: no request with tag %d is in flight", tag)
	}
	r := d.table[i]
	q := d.t.Queue(r.queue)
	answer := !r.orphan && q.Live()
	if answer && status == StatusOK && d.goesOn(q, r) {
		return nil
	}
	full := len(d.table) == d.limit
	copy(d.table[i:], d.table[i+1:])
	d.table[len(d.table)-1] = nil
	d.table = d.table[:len(d.table)-1]
	if answer {
		d.finish(r, status)
		q.Interrupt()
	} else {
		d.release(r)
	}
	for i := 0; d.held > 0 && i < len(d.table); i++ {
		if r := d.table[i]; r.held() && d.ready(i) {
			d.submit(r)
		}
	}
	for n := 0; full && n < d.cfg.Queues; n++ {
		d.Kick(n)
	}
	return nil
}

// goesOn takes in a part of r that went well, and submits the next if there is one.
func (d *Device) goesOn(q *virtio.Queue, r *request) bool {
	if r.part.Op == Flush {
		return false
	}
	if r.op == Read {
		q.Write(r.chain.In, r.done, r.part.Data)
	}
	r.done += r.part.Length
	switch {
	case r.done < r.length:
		d.submit(r)
	case r.op.modifies() && d.writethrough():
		r.part = Request{Tag: d.nextTag, Op: Flush}
		d.nextTag++
		d.out.Submit(&r.part)
	default:
		return false
	}
	return true
}

// find returns the index of the request that the backend knows by tag, or -1.
func (d *Device) find(tag uint64) int {
	for i, r := range d.table {
		if tag != 0 && r.part.Tag == tag {
			return i
		}
	}
	return -1
}

// finish answers a request of the driver.
func (d *Device) finish(r *request, status Status) {
	q, c := d.t.Queue(r.queue), &r.chain
	var written uint64
	if c.InLen >= statusSize {
		d.scratch[0] = byte(status)
		q.Write(c.In, c.InLen-statusSize, d.scratch[:statusSize])
		// The length counts from the first byte (2.7.8.2), and what should be in front
		// of the status is not there after a failure.
		if status == StatusOK || c.InLen == statusSize {
			written = min(c.InLen, math.MaxUint32)
		}
	}
	q.Push(c.Head, uint32(written))
	d.release(r)
}

// Reissue submits again, in order of tag, every request that the backend has or had: after
// Restore, when the backend is a new one.
func (d *Device) Reissue() {
	for last := uint64(0); ; {
		var next *request
		for _, r := range d.table {
			if r.part.Tag > last && (next == nil || r.part.Tag < next.part.Tag) {
				next = r
			}
		}
		if next == nil {
			return
		}
		last = next.part.Tag
		d.out.Submit(&next.part)
	}
}

// InFlight returns how many requests the backend has.
func (d *Device) InFlight() int { return len(d.table) - d.held }

// take returns an empty request.
func (d *Device) take() *request {
	if n := len(d.spare); n > 0 {
		r := d.spare[n-1]
		d.spare = d.spare[:n-1]
		return r
	}
	return &request{}
}

// release puts a request away that is in no table.
func (d *Device) release(r *request) {
	if r.buffer != nil {
		d.bytes -= uint64(len(r.buffer))
		d.buffers.put(r.buffer)
	}
	*r = request{chain: r.chain}
	d.spare = append(d.spare, r)
}

// lend gives r a buffer of at least n bytes.
func (d *Device) lend(r *request, n uint64) {
	r.buffer = d.buffers.get(n)
	d.bytes += uint64(len(r.buffer))
}
