package guests

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the transcripts that QEMU gives to testdata")

const qemuBinary = "qemu-system-x86_64"

// runLimit bounds one run of QEMU; nothing measures time by it.
const runLimit = time.Minute

// tcg interprets guests: everything works and a boot takes a tenth of a second. kvm is
// what users have; on a host that emulates guest kernel code its firmware takes
// seconds, and the guests prove that they keep to the instructions that work there.
const (
	tcg = "accel=tcg"
	kvm = "accel=kvm,kernel-irqchip=off"
)

type qemu struct {
	accel string
	args  []string
}

func newQEMU(t *testing.T, accel string, args ...string) *qemu {
	t.Helper()
	if _, err := exec.LookPath(qemuBinary); err != nil {
		t.Skipf("no oracle: %s is not installed (apt-get install qemu-system-x86)", qemuBinary)
	}
	if accel == kvm {
		f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			t.Skipf("no KVM: %v", err)
		}
		f.Close()
	}
	return &qemu{accel: accel, args: args}
}

func (q *qemu) command(ctx context.Context, args ...string) *exec.Cmd {
	all := append([]string{"-machine", "pc," + q.accel, "-cpu", "qemu64", "-nodefaults", "-display", "none", "-m", "128",
		"-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"}, q.args...)
	return exec.CommandContext(ctx, qemuBinary, append(all, args...)...)
}

// run returns what came on COM1, and QEMU's exit code.
func (q *qemu) run(t *testing.T, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	cmd := q.command(ctx, args...)
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || !exit.Exited()) {
		t.Fatalf("%v: %v\n%s\n%s", cmd.Args, err, log.Bytes(), out.Bytes())
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// kernel writes an image to a file that QEMU can read.
func kernel(t *testing.T, name string) string {
	t.Helper()
	image, err := Image(name)
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), filepath.Base(t.Name()))
	require.NoError(t, os.WriteFile(path, image, 0o600))
	return path
}

// TestTranscripts runs each guest twice on the oracle: both runs claim the same, and it is
// what testdata says.
func TestTranscripts(t *testing.T) {
	tests := []struct {
		name, image, cmdline string
		args                 []string
		code                 int // of QEMU
	}{
		{"hello", "hello", "one=2 three", nil, 1},
		{"storm", "storm", "n=300", nil, 1},
		{"storm-cpl0", "storm", "n=300 cpl=0", nil, 1},
		{"storm-unknown", "storm", "mode=hail", nil, 3},
		{"compute", "compute", "size=1m rounds=3 exit_every=10000 report=1", nil, 1},
		{"timers", "timers", "ms=20 no=rtc", nil, 1},
		{"timers-rtc", "timers", "ms=20", nil, 1},
		{"irq", "irq", "", nil, 1},
		{"pci", "pci", "", []string{"-device", "virtio-rng-pci,addr=5"}, 1},
		{"acpi", "acpi", "", nil, 1},
		{"acpi-off", "acpi", "off timer", nil, 0},
		{"acpi-reset-cf9", "acpi", "reset=cf9", nil, 1},
		{"acpi-reset-kbd", "acpi", "reset=kbd", nil, 1},
		{"acpi-reset-triple", "acpi", "reset=triple", nil, 1},
		{"ports", "ports", "", nil, 1},
		{"ports-cpl0", "ports", "cpl=0", nil, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			q := newQEMU(t, tcg, tt.args...)
			path := kernel(t, tt.image)
			first, code := q.run(t, "-kernel", path, "-append", tt.cmdline)
			require.Equal(t, tt.code, code, "%s", first)
			second, _ := q.run(t, "-kernel", path, "-append", tt.cmdline)
			require.Equal(t, claims(first), claims(second), "two runs differ")
			compareTranscript(t, tt.name, claims(first))
		})
	}
}

func compareTranscript(t *testing.T, name, got string) {
	t.Helper()
	golden := filepath.Join("testdata", name+".txt")
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(golden, []byte(got), 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), got)
}

func TestFirstExitsAtOnce(t *testing.T) {
	out, code := newQEMU(t, tcg).run(t, "-kernel", kernel(t, "first"))
	require.Equal(t, 1, code)
	require.Empty(t, out)
}

func TestMultiboot(t *testing.T) {
	out, code := newQEMU(t, tcg).run(t, "-kernel", kernel(t, "hello-mb.elf"), "-append", "one=2")
	require.Equal(t, 1, code)
	require.Contains(t, out, " one=2\n")
	require.Contains(t, out, "ok loader multiboot\n")
}

