/* Start, traps and services: what stands between the CPU and main(). */
#include "rt.h"
#include "layout.h"

u32 rt_boot_eax, rt_boot_ebx;
struct boot rt_boot;
static char cmdline[2048];

extern char rt_image_end[], rt_stubs[];
extern u64 rt_idt[512];

static u64 pml4[512] __attribute__((aligned(4096)));
static u64 pdpt[512] __attribute__((aligned(4096)));
static u64 pd[4][512] __attribute__((aligned(4096)));

/* ---- loader structures ---- */

#define PVH_MAGIC 0x336ec578u
struct pvh_info {
	u32 magic, version, flags, nr_modules;
	u64 modules, cmdline, rsdp, memmap;
	u32 memmap_entries, reserved;
};
struct pvh_module {
	u64 addr, size, cmdline, reserved;
};
struct pvh_memmap {
	u64 addr, size;
	u32 type, reserved;
};

#define MULTIBOOT_MAGIC 0x2badb002u
#define MULTIBOOT_CMDLINE (1u << 2)
#define MULTIBOOT_MODS (1u << 3)
#define MULTIBOOT_MMAP (1u << 6)
struct multiboot_info {
	u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
	u32 mmap_length, mmap_addr;
};
struct multiboot_module {
	u32 start, end, string, reserved;
};
struct multiboot_mmap {
	u32 size;
	u64 addr, length;
	u32 type;
} __attribute__((packed));

static void copy_cmdline(u64 from)
{
	const char *p = (const char *)from;
	size_t n = 0;

	while (from && p[n] && n < sizeof cmdline - 1) {
		cmdline[n] = p[n];
		n++;
	}
	cmdline[n] = 0;
}

static void add_range(u64 start, u64 size, u32 type)
{
	if (rt_boot.mem_count < ARRAY_LEN(rt_boot.mem))
		rt_boot.mem[rt_boot.mem_count++] = (struct mem_range){ start, size, type };
}

static void read_boot_info(void)
{
	u64 info = rt_boot_ebx;

	rt_boot.cmdline = cmdline;
	if (rt_boot_eax == MULTIBOOT_MAGIC) {
		const struct multiboot_info *mb = (void *)info;

		rt_boot.loader = LOADER_MULTIBOOT;
		if (mb->flags & MULTIBOOT_CMDLINE)
			copy_cmdline(mb->cmdline);
		if (mb->flags & MULTIBOOT_MODS && mb->mods_count) {
			const struct multiboot_module *module = (void *)(u64)mb->mods_addr;

			rt_boot.module = module->start;
			rt_boot.module_size = module->end - module->start;
		}
		if (mb->flags & MULTIBOOT_MMAP) {
			u64 at = mb->mmap_addr, end = at + mb->mmap_length;

			while (at < end) {
				const struct multiboot_mmap *m = (void *)at;

				add_range(m->addr, m->length, m->type);
				at += m->size + sizeof m->size;
			}
		}
	} else if (info && *(u32 *)info == PVH_MAGIC) {
		const struct pvh_info *pvh = (void *)info;
		const struct pvh_memmap *m = (void *)pvh->memmap;

		rt_boot.loader = LOADER_PVH;
		copy_cmdline(pvh->cmdline);
		rt_boot.rsdp = pvh->rsdp;
		if (pvh->nr_modules) {
			const struct pvh_module *module = (void *)pvh->modules;

			rt_boot.module = module->addr;
			rt_boot.module_size = module->size;
		}
		for (u32 i = 0; pvh->version >= 1 && i < pvh->memmap_entries; i++)
			add_range(m[i].addr, m[i].size, m[i].type);
	}
}

/* ---- start ---- */

#define PTE_TABLE 0x67      /* present, writable, user, accessed, dirty */
#define PTE_LARGE 0xe7      /* the same, 2 MiB */
#define PTE_UNCACHED 0x18   /* PCD, PWT */
#define DEVICE_MEMORY 0xc0000000ul

/* Everything above 3 GiB is mapped uncached: that is where devices are. */
static void build_page_tables(void)
{
	pml4[0] = (u64)pdpt | PTE_TABLE;
	for (u64 i = 0; i < 4; i++)
		pdpt[i] = (u64)pd[i] | PTE_TABLE;
	for (u64 i = 0; i < 4 * 512; i++) {
		u64 addr = i << 21;

		pd[i / 512][i % 512] = addr | PTE_LARGE | (addr >= DEVICE_MEMORY ? PTE_UNCACHED : 0);
	}
}

#define GATE_INTERRUPT (0x8eul << 40)

