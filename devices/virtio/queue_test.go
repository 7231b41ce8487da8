package virtio_test

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/internal/virtiotest"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// echo is a device that gives every chain back at once, with what the driver wrote
// repeated as far as there is room, and remembers the chains.
type echo struct {
	t        *virtio.Transport
	config   []byte
	features uint64
	refuse   uint64 // features that it does not go along with
	accepted uint64
	clears   int
	keep     bool // chains are not given back

	chain virtio.Chain
	got   []virtio.Chain
	kicks []int
}

func newEcho() *echo { return &echo{config: []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}} }

func (e *echo) Info() virtio.Info {
	return virtio.Info{Type: 2, Class: 0x018000, Features: e.features, Queues: 2}
}
func (e *echo) Attach(t *virtio.Transport) { e.t = t }
func (e *echo) Negotiate(f uint64) bool {
	e.accepted = f
	return f&e.refuse == 0
}
func (e *echo) Config() []byte                { return e.config }
func (e *echo) WriteConfig(off int, p []byte) { copy(e.config[off:], p) }
func (e *echo) Clear()                        { e.clears++ }
func (e *echo) Kick(n int) {
	e.kicks = append(e.kicks, n)
	q := e.t.Queue(n)
	for q.Next(&e.chain) {
		var c virtio.Chain
		c.Set(e.chain.Head, e.chain.Out, e.chain.In)
		e.got = append(e.got, c)
		if e.keep {
			continue
		}
		p := make([]byte, min(e.chain.OutLen, 1<<16))
		q.Read(e.chain.Out, 0, p)
		q.Push(e.chain.Head, uint32(q.Write(e.chain.In, 0, p)))
	}
	q.Interrupt()
}

func setup(t testing.TB, features uint64, size uint16) (*virtiotest.Driver, *echo) {
	e := newEcho()
	d := virtiotest.New(t, e, virtio.Options{Transitional: true})
	d.Init(features, size)
	return d, e
}

const ringFeatures = virtio.FeatureRingEventIdx | virtio.FeatureRingIndirectDesc

func TestChainsArriveWithTheirBuffersInOrder(t *testing.T) {
	d, e := setup(t, ringFeatures, 8)
	a, b := d.Put([]byte("hello, ")), d.Put([]byte("world"))
	in := d.Alloc(100)
	out := []virtiotest.Buf{virtiotest.Out(a, 7), virtiotest.Out(b, 5), virtiotest.Out(b, 0), virtiotest.In(in, 3), virtiotest.In(in+50, 20)}
	r := d.Rings[0]
	for range 20 { // wraps the ring
		r.Add(out...)
		r.AddIndirect(out...)
		r.Kick()
		done := r.TakeAll()
		require.Len(t, done, 2)
		require.EqualValues(t, 12, done[0].Len)
		require.EqualValues(t, 12, done[1].Len)
		require.Equal(t, "hel", string(d.Get(in, 3)))
		require.Equal(t, "lo, world", string(d.Get(in+50, 9)))
	}
	require.Len(t, e.got, 40)
	for _, c := range e.got {
		require.Equal(t, []virtio.Segment{{Addr: a, Len: 7}, {Addr: b, Len: 5}}, c.Out, "an empty buffer is none")
		require.Equal(t, []virtio.Segment{{Addr: in, Len: 3}, {Addr: in + 50, Len: 20}}, c.In)
		require.EqualValues(t, 12, c.OutLen)
		require.EqualValues(t, 23, c.InLen)
	}
	require.Zero(t, e.t.Queue(0).InUse())
}

