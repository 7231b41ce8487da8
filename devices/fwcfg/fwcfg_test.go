package fwcfg

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

const ramSize = 64 << 10

var _ devices.Handler = (*Device)(nil)

func newTest(t testing.TB) (*Device, *memory.Memory) {
	m, err := memory.New(memory.Extent{Base: 0, Size: ramSize})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	d := New(m)
	require.NoError(t, d.SetUint64(KeyRAMSize, 0x1122334455667788))
	require.NoError(t, d.AddFile("opt/b", []byte("bbb")))
	require.NoError(t, d.AddFile("etc/a", []byte("aaaaa")))
	require.NoError(t, d.AddWritableFile("opt/c", []byte("ccccc")))
	return d, m
}

// bytesAt selects a key and reads n bytes through the data port, as SeaBIOS does.
func bytesAt(d *Device, key uint16, n int) []byte {
	d.Write(regSelector, 2, uint64(key))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(d.Read(regData, 1))
	}
	return b
}

// dma carries out one descriptor at address 0x100 and returns its control word.
func dma(t require.TestingT, d *Device, m *memory.Memory, control, length uint32, addr uint64) uint32 {
	const desc = 0x100
	b := binary.BigEndian.AppendUint32(nil, control)
	b = binary.BigEndian.AppendUint32(b, length)
	b = binary.BigEndian.AppendUint64(b, addr)
	require.NoError(t, m.Write(desc, b))
	d.Write(regDMAHigh, 4, 0)
	d.Write(regDMALow, 4, uint64(swap(desc)))
	require.NoError(t, m.Read(desc, b[:4]))
	return binary.BigEndian.Uint32(b)
}

func TestTraditionalInterface(t *testing.T) {
	d, _ := newTest(t)
	require.Equal(t, "QEMU", string(bytesAt(d, KeySignature, 4)))
	require.Equal(t, []byte{3, 0, 0, 0, 0}, bytesAt(d, KeyID, 5))
	require.Equal(t, []byte{0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0}, bytesAt(d, KeyRAMSize, 10))
	require.Equal(t, []byte{0, 0}, bytesAt(d, 0x3fff, 2), "a key without an item")
	require.Equal(t, "QEMU", string(bytesAt(d, KeySignature|keyWriteChannel, 4)))
	for _, a := range []struct {
		off  uint64
		size int
		want uint64
	}{{regSelector, 1, 0xff}, {regSelector, 2, 0xffff}, {regData, 2, 0xffff}, {2, 2, 0xffff}, {regDMALow + 1, 4, 0xffffffff}} {
		require.Equal(t, a.want, d.Read(a.off, a.size), "%+v", a)
	}
	d.Write(regData, 1, 'x')
	d.Write(regSelector, 1, 5)
	require.EqualValues(t, 0, d.Read(regData, 1), "the key is still selected, and read to its end")
}

func TestDMARegisterReadsAsItsSignature(t *testing.T) {
	d, _ := newTest(t)
	var b []byte
	for off := uint64(regDMAHigh); off < Size; off += 4 {
		b = binary.LittleEndian.AppendUint32(b, uint32(d.Read(off, 4)))
	}
	require.Equal(t, "QEMU CFG", string(b))
	require.EqualValues(t, 'M', d.Read(regDMAHigh+2, 1))
}

func TestDirectoryIsSortedAndIndependentOfTheOrderOfCalls(t *testing.T) {
	d, m := newTest(t)
	dir := bytesAt(d, KeyFileDir, 4+3*dirEntrySize)
	require.EqualValues(t, 3, binary.BigEndian.Uint32(dir))
	for i, want := range []struct{ name, data string }{{"etc/a", "aaaaa"}, {"opt/b", "bbb"}, {"opt/c", "ccccc"}} {
		e := dir[4+i*dirEntrySize:][:dirEntrySize]
		require.Equal(t, want.name, string(bytes.TrimRight(e[8:], "\x00")))
		require.EqualValues(t, len(want.data), binary.BigEndian.Uint32(e))
		key := binary.BigEndian.Uint16(e[4:])
		require.EqualValues(t, int(FileFirst)+i, key)
		require.Equal(t, want.data, string(bytesAt(d, key, len(want.data))))
	}
	other := New(m)
	require.NoError(t, other.AddWritableFile("opt/c", []byte("ccccc")))
	require.NoError(t, other.AddFile("etc/a", []byte("aaaaa")))
	require.NoError(t, other.AddFile("opt/b", []byte("bbb")))
	require.Equal(t, dir, bytesAt(other, KeyFileDir, len(dir)))
}

