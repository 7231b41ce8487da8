package blk_test

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/blk"
	"github.com/ftvmm/ftvmm/devices/virtio/internal/virtiotest"
)

const (
	in, out, flush, scsi, getID, discard, writeZeroes = 0, 1, 4, 2, 8, 11, 13

	featureFlush, featureConfigWCE = 1 << 9, 1 << 11
	everything                     = ^uint64(0)
)

// disk is a backend that does what it is told when it is told to: requests wait until the
// test carries them out.
type disk struct {
	content []byte
	waiting []*blk.Request
	log     []blk.Request // all that was ever submitted, without data
}

func (d *disk) Submit(r *blk.Request) {
	d.waiting = append(d.waiting, r)
	l := *r
	l.Data = nil
	d.log = append(d.log, l)
}

// carryOut performs the i-th waiting request and returns its tag.
func (d *disk) carryOut(i int) uint64 {
	r := d.waiting[i]
	d.waiting = slices.Delete(d.waiting, i, i+1)
	switch r.Op {
	case blk.Read:
		copy(r.Data, d.content[r.Offset:r.Offset+r.Length])
	case blk.Write:
		copy(d.content[r.Offset:], r.Data)
	case blk.Discard, blk.WriteZeroes:
		clear(d.content[r.Offset : r.Offset+r.Length])
	}
	return r.Tag
}

type guest struct {
	*virtiotest.Driver
	t    testing.TB
	disk *disk
	dev  *blk.Device
	cfg  blk.Config
	opts virtio.Options
}

func newGuest(t testing.TB, cfg blk.Config, opts virtio.Options) *guest {
	g := &guest{t: t, disk: &disk{content: make([]byte, cfg.Capacity)}, cfg: cfg, opts: opts}
	for i := range g.disk.content {
		g.disk.content[i] = byte(i/512 + i)
	}
	g.dev = blk.New(cfg, g.disk)
	g.Driver = virtiotest.New(t, g.dev, opts)
	return g
}

// move replaces the device by another one in the same state, as a twin would.
func (g *guest) move() {
	s := g.dev.Save()
	g.dev = blk.New(g.cfg, g.disk)
	g.Plug(g.dev, g.opts)
	require.NoError(g.t, g.dev.Restore(virtiotest.Encoded(g.t, s)))
	require.Equal(g.t, s, g.dev.Save())
	g.disk.waiting = nil
	g.dev.Reissue()
}

// header returns the address of a request header.
func (g *guest) header(kind uint32, sector uint64) uint64 {
	var h [16]byte
	binary.LittleEndian.PutUint32(h[:], kind)
	binary.LittleEndian.PutUint64(h[8:], sector)
	return g.Put(h[:])
}

// request is one that the driver has made.
type request struct {
	head         uint16
	data, status uint64
}

// statusUnset is no status that a device writes.
const statusUnset = 0xee

// ask puts a request in queue q, with n bytes of data at a fresh address.
func (g *guest) ask(q int, kind uint32, sector uint64, data []byte, n int) request {
	r := request{status: g.Put([]byte{statusUnset})}
	bufs := []virtiotest.Buf{virtiotest.Out(g.header(kind, sector), 16)}
	if data != nil {
		r.data = g.Put(data)
		bufs = append(bufs, virtiotest.Out(r.data, len(data)))
	}
	if n > 0 {
		r.data = g.Alloc(uint64(n))
		bufs = append(bufs, virtiotest.In(r.data, n))
	}
	r.head = g.Rings[q].Add(append(bufs, virtiotest.In(r.status, 1))...)
	return r
}

func (g *guest) status(r request) int { return int(g.Get(r.status, 1)[0]) }

