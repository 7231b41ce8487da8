/*
 * ledgerd: a transaction server. Every answer that leaves it is durable on its disk, and a
 * request that is repeated is not applied twice; so clients can tell whether a fault of the
 * machine below lost anything.
 *
 * TCP and UDP port 7000, one request a line, numbers in decimal, answers in the order of the
 * requests; over UDP the answers to one datagram come in one datagram.
 *
 *	T CLIENT.NUMBER FROM TO AMOUNT   transfer     OK CLIENT.NUMBER SEQ BALANCE   (of FROM)
 *	D CLIENT.NUMBER ACCOUNT AMOUNT   deposit      OK CLIENT.NUMBER SEQ BALANCE
 *	                                              NO CLIENT.NUMBER SEQ funds|limit
 *	B ACCOUNT                        balance      B ACCOUNT BALANCE
 *	H                                state hash   H SEQ HASH                     (16 hex digits)
 *	S                                statistics   S NAME=VALUE ...
 *
 * NO is an answer that is journaled and repeated like OK: the balance is too small, or
 * would be too large. ERR CLIENT.NUMBER REASON, or ERR - REASON, is not: syntax,
 * account (no such), stale (number too old), clients (too many), full (the journal).
 *
 * Limits are in journal.h. Clients are 1 to 2^32-1, numbers and amounts from 1. Words of the
 * command line: those of netstack/loop.h and virtio.h, journal=N for the identity of a new
 * journal. The power button ends it: no new requests, the last group is flushed, S5.
 */
#include "journal.h"
#include "netstack/loop.h"
#include "virtio/block.h"

enum {
	PORT = 7000,
	LINE_MAX = 128,                 /* of a request, with its end */
	ANSWER_MAX = 256,
	DATAGRAMS = 64,                 /* waiting for the group in progress */
	DATAGRAM_RECORDS = NET_UDP_MAX / 12, /* the shortest transaction has 12 bytes */
};

static struct net net;
static struct block disk;
static u64 repeats;

/* A datagram with requests, and after they are done with the answers. */
static struct datagram {
	struct udp_peer peer;
	size_t len;
	bool answered;
	char text[NET_UDP_MAX];
} datagrams[DATAGRAMS];
static int datagram_count;

/* ---- requests ---- */

/* number reads a decimal number of at most max and the character after it. */
static bool number(const char **p, u64 max, char end, u64 *v)
{
	const char *s = *p;

	*v = 0;
	while (*s >= '0' && *s <= '9') {
		if (*v > max / 10 || *v * 10 > max - (u64)(*s - '0'))
			return false;
		*v = *v * 10 + (u64)(*s++ - '0');
	}
	if (s == *p || *s != end)
		return false;
	*p = s + (end != 0);
	return true;
}

static size_t transact(const char *line, char *to)
{
	static const char *const refusals[] = { [REFUSED_ACCOUNT] = "account", [REFUSED_STALE] = "stale",
						[REFUSED_CLIENTS] = "clients", [REFUSED_FULL] = "full" };
	static const char *const outcomes[] = { [OUTCOME_FUNDS] = "funds", [OUTCOME_LIMIT] = "limit" };
	struct record r = { .op = line[0] };
	const char *p = line + 2;
	enum refusal refusal;
	u64 client, from, target;

	if (line[1] != ' ' || !number(&p, ~0u, '.', &client) || !number(&p, LEDGER_MAX, ' ', &r.number) ||
	    !number(&p, 0xffff, ' ', &from) || (target = from, r.op == OP_TRANSFER && !number(&p, 0xffff, ' ', &target)) ||
	    !number(&p, LEDGER_MAX, 0, &r.amount) || !client || !r.number || !r.amount)
		return snprintf(to, ANSWER_MAX, "ERR - syntax\n");
	r.client = client;
	r.from = from;
	r.to = target;
	refusal = ledger_apply(&r);
	repeats += refusal == REPEATED;
	if (refusal > REPEATED)
		return snprintf(to, ANSWER_MAX, "ERR %lu.%lu %s\n", client, r.number, refusals[refusal]);
	if (r.outcome != OUTCOME_OK)
		return snprintf(to, ANSWER_MAX, "NO %lu.%lu %lu %s\n", client, r.number, r.seq, outcomes[r.outcome]);
	return snprintf(to, ANSWER_MAX, "OK %lu.%lu %lu %lu\n", client, r.number, r.seq, r.balance);
}

/* answer executes one line, ended by 0, and returns the length of the answer. */
static size_t answer(const char *line, char *to)
{
	const char *p = line + 2;
	u64 account;

	if (line[0] == OP_TRANSFER || line[0] == OP_DEPOSIT)
		return transact(line, to);
	if (line[0] == 'B' && line[1] == ' ' && number(&p, 0xffff, 0, &account)) {
		if (account >= LEDGER_ACCOUNTS)
			return snprintf(to, ANSWER_MAX, "ERR - account\n");
		return snprintf(to, ANSWER_MAX, "B %lu %lu\n", account, ledger.balances[account]);
	}
	if (!strcmp(line, "H"))
		return snprintf(to, ANSWER_MAX, "H %lu %016lx\n", ledger.seq, ledger_hash());
	if (!strcmp(line, "S"))
		return snprintf(to, ANSWER_MAX, "S seq=%lu clients=%lu repeats=%lu commits=%lu largest=%lu replayed=%lu free=%lu "
				"connections=%lu retransmits=%lu\n", ledger.seq, ledger.client_count, repeats, journal_stats.commits,
				journal_stats.largest_group, journal_stats.replayed, journal_stats.sectors_free,
				net.stats.accepted, net.stats.retransmits);
	return snprintf(to, ANSWER_MAX, "ERR - syntax\n");
}

