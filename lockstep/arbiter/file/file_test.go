package file

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

var _ arbiter.Arbiter = (*Arbiter)(nil)

func open(t *testing.T, dir string) *Arbiter {
	t.Helper()
	a, err := Open(dir)
	require.NoError(t, err)
	return a
}

func solo(epoch uint64, s protocol.Side, nonce uint64) protocol.Record {
	return protocol.Record{Epoch: epoch, InSync: protocol.Only(s), Primary: s, Nonce: nonce}
}

func TestSwapFromThePresentEpochOnly(t *testing.T) {
	ctx := context.Background()
	a := open(t, t.TempDir())
	held, err := a.Read(ctx)
	require.NoError(t, err)
	require.Zero(t, held)

	first, second := solo(1, protocol.A, 10), solo(2, protocol.B, 20)
	for _, step := range []struct {
		name string
		bid  protocol.Record
		ok   bool
		held protocol.Record
	}{
		{"not before there is a record", second, false, protocol.Record{}},
		{"the first", first, true, first},
		{"not twice", solo(1, protocol.B, 11), false, first},
		{"the next", second, true, second},
		{"not from an old epoch", solo(2, protocol.A, 21), false, second},
		{"not from a later one", solo(4, protocol.A, 22), false, second},
	} {
		ok, held, err := a.Swap(ctx, step.bid)
		require.NoError(t, err, step.name)
		require.Equal(t, step.ok, ok, step.name)
		require.Equal(t, step.held, held, step.name)
	}
	held, err = open(t, a.dir).Read(ctx)
	require.NoError(t, err)
	require.Equal(t, second, held, "another process sees it")
}

func TestOneOfManyWinsEachEpoch(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	const bidders, epochs = 8, 40
	var (
		mu   sync.Mutex
		wins = map[uint64][]uint64{}
		wg   sync.WaitGroup
	)
	for b := range uint64(bidders) {
		a := open(t, dir)
		wg.Go(func() {
			for held := (protocol.Record{}); held.Epoch < epochs; {
				bid := solo(held.Epoch+1, protocol.A, b)
				ok, now, err := a.Swap(ctx, bid)
				if err != nil {
					t.Errorf("swap: %v", err)
					return
				}
				if now.Epoch < held.Epoch {
					t.Errorf("the record went back from %v to %v", held, now)
				}
				held = now
				if ok {
					mu.Lock()
					wins[bid.Epoch] = append(wins[bid.Epoch], b)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	require.Len(t, wins, epochs)
	for e, w := range wins {
		require.Len(t, w, 1, "epoch %d", e)
	}
}

func TestWhatIsNoRecordIsRefused(t *testing.T) {
	ctx := context.Background()
	for name, text := range map[string]string{
		"empty":            "",
		"garbage":          "\x00\x01",
		"unknown field":    `{"epoch":1,"in_sync":2,"primary":1,"nonce":1,"extra":1}`,
		"another epoch":    `{"epoch":2,"in_sync":2,"primary":1,"nonce":1}`,
		"unknown member":   `{"epoch":1,"in_sync":9,"primary":1,"nonce":1}`,
		"primary not in":   `{"epoch":1,"in_sync":4,"primary":1,"nonce":1}`,
		"nobody's primary": `{"epoch":1,"in_sync":2,"primary":0,"nonce":1}`,
	} {
		t.Run(name, func(t *testing.T) {
			a := open(t, t.TempDir())
			require.NoError(t, os.WriteFile(a.name(1), []byte(text), 0o600))
			_, err := a.Read(ctx)
			require.Error(t, err)
			ok, _, err := a.Swap(ctx, solo(2, protocol.A, 1))
			require.Error(t, err)
			require.False(t, ok)
		})
	}
}

func TestOtherFilesDoNotMatter(t *testing.T) {
	ctx := context.Background()
	a := open(t, t.TempDir())
	for _, n := range []string{".bid-123", "epoch-7.json", "epoch-0000000000000000000x.json", "notes"} {
		require.NoError(t, os.WriteFile(filepath.Join(a.dir, n), []byte("x"), 0o600))
	}
	ok, _, err := a.Swap(ctx, solo(1, protocol.A, 1))
	require.NoError(t, err)
	require.True(t, ok)
}

func TestStorageThatIsNotThere(t *testing.T) {
	_, err := Open(filepath.Join(t.TempDir(), "unmounted"))
	require.ErrorIs(t, err, os.ErrNotExist)

	a := open(t, t.TempDir())
	require.NoError(t, os.Remove(a.dir))
	_, err = a.Read(context.Background())
	require.Error(t, err, "no directory is not the same as no record")
	_, _, err = a.Swap(context.Background(), solo(1, protocol.A, 1))
	require.Error(t, err)
}

func TestSwapOfARecordThatMakesNoSense(t *testing.T) {
	a := open(t, t.TempDir())
	for _, r := range []protocol.Record{{}, {Epoch: 1}, {Epoch: 1, InSync: protocol.Only(protocol.A), Primary: protocol.B}} {
		_, _, err := a.Swap(context.Background(), r)
		require.Error(t, err)
	}
}

func TestServe(t *testing.T) {
	ctx := context.Background()
	a := open(t, t.TempDir())
	bid := solo(1, protocol.A, 5)
	got, err := arbiter.Serve(ctx, a, protocol.Request{ID: 1, Swap: true, Record: bid})
	require.NoError(t, err)
	require.Equal(t, protocol.Answer{ID: 1, Swapped: true, Record: bid}, got)
	got, err = arbiter.Serve(ctx, a, protocol.Request{ID: 2})
	require.NoError(t, err)
	require.Equal(t, protocol.Answer{ID: 2, Record: bid}, got)
}

func TestReadOfACancelledContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := open(t, t.TempDir()).Read(ctx)
	require.ErrorIs(t, err, context.Canceled)
}