// settle completes everything that waits, oldest first.
func (g *guest) settle() {
	for len(g.disk.waiting) > 0 {
		require.NoError(g.t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
	}
}

func rangeOf(sector uint64, count, flags uint32) []byte {
	p := binary.LittleEndian.AppendUint64(nil, sector)
	p = binary.LittleEndian.AppendUint32(p, count)
	return binary.LittleEndian.AppendUint32(p, flags)
}

// virtio 1.2, 5.2.4: what the driver reads.
func TestConfiguration(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20, BlockSize: 4096, Discard: true, Queues: 3, ID: "x"}, virtio.Options{QueueSize: 128})
	require.EqualValues(t, 1<<2|1<<6|1<<9|1<<10|1<<11|1<<12|1<<13|1<<14|1<<28|1<<29|1<<32, g.Offered())
	c := func(off uint64, n int) uint64 { return g.Modern.Read(virtiotest.DeviceConfig+off, n) }
	for _, f := range []struct {
		name string
		got  uint64
		want uint64
	}{
		{"capacity", c(0, 8), 2048}, {"size_max", c(8, 4), 0}, {"seg_max", c(12, 4), 126}, {"blk_size", c(20, 4), 512},
		{"physical_block_exp", c(24, 1), 3}, {"alignment_offset", c(25, 1), 0}, {"min_io_size", c(26, 2), 8},
		{"writeback", c(32, 1), 1}, {"num_queues", c(34, 2), 3}, {"max_discard_sectors", c(36, 4), 1 << 22},
		{"max_discard_seg", c(40, 4), 1}, {"discard_sector_alignment", c(44, 4), 8},
		{"max_write_zeroes_sectors", c(48, 4), 1 << 17}, {"max_write_zeroes_seg", c(52, 4), 1}, {"write_zeroes_may_unmap", c(56, 1), 1},
		{"beyond the structure", c(60, 1), 0xff},
	} {
		require.Equal(t, f.want, f.got, f.name)
	}
	g = newGuest(t, blk.Config{Capacity: 1 << 20, ReadOnly: true, Discard: true}, virtio.Options{})
	require.EqualValues(t, 1<<2|1<<5|1<<6|1<<9|1<<10|1<<11|1<<28|1<<29|1<<32, g.Offered())
	require.Panics(t, func() { blk.New(blk.Config{Capacity: 100}, nil) })
	require.Panics(t, func() { blk.New(blk.Config{Queues: 9}, nil) })
	require.Panics(t, func() { blk.New(blk.Config{BlockSize: 1000}, nil) })
}

func TestReadsAndWrites(t *testing.T) {
	for name, init := range map[string]func(g *guest){
		"modern": func(g *guest) { g.Init(everything, 16) },
		"legacy": func(g *guest) { g.InitLegacy(featureFlush) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{Transitional: true})
			init(g)
			data := bytes.Repeat([]byte("abcdefgh"), 128)
			w := g.ask(0, out, 7, data, 0)
			g.Rings[0].Kick()
			require.NoError(t, g.Mem.Write(w.data, make([]byte, 1024)), "data is copied at the kick")
			require.Equal(t, statusUnset, g.status(w))
			require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
			require.Equal(t, data, g.disk.content[7*512:7*512+1024])
			require.Equal(t, 0, g.status(w))
			r := g.ask(0, in, 8, nil, 1024)
			g.Rings[0].Kick()
			g.settle()
			require.Equal(t, 0, g.status(r))
			require.Equal(t, g.disk.content[8*512:8*512+1024], g.Get(r.data, 1024))
			require.Equal(t, []virtiotest.Done{{Head: w.head, Len: 1}, {Head: r.head, Len: 1025}}, g.Rings[0].TakeAll())
			require.Equal(t, []blk.Request{
				{Tag: 1, Op: blk.Write, Offset: 7 * 512, Length: 1024},
				{Tag: 2, Op: blk.Read, Offset: 8 * 512, Length: 1024},
			}, g.disk.log)
		})
	}
}

// The interrupt comes with the completion, on the vector of the request's queue.
func TestQueuesAreIndependent(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20, Queues: 4}, virtio.Options{})
	g.Init(everything, 16)
	g.TakeMessages()
	var rs []request
	for q := range 4 {
		rs = append(rs, g.ask(q, in, uint64(q), nil, 512))
		g.Rings[q].Kick()
	}
	require.Empty(t, g.TakeMessages())
	for _, q := range []int{2, 0, 3, 1} {
		i := slices.IndexFunc(g.disk.waiting, func(r *blk.Request) bool { return r.Offset == uint64(q)*512 })
		require.NoError(t, g.dev.Complete(g.disk.carryOut(i), blk.StatusOK))
		require.Equal(t, []uint32{0x41 + uint32(q)}, g.TakeMessages())
		require.Equal(t, []virtiotest.Done{{Head: rs[q].head, Len: 513}}, g.Rings[q].TakeAll())
	}
}

