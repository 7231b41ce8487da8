package nic

import (
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/mirror"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseNICAcceptsWhatItWrites(t *testing.T) {
	for _, text := range []string{
		"user",
		"user,hostfwd=tcp:127.0.0.1:5555-:22,hostfwd=udp:[::1]:53-10.0.2.20:53,tftp=/srv/a,,b,bootfile=boot.ipxe",
		"user,mac=52:54:00:12:34:56,mtu=9000,net=192.168.76.0/24,restrict=on,host_loopback=off",
		"user,next_server=10.0.2.2,hostname=vm,domain=example.org,resolver=192.0.2.1:53,resolver=[::1]:5353",
		"tap=tap0",
		"tap=tap0,mac=52:54:00:12:34:56,mtu=1500,bridge=br0,netns=blue,create=off,vnet=on",
	} {
		s, err := ParseNIC(text)
		require.NoError(t, err, text)
		again, err := ParseNIC(s.String())
		require.NoError(t, err, "%s wrote %s", text, s)
		require.Equal(t, s, again)
	}
	s, err := ParseNIC("user,hostfwd=tcp::5555-:22,resolver=192.0.2.1,mac=52-54-00-AB-CD-EF,restrict=yes")
	require.NoError(t, err)
	require.Equal(t, "user,mac=52:54:00:ab:cd:ef,hostfwd=tcp:127.0.0.1:5555-:22,resolver=192.0.2.1:53,restrict=on", s.String())
}

func TestParseNICSaysWhatIsWrong(t *testing.T) {
	for text, want := range map[string]struct{ reason, text string }{
		"":                                          {"nic-kind", "unknown kind"},
		"usr":                                       {"nic-kind", `did you mean "user"?`},
		"bridge":                                    {"nic-kind", "unknown kind"},
		"user,hotsfwd=tcp::1-:2":                    {"nic-key", `did you mean "hostfwd"?`},
		"tap=t,brigde=br0":                          {"nic-key", `did you mean "bridge"?`},
		"tap=t,mca=52:54:00:12:34:56":               {"nic-key", `did you mean "mac"?`},
		"user,wavelength=3":                         {"nic-key", `unknown key "wavelength"`},
		"user,bridge=br0":                           {"nic-spec", "bridge is for a network of kind tap"},
		"tap=t,hostfwd=tcp::1-:2":                   {"nic-spec", "hostfwd is for a network of kind user"},
		"user,tap=t":                                {"nic-spec", "tap is for a network of kind tap"},
		"user,restrict":                             {"nic-spec", `"restrict" has no value`},
		"user,restrict=maybe":                       {"nic-spec", "neither on nor off"},
		"user,mtu=9000,mtu=9000":                    {"nic-spec", "twice"},
		"user,mtu=10":                               {"nic-spec", "not within"},
		"user,mtu=x":                                {"nic-spec", "not a number"},
		"user,mac=53:54:00:12:34:56":                {"nic-spec", "52, for example"},
		"user,mac=00:00:00:00:00:00":                {"nic-spec", "no station's"},
		"user,mac=52:54:00:12:34":                   {"nic-spec", "not a MAC"},
		"user,mac=52:54:00:12:34:5g":                {"nic-spec", "not a MAC"},
		"user,hostfwd=tcp:5555-22":                  {"hostfwd", "PROTO:"},
		"user,hostfwd=sctp::1-:2":                   {"hostfwd", "neither tcp nor udp"},
		"user,hostfwd=tcp::70000-:2":                {"hostfwd", "PROTO:"},
		"user,hostfwd=tcp::1-:0":                    {"hostfwd", "port is 0"},
		"user,hostfwd=tcp::1-192.0.2.1:1":           {"user-net", "not within"},
		"user,hostfwd=tcp::1-:2,hostfwd=tcp::1-:3":  {"user-net", "twice"},
		"user,net=10.0.2.0/28":                      {"user-net", "prefix"},
		"user,net=10.0.2.1/24":                      {"user-net", "not an IPv4 network"},
		"user,net=fd00::/64":                        {"user-net", "not an IPv4 network"},
		"user,net=127.0.0.0/8":                      {"user-net", "reserved"},
		"user,hostname=a b":                         {"user-net", "not a name"},
		"user,tftp=":                                {"nic-spec", "empty"},
		"tap=":                                      {"nic-spec", "empty"},
		"tap=averylonginterface":                    {"tap-name", "not the name"},
		"tap=a/b":                                   {"tap-name", "not the name"},
		"tap=tap%d":                                 {"tap-name", "not the name"},
		"tap=t,bridge=..":                           {"bridge-name", "not the name"},
		"user,bootfile=" + strings.Repeat("x", 200): {"user-net", "bootfile"},
		strings.Repeat("u", MaxSpec+1):              {"nic-spec", "more than"},
	} {
		_, err := ParseNIC(text)
		require.ErrorContains(t, err, want.text, text)
		require.Equal(t, want.reason, mirror.ReasonOf(err), "%s: %v", text, err)
		var e *mirror.Error
		require.ErrorAs(t, err, &e)
		require.NotEmpty(t, e.Remedy)
	}
}

