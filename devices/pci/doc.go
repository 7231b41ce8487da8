// Package pci is a conventional PCI bus: one bus segment, its functions with 256
// bytes of configuration space each, their base address registers (BARs) and MSI-X.
//
// Three ideas carry it:
//
//   - A [Function] is configuration space plus windows. Bytes of the space have a
//     value, a power-on value and a mask of the bits that the guest may write; what a
//     device adds is named at construction (AddBAR, AddCapability, AddMSIX, SetROM).
//     Defects of construction panic; nothing that a guest writes does.
//   - The [Bus] resolves an address to a window in a flattened list of disjoint
//     ranges that is rebuilt lazily after a guest has moved something. Where windows
//     overlap, the order of priority is fixed: regions of the chipset, then functions
//     by number, in each its BARs by number and its expansion ROM last. Fixed windows
//     of the machine (local APIC, legacy ports) and guest RAM win over all of these,
//     so that moving a BAR onto anything harms nobody but the guest that did it.
//   - Nothing here allocates, fails or knows time on a guest's access. A window's
//     handler that implements [devices.Timed] is handed out as it is.
//
// References: PCI Local Bus Specification 3.0 (chapters 3 and 6, MSI-X in 6.8), and
// the 82441FX data sheet for the configuration ports 0xCF8 and 0xCFC.
//
// Not offered: bridges and further buses, PCI Express extended space, plain MSI,
// power management, hot plug.
package pci
