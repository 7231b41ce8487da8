package console

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// IsTerminal tells whether a descriptor is a terminal.
func IsTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// foreground tells whether this process may read the terminal fd: a job in the
// background that reads it or changes its mode is stopped by the kernel.
func foreground(fd int) bool {
	pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && pgrp == unix.Getpgrp()
}

// MakeRaw puts the terminal fd into raw mode: every key reaches the reader at once and as it is,
// Ctrl-C included. Output processing stays on, because messages of ftvmm itself share the
// screen with the guest. restore brings the old mode back; it may be called more than
// once and from any goroutine.
func MakeRaw(fd int) (restore func() error, err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("console: read the terminal's mode: %w", err)
	}
	raw := *old
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag &^= unix.CSIZE | unix.PARENB
	raw.Cflag |= unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("console: set the terminal to raw mode: %w", err)
	}
	return sync.OnceValue(func() error {
		if err := unix.IoctlSetTermios(fd, unix.TCSETSW, old); err != nil {
			return fmt.Errorf("console: restore the terminal's mode: %w", err)
		}
		return nil
	}), nil
}
