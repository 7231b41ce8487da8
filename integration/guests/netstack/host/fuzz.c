/*
 * Drives the stack as an ordinary program, so that it runs under the compiler's
 * sanitizers: a peer that knows the right sequence numbers and mostly, but not always,
 * uses them. fuzz SEED FRAMES; the exit status is 0 if every invariant held.
 */
#include "netstack/netstack.h"
#include <stdio.h>
#include <stdlib.h>

enum { PEERS = 100, ECHO = 7, SINK = 9, SOURCE = 19, IP = 0x0a00020f, PEER_IP = 0x0a000202 };

static struct net net;
static uint64_t state, now_ms, sent, echoed;
static uint8_t frame_out[NET_LARGE], mac[6] = {2, 0, 0, 0, 0, 1};
static bool no_frames;

/* What the guest told each peer port last: the numbers that a right answer would use. */
static struct peer {
	uint32_t seq, ack, len;
} peers[PEERS];

static uint64_t rnd(uint64_t n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % n;
}

static void fail(const char *what)
{
	printf("FAIL %s\n", what);
	exit(1);
}

static uint8_t *port_alloc(void) { return no_frames ? NULL : frame_out; }
static uint64_t port_clock(void) { return now_ms; }

static uint32_t get(const uint8_t *p, int n)
{
	uint32_t v = 0;
	while (n--)
		v = v << 8 | *p++;
	return v;
}

static void put(uint8_t *p, uint32_t v, int n)
{
	while (n--) {
		p[n] = (uint8_t)v;
		v >>= 8;
	}
}

static void port_send(uint8_t *f, size_t len, struct net_offload o)
{
	if (len < 42 || len > NET_LARGE || (!o.segment && len > 14 + NET_MTU))
		fail("a frame of a wrong size");
	if (get(f + 12, 2) == 0x0800 && get(f + 16, 2) + 14 != len)
		fail("a frame whose length is not that of its packet");
	sent++;
	if (get(f + 12, 2) != 0x0800 || f[23] != 6 || get(f + 36, 2) >= PEERS)
		return;
	struct peer *p = &peers[get(f + 36, 2)];
	p->seq = get(f + 38, 4);
	p->ack = get(f + 42, 4);
	p->len = (uint32_t)len - 34 - (f[46] >> 4) * 4 + !!(f[47] & 3);
}

static void echo(struct net *n, struct tcp_conn *c)
{
	const uint8_t *data;
	size_t len;
	(void)n;
	while ((len = tcp_peek(c, &data)) && (len = tcp_write(c, data, len))) {
		tcp_consume(c, len);
		echoed += len;
	}
	if (rnd(4))
		tcp_release(c);
	else
		c->event = true;
	if (tcp_ended(c))
		tcp_close(c);
}

static void sink(struct net *n, struct tcp_conn *c)
{
	uint8_t some[300];
	tcp_consume(c, tcp_copy(c, some, rnd(sizeof some)));
	if (!rnd(50))
		tcp_abort(n, c);
	else if (tcp_ended(c) || !rnd(50))
		tcp_close(c);
}

static void source(struct net *n, struct tcp_conn *c)
{
	static const uint8_t zeros[5000];
	(void)n;
	while (tcp_room(c) > 5000)
		tcp_write(c, zeros, rnd(5000) + 1);
	tcp_release(c);
	if (!rnd(20))
		tcp_close(c);
}

static void udp(struct net *n, const struct udp_peer *from, const uint8_t *data, size_t len)
{
	udp_send(n, from, data, len);
}

/* tcp_frame writes a segment, right or wrong, and returns its length. */
static size_t tcp_frame(uint8_t *f)
{
	static const uint16_t ports[] = {ECHO, SINK, SOURCE, 99};
	static const uint8_t usual[] = {16, 16, 16, 16, 24, 24, 17, 2, 2, 4, 18, 0};
	uint16_t peer = (uint16_t)rnd(PEERS);
	struct peer *p = &peers[peer];
	uint32_t seq = p->ack, ack = p->seq + (rnd(4) ? p->len : (uint32_t)rnd(p->len + 1));
	uint8_t flags = rnd(20) ? usual[rnd(sizeof usual)] : (uint8_t)rnd(256);
	size_t options = rnd(4) ? 0 : rnd(11) * 4, len = rnd(2) ? 0 : rnd(1461 - options);
	uint8_t *t = f + 34;

	if (flags == 4 && rnd(8))
		flags = 16;
	if (!rnd(10))
		seq += (uint32_t)rnd(70000) - 35000;
	if (!rnd(10))
		ack += (uint32_t)rnd(70000) - 35000;
	if (!rnd(100))
		seq = (uint32_t)state;
	put(f + 12, 0x0800, 2);
	f[23] = 6;
	put(t, peer, 2);
	put(t + 2, ports[peer % 10 ? peer % 3 : rnd(4)], 2);
	put(t + 4, seq, 4);
	put(t + 8, ack, 4);
	t[12] = (uint8_t)((5 + options / 4) << 4);
	t[13] = flags;
	put(t + 14, rnd(5) ? (uint32_t)rnd(65536) : 0, 2);
	for (size_t i = 0; i < options; i++)
		t[20 + i] = (uint8_t)(rnd(3) ? rnd(6) : rnd(256));
	return 54 + options + len;
}

