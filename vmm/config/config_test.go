package config

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/mirror/nic"
	"github.com/ftvmm/ftvmm/vmm/console"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "1": 1, "512": 512, "1K": KiB, "1k": KiB, "1KiB": KiB, "256M": 256 * MiB, "256MiB": 256 * MiB, "4g": 4 * GiB,
		"1T": TiB, "1536M": 1536 * MiB, "9223372036854775807": 1<<63 - 1,
	} {
		got, err := ParseSize(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "M", "-1", "+1", "1.5G", "1 M", "1MB", "1iB", "0x10", "1_000", "9223372036854775808", "8388608T", "99999999999999999999", "1KK", "١M"} {
		_, err := ParseSize(text)
		require.Error(t, err, text)
	}
}

func TestSizeNotationIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := Size(rapid.Uint64Range(0, 1<<63-1).Draw(t, "size"))
		if rapid.Bool().Draw(t, "round") {
			s &^= rapid.SampledFrom([]Size{KiB, MiB, GiB}).Draw(t, "unit") - 1
		}
		got, err := ParseSize(s.String())
		if err != nil || got != s {
			t.Fatalf("%d is written %q and read %d, %v", uint64(s), s, uint64(got), err)
		}
	})
}

func TestNearest(t *testing.T) {
	keys := keysBelow("")
	for wrong, want := range map[string]string{
		"memmory": "memory", "meomry": "memory", "Memory": "memory", "cpu": "cpu", "cpuss": "cpus", "disks": "disk", "nics": "nic", "kernal": "kernel",
		"on_guest_shutdwon": "on_guest_shutdown", "frobnicate": "", "": "", "x": "", strings.Repeat("a", 1000): "",
	} {
		require.Equal(t, want, Nearest(wrong, keys), wrong)
	}
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

const full = `
name = "db1"
memory = "1G"
kernel = "vmlinuz"
append = "console=ttyS0"
rng = false
console = "unix:con.sock"
[[disk]]
path = "root.img"
readonly = true
bootindex = 1
[[disk]]
path = "/srv/data.img"
size = "10G"
legacy = false
[[nic]]
kind = "user"
hostfwd = ["tcp:127.0.0.1:8080-:80", "tcp:127.0.0.1:2222-:22"]
mac = "52:54:00:12:34:56"
[[nic]]
tap = "tap0"
[[serial]]
backend = "pty"
[[serial]]
backend = "file:com2.log"
`

func TestLoadAFile(t *testing.T) {
	path := writeFile(t, "guest.toml", full)
	dir := filepath.Dir(path)
	g, origins, err := Load(Sources{File: path})
	require.NoError(t, err)
	require.Equal(t, "db1", g.Name)
	require.Equal(t, GiB, g.Memory)
	require.Equal(t, FirmwareNone, g.Firmware, "auto is none where there is a kernel")
	require.Equal(t, filepath.Join(dir, "vmlinuz"), g.Kernel, "paths in a file are relative to the file")
	require.Equal(t, filepath.Join(dir, "con.sock"), g.Console.Path)
	require.False(t, g.RNG)
	require.Len(t, g.Disks, 2)
	require.Equal(t, filepath.Join(dir, "root.img"), g.Disks[0].Path)
	require.True(t, *g.Disks[0].Legacy, "the default")
	require.False(t, *g.Disks[1].Legacy)
	require.Equal(t, 10*GiB, g.Disks[1].Size)
	require.Equal(t, "user,mac=52:54:00:12:34:56,hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=tcp:127.0.0.1:2222-:22", g.NICs[0].Spec())
	require.Equal(t, "tap=tap0", g.NICs[1].Spec())
	require.Equal(t, []Serial{{console.Spec{Kind: console.PTY}}, {console.Spec{Kind: console.File, Path: filepath.Join(dir, "com2.log")}}}, g.Serials)
	require.Equal(t, ControlPath("db1"), g.Control)
	require.Equal(t, Origin("file "+path), origins["memory"])
	require.Equal(t, OriginDefault, origins["cpus"])
	require.Len(t, origins, len(keys))
}

func TestJSONSaysTheSameAsTOML(t *testing.T) {
	var doc map[string]any
	require.NoError(t, toml.Unmarshal([]byte(full), &doc))
	text, err := json.Marshal(doc)
	require.NoError(t, err)
	fromTOML, fromJSON := Default(), Default()
	a, err := Parse(fromTOML, []byte(full), "g.toml")
	require.NoError(t, err)
	b, err := Parse(fromJSON, text, "g.json")
	require.NoError(t, err)
	require.Equal(t, fromTOML, fromJSON)
	require.ElementsMatch(t, a, b)
}

func TestWhatIsShownCanBeReadBack(t *testing.T) {
	g, _, err := Load(Sources{File: writeFile(t, "guest.toml", full)})
	require.NoError(t, err)
	asTOML, err := toml.Marshal(g)
	require.NoError(t, err)
	asJSON, err := json.Marshal(g)
	require.NoError(t, err)
	for name, text := range map[string][]byte{"g.toml": asTOML, "g.json": asJSON} {
		back := Default()
		_, err := Parse(back, text, name)
		require.NoError(t, err, "%s", text)
		require.Equal(t, g, back, name)
	}
}

func TestPrecedence(t *testing.T) {
	path := writeFile(t, "g.toml", "memory = '1G'\nappend = 'from file'\nname = 'file'\n[[disk]]\npath = 'a'\n[[disk]]\npath = 'b'\n[[serial]]\nbackend = 'none'\n")
	env := map[string]string{"FTVMM_MEMORY": "2G", "FTVMM_NAME": "env", "FTVMM_SERIAL": "pty;file:x", "FTVMM_APPEND": ""}
	g, origins, err := Load(Sources{
		File:      path,
		LookupEnv: func(k string) (string, bool) { v, ok := env[k]; return v, ok },
		Flags:     map[string][]string{"name": {"flag"}, "disk": {"path=c,readonly"}, "on_guest_shutdown": {"restart"}},
	})
	require.NoError(t, err)
	require.Equal(t, "flag", g.Name)
	require.Equal(t, 2*GiB, g.Memory)
	require.Equal(t, "from file", g.Append, "an empty variable is none")
	require.Len(t, g.Disks, 1, "a list is replaced as a whole")
	require.Equal(t, "c", g.Disks[0].Path, "paths from flags are as they are")
	require.Len(t, g.Serials, 2)
	require.Equal(t, Restart, g.OnGuestShutdown)
	for key, want := range map[string]Origin{
		"name": "flag --name", "memory": "env FTVMM_MEMORY", "append": Origin("file " + path), "disk": "flag --disk",
		"serial": "env FTVMM_SERIAL", "cpus": "default", "on_guest_shutdown": "flag --on-guest-shutdown",
	} {
		require.Equal(t, want, origins[key], key)
	}
}

func TestRefusalsNamePlaceKeyAndRemedy(t *testing.T) {
	for _, c := range []struct {
		name, file, text    string
		code                Code
		where, key, message string // parts
		remedy              string
	}{
		{"a typo", "g.toml", "name='a'\nmemroy = '1G'", UnknownKey, "g.toml:2", "memroy", "no such setting", `did you mean "memory"?`},
		{"a typo in a table", "g.toml", "[[disk]]\npath='x'\nreadnly=true", UnknownKey, "g.toml:3", "disk.readnly", "", `did you mean "readonly"?`},
		{"an unknown table", "g.toml", "[[disc]]\npath='x'", UnknownKey, "g.toml:1", "disc", "", `did you mean "disk"?`},
		{"nothing alike", "g.toml", "[[nic]]\nfrobnicate=1", UnknownKey, "g.toml:2", "nic.frobnicate", "", "hostfwd"},
		{"below a value", "g.toml", "memory.size=1", "", "g.toml:1", "memory.size", "", "memory"},
		{"another case", "g.toml", "Memory='1G'", UnknownKey, "g.toml", "Memory", "", `did you mean "memory"?`},
		{"another type", "g.toml", "\ncpus='two'", BadValue, "g.toml:2", "cpus", "a string stands where a whole number belongs", "cpus"},
		{"no table", "g.toml", "disk=1", BadValue, "g.toml:1", "disk", "a list of tables", ""},
		{"a bad size", "g.toml", "memory='lots'", BadValue, "g.toml:1", "memory", `"lots" is no size`, ""},
		{"a bad port", "g.toml", "[[serial]]\nbackend='tty'", BadValue, "g.toml:2", "serial.backend", "none of stdio", ""},
		{"broken", "g.toml", "memory=", BadSyntax, "g.toml:1", "", "", "correct"},
		{"twice", "g.toml", "cpus=1\ncpus=1", BadValue, "g.toml:2", "cpus", "already defined", ""},
		{"JSON: a typo", "g.json", "{\n\"memroy\": 1}", UnknownKey, "g.json:2", "memroy", "", `did you mean "memory"?`},
		{"JSON: in a list", "g.json", `{"disk":[{"path":"x"},{"pth":"y"}]}`, UnknownKey, "g.json:1", "disk.pth", "", `"path"`},
		{"JSON: another case", "g.json", `{"Memory":"1G"}`, UnknownKey, "", "Memory", "", `did you mean "memory"?`},
		{"JSON: twice", "g.json", `{"cpus":1,"cpus":2}`, BadSyntax, "g.json:1", "cpus", "twice", "remove"},
		{"JSON: a type", "g.json", "{\"cpus\":\n\"1\"}", BadValue, "g.json:2", "cpus", "a string stands where a whole number belongs", ""},
		{"JSON: broken", "g.json", "{\n\"cpus\":}", BadSyntax, "g.json:2", "", "", ""},
		{"JSON: no object", "g.json", "[]", BadSyntax, "g.json:1", "", "no object", ""},
		{"JSON: more than one", "g.json", "{}{}", BadSyntax, "g.json:1", "", "follows", ""},
		{"JSON: deep", "g.json", `{"disk":` + strings.Repeat("[", 100), BadSyntax, "", "", "deep", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := Default()
			_, err := Parse(g, []byte(c.text), c.file)
			require.Error(t, err)
			require.Equal(t, Default(), g, "a refused file changes nothing")
			var errs Errors
			require.ErrorAs(t, err, &errs)
			e := errs[0]
			if c.code != "" {
				require.Equal(t, c.code, e.Code, "%v", e)
			}
			require.Contains(t, e.Where, c.where)
			require.Equal(t, c.key, e.Key)
			require.Contains(t, e.Message, c.message)
			require.Contains(t, e.Remedy, c.remedy)
			require.NotEmpty(t, e.Remedy)
			require.NotContains(t, e.Error(), "config.", "Go's names are no concern of the user")
		})
	}
}

