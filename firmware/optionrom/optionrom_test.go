package optionrom

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func sum(b []byte) (s byte) {
	for _, v := range b {
		s += v
	}
	return s
}

// What SeaBIOS checks before it runs the ROM and lists its entry (BIOS Boot
// Specification 1.01; Plug and Play BIOS Specification 1.0A, 3.2).
func TestHeadersAreValid(t *testing.T) {
	require.Equal(t, []byte{0x55, 0xaa, 1}, Linux[:3])
	require.Len(t, Linux, 512)
	require.Zero(t, sum(Linux))
	pnp := Linux[binary.LittleEndian.Uint16(Linux[0x1a:]):][:32]
	require.Equal(t, "$PnP", string(pnp[:4]))
	require.Zero(t, sum(pnp))
	require.Less(t, int(binary.LittleEndian.Uint16(pnp[0x1a:])), len(Linux), "boot entry vector")
}

func TestCommittedROMIsBuiltFromItsSource(t *testing.T) {
	for _, tool := range []string{"as", "ld"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("cannot rebuild the ROM: %v (apt-get install binutils)", err)
		}
	}
	out := filepath.Join(t.TempDir(), "linux.bin")
	msg, err := exec.Command("./build.sh", out).CombinedOutput()
	require.NoError(t, err, "%s", msg)
	got, err := os.ReadFile(out)
	require.NoError(t, err)
	require.Equal(t, Linux, got, "linux.bin is not what build.sh makes of linux.S: run it and commit")
}
