// Package acpi builds the ACPI tables of the machine (docs/machine.md): RSDP, RSDT,
// XSDT, FADT, FACS, DSDT, MADT and WAET. Section numbers are those of ACPI 6.4.
//
// The tables are made once, as two blobs whose pointers are offsets and whose checksums
// are missing, and a script that says what to patch. The script is in the format of
// the fw_cfg file etc/table-loader, so that SeaBIOS and OVMF place and patch the
// blobs where they like; for a guest that boots without firmware, [Tables.Install] runs the
// same script.
//
// The DSDT has revision 1, and so 32-bit integers, because Windows Server 2003 reads it.
// It says only what the machine has: no HPET, no PCI hot-plug, no sleep states but
// power-off (S5). Interrupts of PCI devices go through the PIIX3's four link devices,
// whose choice of IRQ holds for the 8259s and for the I/O APIC alike.
package acpi
