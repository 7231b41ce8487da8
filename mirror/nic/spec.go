package nic

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/mirror/nic/tap"
	"github.com/ftvmm/ftvmm/mirror/nic/user"
	"github.com/ftvmm/ftvmm/vmm/backend"
)

// The kinds of network.
const (
	KindUser = "user"
	KindTap  = "tap"
)

const (
	// MaxSpec bounds a specification in bytes.
	MaxSpec = 16 << 10
	// MinMTU and MaxMTU bound the MTU in bytes: what IPv4 must carry (RFC 791), and what a
	// frame buffer holds.
	MinMTU, MaxMTU = 68, 65521
)

// Spec describes a network card's connection: what a TOML table or, in another notation,
// [ParseNIC] says. A field that is not given has its zero value, which means the default. Fields
// of the kind that Kind does not name must be left out.
type Spec struct {
	// Kind is "user" or "tap"; it may be left out of a table that has Tap.
	Kind string `toml:"kind,omitempty"`
	// MAC is the guest's address; the default is [DefaultMAC].
	MAC MAC `toml:"mac,omitzero"`
	// MTU is the largest packet without its Ethernet header, in bytes; by default 1500, or
	// what a tap has.
	MTU int `toml:"mtu,omitempty"`

	// Tap is the interface's name.
	Tap string `toml:"tap,omitempty"`
	// Bridge is the bridge that the tap is put into; by default it is left where it is.
	Bridge string `toml:"bridge,omitempty"`
	// Netns is the network namespace of the tap: a name of "ip netns" or a path.
	Netns string `toml:"netns,omitempty"`
	// Create says whether a tap that does not exist is made (and removed at the end); default true.
	Create *bool `toml:"create,omitempty"`
	// Vnet says whether checksum and segmentation offload are used; default true.
	Vnet *bool `toml:"vnet,omitempty"`

	// Net is the guest's IPv4 network, default [user.DefaultNet].
	Net netip.Prefix `toml:"net,omitzero"`
	// HostForwards are ports of the host that lead into the guest.
	HostForwards []user.Forward `toml:"hostfwd,omitempty"`
	// TFTP is a directory whose files the guest may read by TFTP.
	TFTP string `toml:"tftp,omitempty"`
	// BootFile is the name that DHCP gives to network boot firmware.
	BootFile string `toml:"bootfile,omitempty"`
	// NextServer is the boot server that DHCP names; by default the TFTP server within.
	NextServer netip.Addr `toml:"next_server,omitzero"`
	// Hostname and Domain are what DHCP tells the guest about its name.
	Hostname string `toml:"hostname,omitempty"`
	Domain   string `toml:"domain,omitempty"`
	// Resolvers are asked instead of those in the host's /etc/resolv.conf.
	Resolvers []netip.AddrPort `toml:"resolver,omitempty"`
	// Restrict keeps the guest from the outside; forwarded ports, DHCP and TFTP remain.
	Restrict bool `toml:"restrict,omitempty"`
	// HostLoopback says whether the gateway's address reaches the host's loopback; default true.
	HostLoopback *bool `toml:"host_loopback,omitempty"`
}

// field connects a key of the text notation to a field of Spec. The key is also that
// of the TOML table.
type field struct {
	key  string
	kind string // of the networks that have it; "" for all
	set  func(s *Spec, value string) error
	// get returns the values to write, none if the field has its default.
	get func(s *Spec) []string
}

