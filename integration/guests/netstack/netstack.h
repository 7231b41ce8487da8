/*
 * netstack: the IPv4 host side that the network guests share: ARP, ICMP echo, UDP
 * services and TCP servers, in one file without allocation, threads or a clock of its own.
 *
 * Three ideas carry it:
 *
 *  - It is a function of frames and time. The guest feeds frames with net_input, lets the
 *    services act with net_dispatch and sends with net_output. The stack never waits, looks
 *    at the clock only when TCP needs it, and opens no connection: it answers where a
 *    request came from, so it resolves no addresses either.
 *  - Both rings of a connection are indexed by TCP sequence number, so the pointers of
 *    RFC 9293 (SND.UNA, SND.NXT, RCV.NXT) are the ring pointers.
 *  - Bytes that tcp_write queues are held back until tcp_release, so a server can
 *    prepare its answers first and let them go when they are durable.
 *
 * What it does: retransmission with exponential backoff (RFC 6298), slow start, congestion
 * avoidance and fast recovery (RFC 6582), window scaling, MSS, zero window probes,
 * TIME_WAIT. What it does not: out-of-order segments are dropped and answered with a
 * duplicate ACK; no SACK, no timestamps, no IP fragments, no outgoing connections.
 */
#ifndef NETSTACK_H
#define NETSTACK_H

#ifdef NETSTACK_HOST /* the fuzz driver builds the stack as an ordinary program */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#else
#include "rt.h"
#endif

/* A guest's whole image has to lie below 16 MiB, all that the runtime maps at first; the
 * rings of the connections are most of it. */
enum {
	NET_CONNS = 64,             /* TCP connections, TIME_WAIT included */
	NET_RX_RING = 64 * 1024,    /* bytes received and not yet read, a power of two */
	NET_TX_RING = 64 * 1024,   /* bytes written and not yet acknowledged, a power of two */
	NET_SERVICES = 8,           /* TCP and UDP ports together */
	NET_MTU = 1500,
	NET_LARGE = 16 * 1024,      /* the largest frame that the card cuts up itself */
	NET_UDP_MAX = NET_MTU - 28, /* the largest datagram's payload */
	NET_TICK_MS = 50,           /* how exact the clock has to be */
};

struct net;
struct tcp_conn;

/* A UDP datagram's sender, as udp_send needs it to answer. */
struct udp_peer {
	uint32_t ip;
	uint16_t port, local_port;
	uint8_t mac[6];
};

/* A service answers one port. `tcp` is called by net_dispatch whenever its connection has
 * new data, new room to write, or has ended on the peer's side; `udp` by net_input. */
struct net_service {
	uint16_t port;
	void (*tcp)(struct net *n, struct tcp_conn *c);
	void (*udp)(struct net *n, const struct udp_peer *from, const uint8_t *data, size_t len);
};

/* What the card is to do with a frame that it sends. */
struct net_offload {
	uint16_t checksum_start;  /* 0: nothing; else store the checksum from here on ... */
	uint16_t checksum_offset; /* ... this far from its start */
	uint16_t segment;         /* 0, or cut the TCP segment up into ones of this size */
};

/* The network card and the clock below the stack. */
struct net_port {
	/* alloc returns room for a frame of NET_LARGE bytes, or NULL while all are in use. */
	uint8_t *(*alloc)(void);
	/* send gives the frame that alloc returned last to the card. */
	void (*send)(uint8_t *frame, size_t len, struct net_offload);
	/* clock is in ms from any start, correct to NET_TICK_MS, and never goes back. */
	uint64_t (*clock)(void);
	uint8_t mac[6];
	bool checksum, segmentation; /* what the card can do; the latter needs the former */
};

enum tcp_state { TCP_FREE, TCP_SYN_RECEIVED, TCP_OPEN, TCP_TIME_WAIT };

