package protocol

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// The shell may take an entry of a stop before the stop's watermark, and the log may be sent in between: then the last
// watermark goes before the entry.
func TestAWatermarkGoesBeforeLaterEntries(t *testing.T) {
	for _, c := range []struct {
		name      string
		completes bool
		send      func(n *Node)
	}{
		{"a tick", false, func(n *Node) { n.Tick() }},
		{"an acknowledgement", false, func(n *Node) {
			n.Step(1, Message{Type: MsgAck, From: B, Executed: Point{Exit: 5}, Received: Point{Exit: 5}})
		}},
		{"a completion", true, func(n *Node) { n.Tick() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := New(DefaultConfig(A))
			n.conn, n.phase, n.logging, n.base, n.lastMark = 1, Protected, true, true, Point{Exit: 5}
			n.Mark(Point{Exit: 6}, Digest{}, false)
			n.Log(Point{Exit: 7}, nil, false)
			n.Log(Point{Exit: 7}, nil, c.completes)
			c.send(n)
			var points []uint64
			for _, a := range n.Ready() {
				if s, ok := a.(Send); ok && s.Message.Type == MsgLog {
					for _, i := range s.Message.Items {
						points = append(points, i.Point.Exit)
					}
				}
			}
			require.Equal(t, []uint64{6, 7, 7}, points)
		})
	}
}

// An arbiter whose answers take longer than a node's patience is slow, and decides all the same.
func TestASlowArbiterDecides(t *testing.T) {
	cfg := DefaultConfig(A)
	cfg.Create = true
	for _, late := range []int{1, cfg.ArbiterTicks - 1, cfg.ArbiterTicks + 1, 3 * cfg.ArbiterTicks, 20 * cfg.ArbiterTicks} {
		n := New(cfg)
		var held Record
		answers := map[int][]Answer{} // by the tick at which they come
		asked := 0
		limit := cfg.ColdTicks + 10*(late+cfg.ArbiterTicks+cfg.PollTicks)
		for now := 0; n.Phase() != Alone; now++ {
			require.Less(t, now, limit, "no decision with answers %d ticks late", late)
			n.Tick()
			for _, a := range answers[now] {
				n.Answer(a)
			}
			for _, a := range n.Ready() {
				if ask, ok := a.(Ask); ok {
					asked++
					r := ask.Request
					swapped := r.Swap && held.Epoch == r.Record.Epoch-1
					if swapped {
						held = r.Record
					}
					answers[now+late] = append(answers[now+late], Answer{ID: r.ID, Swapped: swapped, Record: held})
				}
			}
			n.Advance()
		}
		require.Equal(t, Record{Epoch: 1, InSync: Only(A), Primary: A, Nonce: held.Nonce}, held)
		require.Less(t, asked, 10+limit/cfg.ArbiterTicks, "the arbiter is asked too often")
	}
}

// What a guest gets between two exits has no watermark before the next exit: to wait until it is executed would be to
// wait for ever, as the guest would wait, too. If it is much, a cut takes it to the backup.
func TestAGuestDoesNotWaitForLogBetweenExits(t *testing.T) {
	cfg := DefaultConfig(A)
	for _, size := range []int{10, cfg.LeadBytes} {
		n := New(cfg)
		at := Point{Exit: 5}
		n.conn, n.phase, n.logging, n.base, n.lastMark, n.executed, n.received = 1, Protected, true, true, at, at, at
		cut := false
		for range 10 {
			n.Log(at, make([]byte, size/2), false)
			for range cfg.LeadTicks {
				n.Tick()
				n.Step(1, Message{Type: MsgHeartbeat, From: B})
			}
			for _, a := range n.Ready() {
				if s, ok := a.(Send); ok && s.Message.Type == MsgCutAsk {
					cut = true
				}
				p, ok := a.(Pace)
				require.False(t, ok && p.Wait && !cut, "the guest waits with %d bytes", size)
			}
			n.Advance()
		}
		require.Equal(t, size > 10, cut)
	}
}
