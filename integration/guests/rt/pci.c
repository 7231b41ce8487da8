/* PCI configuration mechanism 1, bus 0, and ACPI table lookup. */
#include "rt.h"

#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc

static void config_select(const struct pci *p, u8 reg)
{
	outl(CONFIG_ADDRESS, 1u << 31 | p->bus << 16 | p->dev << 11 | p->fn << 8 | (reg & 0xfc));
}

u8 pci_read8(const struct pci *p, u8 reg) { config_select(p, reg); return inb(CONFIG_DATA + (reg & 3)); }
u16 pci_read16(const struct pci *p, u8 reg) { config_select(p, reg); return inw(CONFIG_DATA + (reg & 2)); }
u32 pci_read32(const struct pci *p, u8 reg) { config_select(p, reg); return inl(CONFIG_DATA); }
void pci_write8(const struct pci *p, u8 reg, u8 v) { config_select(p, reg); outb(CONFIG_DATA + (reg & 3), v); }
void pci_write16(const struct pci *p, u8 reg, u16 v) { config_select(p, reg); outw(CONFIG_DATA + (reg & 2), v); }
void pci_write32(const struct pci *p, u8 reg, u32 v) { config_select(p, reg); outl(CONFIG_DATA, v); }

enum { PCI_ID = 0, PCI_COMMAND = 4, PCI_STATUS = 6, PCI_CLASS = 8, PCI_HEADER = 0xe, PCI_BAR0 = 0x10,
       PCI_SUBSYSTEM = 0x2c, PCI_CAPABILITIES = 0x34, PCI_INTERRUPT_LINE = 0x3c };
enum { COMMAND_IO = 1, COMMAND_MEMORY = 2, COMMAND_MASTER = 4, STATUS_CAPABILITIES = 0x10 };

void pci_scan(bool (*fn)(struct pci *, void *), void *context)
{
	for (u8 dev = 0; dev < 32; dev++) {
		u8 functions = 1;

		for (u8 f = 0; f < functions; f++) {
			struct pci p = { .dev = dev, .fn = f };
			u32 id = pci_read32(&p, PCI_ID), class, subsystem;

			if (id == 0xffffffff)
				continue;
			class = pci_read32(&p, PCI_CLASS);
			p.vendor = id;
			p.device = id >> 16;
			p.revision = class;
			p.progif = class >> 8;
			p.subclass = class >> 16;
			p.class = class >> 24;
			p.header = pci_read8(&p, PCI_HEADER);
			subsystem = pci_read32(&p, PCI_SUBSYSTEM);
			p.subsystem_vendor = subsystem;
			p.subsystem = subsystem >> 16;
			if (f == 0 && (p.header & 0x80))
				functions = 8;
			if (!fn(&p, context))
				return;
		}
	}
}

struct search {
	u16 vendor, device;
	int nth;
	struct pci *to;
	bool found;
};

static bool search_one(struct pci *p, void *context)
{
	struct search *s = context;

	if ((s->vendor != 0xffff && s->vendor != p->vendor) || (s->device != 0xffff && s->device != p->device))
		return true;
	if (s->nth--)
		return true;
	*s->to = *p;
	s->found = true;
	return false;
}

bool pci_find(u16 vendor, u16 device, int nth, struct pci *to)
{
	struct search s = { vendor, device, nth, to, false };

	pci_scan(search_one, &s);
	return s.found;
}

/* Where BARs go that nobody has placed: well away from what firmware uses. */
static u64 next_memory = 0xe0000000ul, next_io = 0xd000;

struct pci_bar pci_bar(const struct pci *p, int index)
{
	u8 reg = PCI_BAR0 + 4 * index;
	u16 command = pci_read16(p, PCI_COMMAND);
	struct pci_bar b = { 0 };
	u32 low, high = 0, mask, mask_high = 0;
	u64 *next, size;

