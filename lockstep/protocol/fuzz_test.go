package protocol_test

import (
	"testing"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// FuzzNode lets a peer, an arbiter and a shell say anything in any order: a node must not panic,
// and must never be live alone unless the newest record that it knows says so.
func FuzzNode(f *testing.F) {
	f.Add([]byte{1, 0, 0, 1, 0, 0, 2, 1, 1})
	f.Add([]byte{1, 0, 0, 3, 5, 3, 4, 1, 0, 3, 11, 0, 5, 0, 0, 3, 13, 1, 3, 15, 1, 5, 2, 0})
	f.Fuzz(func(t *testing.T, p []byte) {
		p = p[:min(len(p), 1500)] // longer histories are the simulator's
		cfg := protocol.DefaultConfig(protocol.A)
		cfg.ArbiterTicks, cfg.ColdTicks, cfg.PollTicks, cfg.Create = 2, 2, 2, true
		n := protocol.New(cfg)
		var asked protocol.Request
		var conn uint64
		for ; len(p) >= 3; p = p[3:] {
			x, y := p[1], p[2]
			point := protocol.Point{Exit: uint64(y % 8), Round: uint32(y >> 7)}
			record := protocol.Record{Epoch: uint64(x % 8), InSync: protocol.Sides(y % 8), Primary: protocol.Side(y >> 4 % 4)}
			switch p[0] % 12 {
			case 0:
				for range x % 16 {
					n.Tick()
				}
			case 1:
				conn++
				n.LinkUp(conn)
			case 2:
				n.LinkDown(conn - uint64(x%2))
			case 3, 4, 5:
				n.Step(conn-uint64(y>>7), protocol.Message{
					Type: protocol.Type(x % 20), From: protocol.B, Phase: protocol.Phase(y % 9), Epoch: uint64(y), Term: uint64(y % 4),
					Items:    []protocol.Item{{Point: point, Mark: y%2 == 0, Tainted: y%3 == 0}},
					Received: point, Executed: point, Clean: point, Seq: uint64(y), Point: point,
					Last: y%2 == 0, Record: record, Outputs: make([]protocol.Output, y%3),
				})
			case 6:
				n.Answer(protocol.Answer{ID: asked.ID, Swapped: asked.Swap && x%2 == 0, Record: asked.Record})
			case 7:
				n.Answer(protocol.Answer{ID: asked.ID, Record: record})
			case 8:
				n.Log(point, []byte{x}, x%2 == 0)
				n.Output(point, []byte{x})
				n.Mark(point, protocol.Digest{x}, x%8 == 0)
			case 9:
				n.Executed(point, protocol.Digest{x % 2}, x%8 == 0)
			case 10:
				switch x % 8 {
				case 0:
					n.Prepared()
				case 1:
					n.CutReady(nil)
				case 2:
					n.CutTaken(nil)
				case 3:
					n.CutWant(nil)
				case 4:
					n.CutPages(nil, y%2 == 0)
				case 5:
					n.CutApplied()
				case 6:
					n.PrecopyDone()
				case 7:
					n.Frozen(p[0]%2 == 0)
				}
			case 11:
				switch x % 4 {
				case 0:
					n.SwitchOver()
				case 1:
					n.NeedCut("asked for")
				case 2:
					n.Force()
				case 3:
					n.Diverged(point, protocol.Digest{})
				}
			}
			for _, a := range n.Ready() {
				if ask, ok := a.(protocol.Ask); ok {
					asked = ask.Request
				}
				_ = a.String()
			}
			n.Advance()
			if n.Open() && n.Record().InSync != protocol.Only(protocol.A) {
				t.Fatalf("%v with record %v", n.Phase(), n.Record())
			}
		}
	})
}
