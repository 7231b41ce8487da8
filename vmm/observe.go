package vmm

import "github.com/ftvmm/ftvmm/vmm/kvm"

// ExitKind says what a synchronous exit was.
type ExitKind uint8

// The kinds of synchronous exit.
const (
	KindIn ExitKind = iota + 1
	KindOut
	KindMMIORead
	KindMMIOWrite
	KindHLT
	KindRDMSR
	KindWRMSR
	KindSetTPR
	KindShutdown
	KindEmulated // an instruction that KVM could not emulate and this program did
)

// ExitRecord is what one synchronous exit (or one item of a string instruction) was about:
// the same on every replay of the guest.
type ExitRecord struct {
	Pos  Position
	Kind ExitKind
	Addr uint64 // port, guest-physical address or MSR
	Size int    // bytes
	Data uint64 // what was written, or read
	// Regs are the general registers at the exit, of a machine whose Config.Observe is set.
	// KVM has not yet stored the result of a read.
	Regs *kvm.Regs
}

func (m *Machine) observe(r ExitRecord) {
	if m.cfg.Observe != nil {
		r.Pos, r.Regs = m.pos, &m.run.Sync.Regs
		m.record = r // a pointer to r itself would put every record on the heap
		m.cfg.Observe(&m.record)
	}
}
