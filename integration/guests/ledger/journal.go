package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The layout on disk (ledgerd/journal.h).
const (
	sectorSize  = 512
	recordSize  = 64
	superSize   = 64
	firstSector = 8
	version     = 1
	magic       = "FTLEDGER"

	chunkSectors = 128
)

// Errors of [ReadJournal], wrapped with the place.
var (
	// ErrNoJournal says that the disk does not begin with a ledger's superblock.
	ErrNoJournal = errors.New("no ledger journal")
	// ErrDamaged says that records which were durable are missing or wrong.
	ErrDamaged = errors.New("damaged ledger journal")
)

// Journal is what a ledger's disk holds.
type Journal struct {
	ID      uint64   // tells this journal from an earlier one on the same disk
	Records []Record // in order
	State   *State   // after all of them
	// Torn is the number of sectors behind the end with records of a group that was
	// never finished; none of them was answered.
	Torn int
}

// ReadJournal reads the journal from a disk's content and replays it by the guest's
// rules. The error is or wraps [ErrNoJournal], [ErrDamaged] or that of the reader; with
// ErrDamaged the journal holds what could be read. The end of the content before the
// end of the journal that the superblock tells is no error: the rest counts as unwritten.
func ReadJournal(disk io.ReaderAt) (*Journal, error) {
	id, sectors, err := readSuper(disk)
	if err != nil {
		return nil, err
	}
	j := &Journal{ID: id, State: NewState(id)}
	chunk := make([]byte, chunkSectors*sectorSize)
	ended := false
	for at := uint64(0); at < sectors; at += chunkSectors {
		n, err := disk.ReadAt(chunk, int64(firstSector+at)*sectorSize)
		if err != nil && !errors.Is(err, io.EOF) {
			return j, fmt.Errorf("read journal from sector %d: %w", firstSector+at, err)
		}
		whole := min(uint64(n/sectorSize), sectors-at)
		for i := range whole {
			sector := chunk[i*sectorSize : (i+1)*sectorSize]
			ended, err = j.sector(sector, ended)
			if err != nil {
				return j, fmt.Errorf("sector %d: %w", firstSector+at+i, err)
			}
		}
		if whole < chunkSectors {
			break
		}
	}
	return j, nil
}

func readSuper(disk io.ReaderAt) (id, sectors uint64, err error) {
	var b [superSize]byte
	if _, err := disk.ReadAt(b[:], 0); err == io.EOF {
		return 0, 0, fmt.Errorf("%w: shorter than a superblock", ErrNoJournal)
	} else if err != nil {
		return 0, 0, fmt.Errorf("read superblock: %w", err)
	}
	if string(b[:8]) != magic || binary.LittleEndian.Uint64(b[56:]) != uint64(fnvStart.bytes(b[:56])) {
		return 0, 0, ErrNoJournal
	}
	for i, want := range []uint32{version, recordSize, Accounts, Clients, Window} {
		if got := binary.LittleEndian.Uint32(b[8+4*i:]); got != want {
			return 0, 0, fmt.Errorf("%w of this version: word %d is %d, want %d", ErrNoJournal, i, got, want)
		}
	}
	first, sectors := binary.LittleEndian.Uint64(b[40:]), binary.LittleEndian.Uint64(b[48:])
	if first != firstSector || sectors > 1<<54 {
		return 0, 0, fmt.Errorf("%w of this version: %d sectors from %d", ErrNoJournal, sectors, first)
	}
	return binary.LittleEndian.Uint64(b[32:]), sectors, nil
}

// sector takes in the next sector. It returns whether the journal has ended.
func (j *Journal) sector(b []byte, ended bool) (bool, error) {
	if !ended {
		if n := j.recordsIn(b); n > 0 {
			for i := range n {
				r, chain := decode(b[i*recordSize:])
				if err := j.State.apply(r, chain); err != nil {
					return true, fmt.Errorf("%w: record %d: %w", ErrDamaged, r.Seq, err)
				}
				j.Records = append(j.Records, r)
			}
			return false, nil
		}
	}
	var last uint32
	if n := len(j.Records); n > 0 {
		last = j.Records[n-1].Commit
	}
	torn := false
	for at := 0; at < sectorSize; at += recordSize {
		if !j.intact(b[at : at+recordSize]) {
			continue
		}
		if r, _ := decode(b[at:]); r.Commit > last+1 {
			return true, fmt.Errorf("%w: commit %d is here, but the journal ends with %d", ErrDamaged, r.Commit, last)
		}
		torn = true
	}
	if torn {
		j.Torn++
	}
	return true, nil
}

// recordsIn counts a sector's records, 0 if the sector does not continue the journal.
func (j *Journal) recordsIn(b []byte) int {
	seq, chain := j.State.seq, j.State.chain
	n := 0
	for ; n < sectorSize/recordSize; n++ {
		p := b[n*recordSize : (n+1)*recordSize]
		if isZero(p) {
			break
		}
		r, next := decode(p)
		if !j.intact(p) || r.Seq != seq+1 || next != uint64(fnvStart.uint64(chain).bytes(p[:48])) {
			return 0
		}
		seq, chain = r.Seq, next
	}
	if !isZero(b[n*recordSize:]) {
		return 0
	}
	return n
}

// intact says whether a record's sum is right and of this journal.
func (j *Journal) intact(p []byte) bool {
	return binary.LittleEndian.Uint64(p[56:]) == uint64(fnvStart.uint64(j.ID).bytes(p[:56]))
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func decode(p []byte) (r Record, chain uint64) {
	le := binary.LittleEndian
	return Record{
		Seq:     le.Uint64(p),
		Number:  le.Uint64(p[8:]),
		Amount:  le.Uint64(p[16:]),
		Balance: le.Uint64(p[24:]),
		Client:  le.Uint32(p[32:]),
		Commit:  le.Uint32(p[36:]),
		From:    le.Uint16(p[40:]),
		To:      le.Uint16(p[42:]),
		Op:      Op(p[44]),
		Outcome: Outcome(p[45]),
	}, le.Uint64(p[48:])
}

// Covers returns nil if the journal holds every answer just as it was given, else an
// error that names the first that it does not.
func (j *Journal) Covers(answers []Answer) error {
	for _, a := range answers {
		if a.Seq == 0 || a.Seq > uint64(len(j.Records)) {
			return fmt.Errorf("answer %d.%d has sequence number %d, the journal ends at %d",
				a.Client, a.Number, a.Seq, len(j.Records))
		}
		r := j.Records[a.Seq-1]
		if r.Client != a.Client || r.Number != a.Number || r.Outcome != a.Outcome || (a.Outcome == OK && r.Balance != a.Balance) {
			return fmt.Errorf("answer %+v, but the journal holds %+v", a, r)
		}
	}
	return nil
}
