package net_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/internal/virtiotest"
	"github.com/ftvmm/ftvmm/devices/virtio/net"
)

const (
	rx, tx, ctrl = 0, 1, 2

	everything   = ^uint64(0)
	fChecksum    = 1 << 0
	fGuestCsum   = 1 << 1
	fGuestTSO4   = 1 << 7
	fGuestTSO6   = 1 << 8
	fGuestECN    = 1 << 9
	fHostTSO4    = 1 << 11
	fMergeable   = 1 << 15
	fStatus      = 1 << 16
	fControl     = 1 << 17
	fControlRx   = 1 << 18
	fControlMore = 1 << 20
	fAnnounce    = 1 << 21
	fControlMAC  = 1 << 23

	allOffloads = net.TxChecksum | net.TxTSO4 | net.TxTSO6 | net.RxChecksum | net.RxTSO4 | net.RxTSO6
)

var mac = net.MAC{0x52, 0x54, 0, 1, 2, 3}

// wire is the network behind the card.
type wire struct {
	sent     [][]byte
	offloads net.Offloads
	told     int
}

func (w *wire) Transmit(frame []byte) { w.sent = append(w.sent, bytes.Clone(frame)) }
func (w *wire) SetOffloads(o net.Offloads) {
	w.offloads = o
	w.told++
}

type guest struct {
	*virtiotest.Driver
	t    testing.TB
	wire *wire
	dev  *net.Device
	cfg  net.Config
	opts virtio.Options
}

func newGuest(t testing.TB, o net.Offloads, opts virtio.Options) *guest {
	g := &guest{t: t, wire: &wire{}, cfg: net.Config{MAC: mac, Offloads: o}, opts: opts}
	g.dev = net.New(g.cfg, g.wire)
	g.Driver = virtiotest.New(t, g.dev, opts)
	return g
}

// move replaces the device by another one in the same state.
func (g *guest) move() {
	s := g.dev.Save()
	g.dev = net.New(g.cfg, g.wire)
	g.Plug(g.dev, g.opts)
	require.NoError(g.t, g.dev.Restore(virtiotest.Encoded(g.t, s)))
	require.Equal(g.t, s, g.dev.Save())
	g.dev.Reissue()
}

// frame returns a frame to dst of n bytes behind its header, numbered.
func frame(dst net.MAC, n int, number byte) []byte {
	f := make([]byte, net.HeaderSize+n)
	copy(f[net.HeaderSize:], dst[:])
	for i := net.HeaderSize + 12; i < len(f); i++ {
		f[i] = number + byte(i)
	}
	return f
}

// withHeader sets fields of the header: flags, GSO type, GSO size, checksum start and offset.
func withHeader(f []byte, flags, gso byte, size, start, offset uint16) []byte {
	f[0], f[1] = flags, gso
	binary.LittleEndian.PutUint16(f[4:], size)
	binary.LittleEndian.PutUint16(f[6:], start)
	binary.LittleEndian.PutUint16(f[8:], offset)
	return f
}

// offer gives the card receive buffers of n bytes each and returns their addresses by head.
func (g *guest) offer(sizes ...int) map[uint16]uint64 {
	at := map[uint16]uint64{}
	for _, n := range sizes {
		a := g.Alloc(uint64(n) + 1)
		at[g.Rings[rx].Add(virtiotest.In(a, n))] = a
	}
	return at
}

// send transmits a frame in two buffers.
func (g *guest) send(f []byte) {
	a := g.Put(f)
	cut := min(len(f), net.HeaderSize)
	g.Rings[tx].Add(virtiotest.Out(a, cut), virtiotest.Out(a+uint64(cut), len(f)-cut))
	g.Rings[tx].Kick()
}

// command runs a control command and returns its answer.
func (g *guest) command(class, cmd byte, data ...byte) byte {
	answer := g.Put([]byte{0xee})
	g.Rings[ctrl].Add(virtiotest.Out(g.Put([]byte{class, cmd}), 2), virtiotest.Out(g.Put(append(data, 0)), len(data)), virtiotest.In(answer, 1))
	g.Rings[ctrl].Kick()
	require.Len(g.t, g.Rings[ctrl].TakeAll(), 1)
	return g.Get(answer, 1)[0]
}

