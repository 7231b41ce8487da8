//go:build slow

package integration

import (
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/vmm"
)

// A machine that is saved while SeaBIOS runs goes on in another: it boots, and does not begin anew.
func TestSeaBIOSGoesOnAfterRestore(t *testing.T) {
	path, sum := bootDisk(t, 20)
	for _, at := range []string{
		"Relocating init",        // in 32-bit code that moves itself
		"PCI device probing",     // among configuration cycles
		"found virtio-blk at",    // the disk's driver begins
		"Booting from 0000:7c00", // the boot sector reads
	} {
		t.Run(at, func(t *testing.T) {
			pc := startBIOS(t, "", withDisk(t, path, false))
			pc.log.waitFor(t, 0, at, emulatedLimit)
			saved := pc.save(t)
			screen := pc.String()

			pc = startBIOS(t, saved, withDisk(t, path, false))
			require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, pc.wait(t), "%s", pc)
			require.Contains(t, screen+pc.String(), "\n"+sum)
			require.NotContains(t, pc.log.String(), "Found QEMU fw_cfg")
		})
	}
}

// grubFolder is where Debian's package grub-pc-bin keeps GRUB's parts.
const grubFolder = "/usr/lib/grub/i386-pc"

// grubConfig runs before GRUB's prompt.
const grubConfig = `
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
`

// grubModules are what the test uses of GRUB, so that it need not read more from the disk.
var grubModules = []string{"biosdisk", "part_msdos", "ext2", "serial", "terminal", "ls", "cat", "echo", "normal", "minicmd", "halt", "reboot"}

// grubDisk makes a disk with GRUB in its first megabyte and a partition with an ext2
// file system, in which there is the file /hello.txt. It does what grub-bios-setup does: boot.img
// as the boot sector (it loads sector 1), the core image behind it (its first sector loads what
// follows sector 1).
func grubDisk(t testing.TB) string {
	t.Helper()
	for tool, pkg := range map[string]string{"grub-mkimage": "grub-common", "mke2fs": "e2fsprogs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not there: apt-get install %s", tool, pkg)
		}
	}
	boot := thirdParty(t, filepath.Join(grubFolder, "boot.img"), "grub-pc-bin")
	const partition = 1 << 20 // byte at which it begins; it ends with the disk
	const size = 4 << 20
	dir := t.TempDir()
	tool := func(name string, args ...string) {
		out, err := exec.Command(name, args...).CombinedOutput()
		require.NoError(t, err, "%s: %s", name, out)
	}
	config, core, root, fs := filepath.Join(dir, "config"), filepath.Join(dir, "core"), filepath.Join(dir, "root"), filepath.Join(dir, "fs")
	require.NoError(t, os.WriteFile(config, []byte(grubConfig), 0o600))
	tool("grub-mkimage", append([]string{"-O", "i386-pc", "-d", grubFolder, "-p", "(hd0,msdos1)/boot/grub", "-c", config, "-o", core}, grubModules...)...)
	require.NoError(t, os.Mkdir(root, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(root, "hello.txt"), []byte("read by GRUB from a virtio disk\n"), 0o600))
	require.NoError(t, os.WriteFile(fs, make([]byte, size-partition), 0o600))
	tool("mke2fs", "-q", "-t", "ext2", "-d", root, fs)

	image := make([]byte, size)
	const table = 446 // of partitions, in the boot sector
	copy(image[:table], boot)
	entry := image[table:]
	entry[0], entry[4] = 0x80, 0x83 // active, Linux
	binary.LittleEndian.PutUint32(entry[8:], partition/guests.SectorSize)
	binary.LittleEndian.PutUint32(entry[12:], (size-partition)/guests.SectorSize)
	image[510], image[511] = 0x55, 0xaa
	for at, file := range map[int]string{guests.SectorSize: core, partition: fs} {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		require.LessOrEqual(t, at+len(b), map[bool]int{true: partition, false: size}[at < partition], "%s is too large", file)
		copy(image[at:], b)
	}
	path := filepath.Join(dir, "disk")
	require.NoError(t, os.WriteFile(path, image, 0o600))
	return path
}

// say types a line at GRUB's prompt, waits for the answer and the next prompt, and returns
// the position after it.
func (pc *biosPC) say(t testing.TB, from int, line string, answers ...string) int {
	t.Helper()
	pc.deliver([]byte(line + "\r"))
	for _, a := range answers {
		from = pc.expect(t, from, a)
	}
	return from
}

const grubPrompt = "grub> "