func TestDMAReadsSkipsAndZeroFills(t *testing.T) {
	d, m := newTest(t)
	const buf = 0x200
	require.NoError(t, m.Write(buf, bytes.Repeat([]byte{0xee}, 16)))
	require.Zero(t, dma(t, d, m, uint32(FileFirst)<<16|ctlSelect|ctlSkip, 2, 0))
	require.Zero(t, dma(t, d, m, ctlRead, 2, buf))
	require.Zero(t, dma(t, d, m, ctlRead, 4, buf+2))
	got := make([]byte, 7)
	require.NoError(t, m.Read(buf, got))
	require.Equal(t, []byte{'a', 'a', 'a', 0, 0, 0, 0xee}, got)
	require.Zero(t, dma(t, d, m, uint32(FileFirst)<<16|ctlSelect, 1<<31, 0), "only a selection")
	require.EqualValues(t, 'a', d.Read(regData, 1), "DMA and the data port share the offset")
}

func TestDMAErrors(t *testing.T) {
	for _, c := range []struct {
		name            string
		control, length uint32
		addr            uint64
		want            uint32
	}{
		{"buffer outside RAM", ctlRead, 1, ramSize, ctlError},
		{"buffer runs out of RAM", ctlRead, 2, ramSize - 1, ctlError},
		{"buffer wraps", ctlRead, 2, 1<<64 - 1, ctlError},
		{"too long", ctlRead, MaxTransfer + 1, 0, ctlError},
		{"write to a read-only file", ctlWrite, 1, 0x200, ctlError},
		{"write past the end", (uint32(FileFirst)+2)<<16 | ctlSelect | ctlWrite, 6, 0x200, ctlError},
		{"write from outside RAM", (uint32(FileFirst)+2)<<16 | ctlSelect | ctlWrite, 1, ramSize, ctlError},
		{"write to no item", 0x3ffe<<16 | ctlSelect | ctlWrite, 1, 0x200, ctlError},
		{"read of no item", 0x3ffe<<16 | ctlSelect | ctlRead, 1, 0x200, 0},
		{"nothing to do", 0, 1 << 31, 0, 0},
		{"skip past the end", ctlSkip, 1 << 20, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, m := newTest(t)
			require.Equal(t, c.want, dma(t, d, m, c.control, c.length, c.addr))
			require.Equal(t, "ccccc", string(d.File("opt/c")))
		})
	}
}

func TestDescriptorOutsideRAMHasNoEffect(t *testing.T) {
	d, m := newTest(t)
	before := d.Save()
	for _, addr := range []uint64{ramSize - 15, ramSize, 1 << 63} {
		d.Write(regDMAHigh, 4, uint64(swap(addr>>32)))
		d.Write(regDMALow, 4, uint64(swap(addr)))
	}
	require.Equal(t, before, d.Save())
	m.TakeDirty(func(gpa uint64) { t.Errorf("page %#x was written", gpa) })
}

func TestGuestWritesAWritableFileUntilReset(t *testing.T) {
	d, m := newTest(t)
	require.NoError(t, m.Write(0x200, []byte("XY")))
	key := uint32(FileFirst) + 2
	require.Zero(t, dma(t, d, m, key<<16|ctlSelect|ctlSkip, 1, 0))
	require.Zero(t, dma(t, d, m, ctlWrite, 2, 0x200))
	require.Equal(t, "cXYcc", string(d.File("opt/c")))
	d.Reset()
	require.Equal(t, "ccccc", string(d.File("opt/c")))
	fresh, _ := newTest(t)
	require.Equal(t, fresh.Save(), d.Save())
	require.Nil(t, d.File("opt/d"))
}

