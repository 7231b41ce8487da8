// Package devices holds what every emulated device shares: the buses that decode
// accesses, the interrupt lines, and the virtual clock.
//
// A device is a pure state machine, one package each below this one. It is driven
// from the vCPU loop alone, by four kinds of call: an access of the guest
// ([Handler]), an input from outside (a received frame, a disk completion, console
// bytes: methods of the device), a timer of the [Clock] that fell due, and save or
// restore of its State. It has no goroutine, lock, socket, randomness or clock of
// its own, and does not range over maps: two machines that make the same calls in
// the same order are in the same state, which is what a lockstep twin relies on
// (docs/determinism.md; the linter enforces it).
//
// Conventions that all devices keep:
//
//   - New(...) returns the device in its power-on state, wired to its lines, timers
//     and backend interfaces; Reset() is the same state reached again.
//   - State is a plain exported struct, with exported fields of fixed-size types,
//     slices and structs, that holds everything of the device that a guest could ever
//     notice. Save() State copies it out; Restore(State) error checks every field that
//     code later trusts (an index, a length, an enum) and refuses, leaving the device
//     as it was. Restore does not drive interrupt lines and does not arm timers: the
//     levels of lines and the deadlines of timers are restored by their owners.
//   - A guest's address, length, index or value is never trusted. A bad one has the
//     effect that the data sheet or specification names, or none.
//   - Accesses that nothing decodes read as all ones and write to nowhere.
package devices
