package pair

import (
	"fmt"
	"sync"

	"github.com/ftvmm/ftvmm/lockstep/digest"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// keepExits is how many exits each side remembers, to show when the sides differ.
const keepExits = 32

// recent remembers the last exits.
type recent struct {
	mu   sync.Mutex
	n    int
	ring [keepExits]struct {
		rec  vmm.ExitRecord
		regs kvm.Regs
		sum  digest.Sum
	}
}

func (r *recent) add(e *vmm.ExitRecord, s digest.Sum) {
	r.mu.Lock()
	x := &r.ring[r.n%keepExits]
	x.rec, x.regs, x.sum = *e, *e.Regs, s
	r.n++
	r.mu.Unlock()
}

// list describes the exits that are remembered, the oldest first.
func (r *recent) list() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := max(0, r.n-keepExits); i < r.n; i++ {
		x := &r.ring[i%keepExits]
		out = append(out, fmt.Sprintf("%v digest %.8s kind %d addr %#x size %d data %#x regs %x", x.rec.Pos, x.sum, x.rec.Kind, x.rec.Addr, x.rec.Size, x.rec.Data, x.regs))
	}
	return out
}