struct tcp_conn {
	enum tcp_state state;
	bool fin_received, fin_wanted, fin_acked; /* each direction's end, in TCP_OPEN */
	bool closed_first; /* our FIN went before the peer's came */
	bool reset;        /* the peer is gone; seen once by the service, then freed */
	bool event;        /* the service is to be called */
	bool need_ack, recovering, force_probe, rtt_timing;
	uint8_t send_scale, mac[6];
	uint8_t retries, dup_acks;
	uint16_t local_port, peer_port, mss;
	uint32_t peer_ip;
	uint32_t snd_una, snd_nxt, snd_max, snd_wnd, snd_wl1, snd_wl2;
	uint32_t tx_end, tx_released;  /* ends of what was written, and of what may be sent */
	uint32_t rcv_nxt, rcv_edge;    /* next byte expected, and the window's advertised end */
	uint32_t rx_read;              /* the next byte that the service reads */
	uint32_t cwnd, ssthresh, recover;
	uint32_t rtt_seq, srtt_ms, rttvar_ms, rto_ms;
	uint64_t rtt_start_ms;
	uint64_t timer_ms;             /* when the timer fires; 0 while it is off */
	const struct net_service *service;
	uint64_t user[2];              /* the service's own; 0 in a new connection */
	uint8_t rx[NET_RX_RING], tx[NET_TX_RING];
};

struct net_stats {
	uint64_t frames_in, frames_bad, segments_in, segments_out, retransmits, resets,
		refused, accepted, datagrams_in, pings;
};

struct net {
	struct net_port *port;
	uint32_t ip, mask, gateway;    /* host byte order */
	uint32_t isn;
	bool starved;                  /* output stopped for want of a frame buffer */
	uint16_t ip_id;
	struct net_service services[NET_SERVICES];
	struct net_stats stats;
	struct tcp_conn conns[NET_CONNS];
};

/* net_init starts an address on a port. The seed makes initial sequence numbers differ
 * from one run to the next. */
void net_init(struct net *n, struct net_port *port, uint32_t ip, int prefix, uint32_t gateway, uint32_t seed);
/* net_serve adds a service; more than NET_SERVICES are ignored. */
void net_serve(struct net *n, struct net_service s);
/* net_announce sends a gratuitous ARP. */
void net_announce(struct net *n);
/* net_input takes one frame from the card. checksum_ok says that the card vouches for
 * the transport checksum. The frame is only read, and only during the call. */
void net_input(struct net *n, const uint8_t *frame, size_t len, bool checksum_ok);
/* net_dispatch calls the services of connections with events. */
void net_dispatch(struct net *n);
/* net_output runs the timers and sends what may be sent. */
void net_output(struct net *n);
/* net_timer returns when net_output is next wanted for a timer, 0 for never. */
uint64_t net_timer(const struct net *n);

/* tcp_peek returns the received bytes that lie in one piece, and their number. */
size_t tcp_peek(struct tcp_conn *c, const uint8_t **data);
size_t tcp_available(const struct tcp_conn *c);
/* tcp_copy copies up to len received bytes without consuming them. */
size_t tcp_copy(const struct tcp_conn *c, void *to, size_t len);
void tcp_consume(struct tcp_conn *c, size_t len);
size_t tcp_room(const struct tcp_conn *c);
/* tcp_write queues up to len bytes and returns how many it took; tcp_release lets all
 * queued bytes be sent. */
size_t tcp_write(struct tcp_conn *c, const void *data, size_t len);
void tcp_release(struct tcp_conn *c);
/* tcp_ended says that the peer sends no more and all that it sent has been read. */
bool tcp_ended(const struct tcp_conn *c);
/* tcp_close ends our direction after what was written; tcp_abort resets. */
void tcp_close(struct tcp_conn *c);
void tcp_abort(struct net *n, struct tcp_conn *c);

/* udp_send answers a datagram; it is lost if no frame buffer is free, as UDP may be. */
void udp_send(struct net *n, const struct udp_peer *to, const void *data, size_t len);

#endif
