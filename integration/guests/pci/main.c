/*
 * pci: configuration space by mechanism 1.
 *
 * Lists the functions of bus 0 with their BARs and capabilities ("# " lines: which
 * devices there are is the machine's affair), and claims of each what the PCI 2.2
 * specification says of any.
 */
#include "rt.h"

#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc
#define ENABLE (1u << 31)

static u32 address(const struct pci *p, u8 reg) { return ENABLE | p->bus << 16 | p->dev << 11 | p->fn << 8 | (reg & 0xfc); }

/* ---- the mechanism ---- */

static void test_address(void)
{
	u32 a = ENABLE | 0x00ffa8;

	outl(CONFIG_ADDRESS, a);
	check(inl(CONFIG_ADDRESS) == a, "address", "reads back");
	outb(CONFIG_ADDRESS, 0);
	outw(CONFIG_ADDRESS + 2, 0);
	check(inl(CONFIG_ADDRESS) == a, "address-partial", "byte and word writes do not reach it");
	outl(CONFIG_ADDRESS, 0); /* the host bridge, but not enabled */
	check(inl(CONFIG_DATA) == 0xffffffff, "address-disabled", "data reads all ones");
	outl(CONFIG_DATA, 0);
	outl(CONFIG_ADDRESS, ENABLE);
	check(inl(CONFIG_DATA) != 0xffffffff, "host-bridge", "at 00.0");
}

static void test_absent(void)
{
	static const u8 buses[] = { 1, 2, 127, 255 };
	struct pci p = { 0 };
	bool ones = true;

	for (u32 i = 0; i < ARRAY_LEN(buses); i++) {
		p = (struct pci){ .bus = buses[i] };
		ones &= pci_read32(&p, 0) == 0xffffffff;
	}
	check(ones, "absent-bus", "reads all ones");

	ones = true;
	p = (struct pci){ .dev = 31, .fn = 7 };
	for (u32 reg = 0; reg < 256; reg += 4) {
		outl(CONFIG_ADDRESS, address(&p, reg));
		ones &= inl(CONFIG_DATA) == 0xffffffff;
		for (u32 i = 0; i < 4; i++)
			ones &= inb(CONFIG_DATA + i) == 0xff;
		for (u32 i = 0; i < 4; i += 2)
			ones &= inw(CONFIG_DATA + i) == 0xffff;
		outl(CONFIG_DATA, 0x12345678);
	}
	check(ones, "absent-function", "reads all ones in all sizes");
}

/* ---- each function ---- */

static char where[16];

static const char *name(const char *claim)
{
	static char text[48];

	snprintf(text, sizeof text, "%s-%s", where, claim);
	return text;
}

/* The same bytes in all sizes, at all offsets. */
static void test_sizes(const struct pci *p)
{
	bool same = true;

	for (u32 reg = 0; reg < 256; reg += 4) {
		u32 v;

		outl(CONFIG_ADDRESS, address(p, reg));
		v = inl(CONFIG_DATA);
		for (u32 i = 0; i < 4; i++)
			same &= inb(CONFIG_DATA + i) == (u8)(v >> 8 * i);
		for (u32 i = 0; i < 4; i += 2)
			same &= inw(CONFIG_DATA + i) == (u16)(v >> 8 * i);
	}
	check(same, name("sizes"), "byte, word and doubleword reads agree");
}

static void test_read_only(const struct pci *p)
{
	static const u8 fixed[] = { 0x00, 0x08, 0x0e, 0x2c, 0x3d };
	bool kept = true;
	u8 line, other;

	for (u32 i = 0; i < ARRAY_LEN(fixed); i++) {
		u8 v = pci_read8(p, fixed[i]);

		pci_write8(p, fixed[i], ~v);
		kept &= pci_read8(p, fixed[i]) == v;
	}
	check(kept, name("read-only"), "identity, class, header type, interrupt pin");
	line = pci_read8(p, 0x3c);
	other = ~line;
	if (pci_read8(p, 0x3d)) {
		pci_write8(p, 0x3c, other);
		check(pci_read8(p, 0x3c) == other, name("interrupt-line"), "keeps what is written");
		pci_write8(p, 0x3c, line);
	}
}

