/*
 * Entry of every test guest: 32-bit protected mode without paging (PVH or
 * multiboot 1), then long mode, then CPL 3 as soon as the CPU's tables are
 * loaded. Where KVM emulates guest kernel code, an instruction at CPL 0 costs
 * 2 us; so nothing that CPL 3 can do is done here: rt_start (rt.c) fills in
 * the IDT and the full page tables natively.
 */
#include "layout.h"

#ifdef MULTIBOOT
/* Multiboot 1 header; flag bit 1: pass the memory map. */
	.section .multiboot, "a"
	.balign 4
	.long 0x1badb002, 2, -(0x1badb002 + 2)
#else
/* PVH: XEN_ELFNOTE_PHYS32_ENTRY, the 32-bit entry point. */
	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 8, 18
	.asciz "Xen"
	.quad start32
#endif

	.section .text.entry, "ax"
	.code32
	.globl start32
start32:
	cli
	cld
	movl $rt_kernel_stack_top, %esp	/* the loader's may be beyond what is mapped first */
	movl %eax, rt_boot_eax
	movl %ebx, rt_boot_ebx

	/* The boot tables map the first 16 MiB, user-accessible, with the
	 * accessed and dirty bits already set. */
	movl $(boot_pdpt + 7), boot_pml4
	movl $(boot_pd + 7), boot_pdpt
	movl $boot_pd, %edi
	movl $0xe7, %eax
1:	movl %eax, (%edi)
	addl $8, %edi
	addl $0x200000, %eax
	cmpl $0x10000e7, %eax
	jb 1b

	/* The TSS descriptor's base is split in a way that no relocation can
	 * express. */
	movl $rt_tss, %eax
	movw %ax, gdt + SEL_TSS + 2
	shrl $16, %eax
	movb %al, gdt + SEL_TSS + 4
	movb %ah, gdt + SEL_TSS + 7

	lgdt gdt_pointer
	movl $CR4_PAE_OSFXSR_OSXMMEXCPT, %eax
	movl %eax, %cr4
	movl $boot_pml4, %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	xorl %edx, %edx
	movl $EFER_LME, %eax
	wrmsr
	movl $CR0_PG_WP_NE_MP_PE, %eax
	movl %eax, %cr0
	ljmp $SEL_KCODE, $start64

	.code64
start64:
	movl $SEL_KDATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $0, %eax
	movl %eax, %fs
	movl %eax, %gs
	movq $rt_kernel_stack_top, rt_tss + TSS_RSP0
	movw $TSS_BITMAP, rt_tss + TSS_IOMAP
	movb $0xff, rt_tss + TSS_BITMAP + 8192
	movl $SEL_TSS, %eax
	ltr %ax
	lidt idt_pointer
	pushq $SEL_UDATA
	pushq $rt_user_stack_top - 8
	pushq $2
	pushq $SEL_UCODE
	pushq $rt_start
	iretq

	.text
/* One stub a vector, 16 bytes each, so that the IDT can be computed. */
	.globl rt_stubs
	.balign 16
rt_stubs:
	.set vector, 0
	.rept 256
	.balign 16
	.if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
	.else
	pushq $0
	.endif
	pushq $vector
	jmp trap_common
	.set vector, vector + 1
	.endr

trap_common:
	pushq %rax
	pushq %rbx
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %rbp
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	cld
	movq %rsp, %rdi
	call rt_trap
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rbp
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	popq %rbx
	popq %rax
	addq $16, %rsp
	iretq

/*
 * int rt_try(void (*fn)(void *), void *arg): run fn at the caller's level; -1,
 * or the vector of the exception that ended it. rt_trap resumes at
 * rt_try_fault with the stack of this frame.
 */
	.globl rt_try, rt_try_fault
rt_try:
	pushq %rbx
	pushq %rbp
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	pushq rt_try_sp
	movq %rsp, rt_try_sp
	movq %rdi, %rax
	movq %rsi, %rdi
	call *%rax
	movl $-1, %eax
rt_try_fault:
	popq rt_try_sp
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %rbp
	popq %rbx
	ret

	.data
	.balign 8
gdt:
	.quad 0, 0
	.quad 0x00af9b000000ffff	/* 0x10 kernel code, 64-bit */
	.quad 0x00cf93000000ffff	/* 0x18 kernel data */
	.quad 0x00cffb000000ffff	/* 0x20 user code, 32-bit */
	.quad 0x00cff3000000ffff	/* 0x28 user data */
	.quad 0x00affb000000ffff	/* 0x30 user code, 64-bit */
	.quad 0
	.quad 0x0000890000000000 + TSS_BITMAP + 8192	/* 0x40 TSS */
	.quad 0
gdt_end:
gdt_pointer:
	.word gdt_end - gdt - 1
	.quad gdt
idt_pointer:
	.word 256 * 16 - 1
	.quad rt_idt

	.bss
	.balign 4096
boot_pml4:	.skip 4096
boot_pdpt:	.skip 4096
boot_pd:	.skip 4096
	.globl rt_idt, rt_tss
rt_idt:		.skip 4096
rt_tss:		.skip TSS_BITMAP + 8192 + 1
	.balign 4096
		.skip 16384
rt_kernel_stack_top:
		.skip 65536
rt_user_stack_top:
	.section .note.GNU-stack, "", @progbits
