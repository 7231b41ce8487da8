/*
 * net: a host with the small services of old, for tests of the network card and of the
 * frames' way in and out.
 *
 *	ICMP echo
 *	UDP 7     echo
 *	UDP 9     discard; the datagram "quit" ends the guest
 *	TCP 7     echo
 *	TCP 9     discard; when the peer has ended it is told the number of bytes, in decimal
 *	TCP 19    sends bytes=N bytes (default 1m) as fast as it can: the little-endian words
 *	          of splitmix64 from state 0; then ends
 *
 * and the words of netstack/loop.h. The power button ends it, too.
 */
#include "netstack/loop.h"

enum { ECHO = 7, DISCARD = 9, CHARGEN = 19, CHUNK = 4096 };

static struct net net;
static bool quit;
static u64 chargen_bytes;

static void echo(struct net *n, struct tcp_conn *c)
{
	const u8 *data;
	size_t len;

	(void)n;
	while ((len = tcp_peek(c, &data)) && (len = tcp_write(c, data, len)))
		tcp_consume(c, len);
	tcp_release(c);
	if (tcp_ended(c))
		tcp_close(c);
}

static void discard(struct net *n, struct tcp_conn *c)
{
	char text[24];

	(void)n;
	c->user[0] += tcp_available(c);
	tcp_consume(c, tcp_available(c));
	if (tcp_ended(c) && !c->fin_wanted) {
		tcp_write(c, text, snprintf(text, sizeof text, "%lu\n", c->user[0]));
		tcp_release(c);
		tcp_close(c);
	}
}

/* splitmix64 (Steele, Lea, Flood 2014): the nth output needs no state. */
static u64 splitmix64(u64 n)
{
	u64 z = (n + 1) * 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static void chargen(struct net *n, struct tcp_conn *c)
{
	static u64 words[CHUNK / 8];

	(void)n;
	tcp_consume(c, tcp_available(c));
	while (c->user[0] < chargen_bytes && tcp_room(c) >= CHUNK) {
		u64 len = chargen_bytes - c->user[0] < CHUNK ? chargen_bytes - c->user[0] : CHUNK;

		for (u64 i = 0; i < CHUNK / 8; i++)
			words[i] = splitmix64(c->user[0] / 8 + i);
		c->user[0] += tcp_write(c, words, len);
	}
	tcp_release(c);
	if (c->user[0] >= chargen_bytes)
		tcp_close(c);
}

static void udp_echo(struct net *n, const struct udp_peer *from, const u8 *data, size_t len)
{
	udp_send(n, from, data, len);
}

static void udp_discard(struct net *n, const struct udp_peer *from, const u8 *data, size_t len)
{
	(void)n;
	(void)from;
	quit |= len >= 4 && !memcmp(data, "quit", 4);
}

int main(struct boot *boot)
{
	(void)boot;
	if (!check(loop_start(&net), "start", "network card found and started"))
		return finish();
	chargen_bytes = arg_number("bytes", 1 << 20);
	net_serve(&net, (struct net_service){ ECHO, echo, udp_echo });
	net_serve(&net, (struct net_service){ DISCARD, discard, udp_discard });
	net_serve(&net, (struct net_service){ CHARGEN, chargen, NULL });
	printf("ready\n");
	console_flush();
	while (!quit && !power_pressed) {
		int frames = loop_receive(&net);

		net_dispatch(&net);
		loop_send(&net);
		if (!frames)
			loop_sleep(&net, NULL);
	}
	printf("# frames %lu bad %lu, segments in %lu out %lu again %lu, connections %lu refused %lu lost %lu, datagrams %lu, pings %lu\n",
	       net.stats.frames_in, net.stats.frames_bad, net.stats.segments_in, net.stats.segments_out,
	       net.stats.retransmits, net.stats.accepted, net.stats.refused, net.stats.resets,
	       net.stats.datagrams_in, net.stats.pings);
	printf("end by %s\n", quit ? "request" : "power button");
	if (!quit)
		loop_power_off();
	return finish();
}