static void build_idt(void)
{
	for (u64 v = 0; v < 256; v++) {
		u64 stub = (u64)rt_stubs + 16 * v;

		rt_idt[2 * v] = (stub & 0xffff) | SEL_KCODE << 16 | GATE_INTERRUPT | (stub >> 16 & 0xffff) << 48;
		rt_idt[2 * v + 1] = 0;
	}
}

/* Called from entry.S at CPL 3. */
void rt_start(void)
{
	build_idt();
	build_page_tables();
	read_boot_info();
	load_cr3((u64)pml4);
	rt_exit(main(&rt_boot));
}

#define DEBUG_EXIT 0xf4

static u64 halt_forever(void *unused)
{
	(void)unused;
	for (;;)
		__asm__ volatile("cli; hlt");
	return 0;
}

static bool at_cpl3(void)
{
	u16 cs;

	__asm__ volatile("movw %%cs, %0" : "=r"(cs));
	return cs & 3;
}

void rt_exit(int status)
{
	console_flush();
	outb(DEBUG_EXIT, status);
	if (at_cpl3())
		rt_cpl0(halt_forever, NULL);
	halt_forever(NULL);
	__builtin_unreachable();
}

/* ---- services ---- */

enum service { SERVICE_CALL, SERVICE_INTERRUPTS, SERVICE_WAIT };

#define RFLAGS_IF 0x200

static u64 service(u64 number, u64 a, u64 b)
{
	__asm__ volatile("ud2" : "+a"(number) : "D"(a), "S"(b) : "memory", "cc");
	return number;
}

u64 rt_cpl0(u64 (*fn)(void *), void *arg) { return service(SERVICE_CALL, (u64)fn, (u64)arg); }
bool rt_interrupts(bool on) { return service(SERVICE_INTERRUPTS, on, 0); }
void rt_wait(void) { service(SERVICE_WAIT, 0, 0); }

static u64 serve(struct regs *r)
{
	u64 was = (r->rflags & RFLAGS_IF) != 0;

	switch (r->rax) {
	case SERVICE_CALL:
		return ((u64 (*)(void *))r->rdi)((void *)r->rsi);
	case SERVICE_INTERRUPTS:
		r->rflags = (r->rflags & ~(u64)RFLAGS_IF) | (r->rdi ? RFLAGS_IF : 0);
		return was;
	case SERVICE_WAIT:
		__asm__ volatile("sti; hlt; cli" : : : "memory");
		return 0;
	}
	return -1ul;
}

struct msr_access {
	u32 msr;
	u64 value;
};
/* Where CPL 0 goes on after a fault, 0 outside of rdmsr0 and wrmsr0. */
static volatile u64 fixup;

/* The MSR instruction goes between setting and clearing fixup; a fault clears it
 * itself, which is how it shows. */
static u64 rdmsr0(void *p)
{
	struct msr_access *a = p;
	u64 intact;
	u32 low, high;

	__asm__ volatile("leaq 1f(%%rip), %%rax; movq %%rax, %3\n\t"
			 "rdmsr\n1:\tmovq %3, %2"
			 : "=&a"(low), "=&d"(high), "=&r"(intact), "+m"(fixup)
			 : "c"(a->msr));
	fixup = 0;
	a->value = (u64)high << 32 | low;
	return intact != 0;
}

static u64 wrmsr0(void *p)
{
	struct msr_access *a = p;
	u64 intact;

	__asm__ volatile("leaq 1f(%%rip), %0; movq %0, %1\n\t"
			 "wrmsr\n1:\tmovq %1, %0"
			 : "=&r"(intact), "+m"(fixup)
			 : "c"(a->msr), "a"((u32)a->value), "d"((u32)(a->value >> 32)));
	fixup = 0;
	return intact != 0;
}

bool rdmsr(u32 msr, u64 *value)
{
	struct msr_access a = { .msr = msr };
	bool ok = rt_cpl0(rdmsr0, &a);

	*value = ok ? a.value : 0;
	return ok;
}

bool wrmsr(u32 msr, u64 value)
{
	struct msr_access a = { .msr = msr, .value = value };

	return rt_cpl0(wrmsr0, &a);
}

static u64 read_cr8_0(void *unused)
{
	u64 v;

	(void)unused;
	__asm__ volatile("movq %%cr8, %0" : "=r"(v));
	return v;
}
static u64 write_cr8_0(void *v) { __asm__ volatile("movq %0, %%cr8" : : "r"(v) : "memory"); return 0; }
static u64 load_cr3_0(void *v) { __asm__ volatile("movq %0, %%cr3" : : "r"(v) : "memory"); return 0; }
u64 read_cr8(void) { return rt_cpl0(read_cr8_0, NULL); }
void write_cr8(u64 v) { rt_cpl0(write_cr8_0, (void *)v); }
void load_cr3(u64 v) { rt_cpl0(load_cr3_0, (void *)v); }