func TestBadFlagsAndVariablesAreNamed(t *testing.T) {
	_, _, err := Load(Sources{
		LookupEnv: func(k string) (string, bool) { return "many", k == "FTVMM_CPUS" },
		Flags:     map[string][]string{"memory": {"big"}, "disk": {"path=x,readnly"}, "rng": {"maybe"}},
	})
	var errs Errors
	require.ErrorAs(t, err, &errs)
	var where []string
	for _, e := range errs {
		where = append(where, e.Where)
		require.Equal(t, BadValue, e.Code)
		require.NotEmpty(t, e.Remedy)
	}
	require.Equal(t, []string{"env FTVMM_CPUS", "flag --memory", "flag --disk", "flag --rng"}, where)
	require.Contains(t, errs[2].Message, `did you mean "readonly"?`)
	_, _, err = Load(Sources{File: "/does/not/exist"})
	require.ErrorAs(t, err, &errs)
	require.Equal(t, FileUnreadable, errs[0].Code)
	_, _, err = Load(Sources{File: writeFile(t, "big.toml", strings.Repeat("#\n", MaxFile))})
	require.ErrorAs(t, err, &errs)
	require.Equal(t, FileUnreadable, errs[0].Code)
}

func TestParseDisk(t *testing.T) {
	no := false
	for spec, want := range map[string]Disk{
		"root.img":                        {Path: "root.img"},
		"path=root.img,readonly":          {Path: "root.img", ReadOnly: true},
		"root.img,readonly=off,direct":    {Path: "root.img", Direct: DirectOn},
		"readonly,path=a=b":               {Path: "a=b", ReadOnly: true},
		"path=a,,b,id=x,bootindex=2":      {Path: "a,b", ID: "x", BootIndex: 2},
		"p,queues=4,queue_size=512":       {Path: "p", Queues: 4, QueueSize: 512},
		"p,size=10G,legacy=no,direct=off": {Path: "p", Size: 10 * GiB, Legacy: &no, Direct: DirectOff},
	} {
		d, err := ParseDisk(spec)
		require.NoError(t, err, spec)
		require.Equal(t, want, d, spec)
	}
	for _, spec := range []string{"", ",", "a,", "path=", "path", "path=a,path=b", "a,readonly=perhaps", "a,queues=x", "a,size=x", "a,nonsense", "a,bootindex=99999999999", strings.Repeat("a", maxSpec+1)} {
		_, err := ParseDisk(spec)
		require.Error(t, err, spec)
	}
}