/* Status bits are cleared by ones, so all ones leave none of them set. */
static void test_status(const struct pci *p)
{
	u16 command = pci_read16(p, 4), before = pci_read16(p, 6);

	pci_write16(p, 6, 0xffff);
	check((pci_read16(p, 6) & 0xf900) == 0, name("status"), "writing ones clears, %s capabilities",
	      before & 0x10 ? "with" : "no");
	check(pci_read16(p, 4) == command, name("command"), "is not touched by the status's half");
}

static void test_bars(const struct pci *p)
{
	bool ok = true;
	u32 rom, mask;

	if ((p->header & 0x7f) != 0)
		return;
	for (int i = 0; i < 6; i++) {
		u32 before = pci_read32(p, 0x10 + 4 * i);
		struct pci_bar b = pci_bar(p, i);

		if (!b.size) {
			ok &= before == 0;
			continue;
		}
		ok &= (b.size & (b.size - 1)) == 0 && (b.addr & (b.size - 1)) == 0;
		ok &= b.io ? b.size <= 256 && b.size >= 4 : b.size >= 16;
		printf("# %s bar %d %s%s%s size %#lx\n", where, i, b.io ? "io" : "memory", b.is64 ? " 64-bit" : "",
		       b.prefetch ? " prefetchable" : "", b.size);
		i += b.is64;
	}
	check(ok, name("bars"), "powers of two, aligned, unused ones zero");

	rom = pci_read32(p, 0x30);
	pci_write32(p, 0x30, 0xfffff800);
	mask = pci_read32(p, 0x30) & 0xfffff800;
	pci_write32(p, 0x30, rom);
	if (mask)
		printf("# %s rom size %#x\n", where, -mask);
	check((-mask & (-mask - 1)) == 0, name("rom"), "none, or a power of two");
}

static void test_capabilities(const struct pci *p)
{
	u8 at = pci_read8(p, 0x34);
	u32 seen[8] = { 0 };
	bool ok = true;

	if (!(pci_read16(p, 6) & 0x10)) {
		check(at == 0, name("capabilities"), "no list, no pointer");
		return;
	}
	while (at) {
		u8 id;

		ok &= at >= 0x40 && (at & 3) == 0 && !(seen[at / 32] & 1u << at % 32);
		if (!ok)
			break;
		seen[at / 32] |= 1u << at % 32;
		id = pci_read8(p, at);
		printf("# %s capability %#02x at %#02x length %u\n", where, id, at, id == 9 ? pci_read8(p, at + 2) : 0);
		if (id == 0x11) { /* MSI-X: table and pending bits lie in their BARs */
			u32 count = (pci_read16(p, at + 2) & 0x7ff) + 1, table = pci_read32(p, at + 4), pba = pci_read32(p, at + 8);
			struct pci_bar tb = pci_bar(p, table & 7), pb = pci_bar(p, pba & 7);

			ok &= (table & ~7u) + 16 * count <= tb.size && (pba & ~7u) + (count + 63) / 64 * 8 <= pb.size;
		}
		at = pci_read8(p, at + 1);
	}
	check(ok, name("capabilities"), "a sane list");
}

static bool test_function(struct pci *p, void *count)
{
	snprintf(where, sizeof where, "%02x.%x", p->dev, p->fn);
	printf("# %s %04x:%04x class %02x%02x%02x revision %02x subsystem %04x:%04x pin %u\n", where, p->vendor, p->device,
	       p->class, p->subclass, p->progif, p->revision, p->subsystem_vendor, p->subsystem, pci_read8(p, 0x3d));
	test_sizes(p);
	test_read_only(p);
	test_status(p);
	test_bars(p);
	test_capabilities(p);
	++*(u32 *)count;
	return true;
}

int main(struct boot *boot)
{
	u32 count = 0;

	(void)boot;
	test_address();
	test_absent();
	pci_scan(test_function, &count);
	check(count > 0, "functions", "%u", count);
	return finish();
}
