#include "journal.h"
#include "virtio/block.h"

_Static_assert(sizeof(struct record) * RECORDS_PER_SECTOR == SECTOR, "records fill a sector");
_Static_assert(sizeof(struct superblock) == 64, "superblock has no padding");

enum { CHUNK_SECTORS = 128, LOOK_AHEAD = 1024 /* sectors behind the end to look for a hole */ };

struct ledger ledger;
struct journal_stats journal_stats;

static struct block *disk;
static struct superblock super;
static u64 next_sector; /* where the next group goes */
static u32 last_commit;

static struct record group[GROUP_RECORDS] __attribute__((aligned(SECTOR)));
static u32 group_size;
static enum { IDLE, WRITING, FLUSHING } phase;
static struct block_request request;

u64 ledger_hash(void)
{
	return fnv1a(FNV_START, &ledger, offsetof(struct ledger, clients) + ledger.client_count * sizeof(struct client));
}

static u64 chain_of(const struct record *r, u64 before)
{
	return fnv1a(fnv1a(FNV_START, &before, 8), r, offsetof(struct record, chain));
}

static u64 sum_of(const struct record *r)
{
	return fnv1a(fnv1a(FNV_START, &super.journal, 8), r, offsetof(struct record, sum));
}

/* ---- state ---- */

static struct client *find_client(u32 id)
{
	for (u64 i = 0; i < ledger.client_count; i++)
		if (ledger.clients[i].id == id)
			return &ledger.clients[i];
	return NULL;
}

/* execute works out a request's outcome and applies it to the balances. */
static void execute(struct record *r)
{
	u64 *from = &ledger.balances[r->from], *to = &ledger.balances[r->to];

	r->outcome = OUTCOME_OK;
	if (r->op == OP_TRANSFER && *from < r->amount)
		r->outcome = OUTCOME_FUNDS;
	else if (r->from != r->to || r->op == OP_DEPOSIT) {
		if (*to + r->amount > LEDGER_MAX) {
			r->outcome = OUTCOME_LIMIT;
		} else {
			*to += r->amount;
			if (r->op == OP_TRANSFER)
				*from -= r->amount;
		}
	}
	r->balance = *from;
}

/* remember enters a record that has been executed into the state. */
static void remember(const struct record *r, struct client *c)
{
	if (!c) {
		c = &ledger.clients[ledger.client_count++];
		c->id = r->client;
	}
	if (r->number > c->newest)
		c->newest = r->number;
	c->answers[r->number % LEDGER_WINDOW] = (struct answer){ r->number, r->seq, r->balance, r->outcome };
	ledger.seq = r->seq;
	ledger.chain = r->chain;
}

enum refusal ledger_apply(struct record *r)
{
	struct client *c = find_client(r->client);

	if (c) {
		struct answer *a = &c->answers[r->number % LEDGER_WINDOW];

		if (r->number + LEDGER_WINDOW <= c->newest)
			return REFUSED_STALE;
		if (a->number == r->number) {
			r->seq = a->seq;
			r->balance = a->balance;
			r->outcome = a->outcome;
			return REPEATED;
		}
	} else if (ledger.client_count == LEDGER_CLIENTS) {
		return REFUSED_CLIENTS;
	}
	if (r->from >= LEDGER_ACCOUNTS || r->to >= LEDGER_ACCOUNTS)
		return REFUSED_ACCOUNT;
	if (group_size == GROUP_RECORDS ||
	    next_sector + group_size / RECORDS_PER_SECTOR >= super.first + super.sectors)
		return REFUSED_FULL;
	execute(r);
	r->seq = ledger.seq + 1;
	r->commit = last_commit + 1;
	r->zero = 0;
	r->chain = chain_of(r, ledger.chain);
	r->sum = sum_of(r);
	remember(r, c);
	group[group_size++] = *r;
	return ACCEPTED;
}

/* ---- replay ---- */

static const struct record no_record;
static bool empty(const struct record *r) { return !memcmp(r, &no_record, sizeof *r); }

/* continues says whether a record is the next one. */
static bool continues(const struct record *r, u64 seq, u64 chain)
{
	return r->sum == sum_of(r) && r->seq == seq + 1 && r->chain == chain_of(r, chain);
}

/* records_in counts the records of a sector, 0 if it is not part of the journal. */
static int records_in(const struct record *r)
{
	u64 seq = ledger.seq, chain = ledger.chain;
	int n = 0;

	while (n < RECORDS_PER_SECTOR && !empty(&r[n])) {
		if (!continues(&r[n], seq, chain))
			return 0;
		seq++;
		chain = r[n++].chain;
	}
	for (int i = n; i < RECORDS_PER_SECTOR; i++)
		if (!empty(&r[i]))
			return 0;
	return n;
}

/* redo applies a record, and checks that it leads to what it says. */
static bool redo(const struct record *r)
{
	struct record again = *r;
	struct client *c = find_client(r->client);

	if (r->from >= LEDGER_ACCOUNTS || r->to >= LEDGER_ACCOUNTS || (!c && ledger.client_count == LEDGER_CLIENTS))
		return false;
	execute(&again);
	remember(r, c);
	last_commit = r->commit;
	return again.balance == r->balance && again.outcome == r->outcome;
}

static bool read_sectors(u64 sector, void *to, u64 sectors)
{
	return block_run(disk, BLOCK_READ, sector, to, sectors * SECTOR) == BLOCK_OK;
}