var fields = []field{
	{"mac", "", func(s *Spec, v string) error { return s.MAC.UnmarshalText([]byte(v)) },
		func(s *Spec) []string { return unlessZero(s.MAC, s.MAC.String) }},
	{"mtu", "", func(s *Spec, v string) (err error) {
		if s.MTU, err = strconv.Atoi(v); err != nil {
			return fmt.Errorf("%q is not a number", v)
		}
		return nil
	}, func(s *Spec) []string { return unlessZero(s.MTU, func() string { return strconv.Itoa(s.MTU) }) }},

	{"tap", KindTap, stringSetter(func(s *Spec) *string { return &s.Tap }), nil}, // written by String
	{"bridge", KindTap, stringSetter(func(s *Spec) *string { return &s.Bridge }), stringGetter(func(s *Spec) *string { return &s.Bridge })},
	{"netns", KindTap, stringSetter(func(s *Spec) *string { return &s.Netns }), stringGetter(func(s *Spec) *string { return &s.Netns })},
	{"create", KindTap, switchSetter(func(s *Spec) **bool { return &s.Create }), switchGetter(func(s *Spec) **bool { return &s.Create })},
	{"vnet", KindTap, switchSetter(func(s *Spec) **bool { return &s.Vnet }), switchGetter(func(s *Spec) **bool { return &s.Vnet })},

	{"net", KindUser, func(s *Spec, v string) (err error) {
		if s.Net, err = netip.ParsePrefix(v); err != nil {
			return fmt.Errorf("%q is not a network such as %s", v, user.DefaultNet)
		}
		return nil
	}, func(s *Spec) []string { return unlessZero(s.Net, s.Net.String) }},
	{"hostfwd", KindUser, func(s *Spec, v string) error {
		f, err := user.ParseForward(v)
		s.HostForwards = append(s.HostForwards, f)
		return err
	}, func(s *Spec) (out []string) {
		for _, f := range s.HostForwards {
			out = append(out, f.String())
		}
		return out
	}},
	{"tftp", KindUser, stringSetter(func(s *Spec) *string { return &s.TFTP }), stringGetter(func(s *Spec) *string { return &s.TFTP })},
	{"bootfile", KindUser, stringSetter(func(s *Spec) *string { return &s.BootFile }), stringGetter(func(s *Spec) *string { return &s.BootFile })},
	{"next_server", KindUser, func(s *Spec, v string) (err error) {
		if s.NextServer, err = netip.ParseAddr(v); err != nil {
			return fmt.Errorf("%q is not an IP address", v)
		}
		return nil
	}, func(s *Spec) []string { return unlessZero(s.NextServer, s.NextServer.String) }},
	{"hostname", KindUser, stringSetter(func(s *Spec) *string { return &s.Hostname }), stringGetter(func(s *Spec) *string { return &s.Hostname })},
	{"domain", KindUser, stringSetter(func(s *Spec) *string { return &s.Domain }), stringGetter(func(s *Spec) *string { return &s.Domain })},
	{"resolver", KindUser, func(s *Spec, v string) error {
		ap, err := netip.ParseAddrPort(v)
		if err != nil {
			a, err := netip.ParseAddr(v)
			if err != nil {
				return fmt.Errorf("%q is not an IP address, with or without a port", v)
			}
			ap = netip.AddrPortFrom(a, user.DNSPort)
		}
		s.Resolvers = append(s.Resolvers, ap)
		return nil
	}, func(s *Spec) (out []string) {
		for _, r := range s.Resolvers {
			out = append(out, r.String())
		}
		return out
	}},
	{"restrict", KindUser, func(s *Spec, v string) (err error) {
		s.Restrict, err = parseSwitch(v)
		return err
	}, func(s *Spec) []string { return unlessZero(s.Restrict, func() string { return "on" }) }},
	{"host_loopback", KindUser, switchSetter(func(s *Spec) **bool { return &s.HostLoopback }), switchGetter(func(s *Spec) **bool { return &s.HostLoopback })},
}

func unlessZero[T comparable](v T, text func() string) []string {
	var zero T
	if v == zero {
		return nil
	}
	return []string{text()}
}

func stringSetter(at func(*Spec) *string) func(*Spec, string) error {
	return func(s *Spec, v string) error {
		if v == "" {
			return fmt.Errorf("the value is empty")
		}
		*at(s) = v
		return nil
	}
}

func stringGetter(at func(*Spec) *string) func(*Spec) []string {
	return func(s *Spec) []string { return unlessZero(*at(s), func() string { return *at(s) }) }
}

func switchSetter(at func(*Spec) **bool) func(*Spec, string) error {
	return func(s *Spec, v string) error {
		on, err := parseSwitch(v)
		*at(s) = &on
		return err
	}
}

func switchGetter(at func(*Spec) **bool) func(*Spec) []string {
	return func(s *Spec) []string {
		switch p := *at(s); {
		case p == nil:
			return nil
		case *p:
			return []string{"on"}
		}
		return []string{"off"}
	}
}

func parseSwitch(v string) (bool, error) {
	switch v {
	case "on", "yes", "true", "1":
		return true, nil
	case "off", "no", "false", "0":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither on nor off", v)
}

// ParseNIC reads the text notation of a [Spec]: the kind, then key=value pairs, all
// separated by commas; a comma within a value is written twice.
//
//	user,hostfwd=tcp:127.0.0.1:5555-:22,tftp=/srv/boot,bootfile=boot.ipxe
//	tap=tap0,bridge=br0,mac=52:54:00:12:34:56,vnet=on
//
// Errors are of type [*mirror.Error]; that of an unknown key names the nearest one.
func ParseNIC(text string) (Spec, error) {
	var s Spec
	if len(text) > MaxSpec {
		return Spec{}, specError(fmt.Errorf("%d bytes are more than %d", len(text), MaxSpec))
	}
	seen := map[string]bool{}
	for i, part := range splitCommas(text) {
		key, value, hasValue := strings.Cut(part, "=")
		switch {
		case i == 0 && !hasValue && (key == KindUser || key == KindTap):
			s.Kind = key
			continue
		case i == 0 && !hasValue:
			return Spec{}, mirror.Errorf("nic-kind", fmt.Sprintf("Begin with %q or with \"tap=NAME\".", KindUser),
				"network card %q: unknown kind of network %q%s", text, key, nearest(key, []string{KindUser, KindTap}))
		case i == 0 && key == KindTap:
			s.Kind = KindTap
		case !hasValue:
			return Spec{}, specError(fmt.Errorf("%q has no value", part))
		}
		f, err := lookup(key, s.Kind)
		if err != nil {
			return Spec{}, err
		}
		if seen[key] && key != "hostfwd" && key != "resolver" {
			return Spec{}, specError(fmt.Errorf("%s is given twice", key))
		}
		seen[key] = true
		if err := f.set(&s, value); err != nil {
			return Spec{}, specError(fmt.Errorf("%s: %w", key, err))
		}
	}
	if err := s.Validate(); err != nil {
		return Spec{}, err
	}
	return s, nil
}

// specError gives an error of the description its reason and remedy, unless it has its own.
func specError(err error) error {
	err = fmt.Errorf("network card: %w", err)
	if inner := (*mirror.Error)(nil); errors.As(err, &inner) {
		return &mirror.Error{Reason: inner.Reason, Remedy: inner.Remedy, Err: err}
	}
	return &mirror.Error{Reason: "nic-spec", Remedy: "Write for example: user,hostfwd=tcp:127.0.0.1:5555-:22 or tap=tap0,bridge=br0.", Err: err}
}

// lookup finds the field for a key in a network of the given kind.
func lookup(key, kind string) (field, error) {
	var keys []string
	for _, f := range fields {
		if f.kind == "" || kind == "" || f.kind == kind {
			if f.key == key {
				return f, nil
			}
			keys = append(keys, f.key)
		}
	}
	for _, f := range fields {
		if f.key == key {
			return field{}, specError(fmt.Errorf("%s is for a network of kind %s, not %s", key, f.kind, kind))
		}
	}
	return field{}, mirror.Errorf("nic-key", "Use one of: "+strings.Join(keys, ", ")+".",
		"network card: unknown key %q%s", key, nearest(key, keys))
}

// splitCommas cuts at single commas and makes two into one.
func splitCommas(text string) []string {
	var parts []string
	var part strings.Builder
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] != ',':
			part.WriteByte(text[i])
		case i+1 < len(text) && text[i+1] == ',':
			part.WriteByte(',')
			i++
		default:
			parts = append(parts, part.String())
			part.Reset()
		}
	}
	return append(parts, part.String())
}

