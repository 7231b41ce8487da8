// Package sim drives both sides of a pair, the link between them, the arbiter and clients through
// random histories that a seed determines, and checks the protocol's invariants at every step.
//
// What is real is package protocol, twice. Everything around it is a model: a guest that is a small
// deterministic machine with memory, a ledger, disk writes and outputs; disks that outlive
// crashes; a link that is in order within a connection, but whose connections break, linger and
// arrive after newer ones; an arbiter whose requests and answers are lost, late and doubled;
// clients that remember what they were told.
//
// What goes wrong: processes crash, also between two actions, and restart; they are stopped and go
// on later, with all that came meanwhile; the link is blocked in one direction or both, or
// breaks, and one end may not notice; the arbiter is out of reach of one side; a side is slow; its
// ticks are too long or too short; bits of memory flip; the guest reads clocks that nobody traps;
// a cut is asked for and its primary killed in the middle; the guest is handed over at any time.
//
// What is checked (world.go): at most one side lets outputs out on its own, and only when the
// arbiter's record lists nobody else; no output leaves that the survivor could not account for;
// outputs do not come in two versions, and none is left out; what a client was told is in the
// guest that is live and on its disk; without hardware faults the backup is at every instant in
// the state in which the primary was; when the faults end, both sides find back together and
// clients get on; and when everything has come to rest both guests and both replicas are equal.
//
// A build with the tag "sabotage" can break rules one by one; a test does, and each is noticed.
package sim
