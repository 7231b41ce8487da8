/*
 * The runtime of the test guests: a few hundred lines between the loader and a
 * guest's main().
 *
 * Where things run. main() runs at CPL 3 in 64-bit mode with interrupts off. The first
 * 4 GiB are mapped one to one and user-accessible, device memory included, and
 * every I/O port is open, so that a guest drives devices from CPL 3: on hosts
 * whose KVM emulates guest kernel code that is some thousand times faster than
 * CPL 0. What needs CPL 0 goes through a fault (UD2; INT does not work
 * everywhere): rt_cpl0() calls any function there. Interrupt handlers run at
 * CPL 0 and should be short; they must not use the services marked [3].
 *
 * Time. No guest uses RDTSC, which stock KVM cannot trap; delays come from the
 * PM timer or the PIT.
 *
 * Output. Lines "ok NAME detail" and "FAIL NAME detail" are claims, lines that
 * begin with "# " are remarks which may differ from run to run. A guest ends
 * with exit status 0 on port 0xf4 if and only if every claim held.
 *
 * Restrictions of the slowest host: no SSE or x87, INT, INT3, SYSCALL or
 * POPCNT at CPL 0. Everything but guests that say otherwise is compiled with
 * -mgeneral-regs-only.
 */
#ifndef RT_H
#define RT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PAGE_SIZE 4096ul
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

/* ---- boot --------------------------------------------------------------- */

enum { MEM_RAM = 1, MEM_RESERVED = 2, MEM_ACPI = 3, MEM_NVS = 4 };

struct mem_range {
	u64 start, size;
	u32 type;
};

enum loader { LOADER_NONE, LOADER_PVH, LOADER_MULTIBOOT };

/* What the loader told, copied out of its own structures. */
struct boot {
	enum loader loader;
	const char *cmdline; /* "" when there is none */
	u64 rsdp;            /* address, 0 when the loader gave none */
	struct mem_range mem[64];
	u32 mem_count;
	u64 module, module_size; /* the first module, 0 when none */
};
extern struct boot rt_boot;

/* Every guest defines it; its result goes to rt_exit. */
int main(struct boot *);

/* Ends the VM with a status on port 0xf4 (ftvmm exits with 32+status, which must be below 32, QEMU with
 * 2*status+1), or halts for good where that port does nothing. */
void rt_exit(int status) __attribute__((noreturn));
#define RT_STATUS_FAILED 1 /* a claim failed */
#define RT_STATUS_TRAP 30  /* an unexpected exception or interrupt */

/* arg looks for "key=value" or a bare "key" among the words of the command
 * line: the value (valid until the next 8 calls), "" for a bare key, NULL if
 * absent. arg_number takes decimal and 0x, with suffixes k, m, g. */
const char *arg(const char *key);
u64 arg_number(const char *key, u64 otherwise);
bool arg_is(const char *key, const char *value);

/* page_alloc returns n zeroed pages, physically contiguous, below 3 GiB; there
 * is no free. Running out ends the guest. */
void *page_alloc(u64 n);

/* ---- text and memory ---------------------------------------------------- */

/* %d %i %u %x %X %c %s %p %%, flags - 0, a width or *, l ll z. Output is buffered to
 * the end of the line. */
