// Package firmware is what a PC finds in its memory before its first instruction:
// the map of guest-physical addresses, the images of SeaBIOS and OVMF, and the
// fw_cfg items that tell those what machine they are on.
//
// There are two ways to start a guest. Either a firmware image runs first: [Layout]
// with the image's size, [LoadImage], [Configure], and the CPU at its reset vector.
// Or a kernel is entered directly, without firmware: [Layout] without an image,
// tables by acpi.Tables.Install and smbios.Tables.Install, and package boot.
//
// Packages below this one: acpi and smbios build the tables, boot loads kernels,
// optionrom is the small ROM through which SeaBIOS starts a Linux kernel. All are
// pure functions of the machine's configuration: both hosts of a pair build equal bytes.
package firmware
