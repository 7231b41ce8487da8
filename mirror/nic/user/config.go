package user

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/ftvmm/ftvmm/mirror"
)

// DefaultNet is the guest's network. Within any network the gateway is host 2, the name
// server host 3 and the first lease host 15.
var DefaultNet = netip.MustParsePrefix("10.0.2.0/24")

// The hosts of a network, by their number within it.
const (
	gatewayHost    = 2
	dnsHost        = 3
	firstLeaseHost = 15
)

// The ports of the services.
const (
	DNSPort        = 53
	tftpPort       = 69
	dhcpServerPort = 67
	dhcpClientPort = 68
)

const (
	// DefaultMTU is in bytes, without the Ethernet header.
	DefaultMTU = 1500
	// MinMTU and MaxMTU bound Config.MTU, in bytes: what IPv4 must carry (RFC 791), and
	// what fits into an IPv4 packet.
	MinMTU, MaxMTU = 68, 65521
	// MaxForwards bounds Config.Forwards.
	MaxForwards = 256
	// MaxResolvers bounds Config.Resolvers.
	MaxResolvers = 8
	// maxBootFile is the length of BOOTP's file field less its NUL, in bytes (RFC 951).
	maxBootFile = 127
	// maxName bounds Hostname and Domain in bytes (a DHCP option's length).
	maxName = 253
	// maxPrefixBits is the length of the longest prefix in bits whose network has a host
	// number for the first lease.
	maxPrefixBits = 27
)

// Config describes a user network. The zero value is a network with the outside, DHCP and
// DNS.
type Config struct {
	// Net is the guest's IPv4 network; the zero value is [DefaultNet].
	Net netip.Prefix
	// Forwards are ports of the host that lead into the guest.
	Forwards []Forward
	// TFTP is a directory whose files can be read by TFTP from the gateway's address.
	TFTP string
	// BootFile is the file that DHCP names for network boot.
	BootFile string
	// NextServer is the server that DHCP names for network boot, by default the gateway.
	NextServer netip.Addr
	// Hostname and Domain are given out by DHCP.
	Hostname, Domain string
	// Resolvers are asked instead of the name servers in /etc/resolv.conf.
	Resolvers []netip.AddrPort
	// Restrict cuts the guest off from the outside: no addresses beyond its network, no
	// host, no DNS. Forwards, DHCP and TFTP remain.
	Restrict bool
	// NoHostLoopback keeps the guest from 127.0.0.1 of the host, which it otherwise
	// reaches at the gateway's address.
	NoHostLoopback bool
	// MTU is in bytes, 0 means [DefaultMTU].
	MTU int
}

// Validate checks c. Errors are of type [*mirror.Error].
func (c *Config) Validate() error {
	bad := func(format string, args ...any) error {
		return mirror.Errorf("user-net", "Correct the network card's description.", "user network: "+format, args...)
	}
	p := c.net()
	switch {
	case !p.IsValid() || !p.Addr().Is4() || p.Addr() != p.Masked().Addr():
		return bad("net: %v is not an IPv4 network such as %s", p, DefaultNet)
	case p.Bits() < 8 || p.Bits() > maxPrefixBits:
		return bad("net: %v has not from 8 to %d bits of prefix", p, maxPrefixBits)
	case !routable(p.Addr()) || !routable(host(p, 1)):
		return bad("net: %v is reserved", p)
	case c.MTU != 0 && (c.MTU < MinMTU || c.MTU > MaxMTU):
		return bad("mtu: %d is not within %d to %d", c.MTU, MinMTU, MaxMTU)
	case len(c.Forwards) > MaxForwards:
		return bad("hostfwd: more than %d", MaxForwards)
	case len(c.Resolvers) > MaxResolvers:
		return bad("resolver: more than %d", MaxResolvers)
	case len(c.BootFile) > maxBootFile || strings.ContainsRune(c.BootFile, 0):
		return bad("bootfile: more than %d bytes, or a NUL", maxBootFile)
	case c.NextServer.IsValid() && !c.NextServer.Is4():
		return bad("next_server: %v is not an IPv4 address", c.NextServer)
	case !validName(c.Hostname):
		return bad("hostname: %q is not a name", c.Hostname)
	case !validName(c.Domain):
		return bad("domain: %q is not a name", c.Domain)
	}
	for _, r := range c.Resolvers {
		if !r.IsValid() || r.Port() == 0 || r.Addr().IsUnspecified() || r.Addr().IsMulticast() {
			return bad("resolver: %v is not a server's address", r)
		}
	}
	seen := map[string]bool{}
	for _, f := range c.Forwards {
		if err := f.validate(); err != nil {
			return err
		}
		if a := f.Guest.Addr(); a.IsValid() && !a.IsUnspecified() && !p.Contains(a) {
			return bad("hostfwd: %v: the guest's address is not within %v", f, p)
		}
		if from := f.Proto + f.Host.String(); f.Host.Port() != 0 && seen[from] {
			return bad("hostfwd: %v: its host port is forwarded twice", f)
		} else {
			seen[from] = true
		}
	}
	return nil
}

