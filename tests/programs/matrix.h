/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * matrix: processes x threads x queue pairs x transports, with every operation of each.
 *
 * Every process has queue pairs to every other. What one thread sends over one queue pair is a lane:
 * a stream of numbered operations. Kind, length and content of each follow from (seed, lane, number)
 * alone, so its receiver knows what has to come next and what has to be in its memory. RC lanes must
 * arrive complete and in order; UC and UD lanes may lose messages, but never double, reorder or change one.
 *
 * Threads have CQs and queue pairs of their own, or share the CQs, or share CQs and queue pairs; then
 * each posts without a lock of the program. How far a receiver has come is said in memory that the
 * processes share, not over the network.
 *
 * FETCH_ADD goes to a counter that the lane has for itself: each answer is known beforehand. CMP_SWAP
 * goes to one word of a process that all its senders want: who finds the ticket it expects puts its own
 * there. All tickets are different, so the successes must form one chain from the first to the last.
 */
#ifndef REVERBS_TESTS_MATRIX_H
#define REVERBS_TESTS_MATRIX_H

#include <pthread.h>
#include <stdatomic.h>

#include "common.h"
#include "handles.h"
#include "messages.h"
#include "notify.h"

#define MAX_THREADS 4
/* Of one process, over all its queue pairs. */
#define MAX_LANES 32
#define MAX_WINDOW 32
/* Operations of a lane that are posted and not over. */
#define SEND_DEPTH 32
/* Receives of a queue pair or of the SRQ. */
#define MOST_RECEIVES (MAX_LANES * MAX_WINDOW + MAX_THREADS * BATCH)
#define BATCH 16
#define GRH_BYTES 40
#define QKEY 0x6d747278
#define UD_LARGEST 1000
/* Places for WRITEs: a UC sender may be two windows ahead of what has been looked at. */
#define SLOTS (2 * window)

enum transport { RC, UC, UD, SRQ, TRANSPORTS, MIX = TRANSPORTS };

/* What the threads of a process have in common. */
enum sharing { SHARE_NOTHING, SHARE_CQS, SHARE_QPS };

struct options {
	const char *device;
	uint32_t gid_index;
	uint64_t seed, messages;
	/* Queue pairs: of each thread, to each other process. With SHARE_QPS: of all threads. */
	uint32_t processes, threads, qps;
	enum transport transport;
	enum sharing sharing;
	uint32_t window, max_size, sges, unsignaled, chain;
	bool inlined, events, slow_receiver, rnr;
	/* Extended objects, and the second way to post and poll. */
	bool extended;
	/* Seconds without any progress after which something is taken to be lost. */
	uint64_t patience;
};

/* In front of every SEND. */
struct header {
	uint32_t lane, length;
	uint64_t number;
};

/* One direction of a lane, in the memory that all processes share. */
struct flow {
	/* By the receiver: everything below is seen to. */
	_Atomic uint64_t acknowledged;
	/* By the sender of a UC or UD lane: all below has left, and may be lost. */
	_Atomic uint64_t asked;
	/* By the sender: as many have been executed, and no more will come. UINT64_MAX until then. */
	_Atomic uint64_t ended;
	/* The sender's account, complete when `ended` is set: the lane's counter; the chain's links. */
	uint64_t counter, links;
};

/* What the other processes have to know of one. */
struct introduction {
	union ibv_gid gid;
	uint16_t lid;
	uint32_t qp_num[MAX_LANES], psn[MAX_LANES];
	uint64_t slots, library, words;
	uint32_t slots_key, library_key, words_key;
};

/* What is counted, over all threads of all processes. */
enum counted {
	/* One for each kind comes first. */
	MESSAGES = KINDS, BYTES, SEND_COMPLETIONS, RECEIVE_COMPLETIONS, INLINED, SCATTERED, UNSIGNALED,
	CHAINED, SWAPPED, LOST, LATE_RECEIVES, EVENTS, HANDLE_CHECKS, COUNTED
};

struct shared {
	atomic_bool stop;
	_Atomic uint64_t arrived;
	_Atomic uint64_t counted[COUNTED];
	struct introduction introduction[MAX_PROCESSES];
	struct flow flow[MAX_PROCESSES][MAX_LANES];
};

/* One posted send work request. */
struct posted {
	enum kind kind;
	bool signaled, done;
	uint32_t length;
	/* READ: key of the content. FETCH_ADD: the value that must come back. CMP_SWAP: the ticket
	 * that was hoped for. */
	uint64_t expected;
};

struct lane {
	struct endpoint *endpoint;
	/* In this process, in the peer, and of the queue pair. */
	uint32_t index, far, place;
	/* The one that sends. */
	uint32_t thread;
	uint64_t random;
	/* Of this process's operations, and of the peer's. */
	uint64_t key, peer_key;
	struct flow *sending, *receiving;
	/* Over all that follows; not held while anything is posted. */
	pthread_mutex_t lock;

