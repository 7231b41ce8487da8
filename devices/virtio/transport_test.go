package virtio_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/devices/virtio"
	"github.com/ftvmm/ftvmm/devices/virtio/internal/virtiotest"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

type typed struct {
	*echo
	kind uint16
}

func (d typed) Info() virtio.Info {
	i := d.echo.Info()
	i.Type = d.kind
	return i
}

// virtio 1.2, 4.1.2: the IDs that drivers look for.
func TestIdentity(t *testing.T) {
	for _, c := range []struct {
		kind         uint16
		transitional bool
		device, sub  uint16
		revision     uint64
	}{
		{1, true, 0x1000, 1, 0}, {2, true, 0x1001, 2, 0}, {3, true, 0x1003, 3, 0}, {4, true, 0x1005, 4, 0},
		{1, false, 0x1041, 0x1100, 1}, {2, false, 0x1042, 0x1100, 1}, {3, false, 0x1043, 0x1100, 1}, {4, false, 0x1044, 0x1100, 1},
	} {
		d := virtiotest.New(t, typed{newEcho(), c.kind}, virtio.Options{Transitional: c.transitional})
		f := d.T.Function()
		require.EqualValues(t, 0x1af4, f.ReadConfig(0, 2))
		require.EqualValues(t, c.device, f.ReadConfig(2, 2))
		require.EqualValues(t, c.revision, f.ReadConfig(8, 1))
		require.EqualValues(t, 0x018000, f.ReadConfig(8, 4)>>8)
		require.EqualValues(t, 0x1af4, f.ReadConfig(0x2c, 2))
		require.EqualValues(t, c.sub, f.ReadConfig(0x2e, 2))
		require.Equal(t, c.transitional, d.Legacy != nil)
	}
}

// 4.1.4: one capability of each kind, where the driver finds the structures.
func TestCapabilities(t *testing.T) {
	d := virtiotest.New(t, newEcho(), virtio.Options{})
	f := d.T.Function()
	type location struct{ bar, offset, length, extra uint64 }
	got := map[uint64]location{}
	for at := f.ReadConfig(0x34, 1); at != 0; at = f.ReadConfig(at+1, 1) {
		if f.ReadConfig(at, 1) != 0x09 {
			continue
		}
		kind := f.ReadConfig(at+3, 1)
		l := location{f.ReadConfig(at+4, 1), f.ReadConfig(at+8, 4), f.ReadConfig(at+12, 4), 0}
		if f.ReadConfig(at+2, 1) == 20 {
			l.extra = f.ReadConfig(at+16, 4)
		} else {
			require.EqualValues(t, 16, f.ReadConfig(at+2, 1))
		}
		got[kind] = l
	}
	require.Equal(t, map[uint64]location{
		1: {4, 0x0000, 0x38, 0},
		2: {4, 0x3000, 8, 4}, // four bytes for each queue
		3: {4, 0x1000, 1, 0},
		4: {4, 0x2000, 10, 0},
		5: {},
	}, got)
}

// 4.1.4.9: firmware in real mode reaches the BARs through configuration space.
func TestConfigurationAccessCapability(t *testing.T) {
	d := virtiotest.New(t, newEcho(), virtio.Options{})
	f := d.T.Function()
	at := f.ReadConfig(0x34, 1)
	for f.ReadConfig(at, 1) != 0x09 || f.ReadConfig(at+3, 1) != 5 {
		at = f.ReadConfig(at+1, 1)
	}
	access := func(bar, off, n uint64) {
		f.WriteConfig(at+4, 1, bar)
		f.WriteConfig(at+8, 4, off)
		f.WriteConfig(at+12, 4, n)
	}
	access(4, virtiotest.Common+0x14, 1)
	f.WriteConfig(at+16, 1, 3)
	require.EqualValues(t, 3, d.Status())
	require.EqualValues(t, 3, f.ReadConfig(at+16, 1))
	access(4, virtiotest.DeviceConfig+4, 4)
	require.EqualValues(t, 0x08070605, f.ReadConfig(at+16, 4))
	require.EqualValues(t, 0x0807, f.ReadConfig(at+18, 2))
	access(4, virtiotest.DeviceConfig, 2)
	f.WriteConfig(at+16, 2, 0xbbaa)
	require.EqualValues(t, 0xbbaa, d.Modern.Read(virtiotest.DeviceConfig, 2))
	require.EqualValues(t, 4, f.ReadConfig(at+4, 1), "what was written reads back")
	for _, bad := range [][3]uint64{{0, 0, 1}, {1, 0, 4}, {9, 0, 4}, {4, 0, 3}, {4, 0, 0}, {4, 0, 1 << 31}, {4, 0xffffffff, 4}, {4, 0x3fff, 4}} {
		access(bad[0], bad[1], bad[2])
		f.WriteConfig(at+16, 4, 0) // must not reset the device
		f.ReadConfig(at+16, 4)
	}
	require.EqualValues(t, 3, d.Status())
	f.WriteConfig(at+2, 2, 0xffff)
	require.EqualValues(t, 20, f.ReadConfig(at+2, 1), "length and type cannot be changed")
}

