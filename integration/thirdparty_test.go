package integration

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware/boot"
	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/mirror/disk"
	"github.com/ftvmm/ftvmm/vmm"
)

// Where Debian's packages seabios, ipxe and memtest86+ put their images.
const (
	seabiosImage = "/usr/share/seabios/bios-256k.bin"
	ipxeImage    = "/boot/ipxe.lkrn"
	memtestImage = "/boot/memtest86+x64.bin"
)

// emulatedLimit bounds a wait for firmware and boot programs. On VT-x and SVM they take a second;
// a KVM that emulates guest kernel code takes ten times as long and more on a busy machine. No test measures
// time by it.
const emulatedLimit = 5 * time.Minute

const thirdPartyMemory = 128 << 20

// thirdParty returns an image that a package installs, or skips the test.
func thirdParty(t testing.TB, path, pkg string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		t.Skipf("%s is not there: apt-get install %s", path, pkg)
	}
	require.NoError(t, err)
	return b
}

// biosPC is a machine with SeaBIOS, a serial terminal that is its screen too, and its log.
type biosPC struct {
	*vmm.Machine
	*terminal
	log *terminal // port 0x402
	end chan vmm.Exit
	// close ends the machine and closes it and its disks.
	close func()
}

// startBIOS starts a machine with SeaBIOS; each change alters its configuration first.
// If saved is not empty, the machine goes on from there.
func startBIOS(t testing.TB, saved string, changes ...func(*vmm.Config)) *biosPC {
	t.Helper()
	pc := &biosPC{terminal: newTerminal(), log: newTerminal(), end: make(chan vmm.Exit, 1)}
	cfg := vmm.Config{
		Memory: thirdPartyMemory, Firmware: thirdParty(t, seabiosImage, "seabios"),
		Serial: []vmm.Console{pc.terminal}, DebugConsole: pc.log.Output,
		UUID: [16]byte{0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x46, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff},
	}
	for _, change := range changes {
		change(&cfg)
	}
	var err error
	pc.Machine, err = vmm.New(cfg)
	require.NoError(t, err)
	if saved != "" {
		require.NoError(t, pc.Restore(saved))
	}
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		e, err := pc.Run(context.Background())
		if err != nil {
			e.Detail = err.Error() // about the host; no test expects it
		}
		pc.end <- e
	}()
	pc.close = sync.OnceFunc(func() {
		pc.Quit()
		<-ran
		require.NoError(t, pc.Machine.Close())
		for _, d := range cfg.Disks {
			require.NoError(t, d.Backend.Close())
		}
	})
	t.Cleanup(pc.close)
	return pc
}

// String resolves what both embedded types might offer.
func (pc *biosPC) String() string { return pc.terminal.String() }

// wait returns how the machine ended.
func (pc *biosPC) wait(t testing.TB) vmm.Exit {
	t.Helper()
	select {
	case e := <-pc.end:
		return e
	case <-time.After(emulatedLimit):
		t.Fatalf("the guest did not end within %v; it wrote:\n%s", emulatedLimit, pc)
		panic("not reached")
	}
}

// expect waits until the guest has written text to its terminal after position from.
func (pc *biosPC) expect(t testing.TB, from int, text string) int {
	t.Helper()
	return pc.waitFor(t, from, text, emulatedLimit)
}

// withDisk adds a virtio disk on an image to boot from.
func withDisk(t testing.TB, path string, modern bool) func(*vmm.Config) {
	return func(c *vmm.Config) {
		d, err := disk.Open(path, disk.Options{ID: "boot"})
		require.NoError(t, err)
		c.Disks = append(c.Disks, vmm.Disk{Backend: d, Modern: modern, BootIndex: 1})
	}
}

