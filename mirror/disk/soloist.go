package disk

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	futexWaitPrivate = 0 | 128
	futexWakePrivate = 1 | 128
)

// States of a soloist.
const (
	soloBusy   = iota // carries out a job, or is not there yet
	soloFree          // waits for one
	soloPosted        // has one to take, or is to end
)

// soloist is a worker that waits in a futex of its own, for a job at a time. It is the first to
// be asked, so requests that come one by one are all its.
//
// A goroutine that a channel wakes first stands in the queue of the scheduler slot that the waking
// one runs in. That one is the vCPU's, and goes on into the guest: another thread is woken to
// come and steal the goroutine, which it does after a polite sleep (usleep in the runtime's
// runqgrab). All of that took as long as the disk itself. Here the thread that waits is the
// one that is woken. The other workers have a channel, which is cheaper for many requests: it wakes
// one thread for several of them.
type soloist struct {
	state   atomic.Uint32 // the futex
	stopped atomic.Bool
	job     job // belongs to who made state soloPosted, then to the soloist
}

// play hands over a job if the soloist waits for one. Calls must not overlap.
func (s *soloist) play(j job) bool {
	if s.state.Load() != soloFree {
		return false
	}
	s.job = j
	s.post()
	return true
}

// stop ends the soloist after the job that it has. There is no play afterwards.
func (s *soloist) stop() {
	s.stopped.Store(true)
	if s.state.Load() == soloFree { // else it looks at stopped before it waits
		s.post()
	}
}

func (s *soloist) post() {
	s.state.Store(soloPosted)
	_, _, _ = unix.Syscall(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&s.state)), futexWakePrivate, 1)
}

// next waits for a job; ok is false at the end.
func (s *soloist) next() (j job, ok bool) {
	s.state.Store(soloFree)
	for s.state.Load() == soloFree && !s.stopped.Load() {
		// Any return, also EINTR and EAGAIN, only means to look again.
		_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&s.state)), futexWaitPrivate, soloFree, 0, 0, 0)
	}
	if s.state.Load() == soloFree {
		return job{}, false // stopped
	}
	j, s.job = s.job, job{}
	s.state.Store(soloBusy)
	return j, j.r != nil
}
