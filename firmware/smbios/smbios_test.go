package smbios

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/digitalocean/go-smbios/smbios"
	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/vmm/memory"
)

var config = Config{
	UUID: [16]byte{0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 2, 3, 4, 5, 6, 7, 8},
	CPUs: 4, LowRAM: 0xc000_0000, HighRAM: 40 << 30, Serial: "S-1",
}

// decode reads installed tables back with a decoder that is not ours.
func decode(t *testing.T, c Config) map[uint8][]*smbios.Structure {
	tabs, err := Build(c)
	require.NoError(t, err)
	mem, err := memory.New(memory.Extent{Base: 0, Size: 1 << 20})
	require.NoError(t, err)
	defer mem.Close()
	require.NoError(t, tabs.Install(mem, 0xf_0000))
	area, err := mem.View(0xf_0000, 0x1_0000)
	require.NoError(t, err)
	ep, err := smbios.ParseEntryPoint(bytes.NewReader(area))
	require.NoError(t, err)
	major, minor, _ := ep.Version()
	require.Equal(t, []int{2, 8}, []int{major, minor})
	addr, size := ep.Table()
	require.Equal(t, len(tabs.Structures), size)
	b, err := mem.View(uint64(addr), uint64(size))
	require.NoError(t, err)
	list, err := smbios.NewDecoder(bytes.NewReader(b)).Decode()
	require.NoError(t, err)
	require.EqualValues(t, len(list), binary.LittleEndian.Uint16(area[anchorCount:]))
	byType := map[uint8][]*smbios.Structure{}
	for _, s := range list {
		byType[s.Header.Type] = append(byType[s.Header.Type], s)
	}
	return byType
}

func TestAnotherDecoderReadsTheTables(t *testing.T) {
	s := decode(t, config)
	// The lengths are those of version 2.8 (DSP0134, chapter 7).
	for typ, length := range map[uint8]uint8{
		typeBIOS: 0x18, typeSystem: 0x1b, typeChassis: 0x16, typeProcessor: 0x2a, typeMemoryArray: 0x17,
		typeMemory: 0x28, typeMemoryMap: 0x1f, typeBoot: 0x0b, typeEnd: 4,
	} {
		require.NotEmpty(t, s[typ], "type %d", typ)
		require.Equal(t, length, s[typ][0].Header.Length, "type %d", typ)
	}
	sys := s[typeSystem][0]
	require.Equal(t, []string{"ftvmm", "ftvmm i440FX PC", "1.0", "S-1"}, sys.Strings)
	require.Equal(t, []byte{0x78, 0x56, 0x34, 0x12, 0xbc, 0x9a, 0xf0, 0xde, 1, 2, 3, 4, 5, 6, 7, 8}, sys.Formatted[4:20])
	// Offsets are those of the specification, less the header's four bytes.
	le := binary.LittleEndian
	require.EqualValues(t, 4, s[typeProcessor][0].Formatted[0x23-4], "cores")
	require.EqualValues(t, 43<<30, le.Uint64(s[typeMemoryArray][0].Formatted[0x0f-4:]))
	require.EqualValues(t, 0x7fff, le.Uint16(s[typeMemory][0].Formatted[0x0c-4:]))
	require.EqualValues(t, 43<<10, le.Uint32(s[typeMemory][0].Formatted[0x1c-4:]))
	require.Len(t, s[typeMemoryMap], 2)
	high := s[typeMemoryMap][1].Formatted
	require.EqualValues(t, 4<<20, le.Uint32(high))
	require.EqualValues(t, 44<<20-1, le.Uint32(high[4:]))
	require.EqualValues(t, handleArray, le.Uint16(high[8:]))
}

func TestSmallMachineHasOneRangeOfMemory(t *testing.T) {
	s := decode(t, Config{CPUs: 1, LowRAM: 128 << 20})
	require.Len(t, s[typeMemoryMap], 1)
	require.EqualValues(t, 128, binary.LittleEndian.Uint16(s[typeMemory][0].Formatted[0x0c-4:]))
}

func TestTheUnplacedEntryPointIsSummed(t *testing.T) {
	tabs, err := Build(config)
	require.NoError(t, err)
	_, err = smbios.ParseEntryPoint(bytes.NewReader(tabs.Anchor))
	require.NoError(t, err, "it checks both sums")
	require.Less(t, len(tabs.Structures), 1<<10)
}

func TestBuildRefuses(t *testing.T) {
	for _, f := range []func(*Config){
		func(c *Config) { c.CPUs = 0 }, func(c *Config) { c.CPUs = 256 }, func(c *Config) { c.LowRAM = 0 },
		func(c *Config) { c.HighRAM = 1 << 60 }, func(c *Config) { c.Serial = "a\x00b" },
		func(c *Config) { c.Product = string(bytes.Repeat([]byte("x"), MaxString+1)) },
	} {
		c := config
		f(&c)
		_, err := Build(c)
		require.Error(t, err, "%+v", c)
	}
}

func TestInstallNeedsRoomAndAlignment(t *testing.T) {
	tabs, err := Build(config)
	require.NoError(t, err)
	mem, err := memory.New(memory.Extent{Base: 0, Size: 1 << 20})
	require.NoError(t, err)
	defer mem.Close()
	for _, base := range []uint64{0xf_0001, 0xf_fff0, 1 << 32, 1<<64 - 16} {
		require.Error(t, tabs.Install(mem, base), "%#x", base)
	}
}
