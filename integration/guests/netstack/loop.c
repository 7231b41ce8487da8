#include "netstack/loop.h"

enum {
	RX_BUFFERS = 256, RX_BUFFER = 2048, RX_BUFFER_MIN = 128,
	TX_BUFFERS = 64,
	RX_BATCH = 256,          /* frames taken before anything is answered */
	LARGEST_FRAME = 65550,   /* with GUEST_TSO4 (5.1.6.3.1) */
	TICK = PIT_HZ / 1000 * NET_TICK_MS,
	POWER_BUTTON = 1 << 8,   /* in PM1 status and enable (ACPI 6.5, 4.8.3.1) */
	SCI_ENABLED = 1,
	ELCR1 = 0x4d0,
};

#define NET_F_CSUM (1ul << 0)
#define NET_F_GUEST_CSUM (1ul << 1)
#define NET_F_MAC (1ul << 5)
#define NET_F_GUEST_TSO4 (1ul << 7)
#define NET_F_HOST_TSO4 (1ul << 11)
#define NET_F_MRG_RXBUF (1ul << 15)

/* struct virtio_net_hdr (5.1.6); the legacy interface without MRG_RXBUF has no `buffers`. */
struct header {
	u8 flags, gso;
	u16 header_size, gso_size, checksum_start, checksum_offset, buffers;
};
enum { HEADER_SHORT = 10, HDR_NEEDS_CSUM = 1, HDR_DATA_VALID = 2, GSO_TCPV4 = 1 };

struct tx_buffer {
	struct header header;
	u8 frame[NET_LARGE];
};

static struct virtio card;
static struct virtq rx, tx;
static u32 header_size, rx_size;
static u8 rx_buffers[RX_BUFFERS][RX_BUFFER], assembled[LARGEST_FRAME + RX_BUFFER];
static struct tx_buffer tx_buffers[TX_BUFFERS], *tx_free[TX_BUFFERS];
static int tx_free_count;
static struct net_port port;

/* ---- clock ---- */

/* A one-shot of the PIT runs while time matters. Until it fires, the time that was read from
 * the PM timer when it was started is good enough: reading costs an exit. */
static struct {
	bool running;
	u64 fired, ticks;
	u32 last;
} clock;

static u64 clock_ms(void)
{
	u64 fired = irq_count[PIC_VECTOR];
	u32 now;

	if (!clock.running || fired != clock.fired || card.irq == IRQ_POLL) {
		now = pmtimer_read();
		clock.ticks += (now - clock.last) & 0xffffff;
		clock.last = now;
		clock.fired = fired;
		clock.running = card.irq != IRQ_POLL;
		if (clock.running)
			pit_one_shot(TICK);
	}
	return clock.ticks * 1000 / PMTIMER_HZ;
}

static void clock_start(void)
{
	irq_handle(PIC_VECTOR, NULL, EOI_PIC);
	pic_mask(0, false);
	clock.last = pmtimer_read();
}

/* ---- power button ---- */

volatile bool power_pressed;
static u16 pm1a_event;

static void on_sci(struct regs *r)
{
	(void)r;
	if (inw(pm1a_event) & POWER_BUTTON) {
		outw(pm1a_event, POWER_BUTTON); /* write 1 to clear: the line falls */
		power_pressed = true;
	}
}

static void power_start(void)
{
	struct acpi_fadt *fadt = (void *)acpi_table("FACP");

	if (!fadt || fadt->sci_int > 15)
		return;
	pm1a_event = fadt->pm1a_evt;
	if (!(inw(fadt->pm1a_cnt) & SCI_ENABLED) && fadt->smi_cmd && fadt->acpi_enable)
		outb(fadt->smi_cmd, fadt->acpi_enable);
	outw(pm1a_event, POWER_BUTTON);
	outw(pm1a_event + fadt->pm1_evt_len / 2, POWER_BUTTON);
	outb(ELCR1 + fadt->sci_int / 8, inb(ELCR1 + fadt->sci_int / 8) | 1 << (fadt->sci_int & 7));
	irq_handle(PIC_VECTOR + fadt->sci_int, on_sci, EOI_PIC);
	pic_mask(fadt->sci_int, false);
}

void loop_power_off(void)
{
	power_off();
	delay_us(1000000); /* some machines take a moment */
}

/* ---- card ---- */

static void give_rx(u8 *buffer)
{
	struct segment s = { buffer, rx_size };

	virtq_add(&rx, &s, 0, 1, buffer);
}

static u8 *tx_alloc(void)
{
	struct tx_buffer *b;

	if (!tx_free_count)
		while ((b = virtq_pop(&tx, NULL)))
			tx_free[tx_free_count++] = b;
	return tx_free_count ? tx_free[tx_free_count - 1]->frame : NULL;
}

static void tx_send(u8 *frame, size_t len, struct net_offload o)
{
	struct tx_buffer *b = tx_free[--tx_free_count];
	struct segment s[2] = { { &b->header, header_size }, { frame, len } };

	b->header = (struct header){ .flags = o.checksum_start ? HDR_NEEDS_CSUM : 0,
				     .checksum_start = o.checksum_start, .checksum_offset = o.checksum_offset };
	if (o.segment) {
		b->header.gso = GSO_TCPV4;
		b->header.gso_size = o.segment;
		b->header.header_size = 54;
	}
	if (!virtq_add(&tx, s, 2, 0, b))
		tx_free_count++; /* the queue is shorter than our buffers: lost, as frames may be */
}

