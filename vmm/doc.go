// Package vmm is the machine: one guest under KVM, and the loop that owns it.
//
// # The loop
//
// One goroutine, locked to its thread, runs the vCPU and is the only writer of
// guest-visible state: registers, device state, guest memory. It writes only while the
// vCPU is stopped. At every stop it does the same things in the same order
// (docs/determinism.md): take the inputs for this [Position] from the [InputSource],
// apply them to the devices, carry out the guest's own access, and deliver an interrupt if one
// is due. All interrupt controllers and timers are this package's and devices', in user
// space; the kernel's irqchip, PIT and kvmclock are not used.
//
// # Inputs and outputs
//
// Everything that enters the guest from outside is an [Input]: a sample of time, a
// received frame, the completion of a disk request, console bytes, the power button. The machine
// asks an [InputSource] for them and hands what leaves to an [OutputSink]. An ordinary
// guest runs on a [Live] source, which is both and connects the guest to real disks, networks
// and clocks; a recorder wraps one; a replayer reads a log instead. Devices know of none of this.
//
// # Embedding
//
// [New] makes a machine from a [Config], [Machine.Run] runs it to its end; the other
// methods may be called from any goroutine meanwhile. There is no global state: a process may
// hold several machines.
package vmm