// What no driver may do breaks the device: it stops, says so, and works again after a reset.
func TestHostileRingsBreakTheDevice(t *testing.T) {
	const next, write, indirect = 1, 2, 4
	for name, poke := range map[string]func(d *virtiotest.Driver, r *virtiotest.Ring){
		"available index runs away": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetAvailIdx(9)
		},
		"available index goes back": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetAvailIdx(0xffff)
		},
		"head beyond the table": func(_ *virtiotest.Driver, r *virtiotest.Ring) { r.Offer(8) },
		"next beyond the table": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(r.Desc, 0, 0x1000, 1, next, 8)
			r.Offer(0)
		},
		"loop of one": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(r.Desc, 0, 0x1000, 1, next, 0)
			r.Offer(0)
		},
		"loop of empty buffers": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			for i := range uint16(8) {
				r.SetDesc(r.Desc, i, 0x1000, 0, next, (i+1)%8)
			}
			r.Offer(3)
		},
		"readable after writable": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.Add(virtiotest.In(0x1000, 1), virtiotest.Out(0x1000, 1))
		},
		"buffer in the hole of memory": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.Add(virtiotest.Out(virtiotest.LowSize, 1))
		},
		"buffer that leaves memory": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.Add(virtiotest.In(virtiotest.LowSize-1, 2))
		},
		"buffer that wraps around": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.Add(virtiotest.In(math.MaxUint64, 2))
		},
		"indirect table outside memory": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(r.Desc, 0, virtiotest.LowSize-16, 32, indirect, 0)
			r.Offer(0)
		},
		"indirect table of no length": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(r.Desc, 0, 0x1000, 0, indirect, 0)
			r.Offer(0)
		},
		"indirect table of a broken length": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(r.Desc, 0, 0x1000, 17, indirect, 0)
			r.Offer(0)
		},
		"indirect with a successor": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(r.Desc, 0, 0x1000, 16, indirect|next, 1)
			r.Offer(0)
		},
		"indirect in an indirect table": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(0x1000, 0, 0x1000, 16, indirect, 0)
			r.SetDesc(r.Desc, 0, 0x1000, 16, indirect, 0)
			r.Offer(0)
		},
		"loop in an indirect table": func(_ *virtiotest.Driver, r *virtiotest.Ring) {
			r.SetDesc(0x1000, 0, 0x2000, 1, next, 1)
			r.SetDesc(0x1000, 1, 0x2000, 1, next, 0)
			r.SetDesc(r.Desc, 0, 0x1000, 32, indirect, 0)
			r.Offer(0)
		},
		"more buffers than MaxSegments": func(d *virtiotest.Driver, r *virtiotest.Ring) {
			const n = virtio.MaxSegments + 1
			table := d.Alloc(16 * n)
			for i := range uint16(n) {
				r.SetDesc(table, i, 0x2000, 1, next, i+1)
			}
			r.SetDesc(table, n-1, 0x2000, 1, write, 0)
			r.SetDesc(r.Desc, 0, table, 16*n, indirect, 0)
			r.Offer(0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, e := setup(t, ringFeatures, 8)
			r := d.Rings[0]
			d.TakeMessages()
			poke(d, r)
			r.Kick()
			require.Empty(t, e.got)
			require.NotZero(t, d.Status()&virtio.StatusNeedsReset)
			require.Equal(t, []uint32{0x40}, d.TakeMessages(), "a configuration change interrupt")
			require.EqualValues(t, 2, d.Modern.Read(virtiotest.ISR, 1))
			other := d.Rings[1]
			other.Add(virtiotest.Out(0x1000, 1))
			other.Kick()
			require.Empty(t, e.got, "the other queue stands still, too")
			require.Empty(t, d.TakeMessages())

			d.Init(ringFeatures, 8)
			require.Zero(t, d.Status()&virtio.StatusNeedsReset)
			d.Rings[0].Add(virtiotest.Out(0x1000, 1))
			d.Rings[0].Kick()
			require.Len(t, e.got, 1)
		})
	}
}