static bool replay(void)
{
	static struct record chunk[CHUNK_SECTORS * RECORDS_PER_SECTOR];
	u64 end = super.first + super.sectors, limit = end, have = 0, from = 0;
	bool ended = false;

	for (u64 at = super.first; at < limit; at++) {
		struct record *r;
		int n;

		if (at >= from + have) {
			from = at;
			have = limit - at < CHUNK_SECTORS ? limit - at : CHUNK_SECTORS;
			if (!read_sectors(from, chunk, have)) {
				printf("FAIL journal cannot read sector %lu\n", from);
				return false;
			}
		}
		r = &chunk[(at - from) * RECORDS_PER_SECTOR];
		if (!ended && (n = records_in(r))) {
			for (int i = 0; i < n; i++)
				if (!redo(&r[i])) {
					printf("FAIL journal record %lu contradicts the ones before\n", r[i].seq);
					return false;
				}
			journal_stats.replayed += n;
			next_sector = at + 1;
			continue;
		}
		if (!ended && limit - at > LOOK_AHEAD)
			limit = at + LOOK_AHEAD;
		ended = true;
		for (int i = 0; i < RECORDS_PER_SECTOR; i++)
			if (r[i].sum == sum_of(&r[i]) && r[i].commit > last_commit + 1) {
				printf("FAIL journal ends at sector %lu, but commit %u is at sector %lu\n", next_sector, r[i].commit, at);
				return false;
			}
	}
	journal_stats.sectors_free = end - next_sector;
	return true;
}

static bool format(u64 identity)
{
	super = (struct superblock){ LEDGER_MAGIC, LEDGER_VERSION, sizeof(struct record), LEDGER_ACCOUNTS, LEDGER_CLIENTS,
				     LEDGER_WINDOW, 0, identity, LEDGER_FIRST_SECTOR, disk->sectors - LEDGER_FIRST_SECTOR, 0 };
	static u8 sector[SECTOR];

	super.sum = fnv1a(FNV_START, &super, offsetof(struct superblock, sum));
	memcpy(sector, &super, sizeof super);
	return block_run(disk, BLOCK_WRITE, 0, sector, SECTOR) == BLOCK_OK &&
	       (!(disk->dev.features & BLOCK_F_FLUSH) || block_run(disk, BLOCK_FLUSH, 0, NULL, 0) == BLOCK_OK);
}

bool journal_open(struct block *b, u64 identity)
{
	static u64 sector[SECTOR / 8];
	bool blank = true;

	disk = b;
	if (disk->sectors <= LEDGER_FIRST_SECTOR || disk->read_only || !read_sectors(0, sector, 1)) {
		printf("FAIL journal disk too small, read-only or unreadable\n");
		return false;
	}
	for (u32 i = 0; i < SECTOR / 8; i++)
		blank = blank && !sector[i];
	if (blank) {
		if (!format(identity)) {
			printf("FAIL journal cannot write the superblock\n");
			return false;
		}
	} else {
		memcpy(&super, sector, sizeof super);
	}
	if (memcmp(super.magic, LEDGER_MAGIC, 8) || super.sum != fnv1a(FNV_START, &super, offsetof(struct superblock, sum)) ||
	    super.version != LEDGER_VERSION || super.record_size != sizeof(struct record) ||
	    super.accounts != LEDGER_ACCOUNTS || super.clients != LEDGER_CLIENTS || super.window != LEDGER_WINDOW ||
	    super.first != LEDGER_FIRST_SECTOR || super.sectors > disk->sectors - LEDGER_FIRST_SECTOR) {
		printf("FAIL journal the disk holds something else\n");
		return false;
	}
	ledger.chain = super.journal;
	next_sector = super.first;
	return replay();
}

/* ---- commit ---- */

u32 journal_group(void) { return group_size; }

void journal_commit(void)
{
	u32 sectors = (group_size + RECORDS_PER_SECTOR - 1) / RECORDS_PER_SECTOR;
	struct segment s = { group, sectors * SECTOR };

	memset(group + group_size, 0, (sectors * RECORDS_PER_SECTOR - group_size) * sizeof *group);
	block_submit(disk, &request, BLOCK_WRITE, next_sector, &s, 1);
	virtq_kick(&disk->q);
	phase = WRITING;
}

bool journal_poll(void)
{
	if (phase == IDLE || !block_pop(disk))
		return phase != IDLE;
	if (request.status != BLOCK_OK) { /* nothing was promised yet, and nothing may be from here on */
		printf("FAIL journal cannot %s: status %u\n", phase == WRITING ? "write" : "flush", request.status);
		rt_exit(RT_STATUS_FAILED);
	}
	if (phase == WRITING && disk->dev.features & BLOCK_F_FLUSH) {
		block_submit(disk, &request, BLOCK_FLUSH, 0, NULL, 0);
		virtq_kick(&disk->q);
		phase = FLUSHING;
		return true;
	}
	next_sector += (group_size + RECORDS_PER_SECTOR - 1) / RECORDS_PER_SECTOR;
	last_commit++;
	journal_stats.commits++;
	journal_stats.sectors_free = super.first + super.sectors - next_sector;
	if (group_size > journal_stats.largest_group)
		journal_stats.largest_group = group_size;
	group_size = 0;
	phase = IDLE;
	return false;
}