// virtio 1.2, 5.1.3 and 5.1.4.
func TestFeaturesFollowTheNetwork(t *testing.T) {
	const always = 1<<5 | 1<<15 | 1<<16 | 1<<17 | 1<<18 | 1<<20 | 1<<21 | 1<<23 | 1<<28 | 1<<29 | 1<<32
	for _, c := range []struct {
		offloads net.Offloads
		mtu      uint16
		want     uint64
	}{
		{0, 0, always},
		{0, 1500, always | 1<<3},
		{net.TxChecksum, 0, always | 1<<0},
		{net.TxTSO4 | net.RxTSO4, 0, always},
		{net.TxChecksum | net.TxTSO4, 0, always | 1<<0 | 1<<11 | 1<<13},
		{net.RxChecksum | net.RxTSO6, 0, always | 1<<1 | 1<<2 | 1<<8 | 1<<9},
		{allOffloads, 9000, always | 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<7 | 1<<8 | 1<<9 | 1<<11 | 1<<12 | 1<<13},
	} {
		dev := net.New(net.Config{MAC: mac, Offloads: c.offloads, MTU: c.mtu}, &wire{})
		d := virtiotest.New(t, dev, virtio.Options{})
		require.Equal(t, c.want, d.Offered(), "%b", c.offloads)
		require.EqualValues(t, 0x030201005452, d.Modern.Read(virtiotest.DeviceConfig, 8)&0xffffffffffff)
		require.EqualValues(t, 1, d.Modern.Read(virtiotest.DeviceConfig+6, 2))
		require.EqualValues(t, 1, d.Modern.Read(virtiotest.DeviceConfig+8, 2))
		require.EqualValues(t, c.mtu, d.Modern.Read(virtiotest.DeviceConfig+10, 2))
	}
}

// 5.1.3.1: features that need others.
func TestFeaturesThatDependOnOthersAreRefused(t *testing.T) {
	g := newGuest(t, allOffloads, virtio.Options{})
	for _, bad := range []uint64{fGuestTSO4, fGuestTSO6, fHostTSO4, 1 << 12, fGuestCsum | fGuestECN, fChecksum | 1<<13,
		1 << 2, fControlRx, fControlMore, fAnnounce, fControlMAC} {
		require.False(t, g.Negotiate(bad), "%#x", bad)
	}
	require.True(t, g.Negotiate(fGuestCsum|fGuestTSO4|fGuestECN))
	require.Equal(t, net.RxChecksum|net.RxTSO4, g.wire.offloads)
	g.SetStatus(0)
	require.Zero(t, g.wire.offloads)
}

func TestFramesAreSent(t *testing.T) {
	for name, c := range map[string]struct {
		init   func(g *guest)
		header int
	}{
		"modern":               {func(g *guest) { g.Init(everything, 16) }, 12},
		"modern, plain":        {func(g *guest) { g.Init(0, 16) }, 12},
		"legacy":               {func(g *guest) { g.InitLegacy(0) }, 10},
		"legacy and mergeable": {func(g *guest) { g.InitLegacy(fMergeable) }, 12},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, 0, virtio.Options{Transitional: true})
			c.init(g)
			f := frame(mac, 100, 7)
			g.send(f[net.HeaderSize-c.header:])
			require.Equal(t, [][]byte{f}, g.wire.sent)
			require.Len(t, g.Rings[tx].TakeAll(), 1)
			require.EqualValues(t, net.Counters{Sent: 1}, g.dev.Counters())
			g.send(f[net.HeaderSize-c.header:][:c.header+13])
			g.send(f[:3])
			g.send(make([]byte, net.MaxFrame-net.HeaderSize+c.header+1))
			require.Len(t, g.wire.sent, 1)
			require.Len(t, g.Rings[tx].TakeAll(), 3)
			require.EqualValues(t, net.Counters{Sent: 1, TxDropped: 3}, g.dev.Counters())
			g.send(make([]byte, net.MaxFrame-net.HeaderSize+c.header))
			require.Len(t, g.wire.sent, 2)
			require.Len(t, g.wire.sent[1], net.MaxFrame)
		})
	}
}

