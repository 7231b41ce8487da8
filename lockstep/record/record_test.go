package record

import (
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/lockstep/log"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// recorder returns a recorder without a machine.
func recorder(t testing.TB, w io.Writer) *Recorder {
	r := NewRecorder(&vmm.Config{}, Options{})
	r.in, r.out = &vmm.Live{}, &vmm.Live{}
	var err error
	r.log, err = log.NewWriter(w, &log.Setup{Blobs: make([]uint64, 3)}, make([][]byte, 3), nil)
	require.NoError(t, err)
	r.marked = time.Now()
	return r
}

// What recording costs the vCPU thread, for each exit: the digest and the check, and with an input the
// entry of a clock reading.
func BenchmarkRecorder(b *testing.B) {
	for name, sample := range map[string]bool{"exit": false, "exit+sample": true} {
		b.Run(name, func(b *testing.B) {
			r := recorder(b, io.Discard)
			regs := kvm.Regs{RIP: 0x1000}
			x := vmm.ExitRecord{Kind: vmm.KindIn, Addr: 0x608, Size: 4, Regs: &regs}
			b.ReportAllocs()
			for b.Loop() {
				x.Pos.Exit++
				x.Data += 7
				if sample {
					r.Sample(x.Pos)
				}
				r.observe(&x)
			}
			b.ReportMetric(float64(r.log.Bytes())/float64(x.Pos.Exit), "B/exit")
			require.NoError(b, r.End(vmm.Exit{}))
		})
	}
}

// rewritten is a recording of the guest "first" whose entries are those of the function.
func rewritten(t testing.TB, entries func(enc *log.Encoder, b []byte) []byte) *log.Reader {
	kernel, err := guests.Image("first")
	require.NoError(t, err)
	var file bytes.Buffer
	cfg := vmm.Config{Memory: 16 << 20, Kernel: kernel, Serial: []vmm.Console{nil}, RNG: true}
	r := NewRecorder(&cfg, Options{})
	m, err := vmm.New(cfg)
	require.NoError(t, err)
	defer m.Close()
	require.NoError(t, r.Begin(m, &file, false))
	var enc log.Encoder
	r.log.Append(func(b []byte) []byte { return entries(&enc, b) })
	require.NoError(t, r.log.Close())
	l, err := log.NewReader(bytes.NewReader(file.Bytes()), int64(file.Len()))
	require.NoError(t, err)
	return l
}

// Inputs that no machine of ours would have recorded are divergences or damage, and do no harm.
func TestHostileEntries(t *testing.T) {
	at := vmm.Position{Exit: 1}
	for name, in := range map[string]vmm.Input{
		"disk that is not there":        {Kind: vmm.InputDisk, Device: 3, Tag: 1},
		"NIC that is not there":         {Kind: vmm.InputFrame, Device: 9},
		"link that is not there":        {Kind: vmm.InputLink, Device: 9},
		"console that is not there":     {Kind: vmm.InputConsole, Device: 7},
		"random bytes nobody asked for": {Kind: vmm.InputEntropy, Tag: 1},
		"the end of time":               {Kind: vmm.InputTime, Time: 1<<63 - 1},
		"a time before time":            {Kind: vmm.InputTime, Time: -1 << 63},
	} {
		t.Run(name, func(t *testing.T) {
			l := rewritten(t, func(enc *log.Encoder, b []byte) []byte {
				b = enc.Input(b, at, &in, make([]byte, 100))
				return enc.Mark(b, log.Closed, vmm.Position{Exit: 5}, nil, [16]byte{})
			})
			res := play(t, l)
			if in.Time >= 0 {
				require.NotNil(t, res.Divergence)
				require.Equal(t, at, res.Divergence.Position)
			}
		})
	}
}

func play(t testing.TB, l *log.Reader) Result {
	r, err := NewReplayer(l, ReplayOptions{Verify: true})
	require.NoError(t, err)
	defer r.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	end, err := r.Machine().Run(ctx)
	res, err := r.Finish(end, err)
	if err != nil {
		require.ErrorIs(t, err, log.ErrFormat)
	}
	return res
}

// FuzzReplay plays arbitrary entries to a real machine.
func FuzzReplay(f *testing.F) {
	var enc log.Encoder
	b := enc.Sample(nil, vmm.Position{Exit: 1}, 5)
	b = enc.Stop(b, vmm.Position{Exit: 1, Count: 3}, vmm.Stop{RIP: 0x100000})
	b = enc.Mark(b, log.Here, vmm.Position{Exit: 2, Round: 1}, []uint8{1, 2}, [16]byte{})
	b = enc.Mark(b, log.Closed, vmm.Position{Exit: 3}, []uint8{1}, [16]byte{})
	f.Add(b)
	f.Add(enc.End(nil, vmm.Position{Exit: 9}, vmm.Exit{Reason: vmm.ExitPowerOff}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		play(t, rewritten(t, func(_ *log.Encoder, _ []byte) []byte { return b }))
	})
}
