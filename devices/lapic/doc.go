// Package lapic is the local APIC of each virtual processor and the message bus
// between them: xAPIC by memory-mapped registers, x2APIC by MSRs.
//
//   - An [APIC] belongs to one vCPU. The vCPU loop asks Pending at each stop, injects,
//     and says so with Acknowledge. Everything else that an APIC may do to a processor
//     (NMI, INIT, start-up) goes through [System].
//   - The [Bus] carries interrupt messages: from one APIC to others (IPIs), from the I/O
//     APIC (Deliver) and from PCI functions (Send). It visits APICs in order of their
//     identifiers, and the arbitration for the lowest priority is won by the lowest
//     identifier among the lowest priorities, so that delivery is a function of state.
//   - The timer is a deadline on the virtual clock. Its count is computed when it is
//     read, from a fixed bus clock of 1 GHz; only accesses that need the present time
//     say so (NeedsTime).
//
// LINT0 is the 8259s' output. After a reset the bootstrap processor's LINT0 accepts
// it (ExtINT), as firmware would set it up and as KVM and QEMU have it: a guest that
// knows only the 8259 need not know the APIC. Polarity bits are stored and mean
// nothing: a [devices.Line] is asserted or not.
//
// References: Intel SDM volume 3, chapter 11 ("Advanced Programmable Interrupt
// Controller"; older editions: 10).
//
// Not offered: moving the register page, TSC-deadline mode, suppressing EOI
// broadcasts, CMCI, SMIs.
package lapic