func TestParseNIC(t *testing.T) {
	n, err := ParseNIC("user,hostfwd=tcp:127.0.0.1:1-:2,rom=none,restrict,hostfwd=udp:127.0.0.1:3-:4,bootindex=1,host_loopback=off,mtu=9000")
	require.NoError(t, err)
	require.Equal(t, "none", n.ROM)
	require.Equal(t, 1, n.BootIndex)
	require.Equal(t, "user,mtu=9000,hostfwd=tcp:127.0.0.1:1-:2,hostfwd=udp:127.0.0.1:3-:4,restrict=true,host_loopback=false", n.Spec())
	n, err = ParseNIC("tap=t0,bridge=br,,0")
	require.NoError(t, err)
	require.Equal(t, "tap=t0,bridge=br,,0", n.Spec())
	for _, spec := range []string{"", "mac=52:54:00:00:00:01", "user,", "user,nonsense=1", "user,mac=", "user,mtu=x", "user,mac=a,mac=b", "user,kind=tap"} {
		_, err := ParseNIC(spec)
		require.Error(t, err, spec)
	}
}

// What mirror/nic can do can be configured, under the same names.
func TestNICHasEveryKeyOfItsNetwork(t *testing.T) {
	mine := keysOf(reflect.TypeFor[NIC]())
	theirs := reflect.TypeFor[nic.Spec]()
	var keys []string
	for i := range theirs.NumField() {
		key, _, _ := strings.Cut(theirs.Field(i).Tag.Get("toml"), ",")
		require.Contains(t, mine, key)
		keys = append(keys, key)
	}
	for _, key := range mine {
		if !slices.Contains(cardKeys, key) {
			require.Contains(t, keys, key)
		}
	}
	for _, spec := range []string{
		"user,mac=52:54:00:12:34:56,mtu=9000,net=10.0.2.0/24,hostfwd=tcp:127.0.0.1:5555-:22,bootfile=boot.ipxe,hostname=h,domain=d,resolver=127.0.0.1:53,restrict,host_loopback=off",
		"tap=tap0,bridge=br0,netns=n,create=off,vnet=on",
	} {
		n, err := ParseNIC(spec)
		require.NoError(t, err)
		_, err = nic.ParseNIC(n.Spec())
		require.NoError(t, err, n.Spec())
	}
}