func TestFeatureNegotiation(t *testing.T) {
	e := newEcho()
	e.features, e.refuse = 1<<3|1<<40, 1<<40
	d := virtiotest.New(t, e, virtio.Options{Transitional: true})
	require.Equal(t, uint64(1<<3|1<<40|1<<28|1<<29|1<<32), d.Offered())
	d.Modern.Write(0, 4, 2)
	require.Zero(t, d.Modern.Read(4, 4), "no features beyond the first 64")
	require.False(t, d.Negotiate(1<<4), "never offered")
	require.False(t, d.Negotiate(1<<40), "the device refuses")
	require.False(t, d.T.Has(1<<40))
	require.True(t, d.Negotiate(1<<3))
	require.EqualValues(t, 1<<3|1<<32, e.accepted)
	require.True(t, d.T.Has(1<<3))
	d.Modern.Write(0x08, 4, 0)
	d.Modern.Write(0x0c, 4, 0)
	require.EqualValues(t, 1<<3, d.Modern.Read(0x0c, 4), "fixed after FEATURES_OK")

	d.SetStatus(0)
	d.SetStatus(3)
	d.Modern.Write(0x0c, 4, 1<<3)
	d.SetStatus(0xb)
	require.EqualValues(t, 3, d.Status(), "VERSION_1 is not an option for a modern driver")
	d.SetStatus(0)
	d.Modern.Write(0x08, 4, 1)
	d.Modern.Write(0x0c, 4, 1)
	d.Modern.Write(0x08, 4, 2)
	d.Modern.Write(0x0c, 4, 1)
	d.SetStatus(0xb)
	require.EqualValues(t, 3, d.Status(), "nor are features beyond the first 64")
}

func TestResetForgetsEverything(t *testing.T) {
	d, e := setup(t, ringFeatures, 8)
	d.T.ConfigChanged()
	clears := e.clears
	d.SetStatus(0)
	require.Equal(t, clears+1, e.clears)
	require.Zero(t, d.Status())
	require.Zero(t, d.Modern.Read(virtiotest.ISR, 1))
	require.False(t, d.T.Has(virtio.FeatureVersion1))
	d.Modern.Write(0x16, 2, 0)
	require.EqualValues(t, 256, d.Modern.Read(0x18, 2))
	require.EqualValues(t, 0xffff, d.Modern.Read(0x1a, 2))
	require.EqualValues(t, 0, d.Modern.Read(0x1c, 2))
	require.EqualValues(t, 0, d.Modern.Read(0x20, 8))
	require.EqualValues(t, 0xffff, d.Modern.Read(0x10, 2))
}

func TestQueueRegisters(t *testing.T) {
	d := virtiotest.New(t, newEcho(), virtio.Options{QueueSize: 64, Vectors: 2})
	require.EqualValues(t, 2, d.Modern.Read(0x12, 2))
	d.Modern.Write(0x16, 2, 1)
	for _, bad := range []uint64{0, 3, 63, 128, 0x8000} {
		d.Modern.Write(0x18, 2, bad)
		require.EqualValues(t, 64, d.Modern.Read(0x18, 2))
	}
	d.Modern.Write(0x18, 2, 16)
	require.EqualValues(t, 16, d.Modern.Read(0x18, 2))
	d.Modern.Write(0x1a, 2, 1)
	require.EqualValues(t, 1, d.Modern.Read(0x1a, 2))
	d.Modern.Write(0x1a, 2, 2)
	require.EqualValues(t, 0xffff, d.Modern.Read(0x1a, 2), "there is no vector 2")
	d.Modern.Write(0x10, 2, 7)
	require.EqualValues(t, 0xffff, d.Modern.Read(0x10, 2))
	d.Modern.Write(0x20, 4, 0x11111111)
	d.Modern.Write(0x24, 4, 0x22222222)
	require.EqualValues(t, 0x2222222211111111, d.Modern.Read(0x20, 8))
	require.EqualValues(t, 0x22222222, d.Modern.Read(0x24, 4))
	d.Modern.Write(0x28, 8, 0x3333333344444444)
	require.EqualValues(t, 0x3333333344444444, d.Modern.Read(0x28, 8))
	require.EqualValues(t, 1, d.Modern.Read(0x1e, 2), "queue_notify_off")
	require.EqualValues(t, 0x00, d.Modern.Read(0x15, 1))
	d.Modern.Write(0x1c, 2, 1)
	d.Modern.Write(0x20, 8, 0)
	d.Modern.Write(0x18, 2, 8)
	d.Modern.Write(0x1c, 2, 0)
	require.EqualValues(t, 0x2222222211111111, d.Modern.Read(0x20, 8), "fixed while enabled")
	require.EqualValues(t, 16, d.Modern.Read(0x18, 2))
	require.EqualValues(t, 1, d.Modern.Read(0x1c, 2))
	d.Modern.Write(0x16, 2, 2)
	require.EqualValues(t, 0, d.Modern.Read(0x18, 2), "no such queue")
	d.Modern.Write(0x1c, 2, 1)
	require.EqualValues(t, 0, d.Modern.Read(0x1c, 2))
}