func TestSeaBIOSRunsToItsEnd(t *testing.T) {
	began := time.Now()
	pc := startBIOS(t, "", func(c *vmm.Config) { c.RNG = true })
	at := pc.expect(t, 0, "SeaBIOS (version ")
	at = pc.expect(t, at, "Machine UUID 00112233-4455-4677-8899-aabbccddeeff")
	pc.expect(t, at, "No bootable device")
	t.Logf("SeaBIOS took %v from its first instruction to its end", time.Since(began))
	log := pc.log.String()
	for _, claim := range []string{
		`QEMU fw_cfg DMA interface supported`,
		// All of RAM, and of that what SeaBIOS leaves to an operating system.
		fmt.Sprintf(`qemu/e820: addr 0x0+ len 0x%016x \[RAM\]`, thirdPartyMemory),
		` 0000000000100000 - 0000000007\w{6} = 1 RAM`,
		`Found 1 cpu\(s\) max supported 1 cpu\(s\)`,
		`PCI: init bdf=00:00\.0 id=8086:1237`,
		`PCI: init bdf=00:01\.0 id=8086:7000`,
		`PCI: init bdf=00:01\.3 id=8086:7113`,
		`PCI: init bdf=00:03\.0 id=1af4:1005`,
		`Using pmtimer, ioport 0x608`,
		`Copying SMBIOS from 0x\w+ to 0x000f\w{4}`,
		`table\(50434146\)=0x07\w{6} \(via xsdt\)`, // the FADT
		`ACPI: parse DSDT at 0x07\w{6}`,
		`Found 1 serial ports`,
	} {
		require.Regexp(t, regexp.MustCompile(claim), log)
	}
	require.NotContains(t, log, "ERROR")
	require.NotContains(t, strings.ToLower(log), "fail to")
}

// bootDisk makes a disk that begins with our boot sector, and returns its path and the
// line with the sum that the boot sector finds.
func bootDisk(t testing.TB, blocks int) (path, sum string) {
	t.Helper()
	const sectors, stride = 8, 9
	boot, err := guests.BootSector(guests.BootRead{First: 1, Stride: stride, Blocks: uint16(blocks), Sectors: sectors, Sum: true})
	require.NoError(t, err)
	data := make([]byte, 2<<20) // SeaBIOS does not boot from less than a cylinder
	for i := guests.SectorSize; i < len(data); i += 4 {
		binary.LittleEndian.PutUint32(data[i:], uint32(i)*2654435761)
	}
	copy(data, boot)
	var s uint32
	for b := range blocks {
		at := (1 + b*stride) * guests.SectorSize
		for i := at; i < at+sectors*guests.SectorSize; i += 4 {
			s += binary.LittleEndian.Uint32(data[i:])
		}
	}
	path = filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, data, 0o600))
	return path, fmt.Sprintf("ok read %04x sum %08x\n", blocks, s)
}

func TestSeaBIOSReadsTheDisk(t *testing.T) {
	for _, c := range []struct {
		name   string
		modern bool
		log    string
	}{
		{"transitional", false, "PCI: init bdf=00:03.0 id=1af4:1001"},
		{"modern", true, "PCI: init bdf=00:03.0 id=1af4:1042"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path, sum := bootDisk(t, 20)
			pc := startBIOS(t, "", withDisk(t, path, c.modern))
			require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, pc.wait(t), "%s", pc)
			// On the screen and on COM1, which here are one.
			require.Regexp(t, `b+o+t+s+e+c+t+o+r`, pc.String())
			require.Contains(t, pc.String(), "\n"+sum)
			require.Contains(t, pc.log.String(), c.log)
		})
	}
}

// resetSector is a boot sector that resets the machine by port 0xcf9 when it runs for the
// first time, and switches it off by the PIIX4's sleep register when it runs for the second: memory
// survives a reset, so a mark in it tells the two apart.
var resetSector = append([]byte{
	0xfa,                   // cli
	0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
	0xbb, 0x00, 0x05, // mov bx, 0x500, which SeaBIOS does not use
	0x81, 0x3f, 0x5a, 0xa5, // cmp word [bx], 0xa55a
	0x74, 0x0e, // je again
	0xc7, 0x07, 0x5a, 0xa5, // mov word [bx], 0xa55a
	0xba, 0xf9, 0x0c, // mov dx, 0xcf9
	0xb0, 0x02, 0xee, // mov al, 2; out dx, al: a hard reset,
	0xb0, 0x06, 0xee, // mov al, 6; out dx, al: now
	0xf4,                               // hlt
	0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, // again: mov dx, 0x604 (PM1a control); mov ax, SLP_EN, type 0 (S5)
	0xef,             // out dx, ax
	0xf4, 0xeb, 0xfd, // hlt; jmp to it
}, make([]byte, 512)...)

