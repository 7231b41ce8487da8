package ledger

import (
	"bytes"
	"encoding/binary"
	"hash/fnv"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// image is a disk under construction, by the rules of ledgerd/journal.h.
type image struct {
	b     []byte
	id    uint64
	state *State
	next  int // sector
	last  uint32
}

func newImage(id uint64, sectors int) *image {
	m := &image{b: make([]byte, sectors*sectorSize), id: id, state: NewState(id), next: firstSector}
	copy(m.b, magic)
	for i, v := range []uint32{version, recordSize, Accounts, Clients, Window} {
		binary.LittleEndian.PutUint32(m.b[8+4*i:], v)
	}
	binary.LittleEndian.PutUint64(m.b[32:], id)
	binary.LittleEndian.PutUint64(m.b[40:], firstSector)
	binary.LittleEndian.PutUint64(m.b[48:], uint64(sectors-firstSector))
	binary.LittleEndian.PutUint64(m.b[56:], fnv1a(m.b[:56]))
	return m
}

// fnv1a is the standard library's, as a second opinion on the package's own.
func fnv1a(p []byte) uint64 {
	h := fnv.New64a()
	h.Write(p)
	return h.Sum64()
}

func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// request makes the record of a request, with the outcome that it has now.
func (m *image) request(client uint32, number uint64, op Op, from, to uint16, amount uint64) Record {
	r := Record{Client: client, Number: number, Op: op, From: from, To: to, Amount: amount}
	before := m.state.balances
	r.Outcome, r.Balance = m.state.execute(r)
	m.state.balances = before
	return r
}

// commit appends a group of one record for each request.
func (m *image) commit(t require.TestingT, requests ...func() Record) {
	m.last++
	for i, request := range requests {
		r := request()
		r.Seq, r.Commit = m.state.seq+1, m.last
		p := m.b[m.next*sectorSize+i*recordSize:][:recordSize]
		le := binary.LittleEndian
		le.PutUint64(p, r.Seq)
		le.PutUint64(p[8:], r.Number)
		le.PutUint64(p[16:], r.Amount)
		le.PutUint64(p[24:], r.Balance)
		le.PutUint32(p[32:], r.Client)
		le.PutUint32(p[36:], r.Commit)
		le.PutUint16(p[40:], r.From)
		le.PutUint16(p[42:], r.To)
		p[44], p[45] = byte(r.Op), byte(r.Outcome)
		le.PutUint64(p[48:], fnv1a(append(le64(m.state.chain), p[:48]...)))
		le.PutUint64(p[56:], fnv1a(append(le64(m.id), p[:56]...)))
		require.NoError(t, m.state.apply(r, le.Uint64(p[48:])))
	}
	m.next += (len(requests) + 7) / 8
}

func (m *image) deposit(client uint32, number uint64) func() Record {
	return func() Record { return m.request(client, number, Deposit, 1, 1, 10) }
}

// sample is a journal of three groups, of 1, 10 (two sectors) and 2 records.
func sample(t require.TestingT) *image {
	m := newImage(77, 64)
	m.commit(t, m.deposit(1, 1))
	var ten []func() Record
	for n := uint64(2); n < 12; n++ {
		ten = append(ten, func() Record { return m.request(1, n, Transfer, 1, uint16(n), 3) })
	}
	m.commit(t, ten...)
	m.commit(t, m.deposit(2, 1), m.deposit(1, 12))
	return m
}

func TestReadJournalReplays(t *testing.T) {
	m := sample(t)
	j, err := ReadJournal(bytes.NewReader(m.b))
	require.NoError(t, err)
	require.Len(t, j.Records, 13)
	require.EqualValues(t, 77, j.ID)
	require.Equal(t, m.state.Hash(), j.State.Hash())
	require.EqualValues(t, 13, j.State.Seq())
	require.EqualValues(t, 30, j.State.Total(), "what was deposited is there")
	require.EqualValues(t, 21, j.State.Balance(1))
	require.Equal(t, Funds, j.Records[4].Outcome, "the fourth transfer of 3 from 10")
	require.EqualValues(t, 3, j.Records[12].Commit)
	require.Zero(t, j.Torn)
}

func TestReadJournalRefuses(t *testing.T) {
	at := func(sector, offset int) int { return sector*sectorSize + offset }
	for _, c := range []struct {
		name    string
		spoil   func(m *image)
		err     error
		records int
	}{
		{"an empty disk", func(m *image) { clear(m.b) }, ErrNoJournal, 0},
		{"a disk of a few bytes", func(m *image) { m.b = m.b[:20] }, ErrNoJournal, 0},
		{"a spoilt superblock", func(m *image) { m.b[50]++ }, ErrNoJournal, 0},
		{"another version", func(m *image) {
			m.b[8]++
			binary.LittleEndian.PutUint64(m.b[56:], fnv1a(m.b[:56]))
		}, ErrNoJournal, 0},
		{"a hole in an earlier group", func(m *image) { m.b[at(9, 3)]++ }, ErrDamaged, 1},
		{"a lost first sector", func(m *image) { clear(m.b[at(8, 0):at(9, 0)]) }, ErrDamaged, 0},
		{"a spoilt last group, which a crash also makes", func(m *image) { m.b[at(11, 3)]++ }, nil, 11},
		{"a lost last group", func(m *image) { clear(m.b[at(11, 0):at(12, 0)]) }, nil, 11},
		{"junk after the end", func(m *image) { m.b[at(12, 100)]++ }, nil, 13},
		{"junk in an unused slot", func(m *image) { m.b[at(11, 500)]++ }, nil, 11},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := sample(t)
			c.spoil(m)
			j, err := ReadJournal(bytes.NewReader(m.b))
			require.ErrorIs(t, err, c.err)
			if j != nil {
				require.Len(t, j.Records, c.records)
			}
		})
	}
}

