package pages_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/lockstep/pages"
)

// small is a guest of 16 MiB.
const small = 4096

// noise fills b so that it does not compress.
func noise(b []byte, seed uint64) []byte {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], xxh3.HashSeed(b[:0], seed+uint64(i)<<32))
	}
	return b
}

func setOf(pfns ...uint64) *pages.Set {
	s := new(pages.Set)
	for _, p := range pfns {
		s.Add(p)
	}
	return s
}

func drawSet(t *rapid.T, name string) *pages.Set {
	s := new(pages.Set)
	for range rapid.IntRange(0, 8).Draw(t, name) {
		start := rapid.Uint64Range(0, small-1).Draw(t, "start")
		s.AddRange(start, rapid.Uint64Range(0, small-start).Draw(t, "n"))
	}
	for _, p := range rapid.SliceOfN(rapid.Uint64Range(0, small-1), 0, 200).Draw(t, "single") {
		s.Add(p)
	}
	return s
}

func TestSetIsASet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s pages.Set
		model := map[uint64]bool{}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				p := rapid.Uint64Range(0, small-1).Draw(t, "page")
				s.Add(p)
				model[p] = true
			},
			"range": func(t *rapid.T) {
				start := rapid.Uint64Range(0, small-1).Draw(t, "start")
				n := rapid.Uint64Range(0, min(200, small-start)).Draw(t, "n")
				s.AddRange(start, n)
				for p := start; p < start+n; p++ {
					model[p] = true
				}
			},
			"union": func(t *rapid.T) {
				other := drawSet(t, "other")
				before := slices.Collect(other.All())
				s.Union(other)
				for _, p := range before {
					model[p] = true
				}
				require.Equal(t, before, slices.Collect(other.All()))
			},
			"clear": func(t *rapid.T) {
				clone := s.Clone()
				s.Clear()
				require.Equal(t, len(model), clone.Len(), "a clone is its own")
				clear(model)
			},
			"": func(t *rapid.T) {
				var want []uint64
				for p := range uint64(small + 100) {
					if s.Contains(p) != model[p] {
						t.Fatalf("page %d: %v", p, s.Contains(p))
					}
					if model[p] {
						want = append(want, p)
					}
				}
				require.Equal(t, len(want), s.Len())
				require.Equal(t, want, slices.Collect(s.All()))
				var runs []uint64
				last := uint64(math.MaxUint64 - 1)
				for start, n := range s.Runs() {
					if n == 0 || start == last+1 {
						t.Fatalf("run %d of %d after %d is not as long as it can be", start, n, last)
					}
					for p := start; p < start+n; p++ {
						runs = append(runs, p)
						last = p
					}
				}
				require.Equal(t, want, runs)
			},
		})
	})
}

func TestSetEndsWhereGuestsEnd(t *testing.T) {
	require.Panics(t, func() { setOf(pages.MaxPages) })
	require.Panics(t, func() { setOf().AddRange(1, math.MaxUint64) })
	require.NotPanics(t, func() { setOf().AddRange(math.MaxUint64, 0) })
	require.False(t, setOf(1).Contains(math.MaxUint64))
}

func TestSetComesBackAsItWas(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSet(t, "set")
		b := append(s.Append([]byte("before")), "behind"...)
		got, rest, err := pages.DecodeSet(b[len("before"):], small)
		require.NoError(t, err)
		require.Equal(t, "behind", string(rest))
		require.Equal(t, s.Len(), got.Len())
		require.Equal(t, slices.Collect(s.All()), slices.Collect(got.All()))
		encoded := b[len("before") : len(b)-len("behind")]
		require.Equal(t, encoded, got.Append(nil), "equal sets have equal encodings")

		if s.Len() == 0 {
			return
		}
		all := slices.Collect(s.All())
		_, _, err = pages.DecodeSet(encoded, int(all[len(all)-1]))
		require.ErrorIs(t, err, pages.ErrFormat, "the last page is beyond the guest")
		for n := range encoded {
			_, _, err := pages.DecodeSet(encoded[:n], small)
			require.ErrorIs(t, err, pages.ErrFormat, "%d bytes of %d", n, len(encoded))
		}
	})
}

