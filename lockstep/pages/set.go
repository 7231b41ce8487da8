package pages

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
	"slices"
)

// MaxPages bounds frame numbers: those of a guest's first TiB.
const MaxPages = 1 << 28

// Set is a set of page frame numbers. The zero value is empty. It is a bitmap up to the highest page that
// was ever in it: 32 KiB for a guest of 1 GiB, 2 MiB for one of 64 GiB. A copy of a Set shares
// its bitmap; [Set.Clone] makes one that does not.
type Set struct {
	words []uint64 // bit n%64 of word n/64
	n     int
}

// Add adds a page. A frame number of MaxPages or more panics.
func (s *Set) Add(pfn uint64) { s.AddRange(pfn, 1) }

// AddRange adds n pages from start on. A frame number of MaxPages or more panics.
func (s *Set) AddRange(start, n uint64) {
	if n == 0 {
		return
	}
	if start >= MaxPages || n > MaxPages-start {
		panic(fmt.Sprintf("pages: %d pages from frame %d on are beyond what a guest can have", n, start))
	}
	end := start + n
	s.grow(int((end + 63) / 64))
	for at := start; at < end; {
		k := min(64-at%64, end-at) // of this word
		mask := ^uint64(0) >> (64 - k) << (at % 64)
		w := &s.words[at/64]
		s.n += bits.OnesCount64(mask &^ *w)
		*w |= mask
		at += k
	}
}

// grow makes room for so many words, in steps that make adding one page after the other linear.
func (s *Set) grow(n int) {
	if n > len(s.words) {
		s.words = append(s.words, make([]uint64, n-len(s.words))...)
	}
}

// Contains reports whether a page is in the set.
func (s *Set) Contains(pfn uint64) bool {
	return pfn/64 < uint64(len(s.words)) && s.words[pfn/64]&(1<<(pfn%64)) != 0
}

// Len returns how many pages are in the set.
func (s *Set) Len() int { return s.n }

// Clear empties the set, and keeps its memory for the next use.
func (s *Set) Clear() {
	clear(s.words)
	s.n = 0
}

// Clone returns a copy.
func (s *Set) Clone() Set { return Set{slices.Clone(s.words), s.n} }

// Union adds all pages of t.
func (s *Set) Union(t *Set) {
	s.grow(len(t.words))
	for i, w := range t.words {
		s.n += bits.OnesCount64(w &^ s.words[i])
		s.words[i] |= w
	}
}

// All returns the pages in ascending order.
func (s *Set) All() iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for i, w := range s.words {
			for ; w != 0; w &= w - 1 {
				if !yield(uint64(i*64 + bits.TrailingZeros64(w))) {
					return
				}
			}
		}
	}
}

// Runs returns the longest runs of adjacent pages, each as its first page and the number of
// pages, in ascending order.
func (s *Set) Runs() iter.Seq2[uint64, uint64] {
	return func(yield func(uint64, uint64) bool) {
		for at := s.next(0, 0); at < s.end(); {
			stop := s.next(at, ^uint64(0))
			if !yield(at, stop-at) {
				return
			}
			at = s.next(stop, 0)
		}
	}
}

func (s *Set) end() uint64 { return uint64(len(s.words)) * 64 }

// next returns the first page from at on that is in the set (not is 0) or not in it (not is all ones);
// end if there is none.
func (s *Set) next(at, not uint64) uint64 {
	for ; at < s.end(); at = at/64*64 + 64 {
		if w := (s.words[at/64] ^ not) >> (at % 64); w != 0 {
			return at + uint64(bits.TrailingZeros64(w))
		}
	}
	return s.end()
}

// A set is encoded in the shorter of two forms. Both begin with a uvarint, whose lowest bit is the form:
//
//	runs    runs<<1; for each run the distance of its start from the end of the run before, less
//	        one but for the first; its length, less one. All are uvarints
//	bitmap  words<<1 | 1; the words, 8 bytes each, little-endian
//
// So neither a set of everything nor one that a guest has made awkward on purpose is longer than a bit a page.
const (
	formRuns   = 0
	formBitmap = 1
)

// Append appends the encoding of the set to b.
func (s *Set) Append(b []byte) []byte {
	last := len(s.words)
	for last > 0 && s.words[last-1] == 0 {
		last--
	}
	// The number of runs comes first: the starts of runs are ones after a zero.
	runs, carry := 0, uint64(0)
	for _, w := range s.words[:last] {
		runs += bits.OnesCount64(w &^ (w<<1 | carry))
		carry = w >> 63
	}
	from := len(b)
	b = binary.AppendUvarint(b, uint64(runs)<<1|formRuns)
	var prev uint64
	for start, n := range s.Runs() {
		if len(b)-from > last*8 {
			b = binary.AppendUvarint(b[:from], uint64(last)<<1|formBitmap)
			for _, w := range s.words[:last] {
				b = binary.LittleEndian.AppendUint64(b, w)
			}
			return b
		}
		b = binary.AppendUvarint(b, start-prev)
		b = binary.AppendUvarint(b, n-1)
		prev = start + n + 1
	}
	return b
}

// DecodeSet decodes a set of pages below total from the beginning of b, and returns what is left of b. Errors
// wrap ErrFormat.
func DecodeSet(b []byte, total int) (set Set, rest []byte, err error) {
	head, b, err := uvarint(b)
	if err != nil {
		return Set{}, nil, err
	}
	limit := uint64(min(max(total, 0), MaxPages))
	n := head >> 1
	if head&1 == formBitmap {
		if n > uint64(len(b)/8) || n > (limit+63)/64 {
			return Set{}, nil, malformed("a bitmap of %d words in %d bytes, for %d pages", n, len(b), limit)
		}
		set.words = make([]uint64, n)
		for i := range set.words {
			set.words[i] = binary.LittleEndian.Uint64(b)
			set.n += bits.OnesCount64(set.words[i])
			b = b[8:]
		}
		if n > 0 && n*64-uint64(bits.LeadingZeros64(set.words[n-1])) > limit {
			return Set{}, nil, malformed("a page beyond the last, %d", limit)
		}
		return set, b, nil
	}
	if n > uint64(len(b)/2) {
		return Set{}, nil, malformed("%d runs of pages in %d bytes", n, len(b))
	}
	var at uint64 // the first page that the next run may begin with
	for range n {
		var gap, more uint64
		if gap, b, err = uvarint(b); err != nil {
			return Set{}, nil, err
		}
		if more, b, err = uvarint(b); err != nil {
			return Set{}, nil, err
		}
		if at >= limit || gap >= limit-at || more >= limit-at-gap {
			return Set{}, nil, malformed("pages beyond the last, %d", limit)
		}
		set.AddRange(at+gap, more+1)
		at += gap + more + 2
	}
	return set, b, nil
}