// Headers cross the card only within what was agreed, in both directions.
func TestHeadersKeepToWhatWasAgreed(t *testing.T) {
	const all = fChecksum | fHostTSO4 | 1<<12 | fGuestCsum | fGuestTSO4 | fGuestTSO6
	for name, c := range map[string]struct {
		features           uint64
		flags, gso         byte
		size, start, where uint16
		ok                 bool
	}{
		"plain":                           {0, 0, 0, 0, 0, 0, true},
		"checksum":                        {all, 1, 0, 0, 34, 16, true},
		"checksum, not agreed":            {0, 1, 0, 0, 34, 16, false},
		"checksum in the last two bytes":  {all, 1, 0, 0, 90, 8, true},
		"checksum past the end":           {all, 1, 0, 0, 90, 9, false},
		"checksum that wraps":             {all, 1, 0, 0, 0xffff, 0xffff, false},
		"TCPv4":                           {all, 1, 1, 1448, 34, 16, true},
		"TCPv6":                           {all, 1, 4, 1448, 54, 16, true},
		"TCPv4, not agreed":               {fChecksum | fGuestCsum, 1, 1, 1448, 34, 16, false},
		"TCPv4 without a checksum":        {all, 0, 1, 1448, 34, 16, false},
		"TCPv4 without a size":            {all, 1, 1, 0, 34, 16, false},
		"ECN, not agreed":                 {all, 1, 0x81, 1448, 34, 16, false},
		"ECN":                             {all | fGuestECN | 1<<13, 1, 0x81, 1448, 34, 16, true},
		"ECN alone":                       {all | fGuestECN | 1<<13, 1, 0x80, 1448, 34, 16, false},
		"UDP":                             {all, 1, 3, 1448, 34, 6, false},
		"unknown":                         {all, 1, 9, 1448, 34, 16, false},
		"leftovers without meaning":       {0, 0, 0, 77, 55, 66, true},
		"unknown flags are taken away":    {all, 0xfc, 0, 0, 0, 0, true},
		"data valid, agreed":              {all, 2, 0, 0, 0, 0, true},
		"data valid is harmless elsewise": {0, 2, 0, 0, 0, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, allOffloads, virtio.Options{})
			g.Init(c.features, 16)
			f := withHeader(frame(mac, 100, 1), c.flags, c.gso, c.size, c.start, c.where)
			g.send(f)
			at := g.offer(200)
			ok := g.dev.Receive(f)
			require.Equal(t, c.ok, ok)
			require.Equal(t, c.ok, len(g.wire.sent) == 1)
			if !c.ok {
				return
			}
			done := g.Rings[rx].TakeAll()
			require.Len(t, done, 1)
			got := g.Get(at[done[0].Head], int(done[0].Len))
			require.Equal(t, f[net.HeaderSize:], got[net.HeaderSize:])
			require.Equal(t, f[net.HeaderSize:], g.wire.sent[0][net.HeaderSize:])
			require.EqualValues(t, 1, binary.LittleEndian.Uint16(got[10:]), "num_buffers")
			for _, h := range [][]byte{got[:10], g.wire.sent[0][:10]} {
				require.Equal(t, c.flags&1, h[0]&1)
				require.Zero(t, h[0]&^3)
				if c.flags&1 == 0 {
					require.Equal(t, make([]byte, 9), h[1:10])
				} else {
					require.Equal(t, f[1:10], h[1:10])
				}
			}
			if c.features&fGuestCsum == 0 {
				require.Zero(t, got[0])
			}
		})
	}
}

