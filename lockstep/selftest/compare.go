package selftest

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// resumeFlag is RFLAGS.RF, the one bit that may differ between equal runs (docs/kvm.md).
const resumeFlag = 1 << 16

// compareMemory returns the first byte in which the memories of two machines that have ended differ.
func compareMemory(first, second *vmm.Machine, count *Count) *Divergence {
	a, b := first.Memory().Regions(), second.Memory().Regions()
	count.Memory = 0
	for i := range a {
		x, y := a[i].Bytes, b[i].Bytes
		count.Memory += uint64(len(x))
		if bytes.Equal(x, y) {
			continue
		}
		at, pages := -1, 0
		for p := 0; p < len(x); p += memory.PageSize {
			if bytes.Equal(x[p:p+memory.PageSize], y[p:p+memory.PageSize]) {
				continue
			}
			if pages++; at >= 0 {
				continue
			}
			for at = p; x[at] == y[at]; at++ {
			}
		}
		return &Divergence{
			What:  fmt.Sprintf("memory at %#x when the guest had ended, in %d pages in all", a[i].Base+uint64(at), pages),
			First: fmt.Sprintf("%#02x", x[at]), Second: fmt.Sprintf("%#02x", y[at]),
		}
	}
	return nil
}

// compareState returns the first difference between the vCPUs and devices of two machines that have ended.
func compareState(first, second *vmm.Machine, count *Count) (*Divergence, error) {
	a, err := first.State()
	if err != nil {
		return nil, err
	}
	b, err := second.State()
	if err != nil {
		return nil, err
	}
	x, y := a.CPU, b.CPU
	x.Regs.RFLAGS &^= resumeFlag
	y.Regs.RFLAGS &^= resumeFlag
	// What the last return of KVM_RUN said about interrupts: not the guest's state, and a kick changes it.
	x.Ready, y.Ready = 0, 0
	xv, yv := reflect.ValueOf(x), reflect.ValueOf(y)
	for i := range xv.NumField() {
		if p, q := xv.Field(i).Interface(), yv.Field(i).Interface(); !reflect.DeepEqual(p, q) {
			return &Divergence{
				What:  "the vCPU's " + xv.Type().Field(i).Name + " when the guest had ended",
				First: fmt.Sprintf("%+v", p), Second: fmt.Sprintf("%+v", q),
			}, nil
		}
	}
	count.Components = len(a.Components)
	for i := range a.Components {
		p, q := &a.Components[i], &b.Components[i]
		if bytes.Equal(p.Data, q.Data) {
			continue
		}
		d := &Divergence{What: "the state of the device " + p.Name + " when the guest had ended"}
		if d.First, err = cbor.Diagnose(p.Data); err != nil {
			return nil, err
		}
		if d.Second, err = cbor.Diagnose(q.Data); err != nil {
			return nil, err
		}
		return d, nil
	}
	return nil, nil
}

// maxShort bounds each side of a difference in a table, in bytes.
const maxShort = 120

// shorten puts both sides of a difference on one line: of two lists of words, the first words and those
// that differ.
func shorten(first, second string) string {
	a, b := strings.Fields(first), strings.Fields(second)
	if len(a) == len(b) && len(a) > 4 {
		var x, y []string
		for i := range a {
			if i < 2 || a[i] != b[i] {
				x, y = append(x, a[i]), append(y, b[i])
			}
		}
		a, b = x, y
	}
	return cut(strings.Join(a, " ")) + " | " + cut(strings.Join(b, " "))
}

func cut(s string) string {
	if len(s) > maxShort {
		return s[:maxShort] + "…"
	}
	return s
}
