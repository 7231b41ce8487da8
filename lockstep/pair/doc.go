// Package pair runs one side of a guest that lives on two hosts: it joins the machine (package vmm), the
// recorder's and replayer's halves of lockstep, the protocol's state machine (package protocol) and the link.
//
// Three threads of control meet here, each with its own part of the state:
//
//   - The vCPU loop calls the [world], which stands between the machine and its live source. On the live side it
//     logs what reaches the guest and keeps the digest; on the other it is what reaches the guest, from
//     the log. It never waits for the link or for the protocol but where the guest must stand: it leaves what it has to say
//     in a ring of events, in order.
//   - The shell's goroutine owns the [protocol.Node]. It takes the events, the peer's messages, the arbiter's answers and the
//     ticks, one after the other, and carries out what the node lists.
//   - A worker carries out what takes long (hashing memory, copying disks), one thing at a time, and gives
//     the result back to the shell.
//
// The shell reaches the vCPU loop in two ways. A live guest is stopped by [vmm.Machine.Go], which runs a function at any stop,
// with the last exit complete. A guest that follows stands in a method of the world while it waits for log; there the world runs
// orders. Both keep their order.
//
// docs/lockstep.md explains what a user sees, docs/protocol.md what the two sides say to each other.
package pair
