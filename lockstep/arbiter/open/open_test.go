package open_test

import (
	"context"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/open"
	"github.com/ftvmm/ftvmm/lockstep/arbiter/witness"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParse(t *testing.T) {
	for spec, want := range map[string]open.Spec{
		"file:/mnt/shared/db": {Dir: "/mnt/shared/db"},
		"file:db:1?x":         {Dir: "db:1?x"},
		"etcd:w.example:2379?keys=/etc/ftvmm/a?b=c+": {Endpoints: []string{"w.example:2379"}, Keys: "/etc/ftvmm/a?b=c+"},
		"etcd:192.0.2.1:1,[2001:db8::7]:2?keys=k":    {Endpoints: []string{"192.0.2.1:1", "[2001:db8::7]:2"}, Keys: "k"},
		"etcd:127.0.0.1:2379":                        {Endpoints: []string{"127.0.0.1:2379"}},
		"etcd:localhost:1,[::1]:1":                   {Endpoints: []string{"localhost:1", "[::1]:1"}},
	} {
		got, err := open.Parse(spec)
		require.NoError(t, err, spec)
		require.Equal(t, want, got, spec)
	}
}

func TestParseRefusesWithARemedy(t *testing.T) {
	for spec, remedy := range map[string]string{
		"":                           "write file:DIR, or etcd:HOST:PORT?keys=DIR",
		"/mnt/shared":                "write file:DIR, or etcd:HOST:PORT?keys=DIR",
		"etc:w:2379":                 "write file:DIR, or etcd:HOST:PORT?keys=DIR",
		"file:":                      "write file:DIR",
		"etcd:":                      "write HOST:PORT",
		"etcd:w.example?keys=k":      "write HOST:PORT",
		"etcd:https://w:2379?keys=k": "write HOST:PORT",
		"etcd:user@w:2379?keys=k":    "write HOST:PORT",
		"etcd:w:0?keys=k":            "write HOST:PORT",
		"etcd:w:99999?keys=k":        "write HOST:PORT",
		"etcd:w:2379,?keys=k":        "write HOST:PORT",
		"etcd::2379?keys=k":          "write HOST:PORT",
		"etcd:w:2379?keys=":          "write ?keys=DIR",
		"etcd:w:2379?key=k":          "write ?keys=DIR",
		"etcd:w:2379":                "?keys=DIR",
		"etcd:127.0.0.1:1,w:2379":    "?keys=DIR",
		"etcd:[::]:2379":             "?keys=DIR",
		"etcd:a:1,a:2,a:3,a:4,a:5,a:6,a:7,a:8?keys=k": "name fewer members",
	} {
		_, err := open.Parse(spec)
		var e *arbiter.Error
		require.ErrorAs(t, err, &e, spec)
		require.Equal(t, arbiter.BadSpec, e.Reason)
		require.Contains(t, e.Remedy, remedy, spec)
		_, _, err = open.Arbiter(spec, "db")
		require.Error(t, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("file:/mnt/db")
	f.Add("etcd:w.example:2379,[2001:db8::7]:2?keys=/etc/ftvmm")
	f.Add("etcd:localhost:1")
	f.Fuzz(func(t *testing.T, spec string) {
		s, err := open.Parse(spec)
		if err != nil {
			require.Zero(t, s)
			return
		}
		require.NotEqual(t, s.Dir == "", len(s.Endpoints) == 0, "it is of one kind")
	})
}

func TestOpeningWhatIsNotThere(t *testing.T) {
	for spec, reason := range map[string]string{
		"file:" + filepath.Join(t.TempDir(), "unmounted"): arbiter.NoStorage,
		"etcd:w.example:1?keys=" + t.TempDir():            arbiter.BadKeys,
	} {
		_, _, err := open.Arbiter(spec, "db")
		var e *arbiter.Error
		require.ErrorAs(t, err, &e, spec)
		require.Equal(t, reason, e.Reason)
		require.NotEmpty(t, e.Remedy)
	}
}

// kinds are the arbiters that must behave alike. Each makes one with an empty record and returns how it is opened.
var kinds = map[string]func(testing.TB) string{
	"file": func(t testing.TB) string { return "file:" + t.TempDir() },
	"etcd": func(t testing.TB) string {
		w, err := witness.Start(t.Context(), witness.Config{Data: t.TempDir(), Listen: "127.0.0.1:0", Insecure: true})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, w.Close()) })
		return "etcd:" + w.Addr().String()
	},
	"etcd with keys": func(t testing.TB) string {
		dir := t.TempDir()
		keys, pair := filepath.Join(dir, "keys"), filepath.Join(dir, "db")
		require.NoError(t, witness.Init(keys, []string{"127.0.0.1"}))
		require.NoError(t, witness.Grant(keys, "db", pair, false))
		w, err := witness.Start(t.Context(), witness.Config{Data: filepath.Join(dir, "data"), Listen: "127.0.0.1:0", Keys: keys})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, w.Close()) })
		return "etcd:" + w.Addr().String() + "?keys=" + filepath.Join(pair, "a")
	},
}

func eachKind(t *testing.T, claim func(t *testing.T, open func() arbiter.Arbiter)) {
	for name, make := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := make(t)
			claim(t, func() arbiter.Arbiter {
				a, closer, err := open.Arbiter(spec, "db")
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, closer.Close()) })
				return a
			})
		})
	}
}