func TestSpecReadsTOML(t *testing.T) {
	var doc struct {
		NIC []Spec `toml:"nic"`
	}
	text := `
[[nic]]
kind = "user"
mac = "52:54:00:12:34:56"
hostfwd = ["tcp:127.0.0.1:5555-:22"]
resolver = ["192.0.2.1:53"]
net = "10.1.0.0/24"
host_loopback = false

[[nic]]
tap = "tap0"
bridge = "br0"
vnet = false
`
	require.NoError(t, toml.NewDecoder(strings.NewReader(text)).DisallowUnknownFields().Decode(&doc))
	require.Len(t, doc.NIC, 2)
	for i, want := range []string{
		"user,mac=52:54:00:12:34:56,net=10.1.0.0/24,hostfwd=tcp:127.0.0.1:5555-:22,resolver=192.0.2.1:53,host_loopback=off",
		"tap=tap0,bridge=br0,vnet=off",
	} {
		require.NoError(t, doc.NIC[i].Validate())
		require.Equal(t, want, doc.NIC[i].String())
		fromText, err := ParseNIC(want)
		require.NoError(t, err)
		require.Equal(t, fromText, doc.NIC[i], "both notations mean the same")
	}
	out, err := toml.Marshal(doc)
	require.NoError(t, err)
	var again struct {
		NIC []Spec `toml:"nic"`
	}
	require.NoError(t, toml.Unmarshal(out, &again), "%s", out)
	require.Equal(t, doc.NIC, again.NIC)
}

func TestDefaultMACs(t *testing.T) {
	require.Equal(t, DefaultMAC("ledger", 0), DefaultMAC("ledger", 0))
	require.Equal(t, "52:54:00", DefaultMAC("ledger", 0).String()[:8])
	require.NotEqual(t, DefaultMAC("ledger", 0), DefaultMAC("mail", 0))
	seen := map[MAC]bool{}
	for i := range 64 {
		m := DefaultMAC("ledger", i)
		require.False(t, seen[m])
		seen[m] = true
		require.NoError(t, m.validate())
		require.Zero(t, m[0]&groupBit)
		require.NotZero(t, m[0]&localBit)
	}
	// The value is part of the guest's identity: a new release must not change it.
	require.Equal(t, "52:54:00:8a:f6:90", DefaultMAC("ledger", 1).String())
}

func TestDistanceIsTheFewestEdits(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"mac", "mac", 0}, {"mca", "mac", 2}, {"hotsfwd", "hostfwd", 2}, {"a", "", 1}, {"tftp", "ftp", 1}, {"abcd", "", maxTypos + 1}, {"abcdef", "uvwxyz", maxTypos + 1}} {
		require.Equal(t, tc.want, distance(tc.a, tc.b), "%q %q", tc.a, tc.b)
		require.Equal(t, tc.want, distance(tc.b, tc.a), "%q %q", tc.b, tc.a)
	}
	rapid.Check(t, func(t *rapid.T) {
		word := rapid.StringMatching(`[a-c]{1,8}`)
		a, b, c := word.Draw(t, "a"), word.Draw(t, "b"), word.Draw(t, "c")
		ab, bc, ac := distance(a, b), distance(b, c), distance(a, c)
		if ab <= maxTypos && bc <= maxTypos {
			require.LessOrEqual(t, ac, min(ab+bc, maxTypos+1))
		}
		require.Equal(t, a == b, ab == 0)
	})
}

func TestOpenChoosesTheKind(t *testing.T) {
	s, err := ParseNIC("user,restrict=on")
	require.NoError(t, err)
	n, err := Open(s)
	require.NoError(t, err)
	require.NoError(t, n.Close())
	s, err = ParseNIC("tap=ftvmm-none,create=off")
	require.NoError(t, err)
	_, err = Open(s)
	require.Equal(t, "tap-missing", mirror.ReasonOf(err))
	_, err = Open(Spec{Kind: "x"})
	require.Equal(t, "nic-kind", mirror.ReasonOf(err))
}

// FuzzParseNIC claims that what is accepted is written in a form that means the same.
func FuzzParseNIC(f *testing.F) {
	for _, s := range []string{
		"user", "user,hostfwd=tcp:127.0.0.1:5555-:22,tftp=a,,b,bootfile=x", "tap=tap0,bridge=br0,mac=52:54:00:12:34:56,vnet=on",
		"user,net=10.0.2.0/24,resolver=::1,next_server=1.2.3.4,restrict=on,mtu=1500", "tap=a=b,,c", ",", "user,=",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseNIC(text)
		if err != nil {
			require.NotEmpty(t, mirror.ReasonOf(err))
			return
		}
		again, err := ParseNIC(s.String())
		require.NoError(t, err)
		require.Equal(t, s, again)
	})
}