// A driver may cut header, data and status as it likes (2.7.4.3).
func TestAnyLayout(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
	g.Init(everything, 64)
	h := g.header(out, 3)
	data := g.Put(bytes.Repeat([]byte{0x5a}, 512))
	status := g.Put([]byte{statusUnset})
	// Header and data run into each other.
	joint := g.Put(append(g.Get(h, 16), g.Get(data, 100)...))
	g.Rings[0].Add(virtiotest.Out(joint, 5), virtiotest.Out(joint+5, 111), virtiotest.Out(data+100, 412), virtiotest.In(status, 1))
	g.Rings[0].Kick()
	g.settle()
	require.Equal(t, g.Get(data, 512), g.disk.content[3*512:4*512])
	require.Zero(t, g.Get(status, 1)[0])
	// The status is the last byte of the last buffer.
	dst := g.Alloc(600)
	h = g.header(in, 3)
	g.Rings[0].AddIndirect(virtiotest.Out(h, 16), virtiotest.In(dst, 1), virtiotest.In(dst+1, 512))
	g.Rings[0].Kick()
	require.NoError(t, g.Mem.Write(dst, bytes.Repeat([]byte{statusUnset}, 600)))
	g.settle()
	require.Equal(t, append(bytes.Repeat([]byte{0x5a}, 512), 0, statusUnset), g.Get(dst, 514))
}

func TestRequestsThatFail(t *testing.T) {
	const sectors = 2048
	plain := blk.Config{Capacity: sectors * 512, Discard: true}
	readOnly := blk.Config{Capacity: sectors * 512, ReadOnly: true, Discard: true}
	const ok, ioerr, unsupported = 0, 1, 2
	for name, c := range map[string]struct {
		cfg    blk.Config
		kind   uint32
		sector uint64
		data   []byte
		n      int
		want   int
	}{
		"read past the end":                  {plain, in, sectors - 1, nil, 1024, ioerr},
		"read far past the end":              {plain, in, 1 << 60, nil, 512, ioerr},
		"read that wraps around":             {plain, in, 1<<64 - 1, nil, 1024, ioerr},
		"read of half a sector":              {plain, in, 0, nil, 256, ioerr},
		"read of nothing":                    {plain, in, sectors, nil, 0, ok},
		"read of nothing past the end":       {plain, in, sectors + 1, nil, 0, ioerr},
		"read with data to write":            {plain, in, 0, make([]byte, 512), 512, ioerr},
		"write past the end":                 {plain, out, sectors, make([]byte, 512), 0, ioerr},
		"write with room to read":            {plain, out, 0, make([]byte, 512), 512, ioerr},
		"write of half a sector":             {plain, out, 0, make([]byte, 700), 0, ioerr},
		"write to a read-only disk":          {readOnly, out, 0, make([]byte, 512), 0, ioerr},
		"discard on a read-only disk":        {readOnly, discard, 0, rangeOf(0, 1, 0), 0, ioerr},
		"zeroes on a read-only disk":         {readOnly, writeZeroes, 0, rangeOf(0, 1, 0), 0, ioerr},
		"discard on a disk that does not":    {blk.Config{Capacity: 512}, discard, 0, rangeOf(0, 1, 0), 0, unsupported},
		"discard with a flag":                {plain, discard, 0, rangeOf(0, 1, 1), 0, unsupported},
		"zeroes with an unknown flag":        {plain, writeZeroes, 0, rangeOf(0, 1, 2), 0, unsupported},
		"discard past the end":               {plain, discard, 0, rangeOf(sectors, 1, 0), 0, ioerr},
		"discard without a range":            {plain, discard, 0, nil, 0, ioerr},
		"discard of two ranges":              {plain, discard, 0, append(rangeOf(0, 1, 0), rangeOf(1, 1, 0)...), 0, ioerr},
		"discard of nothing":                 {plain, discard, 0, rangeOf(0, 0, 0), 0, ok},
		"more zeroes than offered":           {blk.Config{Capacity: 1 << 30}, writeZeroes, 0, rangeOf(0, 1<<17+1, 0), 0, ioerr},
		"SCSI":                               {plain, scsi, 0, nil, 96, unsupported},
		"barrier":                            {plain, out | 1<<31, 0, make([]byte, 512), 0, unsupported},
		"secure erase":                       {plain, 14, 0, rangeOf(0, 1, 0), 0, unsupported},
		"identity into a buffer that is odd": {plain, getID, 0, nil, 7, ok},
	} {
		t.Run(name, func(t *testing.T) {
			var backend disk
			dev := blk.New(c.cfg, &backend)
			g := &guest{t: t, disk: &backend, dev: dev, Driver: virtiotest.New(t, dev, virtio.Options{})}
			g.Init(everything, 16)
			r := g.ask(0, c.kind, c.sector, c.data, c.n)
			g.Rings[0].Kick()
			require.Equal(t, c.want, g.status(r))
			require.Empty(t, backend.log)
			require.Zero(t, dev.InFlight())
			done := g.Rings[0].TakeAll()
			require.Len(t, done, 1)
			require.LessOrEqual(t, done[0].Len, uint32(c.n+1))
			require.Zero(t, g.Status()&virtio.StatusNeedsReset)
		})
	}
}

