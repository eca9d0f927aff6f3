/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * rc_traffic: two processes that send everything RC queue pairs can carry, and check all of it.
 *
 * What a queue pair sends is a stream of numbered operations. Kind, length and content of each
 * follow from (seed, side, queue pair, number) alone, so the receiver knows what has to come next
 * and what has to be in its memory. The sender is at most `window` operations ahead of what the
 * receiver has verified and said so, by writing an acknowledgement into the sender's memory.
 */
#ifndef REVERBS_TESTS_RC_TRAFFIC_H
#define REVERBS_TESTS_RC_TRAFFIC_H

#include "common.h"
#include "handles.h"
#include "messages.h"
#include "notify.h"

#define MAX_QPS 32
#define SEND_DEPTH 64
/* An unsignaled run is not longer than this. */
#define MAX_UNSIGNALED 8
/* The last operation of a stream says so in its immediate data. */
#define LAST_FLAG 0x80000000u

struct options {
	const char *device;
	uint32_t gid_index;
	uint64_t seed;
	uint64_t seconds;
	/* Operations of each queue pair and side; 0: until time is up or SIGTERM. */
	uint64_t messages;
	uint32_t qps;
	uint32_t window;
	uint32_t max_size;
	bool events;
	bool rnr;
	/* The second process opens its device when this file is there. */
	const char *late;
};

/* Written by the receiver of a stream into the memory of its sender. The copy is not atomic: it
 * counts only when `proof` fits. */
struct acknowledgement {
	uint64_t verified;
	uint64_t proof;
};

/* One posted send work request. */
struct posted {
	uint64_t id;
	uint64_t number;
	enum kind kind;
	bool signaled;
	uint32_t length;
	/* READ: key of the content. FETCH_ADD, CMP_SWAP: the value that must come back. */
	uint64_t expected;
	bool check_result;
};

struct stream {
	struct ibv_qp *qp;
	uint32_t index;

	/* Sending. Counts since the start; the ring is indexed modulo SEND_DEPTH. */
	struct posted ring[SEND_DEPTH];
	uint64_t posted, retired;
	uint64_t next_number, acknowledged;
	uint32_t unsignaled;
	bool last_sent;
	uint64_t added, swapped;
	uint32_t max_inline;

	/* Receiving. */
	uint64_t receives_posted, received;
	uint64_t verified, said;
	bool last_received, last_said;
	struct layout layout[WATCHED];
};

/* What the other process has to know. */
struct introduction {
	union ibv_gid gid;
	uint16_t lid;
	uint32_t qp_num[MAX_QPS];
	uint32_t psn[MAX_QPS];
	uint64_t slots, library, counters;
	uint32_t slots_key, library_key, counters_key;
};

struct totals {
	uint64_t operations[KINDS];
	uint64_t send_completions, receive_completions, messages, bytes, events, handle_checks;
	uint64_t shared_added;
};

struct traffic {
	struct options options;
	int socket;
	struct handles handles;
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct notify notify;
	uint32_t receive_depth;
	/* Memory, one region each with the least rights that do. */
	unsigned char *out, *in, *results, *slots, *library;
	uint64_t *counters;
	size_t out_length, in_length, results_length, slots_length, library_length, counters_length;
	struct ibv_mr *out_mr, *in_mr, *results_mr, *slots_mr, *library_mr, *counters_mr;
	struct introduction self, peer;
	struct stream stream[MAX_QPS];
	struct totals totals;
	uint64_t random;
	uint64_t idle;
};

/* rc_setup.c */
void read_options(struct options *options, int count, char **arguments);
void set_up(struct traffic *traffic);
void tear_down(struct traffic *traffic);

/* rc_stream.c: what operation `number` of a queue pair of a side is. */
enum kind kind_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number);
uint32_t length_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number);
uint64_t content_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number);
uint32_t immediate_of(const struct traffic *traffic, int from, uint32_t qp, uint64_t number);
uint64_t counter_start(const struct traffic *traffic, int owner, uint32_t index);
uint64_t library_key(const struct traffic *traffic, int owner, uint32_t page);
uint64_t proof_of(uint64_t verified);
/* Addresses of buffers, as offsets in their regions. */
size_t buffer_size(const struct traffic *traffic);
size_t slot_offset(const struct traffic *traffic, uint32_t qp, uint64_t number);
size_t acknowledgement_offset(const struct traffic *traffic, uint32_t qp);

/* rc_send.c. Each says whether it did anything. */
bool send_more(struct traffic *traffic, struct stream *stream);
bool send_acknowledgement(struct traffic *traffic, struct stream *stream);
bool take_send_completions(struct traffic *traffic);

/* rc_receive.c */
void post_receives(struct traffic *traffic, struct stream *stream);
bool take_receive_completions(struct traffic *traffic);
bool post_late_receives(struct traffic *traffic);

#endif