func TestFramesAreReceived(t *testing.T) {
	for name, c := range map[string]struct {
		init   func(g *guest)
		header int
	}{
		"modern":        {func(g *guest) { g.Init(fMergeable, 16) }, 12},
		"modern, plain": {func(g *guest) { g.Init(0, 16) }, 12},
		"legacy":        {func(g *guest) { g.InitLegacy(0) }, 10},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, 0, virtio.Options{Transitional: true})
			c.init(g)
			at := g.offer(1514+c.header, 1514+c.header)
			g.TakeMessages()
			f := frame(mac, 1514, 3)
			require.True(t, g.dev.Receive(f))
			done := g.Rings[rx].TakeAll()
			require.Len(t, done, 1)
			require.EqualValues(t, c.header+1514, done[0].Len)
			require.Equal(t, f[12:], g.Get(at[done[0].Head]+uint64(c.header), 1514))
			if g.T.Legacy() {
				require.True(t, g.INTx)
			} else {
				require.Equal(t, []uint32{0x41}, g.TakeMessages())
			}
		})
	}
	t.Run("in two buffers without mergeable ones", func(t *testing.T) {
		g := newGuest(t, 0, virtio.Options{Transitional: true})
		g.InitLegacy(0)
		h, b := g.Alloc(10), g.Alloc(100)
		g.Rings[rx].Add(virtiotest.In(h, 10), virtiotest.In(b, 100))
		f := frame(mac, 100, 3)
		require.True(t, g.dev.Receive(f))
		require.Equal(t, f[12:], g.Get(b, 100))
		g.Rings[rx].Add(virtiotest.In(h, 10), virtiotest.In(b, 100))
		require.False(t, g.dev.Receive(frame(mac, 101, 3)), "does not fit and never will")
		require.True(t, g.dev.Receive(f), "the buffer is still there")
		require.Len(t, g.Rings[rx].TakeAll(), 2)
	})
}

// 5.1.6.4: a frame over several buffers; the first says how many.
func TestFramesAreMerged(t *testing.T) {
	g := newGuest(t, 0, virtio.Options{})
	g.Init(fMergeable, 8)
	at := g.offer(112, 50, 50, 200)
	f := frame(mac, 250, 9)
	require.True(t, g.dev.Receive(f))
	done := g.Rings[rx].TakeAll()
	require.Len(t, done, 4)
	var got []byte
	for _, d := range done {
		got = append(got, g.Get(at[d.Head], int(d.Len))...)
	}
	require.EqualValues(t, 4, binary.LittleEndian.Uint16(got[10:]))
	require.Equal(t, f[12:], got[12:])
	require.EqualValues(t, 50, done[3].Len)

	// Too few buffers for now: they stay with the driver until there are more.
	g.offer(112, 50)
	require.True(t, g.dev.Receive(f))
	require.Empty(t, g.Rings[rx].TakeAll())
	require.Equal(t, net.MaxBacklog-1, g.dev.Room())
	g.offer(200)
	g.Rings[rx].Kick()
	require.Len(t, g.Rings[rx].TakeAll(), 3)
	require.Equal(t, net.MaxBacklog, g.dev.Room())

	// A whole ring of buffers that is too small for a frame must not stop the traffic.
	g.offer(12, 12, 12, 12, 12, 12, 12, 12)
	require.False(t, g.dev.Receive(f))
	require.EqualValues(t, 1, g.dev.Counters().RxDropped)
	require.Zero(t, g.Status()&virtio.StatusNeedsReset)

	g.Init(fMergeable, 8)
	g.offer(11, 200)
	require.False(t, g.dev.Receive(f), "no room for the header in the first buffer")
	require.NotZero(t, g.Status()&virtio.StatusNeedsReset)
}

func TestBacklog(t *testing.T) {
	g := newGuest(t, 0, virtio.Options{})
	require.False(t, g.dev.Receive(frame(mac, 60, 0)), "no driver yet")
	g.Init(everything, 256)
	for i := range net.MaxBacklog {
		require.Equal(t, net.MaxBacklog-i, g.dev.Room())
		require.True(t, g.dev.Receive(frame(mac, 60+i, byte(i))))
	}
	require.False(t, g.dev.Receive(frame(mac, 60, 0)))
	require.EqualValues(t, net.Counters{RxDropped: 2}, g.dev.Counters())
	g.move()
	sizes := make([]int, 100)
	for i := range sizes {
		sizes[i] = 400
	}
	n := 0
	check := func() {
		at := g.offer(sizes...)
		g.Rings[rx].Kick()
		for _, d := range g.Rings[rx].TakeAll() {
			require.Equal(t, frame(mac, 60+n, byte(n))[12:], g.Get(at[d.Head], int(d.Len))[12:])
			n++
		}
	}
	check()
	require.Equal(t, 100, n)
	require.Equal(t, 100, g.dev.Room())
	check()
	check()
	require.Equal(t, net.MaxBacklog, n)
	require.True(t, g.dev.Receive(frame(mac, 60, 0)))
	require.Len(t, g.Rings[rx].TakeAll(), 1, "44 buffers are left")

	g.offer()
	g.Init(everything, 256)
	require.True(t, g.dev.Receive(frame(mac, 60, 0)))
	g.SetStatus(0)
	require.Equal(t, net.MaxBacklog, g.dev.Room(), "a reset forgets the backlog")
	require.False(t, g.dev.Receive(nil))
	require.False(t, g.dev.Receive(make([]byte, net.MaxFrame+1)))
}

