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
