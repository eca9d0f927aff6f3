/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Programs that check what verbs answer, one line for each fact. verbs_facts has the classic verbs one by one; corners
 * (corners.h) what they answer when the hardware was replaced meanwhile.
 *
 *   ok NAME: VALUE                 as every device must answer
 *   FAIL NAME: VALUE, expected ...
 *   same NAME: VALUE               differs from device to device; below a provider it must be what
 *                                  the bare device answers
 *   optional NAME: VALUE           like "same", but EOPNOTSUPP is also an answer
 *
 * No value depends on numbers that change from run to run, so two runs can be compared line by line.
 */
#ifndef REVERBS_TESTS_FACTS_H
#define REVERBS_TESTS_FACTS_H

#include "common.h"

#define DEPTH 10
#define BUFFER 1048576

#define ALL_REMOTE                                                                                 \
	(IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)

struct facts {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_port_attr port;
	union ibv_gid gid;
	uint32_t gid_index;
	unsigned char *memory;
	struct ibv_mr *mr;
	int failed;
};

/* Two queue pairs of this process, joined to each other unless said otherwise. */
struct pair {
	struct ibv_cq *cq;
	/* Of b, if it has one of its own. */
	struct ibv_cq *cq_b;
	struct ibv_srq *srq;
	struct ibv_qp *a, *b;
	struct ibv_qp_cap cap;
};

/* How a pair is made. */
struct wish {
	enum ibv_qp_type type;
	int access;
	/* The state in which queue pairs are left: RESET, INIT or RTS. */
	enum ibv_qp_state state;
	uint8_t rnr_retry;
	bool on_srq;
	/* A queue pair that does not exist instead of each other. */
	bool dead_end;
	bool two_cqs;
	/* For the queue of b, if it has one of its own. */
	struct ibv_comp_channel *channel;
	/* 0 is one retry; Soft-RoCE takes 7 for "without end". */
	uint8_t retry_cnt;
	/* 0 is 256 bytes. */
	enum ibv_mtu mtu;
	/* The first packet number in both directions. */
	uint32_t psn;
};

/* Opens the device, says "ready", and registers memory. gid_index must be set. */
void open_facts(struct facts *facts, const char *device);
/* The end of the program: closes the device, says how many facts are wrong, gives the exit status. */
int close_facts(struct facts *facts);


/* The steps of bringing up a queue pair. */
void to_init(struct ibv_qp *qp, const struct wish *wish);
void to_rtr(const struct facts *facts, struct ibv_qp *qp, uint32_t peer, const struct wish *wish);
void to_rts(struct ibv_qp *qp, const struct wish *wish);

void make_pair(struct facts *facts, struct pair *pair, struct wish wish);
void drop_pair(struct pair *pair);

/* Prints a fact with the value that every device must give. Values are compared as numbers and
 * printed as errno names by expect_error. */
void expect(struct facts *facts, const char *name, long long value, long long expected);
void expect_error(struct facts *facts, const char *name, int value, int expected);
void same(const char *name, long long value);
void same_error(const char *name, int value);
void optional_error(const char *name, int value);

/* errno of a call that returned a pointer, 0 if it worked. */
#define ERROR_OF(pointer) ((errno = 0, (pointer)) ? 0 : errno)

/* Posts one request and gives what ibv_post_send gives. */
int post_one(struct ibv_qp *qp, enum ibv_wr_opcode opcode, uint64_t id, struct ibv_sge *sge,
	     int sges, uint64_t remote, uint32_t rkey, int flags);
int receive_one(struct ibv_qp *qp, uint64_t id, struct ibv_sge *sge, int sges);

/* Waits for a completion: its status, or -1 when none comes in about ten seconds of polling. */
int next_completion(struct ibv_cq *cq, struct ibv_wc *wc);
int next_completion_within(struct ibv_cq *cq, struct ibv_wc *wc, int milliseconds);
/* Waits for the completion with this id; others are dropped. */
int completion_of(struct ibv_cq *cq, uint64_t id, struct ibv_wc *wc);
int to_error(struct ibv_qp *qp);
struct ibv_sge piece(const struct facts *facts, size_t offset, uint32_t length);

/* Of verbs_facts: facts_objects.c */
void queries(struct facts *facts);
void creation(struct facts *facts);
void destruction(struct facts *facts);
void states(struct facts *facts);
void memory(struct facts *facts);
void optional_verbs(struct facts *facts);

/* facts_traffic.c */
void chains(struct facts *facts);
void overflow(struct facts *facts);
void empty_messages(struct facts *facts);
void refused_posts(struct facts *facts);
void errors(struct facts *facts);
void events(struct facts *facts);
void shared_receive_queue(struct facts *facts);

#endif