func TestFilter(t *testing.T) {
	other, group, other2 := net.MAC{2, 0, 0, 0, 0, 1}, net.MAC{1, 0, 0x5e, 0, 0, 1}, net.MAC{2, 0, 0, 0, 0, 2}
	broadcast := net.MAC{255, 255, 255, 255, 255, 255}
	g := newGuest(t, 0, virtio.Options{})
	g.Init(everything, 256)
	gets := func(want ...net.MAC) {
		t.Helper()
		for _, m := range []net.MAC{mac, other, other2, group, broadcast} {
			expected := false
			for _, w := range want {
				expected = expected || w == m
			}
			g.offer(200)
			require.Equal(t, expected, g.dev.Receive(frame(m, 60, 0)), "%x", m)
			g.move()
		}
	}
	gets(mac, other, other2, group, broadcast) // everything before the driver asks for less
	require.Zero(t, g.command(0, 0, 0))        // not promiscuous
	gets(mac, broadcast)
	require.Zero(t, g.command(0, 1, 1)) // all multicast
	gets(mac, group, broadcast)
	require.Zero(t, g.command(0, 1, 0))
	require.Zero(t, g.command(0, 2, 1)) // all unicast
	gets(mac, other, other2, broadcast)
	require.Zero(t, g.command(0, 2, 0))
	table := func(n uint32, macs ...net.MAC) (p []byte) {
		p = binary.LittleEndian.AppendUint32(nil, n)
		for _, m := range macs {
			p = append(p, m[:]...)
		}
		return p
	}
	require.Zero(t, g.command(1, 0, append(table(1, other), table(1, group)...)...))
	gets(mac, other, group, broadcast)
	require.Zero(t, g.command(0, 3, 1)) // no multicast
	require.Zero(t, g.command(0, 5, 1)) // no broadcast
	gets(mac, other)
	require.Zero(t, g.command(0, 4, 1)) // no unicast
	gets()
	for _, cmd := range []byte{3, 4, 5} {
		require.Zero(t, g.command(0, cmd, 0))
	}
	require.Zero(t, g.command(1, 1, other2[:]...))
	require.Equal(t, other2, g.dev.MAC())
	require.EqualValues(t, 0x0200, g.Modern.Read(virtiotest.DeviceConfig+4, 2))
	gets(other, other2, group, broadcast)
	many := make([]net.MAC, net.MaxFilter+1)
	require.Zero(t, g.command(1, 0, append(table(uint32(len(many)), many...), table(0)...)...))
	gets(mac, other, other2, broadcast)
	require.Zero(t, g.command(1, 0, append(table(0), table(uint32(len(many)), many...)...)...))
	gets(other2, group, broadcast)

	const refused = 1
	for name, c := range map[string][]byte{
		"unknown class":          {9, 0},
		"unknown mode":           {0, 6, 1},
		"mode without a value":   {0, 0},
		"mode with two values":   {0, 0, 1, 1},
		"short address":          {1, 1, 1, 2, 3, 4, 5},
		"no tables":              {1, 0},
		"one table":              append([]byte{1, 0}, table(1, other)...),
		"table that is too long": append(append([]byte{1, 0}, table(1<<31)...), table(0)...),
		"something after tables": append(append([]byte{1, 0}, table(0)...), append(table(0), 1)...),
		"offloads not agreed":    {5, 0, 2, 0, 0, 0, 0, 0, 0, 0},
		"queue pairs":            {4, 0, 1, 0},
		"nothing to acknowledge": {3, 0, 1},
	} {
		before := g.dev.Save()
		require.EqualValues(t, refused, g.command(c[0], c[1], c[2:]...), name)
		require.Equal(t, before.Filter, g.dev.Save().Filter, name)
	}
	g.SetStatus(0)
	require.Equal(t, mac, g.dev.MAC(), "a reset brings the address back")
}