func TestNothingIsProcessedTooEarly(t *testing.T) {
	d, e := setup(t, 0, 8)
	r := d.Rings[0]
	buf := virtiotest.Out(0x1000, 1)
	d.T.Function().WriteConfig(4, 2, 3) // no bus mastering
	r.Add(buf)
	r.Kick()
	require.Empty(t, e.got)
	d.T.Function().WriteConfig(4, 2, 7)
	r.Kick()
	require.Len(t, e.got, 1)

	require.True(t, d.Negotiate(0))
	d.SetQueues(8)
	d.Rings[0].Add(buf)
	d.Rings[0].Kick()
	require.Len(t, e.got, 1)
	d.SetStatus(0xf)
	require.Len(t, e.got, 2, "what was announced before DRIVER_OK is not lost")
	d.Modern.Write(virtiotest.Notify+8, 2, 2)
	d.Modern.Write(virtiotest.Notify+4, 2, 1)
}

func TestConfigurationChanges(t *testing.T) {
	d, _ := setup(t, 0, 8)
	before := d.Modern.Read(0x15, 1)
	d.T.ConfigChanged()
	require.EqualValues(t, before+1, d.Modern.Read(0x15, 1))
	require.Equal(t, []uint32{0x40}, d.TakeMessages())
	require.EqualValues(t, 2, d.Modern.Read(virtiotest.ISR, 1))
	d.Modern.Write(0x10, 2, 0xffff)
	d.T.ConfigChanged()
	require.Empty(t, d.TakeMessages(), "no vector, no message")
	d.SetStatus(0)
	d.T.ConfigChanged()
	require.EqualValues(t, before+3, d.Modern.Read(0x15, 1))
	require.Zero(t, d.Modern.Read(virtiotest.ISR, 1), "nobody to interrupt")
	require.EqualValues(t, 0x0807060504030201, d.Modern.Read(virtiotest.DeviceConfig, 8))
	d.Modern.Write(virtiotest.DeviceConfig+9, 1, 0x77)
	require.EqualValues(t, 0x7709, d.Modern.Read(virtiotest.DeviceConfig+8, 2))
}

