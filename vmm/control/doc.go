// Package control lets other processes steer a running guest: HTTP with JSON bodies on a
// Unix socket, and the client for it.
//
//	GET  /v1/status                 what the guest is doing
//	GET  /v1/stats                  counters
//	POST /v1/pause, /v1/resume      stop the guest and its time, and go on
//	POST /v1/power-button           press the power button: the guest shuts down
//	POST /v1/reset                  press the reset button
//	POST /v1/save {"path": "…"}     write the guest's state to a file of this host
//	POST /v1/quit                   end the VMM at once
//	GET  /v1/pair                   what this side of a pair is doing
//	POST /v1/failover               hand the guest over to the other side
//	POST /v1/force                  make a side live against the arbiter's record
//	GET  /v1/console/{name}         attach to a console (?write=true to type too)
//
// Answers carry "apiVersion" and "kind", as all JSON of ftvmm does. A refusal is an [Error] with
// a stable code and a remedy. A console is attached by an HTTP upgrade to the
// protocol [ConsoleProtocol]; after the answer "101" the connection carries the console's bytes
// in both directions: first the recent output, then what follows.
//
// The socket is created with mode 0600: who may open it may do everything, so there is no
// authentication above it. The number of connections, the size of a request and the time to send it
// are bounded. Nothing here touches the guest: every verb is a request to the [Machine], which carries it out
// when the vCPU stands.
package control