func TestResetBootsAgainAndS5PowersOff(t *testing.T) {
	image := make([]byte, 2<<20)
	copy(image, resetSector)
	image[510], image[511] = 0x55, 0xaa
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, image, 0o600))

	t.Run("reset and power off", func(t *testing.T) {
		pc := startBIOS(t, "", withDisk(t, path, false))
		require.Equal(t, vmm.Exit{Reason: vmm.ExitPowerOff}, pc.wait(t), "%s", pc)
		require.Equal(t, 2, strings.Count(pc.log.String(), "Booting from 0000:7c00"))
		require.Equal(t, 2, strings.Count(pc.log.String(), "found virtio-blk"), "the disk was reset, too")
	})
	t.Run("exit on reset", func(t *testing.T) {
		pc := startBIOS(t, "", withDisk(t, path, false), func(c *vmm.Config) { c.ExitOnReset = true })
		require.Equal(t, vmm.Exit{Reason: vmm.ExitReset}, pc.wait(t), "%s", pc)
	})
}

// The same guest by each of the ways in which a kernel is entered without firmware.
func TestBootProtocols(t *testing.T) {
	for _, c := range []struct {
		image string
		kind  boot.Kind
		want  string
	}{
		{"hello.elf", boot.Auto, "ok loader pvh"},
		{"hello-mb.elf", boot.Auto, "ok loader multiboot"},
		{"hello.bin", boot.Flat, "ok loader "},
	} {
		t.Run(c.image, func(t *testing.T) {
			kernel, err := guests.Image(c.image)
			require.NoError(t, err)
			screen := newTerminal()
			m, err := vmm.New(vmm.Config{
				Memory: 64 << 20, Kernel: kernel, KernelKind: c.kind, Cmdline: "one=2 three", Serial: []vmm.Console{screen},
			})
			require.NoError(t, err)
			defer m.Close()
			require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, run(t, m, emulatedLimit), "%s", screen)
			require.Contains(t, screen.String(), c.want)
			require.Contains(t, screen.String(), "one=2 three\n")
		})
	}
}

// A 64-bit ELF file without a PVH note is entered in long mode.
func TestBootELF64(t *testing.T) {
	code := []byte{
		0x48, 0xb8, 0, 0, 0, 0, 42, 0, 0, 0, // mov rax, 42<<32
		0x48, 0xc1, 0xe8, 0x20, // shr rax, 32
		0xe6, 0xf4, // out 0xf4, al
		0xf4, // hlt
	}
	const base, headers = 0x20_0000, 64 + 56
	le := binary.LittleEndian
	file := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...) // 64 bits, little-endian, version 1
	file = le.AppendUint16(file, 2)                                   // executable
	file = le.AppendUint16(file, 62)                                  // x86-64
	file = le.AppendUint32(file, 1)
	file = le.AppendUint64(file, base+headers) // entry
	file = le.AppendUint64(file, 64)           // program headers
	file = append(file, make([]byte, 8+4)...)
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		file = le.AppendUint16(file, v)
	}
	file = le.AppendUint32(file, 1) // PT_LOAD
	file = le.AppendUint32(file, 5) // readable, executable
	size := uint64(headers + len(code))
	for _, v := range []uint64{0, base, base, size, size, 0x1000} {
		file = le.AppendUint64(file, v)
	}
	m, err := vmm.New(vmm.Config{Memory: 16 << 20, Kernel: append(file, code...)})
	require.NoError(t, err)
	defer m.Close()
	require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit, Code: 42}, run(t, m, emulatedLimit))
}
