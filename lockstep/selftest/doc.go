// Package selftest finds out what a host can promise a protected guest, by trying it
// (docs/determinism.md, "Self-test"; docs/check.md explains each row of its report).
//
// It rests on two ideas. What the kernel offers is not asked for but used: a probe is a virtual
// machine with a program of a few instructions, whose outcome says whether a
// capability works, not whether it is announced. And determinism is not argued but compared: a
// committed test guest runs once, live, recorded and kicked at random moments; then once more
// in a fresh machine from the recording, kicked at other moments; and every exit with all
// registers, the whole memory and the state of all devices must be equal.
//
// The checks are a table of functions, each of which returns one [Row]. [Conclude] is a pure function from
// rows to the three answers that a user wants: which counter, which commit rule, which level 3 engine, and why.
//
// What it does not do: it looks at one host. Two hosts that pass may still differ in what
// they offer a guest; and no test proves that two runs never differ, it only fails to find that they do.
package selftest
