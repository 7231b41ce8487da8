package log

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// entry draws an entry at or after pos.
func entry(t *rapid.T, pos vmm.Position) Entry {
	switch rapid.IntRange(0, 3).Draw(t, "step") {
	case 0:
		pos = vmm.Position{Exit: pos.Exit + rapid.Uint64Range(1, 1<<20).Draw(t, "exits")}
	case 1:
		pos = vmm.Position{Exit: pos.Exit, Round: pos.Round + rapid.Uint32Range(1, 9).Draw(t, "rounds")}
	case 2:
		pos.Count += rapid.Uint64Range(1, 1<<40).Draw(t, "count")
	}
	data := rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "data")
	e := Entry{Pos: pos, Kind: Kind(rapid.IntRange(int(Sample), int(End)).Draw(t, "kind"))}
	if e.Kind == Closed { // of which only the exit counts
		pos = vmm.Position{Exit: pos.Exit + 1}
		e.Pos = pos
	}
	device := rapid.Uint16().Draw(t, "device")
	switch e.Kind {
	case Sample:
		e.Time = rapid.Int64().Draw(t, "time")
	case Input:
		e.Input.Kind = rapid.SampledFrom([]vmm.InputKind{
			vmm.InputTime, vmm.InputDisk, vmm.InputFrame, vmm.InputLink, vmm.InputConsole, vmm.InputEntropy, vmm.InputPowerButton, vmm.InputReset,
		}).Draw(t, "input")
		switch e.Input.Kind {
		case vmm.InputTime:
			e.Input.Time = rapid.Int64().Draw(t, "time")
		case vmm.InputDisk:
			e.Input.Device, e.Input.Tag, e.Input.Status, e.Input.Data = device, rapid.Uint64().Draw(t, "tag"), rapid.Byte().Draw(t, "status"), data
		case vmm.InputFrame, vmm.InputConsole:
			e.Input.Device, e.Input.Data = device, data
		case vmm.InputLink:
			e.Input.Device, e.Input.Up = device, rapid.Bool().Draw(t, "up")
		case vmm.InputEntropy:
			e.Input.Tag, e.Input.Data = rapid.Uint64().Draw(t, "tag"), data
		}
	case Stop:
		e.Stop = vmm.Stop{Count: pos.Count, RIP: rapid.Uint64().Draw(t, "rip"), RCX: rapid.Uint64().Draw(t, "rcx"), Regs: rapid.Uint64().Draw(t, "regs")}
	case Closed, Here:
		e.Checks = rapid.SliceOfN(rapid.Uint8Range(0, 127), 0, MaxChecks).Draw(t, "checks")
		copy(e.Sum[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "sum"))
	case Record:
		e.Exit = vmm.ExitRecord{Pos: pos, Kind: vmm.KindIn, Size: 4, Addr: rapid.Uint64().Draw(t, "addr"), Data: rapid.Uint64().Draw(t, "data")}
		e.Regs = kvm.Regs{RAX: rapid.Uint64().Draw(t, "rax"), RIP: rapid.Uint64().Draw(t, "rip"), RFLAGS: rapid.Uint64().Draw(t, "rflags")}
	case End:
		e.End = vmm.Exit{Reason: vmm.ExitDebugExit, Code: rapid.Uint32().Draw(t, "code"), Detail: string(data)}
	}
	return e
}

// requireEqual compares entries, taking no bytes and nil for the same.
func requireEqual(t require.TestingT, want, got Entry) {
	for _, e := range []*Entry{&want, &got} {
		if len(e.Input.Data) == 0 {
			e.Input.Data = nil
		}
		if len(e.Checks) == 0 {
			e.Checks = nil
		}
	}
	require.Equal(t, want, got)
}

func TestEntriesComeBackAsTheyWere(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var (
			enc  Encoder
			dec  Decoder
			want []Entry
			b    []byte
			pos  vmm.Position
		)
		for range rapid.IntRange(1, 30).Draw(t, "n") {
			e := entry(t, pos)
			pos = e.Pos
			b = enc.Entry(b, &e)
			want = append(want, e)
		}
		dec.Feed(b)
		for i := range want {
			require.True(t, dec.More())
			var got Entry
			require.NoError(t, dec.Next(&got))
			requireEqual(t, want[i], got)
		}
		require.False(t, dec.More())
	})
}

// The promise about size: a clock reading takes at most 16 bytes, an exit without input less than one.
func TestEntriesAreSmall(t *testing.T) {
	var enc Encoder
	b := enc.Sample(nil, vmm.Position{Exit: 1 << 30}, 1<<40) // the first one may be long
	n := len(b)
	for i := range uint64(100) {
		b = enc.Sample(b, vmm.Position{Exit: 1<<30 + 1 + 7*i}, 1<<40+int64(i)*123_456)
	}
	require.LessOrEqual(t, len(b)-n, 100*6)
	n = len(b)
	b = enc.Mark(b, Closed, vmm.Position{Exit: 1<<30 + 1<<10}, make([]uint8, MaxChecks), digest.Sum{})
	require.Less(t, len(b)-n, MaxChecks)
}

func testSetup() (*Setup, [][]byte) {
	kernel := bytes.Repeat([]byte("kernel"), 400_000) // more than one piece
	return &Setup{
		Name: "test", Memory: 64 << 20, Serial: 1,
		Disks:   []Disk{{Info: backend.DiskInfo{Size: 1 << 20, BlockSize: 512}}},
		NICs:    []NIC{{MAC: [6]byte{2}}},
		Counter: vmm.CounterNone, Blobs: []uint64{0, uint64(len(kernel)), 3, 0},
	}, [][]byte{nil, kernel, []byte("ird"), nil}
}