func TestItemsAreRefused(t *testing.T) {
	d, _ := newTest(t)
	require.Error(t, d.AddFile("etc/a", nil), "exists")
	require.Error(t, d.AddFile("", nil))
	require.Error(t, d.AddFile(string(bytes.Repeat([]byte("x"), nameSize)), nil))
	require.Error(t, d.AddFile("a b", nil))
	require.NoError(t, d.AddFile(string(bytes.Repeat([]byte("x"), nameSize-1)), nil))
	for _, key := range []uint16{KeySignature, KeyID, KeyFileDir, FileFirst, keyWriteChannel, 0x7fff, 0xffff} {
		require.Error(t, d.SetUint16(key, 1), "%#x", key)
	}
	require.NoError(t, d.SetItem(KeyIRQ0Override, []byte{1}))
	full := New(nil)
	full.files = make([]*item, MaxFiles)
	for i := range full.files {
		full.files[i] = &item{name: fmt.Sprintf("%04d", i)}
	}
	require.Error(t, full.AddFile("one-more", nil))
}

func TestRestoreChecksAndRoundTrips(t *testing.T) {
	d, m := newTest(t)
	require.NoError(t, m.Write(0x200, []byte("XY")))
	require.Zero(t, dma(t, d, m, (uint32(FileFirst)+2)<<16|ctlSelect|ctlWrite, 2, 0x200))
	d.Write(regDMAHigh, 4, 0x12345678)
	s := d.Save()
	e, _ := newTest(t)
	require.NoError(t, e.Restore(s))
	require.Equal(t, s, e.Save())
	require.EqualValues(t, 'c', e.Read(regData, 1))
	for name, broken := range map[string]func(*State){
		"key":    func(s *State) { s.Key = keyWriteChannel },
		"none":   func(s *State) { s.Writable = nil },
		"size":   func(s *State) { s.Writable[0].Data = nil },
		"name":   func(s *State) { s.Writable[0].Name = "x" },
		"excess": func(s *State) { s.Writable = append(s.Writable, File{"z", nil}) },
	} {
		s, before := d.Save(), e.Save()
		broken(&s)
		require.Error(t, e.Restore(s), name)
		require.Equal(t, before, e.Save(), name)
	}
}

// Both interfaces read the same bytes of an item, however the reads are cut up.
func TestInterfacesAgree(t *testing.T) {
	d, m := newTest(t)
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.SampledFrom([]uint16{KeySignature, KeyID, KeyRAMSize, KeyFileDir, FileFirst, FileFirst + 2}).Draw(t, "key")
		cuts := rapid.SliceOfN(rapid.IntRange(1, 80), 1, 8).Draw(t, "cuts")
		total := 0
		for _, n := range cuts {
			total += n
		}
		want := bytesAt(d, key, total)
		d.Write(regSelector, 2, uint64(key))
		for _, n := range cuts {
			if rapid.Bool().Draw(t, "dma") {
				if dma(t, d, m, ctlRead, uint32(n), 0x1000) != 0 {
					t.Fatal("DMA failed")
				}
				got := make([]byte, n)
				require.NoError(t, m.Read(0x1000, got))
				require.Equal(t, want[:n], got)
			} else {
				for i := range n {
					require.EqualValues(t, want[i], d.Read(regData, 1))
				}
			}
			want = want[n:]
		}
	})
}

// Whatever a guest does, the device survives, its read-only items stay, and its state
// can be restored.
func FuzzGuest(f *testing.F) {
	f.Add([]byte{0, 2, 0x19, 0, 0, 0, 1, 1, 0, 0, 0, 0}, []byte{0, 0x20, 0, 10, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 2, 0})
	f.Add([]byte{8, 4, 0, 0, 0, 0}, []byte{0, 0x22, 0, 24, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, ops, ram []byte) {
		d, m := newTest(t)
		require.NoError(t, m.Write(0, ram[:min(len(ram), ramSize)]))
		for ; len(ops) >= 6; ops = ops[6:] {
			off, size := uint64(ops[0]%Size), 1<<(ops[1]%3)
			if ops[1]&0x80 != 0 {
				d.Read(off, size)
			} else {
				d.Write(off, size, uint64(binary.LittleEndian.Uint32(ops[2:])))
			}
		}
		require.Equal(t, "bbb", string(bytesAt(d, FileFirst+1, 3)))
		s := d.Save()
		e, _ := newTest(t)
		require.NoError(t, e.Restore(s))
		require.Equal(t, s, e.Save())
	})
}