func TestComputeAgreesWithGo(t *testing.T) {
	out, code := newQEMU(t, tcg).run(t, "-kernel", kernel(t, "compute"), "-append", "size=100k rounds=5")
	require.Equal(t, 1, code)
	sum, memory := computeSums(25, 5)
	require.Equal(t, fmt.Sprintf("ok vector %016x\nok compute pages 25 rounds 5 sum %016x memory %016x\n", sum, sum, memory), out)
}

// TestKVM runs what is most sensitive to the CPU under the host's KVM.
func TestKVM(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds where KVM emulates firmware; left out by -short")
	}
	for _, name := range []string{"irq", "storm"} {
		t.Run(name, func(t *testing.T) {
			q := newQEMU(t, kvm)
			out, code := q.run(t, "-kernel", kernel(t, name), "-append", "n=300")
			require.Equal(t, 1, code, "%s", out)
			compareTranscript(t, name, claims(out))
		})
	}
}

func TestBootSectorReadsTheDisk(t *testing.T) {
	const blocks, sectors, stride = 20, 8, 9
	data := make([]byte, 2<<20) // SeaBIOS does not boot from less than a cylinder
	for i := SectorSize; i < len(data); i += 4 {
		binary.LittleEndian.PutUint32(data[i:], uint32(i)*2654435761)
	}
	var sum uint32
	for b := range blocks {
		at := (1 + b*stride) * SectorSize
		for i := at; i < at+sectors*SectorSize; i += 4 {
			sum += binary.LittleEndian.Uint32(data[i:])
		}
	}
	tests := []struct {
		name   string
		first  uint64
		sum    bool
		output string
		code   int
	}{
		{"sum", 1, true, fmt.Sprintf("ok read %04x sum %08x\n", blocks, sum), 1},
		{"no sum", 1, false, fmt.Sprintf("ok read %04x sum 00000000\n", blocks), 1},
		{"past the end", 1 << 20, true, "FAIL read 0000 error ", 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			boot, err := BootSector(BootRead{First: tt.first, Stride: stride, Blocks: blocks, Sectors: sectors, Sum: tt.sum})
			require.NoError(t, err)
			copy(data, boot)
			path := filepath.Join(t.TempDir(), "disk")
			require.NoError(t, os.WriteFile(path, data, 0o600))
			out, code := newQEMU(t, tcg).run(t, "-drive", "if=virtio,format=raw,file="+path)
			require.Equal(t, tt.code, code, "%s", out)
			require.Contains(t, out, "bootsector\n\n"+tt.output)
		})
	}
}

// TestPowerButton presses the button once the guest says that it waits.
func TestPowerButton(t *testing.T) {
	q := newQEMU(t, tcg)
	socket := filepath.Join(t.TempDir(), "qmp")
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	cmd := q.command(ctx, "-kernel", kernel(t, "acpi"), "-append", "wait=power off", "-qmp", "unix:"+socket+",server=on,wait=off")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var out bytes.Buffer
	buf := make([]byte, 4096)
	for pressed := false; ; {
		n, err := stdout.Read(buf)
		out.Write(buf[:n])
		if err != nil {
			break
		}
		if !pressed && bytes.Contains(out.Bytes(), []byte("waiting for the power button")) {
			pressed = true
			pressPowerButton(t, socket)
		}
	}
	require.NoError(t, cmd.Wait(), "%s", out.Bytes())
	compareTranscript(t, "acpi-power", claims(out.String()))
}

func pressPowerButton(t *testing.T, socket string) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	in := json.NewDecoder(conn)
	var answer map[string]any
	require.NoError(t, in.Decode(&answer)) // the greeting
	for _, command := range []string{"qmp_capabilities", "system_powerdown"} {
		require.NoError(t, json.NewEncoder(conn).Encode(map[string]string{"execute": command}))
		require.NoError(t, in.Decode(&answer))
		require.NotContains(t, answer, "error")
	}
}

func TestExitStatus(t *testing.T) {
	for _, tt := range []struct {
		qemu, status int
		ok           bool
	}{{1, 0, true}, {3, 1, true}, {61, 30, true}, {0, 0, false}} {
		status, ok := ExitStatus(tt.qemu)
		require.Equal(t, tt.ok, ok)
		require.Equal(t, tt.status, status)
	}
}
