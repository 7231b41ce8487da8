/*
 * irq32: interrupts in 32-bit protected mode at CPL 0 without paging, in segments that do
 * not begin at 0, as iPXE has them. Loaded at 1 MiB and entered at its first byte, in flat
 * segments.
 *
 * The PIT's ticks come through an interrupt gate into a halted and a spinning guest,
 * then through a trap gate. Every frame and all registers and flags around an interrupt are
 * checked. It ends by the debug exit: 0, or the number of the check that failed:
 *
 *	1  the frame's CS		4  IF in the handler
 *	2  the frame's EFLAGS		5  registers or flags after the interrupt
 *	3  the frame's EIP		6  ESP after all
 */
	.code32
	.set LOADED, 0x100000	/* linear */
	.set SEGMENT, 0x84000	/* base of our segments; GDT has it, too */
	.set BASE, LOADED - SEGMENT
	.set STACK, 0xa2000	/* as an offset RAM, as a linear address not */
	.set CODE, 0x18		/* not the first one, so that it is seen to be loaded */
	.set DATA, 0x10
	.set VECTOR, 0x20
	.set TICKS, 20		/* of each kind */
	.set DIVISOR, 1193	/* of the PIT: a millisecond */
	.set FLAGS_KEPT, 0x8d5	/* CF PF AF ZF SF OF */
	.set IF, 0x200
	.set DEBUG_EXIT, 0xf4

start:
	cli
	cld
	lgdt LOADED + gdt_pointer
	ljmp $CODE, $(BASE + 1f)
1:	movl $DATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $STACK, %esp
	movb $0x8e, %al		/* interrupt gate */
	call set_gate
	lidt BASE + idt_pointer

	movb $0x11, %al		/* both PICs: ICW1 to ICW4, only IRQ 0 open */
	outb %al, $0x20
	outb %al, $0xa0
	movb $VECTOR, %al
	outb %al, $0x21
	movb $(VECTOR + 8), %al
	outb %al, $0xa1
	movb $4, %al
	outb %al, $0x21
	movb $2, %al
	outb %al, $0xa1
	movb $1, %al
	outb %al, $0x21
	outb %al, $0xa1
	movb $0xfe, %al
	outb %al, $0x21
	movb $0xff, %al
	outb %al, $0xa1
	movb $0x34, %al		/* counter 0, mode 2 */
	outb %al, $0x43
	movb $(DIVISOR & 255), %al
	outb %al, $0x40
	movb $(DIVISOR >> 8), %al
	outb %al, $0x40

	/* Halted. */
	movl $(BASE + halted), BASE + from
	movl $(BASE + halted_end), BASE + to
	movl $0x12345678, %ebx
	movl $0x9abcdef0, %ebp
1:	stc
	movb $0x7f, %al
	incb %al		/* sets OF, SF and AF, and leaves CF */
	pushfl
	popl %edi
	leal IF(%edi), %edi
	sti
halted:
	hlt
halted_end:
	cli
	call check_state
	cmpl $TICKS, BASE + ticks
	jb 1b

	/* Spinning, without a change of flags. */
	movl $(BASE + spinning), BASE + from
	movl $(BASE + spinning_end), BASE + to
	movl $0, BASE + ticks
	pushl %edi
	popfl
spinning:
	movl BASE + ticks, %ecx
	leal -TICKS(%ecx), %ecx
	jecxz spinning_end
	jmp spinning
spinning_end:
	cli
	call check_state

	/* Through a trap gate, which leaves interrupts on. */
	movb $0x8f, %al
	call set_gate
	movl $IF, BASE + if_within
	movl $(BASE + trapped), BASE + from
	movl $(BASE + trapped_end), BASE + to
	movl $0, BASE + ticks
	pushl %edi
	popfl
trapped:
	hlt
	movl BASE + ticks, %ecx
	leal -TICKS(%ecx), %ecx
	jecxz trapped_end
	jmp trapped
trapped_end:
	cli
	call check_state
	movb $6, %al
	cmpl $STACK, %esp
	jne fail
	movb $0, %al
fail:
	outb %al, $DEBUG_EXIT
	cli
	hlt

/* check_state fails unless the flags are those in EDI, but for IF, and EBX and EBP what they
 * were. CALL leaves the flags. */
check_state:
	pushfl
	popl %ecx
	movb $5, %al
	xorl %edi, %ecx
	testl $FLAGS_KEPT, %ecx
	jne fail
	cmpl $0x12345678, %ebx
	jne fail
	cmpl $0x9abcdef0, %ebp
	jne fail
	ret

/* set_gate makes the timer's gate of type AL. */
set_gate:
	movl $(BASE + handler), %ecx
	movw %cx, BASE + idt + VECTOR * 8
	movw $CODE, BASE + idt + VECTOR * 8 + 2
	movb $0, BASE + idt + VECTOR * 8 + 4
	movb %al, BASE + idt + VECTOR * 8 + 5
	shrl $16, %ecx
	movw %cx, BASE + idt + VECTOR * 8 + 6
	ret

handler:
	pushl %eax
	pushl %ecx
	movb $4, %al
	pushfl
	popl %ecx
	cli
	andl $IF, %ecx
	cmpl BASE + if_within, %ecx
	jne fail
	movb $1, %al
	cmpl $CODE, 12(%esp)
	jne fail
	movb $2, %al
	movl 16(%esp), %ecx
	testl $IF, %ecx
	je fail
	testl $2, %ecx
	je fail
	movb $3, %al
	movl 8(%esp), %ecx
	cmpl BASE + from, %ecx
	jb fail
	cmpl BASE + to, %ecx
	ja fail
	cmpl $TICKS, BASE + ticks
	je 1f
	incl BASE + ticks
1:	movb $0x20, %al
	outb %al, $0x20
	popl %ecx
	popl %eax
	iret

	.balign 8
gdt:	.quad 0
	.quad 0
	.quad 0x00cf93084000ffff	/* data, base SEGMENT */
	.quad 0x00cf9f084000ffff	/* code, conforming, base SEGMENT */
gdt_pointer:
	.word 31
	.long LOADED + gdt
idt_pointer:
	.word (VECTOR + 1) * 8 - 1
	.long LOADED + idt
	.balign 8
ticks:	.long 0
from:	.long 0
to:	.long 0
if_within:
	.long 0
	.balign 8
idt:	.fill VECTOR + 1, 8, 0
