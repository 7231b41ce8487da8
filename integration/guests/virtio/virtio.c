#include "virtio/virtio.h"

enum { VENDOR_VIRTIO = 0x1af4, MODERN_ID = 0x1040, CAP_VENDOR = 9, CAP_MSIX = 0x11 };

/* Capability types (virtio 1.2, 4.1.4). */
enum { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_ISR = 3, CAP_DEVICE = 4 };

/* struct virtio_pci_common_cfg (4.1.4.3). */
enum { C_DEVICE_FEATURE_SELECT = 0, C_DEVICE_FEATURE = 4, C_DRIVER_FEATURE_SELECT = 8, C_DRIVER_FEATURE = 12,
       C_CONFIG_VECTOR = 16, C_STATUS = 20, C_QUEUE_SELECT = 22, C_QUEUE_SIZE = 24, C_QUEUE_VECTOR = 26,
       C_QUEUE_ENABLE = 28, C_QUEUE_NOTIFY_OFF = 30, C_QUEUE_DESC = 32, C_QUEUE_DRIVER = 40, C_QUEUE_DEVICE = 48 };

/* The legacy header (4.1.4.10), with the vectors that MSI-X adds. */
enum { L_DEVICE_FEATURE = 0, L_DRIVER_FEATURE = 4, L_QUEUE_PFN = 8, L_QUEUE_SIZE = 12, L_QUEUE_SELECT = 14,
       L_QUEUE_NOTIFY = 16, L_STATUS = 18, L_ISR = 19, L_CONFIG_VECTOR = 20, L_QUEUE_VECTOR = 22 };

enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1, NO_VECTOR = 0xffff };
enum { MSIX_ENABLE = 0x8000, COMMAND_NO_INTX = 0x400 };
enum { VECTOR_FIRST = 0x50, QUEUES_PER_DEVICE = 4, DEVICES = 8 };
enum { ELCR1 = 0x4d0, PIIX3_DEV = 1, PIIX3_PIRQ = 0x60, FALLBACK_LINE = 11 };

static struct virtio *devices[DEVICES];
static int device_count;

static void *pages(u64 bytes) { return page_alloc((bytes + PAGE_SIZE - 1) / PAGE_SIZE); }

/* ---- interrupts ---- */

/* The INTx handler reads the ISR of every device on the line, which lowers it. */
static void on_intx(struct regs *r)
{
	for (int i = 0; i < device_count; i++) {
		struct virtio *d = devices[i];

		if (d->irq == IRQ_INTX && PIC_VECTOR + d->line == (int)r->vector)
			d->isr_seen |= d->legacy ? inb(d->io + L_ISR) : mmio_read8(d->isr);
	}
}

static void start_intx(struct virtio *d)
{
	d->line = pci_irq(&d->pci);
	if (d->line == 0 || d->line > 15) { /* no firmware: route the pin ourselves */
		struct pci piix3 = { .dev = PIIX3_DEV };
		u8 pin = pci_read8(&d->pci, 0x3d);

		d->line = FALLBACK_LINE;
		pci_write8(&piix3, PIIX3_PIRQ + ((d->pci.dev + pin - 2) & 3), d->line);
	}
	outb(ELCR1 + d->line / 8, inb(ELCR1 + d->line / 8) | 1 << (d->line & 7));
	irq_handle(PIC_VECTOR + d->line, on_intx, EOI_PIC);
	pic_mask(d->line, false);
}

static void start_msix(struct virtio *d)
{
	u8 cap = pci_cap(&d->pci, CAP_MSIX, 0);
	u32 table;
	u16 control;

	if (!cap) {
		d->irq = IRQ_INTX;
		start_intx(d);
		return;
	}
	table = pci_read32(&d->pci, cap + 4);
	d->msix_table = pci_bar(&d->pci, table & 7).addr + (table & ~7u);
	d->first_vector = VECTOR_FIRST + device_count * QUEUES_PER_DEVICE;
	control = pci_read16(&d->pci, cap + 2);
	pci_write16(&d->pci, cap + 2, control | MSIX_ENABLE);
	for (int i = 0; i < QUEUES_PER_DEVICE && i <= (control & 0x7ff); i++) {
		u64 entry = d->msix_table + 16 * i;

		mmio_write32(entry, LAPIC_BASE);
		mmio_write32(entry + 4, 0);
		mmio_write32(entry + 8, d->first_vector + i);
		mmio_write32(entry + 12, 0);
		irq_handle(d->first_vector + i, NULL, EOI_LAPIC);
	}
}

