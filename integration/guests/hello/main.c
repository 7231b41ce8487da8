/* hello: says what the loader told, and ends. */
#include "rt.h"

int main(struct boot *boot)
{
	static const char *const loaders[] = { "none", "pvh", "multiboot" };
	u64 ram = 0;
	u16 cs;

	for (u32 i = 0; i < boot->mem_count; i++)
		if (boot->mem[i].type == MEM_RAM)
			ram += boot->mem[i].size;
	__asm__("movw %%cs, %0" : "=r"(cs));
	printf("hello from ring %d\n", cs & 3);
	printf("cmdline: %s\n", boot->cmdline);
	check(boot->loader != LOADER_NONE, "loader", "%s", loaders[boot->loader]);
	check(ram >= 1 << 20, "memory", "map with %s of RAM", ram >= 1 << 20 ? "a megabyte or more" : "next to nothing");
	if (boot->module_size)
		printf("module: %lu bytes, sum %016lx\n", boot->module_size,
		       fnv1a(FNV_START, (void *)boot->module, boot->module_size));
	for (u32 i = 0; i < boot->mem_count; i++)
		printf("# memory %#lx size %#lx type %u\n", boot->mem[i].start, boot->mem[i].size, boot->mem[i].type);
	return finish();
}