// written is a log with n entries.
func written(t testing.TB, n int, state []byte) []byte {
	var file bytes.Buffer
	setup, blobs := testSetup()
	var writeState func(io.Writer) error
	if setup.State = state != nil; setup.State {
		writeState = func(w io.Writer) error { _, err := w.Write(state); return err }
	}
	w, err := NewWriter(&file, setup, blobs, writeState)
	require.NoError(t, err)
	var enc Encoder
	for i := range n {
		w.Append(func(b []byte) []byte { return enc.Sample(b, vmm.Position{Exit: uint64(i)}, int64(i)) })
	}
	require.NoError(t, w.Close())
	return file.Bytes()
}

func TestFilesComeBackAsTheyWere(t *testing.T) {
	state := bytes.Repeat([]byte("state"), 500_000)
	for _, s := range [][]byte{nil, state} {
		file := written(t, 100_000, s)
		l, err := NewReader(bytes.NewReader(file), int64(len(file)))
		require.NoError(t, err)
		setup, blobs := testSetup()
		setup.State = s != nil
		require.Equal(t, setup, l.Setup)
		require.Equal(t, blobs, l.Blobs)
		require.False(t, l.Truncated)
		var got bytes.Buffer
		require.NoError(t, l.WriteState(&got))
		require.Equal(t, string(s), got.String())
		for i := range 100_000 {
			var e Entry
			require.NoError(t, l.Next(&e))
			require.EqualValues(t, i, e.Time)
		}
		require.Equal(t, io.EOF, l.Next(&Entry{}))
	}
}

func TestFramesThatWereMovedOrLeftOutAreFound(t *testing.T) {
	file := written(t, 1000, nil)
	// The second frame is the kernel's first piece.
	var starts []int
	for at := len(magic) + 4; at < len(file); {
		starts = append(starts, at)
		at += frameHead + int(file[at]) + int(file[at+1])<<8 + int(file[at+2])<<16 + frameTail
	}
	require.Greater(t, len(starts), 3)
	without := append(bytes.Clone(file[:starts[1]]), file[starts[2]:]...)
	_, err := NewReader(bytes.NewReader(without), int64(len(without)))
	require.ErrorIs(t, err, ErrNotLog)
	swapped := append(bytes.Clone(file[:starts[1]]), file[starts[2]:starts[3]]...)
	swapped = append(append(swapped, file[starts[1]:starts[2]]...), file[starts[3]:]...)
	_, err = NewReader(bytes.NewReader(swapped), int64(len(swapped)))
	require.ErrorIs(t, err, ErrNotLog)
}

// failing is a file on a disk that is full after n bytes.
type failing struct{ n int }

var errFull = errors.New("no space left")

func (f *failing) Write(p []byte) (int, error) {
	if f.n -= len(p); f.n < 0 {
		return 0, errFull
	}
	return len(p), nil
}

// A guest whose log cannot be written goes on; the error is told at the end.
func TestWriteErrorsDoNotBlock(t *testing.T) {
	setup, _ := testSetup()
	setup.Blobs = []uint64{0, 0, 0, 0}
	w, err := NewWriter(&failing{100_000}, setup, make([][]byte, 4), nil)
	require.NoError(t, err)
	big := make([]byte, 1<<20)
	for range 40 { // more than may be pending
		w.Append(func(b []byte) []byte { return append(b, big...) })
	}
	require.ErrorIs(t, w.Close(), errFull)
}

func FuzzDecoder(f *testing.F) {
	var enc Encoder
	in := vmm.Input{Kind: vmm.InputDisk, Tag: 7, Device: 1}
	b := enc.Sample(nil, vmm.Position{Exit: 3}, 1000)
	b = enc.Input(b, vmm.Position{Exit: 5, Round: 1}, &in, []byte("data"))
	b = enc.Mark(b, Closed, vmm.Position{Exit: 9}, []uint8{1, 2, 3}, digest.Sum{1})
	b = enc.End(b, vmm.Position{Exit: 9}, vmm.Exit{Reason: vmm.ExitPowerOff})
	f.Add(b)
	f.Add([]byte{0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var dec Decoder
		dec.Feed(b)
		var pos vmm.Position
		for dec.More() {
			var e Entry
			if err := dec.Next(&e); err != nil {
				require.ErrorIs(t, err, ErrFormat)
				return
			}
			require.False(t, Before(e.Pos, pos))
			require.LessOrEqual(t, len(e.Input.Data), MaxData)
			require.LessOrEqual(t, len(e.Checks), MaxChecks)
			pos = e.Pos
		}
	})
}

func FuzzReader(f *testing.F) {
	var file bytes.Buffer
	setup, _ := testSetup()
	setup.Blobs = []uint64{0, 6, 0, 0}
	w, err := NewWriter(&file, setup, [][]byte{nil, []byte("kernel"), nil, nil}, nil)
	require.NoError(f, err)
	var enc Encoder
	w.Append(func(b []byte) []byte { return enc.Sample(b, vmm.Position{Exit: 1}, 5) })
	require.NoError(f, w.Close())
	f.Add(file.Bytes())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := NewReader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		_, err = l.Setup.Config(l.Blobs, "")
		require.NoError(t, err)
		for err == nil {
			var e Entry
			err = l.Next(&e)
		}
	})
}