static void start_interrupts(struct virtio *d)
{
	if (!device_count) {
		pic_init();
		lapic_init();
		lapic_write(LAPIC_LVT_LINT0, LVT_EXTINT);
	}
	d->irq = arg_is("irq", "intx") ? IRQ_INTX : arg_is("irq", "poll") ? IRQ_POLL : IRQ_MSIX;
	pci_write16(&d->pci, 4, (pci_read16(&d->pci, 4) & ~COMMAND_NO_INTX) | (d->irq == IRQ_INTX ? 0 : COMMAND_NO_INTX));
	if (d->irq == IRQ_MSIX)
		start_msix(d);
	else if (d->irq == IRQ_INTX)
		start_intx(d);
	devices[device_count++] = d;
}

/* ---- device ---- */

static bool find_modern(struct virtio *d)
{
	u8 at;

	for (int i = 0; (at = pci_cap(&d->pci, CAP_VENDOR, i)); i++) {
		u8 type = pci_read8(&d->pci, at + 3), bar = pci_read8(&d->pci, at + 4);
		u64 *where[] = { [CAP_COMMON] = &d->common, [CAP_NOTIFY] = &d->notify, [CAP_ISR] = &d->isr,
				 [CAP_DEVICE] = &d->config };

		if (type < CAP_COMMON || type > CAP_DEVICE || bar > 5 || *where[type])
			continue;
		*where[type] = pci_bar(&d->pci, bar).addr + pci_read32(&d->pci, at + 8);
		if (type == CAP_NOTIFY)
			d->notify_step = pci_read32(&d->pci, at + 16);
	}
	return d->common && d->notify && d->isr;
}

bool virtio_find(struct virtio *d, int type, int nth)
{
	static const u16 transitional[] = { [VIRTIO_NET] = 0x1000, [VIRTIO_BLK] = 0x1001, [VIRTIO_CONSOLE] = 0x1003,
					    [VIRTIO_RNG] = 0x1005 };

	*d = (struct virtio){ .legacy = arg_number("legacy", 0) };
	if (device_count == DEVICES ||
	    (!pci_find(VENDOR_VIRTIO, transitional[type], nth, &d->pci) &&
	     !pci_find(VENDOR_VIRTIO, MODERN_ID + type, nth, &d->pci)))
		return false;
	pci_enable(&d->pci);
	if (d->legacy) {
		struct pci_bar bar = pci_bar(&d->pci, 0);

		if (!bar.io || d->pci.device >= MODERN_ID)
			return false;
		d->io = bar.addr;
	} else if (!find_modern(d)) {
		return false;
	}
	start_interrupts(d);
	if (d->legacy) /* the device's own configuration comes after the vectors, if there are any */
		d->config = d->io + (d->irq == IRQ_MSIX ? 24 : 20);
	return true;
}

u8 virtio_status(struct virtio *d) { return d->legacy ? inb(d->io + L_STATUS) : mmio_read8(d->common + C_STATUS); }

static void set_status(struct virtio *d, u8 status)
{
	if (d->legacy)
		outb(d->io + L_STATUS, status);
	else
		mmio_write8(d->common + C_STATUS, status);
}

void virtio_reset(struct virtio *d)
{
	set_status(d, 0);
	while (virtio_status(d)) /* 4.1.4.3.2: the reset has finished when it reads 0 */
		;
}