	/* Sending: numbers below `next` are posted, those below `retired` are over. */
	struct posted ring[SEND_DEPTH];
	uint64_t next, retired, newest_done;
	uint32_t unsignaled;
	bool last_sent;
	uint64_t counter, ticket, links;

	/* Receiving: all below `verified` is checked, or taken as lost. */
	uint64_t verified, newest;
	bool seen[MAX_WINDOW];
	bool complete;
	/* UC and UD: what the sender last said, and how often had been polled when it was heard. */
	uint64_t told, told_at;
};

struct endpoint {
	enum transport transport;
	/* In this process, and in the peer. */
	uint32_t index, far;
	uint32_t peer, lanes;
	/* Of this process's immediate data, and of the peer's. */
	uint64_t key, peer_key;
	struct lane *lane;
	struct ibv_qp *qp;
	struct ibv_ah *ah;
	struct pool *pool;
	struct poller *poller;
	uint32_t max_inline;
};

struct buffer {
	bool posted;
	uint32_t generation;
	/* Counts the receives of the pool, as they were posted. */
	uint64_t place;
	struct layout layout;
};

/* The receive buffers of a queue pair, or of the SRQ. */
struct pool {
	struct ibv_qp *qp;
	struct ibv_srq *srq;
	/* Buffers of the process, from the first on. */
	uint32_t first, count;
	/* Over all that follows; not held while anything is posted. */
	pthread_mutex_t lock;
	/* Those that are not posted. */
	uint32_t idle[MOST_RECEIVES], idles;
	uint64_t random;
	/* They complete in the order in which they were posted, and one thread posts. */
	bool in_order;
	uint64_t posted, completed;
};

/* A pair of CQs. */
struct poller {
	/* Over `notify`, and over polling where the order of completions is to be known. */
	pthread_mutex_t lock;
	struct notify notify;
	/* Receive completions of other threads may be looked at before ours. */
	bool concurrent;
	/* How often receive completions were asked for; how often until some were found last. */
	_Atomic uint64_t polls, found_at;
};

struct worker {
	pthread_t thread;
	uint32_t index;
	struct poller *poller;
	uint64_t random, idle;
	uint64_t counted[COUNTED];
};

struct region {
	unsigned char *bytes;
	size_t length;
	struct ibv_mr *mr;
};

struct matrix {
	struct options options;
	struct shared *shared;
	struct handles handles;
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_srq *srq;
	uint32_t endpoints, lanes, pollers, pools, buffers;
	struct buffer *buffer;
	/* Grows with every completion. */
	_Atomic uint64_t progress;
	/* Threads that still have something to do. */
	_Atomic uint32_t working;
	struct endpoint endpoint[MAX_LANES];
	struct lane lane[MAX_LANES];
	struct poller poller[MAX_THREADS];
	struct pool pool[MAX_LANES + 1];
	struct worker worker[MAX_THREADS];
	/* Memory, one region each with the least rights that do. */
	struct region out, in, results, slots, library, words;
};

extern struct matrix matrix;

/* matrix_setup.c */
void read_options(int count, char **arguments);
void set_up(void);
void tear_down(void);
/* All processes have called this. */
void meet(void);

/* matrix_lane.c: what operation `number` of a lane with this key is. */
enum kind kind_of(enum transport transport, uint64_t key, uint64_t number);
uint32_t length_of(enum transport transport, uint64_t key, uint64_t number);
uint64_t content_of(uint64_t key, uint64_t number);
uint32_t immediate_of(uint64_t key, uint32_t place, uint64_t number);
uint64_t library_key(uint32_t owner);
uint64_t first_ticket(uint32_t owner);
uint64_t first_count(uint32_t owner, uint32_t lane);
bool is_reliable(enum transport transport);
/* Addresses of buffers. */
size_t stride(void);
size_t slot_offset(uint32_t lane, uint64_t number);
unsigned char *ring_buffer(const struct region *region, const struct lane *lane, uint64_t number);
const char *describe(const struct lane *lane, const char *what, uint64_t number);
/* So many completions that come before one may not have been looked at yet. */
uint32_t most_missing(const struct poller *poller);

/* matrix_send.c. Each says whether it did anything. */
bool send_more(struct worker *worker, struct lane *lane);
bool take_send_completions(struct worker *worker);

/* matrix_receive.c */
bool take_receive_completions(struct worker *worker);
bool post_late_receives(struct worker *worker);
void post_receives(struct pool *pool);
/* Looks whether the other side has ended the lane, or asks for news. */
void follow(struct worker *worker, struct lane *lane);
/* Everybody is quiet: nothing may be missing in memory, and nothing too much. */
void check_memory(struct worker *worker);

#endif