func TestSetsAreShort(t *testing.T) {
	const guest = 64 << 30 / pages.Size
	all := new(pages.Set)
	all.AddRange(0, guest)
	require.Len(t, all.Append(nil), 1+1+4)

	awkward := new(pages.Set)
	for p := uint64(0); p < guest; p += 2 {
		awkward.Add(p)
	}
	b := awkward.Append(nil)
	require.LessOrEqual(t, len(b), guest/8+4, "a bit a page at most")
	got, rest, err := pages.DecodeSet(b, guest)
	require.NoError(t, err)
	require.Empty(t, rest)
	require.Equal(t, awkward.Len(), got.Len())
	_, _, err = pages.DecodeSet(b, guest-2)
	require.ErrorIs(t, err, pages.ErrFormat)
	require.Len(t, new(pages.Set).Append(nil), 1)
	awkward.Clear()
	awkward.Add(3)
	require.Equal(t, setOf(3).Append(nil), awkward.Append(nil), "what was in it once costs nothing")
}

func TestMalformedSetsAreRefused(t *testing.T) {
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}
	for name, b := range map[string][]byte{
		"nothing":               {},
		"more runs than bytes":  {4 << 1, 0, 0},
		"endless runs":          append(slices.Clone(huge[:9]), 0x00),
		"a run far away":        append([]byte{1 << 1}, append(slices.Clone(huge), 0)...),
		"an endless run":        append([]byte{1 << 1, 0}, huge...),
		"a run that wraps":      append([]byte{2 << 1, 5, 0}, append(slices.Clone(huge), 0)...),
		"a bitmap cut short":    {1<<1 | 1, 1, 2, 3},
		"an endless bitmap":     huge,
		"a number in long form": {0x80, 0},
	} {
		t.Run(name, func(t *testing.T) {
			set, _, err := pages.DecodeSet(b, small)
			require.ErrorIs(t, err, pages.ErrFormat)
			require.Zero(t, set.Len())
		})
	}
	_, _, err := pages.DecodeSet(setOf(1).Append(nil), 0)
	require.ErrorIs(t, err, pages.ErrFormat)
	_, _, err = pages.DecodeSet(setOf(1).Append(nil), -1)
	require.ErrorIs(t, err, pages.ErrFormat)
}

func TestHashIsOfTheContent(t *testing.T) {
	zero := make([]byte, pages.Size)
	h := xxh3.Hash128(zero)
	require.Equal(t, pages.Sum{Hi: h.Hi, Lo: h.Lo}, pages.Hash(zero), "the short cut for zeros changes nothing")
	for _, at := range []int{0, 1, pages.Size / 2, pages.Size - 1} {
		page := make([]byte, pages.Size)
		page[at] = 1
		require.False(t, pages.IsZero(page))
		h := xxh3.Hash128(page)
		require.Equal(t, pages.Sum{Hi: h.Hi, Lo: h.Lo}, pages.Hash(page))
	}
}

func drawHashes(t *rapid.T) (*pages.Set, []pages.Sum) {
	set := drawSet(t, "set")
	zero := pages.Hash(make([]byte, pages.Size))
	seed, step := rapid.Uint64().Draw(t, "seed"), rapid.IntRange(1, 5).Draw(t, "zeros")
	sums := make([]pages.Sum, set.Len())
	for i := range sums {
		if sums[i] = zero; i%step != 0 {
			sums[i] = pages.Sum{Hi: seed + uint64(i), Lo: uint64(i)}
		}
	}
	return set, sums
}

func TestHashesComeBackAsTheyWere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, sums := drawHashes(t)
		b := pages.AppendHashes(nil, set, sums)
		gotSet, gotSums, rest, err := pages.DecodeHashes(append(slices.Clone(b), "behind"...), small)
		require.NoError(t, err)
		require.Equal(t, "behind", string(rest))
		require.Equal(t, slices.Collect(set.All()), slices.Collect(gotSet.All()))
		require.Equal(t, sums, gotSums)
		for n := max(0, len(b)-40); n < len(b); n++ {
			_, _, _, err := pages.DecodeHashes(b[:n], small)
			require.ErrorIs(t, err, pages.ErrFormat, "%d bytes of %d", n, len(b))
		}
	})
	require.Panics(t, func() { pages.AppendHashes(nil, setOf(1, 2), make([]pages.Sum, 1)) })
}

