#include "netstack/netstack.h"

enum {
	ETH_IPV4 = 0x0800, ETH_ARP = 0x0806,
	PROTO_ICMP = 1, PROTO_TCP = 6, PROTO_UDP = 17,
	FIN = 1, SYN = 2, RST = 4, PSH = 8, ACK = 16,
	IP_AT = 14, L4_AT = 34, TCP_DATA_AT = 54, LARGE_DATA = NET_LARGE - TCP_DATA_AT,

	DEFAULT_MSS = 536,              /* RFC 9293, 3.7.1 */
	OWN_MSS = NET_MTU - 40,
	RX_SCALE = 0,                   /* NET_RX_RING - 1 fits the unscaled field */
	INITIAL_SEGMENTS = 10,          /* RFC 6928 */
	DUP_ACK_THRESHOLD = 3,
	RTO_INITIAL_MS = 1000, RTO_MIN_MS = 200,
	RTO_MAX_MS = 5000,              /* short, so that traffic resumes soon after a failover */
	RETRIES_SYN = 5, RETRIES_MAX = 30,
	TIME_WAIT_MS = 2000, FIN_WAIT_MS = 60000,
};

#define WINDOW_MAX ((uint32_t)NET_RX_RING - 1)

static uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static uint32_t get32(const uint8_t *p) { return (uint32_t)get16(p) << 16 | get16(p + 2); }
static void put16(uint8_t *p, uint32_t v) { p[0] = (uint8_t)(v >> 8); p[1] = (uint8_t)v; }
static void put32(uint8_t *p, uint32_t v) { put16(p, v >> 16); put16(p + 2, v); }

