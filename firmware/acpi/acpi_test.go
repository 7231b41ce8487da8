package acpi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

// tool returns the path of one of acpica-tools. Without them nothing here is worth
// believing, so their absence is a failure.
func tool(t *testing.T, name string) string {
	p, err := exec.LookPath(name)
	require.NoError(t, err, "%s is missing: apt-get install acpica-tools", name)
	return p
}

func run(t *testing.T, dir, name string, args ...string) string {
	cmd := exec.Command(tool(t, name), args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s %v:\n%s", name, args, out)
	return string(out)
}

var configs = map[string]Config{
	"small": {CPUs: 1, LowRAMEnd: 128 << 20, COM1: true},
	"large": {CPUs: 255, LowRAMEnd: 0xc000_0000, PCI64Base: 0x10_0000_0000, PCI64Size: 0x4_0000_0000,
		COM1: true, COM2: true, I8042: true, VGA: true},
}

// install places the tables at the usual address and returns each by its signature.
func install(t *testing.T, c Config) (mem *memory.Memory, tables map[string][]byte) {
	const base = 0xe_0000
	tabs, err := Build(c)
	require.NoError(t, err)
	mem, err = memory.New(memory.Extent{Base: 0, Size: 1 << 20})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, mem.Close()) })
	rsdp, err := tabs.Install(mem, base)
	require.NoError(t, err)
	require.EqualValues(t, base, rsdp)

	root, err := mem.View(rsdp, rsdpSize)
	require.NoError(t, err)
	require.Equal(t, "RSD PTR ", string(root[:8]))
	require.Zero(t, sum(root[:rsdpSizeV1]))
	require.Zero(t, sum(root))
	tables = map[string][]byte{}
	visit := func(addr uint64) {
		n, err := mem.Uint32(addr + lengthOffset)
		require.NoError(t, err)
		b, err := mem.View(addr, uint64(n))
		require.NoError(t, err)
		sig := string(b[:4])
		if old, ok := tables[sig]; ok {
			require.Equal(t, &old[0], &b[0], "two tables %s", sig)
		}
		tables[sig] = b
	}
	le := binary.LittleEndian
	visit(uint64(le.Uint32(root[rsdpRSDT:])))
	visit(le.Uint64(root[rsdpXSDT:]))
	for b := tables["RSDT"][headerSize:]; len(b) > 0; b = b[4:] {
		visit(uint64(le.Uint32(b)))
	}
	for b := tables["XSDT"][headerSize:]; len(b) > 0; b = b[8:] {
		visit(le.Uint64(b))
	}
	fadt := tables["FACP"]
	visit(uint64(le.Uint32(fadt[fadtFACS:])))
	require.Zero(t, le.Uint32(fadt[fadtFACS:])%tablesAlign)
	visit(uint64(le.Uint32(fadt[fadtDSDT:])))
	visit(le.Uint64(fadt[fadtXDSDT:]))
	return mem, tables
}

func sum(b []byte) (s byte) {
	for _, v := range b {
		s += v
	}
	return s
}

func TestInstalledTablesAreLinkedAndSummed(t *testing.T) {
	for name, c := range configs {
		t.Run(name, func(t *testing.T) {
			_, tables := install(t, c)
			var sigs []string
			for _, s := range []string{"APIC", "DSDT", "FACP", "FACS", "RSDT", "WAET", "XSDT"} {
				require.Contains(t, tables, s)
				sigs = append(sigs, s)
				if s != "FACS" {
					require.Zero(t, sum(tables[s]), s)
				}
			}
			require.Len(t, tables, len(sigs))
		})
	}
}