func TestHashesOfAnEmptyGuestAreShort(t *testing.T) {
	const guest = 4 << 30 / pages.Size
	set := new(pages.Set)
	set.AddRange(0, guest)
	b := pages.AppendHashes(nil, set, slices.Repeat([]pages.Sum{pages.Hash(make([]byte, pages.Size))}, guest))
	require.Less(t, len(b), 16)
	_, sums, _, err := pages.DecodeHashes(b, guest)
	require.NoError(t, err)
	require.Len(t, sums, guest)
	_, _, _, err = pages.DecodeHashes(b, guest-1)
	require.ErrorIs(t, err, pages.ErrFormat)
}

func TestMalformedHashesAreRefused(t *testing.T) {
	zero := pages.Hash(make([]byte, pages.Size))
	twice := setOf(3).Append(setOf(3).Append(nil))
	hidden := setOf().Append(setOf(3).Append(nil))
	hidden = binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(hidden, zero.Lo), zero.Hi)
	everything := new(pages.Set)
	everything.AddRange(0, small)
	for name, b := range map[string][]byte{
		"two hashes of a page":   append(twice, make([]byte, 16)...),
		"zeros in the wrong set": hidden,
		"no hashes":              everything.Append(nil),
		"too few hashes":         append(setOf().Append(everything.Append(nil)), make([]byte, 16*small-1)...),
	} {
		t.Run(name, func(t *testing.T) {
			_, sums, _, err := pages.DecodeHashes(b, small)
			require.ErrorIs(t, err, pages.ErrFormat)
			require.Nil(t, sums)
		})
	}
}

// drawPages draws the content of some pages: zeros, text that compresses, and noise.
func drawPages(t *rapid.T) (*pages.Set, func(pfn uint64) []byte) {
	set := drawSet(t, "pages")
	mix, seed := rapid.Uint64Range(1, 7).Draw(t, "mix"), rapid.Uint64().Draw(t, "seed")
	return set, func(pfn uint64) []byte {
		page := make([]byte, pages.Size)
		switch (pfn/16 + seed) % mix {
		case 1, 3:
			return noise(page, seed+pfn)
		case 2:
			return bytes.Repeat([]byte("text and "), pages.Size)[:pages.Size]
		}
		return page
	}
}

func TestPagesComeBackAsTheyWere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, content := drawPages(t)
		limit := rapid.SampledFrom([]int{1, 10_000, 100_000, 0}).Draw(t, "limit")
		w := pages.NewPageWriter(limit)
		var chunks [][]byte
		for pfn := range set.All() {
			page := content(pfn)
			if !w.Add(pfn, page) {
				require.NotZero(t, w.Len())
				chunks = append(chunks, w.AppendChunk(nil))
				require.Zero(t, w.Len())
				require.True(t, w.Add(pfn, page), "an empty chunk takes any page")
			}
		}
		chunks = append(chunks, w.AppendChunk(nil))

		var got []uint64
		for _, chunk := range chunks {
			require.Equal(t, pages.Pages, pages.KindOf(chunk))
			n := 0
			require.NoError(t, pages.DecodePages(chunk, small, func(pfn uint64, page []byte) error {
				require.True(t, bytes.Equal(content(pfn), page), "page %d", pfn)
				got = append(got, pfn)
				n++
				return nil
			}))
			most := limit
			if limit == 0 {
				most = pages.DefaultChunk
			}
			require.True(t, len(chunk) <= most || n == 1, "%d bytes with %d pages, where %d are allowed", len(chunk), n, most)
		}
		require.Equal(t, slices.Collect(set.All()), got)
	})
}

func TestChunksAreCompressedIfThatHelps(t *testing.T) {
	var w pages.PageWriter
	w.Add(1, noise(make([]byte, pages.Size), 1))
	require.Len(t, w.AppendChunk(nil), 1+1+pages.Size)
	w.Add(1, bytes.Repeat([]byte{1}, pages.Size))
	require.Less(t, len(w.AppendChunk(nil)), 300)
	for i := range uint64(pages.MaxChunkPages) {
		require.True(t, w.Add(i, make([]byte, pages.Size)))
	}
	require.False(t, w.Add(pages.MaxChunkPages, make([]byte, pages.Size)))
	require.Less(t, len(w.AppendChunk(nil)), 10, "zeros are a run")
}