/* take_line ends the line at the start of text with 0 and returns its length with the line
 * feed, 0 if there is no whole line. */
static size_t take_line(char *text, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (text[i] == '\n') {
			text[i] = 0;
			if (i && text[i - 1] == '\r')
				text[i - 1] = 0;
			return i + 1;
		}
	return 0;
}

/* ---- connections and datagrams ---- */

/* serve executes what has come in on a connection. Its answers wait for tcp_release. */
static void serve(struct net *n, struct tcp_conn *c)
{
	char line[LINE_MAX], text[ANSWER_MAX];
	size_t len = 0, have;

	while (tcp_room(c) >= ANSWER_MAX && journal_group() < GROUP_RECORDS) {
		have = tcp_copy(c, line, sizeof line);
		len = take_line(line, have);
		if (!len) {
			if (have == sizeof line) { /* not our protocol */
				tcp_abort(n, c);
				return;
			}
			break;
		}
		tcp_consume(c, len);
		tcp_write(c, text, answer(line, text));
	}
	if (journal_group() == GROUP_RECORDS)
		c->event = true; /* again, for the next group */
	else if (tcp_room(c) >= ANSWER_MAX && (c->reset || (c->fin_received && !len)))
		tcp_close(c);
}

static void take_datagram(struct net *n, const struct udp_peer *from, const u8 *data, size_t len)
{
	struct datagram *d = &datagrams[datagram_count];

	(void)n;
	if (datagram_count == DATAGRAMS)
		return; /* lost, as datagrams may be: the client repeats it */
	datagram_count++;
	d->peer = *from;
	d->len = len;
	d->answered = false;
	memcpy(d->text, data, len);
}

static void serve_datagrams(void)
{
	static char answers[NET_UDP_MAX];

	for (struct datagram *d = datagrams; d < datagrams + datagram_count; d++) {
		size_t used = 0, at = 0, len;

		if (d->answered || GROUP_RECORDS - journal_group() < DATAGRAM_RECORDS)
			continue;
		/* Requests whose answers would not fit are left out; the client repeats them. */
		while (sizeof answers - used >= ANSWER_MAX && (len = take_line(d->text + at, d->len - at))) {
			if (len <= LINE_MAX)
				used += answer(d->text + at, answers + used);
			at += len;
		}
		memcpy(d->text, answers, used);
		d->len = used;
		d->answered = true;
	}
}

/* release lets the answers go: everything that they tell is durable. */
static void release(void)
{
	int kept = 0;

	for (struct tcp_conn *c = net.conns; c < net.conns + NET_CONNS; c++)
		if (c->state == TCP_OPEN)
			tcp_release(c);
	for (int i = 0; i < datagram_count; i++) {
		if (!datagrams[i].answered)
			datagrams[kept++] = datagrams[i];
		else if (datagrams[i].len)
			udp_send(&net, &datagrams[i].peer, datagrams[i].text, datagrams[i].len);
	}
	datagram_count = kept;
}

/* turn does everything that can be done without waiting. */
static int turn(void)
{
	int frames = loop_receive(&net);

	if (!journal_poll()) {
		release();
		if (!power_pressed) {
			serve_datagrams();
			net_dispatch(&net);
		}
		if (journal_group())
			journal_commit();
		else
			release();
	}
	loop_send(&net);
	return frames;
}

int main(struct boot *boot)
{
	bool opened;

	(void)boot;
	if (!check(loop_start(&net), "net", "network card found and started") ||
	    !check(block_find(&disk, 0) && block_start(&disk, 0), "disk", "disk found and started"))
		return finish();
	opened = journal_open(&disk, arg_number("journal", net.isn * 0x9e3779b97f4a7c15 | 1));
	if (!check(opened, "journal", "%lu records replayed", journal_stats.replayed))
		return finish();
	printf("# state seq %lu hash %016lx\n", ledger.seq, ledger_hash());
	net_serve(&net, (struct net_service){ PORT, serve, take_datagram });
	printf("ready\n");
	console_flush();
	while (!power_pressed)
		if (!turn())
			loop_sleep(&net, &disk.q);
	while (journal_poll())
		virtq_sleep(&disk.q);
	turn();
	printf("# repeats %lu, commits %lu, largest group %lu, sectors free %lu, connections %lu, retransmits %lu\n", repeats,
	       journal_stats.commits, journal_stats.largest_group, journal_stats.sectors_free, net.stats.accepted,
	       net.stats.retransmits);
	printf("# state seq %lu hash %016lx\n", ledger.seq, ledger_hash());
	printf("end by power button\n");
	loop_power_off();
	return finish();
}
