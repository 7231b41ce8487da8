package boot

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/bobuhiro11/gokvm/bootparam"

	"github.com/ftvmm/ftvmm/devices/fwcfg"
	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/firmware/optionrom"
	"github.com/ftvmm/ftvmm/vmm/memory"
)

// ROMName is the name of the option ROM that [OnBIOS] returns; firmware.BootROM(ROMName)
// is its entry in a boot order.
const ROMName = "linux.bin"

// Where a kernel that the BIOS starts lies: the real-mode part with its heap and stack up
// to the command line, in memory that no BIOS uses.
const (
	biosSetup   = 0x1_0000
	biosCmdline = 0x2_0000
	biosHeapEnd = biosCmdline - biosSetup - sector // heap_end_ptr counts from the setup code's second sector

	protocolBIOS = 0x0202 // the oldest with cmd_line_ptr

	// biosReserve is what SeaBIOS keeps for its tables at the end of low RAM, and more.
	biosReserve = 1 << 20
)

// OnBIOS prepares a kernel with Linux's real-mode entry to be started by SeaBIOS: it
// fills the device's items for the kernel, and returns the option ROM that reads them, to
// be put into firmware.Config.ROMs. This is the way for what needs a BIOS, such as
// iPXE; [Load] is the faster one. p.RSDP is not used, and p.E820 only says how much RAM
// there is.
func OnBIOS(d *fwcfg.Device, p Params) (firmware.ROM, error) {
	var none firmware.ROM
	h, err := parseSetup(p.Kernel)
	if err != nil {
		return none, err
	}
	if h.Version < protocolBIOS || h.LoadFlags&bootparam.LoadedHigh == 0 {
		return none, &firmware.Error{Code: codeBad, Problem: fmt.Sprintf("the kernel has boot protocol %d.%02d, too old for us", h.Version>>8, h.Version&0xff),
			Remedy: "boot it from a disk"}
	}
	if err := checkCmdline(p.Cmdline, h); err != nil {
		return none, err
	}
	start := (int(h.SetupSects) + 1) * sector
	if start >= len(p.Kernel) {
		return none, bad("it ends within its setup code")
	}
	if start > biosHeapEnd {
		return none, bad("its setup code has %d bytes", start)
	}
	setup, code := bytes.Clone(p.Kernel[:start]), p.Kernel[start:]

	var ramEnd uint64
	for _, e := range p.E820 {
		if e.Type == firmware.E820RAM && e.Base < firmware.HighRAMBase {
			ramEnd = max(ramEnd, e.Base+e.Size)
		}
	}
	kernelEnd := uint64(firmware.BIOSEnd) + uint64(len(code))
	if ramEnd < biosReserve || kernelEnd > ramEnd-biosReserve {
		return none, noRoom("the kernel", firmware.BIOSEnd, uint64(len(code)))
	}
	// What the kernel unpacks itself to must stay clear of the initial RAM disk.
	kernelEnd = max(kernelEnd, max(h.PrefAddress, firmware.BIOSEnd)+uint64(h.InitSize))
	var initrd uint64
	if size := uint64(len(p.Initrd)); size > 0 {
		end := min(ramEnd-biosReserve, initrdLimit(h))
		if size > end || (end-size)&^(memory.PageSize-1) < kernelEnd {
			return none, noRoomForInitrd(size, kernelEnd, end)
		}
		initrd = (end - size) &^ (memory.PageSize - 1)
	}

	// The header's fields that a boot loader writes (boot.rst, "The real-mode kernel header").
	le := binary.LittleEndian
	setup[0x210] = loaderUndefined
	setup[0x211] |= bootparam.CanUseHeap
	le.PutUint32(setup[0x218:], uint32(initrd))
	le.PutUint32(setup[0x21c:], uint32(len(p.Initrd)))
	le.PutUint16(setup[0x224:], biosHeapEnd)
	le.PutUint32(setup[0x228:], biosCmdline)

	cmdline := append([]byte(p.Cmdline), 0)
	for _, part := range []struct {
		addrKey, sizeKey, dataKey uint16
		addr                      uint32
		data                      []byte
	}{
		{fwcfg.KeySetupAddr, fwcfg.KeySetupSize, fwcfg.KeySetupData, biosSetup, setup},
		{fwcfg.KeyCmdlineAddr, fwcfg.KeyCmdlineSize, fwcfg.KeyCmdlineData, biosCmdline, cmdline},
		{fwcfg.KeyKernelAddr, fwcfg.KeyKernelSize, fwcfg.KeyKernelData, firmware.BIOSEnd, code},
		{fwcfg.KeyInitrdAddr, fwcfg.KeyInitrdSize, fwcfg.KeyInitrdData, uint32(initrd), p.Initrd},
	} {
		if err := d.SetUint32(part.addrKey, part.addr); err != nil {
			return none, err
		}
		if err := d.SetUint32(part.sizeKey, uint32(len(part.data))); err != nil {
			return none, err
		}
		if err := d.SetItem(part.dataKey, part.data); err != nil {
			return none, err
		}
	}
	return firmware.ROM{Name: ROMName, Data: optionrom.Linux}, nil
}
