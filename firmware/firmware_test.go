package firmware

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/devices/fwcfg"
	"github.com/ftvmm/ftvmm/firmware/acpi"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

func TestLayout(t *testing.T) {
	for _, c := range []struct {
		ram, image uint64
		want       []memory.Extent
	}{
		{128 << 20, 0, []memory.Extent{{Base: 0, Size: 0xa_0000}, {Base: 0xc_0000, Size: 128<<20 - 0xc_0000}}},
		{3 << 30, 256 << 10, []memory.Extent{{Base: 0, Size: 0xa_0000}, {Base: 0xc_0000, Size: 0xc000_0000 - 0xc_0000}, {Base: 0xfffc_0000, Size: 256 << 10}}},
		{5 << 30, 0x37_c000, []memory.Extent{{Base: 0, Size: 0xa_0000}, {Base: 0xc_0000, Size: 0xc000_0000 - 0xc_0000},
			{Base: 0xffc8_4000, Size: 0x37_c000}, {Base: 1 << 32, Size: 2 << 30}}},
	} {
		got, err := Layout(c.ram, c.image)
		require.NoError(t, err)
		require.Equal(t, c.want, got)
	}
	for _, c := range []struct{ ram, image uint64 }{
		{0, 0}, {MinRAM - 4096, 0}, {MaxRAM + 4096, 0}, {1<<30 + 1, 0}, {1 << 30, 1}, {1 << 30, MaxImage + 4096},
	} {
		_, err := Layout(c.ram, c.image)
		var e *Error
		require.ErrorAs(t, err, &e, "%+v", c)
		require.NotEmpty(t, e.Remedy)
	}
}

// The map of a direct boot ascends, and its RAM is RAM.
func TestE820LiesWithinTheLayout(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ram := rapid.Uint64Range(MinRAM/4096, MaxRAM/4096).Draw(t, "pages") * 4096
		layout, err := Layout(ram, 0)
		require.NoError(t, err)
		var end, usable uint64
		for _, e := range E820(ram) {
			require.GreaterOrEqual(t, e.Base, end)
			require.NotZero(t, e.Size)
			end = e.Base + e.Size
			if e.Type != E820RAM {
				continue
			}
			usable += e.Size
			inside := false
			for _, l := range layout {
				inside = inside || e.Base >= l.Base && end <= l.Base+l.Size
			}
			require.True(t, inside, "%+v", e)
		}
		require.EqualValues(t, ram-(BIOSEnd-EBDABase), usable)
		require.Len(t, e820File(ram), 20*(1+int(min(HighRAM(ram), 1))))
	})
}

func image(size int) []byte {
	b := bytes.Repeat([]byte{1, 2, 3, 4}, size/4)
	copy(b[size-resetVector:], "\xea\x5b\xe0\x00\xf0")
	return b
}

func TestLoadImageShowsItAtBothPlaces(t *testing.T) {
	for _, size := range []int{64 << 10, 256 << 10, 4 << 20} {
		layout, err := Layout(16<<20, uint64(size))
		require.NoError(t, err)
		mem, err := memory.New(layout...)
		require.NoError(t, err)
		b := image(size)
		require.NoError(t, LoadImage(mem, b))
		high, err := mem.View(1<<32-uint64(size), uint64(size))
		require.NoError(t, err)
		require.True(t, bytes.Equal(b, high))
		tail := min(size, 128<<10)
		low, err := mem.View(uint64(1<<20-tail), uint64(tail))
		require.NoError(t, err)
		require.True(t, bytes.Equal(b[size-tail:], low))
		require.NoError(t, mem.Close())
	}
}

func TestImagesThatCannotBeFirmware(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(p, b, 0o644))
		return p
	}
	for _, p := range []string{
		filepath.Join(dir, "missing"), dir, write("empty", nil), write("odd", make([]byte, 4097)),
		write("zero", make([]byte, 8192)), write("ones", bytes.Repeat([]byte{0xff}, 8192)), write("large", make([]byte, MaxImage+4096)),
	} {
		_, err := ReadImage(p)
		var e *Error
		require.ErrorAs(t, err, &e, p)
		require.NotEmpty(t, e.Remedy)
		require.Contains(t, err.Error(), e.Remedy)
	}
	_, err := ReadImage(filepath.Join(dir, "missing"))
	require.True(t, errors.Is(err, os.ErrNotExist))
	b, err := ReadImage(write("good", image(8192)))
	require.NoError(t, err)
	mem, err := memory.New(memory.Extent{Base: 0, Size: 1 << 20})
	require.NoError(t, err)
	defer mem.Close()
	require.Error(t, LoadImage(mem, b), "no memory below 4 GiB")
}

