// Package nic reads the description of a network card's connection, from the command line
// ([ParseNIC]) or from a TOML table ([Spec]), and opens the network that it names: a tap
// interface of the host (mirror/nic/tap) or a network of the process's own
// (mirror/nic/user).
//
// A tap is a port of the host's network: fast, and the guest is a machine of its own on
// it. The user network needs no privilege and no set-up, but its connections end with
// the process: the promise that a fault leaves connections standing holds for taps.
package nic
