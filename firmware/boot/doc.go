// Package boot enters kernels without firmware: it places a kernel, its initial
// RAM disk, its command line and the information that its protocol asks for in guest
// memory, and says in which state the first CPU is to start ([Entry]).
//
// It knows five kinds of file:
//
//   - [Linux]: a bzImage, by the 64-bit boot protocol, or the 32-bit one where the
//     kernel has no 64-bit entry (Linux Documentation/arch/x86/boot.rst).
//   - [PVH]: an ELF file with the note XEN_ELFNOTE_PHYS32_ENTRY, entered in 32-bit
//     protected mode with EBX at an hvm_start_info (Xen docs/misc/pvh.pandoc).
//   - [Multiboot]: a file with a Multiboot 1 header, entered in 32-bit protected mode
//     with EAX at the magic number and EBX at the information (Multiboot 0.6.96).
//   - [ELF64]: any other ELF file for x86-64 (ET_EXEC), entered at its entry point in
//     64-bit mode. The first 4 GiB are mapped to themselves by pages of 2 MiB that user
//     code cannot reach, RSP is at a stack of 16 KiB, and RDI and RBX are at the same
//     hvm_start_info that PVH has.
//   - [Flat]: bytes without a header, loaded at 1 MiB and entered at their first byte,
//     in the state of PVH. Nothing tells such a file from garbage, so it is never
//     detected: the user asks for it.
//
// Interrupts are off, no interrupt table is loaded, and in every mode the segments
// are flat.
//
// What a loader needs below 1 MiB lies between [ScratchBase] and [ScratchEnd]; a
// kernel that wants to be loaded there is refused. The files come from a user, who
// may have been given them by somebody else: nothing in them is trusted.
package boot