func TestRingsOutsideMemoryBreakTheDevice(t *testing.T) {
	for name, at := range map[string]uint64{"descriptors": 0x20, "available": 0x28, "used": 0x30} {
		t.Run(name, func(t *testing.T) {
			d, e := setup(t, ringFeatures, 0)
			require.True(t, d.Negotiate(ringFeatures))
			d.Modern.Write(0x16, 2, 0)
			for _, part := range []uint64{0x20, 0x28, 0x30} {
				d.Modern.Write(part, 8, d.Rings[0].Desc+part*0x100)
			}
			d.Modern.Write(at, 8, virtiotest.LowSize-8)
			d.Modern.Write(0x1c, 2, 1)
			if at != 0x28 {
				require.NoError(t, d.Mem.PutUint16(d.Rings[0].Desc+0x2802, 1))
			}
			d.SetStatus(0xf)
			d.Modern.Write(virtiotest.Notify, 2, 0)
			require.NotZero(t, d.Status()&virtio.StatusNeedsReset)
			if at != 0x30 {
				require.Empty(t, e.got)
			}
		})
	}
}

func TestAChainOfferedTwiceIsOneTooMany(t *testing.T) {
	d, e := setup(t, 0, 4)
	e.keep = true
	r := d.Rings[0]
	r.SetDesc(r.Desc, 0, 0x1000, 1, 0, 0)
	for range 4 {
		r.Offer(0)
		r.Kick()
	}
	require.Len(t, e.got, 4)
	require.Zero(t, d.Status()&virtio.StatusNeedsReset)
	r.Offer(0)
	r.Kick()
	require.Len(t, e.got, 4)
	require.NotZero(t, d.Status()&virtio.StatusNeedsReset)
}

// Here each chain's writable buffer is the index of the available ring, so that the device's
// answers make more chains available. A kick ends all the same.
func TestAQueueThatFeedsItselfEnds(t *testing.T) {
	const size = 8
	d, e := setup(t, ringFeatures, size)
	r := d.Rings[0]
	for i := range uint16(size) {
		r.AddIndirect(virtiotest.Out(d.Put([]byte{byte(i + size + 1), 0}), 2), virtiotest.In(r.Avail+2, 2))
	}
	r.SetAvailIdx(1)
	r.Kick()
	require.Len(t, e.got, size)
	r.Kick()
	require.Len(t, e.got, size+1, "the next kick goes on where the last ended")
	require.Zero(t, d.Status()&virtio.StatusNeedsReset)
}

func TestIndirectNeedsItsFeature(t *testing.T) {
	d, e := setup(t, 0, 8)
	d.Rings[0].AddIndirect(virtiotest.Out(0x1000, 1))
	d.Rings[0].Kick()
	require.Empty(t, e.got)
	require.NotZero(t, d.Status()&virtio.StatusNeedsReset)
}

func TestIndirectTableAfterOrdinaryBuffers(t *testing.T) {
	d, e := setup(t, ringFeatures, 8)
	r := d.Rings[0]
	r.SetDesc(r.Desc, 0, 0x1000, 5, 1, 1)
	r.SetDesc(r.Desc, 1, 0x3000, 32, 4|2, 0) // the write flag means nothing here
	r.SetDesc(0x3000, 0, 0x1100, 6, 1, 1)
	r.SetDesc(0x3000, 1, 0x1200, 7, 2, 0)
	r.Offer(0)
	r.Kick()
	require.Len(t, e.got, 1)
	require.Equal(t, []virtio.Segment{{Addr: 0x1000, Len: 5}, {Addr: 0x1100, Len: 6}}, e.got[0].Out)
	require.Equal(t, []virtio.Segment{{Addr: 0x1200, Len: 7}}, e.got[0].In)
}