// String returns the text notation, which [ParseNIC] reads back.
func (s Spec) String() string {
	var b strings.Builder
	if s.Kind == KindTap || s.Kind == "" && s.Tap != "" {
		b.WriteString("tap=" + doubleCommas(s.Tap))
	} else {
		b.WriteString(s.Kind)
	}
	for _, f := range fields {
		if f.get == nil {
			continue
		}
		for _, v := range f.get(&s) {
			b.WriteString("," + f.key + "=" + doubleCommas(v))
		}
	}
	return b.String()
}

func doubleCommas(v string) string { return strings.ReplaceAll(v, ",", ",,") }

// Validate checks what the fields say and fills in Kind. Whether the host has what
// they name, only [Open] finds out.
func (s *Spec) Validate() error {
	if s.Kind == "" && s.Tap != "" {
		s.Kind = KindTap
	}
	if s.Kind != KindUser && s.Kind != KindTap {
		return mirror.Errorf("nic-kind", fmt.Sprintf("Use %q or %q.", KindUser, KindTap),
			"network card: unknown kind of network %q%s", s.Kind, nearest(s.Kind, []string{KindUser, KindTap}))
	}
	for _, f := range fields {
		given := f.key == KindTap && s.Tap != "" || f.get != nil && len(f.get(s)) > 0
		if given && f.kind != "" && f.kind != s.Kind {
			return specError(fmt.Errorf("%s is for a network of kind %s, not %s", f.key, f.kind, s.Kind))
		}
	}
	if s.MTU != 0 && (s.MTU < MinMTU || s.MTU > MaxMTU) {
		return specError(fmt.Errorf("mtu: %d is not within %d to %d", s.MTU, MinMTU, MaxMTU))
	}
	if s.MAC != (MAC{}) {
		if err := s.MAC.validate(); err != nil {
			return specError(err)
		}
	}
	if s.Kind == KindTap {
		c := s.tapConfig()
		return c.Validate()
	}
	c := s.userConfig()
	return c.Validate()
}

func (s *Spec) tapConfig() tap.Config {
	return tap.Config{
		Name:    s.Tap,
		Bridge:  s.Bridge,
		Netns:   s.Netns,
		Create:  s.Create == nil || *s.Create,
		MTU:     s.MTU,
		VnetHdr: s.Vnet == nil || *s.Vnet,
	}
}

func (s *Spec) userConfig() user.Config {
	return user.Config{
		Net:            s.Net,
		Forwards:       slices.Clone(s.HostForwards),
		TFTP:           s.TFTP,
		BootFile:       s.BootFile,
		NextServer:     s.NextServer,
		Hostname:       s.Hostname,
		Domain:         s.Domain,
		Resolvers:      slices.Clone(s.Resolvers),
		Restrict:       s.Restrict,
		NoHostLoopback: s.HostLoopback != nil && !*s.HostLoopback,
		MTU:            s.MTU,
	}
}

// Open opens the network that s describes. Errors are of type [*mirror.Error].
func Open(s Spec) (backend.NIC, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	if s.Kind == KindTap {
		n, err := tap.Open(s.tapConfig())
		if err != nil {
			return nil, err
		}
		return n, nil
	}
	n, err := user.New(s.userConfig())
	if err != nil {
		return nil, err
	}
	return n, nil
}
