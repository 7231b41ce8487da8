package memory

import (
	"bytes"
	"math"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func newTest(t testing.TB) *Memory {
	m, err := New(Extent{1 << 20, 4 * PageSize}, Extent{0, 2 * PageSize})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func TestNewRefusesBadExtents(t *testing.T) {
	for _, e := range [][]Extent{
		nil,
		{{1, PageSize}},
		{{0, 0}},
		{{0, PageSize + 1}},
		{{math.MaxUint64 - PageSize + 1, 2 * PageSize}},
		{{0, 2 * PageSize}, {PageSize, PageSize}},
	} {
		_, err := New(e...)
		require.Error(t, err, "%v", e)
	}
}

func TestAccessesOutsideRAMFailWhole(t *testing.T) {
	m := newTest(t)
	for _, c := range []struct{ gpa, n uint64 }{
		{2*PageSize - 1, 2}, {2 * PageSize, 1}, {1<<20 - 1, 2}, {1<<20 + 4*PageSize - 1, 2},
		{math.MaxUint64, 1}, {math.MaxUint64, 2}, {0, math.MaxUint64}, {8, math.MaxUint64 - 4},
	} {
		_, err := m.View(c.gpa, c.n)
		require.ErrorIs(t, err, ErrOutside, "%#x+%#x", c.gpa, c.n)
		_, err = m.Mutable(c.gpa, c.n)
		require.ErrorIs(t, err, ErrOutside)
	}
	m.TakeDirty(func(uint64) { t.Error("a refused write marked a page") })
}

func TestWordsAreLittleEndian(t *testing.T) {
	m := newTest(t)
	require.NoError(t, m.PutUint64(0x10, 0x1122334455667788))
	w, err := m.Uint16(0x10)
	require.NoError(t, err)
	require.EqualValues(t, 0x7788, w)
	d, err := m.Uint32(0x12)
	require.NoError(t, err)
	require.EqualValues(t, 0x33445566, d)
	require.NoError(t, m.PutUint16(0x10, 1))
	require.NoError(t, m.PutUint32(0x12, 2))
	q, err := m.Uint64(0x10)
	require.NoError(t, err)
	require.EqualValues(t, 0x1122_0000_0002_0001, q)
}

// Whatever is written reads back, and exactly the pages written are dirty.
func TestWritesReadBackAndMarkTheirPages(t *testing.T) {
	m := newTest(t)
	rapid.Check(t, func(t *rapid.T) {
		m.TakeDirty(func(uint64) {})
		off := rapid.Uint64Range(0, 4*PageSize-1).Draw(t, "off")
		p := rapid.SliceOfN(rapid.Byte(), 0, int(4*PageSize-off)).Draw(t, "p")
		require.NoError(t, m.Write(1<<20+off, p))
		got := make([]byte, len(p))
		require.NoError(t, m.Read(1<<20+off, got))
		require.True(t, bytes.Equal(p, got))
		var want, dirty []uint64
		for a := off &^ (PageSize - 1); a < off+uint64(len(p)) && len(p) > 0; a += PageSize {
			want = append(want, 1<<20+a)
		}
		m.TakeDirty(func(gpa uint64) { dirty = append(dirty, gpa) })
		require.Equal(t, want, dirty)
	})
}
