package arbiter_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

func TestARecordComesBackAsItWas(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		primary := rapid.SampledFrom([]protocol.Side{protocol.A, protocol.B}).Draw(t, "primary")
		want := protocol.Record{
			Epoch:   rapid.Uint64Min(1).Draw(t, "epoch"),
			InSync:  rapid.SampledFrom([]protocol.Sides{protocol.Only(primary), protocol.Both}).Draw(t, "in sync"),
			Primary: primary,
			Nonce:   rapid.Uint64().Draw(t, "nonce"),
		}
		data, err := arbiter.Marshal(want)
		require.NoError(t, err)
		got, err := arbiter.Unmarshal(data)
		require.NoError(t, err)
		require.Equal(t, want, got)
	})
}

func TestWhatMakesNoSenseIsNotKept(t *testing.T) {
	for _, r := range []protocol.Record{
		{},
		{Epoch: 1},
		{InSync: protocol.Both, Primary: protocol.A},
		{Epoch: 1, InSync: protocol.Only(protocol.A), Primary: protocol.B},
		{Epoch: 1, InSync: protocol.Both | 1, Primary: protocol.B},
	} {
		_, err := arbiter.Marshal(r)
		require.ErrorIs(t, err, arbiter.ErrNotRecord, "%+v", r)
	}
}

func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"epoch":1,"in_sync":2,"primary":1,"nonce":1}` + "\n"))
	f.Add([]byte(`{"epoch":18446744073709551615,"in_sync":6,"primary":2,"nonce":0} x`))
	f.Add([]byte(`{"Epoch":1,"epoch":2}`))
	f.Add([]byte(strings.Repeat(" ", arbiter.MaxRecord+1)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := arbiter.Unmarshal(data)
		if err != nil {
			require.ErrorIs(t, err, arbiter.ErrNotRecord)
			require.Zero(t, r)
			return
		}
		require.NoError(t, arbiter.Check(r))
		again, err := arbiter.Marshal(r)
		require.NoError(t, err)
		back, err := arbiter.Unmarshal(again)
		require.NoError(t, err)
		require.Equal(t, r, back)
	})
}