// Without a place for the status there is no way to tell, and with half a header nothing
// to do; the chain goes back.
func TestRequestsWithoutHeaderOrStatus(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
	g.Init(everything, 16)
	status := g.Put([]byte{statusUnset})
	r := g.Rings[0]
	r.Add(virtiotest.Out(g.header(in, 0), 16))
	r.Add(virtiotest.Out(g.header(in, 0), 15), virtiotest.In(status, 1))
	r.Add(virtiotest.In(status+1, 0))
	r.Kick()
	done := r.TakeAll()
	require.Len(t, done, 3)
	require.Zero(t, done[0].Len)
	require.EqualValues(t, 1, g.Get(status, 1)[0])
	require.Empty(t, g.disk.log)
	require.Zero(t, g.dev.InFlight())
}

func TestIdentityDiscardAndZeroes(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20, Discard: true, ID: "0123456789abcdefghijKLM"}, virtio.Options{})
	g.Init(everything, 16)
	id := g.ask(0, getID, 0, nil, 20)
	g.Rings[0].Kick()
	require.Equal(t, "0123456789abcdefghij", string(g.Get(id.data, 20)))
	require.Zero(t, g.status(id))
	g.ask(0, discard, 0, rangeOf(4, 4, 0), 0)
	g.ask(0, writeZeroes, 0, rangeOf(16, 2, 0), 0)
	z := g.ask(0, writeZeroes, 0, rangeOf(20, 2, 1), 0)
	f := g.ask(0, flush, 0, nil, 0)
	g.Rings[0].Kick()
	require.Equal(t, []blk.Request{
		{Tag: 1, Op: blk.Discard, Offset: 4 * 512, Length: 4 * 512},
		{Tag: 2, Op: blk.WriteZeroes, Offset: 16 * 512, Length: 2 * 512},
		{Tag: 3, Op: blk.WriteZeroes, Offset: 20 * 512, Length: 2 * 512, Unmap: true},
		{Tag: 4, Op: blk.Flush},
	}, g.disk.log)
	require.NoError(t, g.dev.Complete(3, blk.StatusUnsupported))
	require.Equal(t, 2, g.status(z))
	require.NoError(t, g.dev.Complete(4, blk.StatusIOErr))
	require.Equal(t, 1, g.status(f))
	require.Error(t, g.dev.Complete(4, blk.StatusOK), "completed already")
	require.Error(t, g.dev.Complete(0, blk.StatusOK))
	require.Error(t, g.dev.Complete(99, blk.StatusOK))
}

func TestAFailedReadLeavesTheBuffersAlone(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
	g.Init(everything, 16)
	r := g.ask(0, in, 0, nil, 512)
	g.Rings[0].Kick()
	require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusIOErr))
	require.Equal(t, 1, g.status(r))
	require.Equal(t, make([]byte, 512), g.Get(r.data, 512))
	require.Equal(t, []virtiotest.Done{{Head: r.head, Len: 0}}, g.Rings[0].TakeAll())
}

// Of two requests on common sectors, where one modifies them, the later waits.
func TestOverlappingRequestsGoOneAfterTheOther(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
	g.Init(everything, 64)
	sector := func(b byte) []byte { return bytes.Repeat([]byte{b}, 1024) }
	g.ask(0, in, 0, nil, 1024)       // 1
	g.ask(0, in, 1, nil, 1024)       // 2: two reads get along
	g.ask(0, out, 1, sector('a'), 0) // waits for both
	g.ask(0, out, 2, sector('b'), 0) // waits for the write
	r := g.ask(0, in, 2, nil, 512)   // waits for both writes
	g.ask(0, in, 100, nil, 512)      // 3: elsewhere
	g.ask(0, flush, 0, nil, 0)       // 4
	g.Rings[0].Kick()
	offsets := func() (all []uint64) {
		for _, w := range g.disk.waiting {
			all = append(all, w.Offset/512)
		}
		return all
	}
	require.Equal(t, []uint64{0, 1, 100, 0}, offsets())
	require.Equal(t, 4, g.dev.InFlight())
	require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
	require.Equal(t, []uint64{1, 100, 0}, offsets())
	g.move()
	require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
	require.Equal(t, []uint64{100, 0, 1}, offsets())
	require.NoError(t, g.dev.Complete(g.disk.carryOut(2), blk.StatusIOErr), "a failure lets the next go, too")
	require.Equal(t, []uint64{100, 0, 2}, offsets())
	g.settle()
	require.Equal(t, sector('b')[:512], g.Get(r.data, 512))
	require.Len(t, g.Rings[0].TakeAll(), 7)
}

