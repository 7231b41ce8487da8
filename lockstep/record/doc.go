// Package record records a guest's run and plays it again: two halves of one thing.
//
// A [Recorder] stands between a machine and its live world. Whatever comes in it writes to a log
// (package log), with the position at which the guest got it: inputs at synchronous exits and in the
// waits of a HLT, readings of the clock, and, on hosts with a counter, inputs at asynchronous stops, which it
// makes when something has waited for [Patience] and no exit came. A [Replayer] is the world of another
// machine, made from the log: it has every input ready at its position, and nothing else ever
// happens. Equal machines that get equal inputs at equal positions do the same; both sides fold
// all that the guest does into a digest, so that the replayer sees it at once if they do not.
//
// Neither knows how the other end of the log is connected. Offline it is a file.
package record

import (
	"fmt"

	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// tracker follows a guest from exit to exit and keeps its digest. An exit is over when something
// belongs to a later one.
type tracker struct {
	digest.Digest
	exit uint64
	over func(exit uint64) // an exit is over; the digest is the one at its end
}

// enter is called first for all that happens at an exit.
func (t *tracker) enter(exit uint64) {
	for t.exit < exit {
		t.over(t.exit)
		t.exit++
	}
}

// describe says what an exit was about.
func describe(r *vmm.ExitRecord, regs *kvm.Regs) string {
	what := "exit"
	if int(r.Kind) < len(kinds) && kinds[r.Kind] != "" {
		what = kinds[r.Kind]
	}
	s := fmt.Sprintf("%s addr=%#x size=%d data=%#x", what, r.Addr, r.Size, r.Data)
	if regs != nil {
		s += fmt.Sprintf(" rip=%#x rflags=%#x rax=%#x rbx=%#x rcx=%#x rdx=%#x rsi=%#x rdi=%#x rsp=%#x rbp=%#x r8=%#x r9=%#x r10=%#x r11=%#x r12=%#x r13=%#x r14=%#x r15=%#x",
			regs.RIP, regs.RFLAGS&^resumeFlag, regs.RAX, regs.RBX, regs.RCX, regs.RDX, regs.RSI, regs.RDI, regs.RSP, regs.RBP,
			regs.R8, regs.R9, regs.R10, regs.R11, regs.R12, regs.R13, regs.R14, regs.R15)
	}
	return s
}

// resumeFlag is RFLAGS.RF, which may differ between equal runs.
const resumeFlag = 1 << 16

var kinds = [...]string{
	vmm.KindIn: "IN", vmm.KindOut: "OUT", vmm.KindMMIORead: "MMIO read", vmm.KindMMIOWrite: "MMIO write", vmm.KindHLT: "HLT",
	vmm.KindRDMSR: "RDMSR", vmm.KindWRMSR: "WRMSR", vmm.KindSetTPR: "TPR", vmm.KindShutdown: "shutdown", vmm.KindEmulated: "emulated instruction",
}
