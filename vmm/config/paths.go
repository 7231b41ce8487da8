package config

import (
	"os"
	"path/filepath"
	"strconv"
)

// RuntimeDir is where control sockets of named guests are: $XDG_RUNTIME_DIR/ftvmm, or /run/ftvmm for
// root, or a directory of the user's own below the temporary one.
func RuntimeDir() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "ftvmm")
	}
	if os.Getuid() == 0 {
		return "/run/ftvmm"
	}
	return filepath.Join(os.TempDir(), "ftvmm-"+strconv.Itoa(os.Getuid()))
}

// ControlPath returns the control socket of the named guest. The directory may not exist yet.
func ControlPath(name string) string { return filepath.Join(RuntimeDir(), name+".sock") }