// 5.2.6.2: for a driver that cannot flush, a write is durable when it is done.
func TestWritethrough(t *testing.T) {
	for name, c := range map[string]struct {
		features uint64
		toggle   bool
		through  bool
	}{
		"flush":              {featureFlush, false, false},
		"no flush":           {0, false, true},
		"writeback chosen":   {featureFlush | featureConfigWCE, false, false},
		"writethrough asked": {featureFlush | featureConfigWCE, true, true},
		"toggled in vain":    {featureFlush, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
			g.Init(c.features, 16)
			if c.toggle {
				g.Modern.Write(virtiotest.DeviceConfig+32, 1, 0)
			}
			w := g.ask(0, out, 0, make([]byte, 512), 0)
			g.Rings[0].Kick()
			g.move()
			require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
			if c.through {
				require.Equal(t, statusUnset, g.status(w))
				g.move()
				require.Len(t, g.disk.waiting, 1)
				require.Equal(t, blk.Flush, g.disk.waiting[0].Op)
				require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
			}
			require.Equal(t, 0, g.status(w))
			require.Empty(t, g.disk.waiting)
			r := g.ask(0, in, 0, nil, 512)
			g.Rings[0].Kick()
			require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
			require.Equal(t, 0, g.status(r), "a read needs no flush")
		})
	}
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
	g.Init(everything, 16)
	g.Modern.Write(virtiotest.DeviceConfig+32, 1, 0)
	require.Zero(t, g.Modern.Read(virtiotest.DeviceConfig+32, 1))
	g.Modern.Write(virtiotest.DeviceConfig, 8, 0)
	require.EqualValues(t, 2048, g.Modern.Read(virtiotest.DeviceConfig, 8), "the rest is read-only")
	g.SetStatus(0)
	require.EqualValues(t, 1, g.Modern.Read(virtiotest.DeviceConfig+32, 1))
}

func TestLargeRequestsGoInParts(t *testing.T) {
	const size = 2*blk.MaxTransfer + 4096
	g := newGuest(t, blk.Config{Capacity: 16 << 20}, virtio.Options{})
	g.Init(everything, 16)
	want := bytes.Clone(g.disk.content[512 : 512+size])
	r := g.ask(0, in, 1, nil, size)
	g.Rings[0].Kick()
	for part, n := range []uint64{blk.MaxTransfer, blk.MaxTransfer, 4096} {
		require.Len(t, g.disk.waiting, 1)
		require.Equal(t, n, g.disk.waiting[0].Length)
		require.EqualValues(t, 512+part*blk.MaxTransfer, g.disk.waiting[0].Offset)
		require.Equal(t, statusUnset, g.status(r))
		g.move()
		require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
	}
	require.Equal(t, 0, g.status(r))
	require.True(t, bytes.Equal(want, g.Get(r.data, size)))
	require.Equal(t, []virtiotest.Done{{Head: r.head, Len: size + 1}}, g.Rings[0].TakeAll())

	data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	w := g.ask(0, out, 3, data, 0)
	g.Rings[0].Kick()
	g.settle()
	require.Equal(t, 0, g.status(w))
	require.True(t, bytes.Equal(data, g.disk.content[3*512:3*512+size]))

	w = g.ask(0, out, 3, data, 0)
	g.Rings[0].Kick()
	require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusIOErr))
	require.Empty(t, g.disk.waiting, "no more parts after one that failed")
	require.Equal(t, 1, g.status(w))
}

func TestBuffersAreBounded(t *testing.T) {
	const n = blk.MaxInFlight/blk.MaxTransfer + 5
	g := newGuest(t, blk.Config{Capacity: n * blk.MaxTransfer}, virtio.Options{})
	g.Init(everything, 256)
	buf := g.Alloc(blk.MaxTransfer)
	status := g.Alloc(n)
	for i := range uint64(n) {
		g.Rings[0].Add(virtiotest.Out(g.header(in, i*blk.MaxTransfer/512), 16),
			virtiotest.In(buf, blk.MaxTransfer), virtiotest.In(status+i, 1))
	}
	g.ask(0, flush, 0, nil, 0)
	g.Rings[0].Kick()
	require.Equal(t, blk.MaxInFlight/blk.MaxTransfer+1, g.dev.InFlight(), "all that fits, and the flush, which needs no buffer")
	g.settle()
	require.Equal(t, make([]byte, n), g.Get(status, n))
	require.Len(t, g.Rings[0].TakeAll(), n+1)
}