static bool card_start(void)
{
	bool large = arg_is("offload", "large"), checksum = large || !arg_is("offload", "none");
	u64 wanted = NET_F_MAC | (checksum ? NET_F_CSUM | NET_F_GUEST_CSUM : 0) | (large ? NET_F_HOST_TSO4 : 0);

	if (arg_number("mrg", 1))
		wanted |= NET_F_MRG_RXBUF | (large ? NET_F_GUEST_TSO4 : 0);
	if (!virtio_find(&card, VIRTIO_NET, 0) || !virtio_begin(&card, wanted) || !virtq_setup(&rx, &card, 0, RX_BUFFERS) ||
	    !virtq_setup(&tx, &card, 1, 0))
		return false;
	for (u32 i = 0; i < 6; i++)
		port.mac[i] = virtio_read8(&card, i);
	port.alloc = tx_alloc;
	port.send = tx_send;
	port.clock = clock_ms;
	port.checksum = card.features & NET_F_CSUM;
	port.segmentation = card.features & NET_F_HOST_TSO4;
	header_size = card.legacy && !(card.features & NET_F_MRG_RXBUF) ? HEADER_SHORT : sizeof(struct header);
	rx_size = card.features & NET_F_MRG_RXBUF ? arg_number("rxbuf", RX_BUFFER) : RX_BUFFER;
	if (rx_size < RX_BUFFER_MIN || rx_size > RX_BUFFER)
		rx_size = RX_BUFFER;
	for (u32 i = 0; i < RX_BUFFERS && rx.free_count; i++)
		give_rx(rx_buffers[i]);
	for (tx_free_count = 0; tx_free_count < TX_BUFFERS; tx_free_count++)
		tx_free[tx_free_count] = &tx_buffers[tx_free_count];
	virtio_go(&card);
	virtq_kick(&rx);
	return true;
}

int loop_receive(struct net *n)
{
	int frames = 0;
	u8 *buffer, *frame;
	u32 len, more;

	while (frames < RX_BATCH && (buffer = virtq_pop(&rx, &len))) {
		struct header h;
		u32 at = 0;

		if (len < header_size || len > rx_size) { /* a device that lies */
			give_rx(buffer);
			continue;
		}
		h.buffers = 1;
		memcpy(&h, buffer, header_size);
		frame = buffer + header_size;
		len -= header_size;
		if (h.buffers > 1) {
			memcpy(assembled, frame, len);
			at = len;
			for (u32 i = 1; i < h.buffers; i++) {
				u8 *next;

				while (!(next = virtq_pop(&rx, &more))) /* they come together (5.1.6.4.1) */
					;
				if (more <= rx_size && at + more <= sizeof assembled) {
					memcpy(assembled + at, next, more);
					at += more;
				}
				give_rx(next);
			}
			frame = assembled;
			len = at;
		}
		net_input(n, frame, len, h.flags & (HDR_NEEDS_CSUM | HDR_DATA_VALID));
		give_rx(buffer);
		frames++;
	}
	virtq_kick(&rx);
	return frames;
}

void loop_send(struct net *n)
{
	net_output(n);
	virtq_kick(&tx);
}

void loop_sleep(struct net *n, struct virtq *also)
{
	u64 fired = irq_count[PIC_VECTOR], due = net_timer(n);

	if (card.irq == IRQ_POLL) { /* one exit, so that events can come in */
		virtio_status(&card);
		return;
	}
	if (due && due <= clock_ms()) /* and a tick is under way */
		return;
	virtq_arm(&rx);
	if (also)
		virtq_arm(also);
	if (n->starved)
		virtq_arm_after(&tx, TX_BUFFERS / 4);
	while (!virtq_pending(&rx) && !(also && virtq_pending(also)) && !power_pressed &&
	       !(n->starved && virtq_pending(&tx)) && irq_count[PIC_VECTOR] == fired)
		rt_wait();
	virtq_disarm(&rx);
	virtq_disarm(&tx);
	if (also)
		virtq_disarm(also);
}

/* ---- start ---- */

/* parse_ip reads A.B.C.D and returns what follows it, NULL if that is no address. */
static const char *parse_ip(const char *s, u32 *ip)
{
	*ip = 0;
	for (int i = 0; i < 4; i++) {
		u32 v = 0;

		if (*s < '0' || *s > '9')
			return NULL;
		while (*s >= '0' && *s <= '9' && v < 256)
			v = v * 10 + *s++ - '0';
		if (v > 255 || (i < 3 && *s++ != '.'))
			return NULL;
		*ip = *ip << 8 | v;
	}
	return s;
}

bool loop_start(struct net *n)
{
	const char *text = arg("ip"), *rest;
	u32 ip = 10 << 24 | 2 << 8 | 15, gateway = 0, seed;
	int prefix = 24;

	if (!card_start())
		return false;
	if (text && (rest = parse_ip(text, &ip)) && *rest == '/')
		for (prefix = 0; *++rest >= '0' && *rest <= '9' && prefix < 100;)
			prefix = prefix * 10 + *rest - '0';
	if ((text = arg("gw")))
		parse_ip(text, &gateway);
	clock_start();
	power_start();
	seed = fnv1a(FNV_START, port.mac, 6) ^ clock.last;
	net_init(n, &port, ip, prefix, gateway, seed);
	printf("# net: %02x:%02x:%02x:%02x:%02x:%02x %u.%u.%u.%u/%d, features %#lx of %#lx, %s %s\n", port.mac[0], port.mac[1],
	       port.mac[2], port.mac[3], port.mac[4], port.mac[5], ip >> 24, ip >> 16 & 255, ip >> 8 & 255, ip & 255,
	       prefix, card.features, card.offered, card.legacy ? "legacy" : "modern",
	       card.irq == IRQ_MSIX ? "msix" : card.irq == IRQ_INTX ? "intx" : "poll");
	net_announce(n);
	virtq_kick(&tx);
	return true;
}