/* ---- traps ---- */

#define VECTOR_UD 6
#define UD2_BYTES 0x0b0f

struct irq {
	irq_handler *fn;
	enum eoi eoi;
	bool claimed;
};
static struct irq irqs[256];
volatile u64 irq_count[256];

u64 rt_try_sp, rt_try_error, rt_try_cr2;
extern char rt_try_fault[];

void irq_handle(u8 vector, irq_handler *fn, enum eoi eoi)
{
	irqs[vector] = (struct irq){ fn, eoi, true };
}

void irq_wait(u8 vector, u64 count)
{
	while (irq_count[vector] < count)
		rt_wait();
}

static u64 read_cr2(void)
{
	u64 v;

	__asm__ volatile("movq %%cr2, %0" : "=r"(v));
	return v;
}

static void unexpected(struct regs *r)
{
	printf("\nFAIL trap vector %lu error %#lx rip %#lx cs %#lx rsp %#lx rflags %#lx cr2 %#lx\n",
	       r->vector, r->error, r->rip, r->cs, r->rsp, r->rflags, read_cr2());
	rt_exit(RT_STATUS_TRAP);
}

void rt_trap(struct regs *r)
{
	struct irq *irq = &irqs[r->vector];

	if (r->vector == VECTOR_UD && (r->cs & 3) && *(u16 *)r->rip == UD2_BYTES && r->rax <= SERVICE_WAIT) {
		r->rip += 2;
		r->rax = serve(r);
		return;
	}
	if (r->vector >= 32 && irq->claimed) {
		irq_count[r->vector]++;
		if (irq->fn)
			irq->fn(r);
		if (irq->eoi == EOI_PIC)
			pic_eoi(r->vector - PIC_VECTOR);
		else if (irq->eoi == EOI_LAPIC)
			lapic_write(LAPIC_EOI, 0);
		return;
	}
	if (r->vector < 32 && !(r->cs & 3) && fixup) {
		r->rip = fixup;
		fixup = 0;
		return;
	}
	if (r->vector < 32 && rt_try_sp) {
		rt_try_error = r->error;
		rt_try_cr2 = read_cr2();
		r->rax = r->vector;
		r->rsp = rt_try_sp;
		r->rip = (u64)rt_try_fault;
		return;
	}
	unexpected(r);
}

/* ---- arguments and memory ---- */

const char *arg(const char *key)
{
	static char values[8][256];
	static int turn;
	const char *p = rt_boot.cmdline;
	size_t n = strlen(key);

	while (*p) {
		while (*p == ' ')
			p++;
		if (!strncmp(p, key, n) && (p[n] == '=' || p[n] == ' ' || p[n] == 0)) {
			char *v = values[turn++ % ARRAY_LEN(values)];
			size_t len = 0;

			p += n;
			if (*p == '=')
				p++;
			while (*p && *p != ' ' && len < sizeof values[0] - 1)
				v[len++] = *p++;
			v[len] = 0;
			return v;
		}
		while (*p && *p != ' ')
			p++;
	}
	return NULL;
}

bool arg_is(const char *key, const char *value)
{
	const char *v = arg(key);

	return v && !strcmp(v, value);
}

u64 arg_number(const char *key, u64 otherwise)
{
	const char *v = arg(key);
	u64 n = 0, base = 10;

	if (!v || !*v)
		return otherwise;
	if (v[0] == '0' && v[1] == 'x') {
		base = 16;
		v += 2;
	}
	for (; *v; v++) {
		u64 digit = *v <= '9' ? *v - '0' : (*v | 0x20) - 'a' + 10;

		if (digit >= base)
			break;
		n = n * base + digit;
	}
	switch (*v) {
	case 'k': return n << 10;
	case 'm': return n << 20;
	case 'g': return n << 30;
	}
	return n;
}

/* The pages after the image, to the end of the RAM range that holds it. */
void *page_alloc(u64 n)
{
	static u64 next, end;
	u64 image = ((u64)rt_image_end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
	void *p;

	if (!next) {
		next = image;
		for (u32 i = 0; i < rt_boot.mem_count; i++) {
			struct mem_range *m = &rt_boot.mem[i];

			if (m->type == MEM_RAM && m->start <= image && image < m->start + m->size)
				end = m->start + m->size;
		}
		if (end > DEVICE_MEMORY)
			end = DEVICE_MEMORY;
	}
	if (n > (end - next) / PAGE_SIZE) {
		printf("FAIL page_alloc %lu pages: out of memory\n", n);
		rt_exit(RT_STATUS_TRAP);
	}
	p = (void *)next;
	next += n * PAGE_SIZE;
	memset(p, 0, n * PAGE_SIZE);
	return p;
}
