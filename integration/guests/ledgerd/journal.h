/*
 * The ledger: accounts, requests that are applied once, and the journal that makes them last.
 *
 * On disk, all little-endian, in sectors of 512 bytes:
 *
 *	sector 0   superblock, written once
 *	1..7       unused
 *	8..        records of 64 bytes, eight to a sector
 *
 * A group of records is written in one go, starting on a fresh sector, and flushed before
 * any of its answers leaves; unused slots of its last sector are zero. No sector is written
 * twice, save those that a crash left unfinished. A sector is taken to be written whole or
 * not at all.
 *
 * Replay takes sectors in order while they hold records whose sums are right and that
 * continue the sequence and the chain, and ends at the first one that does not. What lies
 * behind it can only be the rest of the group that was being written, so a record there with
 * a commit number beyond the next one means that the journal has a hole, and the ledger
 * refuses to start.
 *
 * Requests are named by client and number. A client's window is its newest number and the
 * LEDGER_WINDOW - 1 numbers below. A number in the window or above is applied if it is new
 * and answered as before if it is not; one below the window is refused as stale. So a client
 * may have LEDGER_WINDOW requests in flight, in any order, and repeat each as often as it
 * likes. There can be LEDGER_CLIENTS clients; the requests of one more are refused.
 *
 * The package integration/guests/ledger reads all this on the host.
 */
#ifndef LEDGER_JOURNAL_H
#define LEDGER_JOURNAL_H

#include "rt.h"

enum {
	LEDGER_ACCOUNTS = 1024, LEDGER_CLIENTS = 1024, LEDGER_WINDOW = 64,
	LEDGER_VERSION = 1, LEDGER_FIRST_SECTOR = 8,
	RECORDS_PER_SECTOR = 8,
	GROUP_SECTORS = 64, GROUP_RECORDS = GROUP_SECTORS * RECORDS_PER_SECTOR,
};
#define LEDGER_MAGIC "FTLEDGER"
#define LEDGER_MAX (~0ul >> 1) /* the highest balance, amount and request number */

struct superblock {
	char magic[8];
	u32 version, record_size, accounts, clients, window, zero;
	u64 journal;         /* identity: records of an earlier journal do not count */
	u64 first, sectors;  /* of the records */
	u64 sum;             /* FNV-1a of the bytes before it */
};

enum op { OP_TRANSFER = 'T', OP_DEPOSIT = 'D' };
/* Outcomes that are journaled, because a repeated request gets the same answer. */
enum outcome { OUTCOME_OK = 0, OUTCOME_FUNDS = 1, OUTCOME_LIMIT = 2 };

struct record {
	u64 seq;             /* 1, 2, 3, ... */
	u64 number;          /* the client's */
	u64 amount;
	u64 balance;         /* of `from` afterwards, as answered */
	u32 client;
	u32 commit;          /* of the group: 1, 2, 3, ... */
	u16 from, to;        /* equal for a deposit */
	u8 op, outcome;
	u16 zero;
	u64 chain;           /* FNV-1a of the chain before (at first: the journal's identity) and the bytes before */
	u64 sum;             /* FNV-1a of the journal's identity and the bytes before */
};

/* The state, in the layout over which its hash goes. */
struct answer {
	u64 number, seq, balance, outcome;
};
struct client {
	u64 id, newest;
	struct answer answers[LEDGER_WINDOW]; /* of number n at n % LEDGER_WINDOW */
};
struct ledger {
	u64 seq, chain, balances[LEDGER_ACCOUNTS], client_count;
	struct client clients[LEDGER_CLIENTS]; /* in order of their first request */
};
extern struct ledger ledger;

/* Why a request was not even journaled. */
enum refusal { ACCEPTED, REPEATED, REFUSED_ACCOUNT, REFUSED_STALE, REFUSED_CLIENTS, REFUSED_FULL };

/* ledger_apply executes a request of which op, client, number, from, to and amount are
 * given: fills in the rest, changes the state and adds the record to the open group. A
 * repeated one is REPEATED, with seq, balance and outcome as at first. */
enum refusal ledger_apply(struct record *);
/* ledger_hash is FNV-1a over the used part of struct ledger. */
u64 ledger_hash(void);

struct journal_stats {
	u64 commits, largest_group, replayed, sectors_free;
};
extern struct journal_stats journal_stats;

struct block;
/* journal_open replays the disk's journal, or makes one if the disk begins with zeros.
 * False, with the reason printed, if the disk holds something else or is damaged. */
bool journal_open(struct block *, u64 new_identity);
u32 journal_group(void);       /* records in the open group */
/* journal_commit starts to write the open group; journal_poll drives it on and returns true
 * while it is not yet durable. A disk error ends the guest. */
void journal_commit(void);
bool journal_poll(void);

#endif