func TestCommandsNeedTheirFeatures(t *testing.T) {
	g := newGuest(t, allOffloads, virtio.Options{})
	g.Init(fControl|fControlRx, 16)
	require.EqualValues(t, 0, g.command(0, 0, 1))
	require.EqualValues(t, 1, g.command(0, 3, 1))
	require.EqualValues(t, 1, g.command(1, 1, mac[:]...))
	require.EqualValues(t, 1, g.command(3, 0))
	require.EqualValues(t, 1, g.command(5, 0, make([]byte, 8)...))
	g.Init(0, 16)
	require.EqualValues(t, 1, g.command(0, 0, 1))
	g.Rings[ctrl].Add(virtiotest.Out(g.Put([]byte{0}), 1))
	g.Rings[ctrl].Kick()
	require.Len(t, g.Rings[ctrl].TakeAll(), 1, "nowhere to answer, but it comes back")
}

func TestOffloadsAtRunTime(t *testing.T) {
	g := newGuest(t, allOffloads, virtio.Options{})
	g.Init(everything, 16)
	require.Equal(t, net.RxChecksum|net.RxTSO4|net.RxTSO6, g.wire.offloads)
	require.Zero(t, g.command(5, 0, 2, 0, 0, 0, 0, 0, 0, 0))
	require.Equal(t, net.RxChecksum, g.wire.offloads)
	g.wire.offloads = 99
	g.move()
	require.Equal(t, net.RxChecksum, g.wire.offloads, "told again after a restore")
	g.offer(200)
	require.False(t, g.dev.Receive(withHeader(frame(mac, 100, 0), 1, 1, 1448, 34, 16)), "switched off")
	require.True(t, g.dev.Receive(withHeader(frame(mac, 100, 0), 1, 0, 0, 34, 16)))
}

func TestLinkAndAnnouncement(t *testing.T) {
	g := newGuest(t, 0, virtio.Options{})
	g.dev.SetLink(false)
	g.Init(everything, 16)
	g.TakeMessages()
	status := func() uint64 { return g.Modern.Read(virtiotest.DeviceConfig+6, 2) }
	require.Zero(t, status(), "a reset does not plug the cable in")
	g.send(frame(mac, 60, 0))
	g.offer(200)
	require.Empty(t, g.wire.sent)
	require.False(t, g.dev.Receive(frame(mac, 60, 0)))
	require.Len(t, g.Rings[tx].TakeAll(), 1)
	g.TakeMessages()
	generation := g.Modern.Read(0x15, 1)
	g.dev.SetLink(true)
	g.dev.SetLink(true)
	require.EqualValues(t, 1, status())
	require.Equal(t, []uint32{0x40}, g.TakeMessages())
	require.EqualValues(t, generation+1, g.Modern.Read(0x15, 1))
	require.True(t, g.dev.Announce())
	require.EqualValues(t, 3, status())
	require.Equal(t, []uint32{0x40}, g.TakeMessages())
	g.move()
	require.EqualValues(t, 3, status())
	require.Zero(t, g.command(3, 0))
	require.EqualValues(t, 1, status())
	g.Init(fStatus, 16)
	require.False(t, g.dev.Announce(), "the driver cannot")
	g.SetStatus(0)
	require.False(t, g.dev.Announce())
}

// 5.1.4.3: only a legacy driver sets the address in the configuration.
func TestLegacyDriversSetTheAddressInTheConfiguration(t *testing.T) {
	g := newGuest(t, 0, virtio.Options{Transitional: true})
	g.InitLegacy(0)
	for i := range uint64(6) {
		g.Legacy.Write(0x14+i, 1, 0x10+i)
	}
	g.Legacy.Write(0x1a, 2, 0)
	require.Equal(t, net.MAC{0x10, 0x11, 0x12, 0x13, 0x14, 0x15}, g.dev.MAC())
	require.EqualValues(t, 1, g.Legacy.Read(0x1a, 2), "the status is read-only")
	g.Init(0, 16)
	g.Modern.Write(virtiotest.DeviceConfig, 4, 0)
	require.Equal(t, mac, g.dev.MAC())
}

