package acpi

import "fmt"

// Addresses that the DSDT describes. They are fixed by the PC and by the devices of
// this machine.
const (
	pciConfigPort  = 0xcf8
	pciConfigPorts = 8
	vgaFirst       = 0xa_0000
	vgaLast        = 0xb_ffff
	ioapicBase     = 0xfec0_0000
	lapicBase      = 0xfee0_0000

	smiPort      = 0xb2
	resetPort    = 0xcf9
	gpeBase      = 0xafe0
	gpeSize      = 4
	pmBlockSize  = 64
	fwcfgPort    = 0x510
	fwcfgPorts   = 12
	sciInterrupt = 9

	pirqOffset = 0x60 // PIIX3's PIRQRC registers in its configuration space
	pirqOff    = 0x80 // bit 7: not routed
	pciSlots   = 32
	pciPins    = 4
	piixSlot   = 1 // where the PIIX3 and the PIIX4's power management are
)

// linkInterrupts are the interrupts that the link devices choose from.
var linkInterrupts = []uint32{5, 10, 11}

var (
	linkNames = [pciPins]string{"LNKA", "LNKB", "LNKC", "LNKD"}
	pirqNames = [pciPins]string{"PRQ0", "PRQ1", "PRQ2", "PRQ3"}
)

// Status of a device (section 6.3.7).
const (
	staPresent = 0x0f // present, enabled, shown, working
	staLinkOn  = 0x0b // as above, hidden
	staLinkOff = 0x09 // hidden, not enabled
	pirqMask   = 0x0f
)

// dsdt returns the body of the DSDT.
func (c Config) dsdt() []byte {
	bus := [][]byte{
		named("_HID", eisaID("PNP0A03")),
		named("_UID", integer(0)),
		named("_CRS", c.pciResources()),
		named("_PRT", routing()),
		c.isa(),
	}
	board := [][]byte{device("PCI0", bus...)}
	for i := range linkNames {
		board = append(board, link(i))
	}
	board = append(board, sciLink())
	for i := range c.CPUs {
		board = append(board, processor(fmt.Sprintf("C%03X", i), byte(i)))
	}
	return cat(
		scope(`\_SB`, board...),
		// SLP_TYP 0 is soft-off in the PIIX4's PM1 control register.
		named(`\_S5`, list(integer(0), integer(0), integer(0), integer(0))),
	)
}

// pciResources returns what the host bridge passes to the PCI bus.
func (c Config) pciResources() []byte {
	r := [][]byte{
		window(2, spaceBus, 0, 0, 0xff),
		ports(pciConfigPort, pciConfigPorts),
		window(2, spaceIO, ioEntireRange, 0, pciConfigPort-1),
		window(2, spaceIO, ioEntireRange, pciConfigPort+pciConfigPorts, 0xffff),
		window(4, spaceMemory, memoryWritable|memoryCached, vgaFirst, vgaLast),
		window(4, spaceMemory, memoryWritable, c.LowRAMEnd, ioapicBase-1),
	}
	if c.PCI64Size != 0 {
		r = append(r, window(8, spaceMemory, memoryWritable|memoryCached, c.PCI64Base, c.PCI64Base+c.PCI64Size-1))
	}
	return resources(r...)
}

// routing returns the _PRT: pin p (0 for INTA#) of slot s is wired to PIRQ
// (s + p - 1) mod 4. The PIIX4's power management, function 3 of slot 1, is wired to
// the SCI.
func routing() []byte {
	var r [][]byte
	for slot := range pciSlots {
		for pin := range pciPins {
			name := linkNames[(slot+pin+pciPins-1)%pciPins]
			if slot == piixSlot && pin == 0 {
				name = "LNKS"
			}
			r = append(r, list(integer(uint32(slot)<<16|0xffff), integer(uint32(pin)), path(name), integer(0)))
		}
	}
	return list(r...)
}

// link returns the link device of PIRQ n, which works on the PIIX3's routing register
// (82371SB data sheet, 2.2.11).
func link(n int) []byte {
	reg := path(`\_SB.PCI0.ISA.` + pirqNames[n])
	return device(linkNames[n],
		named("_HID", eisaID("PNP0C0F")),
		named("_UID", integer(uint32(n))),
		named("_PRS", resources(interrupts(linkInterrupts...))),
		method("_STA", 0, ifElse(less(reg, integer(pirqOff)), ret(integer(staLinkOn)), ret(integer(staLinkOff)))),
		method("_DIS", 0, or(reg, integer(pirqOff), reg)),
		named("BUF0", resources(interrupts(0))),
		method("_CRS", 0,
			dwordField(path("BUF0"), interruptOffset, "NUM0"),
			ifElse(less(reg, integer(pirqOff)), and(reg, integer(pirqMask), path("NUM0")), nil),
			ret(path("BUF0"))),
		method("_SRS", 1,
			dwordField(arg0(), interruptOffset, "NUM0"),
			store(path("NUM0"), reg)),
	)
}

// sciLink returns the link device that is hard-wired to the SCI.
func sciLink() []byte {
	fixed := resources(interrupts(sciInterrupt))
	return device("LNKS",
		named("_HID", eisaID("PNP0C0F")),
		named("_UID", integer(pciPins)),
		named("_PRS", fixed),
		method("_STA", 0, ret(integer(staLinkOn))),
		method("_DIS", 0),
		method("_CRS", 0, ret(fixed)),
		method("_SRS", 1),
	)
}

// legacy returns a device of the ISA bus.
func legacy(name, id string, uid uint32, descriptors ...[]byte) []byte {
	return device(name,
		named("_HID", eisaID(id)),
		named("_UID", integer(uid)),
		named("_STA", integer(staPresent)),
		named("_CRS", resources(descriptors...)),
	)
}

// isa returns the ISA bridge with its routing registers and the devices behind it.
func (c Config) isa() []byte {
	d := [][]byte{
		named("_ADR", integer(piixSlot<<16)),
		pciRegion("PRQR", pirqOffset, pciPins),
		byteFields("PRQR", pirqNames[:]...),
		legacy("PIC", "PNP0000", 0, ports(0x20, 2), ports(0xa0, 2), ports(0x4d0, 2), irq(2)),
		legacy("TIMR", "PNP0100", 0, ports(0x40, 4), irq(0)),
		legacy("SPKR", "PNP0800", 0, ports(0x61, 1)),
		legacy("RTC", "PNP0B00", 0, ports(0x70, 2), irq(8)),
		legacy("MBRD", "PNP0C02", 0, ports(smiPort, 2), ports(c.PMBase, pmBlockSize), ports(gpeBase, gpeSize),
			ports(fwcfgPort, fwcfgPorts)),
	}
	if c.COM1 {
		d = append(d, legacy("COM1", "PNP0501", 1, ports(0x3f8, 8), irq(4)))
	}
	if c.COM2 {
		d = append(d, legacy("COM2", "PNP0501", 2, ports(0x2f8, 8), irq(3)))
	}
	if c.I8042 {
		d = append(d,
			legacy("KBD", "PNP0303", 0, ports(0x60, 1), ports(0x64, 1), irq(1)),
			legacy("MOU", "PNP0F13", 0, irq(12)))
	}
	return device("ISA", d...)
}
