package link

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func FuzzHello(f *testing.F) {
	h := hello{min: 1, max: 3, side: A, class: Bulk, path: 1, session: nonce{1}, peer: nonce{2}, epoch: 5, term: 6, capabilities: 7}
	f.Add(h.append(nil))
	f.Add(h.append(nil)[:40])
	f.Add([]byte(magic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHello(b, [2]uint16{1, 2})
		if err != nil {
			require.NotEmpty(t, err.Reason)
			return
		}
		again := h.append(nil)
		require.Len(t, again, helloSize)
		// All but the byte that is not read.
		again[helloFixed+35] = b[helloFixed+35]
		require.Equal(t, b[:helloSize], again)
	})
}

func FuzzRefusal(f *testing.F) {
	f.Add(appendRefusal(nil, refuse(WrongVersion, "no common version")))
	f.Add([]byte{255, 255})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parseRefusal(b)
		if err != nil {
			return
		}
		require.True(t, e.ByPeer)
		require.LessOrEqual(t, len(e.Reason), maxReason)
		for _, c := range e.Error() {
			require.True(t, c >= ' ' && c <= '~', "a peer's text goes to a terminal as it is")
		}
	})
}

func FuzzHeader(f *testing.F) {
	f.Add(segment(5, true, nil)[:headerSize])
	f.Add(raw(1<<32-1, kindSegment, 0, 0, 0))
	f.Add(appendFrame(nil, kindPing, make([]byte, beatSize))[:headerSize])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headerSize {
			return
		}
		h, err := parseHeader(b)
		if err != nil {
			return
		}
		require.LessOrEqual(t, h.length, limits[h.kind])
		again := make([]byte, headerSize)
		h.put(again)
		require.Equal(t, b[:headerSize], again)
	})
}

func FuzzBeat(f *testing.F) {
	f.Add(make([]byte, beatSize), uint8(kindPong))
	f.Add(bytes.Repeat([]byte{255}, beatSize), uint8(kindAck))
	f.Add([]byte{}, uint8(kindSegment))
	f.Fuzz(func(t *testing.T, b []byte, k uint8) {
		cfg, err := Config{Keys: &Keys{}}.complete()
		require.NoError(t, err)
		s := newSession(cfg, nonce{1}, true)
		p := &path{wake: make(chan struct{}, 1)}
		require.NoError(t, s.Send(Log, make([]byte, 100), true))
		if s.beat(p, kind(k), b) == nil {
			require.GreaterOrEqual(t, s.Pending(Log), 100, "freed what was never sent")
		}
	})
}

// FuzzSegments feeds a whole connection: frames are cut, segments put together, nothing above the limit kept.
func FuzzSegments(f *testing.F) {
	f.Add(append(segment(0, false, []byte("one")), segment(19, false, []byte("two"))...))
	f.Add(append(segment(0, true, make([]byte, maxSegment)), segment(maxRecord, false, []byte("end"))...))
	f.Add(segment(0, false, make([]byte, 100))[:50])
	f.Add(raw(1<<31, kindSegment, 1, 0, 9))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 3 * maxSegment
		total := 0
		r := &receiver{limit: limit, deliver: func(p []byte) {
			require.LessOrEqual(t, len(p), limit)
			total += len(p)
		}}
		in := frameReader{r: bytes.NewReader(b), buf: make([]byte, 2*maxRecord)}
		for {
			h, p, err := in.next()
			if err != nil {
				require.NotEmpty(t, err.Reason)
				break
			}
			if h.kind != kindSegment {
				continue
			}
			if _, err := r.segment(h, p); err != nil {
				break
			}
		}
		require.LessOrEqual(t, total, len(b))
	})
}

// However a class moves between its paths, and however what was sent gets lost, late or doubled, the receiver gets
// the messages in order, each once.
func TestMovingBetweenPathsLosesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSender(1<<20, 1<<17)
		defer s.close()
		var want, got [][]byte
		r := &receiver{limit: 1 << 20, deliver: func(p []byte) { got = append(got, bytes.Clone(p)) }}
		var (
			at     [MaxPaths]cursor
			flight [MaxPaths][]byte // of each path, whole records, in order
			record = make([]byte, maxRecord)
		)
		take := func(path, n int) {
			in := frameReader{r: bytes.NewReader(flight[path]), buf: make([]byte, 2*maxRecord)}
			for ; n > 0; n-- {
				h, p, err := in.next()
				if err != nil {
					require.Equal(t, Lost, err.Reason)
					break
				}
				size := headerSize + len(p)
				_, bad := r.segment(h, p)
				require.Nil(t, bad)
				flight[path] = flight[path][size:]
			}
		}
		for i := range at {
			at[i].path = i
		}
		send := func(path int) {
			// next would wait where there is nothing to send.
			idle := func() bool {
				from := max(at[path].at, s.acked)
				if at[path].begin != s.begin {
					from = s.acked
				}
				return s.active != path || from >= s.due
			}
			if b := s.next(&at[path], record, idle); b != nil {
				flight[path] = append(flight[path], b...)
			}
		}
		s.move(0)
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				p := message(uint64(len(want)), rapid.SampledFrom([]int{0, 1, 500, maxSegment - 8, maxSegment - 7, 50_000}).Draw(t, "size"))
				if err := s.append(p, rapid.Bool().Draw(t, "urgent"), false); err == nil {
					want = append(want, p)
				} else {
					require.ErrorIs(t, err, ErrFull)
				}
			},
			"send": func(t *rapid.T) { send(rapid.IntRange(0, 1).Draw(t, "path")) },
			"take": func(t *rapid.T) { take(rapid.IntRange(0, 1).Draw(t, "path"), rapid.IntRange(1, 9).Draw(t, "n")) },
			"move": func(t *rapid.T) { s.move(rapid.IntRange(0, 1).Draw(t, "path")) },
			"break": func(t *rapid.T) { // what is under way is lost; a new connection begins anew
				i := rapid.IntRange(0, 1).Draw(t, "path")
				flight[i] = nil
				at[i] = cursor{path: i}
				if s.active == i {
					s.move(-1)
					s.move(1 - i)
				}
			},
			"ack": func(t *rapid.T) { require.Nil(t, s.ack(r.taken.Load())) },
			"": func(t *rapid.T) {
				require.LessOrEqual(t, len(got), len(want))
				for i := range got {
					require.Equal(t, want[i], got[i])
				}
			},
		})
		// In the end all of it comes.
		s.flush()
		for range 1000 {
			send(s.active)
			take(s.active, 100)
		}
		require.Equal(t, len(want), len(got))
	})
}
