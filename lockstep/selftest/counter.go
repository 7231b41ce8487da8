package selftest

import (
	"context"
	"fmt"

	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// tscControl tells whether the guest's time stamp counter can be stopped and set.
func tscControl(_ context.Context, e *Env) Row {
	device := e.KVM
	if device == "" {
		device = vmm.DefaultKVM
	}
	s, err := kvm.Open(device)
	if err != nil {
		return broken("tsc-unknown", err, "whether a guest's time stamp counter can be frozen is not known")
	}
	defer s.Close()
	if s.Check(kvm.CapTSCControl) == 0 {
		return Row{
			State: Warning, Code: "tsc-native", Value: "native",
			Found:   "the kernel does not scale a guest's time stamp counter (KVM_CAP_TSC_CONTROL is absent)",
			Meaning: "a guest that executes RDTSC sees this processor's counter and may diverge; its outputs wait for the backup's own digest",
			Remedy:  "have the guest use another clock (ACPI PM timer, PIT, the hypervisor's by MSR), or take a host whose processor scales the counter",
		}
	}
	return Row{
		State: Good, Code: "tsc-scaled", Value: "scaled", Found: "the kernel scales a guest's time stamp counter",
		Meaning: "the counter of a guest that executes RDTSC can be frozen between exits",
	}
}

// counter tells which counter names stops between two exits, and has the guests run with it.
func counter(_ context.Context, e *Env) Row {
	kind, err := vmm.ProbeCounter(e.KVM)
	if err != nil {
		return broken("counter-unknown", err, "whether this host can name stops between two exits is not known")
	}
	e.counter = kind
	if kind == vmm.CounterNone {
		return Row{
			State: Warning, Code: "counter-none", Value: string(kind),
			Found:   "nothing on this host counts what a guest does between two exits exactly",
			Meaning: "inputs reach a guest at its next exit; where none comes for long, by a cut; outputs wait until the backup has executed up to them",
			Remedy:  "give the host a performance monitoring unit that counts guests, see docs/kvm.md",
		}
	}
	return Row{
		State: Good, Code: "counter-" + string(kind), Value: string(kind),
		Found:   fmt.Sprintf("the counter %q counts a loop of known length exactly", kind),
		Meaning: "inputs reach a guest between two exits, too, where the counter can name the place",
	}
}