func TestPageWriterTakesPagesInOrder(t *testing.T) {
	page := make([]byte, pages.Size)
	var w pages.PageWriter
	require.True(t, w.Add(5, page))
	require.Panics(t, func() { w.Add(5, page) })
	require.Panics(t, func() { w.Add(4, page) })
	require.Panics(t, func() { w.Add(6, page[1:]) })
	require.Panics(t, func() { w.Add(pages.MaxPages, page) })
	w.AppendChunk(nil)
	require.True(t, w.Add(0, page), "each chunk begins anew")
}

func TestMalformedPagesAreRefused(t *testing.T) {
	raw := func(b ...byte) []byte { return append([]byte{byte(pages.Pages)}, b...) }
	packed := func(b []byte) []byte { return append([]byte{byte(pages.Pages) | 0x80}, b...) }
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}
	page := make([]byte, pages.Size)
	bomb := s2.Encode(nil, make([]byte, pages.MaxChunk))
	require.Less(t, len(bomb), pages.MaxChunk/10)
	for name, b := range map[string][]byte{
		"nothing":                  {},
		"extents":                  {byte(pages.Extents)},
		"an unknown kind":          {3},
		"half a page":              raw(append([]byte{0}, page[:100]...)...),
		"no page":                  raw(0),
		"a page beyond the guest":  raw(append([]byte{0x80, 0x40}, page...)...),
		"a page far away":          raw(append(slices.Clone(huge), 0)...),
		"a run beyond the guest":   raw(1, 0x80, 0x20),
		"an endless run":           raw(append([]byte{1}, huge...)...),
		"runs that wrap":           raw(append(append([]byte{9, 2}, huge...), 0)...),
		"a bomb":                   packed(bomb),
		"a bomb that says so only": packed(binary.AppendUvarint(nil, math.MaxUint32)),
		"broken compression":       packed([]byte{100, 1, 2, 3}),
		"no length":                packed(nil),
		"a longer chunk":           append(raw(), make([]byte, pages.MaxChunk)...),
	} {
		t.Run(name, func(t *testing.T) {
			err := pages.DecodePages(b, small, func(pfn uint64, p []byte) error {
				require.Less(t, pfn, uint64(small))
				return nil
			})
			require.ErrorIs(t, err, pages.ErrFormat)
		})
	}
	err := pages.DecodePages(raw(1, 0xff, 0xff, 0x03, 1, 0), pages.MaxPages, func(uint64, []byte) error { return nil })
	require.ErrorIs(t, err, pages.ErrFormat, "one page more than a chunk may have")
	require.NoError(t, pages.DecodePages(raw(1, 0xff, 0xff, 0x03), pages.MaxPages, func(uint64, []byte) error { return nil }))
}

func TestErrorOfTheCallerEndsDecoding(t *testing.T) {
	enough := errors.New("enough")
	var p pages.PageWriter
	p.Add(1, make([]byte, pages.Size))
	p.Add(2, make([]byte, pages.Size))
	calls := 0
	require.Equal(t, enough, pages.DecodePages(p.AppendChunk(nil), small, func(uint64, []byte) error { calls++; return enough }))
	var e pages.ExtentWriter
	e.Add(pages.Extent{Length: 1})
	e.Add(pages.Extent{Length: 1})
	require.Equal(t, enough, pages.DecodeExtents(e.AppendChunk(nil), func(pages.Extent) error { calls++; return enough }))
	require.Equal(t, 2, calls)
}

