package rng_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/internal/virtiotest"
	"github.com/ftvmm/ftvmm/devices/virtio/rng"
)

type question struct {
	tag uint64
	n   int
}

type source struct{ asked []question }

func (s *source) Entropy(tag uint64, n int) { s.asked = append(s.asked, question{tag, n}) }

func setup(t testing.TB) (*virtiotest.Driver, *rng.Device, *source) {
	s := &source{}
	dev := rng.New(s)
	d := virtiotest.New(t, dev, virtio.Options{Transitional: true})
	d.Init(^uint64(0), 8)
	d.TakeMessages()
	return d, dev, s
}

// move replaces the device by another one in the same state.
func move(t testing.TB, d *virtiotest.Driver, dev *rng.Device, s *source) *rng.Device {
	state := dev.Save()
	dev = rng.New(s)
	d.Plug(dev, virtio.Options{Transitional: true})
	require.NoError(t, dev.Restore(virtiotest.Encoded(t, state)))
	require.Equal(t, state, dev.Save())
	return dev
}

func TestOneQuestionAtATime(t *testing.T) {
	d, dev, s := setup(t)
	r := d.Rings[0]
	buf := d.Alloc(5000)
	first := r.Add(virtiotest.In(buf, 3), virtiotest.In(buf+100, 5))
	empty := r.Add(virtiotest.Out(buf, 3))
	second := r.Add(virtiotest.In(buf, 5000))
	r.Kick()
	r.Kick()
	require.Equal(t, []question{{1, 8}}, s.asked)
	require.Empty(t, d.TakeMessages())
	dev = move(t, d, dev, s)
	dev.Reissue()
	require.Equal(t, []question{{1, 8}, {1, 8}}, s.asked)
	require.Error(t, dev.Complete(2, nil))
	require.Error(t, dev.Complete(0, nil))
	require.NoError(t, dev.Complete(1, []byte("123456789")))
	require.Equal(t, "123", string(d.Get(buf, 3)))
	require.Equal(t, "45678\x00", string(d.Get(buf+100, 6)), "no more than asked for")
	require.Equal(t, []virtiotest.Done{{Head: first, Len: 8}, {Head: empty, Len: 0}}, r.TakeAll())
	require.NotEmpty(t, d.TakeMessages())
	require.Equal(t, question{2, rng.MaxEntropy}, s.asked[2])
	require.Error(t, dev.Complete(1, nil), "answered already")
	require.NoError(t, dev.Complete(2, bytes.Repeat([]byte{7}, 10)))
	require.Equal(t, []virtiotest.Done{{Head: second, Len: 10}}, r.TakeAll())
	require.Len(t, s.asked, 3)
	dev.Reissue()
	require.Len(t, s.asked, 3, "nothing is open")
}

func TestAnAnswerAfterAResetReachesNobody(t *testing.T) {
	d, dev, s := setup(t)
	buf := d.Alloc(100)
	d.Rings[0].Add(virtiotest.In(buf, 100))
	d.Rings[0].Kick()
	d.Init(0, 8)
	d.Rings[0].Add(virtiotest.In(buf, 50))
	d.Rings[0].Kick()
	require.Len(t, s.asked, 1, "the open question comes first")
	dev = move(t, d, dev, s)
	require.NoError(t, dev.Complete(1, []byte{1, 2, 3}))
	require.Equal(t, make([]byte, 100), d.Get(buf, 100))
	require.Equal(t, question{2, 50}, s.asked[1])
	dev.Reset()
	require.NoError(t, dev.Complete(2, []byte{1, 2, 3}))
	require.Equal(t, make([]byte, 100), d.Get(buf, 100))
	require.Len(t, s.asked, 2)
}

func TestRestoreRefusesWhatCannotBe(t *testing.T) {
	d, dev, _ := setup(t)
	d.Rings[0].Add(virtiotest.In(d.Alloc(100), 100))
	d.Rings[0].Kick()
	good := dev.Save()
	for name, damage := range map[string]func(s *rng.State){
		"no next tag":        func(s *rng.State) { s.NextTag = 0 },
		"open tag to come":   func(s *rng.State) { s.Open = 2 },
		"orphan of nothing":  func(s *rng.State) { s.Open, s.Orphan, s.In = 0, true, nil },
		"orphan with buffer": func(s *rng.State) { s.Orphan = true },
		"no buffer":          func(s *rng.State) { s.In = nil },
		"buffer":             func(s *rng.State) { s.In[0].Addr = virtiotest.LowSize },
		"head":               func(s *rng.State) { s.Head = 256 },
		"not in use":         func(s *rng.State) { s.Transport.Queues[0].InUse = 0 },
		"transport":          func(s *rng.State) { s.Transport.ISR = 7 },
		"queues":             func(s *rng.State) { s.Transport.Queues = nil },
	} {
		s := virtiotest.Encoded(t, good)
		damage(&s)
		require.Error(t, dev.Restore(s), name)
		require.Equal(t, good, dev.Save(), name)
	}
}

// virtio 1.2, 5.4: no features and no configuration of its own.
func TestThereIsNothingToConfigure(t *testing.T) {
	d, _, _ := setup(t)
	require.EqualValues(t, 1<<28|1<<29|1<<32, d.Offered())
	require.EqualValues(t, 0xffffffff, d.Modern.Read(virtiotest.DeviceConfig, 4))
	d.Modern.Write(virtiotest.DeviceConfig, 4, 0)
	require.EqualValues(t, 0xff, d.Legacy.Read(0x18, 1))
	d.Legacy.Write(0x18, 1, 0)
}

// Whatever chains the driver makes, questions stay within limits and every chain comes back.
func FuzzChains(f *testing.F) {
	f.Add([]byte{1, 5, 2, 9}, []byte("abc"))
	f.Add([]byte{0, 0, 255}, []byte{})
	d, dev, s := setup(f)
	buf := d.Alloc(1 << 16)
	f.Fuzz(func(t *testing.T, shape, answer []byte) {
		d.TB = t
		var bufs []virtiotest.Buf
		for i, b := range shape[:min(len(shape), 7)] {
			bufs = append(bufs, virtiotest.Buf{Addr: buf + uint64(i), Len: uint32(b) << 4, Write: i >= len(shape)/2})
		}
		if len(bufs) == 0 {
			return
		}
		d.Rings[0].Add(bufs...)
		d.Rings[0].Kick()
		require.LessOrEqual(t, len(s.asked), 1)
		for _, q := range s.asked {
			require.True(t, q.n > 0 && q.n <= rng.MaxEntropy)
			require.NoError(t, dev.Complete(q.tag, answer))
		}
		require.Len(t, d.Rings[0].TakeAll(), 1)
		require.Zero(t, d.Status()&virtio.StatusNeedsReset)
		s.asked, d.Messages = s.asked[:0], d.Messages[:0]
	})
}
