package boot

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/devices/fwcfg"
	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/firmware/optionrom"
)

// fwcfgBytes reads n bytes of an item through the data port.
func fwcfgBytes(d *fwcfg.Device, key uint16, n int) []byte {
	d.Write(0, 2, uint64(key))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(d.Read(1, 1))
	}
	return b
}

func fwcfgUint32(d *fwcfg.Device, key uint16) uint32 {
	return binary.LittleEndian.Uint32(fwcfgBytes(d, key, 4))
}

func TestOnBIOSFillsTheItemsThatTheROMReads(t *testing.T) {
	d := fwcfg.New(nil)
	rom, err := OnBIOS(d, params(testLinux))
	require.NoError(t, err)
	require.Equal(t, ROMName, rom.Name)
	require.Equal(t, optionrom.Linux, rom.Data)
	require.EqualValues(t, 5*sector, fwcfgUint32(d, fwcfg.KeySetupSize))
	setup := fwcfgBytes(d, fwcfg.KeySetupData, 5*sector)
	require.Equal(t, testLinux[:0x1f1], setup[:0x1f1])
	require.EqualValues(t, fwcfgUint32(d, fwcfg.KeyCmdlineAddr), binary.LittleEndian.Uint32(setup[0x228:]))
	require.Equal(t, "console=ttyS0 quiet\x00", string(fwcfgBytes(d, fwcfg.KeyCmdlineData, int(fwcfgUint32(d, fwcfg.KeyCmdlineSize)))))
	initrd := fwcfgUint32(d, fwcfg.KeyInitrdAddr)
	require.EqualValues(t, testRAM-biosReserve-4096, initrd)
	require.EqualValues(t, initrd, binary.LittleEndian.Uint32(setup[0x218:]))
	require.EqualValues(t, len("initial"), binary.LittleEndian.Uint32(setup[0x21c:]))
	require.EqualValues(t, 1<<20, fwcfgUint32(d, fwcfg.KeyKernelAddr))
	n := int(fwcfgUint32(d, fwcfg.KeyKernelSize))
	require.True(t, bytes.Equal(testLinux[5*sector:], fwcfgBytes(d, fwcfg.KeyKernelData, n)))
	require.Equal(t, byte(0), testLinux[0x210], "the caller's file is not changed")
}

func TestOnBIOSRefuses(t *testing.T) {
	old := bytes.Clone(testLinux32)
	copy(old[0x206:], le(uint16(0x0201)))
	large := bytes.Clone(testLinux)
	large[headerOffset] = 200
	for name, f := range map[string]func(*Params){
		"ELF":        func(p *Params) { p.Kernel = testELF },
		"old":        func(p *Params) { p.Kernel = old },
		"cut off":    func(p *Params) { p.Kernel = testLinux[:5*sector] },
		"large":      func(p *Params) { p.Kernel = append(large, make([]byte, 1<<20)...) },
		"cmdline":    func(p *Params) { p.Cmdline = string(make([]byte, 300)) },
		"no memory":  func(p *Params) { p.E820 = p.E820[:1] },
		"big initrd": func(p *Params) { p.Initrd = make([]byte, testRAM) },
		"big kernel": func(p *Params) { p.Kernel = append(bytes.Clone(testLinux), make([]byte, testRAM)...) },
	} {
		p := params(testLinux)
		f(&p)
		_, err := OnBIOS(fwcfg.New(nil), p)
		var e *firmware.Error
		require.ErrorAs(t, err, &e, name)
	}
}

func FuzzOnBIOS(f *testing.F) {
	f.Add(testLinux)
	f.Add(testLinux32)
	f.Fuzz(func(t *testing.T, file []byte) {
		d := fwcfg.New(nil)
		if _, err := OnBIOS(d, params(file)); err == nil {
			require.LessOrEqual(t, uint64(fwcfgUint32(d, fwcfg.KeyKernelAddr))+uint64(fwcfgUint32(d, fwcfg.KeyKernelSize)), uint64(testRAM))
			require.LessOrEqual(t, biosSetup+fwcfgUint32(d, fwcfg.KeySetupSize), uint32(biosCmdline))
		}
	})
}

// The ROM runs under the SeaBIOS for which it was made: on QEMU, in place of QEMU's
// own, whose items have the same meaning as ours.
func TestROMStartsAKernelUnderSeaBIOS(t *testing.T) {
	for _, tool := range []string{"as", "ld", "qemu-system-x86_64"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("cannot try the ROM on QEMU: %v (apt-get install binutils qemu-system-x86)", err)
		}
	}
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	run := func(name string, args ...string) ([]byte, error) { return exec.Command(name, args...).CombinedOutput() }
	out, err := run("as", "--32", "-o", in("kernel.o"), "testdata/kernel.S")
	require.NoError(t, err, "%s", out)
	out, err = run("ld", "-m", "elf_i386", "-Ttext=0", "--oformat=binary", "-o", in("kernel"), in("kernel.o"))
	require.NoError(t, err, "%s", out)
	require.NoError(t, os.WriteFile(in("linuxboot_dma.bin"), optionrom.Linux, 0o644))
	require.NoError(t, os.WriteFile(in("initrd"), []byte("initial"), 0o644))
	_, err = run("timeout", "60", "qemu-system-x86_64", "-L", dir, "-machine", "pc,accel=tcg", "-m", "64", "-nodefaults", "-display", "none",
		"-serial", "file:"+in("serial"), "-device", "isa-debug-exit,iobase=0xf4", "-no-reboot",
		"-kernel", in("kernel"), "-initrd", in("initrd"), "-append", "hello from the command line")
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 0x10<<1|1, exit.ExitCode(), "QEMU's status for a debug exit of 0x10")
	serial, err := os.ReadFile(in("serial"))
	require.NoError(t, err)
	require.Equal(t, "hello from the command line|initial", string(serial))

	file, err := os.ReadFile(in("kernel"))
	require.NoError(t, err)
	_, err = OnBIOS(fwcfg.New(nil), params(file))
	require.NoError(t, err, "fields of younger protocols are not read")
}
