// Package pages encodes what a cut and a pre-copy carry: which pages of a guest's memory are meant, what
// is in them, and what is on its disks.
//
// A cut is a conversation in sets. The backup sends the [Set] of pages that it has dirtied since the last
// cut; the primary adds its own and answers with a hash of each ([AppendHashes]); the backup compares
// them with its own pages and sends the set of those that differ; the primary sends their content. Pages travel in
// chunks of about a megabyte, which [PageWriter] fills and [DecodePages] empties; disk content does so too, with
// [ExtentWriter] and [DecodeExtents]. [KindOf] tells the two apart.
//
// A page is named by its frame number, the guest-physical address divided by [Size]. A guest that has just
// started is mostly zeros, so zeros are cheap everywhere: a page of zeros is a mark in a set of hashes, and
// a run of them a few bytes of a chunk.
//
// The package holds no memory of a guest and compares nothing itself; it has no clock and no goroutine. What
// it decodes comes from a peer that is authenticated but may be wrong: each decoder is told how large the guest
// is, refuses what lies beyond, and allocates what a length in the input asks for only if the input or the guest
// has that much, or a chunk may.
package pages

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Size is the size of a page in bytes, the 4 KiB of x86.
const Size = 4096

// ErrFormat reports bytes that are not what they should be.
var ErrFormat = errors.New("pages: malformed")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// uvarint takes a number in its shortest form off b.
func uvarint(b []byte) (uint64, []byte, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 || n > 1 && b[n-1] == 0 {
		return 0, nil, malformed("a number that is cut short or too long")
	}
	return v, b[n:], nil
}
