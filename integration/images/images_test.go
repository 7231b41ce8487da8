package images

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// grub makes the image that the tests below look at.
func grub(t *testing.T, config string, modules ...string) ([]byte, error) {
	t.Helper()
	disk, err := GRUB(t.Context(), config, modules...)
	if errors.Is(err, ErrMissing) {
		t.Skip(err)
	}
	return disk, err
}

func TestGRUBIsABootableDisk(t *testing.T) {
	disk, err := grub(t, SerialPrompt, "biosdisk", "serial", "terminal")
	require.NoError(t, err)
	require.Zero(t, len(disk)%cylinder)
	boot, err := os.ReadFile(filepath.Join(grubFolder, "boot.img"))
	require.NoError(t, err)
	require.Equal(t, boot, disk[:512])
	require.Equal(t, []byte{0x55, 0xaa}, disk[510:512], "boot signature")
	// The list of sectors at the end of core.img's first one: it goes on at sector 2.
	require.Equal(t, []byte{2, 0, 0, 0, 0, 0, 0, 0}, disk[1024-12:1024-4])
}

func TestGRUBNamesAModuleThatIsNotThere(t *testing.T) {
	_, err := grub(t, "", "no-such-module")
	require.ErrorContains(t, err, "no-such-module")
}
