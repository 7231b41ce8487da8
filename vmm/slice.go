package vmm

import (
	"runtime"
	"time"
)

const (
	// sliceLength is how long the loop goes on before it passes through Go's scheduler. It
	// must be shorter than the 10 ms after which the runtime's monitor takes a goroutine
	// for one that hogs its slot (forcePreemptNS).
	sliceLength = 8 * time.Millisecond
	// sliceCheck is how many entries of the guest pass between two looks at the clock.
	sliceCheck = 32
)

// slice keeps the vCPU loop in the good books of Go's scheduler.
//
// A goroutine that goes from system call to system call without ever passing through
// the scheduler is one endless time slice. Once that is 10 ms old the runtime's monitor takes the
// goroutine's slot (its P) away in every KVM_RUN that it happens to see, wakes a thread for it and
// looks again 20 µs later, for ever: about one futex call for two exits, and a quarter
// of the machine. To begin a new slice now and then costs far less than either that or holding the slot
// during KVM_RUN, which garbage collection would have to interrupt (docs/kvm.md).
type slice struct {
	entries uint
	began   time.Time
}

// enter is called before each KVM_RUN.
func (s *slice) enter() {
	if s.entries++; s.entries%sliceCheck != 0 {
		return
	}
	if now := time.Now(); now.Sub(s.began) >= sliceLength {
		runtime.Gosched()
		s.began = now
	}
}
