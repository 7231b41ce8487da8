package boot

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/bobuhiro11/gokvm/bootparam"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// The Linux/x86 boot protocol (Linux Documentation/arch/x86/boot.rst).
const (
	sector         = 512
	headerOffset   = 0x1f1 // of the setup header, in the file and in the zero page
	headerMax      = 0x290 // where the setup header must have ended
	headerLength   = 0x201 // the byte that says where it ends, from 0x202 on
	headerMagic    = 0x202
	bootFlagOffset = 0x1fe
	bootFlag       = 0xaa55
	defaultSects   = 4 // what setup_sects of 0 means

	protocol32 = 0x0206 // the oldest with cmdline_size
	protocol64 = 0x020c // the oldest with xloadflags

	xloadKernel64 = 1 << 0 // xloadflags: a 64-bit entry at 0x200
	entry64       = 0x200

	oldCmdline = 255 // bytes of command line that a kernel without cmdline_size takes

	loaderUndefined = 0xff
	heapEnd         = 0xe000 // of the real-mode part, which is not used

	zeroPageRSDP = 0x70 // acpi_rsdp_addr in boot_params

	initrdAddrMax = 0x37ff_ffff // initrd_addr_max where the header has none
)

func isLinux(file []byte) bool {
	return len(file) >= headerMagic+4 &&
		binary.LittleEndian.Uint32(file[headerMagic:]) == bootparam.MagicSignature &&
		binary.LittleEndian.Uint16(file[bootFlagOffset:]) == bootFlag
}

// parseSetup reads the setup header of a bzImage. Fields that an older kernel's header
// does not have are zero.
func parseSetup(file []byte) (h bootparam.SetupHeader, err error) {
	if !isLinux(file) {
		return h, bad("it is no Linux bzImage")
	}
	var raw [headerMax - headerOffset]byte
	end := min(headerMagic+int(file[headerLength]), headerMax, len(file))
	copy(raw[:], file[headerOffset:max(end, headerMagic+4)])
	if err := binary.Read(bytes.NewReader(raw[:]), binary.LittleEndian, &h); err != nil {
		return h, fmt.Errorf("boot: read the setup header: %w", err)
	}
	if h.SetupSects == 0 {
		h.SetupSects = defaultSects
	}
	// Fields younger than the header's protocol may hold anything: iPXE has its
	// version's name there.
	for _, f := range []struct {
		since uint16
		clear func()
	}{
		{0x0203, func() { h.InitrdAddrMax = 0 }},
		{0x0205, func() { h.KernelAlignment, h.RelocatableKernel = 0, 0 }},
		{protocol32, func() { h.CmdlineSize = 0 }},
		{0x0209, func() { h.SetupData = 0 }},
		{0x020a, func() { h.PrefAddress, h.InitSize = 0, 0 }},
		{protocol64, func() { h.XloadFlags = 0 }},
	} {
		if h.Version < f.since {
			f.clear()
		}
	}
	return h, nil
}

// checkCmdline says whether a kernel can take the command line.
func checkCmdline(cmdline string, h bootparam.SetupHeader) error {
	limit := cmdlineMax - 1
	if h.Version >= protocol32 {
		limit = min(limit, int(h.CmdlineSize))
	} else {
		limit = oldCmdline
	}
	if len(cmdline) > limit || strings.IndexByte(cmdline, 0) >= 0 {
		return &firmware.Error{Code: codeCmdline, Problem: fmt.Sprintf("the command line has %d bytes, this kernel takes %d without a zero", len(cmdline), limit),
			Remedy: "shorten it"}
	}
	return nil
}

// initrdLimit returns the address below which the kernel's initial RAM disk must end.
func initrdLimit(h bootparam.SetupHeader) uint64 {
	if h.InitrdAddrMax != 0 {
		return uint64(h.InitrdAddrMax) + 1
	}
	return initrdAddrMax + 1
}

// linux loads a bzImage.
func (l *loader) linux() (Entry, error) {
	h, err := parseSetup(l.Kernel)
	if err != nil {
		return Entry{}, err
	}
	if h.Version < protocol32 || h.LoadFlags&bootparam.LoadedHigh == 0 {
		return Entry{}, &firmware.Error{Code: codeBad,
			Problem: fmt.Sprintf("the Linux kernel has boot protocol %d.%02d, which can only be entered by a BIOS", h.Version>>8, h.Version&0xff),
			Remedy:  "boot it on top of SeaBIOS"}
	}
	if err := checkCmdline(l.Cmdline, h); err != nil {
		return Entry{}, err
	}
	start := (uint64(h.SetupSects) + 1) * sector
	if start >= uint64(len(l.Kernel)) {
		return Entry{}, bad("it ends within its setup code")
	}
	code := l.Kernel[start:]
	base := uint64(firmware.BIOSEnd)
	if h.PrefAddress != 0 {
		base = h.PrefAddress
	}
	size := max(uint64(h.InitSize), uint64(len(code)))
	if err := l.placeKernel(base, size, code); err != nil {
		if base == firmware.BIOSEnd || h.RelocatableKernel == 0 {
			return Entry{}, err
		}
		// A relocatable kernel runs anywhere above 1 MiB with its alignment.
		align := uint64(h.KernelAlignment)
		if align < memory.PageSize || align&(align-1) != 0 {
			return Entry{}, err
		}
		base = (firmware.BIOSEnd + align - 1) &^ (align - 1)
		if err := l.placeKernel(base, size, code); err != nil {
			return Entry{}, err
		}
	}
	initrd, err := l.placeInitrd(initrdLimit(h))
	if err != nil {
		return Entry{}, err
	}
	if err := l.placeCmdline(); err != nil {
		return Entry{}, err
	}

	h.TypeOfLoader = loaderUndefined
	h.LoadFlags |= bootparam.CanUseHeap
	h.HeapEndPtr = heapEnd
	h.Code32Start = uint32(base)
	h.CmdlinePtr = cmdlineAddr
	h.RamdiskImage, h.RamdiskSize = uint32(initrd), uint32(len(l.Initrd))
	params := bootparam.BootParam{Hdr: h}
	binary.LittleEndian.PutUint64(params.Padding[zeroPageRSDP:], l.RSDP)
	for _, e := range l.E820 {
		params.AddE820Entry(e.Base, e.Size, uint32(e.Type))
	}
	b, err := params.Bytes()
	if err != nil {
		return Entry{}, fmt.Errorf("boot: encode boot_params: %w", err)
	}
	page := make([]byte, memory.PageSize)
	copy(page, b)
	if err := l.mem.Write(zeroPage, page); err != nil {
		return Entry{}, err
	}

	var e Entry
	if h.XloadFlags&xloadKernel64 != 0 {
		if len(code) <= entry64 {
			return Entry{}, bad("it ends before its 64-bit entry point")
		}
		e, err = long(l.mem, base+entry64)
	} else {
		e, err = protected(l.mem, base)
	}
	e.RSI = zeroPage
	return e, err
}

// placeKernel places the protected-mode part of a Linux kernel, which must lie in the
// 4 GiB that its entry finds mapped.
func (l *loader) placeKernel(base, size uint64, code []byte) error {
	if base >= firmware.HighRAMBase || size > firmware.HighRAMBase-base {
		return noRoom("the kernel", base, size)
	}
	return l.place("the kernel", base, size, code)
}