	pci_write16(p, PCI_COMMAND, command & ~(COMMAND_IO | COMMAND_MEMORY));
	low = pci_read32(p, reg);
	pci_write32(p, reg, 0xffffffff);
	mask = pci_read32(p, reg);
	pci_write32(p, reg, low);
	b.io = mask & 1;
	b.is64 = !b.io && (mask & 6) == 4;
	b.prefetch = !b.io && (mask & 8);
	if (b.is64) {
		high = pci_read32(p, reg + 4);
		pci_write32(p, reg + 4, 0xffffffff);
		mask_high = pci_read32(p, reg + 4);
		pci_write32(p, reg + 4, high);
	}
	mask &= b.io ? ~3u : ~15u;
	low &= b.io ? ~3u : ~15u;
	if (!mask && !mask_high) {
		pci_write16(p, PCI_COMMAND, command);
		return b;
	}
	size = b.is64 ? -((u64)mask_high << 32 | mask) : (u32)-mask;
	if (b.io)
		size &= 0xffff;
	b.size = size;
	b.addr = (u64)high << 32 | low;
	if (!b.addr) {
		next = b.io ? &next_io : &next_memory;
		b.addr = (*next + size - 1) & ~(size - 1);
		*next = b.addr + size;
		pci_write32(p, reg, b.addr);
	}
	pci_write16(p, PCI_COMMAND, command);
	return b;
}

void pci_enable(const struct pci *p)
{
	if ((p->header & 0x7f) == 0)
		for (int i = 0; i < 6; i++)
			if (pci_bar(p, i).is64)
				i++;
	pci_write16(p, PCI_COMMAND, pci_read16(p, PCI_COMMAND) | COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
}

u8 pci_cap(const struct pci *p, u8 id, int nth)
{
	u8 at;

	if (!(pci_read16(p, PCI_STATUS) & STATUS_CAPABILITIES))
		return 0;
	at = pci_read8(p, PCI_CAPABILITIES) & 0xfc;
	for (int limit = 48; at && limit; limit--) {
		if (pci_read8(p, at) == id && nth-- == 0)
			return at;
		at = pci_read8(p, at + 1) & 0xfc;
	}
	return 0;
}

u8 pci_irq(const struct pci *p) { return pci_read8(p, PCI_INTERRUPT_LINE); }

/* ---- ACPI ---- */

u8 byte_sum(const void *data, size_t n)
{
	const u8 *p = data;
	u8 sum = 0;

	while (n--)
		sum += *p++;
	return sum;
}

#define RSDP_SIZE 20
#define RSDP_REVISION 15
#define RSDP_RSDT 16
#define RSDP_XSDT 24

static u8 *search_rsdp(u64 from, u64 to)
{
	for (; from < to; from += 16)
		if (!memcmp((void *)from, "RSD PTR ", 8) && byte_sum((void *)from, RSDP_SIZE) == 0)
			return (u8 *)from;
	return NULL;
}

u8 *acpi_rsdp(void)
{
	static u8 *found;
	u64 ebda;

	if (found)
		return found;
	if (rt_boot.rsdp)
		return found = (u8 *)rt_boot.rsdp;
	found = search_rsdp(0xe0000, 0x100000);
	ebda = (u64)mmio_read16(0x40e) << 4;
	if (!found && ebda >= 0x80000 && ebda < 0xa0000)
		found = search_rsdp(ebda, ebda + 1024);
	return found;
}

static u64 load(const u8 *p, int n)
{
	u64 v = 0;

	while (n--)
		v = v << 8 | p[n];
	return v;
}

struct acpi_header *acpi_table(const char *signature)
{
	u8 *rsdp = acpi_rsdp();
	bool wide = rsdp && rsdp[RSDP_REVISION] >= 2 && load(rsdp + RSDP_XSDT, 8);
	int entry = wide ? 8 : 4;
	struct acpi_header *root;
	struct acpi_fadt *fadt;

	if (!rsdp)
		return NULL;
	root = (void *)(wide ? load(rsdp + RSDP_XSDT, 8) : load(rsdp + RSDP_RSDT, 4));
	if (!strcmp(signature, wide ? "XSDT" : "RSDT"))
		return root;
	if (!strcmp(signature, "DSDT") || !strcmp(signature, "FACS")) {
		fadt = (void *)acpi_table("FACP");
		if (!fadt)
			return NULL;
		return (void *)(u64)(signature[0] == 'D' ? fadt->dsdt : fadt->facs);
	}
	for (u32 at = sizeof *root; at + entry <= root->length; at += entry) {
		struct acpi_header *t = (void *)load((u8 *)root + at, entry);

		if (!memcmp(t->signature, signature, 4))
			return t;
	}
	return NULL;
}

#define PM1_SLP_EN (1u << 13)
#define PM1_SCI_EN 1u

void power_off(void)
{
	struct acpi_fadt *fadt = (void *)acpi_table("FACP");

	console_flush();
	if (fadt)
		outw(fadt->pm1a_cnt, PM1_SLP_EN | PM1_SCI_EN);
}
