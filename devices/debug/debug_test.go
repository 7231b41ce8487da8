package debug

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices"
)

// rig is the three devices on a bus, as the machine maps them.
type rig struct {
	bus   *devices.Bus
	post  *POST
	text  []byte
	codes []uint32
}

func newRig(t require.TestingT) *rig {
	r := &rig{bus: devices.NewPortBus(), post: NewPOST()}
	console := NewConsole(func(p []byte) { r.text = append(r.text, p...) })
	exit := NewExit(func(code uint32) { r.codes = append(r.codes, code) })
	require.NoError(t, r.bus.Map(ConsolePort, ConsoleSize, console))
	require.NoError(t, r.bus.Map(ExitPort, ExitSize, exit))
	require.NoError(t, r.bus.Map(POSTPort, POSTSize, r.post))
	return r
}

func TestConsolePassesBytesAndSaysItIsThere(t *testing.T) {
	r := newRig(t)
	for _, b := range []byte("hello\n") {
		r.bus.Write(ConsolePort, 1, uint64(b))
	}
	require.Equal(t, "hello\n", string(r.text))
	require.EqualValues(t, 0xe9, r.bus.Read(ConsolePort, 1)&0xff)
	r.bus.Write(ConsolePort, 2, 0x4142)
	require.Equal(t, "hello\nB", string(r.text), "the port is one byte wide")
}

func TestExitCodeIsAsWideAsTheWrite(t *testing.T) {
	r := newRig(t)
	r.bus.Write(ExitPort, 1, 0xffffff07)
	r.bus.Write(ExitPort, 2, 0xffff1234)
	r.bus.Write(ExitPort, 4, 0x89abcdef)
	r.bus.Write(ExitPort+1, 1, 1)
	require.Equal(t, []uint32{7, 0x1234, 0x89abcdef}, r.codes)
	require.EqualValues(t, 0xffffffff, r.bus.Read(ExitPort, 4)&0xffffffff)
}

func TestPOSTKeepsTheLastCode(t *testing.T) {
	r := newRig(t)
	r.bus.Write(POSTPort, 1, 0x11)
	r.bus.Write(POSTPort, 1, 0x5a)
	require.EqualValues(t, 0x5a, r.post.Code())
	require.EqualValues(t, 0x5a, r.bus.Read(POSTPort, 1)&0xff)
	other := NewPOST()
	require.NoError(t, other.Restore(r.post.Save()))
	require.Equal(t, r.post.Save(), other.Save())
	r.post.Reset()
	require.Equal(t, NewPOST().Save(), r.post.Save())
}

// exercise runs a script of accesses, eight bytes each, with the code port restored
// into a fresh device now and then; what came out is what the accesses said.
func exercise(t require.TestingT, script []byte) {
	r := newRig(t)
	last := uint8(0)
	for ; len(script) >= 8; script = script[8:] {
		v := uint64(binary.LittleEndian.Uint32(script))
		size := 1 << (script[4] & 3)
		port := [...]uint64{ConsolePort, ExitPort, POSTPort}[script[5]%3]
		texts, codes := len(r.text), len(r.codes)
		if script[6]&1 != 0 {
			r.bus.Write(port, size, v)
			switch port {
			case ConsolePort:
				require.Equal(t, texts+1, len(r.text))
				require.Equal(t, byte(v), r.text[texts])
			case ExitPort:
				require.Greater(t, len(r.codes), codes)
			case POSTPort:
				last = uint8(v)
			}
		} else {
			r.bus.Read(port, size)
			require.Equal(t, texts, len(r.text))
			require.Equal(t, codes, len(r.codes))
		}
		if script[7] == 0 {
			s := r.post.Save()
			text, codes := r.text, r.codes
			r = newRig(t)
			r.text, r.codes = text, codes
			require.NoError(t, r.post.Restore(s))
		}
		require.Equal(t, last, r.post.Code())
	}
}

func TestAnyAccesses(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		exercise(t, rapid.SliceOfN(rapid.Byte(), 80, 400).Draw(t, "script"))
	})
}

func FuzzPorts(f *testing.F) {
	f.Add([]byte{'A', 0, 0, 0, 0, 0, 1, 0, 7, 0, 0, 0, 2, 1, 1, 0, 0x55, 0, 0, 0, 0, 2, 1, 0})
	f.Fuzz(func(t *testing.T, script []byte) { exercise(t, script) })
}