// 4.1.4.8: the registers of the legacy interface, with the interrupt pin and with MSI-X.
func TestLegacyInterface(t *testing.T) {
	e := newEcho()
	e.features = 1 << 5
	d := virtiotest.New(t, e, virtio.Options{Transitional: true})
	require.EqualValues(t, 1<<5|1<<24|1<<27|1<<28|1<<29, d.Legacy.Read(0, 4))
	d.InitLegacy(1 << 5)
	require.EqualValues(t, 1<<5, d.Legacy.Read(4, 4))
	require.EqualValues(t, 7, d.Legacy.Read(0x12, 1))
	require.True(t, d.T.Legacy())
	require.Len(t, d.Rings, 2)
	d.Legacy.Write(0x0e, 2, 1)
	require.EqualValues(t, 1, d.Legacy.Read(0x0e, 2))
	require.EqualValues(t, 256, d.Legacy.Read(0x0c, 2))
	require.EqualValues(t, d.Rings[1].Desc/4096, d.Legacy.Read(0x08, 4))
	require.EqualValues(t, 0x04030201, d.Legacy.Read(0x14, 4))
	r := d.Rings[1]
	r.Add(virtiotest.Out(0x1000, 1))
	r.Kick()
	require.True(t, d.INTx)
	require.EqualValues(t, 1, d.Legacy.Read(0x13, 1))
	require.False(t, d.INTx)
	require.Zero(t, d.Legacy.Read(0x13, 1))
	require.Len(t, r.TakeAll(), 1)

	d.EnableMSIX()
	require.EqualValues(t, 0xffff, d.Legacy.Read(0x14, 2))
	require.EqualValues(t, 0x04030201, d.Legacy.Read(0x18, 4))
	d.Legacy.Write(0x14, 2, 0)
	d.Legacy.Write(0x16, 2, 2)
	require.EqualValues(t, 2, d.Legacy.Read(0x16, 2))
	d.Legacy.Write(0x16, 2, 3)
	require.EqualValues(t, 0xffff, d.Legacy.Read(0x16, 2))
	d.Legacy.Write(0x16, 2, 2)
	r.Add(virtiotest.Out(0x1000, 1))
	r.Kick()
	require.Equal(t, []uint32{0x42}, d.TakeMessages())
	d.T.ConfigChanged()
	require.Equal(t, []uint32{0x40}, d.TakeMessages())
	require.False(t, d.INTx)

	clears := e.clears
	d.Legacy.Write(0x08, 4, 0)
	require.Equal(t, clears+1, e.clears, "address 0 resets")
	d.Legacy.Write(0x0e, 2, 2)
	require.EqualValues(t, 0, d.Legacy.Read(0x0c, 2), "no such queue")
	d.Legacy.Write(0x08, 4, 1)
}

// Old drivers kick before DRIVER_OK, and some never enable bus mastering.
func TestLegacyDriversMayBeHasty(t *testing.T) {
	d, e := setup(t, 0, 0)
	d.T.Function().WriteConfig(4, 2, 1)
	d.InitLegacy(0)
	d.Legacy.Write(0x12, 1, 3)
	r := d.Rings[0]
	r.Add(virtiotest.Out(0x1000, 1))
	r.Kick()
	require.Len(t, e.got, 1)
	r.Offer(256)
	r.Kick()
	r.Add(virtiotest.Out(0x1000, 1))
	r.Kick()
	require.Len(t, e.got, 1, "broken")
	require.EqualValues(t, 3, d.Legacy.Read(0x12, 1), "a legacy driver knows no DEVICE_NEEDS_RESET")
	d.InitLegacy(0)
	d.Rings[0].Add(virtiotest.Out(0x1000, 1))
	d.Rings[0].Kick()
	require.Len(t, e.got, 2)
}

func TestInterruptPinOfAModernDriver(t *testing.T) {
	d := virtiotest.New(t, newEcho(), virtio.Options{})
	require.True(t, d.Negotiate(0))
	d.SetQueues(8)
	d.SetStatus(0xf)
	d.Rings[0].Add(virtiotest.Out(0x1000, 1))
	d.Rings[0].Kick()
	d.T.ConfigChanged()
	require.True(t, d.INTx)
	require.EqualValues(t, 3, d.Modern.Read(virtiotest.ISR, 1))
	require.False(t, d.INTx)
	d.T.ConfigChanged()
	require.True(t, d.INTx)
	d.SetStatus(0)
	require.False(t, d.INTx, "a reset releases the pin")
}

func TestTransportSavesAndRestores(t *testing.T) {
	d, e := setup(t, ringFeatures, 8)
	e.keep = true
	r := d.Rings[0]
	r.Add(virtiotest.Out(0x1000, 1))
	r.Kick()
	d.T.ConfigChanged()
	s := virtiotest.Encoded(t, d.T.Save())
	f := newEcho()
	d.Plug(f, virtio.Options{Transitional: true})
	require.NoError(t, d.T.Restore(s))
	require.Equal(t, s, d.T.Save())
	d.TakeMessages()
	f.t.Queue(0).Push(e.got[0].Head, 0)
	f.t.Queue(0).Interrupt()
	require.Len(t, r.TakeAll(), 1)
	require.Equal(t, []uint32{0x41}, d.TakeMessages())
	r.Add(virtiotest.Out(0x1000, 1))
	r.Kick()
	require.Len(t, f.got, 1)

	d.T.Reset()
	fresh := newEcho()
	power := virtio.New(d.Mem, d, fresh, virtio.Options{Name: "test", Transitional: true})
	want := power.Save()
	want.Function.Config[0x3d] = 1 // the machine has connected the pin
	require.Equal(t, want, d.T.Save())
}