func TestExtentsComeBackAsTheyWere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.SampledFrom([]int{1, 10_000, 0}).Draw(t, "limit")
		w := pages.NewExtentWriter(limit)
		var want []pages.Extent
		var chunks [][]byte
		for i := range rapid.IntRange(0, 20).Draw(t, "extents") {
			e := pages.Extent{Disk: rapid.Uint16().Draw(t, "disk"), Length: rapid.Int64Range(1, 20_000).Draw(t, "length")}
			add := e
			switch rapid.IntRange(0, 3).Draw(t, "content") {
			case 0:
				e.Length = rapid.Int64Range(1, math.MaxInt64).Draw(t, "zeros")
				add = e
			case 1:
				add.Data = make([]byte, e.Length)
			case 2:
				e.Data = bytes.Repeat([]byte{7}, int(e.Length))
				add.Data = e.Data
			case 3:
				e.Data = append(noise(make([]byte, e.Length), uint64(i)), 1)[1:]
				add.Data = e.Data
			}
			e.Offset = rapid.Int64Range(0, math.MaxInt64-e.Length).Draw(t, "offset")
			add.Offset = e.Offset
			want = append(want, e)
			if !w.Add(add) {
				require.NotZero(t, w.Len())
				chunks = append(chunks, w.AppendChunk(nil))
				require.True(t, w.Add(add), "an empty chunk takes any extent")
			}
		}
		chunks = append(chunks, w.AppendChunk(nil))
		var got []pages.Extent
		for _, chunk := range chunks {
			require.Equal(t, pages.Extents, pages.KindOf(chunk))
			n := 0
			require.NoError(t, pages.DecodeExtents(chunk, func(e pages.Extent) error {
				e.Data = slices.Clone(e.Data)
				got = append(got, e)
				n++
				return nil
			}))
			require.True(t, n <= 1 || limit == 0 || len(chunk) <= limit)
		}
		require.Equal(t, len(want), len(got))
		for i := range want {
			require.Equal(t, want[i], got[i])
		}
	})
}

func TestExtentWriterKnowsItsLimits(t *testing.T) {
	var w pages.ExtentWriter
	for _, e := range []pages.Extent{
		{}, {Length: -1}, {Offset: -1, Length: 1}, {Offset: 2, Length: math.MaxInt64 - 1},
		{Length: 2, Data: make([]byte, 1)}, {Length: pages.MaxExtent + 1, Data: make([]byte, pages.MaxExtent+1)},
	} {
		require.Panics(t, func() { w.Add(e) }, "%+v", e)
	}
	require.True(t, w.Add(pages.Extent{Length: pages.MaxExtent, Data: noise(make([]byte, pages.MaxExtent), 1)}), "more than DefaultChunk with its head, but alone")
	require.False(t, w.Add(pages.Extent{Length: 1}))
	chunk := w.AppendChunk(nil)
	require.Less(t, len(chunk), pages.MaxChunk)
	require.NoError(t, pages.DecodeExtents(chunk, func(e pages.Extent) error {
		require.Len(t, e.Data, pages.MaxExtent)
		return nil
	}))
	for range pages.MaxChunkExtents {
		require.True(t, w.Add(pages.Extent{Length: 1}))
	}
	require.False(t, w.Add(pages.Extent{Length: 1}))
}

func TestMalformedExtentsAreRefused(t *testing.T) {
	raw := func(b ...byte) []byte { return append([]byte{byte(pages.Extents)}, b...) }
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}
	most := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}
	for name, b := range map[string][]byte{
		"nothing":                 {},
		"pages":                   {byte(pages.Pages)},
		"half a record":           raw(1, 0),
		"an empty extent":         raw(0, 0, 0),
		"no zeros":                raw(1, 0, 0),
		"disk 65536":              raw(0x81, 0x80, 0x08, 0, 1),
		"a negative offset":       raw(append(append([]byte{1}, huge...), 1)...),
		"a negative length":       raw(append([]byte{1, 0}, huge...)...),
		"beyond the end of disks": raw(append([]byte{1, 1}, most...)...),
		"data cut short":          raw(0, 0, 3, 1, 2),
		"too much data":           raw(append([]byte{0, 0, 0x81, 0x80, 0x40}, make([]byte, pages.MaxExtent+1)...)...),
		"a bomb":                  append([]byte{byte(pages.Extents) | 0x80}, s2.Encode(nil, make([]byte, pages.MaxChunk))...),
		"too many":                raw(bytes.Repeat([]byte{1, 0, 1}, pages.MaxChunkExtents+1)...),
	} {
		t.Run(name, func(t *testing.T) {
			require.ErrorIs(t, pages.DecodeExtents(b, func(pages.Extent) error { return nil }), pages.ErrFormat)
		})
	}
}