func TestRestoreRefusesWhatCannotBe(t *testing.T) {
	g := newGuest(t, 0, virtio.Options{})
	g.Init(everything, 16)
	g.dev.Receive(frame(mac, 60, 0))
	good := g.dev.Save()
	for name, damage := range map[string]func(s *net.State){
		"status":            func(s *net.State) { s.Status = 4 },
		"offloads":          func(s *net.State) { s.Offloads = 1 << 20 },
		"offloads unagreed": func(s *net.State) { s.Offloads = 2 },
		"long frame":        func(s *net.State) { s.Backlog[0] = make([]byte, net.MaxFrame+1) },
		"short frame":       func(s *net.State) { s.Backlog[0] = s.Backlog[0][:20] },
		"too many frames": func(s *net.State) {
			for len(s.Backlog) <= net.MaxBacklog {
				s.Backlog = append(s.Backlog, s.Backlog[0])
			}
		},
		"too many addresses": func(s *net.State) { s.Filter.Multicast = make([]net.MAC, net.MaxFilter+1) },
		"transport":          func(s *net.State) { s.Transport.ISR = 7 },
	} {
		s := virtiotest.Encoded(t, good)
		damage(&s)
		require.Error(t, g.dev.Restore(s), name)
		require.Equal(t, good, g.dev.Save(), name)
	}
	g.dev.Reset()
	require.Equal(t, net.MaxBacklog, g.dev.Room())
}

// Frames arrive whole, in order and once, whatever buffers the driver offers and whenever,
// and wherever the machine moves in between.
func TestReceptionMatchesAModel(t *testing.T) {
	g := newGuest(t, 0, virtio.Options{})
	rapid.Check(t, func(t *rapid.T) {
		*g = *newGuest(g.t, 0, virtio.Options{})
		features := rapid.SampledFrom([]uint64{0, fMergeable, everything}).Draw(t, "features")
		g.Init(features, 16)
		var sent, got [][]byte
		var parts int
		at := map[uint16]uint64{}
		next := g.Alloc(1 << 20)
		collect := func() {
			for _, d := range g.Rings[rx].TakeAll() {
				p := g.Get(at[d.Head], int(d.Len))
				if parts == 0 {
					parts = int(binary.LittleEndian.Uint16(p[10:]))
					got = append(got, nil)
					p = p[net.HeaderSize:]
				}
				got[len(got)-1] = append(got[len(got)-1], p...)
				parts--
			}
		}
		for i := range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "action") {
			case 0, 1:
				f := frame(mac, rapid.IntRange(14, 300).Draw(t, "size"), byte(i))
				sent = append(sent, f[net.HeaderSize:])
				require.True(t, g.dev.Receive(f))
			case 2, 3:
				if g.Rings[rx].Room() > 0 {
					n := 320
					if features != 0 {
						n = rapid.IntRange(12, 320).Draw(t, "buffer")
					}
					at[g.Rings[rx].Add(virtiotest.In(next, n))] = next
					next += uint64(n)
					g.Rings[rx].Kick()
				}
			case 4:
				g.move()
			}
			collect()
		}
		for range 80 {
			for g.Rings[rx].Room() > 0 {
				at[g.Rings[rx].Add(virtiotest.In(next, 320))] = next
				next += 320
			}
			g.Rings[rx].Kick()
			collect()
		}
		require.Zero(t, parts)
		require.Equal(t, sent, got)
		require.Equal(t, net.MaxBacklog, g.dev.Room())
	})
}

