// Package user is a network of the process's own: a guest on it has an address, a gateway,
// name resolution, network boot and a way out, and the host needs no privilege and no set-up.
//
// The network is gVisor's TCP/IP stack (gvisor.dev/gvisor/pkg/tcpip), which plays every machine
// that the guest might talk to. A connection that the guest opens to some address outside
// ends in that stack; a socket of the host is connected to the same address, and bytes are
// copied between the two. A forwarded port is the same the other way round.
//
// What the network has, with the default addresses:
//
//	10.0.2.2   gateway; 127.0.0.1 of the host for TCP and UDP; TFTP, DHCP, answers to pings
//	10.0.2.3   DNS, relayed to the host's name servers
//	10.0.2.15  the first lease, the default target of forwarded ports
//
// The way of a frame: [Network.Transmit] answers ARP and DHCP itself, checks where an IPv4
// packet comes from and goes to, and hands the rest to the stack, in the caller's goroutine. What
// the stack sends waits in a bounded queue for the one goroutine that delivers; when it is
// full, frames are lost, as on any network.
//
// It does not do: IPv6; ping beyond the gateway; multicast; several guests on one network. Its
// connections are state of this process that is not part of the guest's: they do not survive it.
package user