// iasl takes each table apart, and what it says compiles again without a remark to
// the same bytes.
func TestTablesAreCleanUnderIASL(t *testing.T) {
	for name, c := range configs {
		t.Run(name, func(t *testing.T) {
			_, tables := install(t, c)
			for sig, b := range tables {
				dir := t.TempDir()
				file := strings.ToLower(sig)
				require.NoError(t, os.WriteFile(filepath.Join(dir, file+".dat"), b, 0o644))
				out := run(t, dir, "iasl", "-d", file+".dat")
				for _, word := range []string{"Error", "Warning", "Invalid", "Incorrect", "Could not"} {
					require.NotContains(t, out, word, "disassembly of %s", sig)
				}
				dsl, err := os.ReadFile(filepath.Join(dir, file+".dsl"))
				require.NoError(t, err)
				for _, word := range []string{"ERROR", "WARNING", "Unknown", "Invalid", "External ("} {
					require.NotContains(t, string(dsl), word, "disassembly of %s", sig)
				}
				// 3168 is the remark that Processor () is a legacy keyword, which it is on purpose.
				out = run(t, dir, "iasl", "-vw", "3168", "-oa", "-p", "again", file+".dsl")
				require.NotRegexp(t, `(?m)^(Error|Warning|Remark) `, out)
				again, err := os.ReadFile(filepath.Join(dir, "again.aml"))
				require.NoError(t, err)
				want := bytes.Clone(b)
				require.Equal(t, len(want), len(again), sig)
				if sig != "FACS" { // iasl puts its own name and version in the header
					copy(want[28:36], again[28:36])
					want[checksumOffset] = again[checksumOffset]
				}
				require.True(t, bytes.Equal(want, again), "%s compiles to other bytes", sig)
			}
		})
	}
}

// acpiexec runs commands in acpiexec on the tables and returns what it prints.
func acpiexec(t *testing.T, tables map[string][]byte, commands ...string) string {
	dir := t.TempDir()
	args := []string{"-b", strings.Join(commands, ";"), "-dt"}
	for _, sig := range []string{"DSDT", "FACP", "APIC", "WAET", "SSDT"} {
		if tables[sig] == nil {
			continue
		}
		name := strings.ToLower(sig) + ".aml"
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), tables[sig], 0o644))
		args = append(args, name)
	}
	return run(t, dir, "acpiexec", args...)
}

// probes is a secondary table that calls what the DSDT declares, as an operating
// system would: methods with one argument and a small result.
const probes = `DefinitionBlock ("", "SSDT", 1, "FTVMM", "PROBE", 1) {
	External (\_SB.PCI0._PRT, PkgObj)
	External (\_SB.LNKA._CRS, MethodObj)
	External (\_SB.LNKA._PRS, BuffObj)
	External (\_SB.LNKA._SRS, MethodObj)
	External (\_SB.LNKA._DIS, MethodObj)
	Method (ROUT, 1) { Return (DerefOf (Index (\_SB.PCI0._PRT, Arg0))) }
	Method (SETA, 1, Serialized) {
		Name (BUFF, ResourceTemplate () { Interrupt (ResourceConsumer, Level, ActiveHigh, Shared) {5} })
		CreateDWordField (BUFF, 5, NUMB)
		Store (Arg0, NUMB)
		\_SB.LNKA._SRS (BUFF)
	}
	Method (GETA, 0, Serialized) {
		Store (\_SB.LNKA._CRS (), Local0)
		CreateDWordField (Local0, 5, NUMB)
		Return (NUMB)
	}
	Method (DISA) { \_SB.LNKA._DIS () }
}`

// results returns the integers and the names that each evaluation printed.
func results(t *testing.T, c Config, commands ...string) [][]string {
	_, tables := install(t, c)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "probe.asl"), []byte(probes), 0o644))
	run(t, dir, "iasl", "-p", "probe", "probe.asl")
	ssdt, err := os.ReadFile(filepath.Join(dir, "probe.aml"))
	require.NoError(t, err)
	tables["SSDT"] = ssdt
	out := acpiexec(t, tables, commands...)
	for _, line := range strings.Split(out, "\n") {
		// acpiexec exercises hardware that it simulates first ("Unexpected AE_..."): not ours.
		if !strings.HasPrefix(line, "Unexpected AE_") {
			require.NotRegexp(t, `AE_[A-Z]|(Error|Warning|Exception)\b|Excess arguments`, line)
		}
	}
	var r [][]string
	value := regexp.MustCompile(`\[Integer\] = (\S+)|\[Object Reference\] .* Name (\S+) Device`)
	for i, part := range strings.Split(out, "\nEvaluating ") {
		if i == 0 {
			continue
		}
		var v []string
		for _, m := range value.FindAllStringSubmatch(part, -1) {
			v = append(v, m[1]+m[2])
		}
		r = append(r, v)
	}
	require.Len(t, r, len(commands), out)
	return r
}