bool virtio_begin(struct virtio *d, u64 wanted)
{
	if (arg_number("indirect", 1))
		wanted |= VIRTIO_F_INDIRECT_DESC;
	if (arg_number("event_idx", 1))
		wanted |= VIRTIO_F_EVENT_IDX;
	virtio_reset(d);
	set_status(d, STATUS_ACKNOWLEDGE);
	set_status(d, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
	if (d->legacy) {
		d->offered = inl(d->io + L_DEVICE_FEATURE);
		d->features = d->offered & wanted;
		outl(d->io + L_DRIVER_FEATURE, d->features);
		return true;
	}
	d->offered = 0;
	for (u32 i = 0; i < 2; i++) {
		mmio_write32(d->common + C_DEVICE_FEATURE_SELECT, i);
		d->offered |= (u64)mmio_read32(d->common + C_DEVICE_FEATURE) << (32 * i);
	}
	d->features = d->offered & (wanted | VIRTIO_F_VERSION_1);
	for (u32 i = 0; i < 2; i++) {
		mmio_write32(d->common + C_DRIVER_FEATURE_SELECT, i);
		mmio_write32(d->common + C_DRIVER_FEATURE, d->features >> (32 * i));
	}
	set_status(d, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
	mmio_write16(d->common + C_CONFIG_VECTOR, NO_VECTOR);
	return virtio_status(d) & STATUS_FEATURES_OK;
}

void virtio_go(struct virtio *d) { set_status(d, virtio_status(d) | STATUS_DRIVER_OK); }

u8 virtio_read8(struct virtio *d, u32 at) { return d->legacy ? inb(d->config + at) : mmio_read8(d->config + at); }
u16 virtio_read16(struct virtio *d, u32 at) { return d->legacy ? inw(d->config + at) : mmio_read16(d->config + at); }
u32 virtio_read32(struct virtio *d, u32 at) { return d->legacy ? inl(d->config + at) : mmio_read32(d->config + at); }
u64 virtio_read64(struct virtio *d, u32 at)
{
	return virtio_read32(d, at) | (u64)virtio_read32(d, at + 4) << 32;
}

/* ---- queues ---- */

/* The legacy layout (2.7.2), which serves modern devices as well. */
static u64 used_offset(u16 size) { return (16 * size + 6 + 2 * size + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1); }

static void lay_out(struct virtq *q)
{
	u64 ring = used_offset(q->size), bytes = ring + 6 + 8 * q->size;

	if (q->memory_size < q->size) {
		q->memory_size = q->size;
		q->desc = pages(bytes);
		q->tables = pages(q->size * sizeof *q->tables);
		q->tokens = pages(q->size * sizeof *q->tokens);
	}
	memset((void *)q->desc, 0, bytes);
	memset(q->tokens, 0, q->size * sizeof *q->tokens);
	q->avail = (void *)(q->desc + q->size);
	q->used = (void *)((u64)q->desc + ring);
	for (u16 i = 0; i < q->size; i++)
		q->desc[i].next = i + 1;
	q->free_head = q->next_avail = q->next_used = q->kicked = 0;
	q->free_count = q->size;
	q->kicks = 0;
}

bool virtq_setup(struct virtq *q, struct virtio *d, u16 index, u16 size)
{
	u16 vector = d->irq == IRQ_MSIX ? index : NO_VECTOR, most;

	q->dev = d;
	q->index = index;
	q->vector = d->irq == IRQ_MSIX ? d->first_vector + index : PIC_VECTOR + d->line;
	q->indirect = d->features & VIRTIO_F_INDIRECT_DESC;
	q->event_idx = d->features & VIRTIO_F_EVENT_IDX;
	if (d->legacy) {
		outw(d->io + L_QUEUE_SELECT, index);
		q->size = inw(d->io + L_QUEUE_SIZE);
		if (!q->size || q->size > VIRTQ_MAX)
			return false;
		lay_out(q);
		outl(d->io + L_QUEUE_PFN, (u64)q->desc / PAGE_SIZE);
		if (d->irq == IRQ_MSIX)
			outw(d->io + L_QUEUE_VECTOR, vector);
	} else {
		mmio_write16(d->common + C_QUEUE_SELECT, index);
		most = mmio_read16(d->common + C_QUEUE_SIZE);
		if (!most)
			return false;
		q->size = size && size < most ? size : most < VIRTQ_MAX ? most : VIRTQ_MAX;
		lay_out(q);
		mmio_write16(d->common + C_QUEUE_SIZE, q->size);
		mmio_write16(d->common + C_QUEUE_VECTOR, vector);
		mmio_write32(d->common + C_QUEUE_DESC, (u64)q->desc);
		mmio_write32(d->common + C_QUEUE_DESC + 4, 0);
		mmio_write32(d->common + C_QUEUE_DRIVER, (u64)q->avail);
		mmio_write32(d->common + C_QUEUE_DRIVER + 4, 0);
		mmio_write32(d->common + C_QUEUE_DEVICE, (u64)q->used);
		mmio_write32(d->common + C_QUEUE_DEVICE + 4, 0);
		q->notify = d->notify + mmio_read16(d->common + C_QUEUE_NOTIFY_OFF) * d->notify_step;
		mmio_write16(d->common + C_QUEUE_ENABLE, 1);
	}
	virtq_disarm(q);
	return true;
}

static volatile u16 *used_event(struct virtq *q) { return &q->avail->ring[q->size]; }
static volatile u16 *avail_event(struct virtq *q) { return (volatile u16 *)&q->used->ring[q->size]; }

void virtq_publish(struct virtq *q, u16 head)
{
	q->avail->ring[q->next_avail & (q->size - 1)] = head;
	q->next_avail++;
	barrier(); /* the entry before the index: x86 keeps the order of stores */
	q->avail->idx = q->next_avail;
}

bool virtq_add(struct virtq *q, const struct segment *s, int out, int in, void *token)
{
	u16 head = q->free_head, at = head;
	int total = out + in;

	if (q->indirect && total > 1 && total <= VIRTQ_SEGMENTS && q->free_count) {
		struct desc *table = q->tables[head];

		for (int i = 0; i < total; i++)
			table[i] = (struct desc){ (u64)s[i].addr, s[i].len,
				(i >= out ? DESC_WRITE : 0) | (i + 1 < total ? DESC_NEXT : 0), i + 1 };
		q->desc[head].addr = (u64)table;
		q->desc[head].len = total * sizeof *table;
		q->desc[head].flags = DESC_INDIRECT;
		q->free_count--;
		q->free_head = q->desc[head].next;
	} else {
		if (total > q->free_count)
			return false;
		for (int i = 0; i < total; i++) {
			q->desc[at].addr = (u64)s[i].addr;
			q->desc[at].len = s[i].len;
			q->desc[at].flags = (i >= out ? DESC_WRITE : 0) | (i + 1 < total ? DESC_NEXT : 0);
			at = q->desc[at].next;
		}
		q->free_count -= total;
		q->free_head = at;
	}
	q->tokens[head] = token;
	virtq_publish(q, head);
	return true;
}

void virtq_notify(struct virtq *q)
{
	q->kicks++;
	if (q->dev->legacy)
		outw(q->dev->io + L_QUEUE_NOTIFY, q->index);
	else
		mmio_write16(q->notify, q->index);
}

void virtq_kick(struct virtq *q)
{
	u16 old = q->kicked, new = q->next_avail;

	if (old == new)
		return;
	q->kicked = new;
	fence(); /* the index must be visible before we look at what the device asks for */
	if (q->event_idx ? (u16)(new - *avail_event(q) - 1) < (u16)(new - old) : !(q->used->flags & USED_NO_NOTIFY))
		virtq_notify(q);
}

bool virtq_pending(struct virtq *q) { return q->used->idx != q->next_used; }

void *virtq_pop(struct virtq *q, u32 *len)
{
	u32 id;
	u16 at, n = 1;
	void *token;

	if (!virtq_pending(q))
		return NULL;
	barrier();
	id = q->used->ring[q->next_used & (q->size - 1)].id;
	if (len)
		*len = q->used->ring[q->next_used & (q->size - 1)].len;
	q->next_used++;
	if (id >= q->size || !q->tokens[id]) {
		check(false, "used-ring", "queue %u returned descriptor %u, which is not in use", q->index, id);
		rt_exit(RT_STATUS_FAILED);
	}
	token = q->tokens[id];
	q->tokens[id] = NULL;
	for (at = id; q->desc[at].flags & DESC_NEXT; n++)
		at = q->desc[at].next;
	q->desc[at].next = q->free_head;
	q->free_head = id;
	q->free_count += n;
	return token;
}

void virtq_arm_after(struct virtq *q, u16 n)
{
	if (q->dev->irq == IRQ_POLL)
		return;
	if (q->event_idx)
		*used_event(q) = q->next_used + n - 1;
	else
		q->avail->flags = 0;
	fence();
}

void virtq_arm(struct virtq *q) { virtq_arm_after(q, 1); }

void virtq_disarm(struct virtq *q)
{
	if (q->event_idx) /* as far from the next completion as it goes */
		*used_event(q) = q->next_used - 1;
	else
		q->avail->flags = AVAIL_NO_INTERRUPT;
}

/* pause makes an exit of a polling loop: a device's answer may need one to come in. */
static void pause(struct virtq *q)
{
	if (q->dev->legacy)
		inb(q->dev->io + L_STATUS);
	else
		mmio_read8(q->dev->common + C_STATUS);
}

void virtq_sleep(struct virtq *q)
{
	virtq_arm(q);
	while (!virtq_pending(q)) {
		if (q->dev->irq == IRQ_POLL)
			pause(q);
		else
			rt_wait();
	}
	virtq_disarm(q);
}

bool virtq_poll_us(struct virtq *q, u32 limit_us)
{
	u64 left = (u64)limit_us * PMTIMER_HZ / 1000000;
	u32 last = pmtimer_read();

	while (!virtq_pending(q)) {
		u32 now = pmtimer_read(), passed = (now - last) & 0xffffff;

		if (passed >= left)
			return virtq_pending(q);
		left -= passed;
		last = now;
	}
	return true;
}
