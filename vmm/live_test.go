package vmm

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/vmm/backend"
)

// mute is a NIC on which nothing comes.
type mute struct{ backend.NIC }

func (mute) Transmit([]byte) {}

// An entry after a transmission is put off for the answer, the more rarely the more answers in a
// row have not come, and each time again after one that has.
func TestLingeringIsForAnswersThatCome(t *testing.T) {
	l, err := NewLive(nil, []backend.NIC{mute{}}, nil)
	require.NoError(t, err)
	l.bell = &Bell{}
	defer l.Close()
	p := &l.answers
	// lingers sends and enters n times and returns how often the entry was put off.
	lingers := func(n int) (count int) {
		for range n {
			if p.skip == 0 {
				count++
			}
			l.Frame(0, nil)
			l.Linger()
			require.False(t, l.sent.Load())
		}
		return count
	}
	require.Equal(t, maxMisses, lingers(maxMisses+2+4+8+16+32+64+128), "no answers")
	require.Equal(t, 1<<maxMisses, p.skip)
	require.Zero(t, lingers(1<<maxMisses))
	require.Equal(t, 1, lingers(1))
	require.Equal(t, 1<<maxMisses, p.skip, "no rarer than that")

	p.skip = 0
	l.bell.Ring()
	require.Equal(t, 10, lingers(10), "answers have come")
	l.bell.answer()
	require.Equal(t, 1, lingers(3), "an answer that does not come begins anew")

	l.Linger()
	require.Zero(t, p.skip, "nothing was sent, nothing is due")
}