func FuzzDecodeSet(f *testing.F) {
	f.Add(setOf().Append(nil))
	f.Add(setOf(0, 1, 2, 63, 64, 4095).Append(nil))
	awkward := new(pages.Set)
	for p := uint64(1); p < small; p += 2 {
		awkward.Add(p)
	}
	f.Add(awkward.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, rest, err := pages.DecodeSet(b, small)
		if err != nil {
			require.ErrorIs(t, err, pages.ErrFormat)
			return
		}
		require.True(t, bytes.HasSuffix(b, rest))
		all := slices.Collect(s.All())
		require.Len(t, all, s.Len())
		if len(all) > 0 {
			require.Less(t, all[len(all)-1], uint64(small))
		}
		again, rest, err := pages.DecodeSet(s.Append(nil), small)
		require.NoError(t, err)
		require.Empty(t, rest)
		require.Equal(t, all, slices.Collect(again.All()))
	})
}

func FuzzDecodeHashes(f *testing.F) {
	zero := pages.Hash(make([]byte, pages.Size))
	f.Add(pages.AppendHashes(nil, setOf(), nil))
	f.Add(pages.AppendHashes(nil, setOf(1, 2, 9, 4095), []pages.Sum{{1, 2}, zero, {3, 4}, zero}))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, sums, rest, err := pages.DecodeHashes(b, small)
		if err != nil {
			require.ErrorIs(t, err, pages.ErrFormat)
			return
		}
		require.True(t, bytes.HasSuffix(b, rest))
		require.Len(t, sums, s.Len())
		again, sumsAgain, _, err := pages.DecodeHashes(pages.AppendHashes(nil, &s, sums), small)
		require.NoError(t, err)
		require.Equal(t, slices.Collect(s.All()), slices.Collect(again.All()))
		require.Equal(t, sums, sumsAgain)
	})
}

func FuzzDecodePages(f *testing.F) {
	var w pages.PageWriter
	f.Add(w.AppendChunk(nil))
	for i := range uint64(20) {
		w.Add(i*3, bytes.Repeat([]byte{byte(i / 5)}, pages.Size))
	}
	f.Add(w.AppendChunk(nil))
	w.Add(small-1, noise(make([]byte, pages.Size), 1))
	f.Add(w.AppendChunk(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		next := uint64(0)
		var w pages.PageWriter
		err := pages.DecodePages(b, small, func(pfn uint64, page []byte) error {
			require.True(t, pfn >= next && pfn < small && len(page) == pages.Size)
			next = pfn + 1
			if w.Len() < 100 { // enough to see that it can be written again
				require.True(t, w.Add(pfn, page))
			}
			return nil
		})
		if err != nil {
			require.ErrorIs(t, err, pages.ErrFormat)
			return
		}
		n := w.Len()
		require.NoError(t, pages.DecodePages(w.AppendChunk(nil), small, func(uint64, []byte) error { n--; return nil }))
		require.Zero(t, n)
	})
}

func FuzzDecodeExtents(f *testing.F) {
	var w pages.ExtentWriter
	f.Add(w.AppendChunk(nil))
	w.Add(pages.Extent{Disk: 1, Offset: 512, Length: 1 << 40})
	w.Add(pages.Extent{Disk: 65535, Offset: 1 << 50, Length: 512, Data: bytes.Repeat([]byte{5}, 512)})
	f.Add(w.AppendChunk(nil))
	w.Add(pages.Extent{Length: 64, Data: noise(make([]byte, 64), 3)})
	f.Add(w.AppendChunk(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var w pages.ExtentWriter
		err := pages.DecodeExtents(b, func(e pages.Extent) error {
			require.True(t, e.Offset >= 0 && e.Length > 0 && e.Offset+e.Length > 0)
			require.True(t, e.Data == nil || int64(len(e.Data)) == e.Length)
			w.Add(e)
			return nil
		})
		if err != nil {
			require.ErrorIs(t, err, pages.ErrFormat)
			return
		}
		n := w.Len()
		require.NoError(t, pages.DecodeExtents(w.AppendChunk(nil), func(pages.Extent) error { n--; return nil }))
		require.Zero(t, n)
	})
}
