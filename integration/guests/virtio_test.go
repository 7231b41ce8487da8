package guests

import (
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// diskSize is that of the disks for the guest blk, of which it uses the first half.
const diskSize = 16 << 20

func emptyDisk(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, os.Truncate(path, size))
	return path
}

// diskArgs attaches a disk to QEMU.
func diskArgs(path, drive, device string) []string {
	return []string{"-drive", "if=none,id=d,format=raw,cache=writeback,file=" + path + drive,
		"-device", "virtio-blk-pci,drive=d" + device}
}

var digestLine = regexp.MustCompile(`(?m)^digest: ([0-9a-f]{16}) of (\d+) sectors$`)

// TestDiskVerifies drives a disk in every way that the guest driver knows; what the guest
// read back last is what the image holds.
func TestDiskVerifies(t *testing.T) {
	for _, words := range []string{
		"", "irq=intx", "irq=poll", "event_idx=0", "indirect=0 seed=2",
		"legacy=1", "legacy=1 irq=intx indirect=0", "legacy=1 irq=poll event_idx=0",
	} {
		t.Run("words "+words, func(t *testing.T) {
			t.Parallel()
			path := emptyDisk(t, diskSize)
			q := newQEMU(t, tcg, diskArgs(path, ",discard=unmap", ",serial=abc")...)
			out, code := q.run(t, "-kernel", kernel(t, "blk"), "-append", "mode=verify n=60 serial=abc "+words)
			require.Equal(t, 1, code, "%s", out)
			require.NotContains(t, out, "FAIL")
			found := digestLine.FindStringSubmatch(out)
			require.NotNil(t, found, "%s", out)
			content, err := os.ReadFile(path)
			require.NoError(t, err)
			h := fnv.New64a()
			h.Write(content[:diskSize/2])
			require.Equal(t, fmt.Sprintf("%016x", h.Sum64()), found[1], "digest of the image")
			require.Equal(t, fmt.Sprint(diskSize/2/SectorSize), found[2])
		})
	}
}

func TestDiskReadOnly(t *testing.T) {
	path := emptyDisk(t, diskSize)
	q := newQEMU(t, tcg, diskArgs(path, ",readonly=on", "")...)
	out, code := q.run(t, "-kernel", kernel(t, "blk"), "-append", "mode=verify")
	require.Equal(t, 1, code, "%s", out)
	require.Contains(t, out, "ok write-refused")
	require.Contains(t, out, "ok unchanged")
}

// TestDiskHostile shows that the hostile driver's cases are refused by a second
// implementation, and that what they are allowed to do is not everything.
func TestDiskHostile(t *testing.T) {
	for _, words := range []string{"", "indirect=0", "legacy=1"} {
		t.Run("words "+words, func(t *testing.T) {
			t.Parallel()
			q := newQEMU(t, tcg, diskArgs(emptyDisk(t, diskSize), "", "")...)
			out, code := q.run(t, "-kernel", kernel(t, "blk"), "-append", "mode=hostile "+words)
			require.Equal(t, 1, code, "%s", out)
			require.Contains(t, out, "ok descriptor-loop")
			if words == "" {
				require.Contains(t, out, "# index-runs-away: needs reset")
				require.Contains(t, out, "ok table-loop")
			}
		})
	}
}

func TestDiskBench(t *testing.T) {
	for _, words := range []string{"op=read qd=1", "op=write qd=32 bs=8192"} {
		t.Run(words, func(t *testing.T) {
			t.Parallel()
			q := newQEMU(t, tcg, diskArgs(emptyDisk(t, diskSize), "", "")...)
			out, code := q.run(t, "-kernel", kernel(t, "blk"), "-append", "mode=bench n=500 "+words)
			require.Equal(t, 1, code, "%s", out)
			require.Contains(t, out, "ops=500\n")
			require.Contains(t, out, "ok bench 0 requests failed")
			require.Regexp(t, `(?m)^# bench us=[1-9]\d* kicks=[1-9]`, out)
		})
	}
}

// TestDiskMissing shows that a guest without its device fails instead of claiming nothing.
func TestDiskMissing(t *testing.T) {
	for _, name := range []string{"blk", "net", "ledgerd"} {
		out, code := newQEMU(t, tcg).run(t, "-kernel", kernel(t, name))
		require.Equal(t, 3, code, "%s", out)
		require.True(t, strings.HasPrefix(out, "FAIL "), "%s", out)
	}
}