// A reset cannot call back what the backend has, but the guest hears no more of it.
func TestResetLeavesOrphans(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
	g.Init(everything, 16)
	g.ask(0, out, 0, bytes.Repeat([]byte{'x'}, 512), 0)
	old := g.ask(0, in, 5, nil, 512)
	g.ask(0, in, 0, nil, 512) // held back
	g.Rings[0].Kick()
	require.Equal(t, 2, g.dev.InFlight())
	g.Init(everything, 16)
	require.Equal(t, 2, g.dev.InFlight())
	fresh := g.ask(0, out, 0, bytes.Repeat([]byte{'y'}, 512), 0)
	g.Rings[0].Kick()
	require.Equal(t, 2, g.dev.InFlight(), "ordered after the write that it overlaps")
	g.move()
	require.NoError(t, g.dev.Complete(g.disk.carryOut(1), blk.StatusOK))
	require.Equal(t, statusUnset, g.status(old))
	require.Empty(t, g.Rings[0].TakeAll())
	require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
	require.Equal(t, 1, g.dev.InFlight())
	g.settle()
	require.Equal(t, 0, g.status(fresh))
	require.Equal(t, byte('y'), g.disk.content[0])
	require.EqualValues(t, 3, g.disk.log[len(g.disk.log)-1].Tag, "tags go on")

	// The same with a reset of the machine.
	g.Rings[0].TakeAll()
	g.ask(0, in, 5, nil, 512)
	g.Rings[0].Kick()
	g.dev.Reset()
	require.Equal(t, 1, g.dev.InFlight())
	g.settle()
	require.Empty(t, g.Rings[0].TakeAll())
}

// A guest that resets again and again cannot pile up requests without bound, and what it then
// asks is served when there is room.
func TestOrphansAreBounded(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{QueueSize: 8})
	const limit = 8
	for range limit {
		g.Init(everything, 8)
		g.ask(0, flush, 0, nil, 0)
		g.Rings[0].Kick()
	}
	require.Equal(t, limit, g.dev.InFlight())
	g.Init(everything, 8)
	r := g.ask(0, flush, 0, nil, 0)
	g.Rings[0].Kick()
	require.Equal(t, limit, g.dev.InFlight())
	g.move()
	require.NoError(t, g.dev.Complete(g.disk.carryOut(0), blk.StatusOK))
	require.Equal(t, limit, g.dev.InFlight(), "the new one is there now")
	g.settle()
	require.Equal(t, 0, g.status(r))
}

func TestWithoutBusMasteringNothingIsWritten(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 1 << 20}, virtio.Options{})
	g.Init(everything, 16)
	r := g.ask(0, in, 1, nil, 512)
	g.Rings[0].Kick()
	g.T.Function().WriteConfig(4, 2, 3)
	g.settle()
	require.Equal(t, statusUnset, g.status(r))
	require.Zero(t, g.dev.InFlight())
	g.move()
}

