package console

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse says that another process listens on a socket.
var ErrInUse = errors.New("another process listens on this socket")

// Listen listens on a Unix socket that only this user may connect to. A socket file that a
// dead process left is removed; one that somebody listens on is [ErrInUse]; a file
// that is no socket is left alone.
//
// Two processes that start on the same path at the same moment exclude each other by a lock on the
// directory, so that neither takes the other's new socket for a dead one.
func Listen(path string) (*net.UnixListener, error) {
	if len(path) > MaxSocketPath {
		return nil, fmt.Errorf("listen on %s: the path is %d bytes long, at most %d are possible", path, len(path), MaxSocketPath)
	}
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer unlock()
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("listen on %s: there is a file of this name that is no socket", path)
		}
		conn, err := net.DialTimeout("unix", path, time.Second)
		switch {
		case err == nil:
			conn.Close()
			return nil, fmt.Errorf("listen on %s: %w", path, ErrInUse)
		case !errors.Is(err, unix.ECONNREFUSED):
			// Not a plain "nobody is there": it may be alive and busy, or another user's.
			return nil, fmt.Errorf("listen on %s: is anybody listening? %w", path, err)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the socket of a dead process: %w", err)
		}
	}
	// The file that bind makes takes its mode from the socket's inode (unix(7) does not say so, but
	// Linux does it), so there is no moment at which others could connect.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return ln.(*net.UnixListener), nil
}

// lockDir takes an exclusive lock on a directory.
func lockDir(dir string) (unlock func(), err error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	// Whoever may read the directory may hold this lock, so it is not waited for without end.
	for try := 0; ; try++ {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { unix.Close(fd) }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || try == lockTries {
			unix.Close(fd)
			return nil, &os.PathError{Op: "lock", Path: dir, Err: err}
		}
		time.Sleep(lockWait)
	}
}

// A lock is held for as long as a bind takes; it is waited for a second.
const (
	lockTries = 100
	lockWait  = 10 * time.Millisecond
)