/* Sequence numbers compare modulo 2^32. */
static bool before(uint32_t a, uint32_t b) { return (int32_t)(a - b) < 0; }
static bool after(uint32_t a, uint32_t b) { return before(b, a); }
static uint32_t min32(uint32_t a, uint32_t b) { return a < b ? a : b; }
static uint32_t max32(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* sum adds bytes to an Internet checksum (RFC 1071). The sum is kept in the machine's byte
 * order, which the algorithm allows; fold brings it to network order. */
static uint64_t sum(uint64_t s, const uint8_t *p, size_t len)
{
	for (; len >= 4; p += 4, len -= 4) {
		uint32_t w;
		memcpy(&w, p, 4);
		s += w;
	}
	if (len >= 2) {
		s += (uint64_t)(p[0] | p[1] << 8);
		p += 2;
		len -= 2;
	}
	return len ? s + p[0] : s;
}

static uint16_t fold(uint64_t s)
{
	while (s >> 16)
		s = (s & 0xffff) + (s >> 16);
	return (uint16_t)((s & 0xff) << 8 | s >> 8);
}

static uint64_t pseudo_sum(const uint8_t *addresses, uint8_t protocol, size_t len)
{
	uint8_t tail[4] = {0, protocol, (uint8_t)(len >> 8), (uint8_t)len};
	return sum(sum(0, addresses, 8), tail, 4);
}

/* ---- Frames out ---- */

static uint8_t *frame_for(struct net *n, const uint8_t mac[6], uint16_t type)
{
	uint8_t *f = n->port->alloc();
	if (!f)
		return NULL;
	memcpy(f, mac, 6);
	memcpy(f + 6, n->port->mac, 6);
	put16(f + 12, type);
	return f;
}

/* send_ip fills in the IP header and the transport checksum of a frame whose transport part
 * is len bytes, with its checksum at checksum_at from the start of that part; the card cuts it
 * up if segment is not 0. */
static void send_ip(struct net *n, uint8_t *f, uint32_t to, uint8_t protocol, size_t len,
		    size_t checksum_at, uint16_t segment)
{
	uint8_t *ip = f + IP_AT, *field = f + L4_AT + checksum_at;
	ip[0] = 0x45;
	ip[1] = 0;
	put16(ip + 2, (uint32_t)len + 20);
	put16(ip + 4, n->ip_id++);
	put16(ip + 6, 0x4000); /* do not fragment */
	ip[8] = 64;
	ip[9] = protocol;
	put16(ip + 10, 0);
	put32(ip + 12, n->ip);
	put32(ip + 16, to);
	put16(ip + 10, (uint16_t)~fold(sum(0, ip, 20)));
	put16(field, 0);
	uint64_t pseudo = protocol == PROTO_ICMP ? 0 : pseudo_sum(ip + 12, protocol, len);
	struct net_offload offload = {0};
	if (n->port->checksum && protocol != PROTO_ICMP) {
		put16(field, fold(pseudo));
		offload = (struct net_offload){L4_AT, (uint16_t)checksum_at, segment};
	} else {
		uint16_t s = (uint16_t)~fold(sum(pseudo, f + L4_AT, len));
		put16(field, s || protocol != PROTO_UDP ? s : 0xffff);
	}
	n->port->send(f, L4_AT + len, offload);
}

static void send_arp(struct net *n, uint16_t op, const uint8_t mac[6], const uint8_t target_mac[6], uint32_t target_ip)
{
	static const uint8_t ethernet_ipv4[6] = {0, 1, 8, 0, 6, 4};
	uint8_t *f = frame_for(n, mac, ETH_ARP);
	if (!f)
		return;
	memcpy(f + 14, ethernet_ipv4, 6);
	put16(f + 20, op);
	memcpy(f + 22, n->port->mac, 6);
	put32(f + 28, n->ip);
	memcpy(f + 32, target_mac, 6);
	put32(f + 38, target_ip);
	memset(f + 42, 0, 18);
	n->port->send(f, 60, (struct net_offload){0});
}

void net_announce(struct net *n)
{
	static const uint8_t all[6] = {255, 255, 255, 255, 255, 255}, none[6];
	send_arp(n, 1, all, none, n->ip);
}

/* tcp_header starts a segment in a new frame; the caller adds options and data. */
static uint8_t *tcp_header(struct net *n, const uint8_t mac[6], uint16_t from, uint16_t to,
			   uint32_t seq, uint32_t ack, uint8_t flags, uint32_t window)
{
	uint8_t *f = frame_for(n, mac, ETH_IPV4);
	if (!f)
		return NULL;
	uint8_t *t = f + L4_AT;
	put16(t, from);
	put16(t + 2, to);
	put32(t + 4, seq);
	put32(t + 8, ack);
	t[12] = 5 << 4;
	t[13] = flags;
	put16(t + 14, window);
	put16(t + 18, 0);
	n->stats.segments_out++;
	return f;
}

/* receive_window is the window to advertise: it never moves its right edge back, and moves it
 * on only by a worthwhile step (RFC 9293, 3.8.6.2.2). */
static uint32_t receive_window(struct tcp_conn *c)
{
	uint32_t edge = c->rx_read + WINDOW_MAX;
	if (!before(edge, c->rcv_edge + OWN_MSS))
		c->rcv_edge = edge;
	return (c->rcv_edge - c->rcv_nxt) >> RX_SCALE;
}

static uint32_t received(const struct tcp_conn *c) { return c->rcv_nxt - c->rx_read - c->fin_received; }

/* send_segment sends len bytes of the ring from seq on. It returns false if there was no frame. */
static bool send_segment(struct net *n, struct tcp_conn *c, uint32_t seq, uint32_t len, uint8_t flags)
{
	uint8_t *f = tcp_header(n, c->mac, c->local_port, c->peer_port, seq, c->rcv_nxt,
				flags | ACK, receive_window(c));
	if (!f) {
		n->starved = true;
		return false;
	}
	uint32_t at = seq & (NET_TX_RING - 1), first = min32(len, NET_TX_RING - at);
	memcpy(f + TCP_DATA_AT, c->tx + at, first);
	memcpy(f + TCP_DATA_AT + first, c->tx, len - first);
	c->need_ack = false;
	send_ip(n, f, c->peer_ip, PROTO_TCP, 20 + len, 16, len > c->mss ? c->mss : 0);
	return true;
}

/* send_ack sends a segment without data. Its sequence number is the newest that the peer's
 * window allows: a byte sent to probe a closed window may never have been taken. */
static void send_ack(struct net *n, struct tcp_conn *c)
{
	uint32_t edge = c->snd_una + c->snd_wnd;
	send_segment(n, c, after(c->snd_max, edge) ? edge : c->snd_max, 0, 0);
}

static void send_syn_ack(struct net *n, struct tcp_conn *c)
{
	uint8_t *f = tcp_header(n, c->mac, c->local_port, c->peer_port, c->snd_una, c->rcv_nxt,
				SYN | ACK, WINDOW_MAX);
	size_t len = 24;
	if (!f)
		return; /* the timer tries again */
	uint8_t *t = f + L4_AT;
	t[20] = 2; /* maximum segment size */
	t[21] = 4;
	put16(t + 22, OWN_MSS);
	if (c->send_scale != 0xff) { /* the peer offered window scaling: so do we */
		t[24] = 1;
		t[25] = 3;
		t[26] = 3;
		t[27] = RX_SCALE;
		len = 28;
	}
	t[12] = (uint8_t)(len / 4 << 4);
	send_ip(n, f, c->peer_ip, PROTO_TCP, len, 16, 0);
}

/* send_reset refuses a segment that belongs to no connection (RFC 9293, 3.10.7.1). */
static void send_reset(struct net *n, const uint8_t mac[6], uint32_t ip, const uint8_t *t, uint32_t len)
{
	bool acked = t[13] & ACK;
	uint8_t *f = tcp_header(n, mac, get16(t + 2), get16(t), acked ? get32(t + 8) : 0,
				acked ? 0 : get32(t + 4) + len, acked ? RST : RST | ACK, 0);
	n->stats.refused++;
	if (f)
		send_ip(n, f, ip, PROTO_TCP, 20, 16, 0);
}

/* ---- TCP ---- */

static uint64_t now(struct net *n) { return n->port->clock(); }

static void arm(struct net *n, struct tcp_conn *c, uint32_t ms) { c->timer_ms = now(n) + ms; }

static void drop(struct tcp_conn *c) { c->state = TCP_FREE; c->timer_ms = 0; }

/* kill ends a connection whose peer is gone; the service sees `reset` once. */
static void kill(struct net *n, struct tcp_conn *c)
{
	n->stats.resets++;
	if (c->state != TCP_OPEN) {
		drop(c);
		return;
	}
	c->reset = c->event = true;
	c->timer_ms = 0;
}

static struct tcp_conn *new_conn(struct net *n)
{
	struct tcp_conn *oldest = NULL;
	for (struct tcp_conn *c = n->conns; c < n->conns + NET_CONNS; c++)
		if (c->state == TCP_FREE)
			return c;
	/* A full table gives up what costs the least: first TIME_WAIT, then half-open ones,
	 * so that a flood of SYNs cannot lock clients out for longer than it lasts. */
	for (struct tcp_conn *c = n->conns; c < n->conns + NET_CONNS; c++)
		if ((c->state == TCP_TIME_WAIT || c->state == TCP_SYN_RECEIVED) &&
		    (!oldest || c->state > oldest->state ||
		     (c->state == oldest->state && c->timer_ms < oldest->timer_ms)))
			oldest = c;
	return oldest;
}

static void parse_options(struct tcp_conn *c, const uint8_t *o, size_t len)
{
	c->mss = DEFAULT_MSS;
	c->send_scale = 0xff;
	while (len > 0 && o[0] != 0) {
		if (o[0] == 1) {
			o++;
			len--;
			continue;
		}
		if (len < 2 || o[1] < 2 || o[1] > len)
			return;
		if (o[0] == 2 && o[1] == 4)
			c->mss = (uint16_t)max32(64, min32(get16(o + 2), OWN_MSS));
		if (o[0] == 3 && o[1] == 3)
			c->send_scale = o[2] > 14 ? 14 : o[2]; /* RFC 7323, 2.3 */
		len -= o[1];
		o += o[1];
	}
}

static void tcp_open(struct net *n, const struct net_service *s, const uint8_t mac[6], uint32_t ip,
		     const uint8_t *t, size_t header)
{
	struct tcp_conn *c = new_conn(n);
	if (!c)
		return; /* the peer tries again */
	memset(c, 0, offsetof(struct tcp_conn, rx));
	parse_options(c, t + 20, header - 20);
	memcpy(c->mac, mac, 6);
	c->state = TCP_SYN_RECEIVED;
	c->service = s;
	c->local_port = s->port;
	c->peer_port = get16(t);
	c->peer_ip = ip;
	n->isn = n->isn * 1664525 + 1013904223 + ip + c->peer_port + (uint32_t)now(n);
	c->snd_una = n->isn;
	c->snd_nxt = c->snd_max = c->tx_end = c->tx_released = n->isn + 1;
	c->rx_read = c->rcv_nxt = get32(t + 4) + 1;
	c->rcv_edge = c->rcv_nxt + WINDOW_MAX;
	c->snd_wnd = get16(t + 14);
	c->cwnd = INITIAL_SEGMENTS * (uint32_t)c->mss;
	c->ssthresh = NET_TX_RING;
	c->rto_ms = RTO_INITIAL_MS;
	send_syn_ack(n, c);
	arm(n, c, c->rto_ms);
}

/* measure updates the retransmission timeout (RFC 6298, 2). */
static void measure(struct net *n, struct tcp_conn *c)
{
	uint32_t rtt = (uint32_t)(now(n) - c->rtt_start_ms), delta;
	c->rtt_timing = false;
	if (!c->srtt_ms) {
		c->srtt_ms = max32(rtt, 1);
		c->rttvar_ms = rtt / 2;
	} else {
		delta = rtt > c->srtt_ms ? rtt - c->srtt_ms : c->srtt_ms - rtt;
		c->rttvar_ms = (3 * c->rttvar_ms + delta) / 4;
		c->srtt_ms = max32((7 * c->srtt_ms + rtt) / 8, 1);
	}
	c->rto_ms = c->srtt_ms + max32(4 * c->rttvar_ms, NET_TICK_MS);
	c->rto_ms = min32(max32(c->rto_ms, RTO_MIN_MS), RTO_MAX_MS);
}

static void halve(struct tcp_conn *c)
{
	c->ssthresh = max32((c->snd_max - c->snd_una) / 2, 2u * c->mss);
}

/* on_ack handles an acknowledgement of new data up to ack. */
static void on_ack(struct net *n, struct tcp_conn *c, uint32_t ack)
{
	uint32_t acked = ack - c->snd_una;
	if (c->rtt_timing && !before(ack, c->rtt_seq))
		measure(n, c);
	c->snd_una = ack;
	c->retries = c->dup_acks = 0;
	c->force_probe = false;
	if (before(c->snd_nxt, ack))
		c->snd_nxt = ack;
	if (c->fin_wanted && ack == c->tx_end + 1)
		c->fin_acked = true;
	if (c->recovering && before(ack, c->recover)) {
		/* Partial: the next hole starts here (RFC 6582, 3.2 step 3). */
		uint32_t len = min32(c->mss, c->tx_released - ack);
		if (len && send_segment(n, c, ack, len, 0))
			n->stats.retransmits++;
		c->cwnd = max32(c->cwnd - min32(c->cwnd, acked) + c->mss, c->mss);
	} else if (c->recovering) {
		c->recovering = false;
		c->cwnd = c->ssthresh;
	} else if (c->cwnd < c->ssthresh) {
		c->cwnd += min32(acked, c->mss);
	} else {
		c->cwnd += max32((uint32_t)c->mss * c->mss / c->cwnd, 1);
	}
	c->cwnd = min32(c->cwnd, NET_TX_RING);
	if (c->snd_una == c->snd_max)
		c->timer_ms = 0;
	else
		arm(n, c, c->rto_ms);
	c->event = true;
}

static void on_dup_ack(struct net *n, struct tcp_conn *c)
{
	if (c->dup_acks < 255)
		c->dup_acks++;
	if (c->recovering) {
		c->cwnd = min32(c->cwnd + c->mss, NET_TX_RING);
	} else if (c->dup_acks == DUP_ACK_THRESHOLD && c->snd_nxt == c->snd_max) {
		uint32_t len = min32(c->mss, c->tx_released - c->snd_una);
		halve(c);
		c->recovering = true;
		c->recover = c->snd_max;
		c->rtt_timing = false;
		c->cwnd = c->ssthresh + DUP_ACK_THRESHOLD * (uint32_t)c->mss;
		if (len && send_segment(n, c, c->snd_una, len, 0))
			n->stats.retransmits++;
	}
}

/* tcp_segment handles a segment of an open connection (RFC 9293, 3.10.7.4). */
static void tcp_segment(struct net *n, struct tcp_conn *c, const uint8_t *t, const uint8_t *data, uint32_t len)
{
	uint32_t seq = get32(t + 4), ack = get32(t + 8), wnd;
	uint8_t flags = t[13];
	uint32_t span = len + !!(flags & FIN), right = c->rcv_edge;
	bool acceptable = !before(seq + span, c->rcv_nxt) && !after(seq, right) &&
		(span == 0 || after(seq + span, c->rcv_nxt));
	if (flags & RST) { /* only an exact one counts (RFC 5961, 3.2) */
		if (seq == c->rcv_nxt)
			kill(n, c);
		else if (acceptable)
			c->need_ack = true;
		return;
	}
	if (!acceptable || flags & SYN) {
		send_ack(n, c);
		return;
	}
	if (!(flags & ACK))
		return;
	if (after(ack, c->snd_max) || before(ack, c->snd_una - NET_TX_RING)) {
		c->need_ack = true;
		return;
	}
	wnd = (uint32_t)get16(t + 14) << (c->send_scale == 0xff ? 0 : c->send_scale);
	if (after(ack, c->snd_una))
		on_ack(n, c, ack);
	else if (ack == c->snd_una && !span && wnd == c->snd_wnd && c->snd_una != c->snd_max)
		on_dup_ack(n, c);
	if (!before(ack, c->snd_una) && (before(c->snd_wl1, seq) ||
	    (c->snd_wl1 == seq && !before(ack, c->snd_wl2)))) {
		if (!c->snd_wnd && wnd)
			c->snd_nxt = c->snd_una; /* the probe may have been thrown away */
		c->snd_wnd = wnd;
		c->snd_wl1 = seq;
		c->snd_wl2 = ack;
		if (wnd == 0)
			c->retries = 0; /* the peer lives, it is only full */
	}
	if (span) {
		uint32_t old = c->rcv_nxt - seq;
		if (after(seq, c->rcv_nxt)) { /* a hole: three of these make the peer resend */
			send_ack(n, c);
			return;
		}
		c->need_ack = true;
		if (old < len && !c->fin_received) {
			uint32_t take = min32(len - old, NET_RX_RING - received(c));
			take = min32(take, right - c->rcv_nxt);
			uint32_t at = c->rcv_nxt & (NET_RX_RING - 1), first = min32(take, NET_RX_RING - at);
			memcpy(c->rx + at, data + old, first);
			memcpy(c->rx, data + old + first, take - first);
			c->rcv_nxt += take;
			c->event = true;
		}
		if (flags & FIN && seq + len == c->rcv_nxt && !c->fin_received) {
			c->rcv_nxt++;
			if (before(c->rcv_edge, c->rcv_nxt))
				c->rcv_edge = c->rcv_nxt;
			c->fin_received = c->event = true;
		}
	}
}

static void tcp_input(struct net *n, const uint8_t *frame, const uint8_t *ip, const uint8_t *t, size_t total)
{
	const uint8_t *mac = frame + 6;
	uint32_t from = get32(ip + 12);
	size_t header = (size_t)(t[12] >> 4) * 4;
	if (header < 20 || header > total) {
		n->stats.frames_bad++;
		return;
	}
	uint32_t len = (uint32_t)(total - header), seq = get32(t + 4), ack = get32(t + 8);
	uint8_t flags = t[13];
	struct tcp_conn *c = n->conns, *end = n->conns + NET_CONNS;
	n->stats.segments_in++;
	while (c < end && (c->state == TCP_FREE || c->peer_ip != from || c->peer_port != get16(t) ||
			   c->local_port != get16(t + 2)))
		c++;
	if (c < end)
		memcpy(c->mac, mac, 6); /* the peer, or its failover partner, is where it spoke from last */
	if (c < end && c->state == TCP_TIME_WAIT) {
		if ((flags & (SYN | ACK | RST)) == SYN && after(seq, c->rcv_nxt)) {
			drop(c); /* a new incarnation (RFC 9293, 3.6.1) */
			c = end;
		} else {
			if (flags & RST)
				drop(c);
			else if (len || flags & FIN)
				send_ack(n, c);
			return;
		}
	}
	if (c < end && c->state == TCP_SYN_RECEIVED) {
		if (flags & RST) {
			if (seq == c->rcv_nxt)
				drop(c);
			return;
		}
		if (flags & SYN) {
			if (seq + 1 == c->rcv_nxt)
				send_syn_ack(n, c);
			return;
		}
		if (!(flags & ACK))
			return;
		if (ack != c->snd_una + 1) {
			send_reset(n, mac, from, t, len);
			return;
		}
		c->state = TCP_OPEN;
		c->snd_una++;
		c->snd_wl1 = seq - 1;
		c->snd_wl2 = ack;
		c->retries = 0;
		c->timer_ms = 0;
		c->event = true;
		n->stats.accepted++;
	}
	if (c < end) {
		if (c->reset)
			return;
		tcp_segment(n, c, t, t + header, len);
		if (c->state != TCP_OPEN || c->reset || !c->fin_acked)
			return;
		if (!c->fin_received) {
			arm(n, c, FIN_WAIT_MS);
		} else if (c->closed_first) {
			c->state = TCP_TIME_WAIT;
			arm(n, c, TIME_WAIT_MS);
		} else {
			drop(c);
		}
		return;
	}
	if (flags & RST)
		return;
	if ((flags & (SYN | ACK | FIN)) == SYN)
		for (const struct net_service *s = n->services; s < n->services + NET_SERVICES; s++)
			if (s->tcp && s->port == get16(t + 2)) {
				tcp_open(n, s, mac, from, t, header);
				return;
			}
	send_reset(n, mac, from, t, len + !!(flags & SYN) + !!(flags & FIN));
}

/* on_timer handles a connection whose timer has run out. */
static void on_timer(struct net *n, struct tcp_conn *c)
{
	c->timer_ms = 0;
	if (c->state == TCP_TIME_WAIT || (c->fin_acked && !c->fin_received)) {
		drop(c);
		return;
	}
	if (++c->retries > (c->state == TCP_OPEN ? RETRIES_MAX : RETRIES_SYN)) {
		kill(n, c);
		return;
	}
	c->rto_ms = min32(c->rto_ms * 2, RTO_MAX_MS);
	if (c->state == TCP_SYN_RECEIVED) {
		send_syn_ack(n, c);
		arm(n, c, c->rto_ms);
		return;
	}
	if (c->snd_una != c->snd_max) {
		halve(c);
		c->cwnd = c->mss;
		n->stats.retransmits++;
	}
	c->rtt_timing = c->recovering = false;
	c->dup_acks = 0;
	c->snd_nxt = c->snd_una; /* everything from here on again */
	c->force_probe = true;   /* one byte, even against a closed window */
}

static void tcp_transmit(struct net *n, struct tcp_conn *c)
{
	for (;;) {
		uint32_t flight = c->snd_nxt - c->snd_una;
		uint32_t window = min32(c->snd_wnd, c->cwnd);
		/* A FIN takes the sequence number after the last byte. */
		if (c->fin_acked || after(c->snd_nxt, c->tx_released))
			break;
		uint32_t ready = c->tx_released - c->snd_nxt;
		bool fin = c->fin_wanted && c->tx_released == c->tx_end;
		if (!ready && !fin)
			break;
		if (c->force_probe && window <= flight)
			window = flight + 1;
		uint32_t most = n->port->segmentation ? LARGE_DATA : c->mss;
		uint32_t len = min32(min32(ready, most), window > flight ? window - flight : 0);
		fin = fin && len == ready && flight + len <= window;
		if (!len && !fin)
			break;
		/* No silly small segments into a nearly full window (RFC 9293, 3.8.6.2.1). */
		if (len < ready && len < c->mss && flight && !c->force_probe)
			break;
		if (!send_segment(n, c, c->snd_nxt, len, (uint8_t)((fin ? FIN : 0) | (len == ready ? PSH : 0))))
			break;
		if (!c->rtt_timing && c->snd_nxt == c->snd_max) {
			c->rtt_timing = true;
			c->rtt_seq = c->snd_nxt + len + fin;
			c->rtt_start_ms = now(n);
		}
		c->force_probe = false;
		if (fin && after(c->snd_nxt + len + 1, c->snd_max))
			c->closed_first = !c->fin_received;
		c->snd_nxt += len + fin;
		if (after(c->snd_nxt, c->snd_max))
			c->snd_max = c->snd_nxt;
		if (!c->timer_ms)
			arm(n, c, c->rto_ms);
		if (fin)
			break;
	}
	/* What waits for a window or a frame buffer is tried again by the timer. */
	if (!c->timer_ms && !c->fin_acked && (c->snd_una != c->snd_max || c->snd_una != c->tx_released))
		arm(n, c, c->rto_ms);
	/* A window that was nearly closed and has opened again is worth an ACK of its own. */
	if (c->need_ack || (!c->fin_received && c->rcv_edge - c->rcv_nxt < NET_RX_RING / 2 &&
			    c->rx_read + WINDOW_MAX - c->rcv_edge >= 2 * OWN_MSS))
		send_ack(n, c);
}

void net_output(struct net *n)
{
	n->starved = false;
	for (struct tcp_conn *c = n->conns; c < n->conns + NET_CONNS; c++) {
		if (c->state == TCP_FREE || c->reset)
			continue;
		if (c->timer_ms && c->timer_ms <= now(n))
			on_timer(n, c);
		if (c->state == TCP_OPEN && !c->reset)
			tcp_transmit(n, c);
		else if (c->state == TCP_TIME_WAIT && c->need_ack)
			send_ack(n, c);
	}
}

uint64_t net_timer(const struct net *n)
{
	uint64_t first = 0;
	for (const struct tcp_conn *c = n->conns; c < n->conns + NET_CONNS; c++)
		if (c->state != TCP_FREE && c->timer_ms && (!first || c->timer_ms < first))
			first = c->timer_ms;
	return first;
}

void net_dispatch(struct net *n)
{
	for (struct tcp_conn *c = n->conns; c < n->conns + NET_CONNS; c++) {
		if (c->state != TCP_OPEN || !c->event)
			continue;
		c->event = false;
		c->service->tcp(n, c);
		if (c->reset)
			drop(c);
	}
}

size_t tcp_available(const struct tcp_conn *c) { return received(c); }

size_t tcp_peek(struct tcp_conn *c, const uint8_t **data)
{
	uint32_t at = c->rx_read & (NET_RX_RING - 1);
	*data = c->rx + at;
	return min32(received(c), NET_RX_RING - at);
}

size_t tcp_copy(const struct tcp_conn *c, void *to, size_t len)
{
	uint32_t take = len < received(c) ? (uint32_t)len : received(c);
	uint32_t at = c->rx_read & (NET_RX_RING - 1), first = min32(take, NET_RX_RING - at);
	memcpy(to, c->rx + at, first);
	memcpy((uint8_t *)to + first, c->rx, take - first);
	return take;
}

void tcp_consume(struct tcp_conn *c, size_t len)
{
	c->rx_read += len < received(c) ? (uint32_t)len : received(c);
}

size_t tcp_room(const struct tcp_conn *c)
{
	return c->fin_wanted || c->reset ? 0 : NET_TX_RING - (c->tx_end - c->snd_una);
}

size_t tcp_write(struct tcp_conn *c, const void *data, size_t len)
{
	uint32_t take = len < tcp_room(c) ? (uint32_t)len : (uint32_t)tcp_room(c);
	uint32_t at = c->tx_end & (NET_TX_RING - 1), first = min32(take, NET_TX_RING - at);
	memcpy(c->tx + at, data, first);
	memcpy(c->tx, (const uint8_t *)data + first, take - first);
	c->tx_end += take;
	return take;
}

void tcp_release(struct tcp_conn *c) { c->tx_released = c->tx_end; }

bool tcp_ended(const struct tcp_conn *c) { return c->reset || (c->fin_received && !received(c)); }

void tcp_close(struct tcp_conn *c) { c->fin_wanted = true; }

void tcp_abort(struct net *n, struct tcp_conn *c)
{
	uint8_t *f;
	if (c->state == TCP_OPEN && !c->reset &&
	    (f = tcp_header(n, c->mac, c->local_port, c->peer_port, c->snd_nxt, c->rcv_nxt, RST | ACK, 0)))
		send_ip(n, f, c->peer_ip, PROTO_TCP, 20, 16, 0);
	drop(c);
}

/* ---- ICMP, UDP, ARP ---- */

static void icmp_input(struct net *n, const uint8_t *frame, uint32_t from, const uint8_t *m, size_t len)
{
	uint8_t *f;
	if (len < 8 || len > NET_MTU - 20 || m[0] != 8 || m[1] != 0 || fold(sum(0, m, len)) != 0xffff)
		return;
	n->stats.pings++;
	if (!(f = frame_for(n, frame + 6, ETH_IPV4)))
		return;
	memcpy(f + L4_AT, m, len);
	f[L4_AT] = 0; /* echo reply */
	send_ip(n, f, from, PROTO_ICMP, len, 2, 0);
}

static void udp_input(struct net *n, const uint8_t *frame, uint32_t from, const uint8_t *u, size_t len)
{
	struct udp_peer peer = {.ip = from, .port = get16(u), .local_port = get16(u + 2)};
	memcpy(peer.mac, frame + 6, 6);
	n->stats.datagrams_in++;
	for (const struct net_service *s = n->services; s < n->services + NET_SERVICES; s++)
		if (s->udp && s->port == peer.local_port)
			s->udp(n, &peer, u + 8, len - 8);
}

void udp_send(struct net *n, const struct udp_peer *to, const void *data, size_t len)
{
	uint8_t *f;
	if (len > NET_UDP_MAX || !(f = frame_for(n, to->mac, ETH_IPV4)))
		return;
	put16(f + L4_AT, to->local_port);
	put16(f + L4_AT + 2, to->port);
	put16(f + L4_AT + 4, (uint32_t)len + 8);
	memcpy(f + L4_AT + 8, data, len);
	send_ip(n, f, to->ip, PROTO_UDP, len + 8, 6, 0);
}

static void arp_input(struct net *n, const uint8_t *a, size_t len)
{
	static const uint8_t ethernet_ipv4[6] = {0, 1, 8, 0, 6, 4};
	if (len < 28 || memcmp(a, ethernet_ipv4, 6))
		return;
	uint32_t sender = get32(a + 14);
	/* Whoever announces an address takes its connections along: a peer, or the gateway for
	 * every peer behind it. */
	for (struct tcp_conn *c = n->conns; c < n->conns + NET_CONNS; c++)
		if (c->state != TCP_FREE && !(a[8] & 1) && sender &&
		    (c->peer_ip == sender || (sender == n->gateway && (c->peer_ip ^ n->ip) & n->mask)))
			memcpy(c->mac, a + 8, 6);
	if (get16(a + 6) == 1 && get32(a + 24) == n->ip && sender != n->ip && !(a[8] & 1))
		send_arp(n, 2, a + 8, a + 8, sender);
}

static void ip_input(struct net *n, const uint8_t *frame, size_t len, bool checksum_ok)
{
	const uint8_t *ip = frame + IP_AT;
	size_t header, total;
	len -= IP_AT;
	if (len < 20 || ip[0] >> 4 != 4)
		goto bad;
	header = (size_t)(ip[0] & 15) * 4;
	total = get16(ip + 2);
	if (header < 20 || total < header || total > len || fold(sum(0, ip, header)) != 0xffff)
		goto bad;
	uint32_t from = get32(ip + 12);
	const uint8_t *l4 = ip + header;
	len = total - header;
	/* Fragments, and senders that cannot be answered: 0/8, 127/8, multicast, broadcast, us. */
	if (get32(ip + 16) != n->ip || get16(ip + 6) & 0x3fff || from >> 24 == 0 || from >> 24 == 127 ||
	    from >> 28 >= 14 || from == n->ip || (from | n->mask) == ~0u || frame[6] & 1)
		return;
	switch (ip[9]) {
	case PROTO_ICMP:
		icmp_input(n, frame, from, l4, len);
		return;
	case PROTO_TCP:
		if (len < 20 || (!checksum_ok && fold(sum(pseudo_sum(ip + 12, PROTO_TCP, len), l4, len)) != 0xffff))
			goto bad;
		tcp_input(n, frame, ip, l4, len);
		return;
	case PROTO_UDP:
		if (len < 8 || get16(l4 + 4) < 8 || get16(l4 + 4) > len)
			goto bad;
		len = get16(l4 + 4);
		if (!checksum_ok && get16(l4 + 6) &&
		    fold(sum(pseudo_sum(ip + 12, PROTO_UDP, len), l4, len)) != 0xffff)
			goto bad;
		udp_input(n, frame, from, l4, len);
		return;
	}
	return;
bad:
	n->stats.frames_bad++;
}

void net_input(struct net *n, const uint8_t *frame, size_t len, bool checksum_ok)
{
	n->stats.frames_in++;
	if (len < IP_AT)
		return;
	if (get16(frame + 12) == ETH_ARP)
		arp_input(n, frame + IP_AT, len - IP_AT);
	else if (get16(frame + 12) == ETH_IPV4 && !memcmp(frame, n->port->mac, 6))
		ip_input(n, frame, len, checksum_ok);
}

void net_init(struct net *n, struct net_port *port, uint32_t ip, int prefix, uint32_t gateway, uint32_t seed)
{
	memset(n, 0, offsetof(struct net, conns));
	for (struct tcp_conn *c = n->conns; c < n->conns + NET_CONNS; c++)
		c->state = TCP_FREE;
	n->port = port;
	n->ip = ip;
	n->mask = prefix <= 0 ? 0 : ~0u << (32 - (prefix > 32 ? 32 : prefix));
	n->gateway = gateway;
	n->isn = seed;
}

void net_serve(struct net *n, struct net_service s)
{
	for (int i = 0; i < NET_SERVICES; i++)
		if (!n->services[i].port) {
			n->services[i] = s;
			return;
		}
}