static size_t make(uint8_t *f)
{
	static const uint8_t protocols[] = {1, 6, 17, 2};
	size_t len;

	for (size_t i = 0; i < 1514; i += 8) {
		rnd(2);
		memcpy(f + i, &state, i + 8 <= 1514 ? 8 : 2);
	}
	memcpy(f, mac, 6);
	f[6] &= 0xfe;
	memset(f + 14, 0, 20);
	f[14] = 0x45;
	put(f + 26, PEER_IP, 4);
	put(f + 30, IP, 4);
	if (rnd(10)) {
		len = tcp_frame(f);
	} else {
		len = 34 + rnd(1481);
		put(f + 12, rnd(4) ? 0x0800 : 0x0806, 2);
		f[23] = protocols[rnd(4)];
		put(f + 36, rnd(2) ? ECHO : (uint32_t)rnd(65536), 2);
		put(f + 38, (uint32_t)len - 34 + (rnd(4) ? 0 : (uint32_t)rnd(100)), 2);
		if (f[13] == 6)
			memcpy(f + 14, "\0\1\10\0\6\4\0", 7);
	}
	put(f + 16, (uint32_t)len - 14, 2);
	if (!rnd(20)) /* and something wrong anywhere in the headers */
		f[rnd(60)] = (uint8_t)rnd(256);
	if (f[12] == 8 && f[13] == 0) {
		uint32_t s = 0;
		put(f + 24, 0, 2);
		for (int i = 0; i < (f[14] & 15) * 4; i += 2)
			s += get(f + 14 + i, 2);
		s = (s & 0xffff) + (s >> 16);
		put(f + 24, ~(s + (s >> 16)), 2);
	}
	return rnd(50) ? len : rnd(len + 1);
}

static void check_conn(const struct tcp_conn *c)
{
	if (c->state == TCP_FREE)
		return;
	if (tcp_available(c) > NET_RX_RING || (!c->fin_acked && c->tx_end - c->snd_una > NET_TX_RING))
		fail("a ring with more than it can hold");
	if ((int32_t)(c->snd_nxt - c->snd_una) < 0 || (int32_t)(c->snd_max - c->snd_nxt) < 0)
		fail("SND.UNA, SND.NXT and the highest number sent are out of order");
	if ((int32_t)(c->tx_end + 1 - c->snd_max) < 0)
		fail("something was sent that was never written");
	if (c->state == TCP_OPEN && !c->reset && c->snd_una != c->snd_max && !c->timer_ms)
		fail("data in flight without a timer");
}

int main(int argc, char **argv)
{
	static struct net_port port = {.alloc = port_alloc, .send = port_send, .clock = port_clock};
	unsigned long frames = argc > 2 ? strtoul(argv[2], NULL, 0) : 100000;

	state = (argc > 1 ? strtoul(argv[1], NULL, 0) : 1) * 0x9e3779b97f4a7c15 | 1;
	memcpy(port.mac, mac, 6);
	port.checksum = rnd(2);
	port.segmentation = port.checksum && rnd(2);
	net_init(&net, &port, IP, 24, PEER_IP, 12345);
	net_serve(&net, (struct net_service){ECHO, echo, udp});
	net_serve(&net, (struct net_service){SINK, sink, NULL});
	net_serve(&net, (struct net_service){SOURCE, source, NULL});
	net_announce(&net);
	for (unsigned long i = 0; i < frames; i++) {
		uint8_t wide[1520];
		size_t len = make(wide);
		uint8_t *exact = malloc(len ? len : 1); /* so that reading past the end is seen */
		memcpy(exact, wide, len);
		no_frames = !rnd(30);
		net_input(&net, exact, len, rnd(100));
		free(exact);
		if (!rnd(3)) {
			net_dispatch(&net);
			net_output(&net);
		}
		if (!rnd(20))
			now_ms += rnd(rnd(20) ? 300 : 70000);
		for (int c = 0; c < NET_CONNS; c++)
			check_conn(&net.conns[c]);
	}
	printf("ok %lu frames in, %lu out, %lu connections, %lu bytes echoed\n", frames, (unsigned long)sent,
	       (unsigned long)net.stats.accepted, (unsigned long)echoed);
	if (!net.stats.accepted || !echoed)
		fail("nothing happened");
	return 0;
}
