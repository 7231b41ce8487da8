package pages

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/klauspost/compress/s2"
)

// A chunk is one byte and a body. The byte is the Kind, and bit 7 says that the body is one block of S2. The
// body is a sequence of records, to its end. Of pages, as uvarints:
//
//	gap<<1 | zero  pages between the last record's and this one
//	               if zero: the number of pages of zeros, less one; else the page, 4096 bytes
//
// and of extents:
//
//	disk<<1 | zero
//	offset
//	length         and unless zero, the data
const flagCompressed = 0x80

// Kind says what is in a chunk.
type Kind uint8

// The kinds. The values are part of the format.
const (
	NoChunk Kind = iota // not a chunk
	Pages               // for DecodePages
	Extents             // for DecodeExtents
)

// Limits of a chunk.
const (
	// DefaultChunk is the limit of a chunk in bytes unless another is asked for. Smaller ones compress
	// worse, larger ones hold up what comes behind them.
	DefaultChunk = 1 << 20
	// MaxChunk bounds a chunk, and what it is decompressed to, in bytes: the link's
	// MaxBulkMessage, with room for the head of a message.
	MaxChunk = 4<<20 - 1<<10
	// MaxChunkPages bounds the pages of a chunk: so much that pages of zeros cost less than a byte each.
	MaxChunkPages = 1 << 16
	// MaxExtent bounds the data of one extent, in bytes.
	MaxExtent = 1 << 20
	// MaxChunkExtents bounds the extents of a chunk.
	MaxChunkExtents = 1 << 16

	// maxPageHead and maxExtentHead are the longest records without their data.
	maxPageHead   = 2 * binary.MaxVarintLen64
	maxExtentHead = 3 * binary.MaxVarintLen64
)

// KindOf returns what kind a chunk is, by its first byte.
func KindOf(chunk []byte) Kind {
	if len(chunk) > 0 {
		if k := Kind(chunk[0] &^ flagCompressed); k == Pages || k == Extents {
			return k
		}
	}
	return NoChunk
}

// limitOf returns the limit of a chunk's body where limit is asked for.
func limitOf(limit int) int {
	if limit <= 0 {
		limit = DefaultChunk
	}
	return min(limit, MaxChunk) - 1
}

// appendChunk appends a chunk with a body to b. scratch is for the compressor, and comes back.
func appendChunk(b []byte, kind Kind, body, scratch []byte) (chunk, used []byte) {
	if n := s2.MaxEncodedLen(len(body)); cap(scratch) < n {
		scratch = make([]byte, n)
	}
	packed := s2.Encode(scratch[:cap(scratch)], body)
	if len(packed) < len(body) {
		return append(append(b, uint8(kind)|flagCompressed), packed...), scratch
	}
	return append(append(b, uint8(kind)), body...), scratch
}

// open returns the body of a chunk.
func open(chunk []byte, kind Kind) ([]byte, error) {
	if len(chunk) > MaxChunk {
		return nil, malformed("a chunk of %d bytes", len(chunk))
	}
	if KindOf(chunk) != kind {
		return nil, malformed("no chunk, or one of another kind")
	}
	body := chunk[1:]
	if chunk[0]&flagCompressed == 0 {
		return body, nil
	}
	n, err := s2.DecodedLen(body)
	if err != nil {
		return nil, malformed("a compressed chunk: %v", err)
	}
	if n >= MaxChunk {
		return nil, malformed("a compressed chunk of %d bytes", n)
	}
	if body, err = s2.Decode(nil, body); err != nil {
		return nil, malformed("a compressed chunk: %v", err)
	}
	return body, nil
}

// PageWriter fills chunks with pages, in ascending order. The zero value makes chunks of DefaultChunk.
type PageWriter struct {
	limit   int
	body    []byte
	scratch []byte
	next    uint64 // the page after the last
	count   int    // pages in the chunk
	zeros   uint64 // of these the last, which are zeros and not in body yet
}