func TestATornGroupDoesNotCount(t *testing.T) {
	m := sample(t)
	old := bytes.Clone(m.b)
	var many []func() Record
	for n := range uint64(20) {
		many = append(many, m.deposit(9, n+1))
	}
	m.commit(t, many...) // three sectors, 12 to 14
	copy(m.b[12*sectorSize:13*sectorSize], old[12*sectorSize:])
	j, err := ReadJournal(bytes.NewReader(m.b))
	require.NoError(t, err)
	require.Len(t, j.Records, 13)
	require.Equal(t, 2, j.Torn)
}

func TestContradictionIsDamage(t *testing.T) {
	m := sample(t)
	require.Panics(t, func() { // the writer refuses as well
		m.commit(panicking{}, m.deposit(1, 12))
	}, "a request that was executed before")
	m = sample(t)
	m.state.balances[1]++ // the next record tells a balance that replay does not reach
	m.commit(t, m.deposit(3, 1))
	_, err := ReadJournal(bytes.NewReader(m.b))
	require.ErrorIs(t, err, ErrDamaged)
}

type panicking struct{}

func (panicking) Errorf(string, ...any) {}
func (panicking) FailNow()              { panic("failed") }

// Whatever byte of a journal is changed, the records read are a prefix of those written.
func TestDamageNeverInventsRecords(t *testing.T) {
	m := sample(t)
	whole, err := ReadJournal(bytes.NewReader(m.b))
	require.NoError(t, err)
	rapid.Check(t, func(t *rapid.T) {
		b := bytes.Clone(m.b)
		at := rapid.IntRange(0, len(b)-1).Draw(t, "at")
		b[at] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
		j, err := ReadJournal(bytes.NewReader(b))
		if j == nil {
			require.ErrorIs(t, err, ErrNoJournal)
			require.Less(t, at, superSize)
			return
		}
		require.Equal(t, whole.Records[:len(j.Records)], append([]Record{}, j.Records...))
	})
}

func TestCovers(t *testing.T) {
	j, err := ReadJournal(bytes.NewReader(sample(t).b))
	require.NoError(t, err)
	good := Answer{Client: 1, Number: 1, Seq: 1, Balance: 10}
	require.NoError(t, j.Covers([]Answer{good, {Client: 1, Number: 5, Seq: 5, Outcome: Funds}}))
	for name, change := range map[string]func(*Answer){
		"lost":                func(a *Answer) { a.Seq = 14 },
		"no number":           func(a *Answer) { a.Seq = 0 },
		"another client's":    func(a *Answer) { a.Client = 2 },
		"another request's":   func(a *Answer) { a.Number = 2 },
		"another balance":     func(a *Answer) { a.Balance = 11 },
		"of another outcome":  func(a *Answer) { a.Outcome = Limit },
		"of another sequence": func(a *Answer) { a.Seq = 2 },
	} {
		a := good
		change(&a)
		require.Error(t, j.Covers([]Answer{good, a}), name)
	}
}

func FuzzReadJournal(f *testing.F) {
	m := newImage(1, 16)
	f.Add(bytes.Clone(m.b))
	m.commit(f, m.deposit(1, 1), m.deposit(1, 2))
	m.commit(f, m.deposit(2, 1))
	f.Add(bytes.Clone(m.b))
	f.Add(m.b[:9*sectorSize+100])
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := ReadJournal(bytes.NewReader(b))
		if err == nil && j.State.Seq() != uint64(len(j.Records)) {
			t.Fatalf("%d records, sequence %d", len(j.Records), j.State.Seq())
		}
	})
}