func (c *Config) net() netip.Prefix {
	if c.Net == (netip.Prefix{}) {
		return DefaultNet
	}
	return c.Net
}

// host returns host number n of a network.
func host(p netip.Prefix, n uint32) netip.Addr {
	a := p.Addr().As4()
	v := uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3])
	v += n
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}

// broadcast returns the last address of a network.
func broadcast(p netip.Prefix) netip.Addr { return host(p, 1<<(32-p.Bits())-1) }

// routable reports whether a router may forward to an address: not loopback, "this
// network" (RFC 1122, 3.2.1.3), link-local (RFC 3927, 7; on cloud hosts it has the
// credentials of the machine), multicast, reserved or broadcast.
func routable(a netip.Addr) bool {
	b := a.As4()
	return b[0] != 0 && b[0] < 240 && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsMulticast()
}

// validName accepts "" and dot-separated labels of letters, digits, hyphens and
// underscores.
func validName(s string) bool {
	if len(s) > maxName {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

// Forward leads a port of the host into the guest.
type Forward struct {
	Proto string         // "tcp" or "udp"
	Host  netip.AddrPort // where the host listens; port 0 has it choose one
	// Guest is where connections are made to; an invalid or unspecified address means
	// that of the first lease.
	Guest netip.AddrPort
}

// ParseForward reads "tcp:127.0.0.1:5555-:22" or "udp:[::1]:53-10.0.2.20:53": protocol,
// address and port on the host, address and port in the guest. Without an address the
// host listens on 127.0.0.1 alone; "0.0.0.0" opens the port to everyone. Errors are of type [*mirror.Error].
func ParseForward(text string) (Forward, error) {
	fail := func() (Forward, error) {
		return Forward{}, mirror.Errorf("hostfwd", "Write for example tcp:127.0.0.1:5555-:22.", "port forwarding %q: not of the form PROTO:[ADDRESS]:PORT-[ADDRESS]:PORT", text)
	}
	proto, rest, ok := strings.Cut(text, ":")
	if !ok {
		return fail()
	}
	// From the right: a zone of an IPv6 address may have a hyphen.
	cut := strings.LastIndexByte(rest, '-')
	if cut < 0 {
		return fail()
	}
	host, ok := parseEndpoint(rest[:cut], netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	if !ok {
		return fail()
	}
	guest, ok := parseEndpoint(rest[cut+1:], netip.IPv4Unspecified())
	if !ok {
		return fail()
	}
	f := Forward{Proto: proto, Host: host, Guest: guest}
	return f, f.validate()
}

// parseEndpoint reads ADDRESS:PORT; an address that is missing is the given one.
func parseEndpoint(s string, missing netip.Addr) (netip.AddrPort, bool) {
	if port, ok := strings.CutPrefix(s, ":"); ok {
		n, err := strconv.ParseUint(port, 10, 16)
		return netip.AddrPortFrom(missing, uint16(n)), err == nil
	}
	ap, err := netip.ParseAddrPort(s)
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), err == nil
}

func (f Forward) validate() error {
	bad := func(why string) error {
		return mirror.Errorf("hostfwd", "Write for example tcp:127.0.0.1:5555-:22.", "port forwarding %v: %s", f, why)
	}
	switch {
	case f.Proto != "tcp" && f.Proto != "udp":
		return bad(fmt.Sprintf("%q is neither tcp nor udp", f.Proto))
	case !f.Host.IsValid():
		return bad("it has no host address")
	case f.Guest.Port() == 0:
		return bad("the guest's port is 0")
	case f.Guest.Addr().IsValid() && !f.Guest.Addr().Is4():
		return bad("the guest's address is not an IPv4 address")
	}
	return nil
}

// String writes what [ParseForward] reads.
func (f Forward) String() string {
	guest := f.Guest.String()
	if a := f.Guest.Addr(); !a.IsValid() || a.IsUnspecified() {
		guest = ":" + strconv.Itoa(int(f.Guest.Port()))
	}
	return f.Proto + ":" + f.Host.String() + "-" + guest
}

// MarshalText writes what String does.
func (f Forward) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads what [ParseForward] does.
func (f *Forward) UnmarshalText(text []byte) (err error) {
	*f, err = ParseForward(string(text))
	return err
}
