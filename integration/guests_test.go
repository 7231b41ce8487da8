package integration

import (
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// claims are the lines of a guest's output that say what it has found: the same on every
// machine that keeps to the specifications.
func claims(out string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.ReplaceAll(out, "\r", "")) {
		if strings.HasPrefix(line, "ok ") || strings.HasPrefix(line, "FAIL ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// Every test guest says on this machine what it says on QEMU (the transcripts in
// guests/testdata were taken there).
func TestGuestsFindTheMachineThatQEMUIs(t *testing.T) {
	for _, c := range []struct {
		transcript, image, cmdline string
		end                        vmm.ExitReason
		code                       uint32
	}{
		{"hello", "hello", "one=2 three", vmm.ExitDebugExit, 0},
		// Its hashes hold what port 0x80 reads: the last code, as on a PIIX, where QEMU reads ones.
		{"", "storm", "n=300", vmm.ExitDebugExit, 0},
		{"", "storm", "n=300 cpl=0", vmm.ExitDebugExit, 0},
		{"storm-unknown", "storm", "mode=hail", vmm.ExitDebugExit, 1},
		{"compute", "compute", "size=1m rounds=3 exit_every=10000 report=1", vmm.ExitDebugExit, 0},
		{"timers", "timers", "ms=20 no=rtc", vmm.ExitDebugExit, 0},
		{"timers-rtc", "timers", "ms=20", vmm.ExitDebugExit, 0},
		{"irq", "irq", "", vmm.ExitDebugExit, 0},
		// QEMU has other tables and a PM timer of 24 bits: no transcript, but no complaint.
		{"", "acpi", "", vmm.ExitDebugExit, 0},
		{"", "acpi", "off", vmm.ExitPowerOff, 0},
		{"acpi-reset-cf9", "acpi", "reset=cf9", vmm.ExitDebugExit, 0},
		{"acpi-reset-triple", "acpi", "reset=triple", vmm.ExitCrash, 0},
		{"ports", "ports", "", vmm.ExitDebugExit, 0},
		{"ports-cpl0", "ports", "cpl=0", vmm.ExitDebugExit, 0},
	} {
		t.Run(c.image+" "+c.cmdline, func(t *testing.T) {
			if c.transcript == "ports-cpl0" && !slow {
				t.Skip("a minute and more where guest kernel code is emulated: run by ./build.sh test-slow (tag slow)")
			}
			kernel, err := guests.Image(c.image)
			require.NoError(t, err)
			console := newTerminal()
			m, err := vmm.New(vmm.Config{
				Memory: 128 << 20, Kernel: kernel, Cmdline: c.cmdline, Serial: []vmm.Console{console}, RNG: true,
			})
			require.NoError(t, err)
			defer m.Close()
			end := run(t, m, 5*time.Minute)
			switch {
			case c.end == vmm.ExitCrash:
			case c.transcript == "":
				require.Contains(t, claims(console.String()), "ok ")
				require.NotContains(t, claims(console.String()), "FAIL")
			default:
				want, err := os.ReadFile(filepath.Join("guests", "testdata", c.transcript+".txt"))
				require.NoError(t, err)
				require.Equal(t, claims(string(want)), claims(console.String()), "%s", console)
			}
			require.Equal(t, c.end, end.Reason, "%+v\n%s", end, console)
			require.Equal(t, c.code, end.Code, "%s", console)
		})
	}
}

// The ACPI tables that a guest finds are, byte for byte, those that the firmware package installs.
func TestGuestReadsTheTablesThatWereBuilt(t *testing.T) {
	const ram = 64 << 20
	console := newTerminal()
	m, err := vmm.New(vmm.Config{Memory: ram, Kernel: guest(t, "acpi"), Cmdline: "dump", Serial: []vmm.Console{console}})
	require.NoError(t, err)
	defer m.Close()
	require.Equal(t, vmm.ExitDebugExit, run(t, m, time.Minute).Reason)
	found := map[string][]byte{}
	for line := range strings.Lines(console.String()) {
		f := strings.Fields(line)
		if len(f) == 4 && f[0] == "hex" {
			b, err := hex.DecodeString(f[3])
			require.NoError(t, err)
			found[f[1]] = append(found[f[1]], b...)
		}
	}

	extents, err := firmware.Layout(ram, 0)
	require.NoError(t, err)
	mem, err := memory.New(extents...)
	require.NoError(t, err)
	defer mem.Close()
	rsdp, err := firmware.Install(mem, firmware.Config{RAM: ram, CPUs: 1, COM1: true, PMBase: 0x600})
	require.NoError(t, err)
	xsdt, err := mem.Uint64(rsdp + 24)
	require.NoError(t, err)
	table := func(at uint64) (string, []byte) {
		n, err := mem.Uint32(at + 4)
		require.NoError(t, err)
		b, err := mem.View(at, uint64(n))
		require.NoError(t, err)
		return string(b[:4]), b
	}
	_, root := table(xsdt)
	compared := 0
	for o := 36; o < len(root); o += 8 {
		name, b := table(binary.LittleEndian.Uint64(root[o:]))
		require.Equal(t, b, found[name], name)
		compared++
		if name == "FACP" {
			dsdt, err := mem.Uint32(binary.LittleEndian.Uint64(root[o:]) + 40)
			require.NoError(t, err)
			_, b := table(uint64(dsdt))
			require.Equal(t, b, found["DSDT"])
			compared++
		}
	}
	require.Equal(t, 4, compared, "FADT, DSDT, MADT, WAET")
}