func TestRestoreRefusesWhatCannotBe(t *testing.T) {
	g := newGuest(t, blk.Config{Capacity: 16 << 20}, virtio.Options{})
	g.Init(featureFlush, 16)
	g.ask(0, out, 0, make([]byte, 1024), 0)
	g.ask(0, in, 8, nil, blk.MaxTransfer+512)
	g.ask(0, in, 0, nil, 512) // held back
	g.Rings[0].Kick()
	good := g.dev.Save()
	require.Len(t, good.Requests, 3)
	for name, damage := range map[string]func(s *blk.State){
		"no next tag":                func(s *blk.State) { s.NextTag = 0 },
		"tag to come":                func(s *blk.State) { s.Requests[0].Tag = s.NextTag },
		"tag twice":                  func(s *blk.State) { s.Requests[0].Tag = s.Requests[1].Tag },
		"queue":                      func(s *blk.State) { s.Requests[0].Queue = 1 },
		"head":                       func(s *blk.State) { s.Requests[0].Head = 256 },
		"operation":                  func(s *blk.State) { s.Requests[0].Op = 9 },
		"another operation":          func(s *blk.State) { s.Requests[0].Op = blk.Read },
		"flush with a length":        func(s *blk.State) { s.Requests[0].Op = blk.Flush },
		"past the end":               func(s *blk.State) { s.Requests[0].Offset = 16 << 20 },
		"offset that wraps":          func(s *blk.State) { s.Requests[0].Offset = 1<<64 - 512 },
		"half a sector":              func(s *blk.State) { s.Requests[0].Offset = 1 },
		"longer than the buffers":    func(s *blk.State) { s.Requests[0].Length = 2048 },
		"buffer outside memory":      func(s *blk.State) { s.Requests[0].Out[1].Addr = virtiotest.LowSize },
		"no status byte":             func(s *blk.State) { s.Requests[0].In = nil },
		"less data":                  func(s *blk.State) { s.Requests[0].Data = s.Requests[0].Data[:512] },
		"data of a read":             func(s *blk.State) { s.Requests[1].Data = make([]byte, blk.MaxTransfer) },
		"part":                       func(s *blk.State) { s.Requests[1].Part = 512 },
		"more done than asked":       func(s *blk.State) { s.Requests[1].Done = blk.MaxTransfer + 1024 },
		"all done":                   func(s *blk.State) { s.Requests[1].Done, s.Requests[1].Part = blk.MaxTransfer+512, 0 },
		"held back and done":         func(s *blk.State) { s.Requests[2].Done = 512 },
		"flushing before it is done": func(s *blk.State) { s.Requests[0].Flushing = true },
		"orphan without a tag":       func(s *blk.State) { s.Requests[2].Orphan = true },
		"orphan with buffers":        func(s *blk.State) { s.Requests[0].Orphan = true },
		"more than in use":           func(s *blk.State) { s.Transport.Queues[0].InUse = 2 },
		"more than can be": func(s *blk.State) {
			for len(s.Requests) <= 256 {
				s.Requests = append(s.Requests, s.Requests[2])
			}
		},
		"transport": func(s *blk.State) { s.Transport.ISR = 7 },
		"queues":    func(s *blk.State) { s.Transport.Queues = nil },
	} {
		s := virtiotest.Encoded(t, good)
		damage(&s)
		require.Error(t, g.dev.Restore(s), name)
		require.Equal(t, good, g.dev.Save(), name)
	}
	readOnly := blk.New(blk.Config{Capacity: 16 << 20, ReadOnly: true}, &disk{})
	virtio.New(g.Mem, g, readOnly, virtio.Options{Name: "test"})
	require.Error(t, readOnly.Restore(good))
}

// Random requests, completed in random order, with moves to another device in between,
// leave disk and guest as if each had been carried out in the order of arrival where that matters:
// every read gives what the last write before it wrote.
func TestRequestsMatchAModelDisk(t *testing.T) {
	const sectors = 64
	g := newGuest(t, blk.Config{Capacity: sectors * 512, Discard: true, Queues: 2}, virtio.Options{})
	rapid.Check(t, func(t *rapid.T) {
		features := rapid.SampledFrom([]uint64{0, featureFlush, everything}).Draw(t, "features")
		g.Driver = virtiotest.New(g.t, blk.New(g.cfg, g.disk), virtio.Options{})
		clear(g.disk.content)
		g.disk.waiting = nil
		g.dev = blk.New(g.cfg, g.disk)
		g.Plug(g.dev, g.opts)
		g.T.Function().WriteConfig(4, 2, 7)
		g.Init(features, 32)
		model := make([]byte, sectors*512)
		type expectation struct {
			request
			want []byte
		}
		var expect []expectation
		steps := rapid.IntRange(1, 40).Draw(t, "steps")
		for step := range steps {
			switch rapid.IntRange(0, 9).Draw(t, "action") {
			default:
				q := rapid.IntRange(0, 1).Draw(t, "queue")
				if g.Rings[q].Room() < 3 {
					continue
				}
				first := rapid.Uint64Range(0, sectors-1).Draw(t, "sector")
				count := rapid.Uint64Range(1, min(8, sectors-first)).Draw(t, "count")
				part := model[first*512 : (first+count)*512]
				switch rapid.IntRange(0, 4).Draw(t, "operation") {
				case 0, 1:
					for i := range part {
						part[i] = byte(step + 1)
					}
					expect = append(expect, expectation{g.ask(q, out, first, part, 0), nil})
				case 2:
					clear(part)
					expect = append(expect, expectation{g.ask(q, discard, 0, rangeOf(first, uint32(count), 0), 0), nil})
				case 3:
					expect = append(expect, expectation{g.ask(q, flush, 0, nil, 0), nil})
				default:
					expect = append(expect, expectation{g.ask(q, in, first, nil, len(part)), bytes.Clone(part)})
				}
				g.Rings[q].Kick()
			case 0, 1, 2:
				if n := len(g.disk.waiting); n > 0 {
					i := rapid.IntRange(0, n-1).Draw(t, "which")
					require.NoError(t, g.dev.Complete(g.disk.carryOut(i), blk.StatusOK))
				}
			case 3:
				g.move()
			}
			g.Rings[0].TakeAll()
			g.Rings[1].TakeAll()
		}
		for len(g.disk.waiting) > 0 {
			i := rapid.IntRange(0, len(g.disk.waiting)-1).Draw(t, "which")
			require.NoError(t, g.dev.Complete(g.disk.carryOut(i), blk.StatusOK))
		}
		require.Zero(t, g.dev.InFlight())
		require.True(t, bytes.Equal(model, g.disk.content))
		for _, e := range expect {
			require.Equal(t, 0, g.status(e.request))
			if e.want != nil {
				require.True(t, bytes.Equal(e.want, g.Get(e.data, len(e.want))))
			}
		}
	})
}

