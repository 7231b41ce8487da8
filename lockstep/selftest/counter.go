package selftest

import (
	"context"
	"fmt"
	"strings"

	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// tscControl tells whether the guest's time stamp counter can be slowed down to a halt and set.
func tscControl(_ context.Context, e *Env) Row {
	p, err := newProbe(e.KVM, []byte{0xf4}, probeOptions{})
	if err != nil {
		return broken("tsc-unknown", err, "whether a guest's time stamp counter can be frozen is not known")
	}
	defer p.close()
	native := Row{
		State: Warning, Code: "tsc-native", Value: "native",
		Meaning: "a guest that executes RDTSC sees this processor's counter and may diverge; its outputs wait for the backup's own digest",
		Remedy:  "have the guest use another clock (ACPI PM timer, PIT, the hypervisor's by MSR), or take a host whose processor scales the counter",
	}
	if p.sys.Check(kvm.CapTSCControl) == 0 {
		native.Found = "the kernel does not scale a guest's time stamp counter (KVM_CAP_TSC_CONTROL is absent)"
		return native
	}
	const slowest = 1 // kHz
	if err := p.vcpu.SetTSCKHz(slowest); err != nil {
		native.Found = err.Error()
		return native
	}
	switch rate, err := p.vcpu.TSCKHz(); {
	case err != nil:
		native.Found = err.Error()
	case rate != slowest:
		native.Found = fmt.Sprintf("a guest's time stamp counter at %d kHz runs at %d kHz", slowest, rate)
	case !p.vcpu.HasTSCOffset():
		native.Found, native.Remedy = "the kernel does not let a guest's time stamp counter be set (KVM_VCPU_TSC_OFFSET is absent)", "Linux 5.16 and later have it"
	default:
		return Row{
			State: Good, Code: "tsc-scaled", Value: "scaled", Found: fmt.Sprintf("a guest's time stamp counter runs at %d kHz if asked to, and can be set", slowest),
			Meaning: "the counter of a guest that executes RDTSC can be frozen between exits",
		}
	}
	return native
}

// counter tells which counter names stops between two exits, and has the guests run with it.
func counter(_ context.Context, e *Env) Row {
	e.counter = vmm.CounterNone
	var why []string
	var chosen *vmm.CounterReport
	for _, r := range vmm.Counters(e.KVM) {
		switch {
		case !r.Available:
			why = append(why, fmt.Sprintf("%s: %s", r.Kind, r.Reason))
		case chosen == nil:
			chosen = &r
		}
	}
	if chosen == nil {
		return Row{
			State: Warning, Code: "counter-none", Value: string(vmm.CounterNone), Found: strings.Join(why, "; "),
			Meaning: "inputs reach a guest at its next exit; where none comes for long, by a cut; outputs wait until the backup has executed up to them",
			Remedy:  "mend what one of the counters lacks, see docs/kvm.md",
		}
	}
	e.counter = chosen.Kind
	row := Row{
		State: Good, Code: "counter-" + string(chosen.Kind), Value: string(chosen.Kind),
		Found:   fmt.Sprintf("%s: %s", chosen.Kind, strings.Join(append([]string{chosen.Reason}, why...), "; ")),
		Meaning: "inputs reach a guest between two exits, too",
	}
	if chosen.Kind == vmm.CounterEmulated {
		row.Meaning += ", while it runs kernel code; user code is not counted"
	}
	return row
}
