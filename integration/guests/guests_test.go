package guests

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"hash/fnv"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestImagesArePVHKernels(t *testing.T) {
	require.Contains(t, Names(), "hello.elf")
	require.NotContains(t, Names(), compilerFile)
	for _, name := range Names() {
		image, err := Image(name)
		require.NoError(t, err)
		if filepath.Ext(name) != ".elf" || name == "hello-mb.elf" {
			continue
		}
		f, err := elf.NewFile(bytes.NewReader(image))
		require.NoError(t, err, name)
		require.Equal(t, elf.ELFCLASS64, f.Class, name)
		require.EqualValues(t, 0x100000, f.Entry, name)
		note := f.Section(".note.pvh")
		require.NotNil(t, note, name)
		data, err := note.Data()
		require.NoError(t, err, name)
		// namesz, descsz, XEN_ELFNOTE_PHYS32_ENTRY, "Xen", the entry point.
		require.EqualValues(t, 18, binary.LittleEndian.Uint32(data[8:]), name)
		require.Equal(t, "Xen\x00", string(data[12:16]), name)
		require.Equal(t, f.Entry, binary.LittleEndian.Uint64(data[16:]), name)
	}
}

func TestImageByName(t *testing.T) {
	short, err := Image("hello")
	require.NoError(t, err)
	long, err := Image("hello.elf")
	require.NoError(t, err)
	require.Equal(t, short, long)
	for _, name := range []string{"nothing", "../guests.go", compilerFile, ""} {
		_, err := Image(name)
		require.Error(t, err, name)
	}
}

func TestImageBelongsToTheCaller(t *testing.T) {
	a, err := Image("first.bin")
	require.NoError(t, err)
	a[0]++
	b, err := Image("first.bin")
	require.NoError(t, err)
	require.NotEqual(t, a, b)
}

func TestBootSector(t *testing.T) {
	b, err := BootSector(BootRead{First: 0x0102030405, Stride: 0x11121314, Blocks: 0x2122, Sectors: 3, Sum: true})
	require.NoError(t, err)
	require.Len(t, b, SectorSize)
	require.Equal(t, []byte{5, 4, 3, 2, 1, 0, 0, 0, 0x14, 0x13, 0x12, 0x11, 0x22, 0x21, 3, 1}, b[bootParams:bootParams+16])
	require.Equal(t, []byte{0x55, 0xaa}, b[510:])
	for _, n := range []uint8{0, 65} {
		_, err = BootSector(BootRead{Sectors: n})
		require.Error(t, err)
	}
}

// TestImagesAreWhatTheSourcesSay builds all guests again and compares them byte for byte.
func TestImagesAreWhatTheSourcesSay(t *testing.T) {
	for _, tool := range []string{"gcc", "ld", "ar", "objcopy", "strip"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("the test guests cannot be built again to compare them: no %s (apt-get install gcc binutils)", tool)
		}
	}
	out := t.TempDir()
	log, err := exec.Command("./build", out).CombinedOutput()
	require.NoError(t, err, "%s", log)
	want, err := bin.ReadFile("bin/" + compilerFile)
	require.NoError(t, err)
	got, err := os.ReadFile(filepath.Join(out, compilerFile))
	require.NoError(t, err)
	if !bytes.Equal(want, got) {
		t.Skipf("the guests build, but the committed images are from\n%s\nand this host has\n%s", want, got)
	}
	var built []string
	entries, err := os.ReadDir(out)
	require.NoError(t, err)
	for _, e := range entries {
		if e.Name() == compilerFile {
			continue
		}
		built = append(built, e.Name())
		image, err := Image(e.Name())
		require.NoError(t, err, "built, but not committed: run ./build")
		fresh, err := os.ReadFile(filepath.Join(out, e.Name()))
		require.NoError(t, err)
		require.True(t, bytes.Equal(fresh, image), "%s differs from what its sources give: run ./build", e.Name())
	}
	require.Equal(t, built, Names(), "an image without sources")
}

// computeSums does what compute/main.c does.
func computeSums(pages, rounds uint64) (sum, memory uint64) {
	words := make([]uint64, pages*512)
	carry := uint64(1)
	for round := uint64(1); round <= rounds; round++ {
		for i := range words {
			x := words[i] ^ carry ^ (round<<32 | uint64(i))
			x ^= x >> 29
			x *= 0xbf58476d1ce4e5b9
			carry = x ^ x>>32
			words[i] = carry
			sum += carry
		}
	}
	h := fnv.New64a()
	for _, w := range words[:min(len(words), 1<<17)] {
		h.Write(binary.LittleEndian.AppendUint64(nil, w))
	}
	return sum, h.Sum64()
}

// claims drops the remarks, which may differ from run to run.
func claims(transcript string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.ReplaceAll(transcript, "\r", "")) {
		if !strings.HasPrefix(line, "# ") {
			b.WriteString(line)
		}
	}
	return b.String()
}