// Whatever stands in a request, what reaches the backend lies on the disk, and the chain comes back.
func FuzzRequest(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1}, uint16(16), uint16(512), uint8(0))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}, uint16(16+512), uint16(0), uint8(0x11))
	f.Add(append([]byte{11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, rangeOf(1, 2, 0)...), uint16(32), uint16(0), uint8(0x20))
	f.Add([]byte{8}, uint16(16), uint16(20), uint8(3))
	const capacity = 1 << 20
	backend := &disk{content: make([]byte, capacity)}
	dev := blk.New(blk.Config{Capacity: capacity, Discard: true}, backend)
	g := &guest{t: f, disk: backend, dev: dev, Driver: virtiotest.New(f, dev, virtio.Options{})}
	src, dst := g.Alloc(1<<16), g.Alloc(1<<16)
	g.Init(everything&^(1<<29), 16)
	f.Fuzz(func(t *testing.T, request []byte, outLen, inLen uint16, cut uint8) {
		g.t, g.TB = t, t
		require.NoError(t, g.Mem.Write(src, request[:min(len(request), 1<<16)]))
		var bufs []virtiotest.Buf
		for _, b := range []virtiotest.Buf{virtiotest.Out(src, int(outLen)), virtiotest.In(dst, int(inLen)), virtiotest.In(dst+1<<15, 1)} {
			n := min(b.Len, uint32(cut&0x3f))
			bufs = append(bufs, virtiotest.Buf{Addr: b.Addr, Len: n, Write: b.Write},
				virtiotest.Buf{Addr: b.Addr + uint64(n), Len: b.Len - n, Write: b.Write})
		}
		if cut&0x80 != 0 {
			bufs = bufs[:4] // no buffer for the status alone
		}
		g.Rings[0].Add(bufs...)
		g.Rings[0].Kick()
		for _, r := range backend.waiting {
			require.True(t, r.Length%512 == 0 && r.Offset%512 == 0 && r.Offset+r.Length <= capacity)
			require.True(t, (r.Op == blk.Read || r.Op == blk.Write) == (r.Data != nil))
		}
		s := dev.Save()
		require.NoError(t, dev.Restore(s))
		backend.waiting = backend.waiting[:0]
		dev.Reissue()
		g.settle()
		require.Len(t, g.Rings[0].TakeAll(), 1)
		require.Zero(t, dev.InFlight())
		require.Zero(t, g.Status()&virtio.StatusNeedsReset)
		backend.log = backend.log[:0]
		g.Messages = g.Messages[:0]
	})
}

// cycle returns a function that reads 4 KiB: kick, completion, interrupt.
func cycle(tb testing.TB) func() {
	var last uint64
	s := submitFunc(func(r *blk.Request) { last = r.Tag })
	dev := blk.New(blk.Config{Capacity: 1 << 20}, s)
	d := virtiotest.New(tb, dev, virtio.Options{})
	d.Init(everything, 16)
	g := &guest{t: tb, dev: dev, Driver: d}
	r := g.ask(0, in, 8, nil, 4096)
	d.Rings[0].Kick()
	require.NoError(tb, dev.Complete(last, blk.StatusOK))
	ring, head, idx := d.Rings[0], r.head, uint16(1)
	return func() {
		d.Mem.PutUint16(ring.Avail+4+2*uint64(idx%16), head)
		idx++
		d.Mem.PutUint16(ring.Avail+2, idx)
		ring.SetUsedEvent(idx - 1)
		d.Modern.Write(virtiotest.Notify, 2, 0)
		if dev.Complete(last, blk.StatusOK) != nil || len(d.Messages) == 0 {
			tb.Fatal("no completion")
		}
		d.Messages = d.Messages[:0]
	}
}

type submitFunc func(r *blk.Request)

func (f submitFunc) Submit(r *blk.Request) { f(r) }

func TestAReadAllocatesNothing(t *testing.T) {
	require.Zero(t, testing.AllocsPerRun(100, cycle(t)))
}

func BenchmarkRead4K(b *testing.B) {
	f := cycle(b)
	b.ReportAllocs()
	b.SetBytes(4096)
	for b.Loop() {
		f()
	}
}