func TestKeysAndFieldsAgree(t *testing.T) {
	var names []string
	for _, k := range Keys() {
		names = append(names, k.Name)
		require.NotEmpty(t, k.Doc)
	}
	require.ElementsMatch(t, keysBelow(""), names)
	for _, typ := range []reflect.Type{reflect.TypeFor[Guest](), reflect.TypeFor[Disk](), reflect.TypeFor[NIC](), reflect.TypeFor[Serial]()} {
		for i := range typ.NumField() {
			f := typ.Field(i)
			require.Equal(t, f.Tag.Get("json"), f.Tag.Get("toml"), "%s.%s", typ, f.Name)
		}
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	image, kernel := filepath.Join(dir, "disk.img"), filepath.Join(dir, "kernel")
	require.NoError(t, os.WriteFile(image, make([]byte, 512), 0o600))
	require.NoError(t, os.WriteFile(kernel, []byte("k"), 0o600))
	ok := func() *Guest {
		g := Default()
		g.Kernel = kernel
		g.Disks = []Disk{{Path: image}}
		g.NICs = []NIC{{Kind: "user", MAC: "52:54:00:00:00:01"}}
		return g
	}
	how := Checks{Guests: []string{"hello", "ledger"}, NIC: func(spec string) error { _, err := nic.ParseNIC(spec); return err }}
	g := ok()
	g.Name, g.UUID = "db-1", "01234567-89ab-CDEF-0123-456789abcdef"
	g.fill()
	require.NoError(t, g.Check(how))

	for _, c := range []struct {
		name   string
		change func(g *Guest)
		code   Code
		key    string
	}{
		{"name", func(g *Guest) { g.Name = "Db" }, BadValue, "name"},
		{"name of digits", func(g *Guest) { g.Name = "123" }, BadValue, "name"},
		{"name with a trick", func(g *Guest) { g.Name = "a/../b" }, BadValue, "name"},
		{"long name", func(g *Guest) { g.Name = strings.Repeat("a", 64) }, BadValue, "name"},
		{"uuid of the wrong length", func(g *Guest) { g.UUID = "01234567-89ab-cdef-0123-456789abcde" }, BadValue, "uuid"},
		{"uuid without dashes", func(g *Guest) { g.UUID = "01234567089ab0cdef001230456789abcdef" }, BadValue, "uuid"},
		{"uuid", func(g *Guest) { g.UUID = "1234" }, BadValue, "uuid"},
		{"little memory", func(g *Guest) { g.Memory = MiB }, MemoryTooSmall, "memory"},
		{"much memory", func(g *Guest) { g.Memory = 2 * TiB }, MemoryTooLarge, "memory"},
		{"odd memory", func(g *Guest) { g.Memory = 4*MiB + 1 }, BadValue, "memory"},
		{"no vCPU", func(g *Guest) { g.CPUs = 0 }, BadValue, "cpus"},
		{"two vCPUs", func(g *Guest) { g.CPUs = 2 }, Unsupported, "cpus"},
		{"cpu", func(g *Guest) { g.CPU = "hst" }, BadValue, "cpu"},
		{"shutdown", func(g *Guest) { g.OnGuestShutdown = "explode" }, BadValue, "on_guest_shutdown"},
		{"rtc", func(g *Guest) { g.RTC = "gmt" }, BadValue, "rtc"},
		{"kvm", func(g *Guest) { g.KVM = "" }, BadValue, "kvm"},
		{"kernel", func(g *Guest) { g.Kernel = "/no/kernel" }, KernelNotFound, "kernel"},
		{"a directory", func(g *Guest) { g.Kernel = dir }, KernelNotFound, "kernel"},
		{"initrd", func(g *Guest) { g.Initrd = "/no/initrd" }, InitrdNotFound, "initrd"},
		{"initrd alone", func(g *Guest) { g.Kernel, g.Initrd = "", kernel }, Conflict, "initrd"},
		{"append alone", func(g *Guest) { g.Kernel, g.Append = "", "x" }, Conflict, "append"},
		{"NUL", func(g *Guest) { g.Append = "a\x00b" }, BadValue, "append"},
		{"two guests", func(g *Guest) { g.Embedded = "hello" }, Conflict, "kernel"},
		{"no such guest", func(g *Guest) { g.Kernel, g.Embedded = "", "leger" }, GuestNotFound, "guest"},
		{"firmware", func(g *Guest) { g.Firmware = "/no/bios.bin" }, FirmwareNotFound, "firmware"},
		{"nothing, no firmware", func(g *Guest) { g.Kernel, g.Firmware = "", FirmwareNone }, NothingToBoot, ""},
		{"nothing, seabios", func(g *Guest) { g.Kernel, g.Disks, g.NICs = "", nil, nil }, NothingToBoot, ""},
		{"image", func(g *Guest) { g.Disks[0].Path = "/no/image" }, ImageNotFound, "disk[0].path"},
		{"no image", func(g *Guest) { g.Disks[0].Path = "" }, BadValue, "disk[0].path"},
		{"no place for an image", func(g *Guest) { g.Disks[0].Path, g.Disks[0].Size = "/no/image", MiB }, NoPermission, "disk[0].path"},
		{"a new image, read-only", func(g *Guest) { g.Disks[0].Size, g.Disks[0].ReadOnly = MiB, true }, Conflict, "disk[0].size"},
		{"half a sector", func(g *Guest) { g.Disks[0].Size = 256 }, BadValue, "disk[0].size"},
		{"an image twice", func(g *Guest) { g.Disks = append(g.Disks, Disk{Path: dir + "/./disk.img", ReadOnly: true}) }, Conflict, "disk[1].path"},
		{"model", func(g *Guest) { g.Disks[0].Model = "ide" }, BadValue, "disk[0].model"},
		{"direct", func(g *Guest) { g.Disks[0].Direct = "yes" }, BadValue, "disk[0].direct"},
		{"queue size", func(g *Guest) { g.Disks[0].QueueSize = 300 }, BadValue, "disk[0].queue_size"},
		{"queues", func(g *Guest) { g.Disks[0].Queues = 99 }, BadValue, "disk[0].queues"},
		{"long ID", func(g *Guest) { g.Disks[0].ID = strings.Repeat("x", 21) }, BadValue, "disk[0].id"},
		{"odd ID", func(g *Guest) { g.Disks[0].ID = "a\nb" }, BadValue, "disk[0].id"},
		{"many disks", func(g *Guest) { g.Disks = make([]Disk, MaxDisks+1) }, TooMany, "disk"},
		{"boot index", func(g *Guest) { g.Disks[0].BootIndex = -1 }, BadValue, "disk[0].bootindex"},
		{"boot index twice", func(g *Guest) { g.Disks[0].BootIndex, g.NICs[0].BootIndex = 1, 1 }, Conflict, "nic[0].bootindex"},
		{"network", func(g *Guest) { g.NICs[0].Kind = "usr" }, BadValue, "nic[0]"},
		{"MAC", func(g *Guest) { g.NICs[0].MAC = "01:00:00:00:00:00" }, BadValue, "nic[0]"},
		{"MAC twice", func(g *Guest) { g.NICs = append(g.NICs, NIC{Kind: "user", MAC: "52-54-00-00-00-01"}) }, Conflict, "nic[1].mac"},
		{"ROM", func(g *Guest) { g.NICs[0].ROM = "/no/rom" }, ROMNotFound, "nic[0].rom"},
		{"many cards", func(g *Guest) { g.NICs = make([]NIC, MaxNICs+1) }, TooMany, "nic"},
		{"many ports", func(g *Guest) { g.Serials = make([]Serial, 3) }, TooMany, "serial"},
		{"stdio twice", func(g *Guest) { g.Console = console.Spec{Kind: console.Stdio} }, Conflict, "console"},
		{"socket twice", func(g *Guest) { g.Control = "/x"; g.Console = console.Spec{Kind: console.Unix, Path: "/x"} }, Conflict, "control"},
		{"long socket", func(g *Guest) { g.Control = "/" + strings.Repeat("x", 107) }, BadValue, "control"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := ok()
			c.change(g)
			g.fill()
			var errs Errors
			require.ErrorAs(t, g.Check(how), &errs)
			for _, e := range errs {
				require.NotEmpty(t, e.Remedy, "%v", e)
				if e.Code == c.code && e.Key == c.key {
					return
				}
			}
			t.Fatalf("no %s about %q among:\n%v", c.code, c.key, errs)
		})
	}
}

