// Command ftvmm runs virtual machines under KVM, and steers them while they run.
//
//	ftvmm run --guest hello            run a guest that needs no files
//	ftvmm run guest.toml               run the guest that a file describes
//	ftvmm vm status NAME               ask a running guest
//	ftvmm config show --effective      show the settings and where they come from
//
// Standard output carries data only; progress, hints and errors go to standard error. Every
// command takes --json. An error has a stable code and says what to do. The exit codes are in
// exit.go.
package main

import "os"

// version is set by the build (build.sh); a plain "go build" leaves it.
var version = "devel"

func main() { os.Exit(execute(os.Args[1:], os.Stdout, os.Stderr)) }