func solo(epoch uint64, s protocol.Side, nonce uint64) protocol.Record {
	return protocol.Record{Epoch: epoch, InSync: protocol.Only(s), Primary: s, Nonce: nonce}
}

func TestSwapFromThePresentEpochOnly(t *testing.T) {
	eachKind(t, func(t *testing.T, open func() arbiter.Arbiter) {
		ctx := t.Context()
		a := open()
		held, err := a.Read(ctx)
		require.NoError(t, err)
		require.Zero(t, held)

		first, second := solo(1, protocol.A, 10), solo(2, protocol.B, 1<<64-1)
		for _, step := range []struct {
			name string
			bid  protocol.Record
			ok   bool
			held protocol.Record
		}{
			{"not before there is a record", second, false, protocol.Record{}},
			{"the first", first, true, first},
			{"not twice", solo(1, protocol.B, 11), false, first},
			{"not even the same", first, false, first},
			{"the next", second, true, second},
			{"not from an old epoch", solo(2, protocol.A, 21), false, second},
			{"not from a later one", solo(4, protocol.A, 22), false, second},
			{"not from the end of the numbers", solo(1<<64-1, protocol.A, 23), false, second},
		} {
			ok, held, err := a.Swap(ctx, step.bid)
			require.NoError(t, err, step.name)
			require.Equal(t, step.ok, ok, step.name)
			require.Equal(t, step.held, held, step.name)
		}
		held, err = open().Read(ctx)
		require.NoError(t, err)
		require.Equal(t, second, held, "another process sees it")
	})
}

func TestARecordThatMakesNoSenseIsNotSwapped(t *testing.T) {
	eachKind(t, func(t *testing.T, open func() arbiter.Arbiter) {
		a := open()
		for _, r := range []protocol.Record{{}, {Epoch: 1}, {Epoch: 1, InSync: protocol.Only(protocol.A), Primary: protocol.B}} {
			ok, _, err := a.Swap(t.Context(), r)
			require.ErrorIs(t, err, arbiter.ErrNotRecord)
			require.False(t, ok)
		}
	})
}

func TestACallWhoseContextIsDone(t *testing.T) {
	eachKind(t, func(t *testing.T, open func() arbiter.Arbiter) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		a := open()
		_, err := a.Read(ctx)
		require.ErrorIs(t, err, context.Canceled)
		ok, _, err := a.Swap(ctx, solo(1, protocol.A, 1))
		require.ErrorIs(t, err, context.Canceled)
		require.False(t, ok)
	})
}

func TestServe(t *testing.T) {
	eachKind(t, func(t *testing.T, open func() arbiter.Arbiter) {
		a, bid := open(), solo(1, protocol.A, 5)
		got, err := arbiter.Serve(t.Context(), a, protocol.Request{ID: 1, Swap: true, Record: bid})
		require.NoError(t, err)
		require.Equal(t, protocol.Answer{ID: 1, Swapped: true, Record: bid}, got)
		got, err = arbiter.Serve(t.Context(), a, protocol.Request{ID: 2})
		require.NoError(t, err)
		require.Equal(t, protocol.Answer{ID: 2, Record: bid}, got)
	})
}

func TestOneOfManyWinsEachEpoch(t *testing.T) {
	eachKind(t, func(t *testing.T, open func() arbiter.Arbiter) {
		const bidders, epochs = 8, 60
		var (
			mu   sync.Mutex
			wins = map[uint64][]uint64{} // epoch to the nonces of those who won it
			seen = map[uint64]uint64{}   // and to the nonce that it was seen with
			wg   sync.WaitGroup
		)
		for b := range uint64(bidders) {
			a := open()
			wg.Go(func() {
				for held := (protocol.Record{}); held.Epoch < epochs; {
					bid := solo(held.Epoch+1, protocol.A, b)
					ok, now, err := a.Swap(t.Context(), bid)
					if err != nil {
						t.Errorf("swap: %v", err)
						return
					}
					if now.Epoch < held.Epoch || ok && now != bid {
						t.Errorf("after %v, the bid %v ended in %v, won %v", held, bid, now, ok)
					}
					held = now
					mu.Lock()
					if ok {
						wins[bid.Epoch] = append(wins[bid.Epoch], b)
					}
					if nonce, is := seen[now.Epoch]; is && nonce != now.Nonce {
						t.Errorf("epoch %d is of %d and of %d", now.Epoch, nonce, now.Nonce)
					}
					seen[now.Epoch] = now.Nonce
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		require.Len(t, wins, epochs)
		for e, w := range wins {
			require.Equal(t, []uint64{seen[e]}, w, "epoch %d", e)
		}
	})
}

func BenchmarkArbiter(b *testing.B) {
	for name, make := range kinds {
		a, closer, err := open.Arbiter(make(b), "db")
		require.NoError(b, err)
		defer closer.Close()
		epoch := uint64(0)
		b.Run(name+"/swap", func(b *testing.B) {
			for b.Loop() {
				epoch++
				ok, _, err := a.Swap(b.Context(), solo(epoch, protocol.A, 1))
				require.NoError(b, err)
				require.True(b, ok)
			}
		})
		b.Run(name+"/read", func(b *testing.B) {
			for b.Loop() {
				_, err := a.Read(b.Context())
				require.NoError(b, err)
			}
		})
	}
}