func TestInterruptsAsTheDriverWantsThem(t *testing.T) {
	buf := virtiotest.Out(0x1000, 1)
	t.Run("flag", func(t *testing.T) {
		d, _ := setup(t, 0, 8)
		r := d.Rings[1]
		r.Add(buf)
		r.Add(buf)
		r.Kick()
		require.Equal(t, []uint32{0x42}, d.TakeMessages(), "one for all that a kick finished")
		r.Kick()
		require.Empty(t, d.TakeMessages(), "nothing new")
		r.SetNoInterrupt(true)
		r.Add(buf)
		r.Kick()
		require.Empty(t, d.TakeMessages())
		require.Len(t, r.TakeAll(), 3)
	})
	t.Run("event index", func(t *testing.T) {
		d, _ := setup(t, ringFeatures, 8)
		r := d.Rings[0]
		r.SetUsedEvent(2) // wake me with the third
		for want := range 5 {
			require.EqualValues(t, want, r.AvailEvent(), "the device asks for a kick with the next chain")
			r.Add(buf)
			r.Kick()
			if want == 2 {
				require.Equal(t, []uint32{0x41}, d.TakeMessages())
			} else {
				require.Empty(t, d.TakeMessages())
			}
			r.TakeAll()
			r.SetUsedEvent(2)
		}
		// The event may be passed in a leap.
		r.SetUsedEvent(6)
		for range 4 {
			r.Add(buf)
		}
		r.Kick()
		require.Equal(t, []uint32{0x41}, d.TakeMessages())
	})
	t.Run("when empty", func(t *testing.T) {
		e := newEcho()
		d := virtiotest.New(t, e, virtio.Options{Transitional: true})
		d.InitLegacy(virtio.FeatureNotifyOnEmpty)
		require.Equal(t, virtio.FeatureNotifyOnEmpty, e.accepted)
		r := d.Rings[0]
		r.SetNoInterrupt(true)
		r.Add(buf)
		r.Kick()
		require.True(t, d.INTx)
		require.EqualValues(t, 1, d.Legacy.Read(0x13, 1))
		e.keep = true
		r.Add(buf)
		r.Add(buf)
		r.Kick()
		e.t.Queue(0).Push(e.got[1].Head, 0)
		e.t.Queue(0).Interrupt()
		require.False(t, d.INTx, "one is still with the device")
	})
}

func TestRewoundChainsComeAgain(t *testing.T) {
	d, e := setup(t, ringFeatures, 8)
	e.keep = true
	r := d.Rings[0]
	first := r.Add(virtiotest.In(0x1000, 10))
	second := r.Add(virtiotest.In(0x2000, 10))
	r.Kick()
	q := e.t.Queue(0)
	q.Fill(first, 3)
	q.Rewind(2)
	q.Publish()
	require.Empty(t, r.TakeAll(), "what was filled is forgotten")
	require.Zero(t, q.InUse())
	r.Kick()
	require.Len(t, e.got, 4)
	require.Equal(t, e.got[:2], e.got[2:])
	q.Fill(first, 1)
	q.Fill(second, 2)
	require.Empty(t, r.TakeAll(), "not shown before Publish")
	q.Publish()
	require.Equal(t, []virtiotest.Done{{Head: first, Len: 1}, {Head: second, Len: 2}}, r.TakeAll())
}

// Used rings are written through the memory package, so that their pages count as dirty.
func TestRingsAndDataAreDirty(t *testing.T) {
	d, _ := setup(t, ringFeatures, 8)
	r := d.Rings[0]
	out, in := d.Put([]byte{1}), d.Alloc(1)
	r.Add(virtiotest.Out(out, 1), virtiotest.In(in, 1))
	d.Mem.TakeDirty(func(uint64) {})
	r.Kick()
	var dirty []uint64
	d.Mem.TakeDirty(func(gpa uint64) { dirty = append(dirty, gpa) })
	require.ElementsMatch(t, []uint64{r.Used, in}, dirty)
}