int printf(const char *format, ...) __attribute__((format(printf, 1, 2)));
int vsnprintf(char *to, size_t size, const char *format, va_list);
int snprintf(char *to, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
void console_flush(void);

/* check prints "ok NAME detail" or "FAIL NAME detail" and returns cond. */
bool check(bool cond, const char *name, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* finish is what main returns: 0 if every check held. */
int finish(void);

void *memcpy(void *to, const void *from, size_t);
void *memset(void *to, int, size_t);
void *memmove(void *to, const void *from, size_t);
int memcmp(const void *, const void *, size_t);
size_t strlen(const char *);
int strcmp(const char *, const char *);
int strncmp(const char *, const char *, size_t);
/* fnv1a continues a 64-bit FNV-1a hash over n bytes; begin with FNV_START. */
#define FNV_START 0xcbf29ce484222325ul
u64 fnv1a(u64 hash, const void *, size_t n);

/* ---- I/O ---------------------------------------------------------------- */

static inline u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline void outb(u16 port, u8 v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outw(u16 port, u16 v) { __asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outl(u16 port, u32 v) { __asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(port)); }
static inline void insb(u16 port, void *to, u64 n) { __asm__ volatile("rep insb" : "+D"(to), "+c"(n) : "d"(port) : "memory"); }
static inline void insw(u16 port, void *to, u64 n) { __asm__ volatile("rep insw" : "+D"(to), "+c"(n) : "d"(port) : "memory"); }
static inline void insl(u16 port, void *to, u64 n) { __asm__ volatile("rep insl" : "+D"(to), "+c"(n) : "d"(port) : "memory"); }
static inline void outsb(u16 port, const void *from, u64 n) { __asm__ volatile("rep outsb" : "+S"(from), "+c"(n) : "d"(port) : "memory"); }
static inline void outsw(u16 port, const void *from, u64 n) { __asm__ volatile("rep outsw" : "+S"(from), "+c"(n) : "d"(port) : "memory"); }
static inline void outsl(u16 port, const void *from, u64 n) { __asm__ volatile("rep outsl" : "+S"(from), "+c"(n) : "d"(port) : "memory"); }

/* One MOV each, so that the size of the access is what the name says. */
static inline u8 mmio_read8(u64 a) { u8 v; __asm__ volatile("movb (%1), %0" : "=a"(v) : "r"(a) : "memory"); return v; }
static inline u16 mmio_read16(u64 a) { u16 v; __asm__ volatile("movw (%1), %0" : "=a"(v) : "r"(a) : "memory"); return v; }
static inline u32 mmio_read32(u64 a) { u32 v; __asm__ volatile("movl (%1), %0" : "=a"(v) : "r"(a) : "memory"); return v; }
static inline u64 mmio_read64(u64 a) { u64 v; __asm__ volatile("movq (%1), %0" : "=a"(v) : "r"(a) : "memory"); return v; }
static inline void mmio_write8(u64 a, u8 v) { __asm__ volatile("movb %0, (%1)" : : "a"(v), "r"(a) : "memory"); }
static inline void mmio_write16(u64 a, u16 v) { __asm__ volatile("movw %0, (%1)" : : "a"(v), "r"(a) : "memory"); }
static inline void mmio_write32(u64 a, u32 v) { __asm__ volatile("movl %0, (%1)" : : "a"(v), "r"(a) : "memory"); }
static inline void mmio_write64(u64 a, u64 v) { __asm__ volatile("movq %0, (%1)" : : "a"(v), "r"(a) : "memory"); }

static inline void barrier(void) { __asm__ volatile("" : : : "memory"); }
static inline void fence(void) { __asm__ volatile("mfence" : : : "memory"); }
/* For benchmarks' own curiosity only: nothing that is compared may depend on it. */
static inline u64 rdtsc(void) { u32 a, d; __asm__ volatile("rdtsc" : "=a"(a), "=d"(d)); return (u64)d << 32 | a; }
static inline void cpuid(u32 leaf, u32 sub, u32 r[4])
{
	__asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}

/* ---- CPL 0 services ------------------------------------------------------ */

/* rt_cpl0 calls fn(arg) at CPL 0 with interrupts off. [3] */
u64 rt_cpl0(u64 (*fn)(void *), void *arg);
/* rt_interrupts turns interrupts on or off for the code that follows; it returns
 * whether they were on. [3] */
bool rt_interrupts(bool on);
/* rt_wait is STI; HLT; CLI at CPL 0: sleeps until an interrupt has been handled.
 * Look at the condition with interrupts off, then wait: nothing is lost. [3] */
void rt_wait(void);
/* rdmsr and wrmsr return false when the CPU answered #GP. [3] */
bool rdmsr(u32 msr, u64 *value);
bool wrmsr(u32 msr, u64 value);
u64 read_cr8(void);     /* [3] */
void write_cr8(u64);    /* [3] */
void load_cr3(u64);     /* [3] */

/* rt_try calls fn(arg) and returns -1, or the vector of the CPU exception that
 * ended it. It works at either level and nests. */
int rt_try(void (*fn)(void *), void *arg);
/* The error code and CR2 of the last exception that rt_try caught. */
extern u64 rt_try_error, rt_try_cr2;

struct regs {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	u64 vector, error;
	u64 rip, cs, rflags, rsp, ss;
};

/* ---- interrupts ---------------------------------------------------------- */

/* Who gets the end-of-interrupt after the handler. */
enum eoi { EOI_NONE, EOI_PIC, EOI_LAPIC };

/* irq_handle sets what happens on an interrupt vector (32..255): the handler, if
 * any, is called at CPL 0, then the EOI is sent; irq_count counts. A vector that
 * nobody claimed ends the guest. */
typedef void irq_handler(struct regs *);
void irq_handle(u8 vector, irq_handler *, enum eoi);
extern volatile u64 irq_count[256];
/* irq_wait sleeps until irq_count[vector] has reached count; with interrupts off
 * on entry, or it may miss the last one. [3] */
void irq_wait(u8 vector, u64 count);

#define PIC_VECTOR 0x20 /* IRQ n arrives as vector PIC_VECTOR + n after pic_init */

/* pic_init programs both 8259As: vectors from PIC_VECTOR, edge by ELCR, manual
 * EOI, everything masked but the cascade. */
void pic_init(void);
/* pic_wire lets the 8259A's interrupts through the local APIC (LINT0 as ExtINT),
 * which firmware does on a real board; after lapic_init. */
void pic_wire(void);
void pic_mask(int irq, bool masked);
void pic_eoi(int irq);
u16 pic_irr(void);
u16 pic_isr(void);

#define LAPIC_BASE 0xfee00000ul
enum {
	LAPIC_ID = 0x20, LAPIC_VERSION = 0x30, LAPIC_TPR = 0x80, LAPIC_PPR = 0xa0, LAPIC_EOI = 0xb0,
	LAPIC_LDR = 0xd0, LAPIC_DFR = 0xe0, LAPIC_SVR = 0xf0, LAPIC_ISR = 0x100, LAPIC_TMR = 0x180,
	LAPIC_IRR = 0x200, LAPIC_ESR = 0x280, LAPIC_ICR = 0x300, LAPIC_ICR_HIGH = 0x310,
	LAPIC_LVT_TIMER = 0x320, LAPIC_LVT_LINT0 = 0x350, LAPIC_LVT_LINT1 = 0x360, LAPIC_LVT_ERROR = 0x370,
	LAPIC_TIMER_INITIAL = 0x380, LAPIC_TIMER_CURRENT = 0x390, LAPIC_TIMER_DIVIDE = 0x3e0,
};
#define LVT_MASKED 0x10000u
#define LVT_PERIODIC 0x20000u
#define LVT_EXTINT 0x700u
#define LAPIC_SPURIOUS 0xff

static inline u32 lapic_read(u32 reg) { return mmio_read32(LAPIC_BASE + reg); }
static inline void lapic_write(u32 reg, u32 v) { mmio_write32(LAPIC_BASE + reg, v); }
/* lapic_init software-enables the APIC with every LVT entry masked, TPR 0, flat
 * logical id 1 and spurious vector LAPIC_SPURIOUS (handled: counted, no EOI). */
void lapic_init(void);
/* lapic_bit reads one bit of the 256-bit ISR, TMR or IRR. */
bool lapic_bit(u32 reg, u8 vector);

#define IOAPIC_BASE 0xfec00000ul
#define IOAPIC_PINS 24
#define REDIR_MASKED 0x10000u
#define REDIR_LEVEL 0x8000u
#define REDIR_REMOTE_IRR 0x4000u
#define REDIR_LOW 0x2000u
u32 ioapic_read(u8 index);
void ioapic_write(u8 index, u32 v);
/* ioapic_route writes a pin's redirection entry: vector | REDIR_* flags, fixed
 * delivery to APIC id 0. */
void ioapic_route(int pin, u32 entry);
u32 ioapic_entry(int pin); /* the low half */

/* ---- time ---------------------------------------------------------------- */

#define PIT_HZ 1193182u
#define PMTIMER_HZ 3579545u
/* pmtimer_port finds the PM timer by the FADT, else by PIIX4's configuration
 * space, which it enables at 0x600 if need be; 0 if there is none. */
u16 pmtimer_port(void);
u32 pmtimer_read(void); /* 24 bits */
/* delay_us polls the PM timer, or PIT channel 2 where there is none. */
void delay_us(u32 us);
void pit_periodic(u32 hz);      /* channel 0, mode 2, IRQ 0; hz of 19 and up */
void pit_one_shot(u16 ticks);   /* channel 0, mode 0 */
u16 pit_read(int channel);      /* latches and reads */

/* ---- PCI ----------------------------------------------------------------- */

struct pci {
	u8 bus, dev, fn;
	u16 vendor, device;
	u8 class, subclass, progif, revision, header;
	u16 subsystem_vendor, subsystem;
};
struct pci_bar {
	u64 addr, size; /* size 0: not implemented */
	bool io, is64, prefetch;
};

u8 pci_read8(const struct pci *, u8 reg);
u16 pci_read16(const struct pci *, u8 reg);
u32 pci_read32(const struct pci *, u8 reg);
void pci_write8(const struct pci *, u8 reg, u8);
void pci_write16(const struct pci *, u8 reg, u16);
void pci_write32(const struct pci *, u8 reg, u32);
/* pci_scan calls fn for each function of bus 0 in order, until fn returns false. */
void pci_scan(bool (*fn)(struct pci *, void *), void *arg);
/* pci_find fills in the nth (from 0) function with this id; 0xffff matches any. */
bool pci_find(u16 vendor, u16 device, int nth, struct pci *);
/* pci_bar sizes a BAR (with decoding off meanwhile) and, when its address is
 * still zero, assigns one. */
struct pci_bar pci_bar(const struct pci *, int index);
/* pci_enable assigns all BARs and turns on I/O, memory and bus mastering. */
void pci_enable(const struct pci *);
/* pci_cap returns the offset of the nth capability with this id, 0 if none. */
u8 pci_cap(const struct pci *, u8 id, int nth);
/* pci_irq is the interrupt line: of the config space, which firmware fills in. */
u8 pci_irq(const struct pci *);

/* ---- ACPI ---------------------------------------------------------------- */

struct acpi_header {
	char signature[4];
	u32 length;
	u8 revision, checksum;
	char oem_id[6], oem_table[8];
	u32 oem_revision;
	char creator[4];
	u32 creator_revision;
} __attribute__((packed));

struct acpi_fadt {
	struct acpi_header header;
	u32 facs, dsdt;
	u8 model, profile;
	u16 sci_int;
	u32 smi_cmd;
	u8 acpi_enable, acpi_disable, s4bios_req, pstate_cnt;
	u32 pm1a_evt, pm1b_evt, pm1a_cnt, pm1b_cnt, pm2_cnt, pm_tmr, gpe0, gpe1;
	u8 pm1_evt_len, pm1_cnt_len, pm2_cnt_len, pm_tmr_len, gpe0_len, gpe1_len, gpe1_base, cst_cnt;
	u16 c2_latency, c3_latency, flush_size, flush_stride;
	u8 duty_offset, duty_width, day_alarm, month_alarm, century;
	u16 boot_arch;
	u8 reserved;
	u32 flags;
	u8 reset_reg[12];
	u8 reset_value;
} __attribute__((packed));

u8 *acpi_rsdp(void); /* from the loader, else by search; NULL if none */
/* acpi_table finds a table through the RSDT or XSDT ("DSDT" and "FACS" through
 * the FADT). */
struct acpi_header *acpi_table(const char *signature);
u8 byte_sum(const void *, size_t);
/* power_off enters S5 through PM1a_CNT, SLP_TYP 0; returns if that did nothing. */
void power_off(void);

#endif
