package user

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

const (
	// maxQueries bounds the DNS queries in flight; more are dropped, and asked again.
	maxQueries = 64
	// queryTimeout is the wait for one name server.
	queryTimeout = 2 * time.Second
	// maxResolvConf bounds what is read of resolv.conf, in bytes.
	maxResolvConf = 64 << 10
	// dnsHeader is the size of a DNS message's header in bytes (RFC 1035, 4.1.1).
	dnsHeader  = 12
	resolvConf = "/etc/resolv.conf"
)

// resolvers returns the name servers to ask, at least one. The host's are read each time:
// they change as it moves between networks.
func (n *Network) resolvers() []netip.AddrPort {
	if len(n.config.Resolvers) > 0 {
		return n.config.Resolvers
	}
	text, err := os.ReadFile(resolvConf)
	if err != nil || len(text) > maxResolvConf {
		text = nil
	}
	if servers := parseResolvConf(string(text)); len(servers) > 0 {
		return servers
	}
	// resolv.conf(5): without one, the name server is on this host.
	return []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), DNSPort)}
}

// parseResolvConf returns the servers of a resolv.conf, in its order.
func parseResolvConf(text string) []netip.AddrPort {
	var servers []netip.AddrPort
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(words[1]); err == nil && len(servers) < MaxResolvers {
			servers = append(servers, netip.AddrPortFrom(a, DNSPort))
		}
	}
	return servers
}

// relayDNS reads the guest's queries until Close and passes them on as they are.
func (n *Network) relayDNS(c *gonet.UDPConn) {
	slots := make(chan struct{}, maxQueries)
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	for {
		k, peer, err := c.ReadFrom(buf[:])
		if err != nil {
			return
		}
		if k < dnsHeader {
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			continue
		}
		query := bytes.Clone(buf[:k])
		if !n.spawn(func() {
			defer func() { <-slots }()
			if answer := n.askDNS(query); answer != nil {
				_, _ = c.WriteTo(answer, peer)
			}
		}) {
			return
		}
	}
}

// askDNS asks one name server after the other and returns the first answer, nil if
// there is none.
func (n *Network) askDNS(query []byte) []byte {
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	for _, server := range n.resolvers() {
		if n.ctx.Err() != nil {
			return nil
		}
		if k := n.askServer(server, query, buf[:]); k > 0 {
			return bytes.Clone(buf[:k])
		}
	}
	return nil
}

// askServer returns the length of the server's answer in buf, 0 if it has none.
func (n *Network) askServer(server netip.AddrPort, query, buf []byte) int {
	// A connected socket: only this server can answer.
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
	if err != nil || !n.track(c) {
		return 0
	}
	defer n.release(c)
	if _, err := c.Write(query); err != nil {
		return 0
	}
	_ = c.SetReadDeadline(time.Now().Add(queryTimeout))
	for {
		k, err := c.Read(buf)
		if err != nil {
			return 0
		}
		if k >= dnsHeader && bytes.Equal(buf[:2], query[:2]) {
			return k
		}
	}
}
