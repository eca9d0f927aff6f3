/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * What programs that check facts share; see facts.h.
 */
#define _GNU_SOURCE
#include "facts.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void expect(struct facts *facts, const char *name, long long value, long long expected)
{
	if (value == expected) {
		printf("ok %s: %lld\n", name, value);
		return;
	}
	facts->failed++;
	printf("FAIL %s: %lld, expected %lld\n", name, value, expected);
}

static const char *error_name(int error)
{
	const char *name = error ? strerrorname_np(error < 0 ? -error : error) : "works";

	return name ? name : "unknown error";
}

void expect_error(struct facts *facts, const char *name, int value, int expected)
{
	if (value == expected) {
		printf("ok %s: %s\n", name, error_name(value));
		return;
	}
	facts->failed++;
	printf("FAIL %s: %s%s, expected %s\n", name, value < 0 ? "minus " : "", error_name(value),
	       error_name(expected));
}

void same(const char *name, long long value)
{
	printf("same %s: %lld\n", name, value);
}

void same_error(const char *name, int value)
{
	printf("same %s: %s%s\n", name, value < 0 ? "minus " : "", error_name(value));
}

void optional_error(const char *name, int value)
{
	printf("optional %s: %s\n", name, error_name(value));
}

struct ibv_sge piece(const struct facts *facts, size_t offset, uint32_t length)
{
	return (struct ibv_sge){ (uintptr_t)facts->memory + offset, length, facts->mr->lkey };
}

int post_one(struct ibv_qp *qp, enum ibv_wr_opcode opcode, uint64_t id, struct ibv_sge *sge,
	     int sges, uint64_t remote, uint32_t rkey, int flags)
{
	struct ibv_send_wr wr = { .wr_id = id, .opcode = opcode, .sg_list = sge, .num_sge = sges,
				  .send_flags = flags }, *bad = NULL;

	if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || opcode == IBV_WR_ATOMIC_CMP_AND_SWP) {
		wr.wr.atomic.remote_addr = remote;
		wr.wr.atomic.rkey = rkey;
	} else {
		wr.wr.rdma.remote_addr = remote;
		wr.wr.rdma.rkey = rkey;
	}
	return ibv_post_send(qp, &wr, &bad);
}

int receive_one(struct ibv_qp *qp, uint64_t id, struct ibv_sge *sge, int sges)
{
	struct ibv_recv_wr wr = { .wr_id = id, .sg_list = sge, .num_sge = sges }, *bad = NULL;

	return ibv_post_recv(qp, &wr, &bad);
}

int next_completion_within(struct ibv_cq *cq, struct ibv_wc *wc, int milliseconds)
{
	struct timespec pause = { .tv_nsec = 1000000 };

	for (int i = 0; i < milliseconds; i++) {
		int count = ibv_poll_cq(cq, 1, wc);

		if (count < 0)
			fail("ibv_poll_cq: %d", count);
		if (count)
			return wc->status;
		nanosleep(&pause, NULL);
	}
	return -1;
}

int next_completion(struct ibv_cq *cq, struct ibv_wc *wc)
{
	return next_completion_within(cq, wc, 10000);
}

int completion_of(struct ibv_cq *cq, uint64_t id, struct ibv_wc *wc)
{
	int status;

	do
		status = next_completion(cq, wc);
	while (status >= 0 && wc->wr_id != id);
	return status;
}

int to_error(struct ibv_qp *qp)
{
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_ERR };

	return ibv_modify_qp(qp, &attributes, IBV_QP_STATE);
}

void to_init(struct ibv_qp *qp, const struct wish *wish)
{
	bool ud = wish->type == IBV_QPT_UD;
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = 7,
					  .qp_access_flags = wish->access };

	must(ibv_modify_qp(qp, &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
						    (ud ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS)),
	     "ibv_modify_qp to INIT");
}

void to_rtr(const struct facts *facts, struct ibv_qp *qp, uint32_t peer, const struct wish *wish)
{
	bool ud = wish->type == IBV_QPT_UD, rc = wish->type == IBV_QPT_RC;
	struct ibv_qp_attr attributes = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = wish->mtu ? wish->mtu : IBV_MTU_256,
		.dest_qp_num = peer,
		.rq_psn = wish->psn,
		.max_dest_rd_atomic = 1,
		.min_rnr_timer = 1,
		.ah_attr = { .is_global = 1, .port_num = 1, .dlid = facts->port.lid,
			     .grh = { .dgid = facts->gid, .sgid_index = facts->gid_index,
				      .hop_limit = 3 } },
	};

	must(ibv_modify_qp(qp, &attributes,
			   ud ? IBV_QP_STATE :
				IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
					IBV_QP_RQ_PSN |
					(rc ? IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER :
					      0)),
	     "ibv_modify_qp to RTR");
}