// NewPageWriter returns a writer of chunks of at most limit bytes; zero stands for DefaultChunk, and no more
// than MaxChunk is possible. A chunk holds one page in any case.
func NewPageWriter(limit int) *PageWriter { return &PageWriter{limit: limit} }

// Len returns how many pages are in the chunk.
func (w *PageWriter) Len() int { return w.count }

// Add adds a page of Size bytes, which it copies. It reports false, and does nothing, if the chunk is full: then
// the caller takes it with AppendChunk and adds the page again. A page that does not come after the chunk's
// last, or that is beyond MaxPages, panics.
func (w *PageWriter) Add(pfn uint64, page []byte) bool {
	if len(page) != Size || pfn >= MaxPages || pfn < w.next {
		panic(fmt.Sprintf("pages: page %d of %d bytes after page %d", pfn, len(page), int64(w.next)-1))
	}
	zero := IsZero(page)
	need := maxPageHead // of the zeros that wait
	if !zero {
		need += maxPageHead + Size
	}
	if w.count > 0 && (w.count == MaxChunkPages || len(w.body)+need+maxPageHead > limitOf(w.limit)) {
		return false
	}
	gap := pfn - w.next
	switch {
	case zero && w.zeros > 0 && gap == 0:
		w.zeros++
	case zero:
		w.flush()
		w.body = binary.AppendUvarint(w.body, gap<<1|1)
		w.zeros = 1
	default:
		w.flush()
		w.body = append(binary.AppendUvarint(w.body, gap<<1), page...)
	}
	w.next = pfn + 1
	w.count++
	return true
}

// flush ends a run of zeros.
func (w *PageWriter) flush() {
	if w.zeros > 0 {
		w.body = binary.AppendUvarint(w.body, w.zeros-1)
		w.zeros = 0
	}
}

// AppendChunk appends the chunk to b, and begins the next one, which may hold any pages.
func (w *PageWriter) AppendChunk(b []byte) []byte {
	w.flush()
	b, w.scratch = appendChunk(b, Pages, w.body, w.scratch)
	w.body, w.next, w.count = w.body[:0], 0, 0
	return b
}

// DecodePages calls f with each page of a chunk, in ascending order; each is below limit. The content is valid
// during the call, and must not be changed. An error of f ends it and is returned; others wrap ErrFormat. Pages
// may have been passed to f before a chunk turns out to be malformed.
func DecodePages(chunk []byte, limit uint64, f func(pfn uint64, page []byte) error) error {
	b, err := open(chunk, Pages)
	if err != nil {
		return err
	}
	limit = min(limit, MaxPages)
	var next uint64
	for count := uint64(0); len(b) > 0; {
		var head uint64
		if head, b, err = uvarint(b); err != nil {
			return err
		}
		run, gap := uint64(1), head>>1
		page := zeros[:]
		if head&1 != 0 {
			if run, b, err = uvarint(b); err != nil {
				return err
			}
			run = min(run, math.MaxUint64-1) + 1
		} else {
			if len(b) < Size {
				return malformed("a page of %d bytes", len(b))
			}
			page, b = b[:Size:Size], b[Size:]
		}
		if next > limit || gap > limit-next || run > limit-next-gap {
			return malformed("pages beyond the last, %d", limit)
		}
		if run > MaxChunkPages-count {
			return malformed("a chunk of more than %d pages", MaxChunkPages)
		}
		count += run
		for next += gap; run > 0; run-- {
			if err := f(next, page); err != nil {
				return err
			}
			next++
		}
	}
	return nil
}

// Extent is a piece of a disk.
type Extent struct {
	Disk   uint16
	Offset int64  // in bytes
	Length int64  // in bytes; more than 0
	Data   []byte // Length bytes, at most MaxExtent; nil: zeros, of any length
}

