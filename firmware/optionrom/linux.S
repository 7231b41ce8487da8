# The option ROM through which SeaBIOS starts a Linux kernel, or anything else with
# Linux's real-mode entry point (iPXE, memtest86+), that is not on a disk.
#
# SeaBIOS takes the ROM from fw_cfg (file genroms/linux.bin), finds a boot entry vector
# in its Plug and Play header, and calls it when the boot order says so. The vector
# copies the four parts of the kernel from fw_cfg to where the VMM says, by DMA, and
# enters the kernel's setup code as Linux's Documentation/arch/x86/boot.rst prescribes.
# It uses SeaBIOS's stack and no other memory.

	# fw_cfg (QEMU docs/specs/fw_cfg.rst)
	.set	SELECTOR, 0x510
	.set	DATA, 0x511
	.set	DMA_HIGH, 0x514
	.set	DMA_LOW, 0x518
	.set	KEY_ID, 0x01
	.set	ID_DMA, 0x02			# bit of that item
	.set	KEY_CMDLINE_ADDR, 0x13
	.set	KEY_SETUP_ADDR, 0x16
	.set	CONTROL_READ_SELECT, 0x0a00	# of a descriptor: the last two of four bytes
	.set	CONTROL_ERROR, 0x01000000	# big-endian 1

	# BIOS
	.set	PRINT, 0x0e			# function of interrupt 0x10
	.set	NEXT_DEVICE, 0x18		# interrupt: this one did not boot

	.code16
	.text
	.globl	_start
_start:
	.byte	0x55, 0xaa
	.byte	1				# sectors of 512 bytes
	lret					# initialisation: nothing to do
	.org	0x1a
	.word	pnp
	.org	0x20
pnp:						# Plug and Play BIOS specification 1.0A, 3.2
	.ascii	"$PnP"
	.byte	1, 2				# revision, length in 16 bytes
	.word	0				# no other header
	.byte	0
	.byte	0				# checksum, by build.sh
	.long	0				# device
	.word	vendor, product
	.byte	0, 0, 0				# class
	.byte	0x04				# can start an operating system
	.word	0, 0				# no connection vectors
	.word	boot
	.word	0, 0

vendor:	.asciz	"ftvmm"
product: .asciz	"Linux kernel given to ftvmm"
message: .asciz	"ftvmm: the kernel could not be copied from fw_cfg\r\n"

	# address, size and data of each part
parts:	.word	KEY_SETUP_ADDR, 0x17, 0x18		# setup code
	.word	KEY_CMDLINE_ADDR, 0x14, 0x15		# command line
	.word	0x07, 0x08, 0x11		# kernel
	.word	0x0a, 0x0b, 0x12		# initial RAM disk
	.word	0

boot:
	cld
	sub	$16, %sp			# a DMA descriptor at SS:BP
	mov	%sp, %bp
	xor	%edi, %edi			# its linear address in EDI
	mov	%ss, %di
	shl	$4, %edi
	movzwl	%bp, %eax
	add	%eax, %edi
	mov	$KEY_ID, %ax
	call	number
	test	$ID_DMA, %al
	jz	fail
	mov	$parts, %si
part:
	cs lodsw
	test	%ax, %ax
	jz	enter
	call	number
	bswap	%eax
	mov	%eax, 12(%bp)			# address, lower half
	movl	$0, 8(%bp)
	cs lodsw
	call	number
	bswap	%eax
	mov	%eax, 4(%bp)			# length
	cs lodsw
	cmpl	$0, 4(%bp)
	je	part
	xchg	%al, %ah
	mov	%ax, (%bp)			# key
	movw	$CONTROL_READ_SELECT, 2(%bp)
	xor	%eax, %eax
	mov	$DMA_HIGH, %dx
	out	%eax, %dx
	mov	%edi, %eax
	bswap	%eax
	mov	$DMA_LOW, %dx
	out	%eax, %dx
wait:
	mov	(%bp), %eax
	test	%eax, %eax
	jz	part
	cmp	$CONTROL_ERROR, %eax
	jne	wait
fail:
	mov	$message, %si
1:	cs lodsb
	test	%al, %al
	jz	2f
	mov	$PRINT, %ah
	mov	$7, %bx
	int	$0x10
	jmp	1b
2:	add	$16, %sp
	int	$NEXT_DEVICE

enter:						# all segments at the setup code, the stack below the command line
	mov	$KEY_SETUP_ADDR, %ax
	call	number
	mov	%eax, %ebx
	mov	$KEY_CMDLINE_ADDR, %ax
	call	number
	sub	%ebx, %eax
	sub	$16, %eax
	shr	$4, %ebx
	cli
	mov	%bx, %ds
	mov	%bx, %es
	mov	%bx, %fs
	mov	%bx, %gs
	mov	%bx, %ss
	mov	%eax, %esp
	add	$0x20, %bx
	push	%bx
	push	$0
	lret

# number returns in EAX the 32-bit item with the key in AX. It changes CX and DX.
number:
	mov	$SELECTOR, %dx
	out	%ax, %dx
	mov	$DATA, %dx
	mov	$4, %cx
1:	in	%dx, %al
	ror	$8, %eax
	loop	1b
	ret
