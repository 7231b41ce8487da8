// Command purity checks that packages which must be deterministic are.
//
// Two virtual machines that run the same guest in lockstep stay equal only if the
// device models and everything that feeds them are functions of their inputs
// (docs/determinism.md). So in devices/ and firmware/, tests and packages called …test aside, there may be
//
//   - no goroutine, channel operation or select,
//   - no range over a map, nor over maps.Keys and its like: their order is random,
//   - no floating point: its results may depend on the compiler and the processor,
//   - no clock: time.Now and all that waits or ticks (a time.Duration is harmless),
//   - no import that brings the outside in (os, net, sync, math/rand, …), and of this
//     module only what is itself pure.
//
// A loop over a map whose order cannot matter says so in a comment on its line or the
// line before:
//
//	for id := range members { //purity:ordered collected and sorted below
//
// What is excused for a whole file stands in [exceptions], with the reason.
//
// Usage: purity [directory of the module]
//
// It prints findings as file:line:column: text and exits 1 if there are any.
package main

import (
	"fmt"
	"os"
)

func main() {
	dir := "."
	if len(os.Args) > 1 {
		dir = os.Args[1]
	}
	findings, err := Check(dir, "./devices/...", "./firmware/...", "./lockstep/protocol/...", "./lockstep/pages/...", "./lockstep/announce/...")
	if err != nil {
		fmt.Fprintln(os.Stderr, "purity:", err)
		os.Exit(2)
	}
	for _, f := range findings {
		fmt.Println(f)
	}
	if len(findings) > 0 {
		os.Exit(1)
	}
}