func hex(v uint32) string { return fmt.Sprintf("%016X", v) }

func TestPowerOffIsSleepTypeZero(t *testing.T) {
	z := hex(0)
	require.Equal(t, [][]string{{z, z, z, z}}, results(t, configs["small"], `evaluate \_S5`))
}

// The convention that the PIIX3 and the PCI bus of this machine implement.
func TestPCIPinsReachTheirLinkDevices(t *testing.T) {
	pins := []struct {
		slot, pin uint32
		link      string
	}{
		{0, 0, "LNKD"}, {1, 0, "LNKS"}, {1, 1, "LNKB"}, {1, 3, "LNKD"}, {2, 0, "LNKB"}, {2, 3, "LNKA"},
		{3, 0, "LNKC"}, {4, 0, "LNKD"}, {5, 0, "LNKA"}, {31, 3, "LNKB"},
	}
	var commands []string
	var want [][]string
	for _, p := range pins {
		commands = append(commands, fmt.Sprintf(`evaluate \ROUT %#x`, p.slot*pciPins+p.pin))
		want = append(want, []string{hex(p.slot<<16 | 0xffff), hex(p.pin), p.link, hex(0)})
	}
	require.Equal(t, want, results(t, configs["large"], commands...))
}

func TestLinkDeviceFollowsItsRegister(t *testing.T) {
	on, off := []string{hex(staLinkOn)}, []string{hex(staLinkOff)}
	require.Equal(t, [][]string{nil, {hex(11)}, on, nil, off, nil, {hex(5)}, on}, results(t, configs["small"],
		`evaluate \SETA 0xb`, `evaluate \GETA`, `evaluate \_SB.LNKA._STA`,
		`evaluate \DISA`, `evaluate \_SB.LNKA._STA`,
		`evaluate \SETA 5`, `evaluate \GETA`, `evaluate \_SB.LNKA._STA`))
}

func TestResourcesOfTheBusAndTheLinks(t *testing.T) {
	for name, want := range map[string][]string{
		"small": {"08000000-FEBFFFFF"},
		"large": {"C0000000-FEBFFFFF", "0000001000000000-00000013FFFFFFFF"},
	} {
		t.Run(name, func(t *testing.T) {
			_, tables := install(t, configs[name])
			out := acpiexec(t, tables, `resources \_SB.PCI0`, `resources \_SB.LNKB`)
			var ranges []string
			for _, m := range regexp.MustCompile(`Address Minimum : (\S+)\s+Address Maximum : (\S+)`).FindAllStringSubmatch(out, -1) {
				ranges = append(ranges, m[1]+"-"+m[2])
			}
			require.Equal(t, append([]string{"0000-00FF", "0CF8-0CF8", "0000-0CF7", "0D00-FFFF", "000A0000-000BFFFF"}, want...), ranges)
			var choice []string
			for _, m := range regexp.MustCompile(`Dword0[0-9] : 000000(\S+)`).FindAllStringSubmatch(out, -1) {
				choice = append(choice, m[1])
			}
			require.Equal(t, []string{"00", "05", "0A", "0B"}, choice, "_CRS, then _PRS")
		})
	}
}

