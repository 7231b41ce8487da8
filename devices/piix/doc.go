// Package piix is the board's chipset as firmware knows it: the 82441FX host bridge
// (function 0:0.0), the PIIX3 ISA bridge (0:1.0) and the power management function of
// the PIIX4 (0:1.3), the combination by whose identifiers SeaBIOS and OVMF recognise
// the i440fx board. ([pci.Function] 0:1.1, the IDE controller, is a device of its own.)
//
//   - The host bridge is configuration space only. Its PAM registers can be written
//     and read back but decode nothing: RAM lies behind 0xC0000 to 0xFFFFF always.
//     There is no system management mode, and its register (SMRAM) is storage, too.
//   - The ISA bridge routes the four PCI interrupts (PIRQA to PIRQD) to inputs of the
//     interrupt controllers and owns the reset port 0xCF9. The ELCR belongs to the
//     8259s.
//   - Power management has ACPI's fixed registers: events, control and timer in a
//     block of ports that firmware places, general-purpose events at 0xAFE0, and the
//     SMI command port 0xB2. What firmware's SMM handler would do on a real board
//     (turn ACPI on and off) happens at the port itself.
//
// The PM timer is a function of virtual time and has no state of its own.
//
// References: 82441FX (290549), 82371FB/82371SB (290550) and 82371AB (290562) data
// sheets, ACPI 6.5 chapter 4.8.
//
// Not offered: SMM, the SMBus controller (its base address register is storage and
// its enable bit stays 0), sleep states beyond reporting them, device activity traps.
package piix
