package console

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// streamBuffer is how many bytes of output may wait for a descriptor.
const streamBuffer = 64 << 10

// chunk is the largest single read or write, in bytes. A pipe or terminal that
// poll(2) calls writable takes this much without blocking.
const chunk = 4096

// stream is a backend over file descriptors: input from one, output to another or the
// same. All waiting is in poll(2) together with an eventfd, because a read of a
// terminal cannot be interrupted otherwise, and because descriptors that the parent process
// shares with us must not be made non-blocking.
type stream struct {
	in, out  int // descriptors, -1 for none
	name     string
	patience time.Duration
	filter   func([]byte) []byte // sees input before it is delivered; may be nil
	cleanup  func() error        // after everything has ended; may be nil

	buf    *buffer
	wakeup int // eventfd; readable from the moment that everything must end

	writing sync.WaitGroup
	reading sync.WaitGroup

	mu     sync.Mutex
	cancel context.CancelFunc
	lost   uint64
	closed bool
}

// newStream starts the writer. The caller's cleanup closes the descriptors.
func newStream(s *stream) (*stream, error) {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("console: eventfd: %w", err)
	}
	s.wakeup = wake
	s.buf = newBuffer(streamBuffer)
	if s.out >= 0 {
		s.writing.Add(1)
		go s.writeLoop()
	}
	return s, nil
}

func (s *stream) Name() string { return s.name }

func (s *stream) Output(p []byte) {
	if s.out >= 0 {
		s.buf.write(p, s.patience)
	}
}

func (s *stream) Dropped() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lost + s.buf.drops()
}

// await waits until fd is ready for events, which may mean that it has an error or hung up;
// false says that the stream ends.
func (s *stream) await(fd int, events int16) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}, {Fd: int32(s.wakeup), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && fds[1].Revents == 0
	}
}

func (s *stream) writeLoop() {
	defer s.writing.Done()
	p := make([]byte, chunk)
	for {
		n := s.buf.peek(p)
		if n == 0 {
			return
		}
		if !s.await(s.out, unix.POLLOUT) {
			return
		}
		k, err := unix.Write(s.out, p[:n])
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			// A closed pipe or a full disk loses this piece; the guest goes on, and the
			// next piece is tried again.
			s.mu.Lock()
			s.lost += uint64(n)
			s.mu.Unlock()
			k = n
		}
		s.buf.discard(k)
	}
}

func (s *stream) Start(ctx context.Context, input Input) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in < 0 || s.closed {
		return
	}
	ctx, s.cancel = context.WithCancel(ctx)
	s.reading.Add(1)
	go s.readLoop(ctx, input)
}

func (s *stream) readLoop(ctx context.Context, input Input) {
	defer s.reading.Done()
	p := make([]byte, chunk)
	for s.await(s.in, unix.POLLIN) {
		n, err := unix.Read(s.in, p)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		data := p[:n]
		if s.filter != nil {
			data = s.filter(data)
		}
		if len(data) > 0 && input(ctx, data) != nil {
			return
		}
	}
}

func (s *stream) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	cancel := s.cancel
	s.mu.Unlock()

	// First what is buffered, for a bounded time, then everything ends.
	s.buf.close()
	drained := make(chan struct{})
	go func() { s.writing.Wait(); close(drained) }()
	timer := time.NewTimer(Patience)
	select {
	case <-drained:
	case <-timer.C:
	}
	timer.Stop()
	if cancel != nil {
		cancel()
	}
	var one = [8]byte{1}
	if _, err := unix.Write(s.wakeup, one[:]); err != nil {
		return fmt.Errorf("console: wake the backend: %w", err)
	}
	<-drained
	s.reading.Wait()
	err := unix.Close(s.wakeup)
	if s.cleanup != nil {
		err = errors.Join(err, s.cleanup())
	}
	return err
}
