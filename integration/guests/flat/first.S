/*
 * first: the shortest guest. A flat image, entered in 16-bit real mode at its
 * first byte; writes 0 to the debug exit. What a VMM takes for it is its
 * start-up time.
 */
	.code16
	xorw %ax, %ax
	outb %al, $0xf4
1:	hlt
	jmp 1b
