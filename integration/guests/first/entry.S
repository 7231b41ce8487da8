/*
 * first: the shortest guest, without the runtime. It writes 0 to the debug exit;
 * what a VMM takes for it is its start-up time. first.elf is entered by PVH,
 * first.bin, the same bytes without a header, at its first byte in any mode.
 */
	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 8, 18
	.asciz "Xen"
	.quad start32

	.section .text.entry, "ax"
	.code32
	.globl start32
start32:
	xorl %eax, %eax
	outb %al, $0xf4
1:	hlt
	jmp 1b
