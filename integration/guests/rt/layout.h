/* Numbers that both the assembly and the C half of the runtime need. */
#ifndef RT_LAYOUT_H
#define RT_LAYOUT_H

/* Segment selectors, in the order that Linux uses. */
#define SEL_KCODE 0x10
#define SEL_KDATA 0x18
#define SEL_UDATA 0x2b
#define SEL_UCODE 0x33
#define SEL_TSS 0x40

/* 64-bit TSS: offsets of RSP0 and of the I/O bitmap's offset; the bitmap itself
 * follows the 104 architectural bytes. All bits zero: CPL 3 may use any port. */
#define TSS_RSP0 4
#define TSS_IOMAP 102
#define TSS_BITMAP 104

#define MSR_EFER 0xc0000080
#define EFER_LME 0x100
#define CR4_PAE_OSFXSR_OSXMMEXCPT 0x620
#define CR0_PG_WP_NE_MP_PE 0x80010023

#endif
