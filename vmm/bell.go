package vmm

import (
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// Bell gets the attention of the vCPU loop: it makes a running vCPU stop and a halted one
// look again. Ring may be called from any goroutine, and is cheap while it has not been
// answered.
type Bell struct {
	// rung is 1 from Ring until the loop answers. It is also the futex that a halted loop
	// sleeps on.
	rung atomic.Uint32
	// where says what the loop is doing, so that Ring knows how to reach it.
	where atomic.Uint32
	run   *kvm.Run
	pid   int
	tid   atomic.Int32
}

const (
	awake   = iota // the loop will look at rung before it enters or sleeps
	inGuest        // in KVM_RUN, or about to be
	asleep         // in a futex wait, or about to be
)

// kickSignal interrupts KVM_RUN. The Go runtime uses SIGURG to preempt goroutines and
// ignores one that it has not asked for, so no handler is needed.
const kickSignal = unix.SIGURG

// Ring asks the loop to look for inputs and commands.
func (b *Bell) Ring() {
	if b.rung.Swap(1) != 0 {
		return
	}
	switch b.where.Load() {
	case inGuest:
		// The flag catches a loop that has not reached the kernel yet, the signal one that is
		// in the guest.
		b.run.SetImmediateExit(true)
		_ = unix.Tgkill(b.pid, int(b.tid.Load()), kickSignal)
	case asleep:
		_, _, _ = unix.Syscall(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&b.rung)), futexWakePrivate, 1)
	}
}

// Rung says whether the bell has rung and was not answered yet.
func (b *Bell) Rung() bool { return b.rung.Load() != 0 }

// Answer clears the bell and says whether it had rung, for a source that keeps the loop waiting in one of its methods.
func (b *Bell) Answer() bool { return b.answer() }

// answer clears the bell; the loop then looks at everything that may have rung it.
func (b *Bell) answer() bool { return b.rung.Load() != 0 && b.rung.Swap(0) != 0 }

// enter is called before KVM_RUN. If it returns false the bell has rung: do not enter.
func (b *Bell) enter() bool {
	b.where.Store(inGuest)
	if b.rung.Load() != 0 {
		b.where.Store(awake)
		return false
	}
	return true
}

// left is called after KVM_RUN.
func (b *Bell) left() { b.where.Store(awake) }

const (
	futexPrivate     = 128
	futexWaitPrivate = 0 | futexPrivate
	futexWakePrivate = 1 | futexPrivate
)

// Sleep waits until the bell rings or for d, for ever if d is negative. It is the vCPU
// loop's wait in a HLT.
func (b *Bell) Sleep(d time.Duration) {
	if d == 0 {
		return
	}
	b.where.Store(asleep)
	defer b.where.Store(awake)
	if b.rung.Load() != 0 {
		return
	}
	var ts *unix.Timespec
	if d > 0 {
		t := unix.NsecToTimespec(int64(d))
		ts = &t
	}
	// Any return, also EINTR and EAGAIN, only makes the caller look again.
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&b.rung)), futexWaitPrivate, 0,
		uintptr(unsafe.Pointer(ts)), 0, 0)
}
