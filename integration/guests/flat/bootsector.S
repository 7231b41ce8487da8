/*
 * bootsector: the first sector of a BIOS disk. It says hello through INT 10h and on
 * COM1, reads blocks from the boot drive by INT 13h, extended read, sums them,
 * prints the sum on COM1 and ends by the debug exit.
 *
 * A host program sets the parameters, which are little-endian, at these offsets:
 *
 *	0x1e0  u64  first sector to read (default 1)
 *	0x1e8  u32  distance between the starts of two blocks, in sectors (default 8)
 *	0x1ec  u16  blocks to read (default 1)
 *	0x1ee  u8   sectors in a block, 1 to 64 (default 8, 4 KiB)
 *	0x1ef  u8   1: sum what was read (default); 0: do not, which is quicker
 *
 * The sum is that of all the 32-bit words, modulo 2^32. Output on COM1:
 *
 *	bootsector
 *	ok read BBBB sum SSSSSSSS	(hexadecimal)
 *
 * (begun on a new line, since firmware may have left the cursor anywhere on it)
 * or "FAIL read BBBB error EE": the block it failed at, INT 13h's status in AH.
 */
	.code16
	.set BUFFER, 0x1000	/* segment of the block buffer: 64 KiB in */
	.set COM1, 0x3f8
	.set DEBUG_EXIT, 0xf4

start:
	ljmp $0x7c0, $1f	/* some firmware enters at 0000:7c00 */
1:	cli
	xorw %ax, %ax
	movw %ax, %ss
	movw $0x7c00, %sp
	sti
	cld
	movw %cs, %ax
	movw %ax, %ds
	movb %dl, drive
	movw $hello, %si
	call print_both

	xorl %ebp, %ebp		/* the sum */
	movw blocks, %cx
read:
	jcxz done
	pushw %cx
	movb sectors, %al
	movb %al, packet_sectors
	movb $0x42, %ah
	movb drive, %dl
	movw $packet, %si
	int $0x13
	popw %cx
	jc failed
	cmpb $0, summing
	je next
	pushw %cx
	pushw %ds
	movzbw sectors, %cx
	shlw $7, %cx		/* 128 words a sector */
	movw $BUFFER, %ax
	movw %ax, %ds
	xorw %si, %si
2:	lodsl
	addl %eax, %ebp
	loop 2b
	popw %ds
	popw %cx
next:
	movl stride, %eax
	addl %eax, packet_lba
	decw %cx
	jmp read

done:
	cli			/* or firmware's timer tick writes in between */
	movw $ok, %si
	call print
	movw blocks, %ax
	call hex16
	movw $sum, %si
	call print
	movl %ebp, %eax
	shrl $16, %eax
	call hex16
	movw %bp, %ax
	call hex16
	movb $'\n', %al
	call put
	xorb %al, %al
	jmp exit

failed:
	cli
	movb %ah, %bl
	movw $fail, %si
	call print
	movw blocks, %ax
	subw %cx, %ax
	call hex16
	movw $error, %si
	call print
	movb %bl, %al
	call hex8
	movb $'\n', %al
	call put
	movb $1, %al
exit:
	outb %al, $DEBUG_EXIT
3:	cli
	hlt
	jmp 3b

/* AX or AL in hexadecimal; keeps all but AX and DX. */
hex16:
	pushw %ax
	movb %ah, %al
	call hex8
	popw %ax
hex8:
	pushw %ax
	shrb $4, %al
	call hex4
	popw %ax
hex4:
	andb $15, %al
	addb $'0', %al
	cmpb $'9', %al
	jbe put
	addb $'a' - '9' - 1, %al
put:				/* AL on COM1 */
	movb %al, %ah
	movw $COM1 + 5, %dx
4:	inb %dx, %al
	testb $0x20, %al
	jz 4b
	movw $COM1, %dx
	movb %ah, %al
	outb %al, %dx
	ret

/* The text at SI on COM1. */
print:
	lodsb
	testb %al, %al
	jz 5f
	call put
	jmp print
5:	ret

/* The text at SI on the screen and on COM1. */
print_both:
	lodsb
	testb %al, %al
	jz 5b
	pushw %ax
	movb $0x0e, %ah
	movw $7, %bx
	int $0x10
	popw %ax
	call put
	jmp print_both

hello:	.asciz "bootsector\n"
ok:	.asciz "\nok read "
sum:	.asciz " sum "
fail:	.asciz "\nFAIL read "
error:	.asciz " error "
drive:	.byte 0

/* The disk address packet, the last part of which is the first parameter. */
	.org 0x1d8
packet:	.byte 16, 0
packet_sectors: .word 0
	.word 0, BUFFER		/* offset, segment */
packet_lba: .quad 1
stride:	.long 8
blocks:	.word 1
sectors: .byte 8
summing: .byte 1
	.org 510
	.word 0xaa55