// Whatever the driver sends or commands, what reaches the network is a frame within
// limits and agreements, and every chain comes back.
func FuzzFrame(f *testing.F) {
	f.Add([]byte{1, 1, 0, 0, 168, 5, 34, 0, 16, 0, 0, 0, 82, 84, 0, 1, 2, 3, 82, 84, 0, 1, 2, 4, 8, 0}, uint8(12), uint16(100), true)
	f.Add([]byte{1, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0}, uint8(2), uint16(16), false)
	f.Add([]byte{0, 5, 1}, uint8(1), uint16(3), false)
	w := &wire{}
	dev := net.New(net.Config{MAC: mac, Offloads: allOffloads}, w)
	d := virtiotest.New(f, dev, virtio.Options{})
	d.Init(everything&^(1<<29), 16)
	src, dst := d.Alloc(1<<17), d.Alloc(1<<17)
	f.Fuzz(func(t *testing.T, data []byte, cut uint8, size uint16, send bool) {
		d.TB = t
		require.NoError(t, d.Mem.Write(src, data[:min(len(data), 1<<17)]))
		r := d.Rings[ctrl]
		if send {
			r = d.Rings[tx]
		}
		head := min(int(cut), int(size))
		r.Add(virtiotest.Out(src, head), virtiotest.Out(src+uint64(head), int(size)-head), virtiotest.In(src+1<<16, 1))
		r.Kick()
		require.Len(t, r.TakeAll(), 1)
		require.Zero(t, d.Status()&virtio.StatusNeedsReset)
		for _, s := range w.sent {
			require.True(t, len(s) >= net.HeaderSize+14 && len(s) <= net.MaxFrame)
			if s[0]&1 != 0 {
				require.LessOrEqual(t, int(binary.LittleEndian.Uint16(s[6:]))+int(binary.LittleEndian.Uint16(s[8:]))+2, len(s)-net.HeaderSize)
			} else {
				require.Zero(t, s[1])
			}
			if d.Rings[rx].Room() > 0 { // what is not taken leaves its buffer there
				d.Rings[rx].Add(virtiotest.In(dst, 1<<17))
			}
			dev.Receive(s)
			d.Rings[rx].TakeAll()
		}
		w.sent = w.sent[:0]
		d.Messages = d.Messages[:0]
		require.NoError(t, dev.Restore(dev.Save()))
	})
}

// discardWire is a network that keeps nothing.
type discardWire struct{}

func (discardWire) Transmit([]byte)          {}
func (discardWire) SetOffloads(net.Offloads) {}

// again returns a function that makes the ring's first chain available once more.
func again(d *virtiotest.Driver, q int, head uint16) func() {
	ring, idx := d.Rings[q], uint16(1)
	return func() {
		d.Mem.PutUint16(ring.Avail+4+2*uint64(idx%ring.Size), head)
		idx++
		d.Mem.PutUint16(ring.Avail+2, idx)
		ring.SetUsedEvent(idx - 1)
		d.Messages = d.Messages[:0]
	}
}

func sender(tb testing.TB) func() {
	dev := net.New(net.Config{MAC: mac}, discardWire{})
	d := virtiotest.New(tb, dev, virtio.Options{})
	d.Init(everything, 16)
	head := d.Rings[tx].Add(virtiotest.Out(d.Put(frame(mac, 1514, 0)), net.HeaderSize+1514))
	d.Rings[tx].Kick()
	next := again(d, tx, head)
	return func() {
		next()
		d.Modern.Write(virtiotest.Notify+4, 2, 1)
		if len(d.Messages) != 1 {
			tb.Fatal("no completion")
		}
	}
}

func receiver(tb testing.TB) func() {
	dev := net.New(net.Config{MAC: mac}, discardWire{})
	d := virtiotest.New(tb, dev, virtio.Options{})
	d.Init(everything, 16)
	f := frame(mac, 1514, 0)
	head := d.Rings[rx].Add(virtiotest.In(d.Alloc(2048), 2048))
	dev.Receive(f)
	next := again(d, rx, head)
	return func() {
		next()
		if !dev.Receive(f) || len(d.Messages) != 1 {
			tb.Fatal("not delivered")
		}
	}
}

func TestFramesAllocateNothing(t *testing.T) {
	require.Zero(t, testing.AllocsPerRun(100, sender(t)))
	require.Zero(t, testing.AllocsPerRun(100, receiver(t)))
}

func BenchmarkTransmit(b *testing.B) {
	f := sender(b)
	b.ReportAllocs()
	b.SetBytes(1514)
	for b.Loop() {
		f()
	}
}

func BenchmarkReceive(b *testing.B) {
	f := receiver(b)
	b.ReportAllocs()
	b.SetBytes(1514)
	for b.Loop() {
		f()
	}
}