func TestGRUB(t *testing.T) {
	path := grubDisk(t)
	began := time.Now()
	pc := startBIOS(t, "", withDisk(t, path, false))
	at := pc.expect(t, 0, "GRUB loading")
	at = pc.expect(t, at, "GNU GRUB  version 2.")
	at = pc.expect(t, at, grubPrompt)
	t.Logf("GRUB's prompt after %v", time.Since(began))
	at = pc.say(t, at, "ls", "(hd0) (hd0,msdos1)", grubPrompt)
	at = pc.say(t, at, "ls (hd0,msdos1)/", "hello.txt", grubPrompt)
	at = pc.say(t, at, "cat (hd0,msdos1)/hello.txt", "read by GRUB from a virtio disk", grubPrompt)

	// A second machine goes on at the prompt.
	saved := pc.save(t)
	pc = startBIOS(t, saved, withDisk(t, path, false))
	at = pc.say(t, 0, "ls", "(hd0) (hd0,msdos1)", grubPrompt)
	at = pc.say(t, at, "cat (hd0,msdos1)/hello.txt", "read by GRUB from a virtio disk", grubPrompt)

	// A reset starts from the firmware.
	pc.say(t, at, "reboot", "SeaBIOS (version", "GRUB loading", grubPrompt)
	require.Contains(t, pc.log.String(), "Found QEMU fw_cfg")
	// GRUB's halt switches off by the FADT and DSDT that it finds.
	pc.say(t, 0, "halt")
	require.Equal(t, vmm.Exit{Reason: vmm.ExitPowerOff}, pc.wait(t), "%s", pc)
}

// iPXE is a kernel for the Linux boot protocol that needs a BIOS: our option ROM starts it.
func TestIPXEOnTopOfSeaBIOS(t *testing.T) {
	kernel := thirdParty(t, ipxeImage, "ipxe")
	pc := startBIOS(t, "", func(c *vmm.Config) {
		c.Kernel, c.Cmdline = kernel, "echo the command line has arrived && shell"
	})
	at := pc.expect(t, 0, "iPXE initialising devices...")
	at = pc.expect(t, at, "iPXE 1.")
	at = pc.expect(t, at, "the command line has arrived")
	pc.expect(t, at, "iPXE>")
}

// hideCursor is the last that memtest86+ writes before it asks for keys, for five seconds.
const hideCursor = "\x1b[?25l"

// memtest86+ is entered directly, by the Linux boot protocol, and steered over the serial
// line. On a KVM that emulates guest kernel code its temperature display needs vmm's x87 instructions, and its
// test 0 does not run: such a KVM refuses to switch the caches off (CR0.CD).
func TestMemtest(t *testing.T) {
	screen := newTerminal()
	m, err := vmm.New(vmm.Config{
		// Small, since the program goes through all of it.
		Memory: 32 << 20, Kernel: thirdParty(t, memtestImage, "memtest86+"), Serial: []vmm.Console{screen},
		// No benchmark, no SMBus, no probing for CPUs; and there is no i8042 to poll for keys.
		Cmdline: "console=ttyS0,115200 nobench nosm nosmp keyboard=usb",
	})
	require.NoError(t, err)
	ended := make(chan vmm.Exit, 1)
	go func() {
		e, err := m.Run(context.Background())
		if err != nil {
			e.Detail = err.Error()
		}
		ended <- e
	}()
	defer func() {
		m.Quit()
		e := <-ended
		require.NoError(t, m.Close())
		require.Equal(t, vmm.ExitQuit, e.Reason, "%+v", e)
	}()
	at := screen.waitFor(t, 0, hideCursor, emulatedLimit)
	for _, step := range []struct{ keys, answer string }{
		{"1", "<F10> Exit menu"}, // the configuration
		{"1", "0---------10"},    // which tests
		{"1", "..........."},     // none,
		{"3", "Enter test #"},    // but for
		{"3\r", "...*......."},   // this one
		{"0", "<F10> Exit menu"},
		{"0", "Memtest86+ v"},
		{"", "CPU: 1 Cores 1 Threads"},
		{"", "[Moving inversions, 1s & 0s]"},
		{"", "0x0000000000000000"}, // the first pattern
		{"", "0xffffffffffffffff"}, // and the next
	} {
		screen.deliver([]byte(step.keys))
		at = screen.waitFor(t, at, step.answer, emulatedLimit)
	}
	at = screen.waitFor(t, at, "Errors: ", emulatedLimit)
	screen.waitFor(t, at, "0 ", emulatedLimit)
	require.NotContains(t, screen.String(), "Unexpected")
}

// save stops the machine for good, at whatever it does, and returns the file of its state.
func (pc *biosPC) save(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "saved")
	ctx, cancel := context.WithTimeout(context.Background(), emulatedLimit)
	defer cancel()
	require.NoError(t, pc.Pause(ctx)) // so that it writes nothing more to its disk
	require.NoError(t, pc.Save(ctx, path))
	pc.close()
	require.Equal(t, vmm.ExitQuit, pc.wait(t).Reason)
	return path
}
