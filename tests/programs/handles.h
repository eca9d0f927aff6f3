/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Remembers every handle and every answer that the program has seen, and checks that all of them
 * stay as they were first seen.
 */
#ifndef REVERBS_TESTS_HANDLES_H
#define REVERBS_TESTS_HANDLES_H

#include "common.h"

/* Most objects of one kind that can be watched. */
#define WATCHED 64

struct watched_qp {
	struct ibv_qp *object;
	struct ibv_qp seen;
	struct ibv_qp_attr attributes;
	struct ibv_qp_init_attr init;
};

struct handles {
	struct ibv_context *context;
	struct ibv_context context_seen;
	uint32_t gid_index;
	char name[64];
	__be64 guid;
	struct ibv_device_attr device;
	struct ibv_port_attr port;
	union ibv_gid gid;
	struct ibv_gid_entry entry;
	ssize_t gid_count;
	__be16 pkey;
	struct watched_qp qp[WATCHED];
	struct { struct ibv_mr *object, seen; } mr[WATCHED];
	struct { struct ibv_cq *object, seen; } cq[WATCHED];
	struct { struct ibv_srq *object, seen; struct ibv_srq_attr attributes; } srq[WATCHED];
	struct { struct ibv_ah *object, seen; } ah[WATCHED];
	struct { struct ibv_comp_channel *object, seen; } channel[WATCHED];
	struct { struct ibv_pd *object, seen; } pd[WATCHED];
	unsigned int qps, mrs, cqs, srqs, ahs, channels, pds;
	/* How many times everything was compared. */
	uint64_t checks;
};

/* Notes the device, port 1 and the GID. Also makes the async event fd non-blocking. */
void watch_device(struct handles *handles, struct ibv_context *context, uint32_t gid_index);

/* Note one object; a queue pair when it is in the state in which it stays. */
void watch_qp(struct handles *handles, struct ibv_qp *qp);
void watch_mr(struct handles *handles, struct ibv_mr *mr);
void watch_cq(struct handles *handles, struct ibv_cq *cq);
void watch_srq(struct handles *handles, struct ibv_srq *srq);
void watch_ah(struct handles *handles, struct ibv_ah *ah);
void watch_channel(struct handles *handles, struct ibv_comp_channel *channel);
void watch_pd(struct handles *handles, struct ibv_pd *pd);

/* Compares all of it, asks every query again, and looks for asynchronous events, of which there
 * must be none. Fails with the details. */
void check_handles(struct handles *handles);

#endif