func TestCheckDependsOnItsPurpose(t *testing.T) {
	g := Default()
	g.fill()
	require.Error(t, g.Check(Checks{}))
	require.NoError(t, g.Check(Checks{Restoring: true}), "a saved guest needs nothing to boot")
	g.Disks = []Disk{{Path: "/no/image"}}
	g.fill()
	require.Error(t, g.Check(Checks{}))
	require.NoError(t, g.Check(Checks{SkipFiles: true}))
	g.Disks = []Disk{{Path: filepath.Join(t.TempDir(), "new.img"), Size: MiB}}
	g.fill()
	require.NoError(t, g.Check(Checks{}), "a new image can be made in a directory that exists")
}

func TestROMPath(t *testing.T) {
	require.Equal(t, "", NIC{}.ROMPath(), "a card that is not booted from needs no ROM")
	require.Equal(t, "", NIC{ROM: ROMNone, BootIndex: 1}.ROMPath())
	require.Equal(t, "/x", NIC{ROM: "/x"}.ROMPath())
}

func TestControlPath(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	require.Equal(t, "/run/user/7/ftvmm/db1.sock", ControlPath("db1"))
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"256M", "4GiB", "0", "18446744073709551615", "1T", "iB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseSize(s)
		if err != nil {
			return
		}
		again, err := ParseSize(v.String())
		require.NoError(t, err)
		require.Equal(t, v, again)
	})
}

