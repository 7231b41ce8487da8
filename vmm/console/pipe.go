package console

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func deadline() time.Time { return time.Now().Add(Patience) }

// Pipe connects a session with the network connection it was attached for, closes both when one of them ends, and
// returns when nothing of it runs any more. early is what was received already. A peer that
// closes only its sending side goes on receiving, and another session may type from then on.
func Pipe(s *Session, conn net.Conn, early []byte) {
	received := make(chan struct{})
	go func() {
		defer close(received)
		// Input to a session that may not type is read and forgotten: its end still matters.
		_, _ = s.Write(early)
		p := make([]byte, chunk)
		for {
			n, err := conn.Read(p)
			if n > 0 {
				_, _ = s.Write(p[:n])
			}
			if err != nil {
				break
			}
		}
		s.stopTyping()
		if hungUp(conn) {
			s.Close()
		}
	}()
	p := make([]byte, chunk)
	for {
		n, err := s.Read(p)
		if err != nil {
			break
		}
		if _, err := conn.Write(p[:n]); err != nil {
			break
		}
	}
	s.Close()
	conn.Close()
	<-received
}

// hungUp tells whether the peer of a Unix socket has closed it, without reading from it. Of a
// connection of another sort it says no: its end shows when it is written to.
func hungUp(conn net.Conn) bool {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n == 1 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}
