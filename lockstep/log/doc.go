// Package log is the record of everything that reached a guest from outside: enough
// to have another machine do the same, exit by exit, on another day.
//
// # The file
//
// A log begins with the magic "FTVMMLOG" and a version (4 bytes, little-endian). Then come frames:
//
//	length    4 bytes, little-endian, of the payload
//	kind      1 byte
//	payload
//	checksum  8 bytes, little-endian: XXH3-64 of length, kind and payload, seeded with the frame's number
//
// The first frame is a [Setup] in CBOR. Blob frames follow (firmware, kernel, initrd, option ROMs, end to
// end, in zstd pieces), then, for a guest that was not recorded from power-on, state frames with a
// saved machine, then frames of entries. A log is written from start to end and never changed: what
// a crash of the writer leaves is a prefix, of which everything up to the last mark can be replayed. A frame in
// the middle that was altered, left out or moved is found by its checksum, and the log refused.
//
// # Entries
//
// An entry is a tag, a position and what happened there, in order of position. The tag's
// lower four bits are the kind; the next two say how the position differs from the last
// entry's:
//
//	0  not at all
//	1  the number of exits between the two follows (a varint); round and count are 0
//	2  exits, round and count follow, a varint each
//
// Times are differences to the last time. A sample of the clock at an exit is 5 bytes or so.
//
// Marks say up to where the log is complete, and carry the guest's digest there (package digest) with
// seven bits of it for each exit since the last mark: a replayed guest that goes its own way is found at the exit
// where it does so, 127 times out of 128, or else soon after. That makes less than a byte an exit.
package log
