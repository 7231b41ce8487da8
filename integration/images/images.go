// Package images makes disks with boot programs that nobody here wrote, from what the host has
// installed of them.
package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

const (
	// grubFolder is where Debian's grub-pc-bin puts GRUB for BIOS machines.
	grubFolder = "/usr/lib/grub/i386-pc"
	// cylinder is the size that the image is rounded up to, in bytes: SeaBIOS boots from no
	// disk that is smaller than one cylinder.
	cylinder = 2 << 20
)

// ErrMissing is in the error of a function that did not find the program on this host.
var ErrMissing = errors.New("not installed")

// SerialPrompt is a configuration that ends at GRUB's prompt on the first serial port.
const SerialPrompt = `serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
`

// GRUB returns a raw disk from which a BIOS boots GRUB, which carries out the commands in config;
// modules are those of GRUB's modules that the commands need, and the disk's driver. There is
// no file system: GRUB is where the boot sector looks for it, in the sectors that follow.
func GRUB(ctx context.Context, config string, modules ...string) ([]byte, error) {
	boot, err := os.ReadFile(filepath.Join(grubFolder, "boot.img"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("images: GRUB for BIOS (grub-pc-bin): %w", ErrMissing)
	}
	if err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	tool, err := exec.LookPath("grub-mkimage")
	if err != nil {
		return nil, fmt.Errorf("images: grub-mkimage (grub-common): %w", ErrMissing)
	}
	dir, err := os.MkdirTemp("", "grub-")
	if err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	defer os.RemoveAll(dir)
	early := filepath.Join(dir, "early.cfg")
	if err := os.WriteFile(early, []byte(config), 0o600); err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	args := []string{"-O", "i386-pc", "-o", filepath.Join(dir, "core.img"), "-p", "(hd0)/boot/grub", "-c", early}
	if out, err := exec.CommandContext(ctx, tool, append(args, modules...)...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("images: %s: %w\n%s", tool, err, out)
	}
	core, err := os.ReadFile(filepath.Join(dir, "core.img"))
	if err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	// As they are made, boot.img goes on at the second sector of the disk, and core.img expects
	// its own rest from the third on.
	disk := append(boot, core...)
	return append(disk, make([]byte, cylinder-len(disk)%cylinder)...), nil
}