func FuzzParseDisk(f *testing.F) {
	for _, s := range []string{"root.img", "path=a,,b,readonly,id=x,bootindex=2", "p,size=10G,legacy=no,direct=off,queues=1", ",", "a,"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDisk(s)
		if err != nil {
			return
		}
		g := Default()
		g.Disks = []Disk{d}
		g.fill()
		_ = g.Check(Checks{SkipFiles: true, Restoring: true})
	})
}

func FuzzParseNIC(f *testing.F) {
	for _, s := range []string{"user", "tap=t0,bridge=br,,0", "user,hostfwd=tcp:127.0.0.1:1-:2,rom=none,restrict,mtu=9000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseNIC(s)
		if err != nil {
			return
		}
		again, err := ParseNIC(n.Spec())
		if err != nil {
			require.Empty(t, n.Kind, "%q becomes %q: %v", s, n.Spec(), err)
			return
		}
		require.Equal(t, n.Spec(), again.Spec())
	})
}

func fuzzParse(f *testing.F, name string) {
	f.Fuzz(func(t *testing.T, text []byte) {
		g := Default()
		_, err := Parse(g, text, name)
		if err != nil {
			var errs Errors
			require.ErrorAs(t, err, &errs)
			require.NotEmpty(t, errs)
			for _, e := range errs {
				require.NotEmpty(t, e.Remedy)
			}
			require.Equal(t, Default(), g)
			return
		}
		g.fill()
		_ = g.Check(Checks{SkipFiles: true, Guests: []string{"hello"}})
		// What was accepted can be shown and is accepted again.
		out, err := json.Marshal(g)
		require.NoError(t, err)
		back := Default()
		_, err = Parse(back, out, "back.json")
		require.NoError(t, err, "%s", out)
	})
}

