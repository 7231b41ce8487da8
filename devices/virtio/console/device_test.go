package console_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/console"
	"github.com/ftvmm/ftvmm/devices/virtio/internal/virtiotest"
)

const rx, tx = 0, 1

type guest struct {
	*virtiotest.Driver
	t   testing.TB
	dev *console.Device
	out []byte
}

func newGuest(t testing.TB) *guest {
	g := &guest{t: t}
	g.dev = console.New(g.print)
	g.Driver = virtiotest.New(t, g.dev, virtio.Options{})
	g.Init(^uint64(0), 8)
	g.TakeMessages()
	return g
}

func (g *guest) print(p []byte) { g.out = append(g.out, p...) }

// move replaces the device by another one in the same state.
func (g *guest) move() {
	s := g.dev.Save()
	g.dev = console.New(g.print)
	g.Plug(g.dev, virtio.Options{})
	require.NoError(g.t, g.dev.Restore(virtiotest.Encoded(g.t, s)))
	require.Equal(g.t, s, g.dev.Save())
	g.dev.Reissue()
}

func TestWhatTheGuestWritesComesOut(t *testing.T) {
	g := newGuest(t)
	long := bytes.Repeat([]byte("0123456789"), 1000)
	g.Rings[tx].Add(virtiotest.Out(g.Put([]byte("hello, ")), 7), virtiotest.Out(g.Put([]byte("world\n")), 6))
	g.Rings[tx].Add(virtiotest.Out(g.Put(long), len(long)))
	g.Rings[tx].Kick()
	require.True(t, "hello, world\n"+string(long) == string(g.out))
	require.Len(t, g.Rings[tx].TakeAll(), 2)
	require.Equal(t, []uint32{0x42}, g.TakeMessages())
	g.out = nil
	huge := g.Alloc(1 << 20)
	g.Rings[tx].Add(virtiotest.Out(huge, 1<<20), virtiotest.Out(huge, 1<<20))
	g.Rings[tx].Kick()
	require.Len(t, g.out, console.MaxWrite)
	require.Len(t, g.Rings[tx].TakeAll(), 1)
}

func TestConfiguration(t *testing.T) {
	g := newGuest(t)
	require.EqualValues(t, 1<<0|1<<2|1<<28|1<<29|1<<32, g.Offered())
	require.EqualValues(t, 25<<16|80, g.Modern.Read(virtiotest.DeviceConfig, 4))
	g.dev.Resize(132, 50)
	require.Equal(t, []uint32{0x40}, g.TakeMessages())
	g.dev.Resize(132, 50)
	require.Empty(t, g.TakeMessages())
	g.move()
	require.EqualValues(t, 50<<16|132, g.Modern.Read(virtiotest.DeviceConfig, 4))
	g.SetStatus(0)
	g.Modern.Write(virtiotest.DeviceConfig+8, 4, 'A')
	require.Equal(t, "A", string(g.out), "the emergency write needs no driver")
	g.Modern.Write(virtiotest.DeviceConfig, 4, 0)
	require.EqualValues(t, 50<<16|132, g.Modern.Read(virtiotest.DeviceConfig, 4))
}

func TestInputIsBounded(t *testing.T) {
	g := newGuest(t)
	p := bytes.Repeat([]byte{'x'}, console.MaxBacklog+10)
	require.Equal(t, console.MaxBacklog, g.dev.Receive(p))
	require.Zero(t, g.dev.Room())
	require.Zero(t, g.dev.Receive(p))
	buf := g.Alloc(100)
	g.Rings[rx].Add(virtiotest.In(buf, 100))
	g.Rings[rx].Add(virtiotest.Out(buf, 1)) // no room in that one
	g.Rings[rx].Kick()
	require.Equal(t, 100, g.dev.Room())
	done := g.Rings[rx].TakeAll()
	require.Len(t, done, 2)
	require.EqualValues(t, 100, done[0].Len)
	g.dev.Reset()
	require.Equal(t, console.MaxBacklog, g.dev.Room())
	s := g.dev.Save()
	s.Backlog = make([]byte, console.MaxBacklog+1)
	require.Error(t, g.dev.Restore(s))
	s = g.dev.Save()
	s.Transport.ISR = 7
	require.Error(t, g.dev.Restore(s))
}

// What is typed arrives whole and in order, whatever buffers the driver offers.
func TestInputMatchesAModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		g := newGuest(t)
		var typed, got []byte
		at := map[uint16]uint64{}
		for range rapid.IntRange(1, 30).Draw(rt, "steps") {
			switch rapid.IntRange(0, 3).Draw(rt, "action") {
			case 0, 1:
				p := rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(rt, "p")
				require.Equal(rt, len(p), g.dev.Receive(p))
				typed = append(typed, p...)
			case 2:
				if g.Rings[rx].Room() > 0 {
					n := rapid.IntRange(1, 300).Draw(rt, "buffer")
					a := g.Alloc(uint64(n))
					at[g.Rings[rx].Add(virtiotest.In(a, n))] = a
					g.Rings[rx].Kick()
				}
			case 3:
				g.move()
			}
			for _, d := range g.Rings[rx].TakeAll() {
				got = append(got, g.Get(at[d.Head], int(d.Len))...)
			}
		}
		require.True(rt, bytes.HasPrefix(typed, got))
		require.Equal(rt, len(typed)-len(got), console.MaxBacklog-g.dev.Room())
	})
}

// Whatever chains the driver makes, the console stays within its limits and every
// chain comes back.
func FuzzChains(f *testing.F) {
	f.Add([]byte{1, 5, 2, 9}, []byte("abc"))
	f.Add([]byte{0x81, 0, 0x82, 255, 3}, []byte{})
	g := newGuest(f)
	buf := g.Alloc(1 << 16)
	f.Fuzz(func(t *testing.T, shape, typed []byte) {
		g.t, g.TB, g.out = t, t, nil
		var bufs []virtiotest.Buf
		for i, b := range shape[:min(len(shape), 7)] {
			bufs = append(bufs, virtiotest.Buf{Addr: buf + uint64(i), Len: uint32(b) << 4, Write: i >= len(shape)/2})
		}
		if len(bufs) == 0 {
			return
		}
		for _, r := range g.Rings {
			r.Add(bufs...)
			r.Kick()
		}
		g.dev.Receive(typed)
		require.Len(t, g.Rings[tx].TakeAll(), 1)
		for len(g.Rings[rx].TakeAll()) == 0 {
			require.NotZero(t, g.dev.Receive([]byte{1}))
		}
		require.Zero(t, g.Status()&virtio.StatusNeedsReset)
		require.LessOrEqual(t, len(g.out), console.MaxWrite)
		g.Messages = g.Messages[:0]
	})
}