func TestFADTSaysWhatTheBoardHas(t *testing.T) {
	_, tables := install(t, configs["small"])
	b, le := tables["FACP"], binary.LittleEndian
	require.EqualValues(t, 0x600, le.Uint32(b[fadtPM1Event:]))
	require.EqualValues(t, 0x604, le.Uint32(b[fadtPM1Control:]))
	require.EqualValues(t, 0x608, le.Uint32(b[fadtPMTimer:]))
	require.EqualValues(t, 0xafe0, le.Uint32(b[fadtGPE0:]))
	require.EqualValues(t, 9, le.Uint16(b[fadtSCI:]))
	require.Equal(t, []byte{1, 8, 0, 0, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6}, b[fadtReset:fadtReset+13])
	require.EqualValues(t, archLegacy|archNoVGA, le.Uint16(b[fadtBootArch:]))
	_, tables = install(t, configs["large"])
	require.EqualValues(t, archLegacy|arch8042, le.Uint16(tables["FACP"][fadtBootArch:]))
}

func TestMADTListsTheInterruptHardware(t *testing.T) {
	_, tables := install(t, Config{CPUs: 2, LowRAMEnd: 64 << 20})
	require.Equal(t, []byte{
		0, 0, 0xe0, 0xfe, 1, 0, 0, 0,
		0, 8, 0, 0, 1, 0, 0, 0,
		0, 8, 1, 1, 1, 0, 0, 0,
		1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0,
		2, 10, 0, 0, 2, 0, 0, 0, 0, 0,
		2, 10, 0, 5, 5, 0, 0, 0, 0x0d, 0,
		2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0,
		2, 10, 0, 10, 10, 0, 0, 0, 0x0d, 0,
		2, 10, 0, 11, 11, 0, 0, 0, 0x0d, 0,
		4, 6, 0xff, 0, 0, 1,
	}, tables["APIC"][headerSize:])
}

func TestBuildRefusesImpossibleMachines(t *testing.T) {
	for _, c := range []Config{
		{CPUs: 0, LowRAMEnd: 1 << 30}, {CPUs: 256, LowRAMEnd: 1 << 30}, {CPUs: 1, LowRAMEnd: 0xfec0_0000},
		{CPUs: 1, LowRAMEnd: 1<<30 + 1}, {CPUs: 1, LowRAMEnd: 0xa_0000}, {CPUs: 1, LowRAMEnd: 1 << 30, PMBase: 0x601},
		{CPUs: 1, LowRAMEnd: 1 << 30, PCI64Base: 1 << 31, PCI64Size: 4096},
		{CPUs: 1, LowRAMEnd: 1 << 30, PCI64Base: 1 << 63, PCI64Size: 1 << 63},
	} {
		_, err := Build(c)
		require.Error(t, err, "%+v", c)
	}
}

func TestInstallNeedsRoomAndAlignment(t *testing.T) {
	tabs, err := Build(configs["small"])
	require.NoError(t, err)
	mem, err := memory.New(memory.Extent{Base: 0, Size: 1 << 20})
	require.NoError(t, err)
	defer mem.Close()
	for _, base := range []uint64{0xe_0010, 0xf_ffc0, 1 << 32, 1<<64 - 64} {
		_, err = tabs.Install(mem, base)
		require.Error(t, err, "%#x", base)
	}
}

// Equal configurations give equal bytes: both hosts of a pair build their own.
func TestBuildIsAFunctionOfItsConfig(t *testing.T) {
	a, err := Build(configs["large"])
	require.NoError(t, err)
	b, err := Build(configs["large"])
	require.NoError(t, err)
	require.Equal(t, a, b)
	require.Zero(t, len(a.Loader)%commandSize)
}

// The script is ours, but what runs it must survive any.
func FuzzLink(f *testing.F) {
	tabs, err := Build(configs["small"])
	require.NoError(f, err)
	f.Add(tabs.Loader)
	for i := 0; i < len(tabs.Loader); i += 7 * commandSize {
		f.Add(tabs.Loader[i : i+commandSize])
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		a, b, err := Tables{RSDP: tabs.RSDP, Tables: tabs.Tables, Loader: script}.link(0xe_0000, 0xe_0040)
		if err == nil {
			require.Len(t, a, len(tabs.RSDP))
			require.Len(t, b, len(tabs.Tables))
		}
	})
}