func TestRestoreRefusesWhatCannotBe(t *testing.T) {
	d, _ := setup(t, ringFeatures, 8)
	good := d.T.Save()
	for name, damage := range map[string]func(s *virtio.State){
		"fewer queues":     func(s *virtio.State) { s.Queues = s.Queues[:1] },
		"queue of size 0":  func(s *virtio.State) { s.Queues[0].Size = 0 },
		"queue of size 9":  func(s *virtio.State) { s.Queues[0].Size = 9 },
		"queue too large":  func(s *virtio.State) { s.Queues[0].Size = 512 },
		"too many in use":  func(s *virtio.State) { s.Queues[0].InUse = 9 },
		"queue vector":     func(s *virtio.State) { s.Queues[1].Vector = 3 },
		"config vector":    func(s *virtio.State) { s.ConfigVector = 3 },
		"features":         func(s *virtio.State) { s.Features |= 1 << 50 },
		"ISR":              func(s *virtio.State) { s.ISR = 4 },
		"status":           func(s *virtio.State) { s.Status |= 0x40 },
		"another function": func(s *virtio.State) { s.Function.Config[2] ^= 1 },
		"fewer vectors":    func(s *virtio.State) { s.MSIX.Entries = s.MSIX.Entries[1:] },
		"access window":    func(s *virtio.State) { s.Window[1] = 3 },
	} {
		s := virtiotest.Encoded(t, good)
		damage(&s)
		require.Error(t, d.T.Restore(s), name)
		require.Equal(t, good, d.T.Save(), name)
	}
	modern := virtiotest.New(t, newEcho(), virtio.Options{})
	s := modern.T.Save()
	s.LegacyDriver = true
	require.Error(t, modern.T.Restore(s), "a legacy driver without a legacy interface")
}

func TestNewPanicsOnWhatCannotBeBuilt(t *testing.T) {
	mem, err := memory.New(memory.Extent{Base: 0, Size: 4096})
	require.NoError(t, err)
	defer mem.Close()
	for _, o := range []virtio.Options{{QueueSize: 3}, {QueueSize: 2048}, {Vectors: -1}, {Vectors: virtio.MaxVectors + 1}} {
		require.Panics(t, func() { virtio.New(mem, nil, newEcho(), o) })
	}
	require.Panics(t, func() { virtio.New(mem, nil, typed{newEcho(), 16}, virtio.Options{Transitional: true}) })
}

// Any accesses of configuration space and BARs, of any size, leave a device that can
// be saved, restored and brought up.
func FuzzTransport(f *testing.F) {
	f.Add([]byte{0x14, 0, 0x01, 3, 0x00, 0x30, 0x02, 0})
	f.Add([]byte{0x0e, 1, 0x12, 1, 0x08, 1, 0x13, 1, 0x10, 1, 0x12, 0, 0x12, 1, 0x01, 0})
	f.Add([]byte{0x14, 0, 0x81, 0x1f, 0x20, 0x30, 0x74, 3, 0x04, 2, 0x84, 7})
	mem, err := memory.New(memory.Extent{Base: 0, Size: 1 << 20})
	require.NoError(f, err)
	f.Cleanup(func() { require.NoError(f, mem.Close()) })
	f.Fuzz(func(t *testing.T, ops []byte) {
		sink := &virtiotest.Driver{}
		tr := virtio.New(mem, sink, newEcho(), virtio.Options{Transitional: true, QueueSize: 16})
		fn := tr.Function()
		// Each operation is four bytes: offset (low, high and space), kind, value.
		for ; len(ops) >= 4; ops = ops[4:] {
			off := uint64(ops[0]) | uint64(ops[1]&0x3f)<<8
			size := 1 << (ops[2] & 3)
			v := uint64(ops[3]) * 0x0101010101010101
			if ops[2]&0x20 != 0 {
				v = uint64(ops[3])
			}
			write := ops[2]&0x40 != 0
			h := fn.BARHandler([]int{0, 1, 4, 4}[ops[1]>>6])
			switch {
			case ops[2]&0x80 != 0:
				if size = min(size, 4); write {
					fn.WriteConfig(off, size, v)
				} else {
					fn.ReadConfig(off, size)
				}
			case write:
				h.Write(off, size, v)
			default:
				h.Read(off, size)
			}
		}
		s := tr.Save()
		require.NoError(t, tr.Restore(s))
		require.Equal(t, s, tr.Save())
		bar := fn.BARHandler(4)
		for _, status := range []uint64{0, 3} {
			bar.Write(0x14, 1, status)
		}
		bar.Write(0x08, 4, 1)
		bar.Write(0x0c, 4, 1)
		bar.Write(0x14, 1, 0xb)
		require.EqualValues(t, 0xb, bar.Read(0x14, 1))
	})
}