func TestDebianImagesAreFoundAndGood(t *testing.T) {
	p, err := FindSeaBIOS()
	require.NoError(t, err, "this host lacks SeaBIOS")
	b, err := ReadImage(p)
	require.NoError(t, err)
	require.Len(t, b, 256<<10)
	_, err = find("Nothing", "nothing", []string{"/does/not/exist"})
	require.ErrorContains(t, err, "apt-get install nothing")
}

var config = Config{
	RAM: 5 << 30, CPUs: 2, UUID: [16]byte{1, 2, 3}, Serial: "x", COM1: true, ConsolePort: 0x3f8,
	BootOrder: []string{BootDisk(4), BootNIC(3), BootIDE(1, 0), BootROM("kernel.bin")},
	ROMs:      []ROM{{"kernel.bin", []byte{0x55, 0xaa}}},
}

func TestConfigureFillsFwCfg(t *testing.T) {
	d := fwcfg.New(nil)
	require.NoError(t, Configure(d, config))
	for name, want := range map[string]string{
		"bootorder":          "/pci@i0cf8/scsi@4/disk@0,0\n/pci@i0cf8/ethernet@3/ethernet-phy@0\n/pci@i0cf8/ide@1,1/drive@1/disk@0\n/rom@genroms/kernel.bin\x00",
		"etc/sercon-port":    "\xf8\x03",
		"etc/boot-fail-wait": "\xff\xff\xff\xff",
		"etc/system-states":  "\x80\x00\x00\x01\x02\x80",
		"genroms/kernel.bin": "\x55\xaa",
		"etc/e820": "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xc0\x00\x00\x00\x00\x01\x00\x00\x00" +
			"\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x80\x00\x00\x00\x00\x01\x00\x00\x00",
	} {
		require.Equal(t, want, string(d.File(name)), name)
	}
	for _, name := range []string{"etc/table-loader", "etc/acpi/rsdp", "etc/acpi/tables", "etc/smbios/smbios-anchor", "etc/smbios/smbios-tables"} {
		require.NotEmpty(t, d.File(name), name)
	}
	read := func(key uint16, n int) (v uint64) {
		d.Write(0, 2, uint64(key))
		for i := range n {
			v |= d.Read(1, 1) << (8 * i)
		}
		return v
	}
	require.EqualValues(t, 5<<30, read(fwcfg.KeyRAMSize, 8))
	require.EqualValues(t, 2, read(fwcfg.KeyCPUs, 2))
	require.EqualValues(t, 2, read(fwcfg.KeyMaxCPUs, 2))
	require.EqualValues(t, 1, read(fwcfg.KeyNoGraphic, 2))
	require.EqualValues(t, 1, read(fwcfg.KeyIRQ0Override, 1))
	require.EqualValues(t, 0x030201, read(fwcfg.KeyUUID, 3))
}

func TestConfigureRefuses(t *testing.T) {
	for name, f := range map[string]func(*Config){
		"ram":     func(c *Config) { c.RAM = 1 },
		"cpus":    func(c *Config) { c.CPUs = 0 },
		"path":    func(c *Config) { c.BootOrder = []string{"disk"} },
		"newline": func(c *Config) { c.BootOrder = []string{"/a\n/b"} },
		"many":    func(c *Config) { c.BootOrder = make([]string, maxBootOrder+1) },
		"rom":     func(c *Config) { c.ROMs = []ROM{{"a b", nil}} },
		"twice":   func(c *Config) { c.ROMs = append(c.ROMs, c.ROMs...) },
		"serial":  func(c *Config) { c.Serial = "\n" },
	} {
		c := config
		f(&c)
		require.Error(t, Configure(fwcfg.New(nil), c), name)
	}
}

func TestInstallPutsTheLargestTablesBelow1MiB(t *testing.T) {
	mem, err := memory.New(memory.Extent{Base: VGAEnd, Size: BIOSEnd - VGAEnd})
	require.NoError(t, err)
	defer mem.Close()
	c := config
	c.CPUs, c.COM2, c.I8042, c.VGA = acpi.MaxCPUs, true, true, true
	rsdp, err := Install(mem, c)
	require.NoError(t, err)
	root, err := mem.View(rsdp, 20)
	require.NoError(t, err)
	require.Equal(t, "RSD PTR ", string(root[:8]))
	rsdt := uint64(binary.LittleEndian.Uint32(root[16:]))
	sig, err := mem.View(rsdt, 4)
	require.NoError(t, err)
	require.Equal(t, "RSDT", string(sig))
	anchor, err := mem.View(smbiosBase, 4)
	require.NoError(t, err)
	require.Equal(t, "_SM_", string(anchor))
}
