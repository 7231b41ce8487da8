package pair

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/lockstep/protocol"
	"github.com/ftvmm/ftvmm/vmm"
)

// A peer's log is taken as it is, or the session ends; what is taken this guest's devices can take.
func FuzzFeed(f *testing.F) {
	var enc log.Encoder
	pos := vmm.Position{Exit: 3}
	b := enc.Sample(nil, pos, 17)
	b = enc.Input(b, pos, &vmm.Input{Kind: vmm.InputFrame}, make([]byte, 60))
	b = enc.Input(b, pos, &vmm.Input{Kind: vmm.InputDisk, Tag: 9}, nil)
	b = enc.Input(b, pos, &vmm.Input{Kind: vmm.InputEntropy, Tag: 9}, []byte("random"))
	b = enc.Scrub(b, pos, 5, digest.Sum{})
	f.Add(b, uint64(3), uint32(0))
	f.Add(enc.Input(nil, pos, &vmm.Input{Kind: vmm.InputConsole, Device: 7}, []byte("x")), uint64(3), uint32(0))
	f.Add([]byte{0xff, 0xff}, uint64(1), uint32(1))
	f.Fuzz(func(t *testing.T, data []byte, exit uint64, round uint32) {
		cfg := &vmm.Config{Disks: make([]vmm.Disk, 1), NICs: make([]vmm.NIC, 1), Serial: make([]vmm.Console, 1)}
		p := &Pair{cfg: cfg, world: &world{}, log: slog.New(slog.DiscardHandler)}
		at := protocol.Point{Exit: exit, Round: round}
		p.feed(protocol.Feed{Items: []protocol.Item{{Point: at, Data: data}, {Point: at, Mark: true}}, Limit: at})
		for i := range p.world.queue {
			e := &p.world.queue[i]
			require.Equal(t, at, point(e.Pos))
			if e.Kind == log.Input {
				require.NotEqual(t, vmm.InputEntropy, e.Input.Kind, "there is no such device")
				require.Zero(t, e.Input.Device)
			}
		}
	})
}