// ExtentWriter fills chunks with extents, in any order: when they are applied in the order in which they were
// added, later ones lie over earlier ones. The zero value makes chunks of DefaultChunk.
type ExtentWriter struct {
	limit   int
	body    []byte
	scratch []byte
	count   int
}

// NewExtentWriter returns a writer of chunks of at most limit bytes; zero stands for DefaultChunk, and no
// more than MaxChunk is possible. A chunk holds one extent in any case.
func NewExtentWriter(limit int) *ExtentWriter { return &ExtentWriter{limit: limit} }

// Len returns how many extents are in the chunk.
func (w *ExtentWriter) Len() int { return w.count }

// Add adds an extent, whose data it copies; data that is zeros becomes an extent of zeros. It
// reports false, and does nothing, if the chunk is full: then the caller takes it with AppendChunk and adds the
// extent again. An extent that DecodeExtents would refuse panics.
func (w *ExtentWriter) Add(e Extent) bool {
	if !e.valid() || e.Data != nil && int64(len(e.Data)) != e.Length {
		panic(fmt.Sprintf("pages: an extent of %d bytes at %d with %d bytes of data", e.Length, e.Offset, len(e.Data)))
	}
	head := uint64(e.Disk) << 1
	if allZero(e.Data) {
		e.Data = nil
		head |= 1
	}
	if w.count > 0 && (w.count == MaxChunkExtents || len(w.body)+maxExtentHead+len(e.Data) > limitOf(w.limit)) {
		return false
	}
	w.body = binary.AppendUvarint(w.body, head)
	w.body = binary.AppendUvarint(w.body, uint64(e.Offset))
	w.body = binary.AppendUvarint(w.body, uint64(e.Length))
	w.body = append(w.body, e.Data...)
	w.count++
	return true
}

// AppendChunk appends the chunk to b, and begins the next one.
func (w *ExtentWriter) AppendChunk(b []byte) []byte {
	b, w.scratch = appendChunk(b, Extents, w.body, w.scratch)
	w.body, w.count = w.body[:0], 0
	return b
}

// valid reports whether an extent lies where one can.
func (e *Extent) valid() bool {
	return e.Offset >= 0 && e.Length > 0 && e.Length <= math.MaxInt64-e.Offset && len(e.Data) <= MaxExtent
}

func allZero(b []byte) bool {
	for p := range slices.Chunk(b, Size) {
		if !bytes.Equal(p, zeros[:len(p)]) {
			return false
		}
	}
	return true
}

// DecodeExtents calls f with each extent of a chunk, in the order in which they were added. Data is valid during the
// call, and must not be changed. It is for f to check that the disk exists and is that long. An error of f ends
// it and is returned; others wrap ErrFormat. Extents may have been passed to f before a chunk
// turns out to be malformed.
func DecodeExtents(chunk []byte, f func(Extent) error) error {
	b, err := open(chunk, Extents)
	if err != nil {
		return err
	}
	for count := 0; len(b) > 0; count++ {
		if count == MaxChunkExtents {
			return malformed("a chunk of more than %d extents", MaxChunkExtents)
		}
		var head, offset, length uint64
		for _, v := range []*uint64{&head, &offset, &length} {
			if *v, b, err = uvarint(b); err != nil {
				return err
			}
		}
		if head>>1 > math.MaxUint16 || offset > math.MaxInt64 || length > math.MaxInt64 {
			return malformed("an extent of %d bytes at %d on disk %d", length, offset, head>>1)
		}
		e := Extent{Disk: uint16(head >> 1), Offset: int64(offset), Length: int64(length)}
		if head&1 == 0 {
			if length > MaxExtent || length > uint64(len(b)) {
				return malformed("an extent of %d bytes, of which %d are there", length, len(b))
			}
			e.Data, b = b[:length:length], b[length:]
		}
		if !e.valid() {
			return malformed("an extent of %d bytes at %d", length, offset)
		}
		if err := f(e); err != nil {
			return err
		}
	}
	return nil
}