func FuzzParseTOML(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("memory=1\n[[disk]]\npath='x'\n[nic]\n"))
	f.Add([]byte("disk=[{path='q', raedonly=true}]\na.b.c=1"))
	fuzzParse(f, "fuzz.toml")
}

func FuzzParseJSON(f *testing.F) {
	f.Add([]byte(`{"memory":"1G","disk":[{"path":"x","size":512}],"nic":[{"kind":"user","hostfwd":["a"]}],"serial":[{"backend":"pty"}]}`))
	f.Add([]byte(`{"cpus":null,"disk":[[]],"x":{"y":[1,{}]}}`))
	fuzzParse(f, "fuzz.json")
}

func TestShow(t *testing.T) {
	g, origins, err := Load(Sources{Flags: map[string][]string{"memory": {"1G"}, "disk": {"a.img,readonly", "b.img"}, "nic": {"user"}}})
	require.NoError(t, err)
	var out strings.Builder
	require.NoError(t, g.Show(&out, origins, false, true))
	require.Contains(t, out.String(), "# flag --memory\nmemory = '1G'\n")
	require.NotContains(t, out.String(), "cpus")
	out.Reset()
	require.NoError(t, g.Show(&out, origins, true, true))
	require.Contains(t, out.String(), "# default\ncpus = 1\n")
	back := Default()
	_, err = Parse(back, []byte(out.String()), "shown.toml")
	require.NoError(t, err, out.String())
	require.Equal(t, g, back)
}
