// Package console connects a guest's serial ports and virtio consoles to the people and
// programs who read them.
//
// Three ideas carry it.
//
// A [Console] is one port of the guest, and it has one [Backend] (the terminal, a file, a Unix
// socket, a pseudo-terminal, nothing) and any number of attached [Session]s (the control
// socket's "vm console"). Everything the guest writes goes to all of them, and into a
// bounded ring of recent output, which a new session gets first, so that who attaches after a
// crash still sees the last words. Bytes typed come from the backend and from at most one
// session that may write.
//
// [Console.Output] is called where the guest's output is released, which may be the vCPU loop, so it
// must not wait for a reader. Every reader has a bounded buffer; bytes that do
// not fit are dropped for that reader alone and counted. Only the terminal and files may
// hold the caller up, and for a bounded time ([Patience]): they keep up in all but
// pathological cases, and whoever pipes a guest's output into a program wants all of it.
//
// Input waits for the guest. It is delivered through a function that blocks while the guest's
// receive queue is full, and nothing is read from the backend meanwhile, so a paste of any
// length arrives whole; the pressure goes back to the terminal or the socket's peer.
//
// The package does not know about positions or lockstep: what it delivers becomes an input of
// the guest when the machine takes it at a stop, and what reaches Output has
// passed the output gate already.
package console