void to_rts(struct ibv_qp *qp, const struct wish *wish)
{
	bool rc = wish->type == IBV_QPT_RC;
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_RTS, .timeout = 12,
					  .retry_cnt = wish->retry_cnt ? wish->retry_cnt : 1,
					  .rnr_retry = wish->rnr_retry, .max_rd_atomic = 1,
					  .sq_psn = wish->psn };

	must(ibv_modify_qp(qp, &attributes,
			   IBV_QP_STATE | IBV_QP_SQ_PSN |
				   (rc ? IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
						 IBV_QP_MAX_QP_RD_ATOMIC :
					 0)),
	     "ibv_modify_qp to RTS");
}

static void bring_up(struct facts *facts, struct ibv_qp *qp, uint32_t peer, const struct wish *wish)
{
	if (wish->state == IBV_QPS_RESET)
		return;
	to_init(qp, wish);
	if (wish->state == IBV_QPS_INIT)
		return;
	to_rtr(facts, qp, peer, wish);
	to_rts(qp, wish);
}

void make_pair(struct facts *facts, struct pair *pair, struct wish wish)
{
	struct ibv_srq_init_attr srq = { .attr = { .max_wr = DEPTH, .max_sge = 2 } };
	struct ibv_qp_init_attr init = { .qp_type = wish.type,
					 .cap = { DEPTH, DEPTH, 2, 2, 32 } };

	*pair = (struct pair){ 0 };
	pair->cq = ibv_create_cq(facts->context, 16 * DEPTH, pair, NULL, 0);
	if (!pair->cq)
		fail("ibv_create_cq: %s", strerror(errno));
	pair->cq_b = wish.two_cqs ? ibv_create_cq(facts->context, 16 * DEPTH, pair, wish.channel, 0) :
				    pair->cq;
	if (!pair->cq_b)
		fail("ibv_create_cq: %s", strerror(errno));
	init.send_cq = init.recv_cq = pair->cq;
	if (wish.on_srq) {
		pair->srq = ibv_create_srq(facts->pd, &srq);
		if (!pair->srq)
			fail("ibv_create_srq: %s", strerror(errno));
		init.srq = pair->srq;
	}
	pair->a = ibv_create_qp(facts->pd, &init);
	pair->cap = init.cap;
	init.send_cq = init.recv_cq = pair->cq_b;
	pair->b = ibv_create_qp(facts->pd, &init);
	if (!pair->a || !pair->b)
		fail("ibv_create_qp: %s", strerror(errno));
	bring_up(facts, pair->b, pair->a->qp_num, &wish);
	bring_up(facts, pair->a, wish.dead_end ? 0xfffff0 : pair->b->qp_num, &wish);
}

void drop_pair(struct pair *pair)
{
	must(ibv_destroy_qp(pair->a), "ibv_destroy_qp");
	if (pair->b)
		must(ibv_destroy_qp(pair->b), "ibv_destroy_qp");
	if (pair->srq)
		must(ibv_destroy_srq(pair->srq), "ibv_destroy_srq");
	if (pair->cq_b != pair->cq)
		must(ibv_destroy_cq(pair->cq_b), "ibv_destroy_cq");
	must(ibv_destroy_cq(pair->cq), "ibv_destroy_cq");
}

void open_facts(struct facts *facts, const char *device)
{
	facts->context = open_device(device);
	/* Whoever watches the process looks at it now. */
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("ready\n");
	facts->pd = ibv_alloc_pd(facts->context);
	facts->memory = allocate(BUFFER);
	if (!facts->pd || ibv_query_port(facts->context, 1, &facts->port) ||
	    ibv_query_gid(facts->context, 1, facts->gid_index, &facts->gid))
		fail("no PD, port or GID: %s", strerror(errno));
	facts->mr = ibv_reg_mr(facts->pd, facts->memory, BUFFER,
			       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |
				       IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC);
	if (!facts->mr)
		fail("ibv_reg_mr: %s", strerror(errno));
}

int close_facts(struct facts *facts)
{
	expect_error(facts, "deregister memory", ibv_dereg_mr(facts->mr), 0);
	expect_error(facts, "free the protection domain", ibv_dealloc_pd(facts->pd), 0);
	expect_error(facts, "close the device", ibv_close_device(facts->context), 0);
	printf("%d failed\n", facts->failed);
	return facts->failed != 0;
}