// Scatter and gather agree with a flat copy, for any cut into buffers.
func TestReadAndWriteAcrossSegments(t *testing.T) {
	d, e := setup(t, 0, 8)
	q := e.t.Queue(0)
	rapid.Check(t, func(t *rapid.T) {
		var segs []virtio.Segment
		at := uint64(0x200000)
		var total uint64
		for _, n := range rapid.SliceOfN(rapid.Uint32Range(1, 40), 0, 8).Draw(t, "lengths") {
			segs = append(segs, virtio.Segment{Addr: at, Len: n})
			at += uint64(n) + 3
			total += uint64(n)
		}
		flat := make([]byte, total)
		q.Write(segs, 0, flat)
		off := rapid.Uint64Range(0, total+2).Draw(t, "off")
		p := rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "p")
		n := 0
		if off < total {
			n = copy(flat[off:], p)
		}
		require.Equal(t, n, q.Write(segs, off, p))
		got := make([]byte, total+1)
		require.EqualValues(t, total, q.Read(segs, 0, got))
		require.Equal(t, flat, got[:total])
		part := make([]byte, len(p))
		require.Equal(t, n, q.Read(segs, off, part))
		require.Equal(t, p[:n], part[:n])
	})
	require.Error(t, q.CheckSegments(0, []virtio.Segment{{Addr: virtiotest.LowSize, Len: 1}}))
	require.Error(t, q.CheckSegments(0, []virtio.Segment{{Addr: 0, Len: 0}}))
	require.Error(t, q.CheckSegments(256, nil))
	require.Error(t, q.CheckSegments(0, make([]virtio.Segment, virtio.MaxSegments+1)))
	require.NoError(t, q.CheckSegments(255, []virtio.Segment{{Addr: virtiotest.HighBase, Len: virtiotest.HighSize}}))
	_ = d
}

// Whatever stands in the memory of a ring, the device ends, and what it takes lies in memory.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{}, uint16(1), uint8(0))
	f.Add([]byte{0, 16, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0}, uint16(3), uint8(1))
	f.Add([]byte{0, 16, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 4, 0, 0, 0}, uint16(2), uint8(3))
	mem, err := memory.New(memory.Extent{Base: 0, Size: 1 << 20})
	require.NoError(f, err)
	f.Cleanup(func() { require.NoError(f, mem.Close()) })
	f.Fuzz(func(t *testing.T, ring []byte, idx uint16, shape uint8) {
		e := newEcho()
		e.keep = shape&1 != 0
		tr := virtio.New(mem, nil, e, virtio.Options{})
		bar := tr.Function().BARHandler(4)
		tr.Function().WriteConfig(4, 2, 7)
		// Everything overlaps: descriptors, available and used ring, buffers.
		require.NoError(t, mem.Write(0x1000, make([]byte, 4096)))
		require.NoError(t, mem.Write(0x1000, ring[:min(len(ring), 4096)]))
		bar.Write(0x14, 1, 3)
		bar.Write(0x0c, 4, ringFeatures*uint64(shape>>1&1))
		bar.Write(0x08, 4, 1)
		bar.Write(0x0c, 4, 1)
		bar.Write(0x14, 1, 0xb)
		bar.Write(0x18, 2, 1<<(shape>>2&7))
		bar.Write(0x20, 8, 0x1000)
		bar.Write(0x28, 8, 0x1000+uint64(shape>>5)*0x80)
		bar.Write(0x30, 8, 0x1800)
		bar.Write(0x1c, 2, 1)
		require.NoError(t, mem.PutUint16(0x1002+uint64(shape>>5)*0x80, idx))
		bar.Write(0x14, 1, 0xf)
		for range 3 {
			bar.Write(0x3000, 2, 0)
		}
		for _, c := range e.got {
			require.LessOrEqual(t, len(c.In)+len(c.Out), virtio.MaxSegments)
			for _, s := range append(c.In, c.Out...) {
				require.True(t, s.Len > 0 && mem.Contains(s.Addr, uint64(s.Len)))
			}
		}
		require.LessOrEqual(t, e.t.Queue(0).InUse(), e.t.Queue(0).Size())
		s := tr.Save()
		require.NoError(t, tr.Restore(s))
		require.Equal(t, s, tr.Save())
	})
}
