package pages

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/zeebo/xxh3"
)

// Sum is the hash of a page's content: XXH3-128. It finds pages that differ, not forgers.
type Sum struct{ Hi, Lo uint64 }

// String returns the value in hexadecimal.
func (s Sum) String() string { return fmt.Sprintf("%016x%016x", s.Hi, s.Lo) }

// sumSize is the size of an encoded Sum in bytes.
const sumSize = 16

var (
	zeros   [Size]byte
	zeroSum = hash(zeros[:])
)

func hash(page []byte) Sum {
	h := xxh3.Hash128(page)
	return Sum{h.Hi, h.Lo}
}

// IsZero reports whether a page holds nothing but zeros. Where it does not, that shows mostly at once.
func IsZero(page []byte) bool { return bytes.Equal(page, zeros[:]) }

// Hash returns the hash of a page, of Size bytes.
func Hash(page []byte) Sum {
	if IsZero(page) {
		return zeroSum
	}
	return hash(page)
}

// AppendHashes appends pages and their hashes to b; sums are those of the pages in ascending order, and as many.
//
// Encoded are the set of the pages that are not zeros, the set of those that are, and the hashes of the
// former, 16 bytes each, little-endian, the lower half first.
func AppendHashes(b []byte, set *Set, sums []Sum) []byte {
	if set.Len() != len(sums) {
		panic(fmt.Sprintf("pages: %d hashes of %d pages", len(sums), set.Len()))
	}
	var full, zero Set
	i := 0
	for pfn := range set.All() {
		if sums[i] == zeroSum {
			zero.Add(pfn)
		} else {
			full.Add(pfn)
		}
		i++
	}
	b = zero.Append(full.Append(b))
	for _, s := range sums {
		if s != zeroSum {
			b = binary.LittleEndian.AppendUint64(b, s.Lo)
			b = binary.LittleEndian.AppendUint64(b, s.Hi)
		}
	}
	return b
}

// DecodeHashes decodes what [AppendHashes] has encoded, from the beginning of b: pages below total, their hashes in
// ascending order of pages, and what is left of b. Errors wrap ErrFormat.
func DecodeHashes(b []byte, total int) (set Set, sums []Sum, rest []byte, err error) {
	full, b, err := DecodeSet(b, total)
	if err != nil {
		return Set{}, nil, nil, err
	}
	if full.Len() > len(b)/sumSize {
		return Set{}, nil, nil, malformed("hashes of %d pages in %d bytes", full.Len(), len(b))
	}
	zero, b, err := DecodeSet(b, total)
	if err != nil {
		return Set{}, nil, nil, err
	}
	if full.Len() > len(b)/sumSize {
		return Set{}, nil, nil, malformed("hashes of %d pages in %d bytes", full.Len(), len(b))
	}
	set = full.Clone()
	set.Union(&zero)
	if set.Len() != full.Len()+zero.Len() {
		return Set{}, nil, nil, malformed("a page with two hashes")
	}
	sums = make([]Sum, 0, set.Len())
	for pfn := range set.All() {
		s := zeroSum
		if full.Contains(pfn) {
			s = Sum{Lo: binary.LittleEndian.Uint64(b), Hi: binary.LittleEndian.Uint64(b[8:])}
			b = b[sumSize:]
			if s == zeroSum {
				return Set{}, nil, nil, malformed("the hash of zeros where there are none")
			}
		}
		sums = append(sums, s)
	}
	return set, sums, b, nil
}
