# A bzImage of protocol 2.07 that says on the first serial port what it was given: the
# command line, read in real mode; a word of itself at 1 MiB and the start of the initial RAM disk, read
# in protected mode. Then it ends QEMU by its debug exit device.
	.set	COM1, 0x3f8
	.set	DEBUG_EXIT, 0xf4

	.code16
	.text
	.globl	_start
_start:
	.org	0x1f1
	.byte	1				# setup_sects
	.org	0x1fe
	.word	0xaa55
	jmp	setup
	.ascii	"HdrS"
	.word	0x0207
	.org	0x211
	.byte	1				# LOADED_HIGH
	.org	0x214
	.long	0x100000
ramdisk_image:
	.long	0
ramdisk_size:
	.long	0
	.org	0x228
cmd_line_ptr:
	.long	0
	.long	0x37ffffff			# initrd_addr_max
	.org	0x238
	.long	255				# cmdline_size
	.org	0x248
	.ascii	"not a younger protocol's fields"
setup:						# CS is the setup code's segment + 0x20, the other segments the setup code's
	mov	cmd_line_ptr, %eax
	shr	$4, %eax
	mov	%ax, %fs
	mov	$COM1, %dx
	xor	%si, %si
1:	fs lodsb
	test	%al, %al
	jz	2f
	out	%al, %dx
	jmp	1b
2:	mov	ramdisk_image, %esi
	xor	%eax, %eax			# the GDT's linear address
	mov	%ds, %ax
	shl	$4, %eax
	add	$gdt, %eax
	mov	%eax, gdtr+2
	lgdt	gdtr
	mov	$1, %eax
	mov	%eax, %cr0
	ljmpl	$0x10, $0x100000
gdtr:	.word	0x1f
	.long	0
	.balign	8
gdt:	.quad	0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
	.org	0x400

	.code32
	mov	$0x18, %ax
	mov	%ax, %ds
	mov	$COM1, %dx
	mov	0x100000 + mark - 0x400, %al
	out	%al, %dx
	mov	$7, %ecx
1:	lodsb
	out	%al, %dx
	loop	1b
	mov	$DEBUG_EXIT, %dx
	mov	$0x10, %al
	out	%al, %dx
2:	hlt
	jmp	2b
mark:	.ascii	"|"
