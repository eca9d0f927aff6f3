/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * ud_srq: two processes with UD queue pairs, RC queue pairs on a shared receive queue, and UC queue
 * pairs, all at once.
 *
 * A flow is a numbered stream of messages from a queue pair of one side to one of the other; each
 * UD queue pair sends to each of the peer's, so there are more flows than queue pairs. Every
 * message starts with a header and goes on with content that follows from (seed, side, flow,
 * number). RC flows must arrive complete and in order. UD and UC flows may lose messages, but never
 * double, reorder or change one.
 *
 * The receiver tells the sender how far it has come by WRITEs over the RC queue pairs. A sender of
 * UD or UC messages that hears nothing new for a long time takes them as lost and goes on.
 */
#ifndef REVERBS_TESTS_UD_SRQ_H
#define REVERBS_TESTS_UD_SRQ_H

#include "common.h"
#include "handles.h"

/* Queue pairs of a side: UD (the second one on the SRQ), RC (all on the SRQ), UC. */
#define UDS 2
#define RCS 3
#define UCS 2
#define QUEUES (UDS + RCS + UCS)
#define FIRST_RC UDS
#define FIRST_UC (UDS + RCS)
#define FLOWS (UDS * UDS + RCS + UCS)

#define SEND_DEPTH 64
#define WINDOW 16
#define MAX_UNSIGNALED 8
#define QKEY 0x52564253

#define GRH_BYTES 40
#define UD_LARGEST 1000
#define LARGEST 4000
#define MARGIN 64
#define STRIDE (GRH_BYTES + LARGEST + MARGIN)

/* Who a receive buffer is posted to. */
enum pool { POOL_SRQ, POOL_UD, POOL_UC, POOLS = POOL_UC + UCS };
#define SRQ_BUFFERS (RCS * WINDOW + UDS * WINDOW + 16)
#define UD_BUFFERS (UDS * WINDOW + 8)
#define UC_BUFFERS (WINDOW + 8)
#define BUFFERS (SRQ_BUFFERS + UD_BUFFERS + UCS * UC_BUFFERS)

struct options {
	const char *device;
	uint32_t gid_index;
	uint64_t seed, seconds, messages;
};

struct header {
	uint32_t flow, length;
	uint64_t number;
	uint64_t last;
};

struct acknowledgement {
	uint64_t number;
	uint64_t proof;
};

/* The send queue of a queue pair. */
struct queue {
	struct ibv_qp *qp;
	struct {
		uint64_t id;
		bool signaled;
	} ring[SEND_DEPTH];
	uint64_t posted, retired;
	uint32_t unsignaled;
};

struct flow {
	enum ibv_qp_type type;
	/* Index of the sender's queue pair among the sender's, and of the receiver's. */
	uint32_t from, to;
	/* Sending. */
	uint64_t next, acknowledged;
	uint64_t quiet;
	bool last_sent;
	/* Receiving. */
	uint64_t expected, received, said;
	bool last_received, last_said;
};

struct buffer {
	enum pool pool;
	bool posted;
	uint64_t generation;
};

struct introduction {
	union ibv_gid gid;
	uint16_t lid;
	uint32_t qp_num[QUEUES];
	uint64_t acknowledgements;
	uint32_t key;
};

/* What every UD packet brings along, as first seen. */
struct packet_facts {
	bool known;
	uint8_t grh[GRH_BYTES];
	bool checksum_fits;
	uint16_t slid, pkey_index;
	uint8_t sl;
};

struct totals {
	uint64_t sent[FLOWS], received[FLOWS], bytes, send_completions, handle_checks, gone_on;
};

struct state {
	struct options options;
	int socket;
	struct handles handles;
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_cq *send_cq, *receive_cq;
	struct ibv_srq *srq;
	/* One for each UD queue pair of this side. */
	struct ibv_ah *ah[UDS];
	unsigned char *out, *in;
	struct acknowledgement *acknowledgements;
	struct ibv_mr *out_mr, *in_mr, *acknowledgements_mr;
	struct buffer buffer[BUFFERS];
	/* Buffers of a pool in the order in which they were posted; for all but the SRQ it is also
	 * the order in which they complete. */
	uint32_t order[POOLS][BUFFERS];
	uint64_t first[POOLS], last[POOLS];
	struct queue queue[QUEUES];
	struct flow flow[FLOWS];
	struct introduction self, peer;
	struct packet_facts facts;
	struct totals totals;
	uint64_t random;
};

/* ud_srq_setup.c */
void read_options(struct options *options, int count, char **arguments);
void set_up(struct state *state);
void tear_down(struct state *state);
uint32_t pool_size(enum pool pool);
/* Posts every buffer of the pool that is not posted, as one chain. */
void post_buffers(struct state *state, enum pool pool);
uint64_t buffer_id(const struct state *state, uint32_t index);
uint64_t proof_of(uint64_t number);

/* ud_srq_receive.c: says whether anything was received. */
bool take_receive_completions(struct state *state);
/* How long message `number` of a flow is, with its header. */
uint32_t length_of(const struct state *state, int from, uint32_t flow, uint64_t number);
uint64_t content_of(const struct state *state, int from, uint32_t flow, uint64_t number);
bool has_immediate(uint64_t number);

#endif
