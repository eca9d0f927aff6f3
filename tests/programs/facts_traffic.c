/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "facts.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

static const struct wish connected = { .type = IBV_QPT_RC, .access = ALL_REMOTE,
				       .state = IBV_QPS_RTS, .rnr_retry = 7 };

/* A chain of `count` WRITEs of 8 bytes; number `odd` has more elements than the queue allows. */
static int post_chain(struct facts *facts, struct pair *pair, int count, int odd, int *bad_number)
{
	struct ibv_send_wr wr[4 * DEPTH], *bad = NULL;
	struct ibv_sge sge[64];
	int result;

	for (int i = 0; i < 64; i++)
		sge[i] = piece(facts, 0, 8);
	for (int i = 0; i < count; i++) {
		wr[i] = (struct ibv_send_wr){ .wr_id = 100 + i, .sg_list = sge,
					      .num_sge = i == odd ? 64 : 1,
					      .opcode = IBV_WR_RDMA_WRITE,
					      .send_flags = IBV_SEND_SIGNALED,
					      .next = i + 1 < count ? &wr[i + 1] : NULL };
		wr[i].wr.rdma.remote_addr = (uintptr_t)facts->memory + 8192;
		wr[i].wr.rdma.rkey = facts->mr->rkey;
	}
	result = ibv_post_send(pair->a, wr, &bad);
	*bad_number = bad ? bad - wr : -1;
	return result;
}

void chains(struct facts *facts)
{
	struct ibv_recv_wr receives[3], *bad_receive = NULL;
	struct ibv_sge sge[64];
	struct ibv_wc wc;
	struct pair pair;
	int bad, result, completed = 0;

	make_pair(facts, &pair, connected);
	result = post_chain(facts, &pair, 5, 2, &bad);
	expect_error(facts, "chain with too many elements in the middle", result, EINVAL);
	expect(facts, "bad_wr of the chain", bad, 2);
	while (completed < 2 && next_completion(pair.cq, &wc) == IBV_WC_SUCCESS &&
	       wc.wr_id == 100u + completed)
		completed++;
	expect(facts, "requests before bad_wr that complete", completed, 2);
	expect_error(facts, "chain without fault", post_chain(facts, &pair, 3, -1, &bad), 0);
	for (completed = 0; completed < 3 && next_completion(pair.cq, &wc) == IBV_WC_SUCCESS &&
			    wc.wr_id == 100u + completed;)
		completed++;
	expect(facts, "requests of it that complete", completed, 3);
	expect(facts, "nothing else completes", ibv_poll_cq(pair.cq, 1, &wc), 0);

	for (int i = 0; i < 64; i++)
		sge[i] = piece(facts, 0, 8);
	for (int i = 0; i < 3; i++)
		receives[i] = (struct ibv_recv_wr){ .wr_id = i, .sg_list = sge,
						    .num_sge = i == 1 ? 64 : 1,
						    .next = i < 2 ? &receives[i + 1] : NULL };
	result = ibv_post_recv(pair.b, receives, &bad_receive);
	expect_error(facts, "chain of receives with too many elements in the middle", result,
		     EINVAL);
	expect(facts, "bad_wr of the receives", bad_receive - receives, 1);
	drop_pair(&pair);
}

/* A SEND that finds no receive keeps the send queue full. */
void overflow(struct facts *facts)
{
	struct ibv_sge sge = piece(facts, 0, 8);
	int accepted = 0, flushed = 0, in_order = 1, result, bad;
	struct ibv_wc wc;
	struct pair pair;

	make_pair(facts, &pair, connected);
	while (!(result = post_one(pair.a, IBV_WR_SEND, accepted, &sge, 1, 0, 0,
				   IBV_SEND_SIGNALED)) && accepted < 16 * DEPTH)
		accepted++;
	expect_error(facts, "post to a full send queue", result, ENOMEM);
	same("sends accepted", accepted);
	expect(facts, "sends accepted are at least max_send_wr",
	       accepted >= (int)pair.cap.max_send_wr, 1);
	expect_error(facts, "chain to a full send queue", post_chain(facts, &pair, 2, -1, &bad),
		     ENOMEM);
	expect(facts, "bad_wr of the chain to a full send queue", bad, 0);
	to_error(pair.a);
	while (flushed < accepted && next_completion(pair.cq, &wc) == IBV_WC_WR_FLUSH_ERR) {
		in_order &= wc.wr_id == (uint64_t)flushed;
		flushed++;
	}
	expect(facts, "each accepted send is flushed", flushed == accepted, 1);
	expect(facts, "sends are flushed in order", in_order, 1);
	expect(facts, "nothing is flushed twice", ibv_poll_cq(pair.cq, 1, &wc), 0);
	drop_pair(&pair);

	make_pair(facts, &pair, connected);
	result = post_chain(facts, &pair, 3 * DEPTH, -1, &bad);
	same_error("chain longer than the queue", result);
	same("bad_wr of the chain longer than the queue", bad);
	drop_pair(&pair);

	make_pair(facts, &pair, connected);
	for (accepted = 0; accepted < 16 * DEPTH; accepted++)
		if ((result = receive_one(pair.b, accepted, &sge, 1)))
			break;
	expect_error(facts, "post to a full receive queue", result, ENOMEM);
	same("receives accepted", accepted);
	to_error(pair.b);
	for (flushed = 0, in_order = 1;
	     flushed < accepted && next_completion(pair.cq, &wc) == IBV_WC_WR_FLUSH_ERR; flushed++)
		in_order &= wc.wr_id == (uint64_t)flushed;
	expect(facts, "each accepted receive is flushed", flushed == accepted, 1);
	expect(facts, "receives are flushed in order", in_order, 1);
	drop_pair(&pair);
}

void empty_messages(struct facts *facts)
{
	struct ibv_sge sge = piece(facts, 0, 64);
	struct ibv_wc wc;
	struct pair pair;

	make_pair(facts, &pair, connected);
	receive_one(pair.b, 1, &sge, 1);
	receive_one(pair.b, 2, NULL, 0);
	expect_error(facts, "post a SEND of nothing",
		     post_one(pair.a, IBV_WR_SEND, 3, NULL, 0, 0, 0, 0), 0);
	expect_error(facts, "post another",
		     post_one(pair.a, IBV_WR_SEND, 4, NULL, 0, 0, 0, IBV_SEND_SIGNALED), 0);
	expect(facts, "receive of nothing", completion_of(pair.cq, 1, &wc), IBV_WC_SUCCESS);
	expect(facts, "its byte_len", wc.byte_len, 0);
	expect(facts, "receive of nothing into nothing", completion_of(pair.cq, 2, &wc),
	       IBV_WC_SUCCESS);
	post_one(pair.a, IBV_WR_RDMA_WRITE, 5, NULL, 0, 0, 0, IBV_SEND_SIGNALED);
	expect(facts, "WRITE of nothing, key 0", completion_of(pair.cq, 5, &wc), IBV_WC_SUCCESS);
	post_one(pair.a, IBV_WR_RDMA_READ, 6, NULL, 0, 0, 0, IBV_SEND_SIGNALED);
	expect(facts, "READ of nothing, key 0", completion_of(pair.cq, 6, &wc), IBV_WC_SUCCESS);
	/* The first SEND was not signaled. */
	expect(facts, "nothing else completes after messages of nothing",
	       ibv_poll_cq(pair.cq, 1, &wc), 0);
	drop_pair(&pair);
}

void refused_posts(struct facts *facts)
{
	struct ibv_sge sge = piece(facts, 0, 8), large = piece(facts, 0, 32768);
	struct pair pair;

	make_pair(facts, &pair, (struct wish){ .type = IBV_QPT_RC });
	same_error("receive in RESET", receive_one(pair.a, 1, &sge, 1));
	same_error("send in RESET", post_one(pair.a, IBV_WR_SEND, 1, &sge, 1, 0, 0, 0));
	drop_pair(&pair);
	make_pair(facts, &pair, (struct wish){ .type = IBV_QPT_RC, .state = IBV_QPS_INIT });
	expect_error(facts, "receive in INIT", receive_one(pair.a, 1, &sge, 1), 0);
	same_error("send in INIT", post_one(pair.a, IBV_WR_SEND, 1, &sge, 1, 0, 0, 0));
	drop_pair(&pair);
	make_pair(facts, &pair, connected);
	expect_error(facts, "inline data that is too long",
		     post_one(pair.a, IBV_WR_SEND, 1, &large, 1, 0, 0, IBV_SEND_INLINE), EINVAL);
	drop_pair(&pair);
}

/* The status differs from device to device. */
#define ANY_STATUS (-1)

/* One request that goes wrong: its status, and what is behind it is flushed. */
static void one_error(struct facts *facts, const char *name, struct wish wish,
		      enum ibv_wr_opcode opcode, struct ibv_sge sge, uint64_t remote, uint32_t rkey,
		      int expected)
{
	struct ibv_qp_attr attributes;
	struct ibv_qp_init_attr init;
	struct ibv_wc wc;
	struct pair pair;
	char line[120];

	make_pair(facts, &pair, wish);
	post_one(pair.a, opcode, 1, &sge, 1, remote, rkey, IBV_SEND_SIGNALED);
	if (expected == ANY_STATUS)
		same(name, completion_of(pair.cq, 1, &wc));
	else
		expect(facts, name, completion_of(pair.cq, 1, &wc), expected);
	post_one(pair.a, IBV_WR_SEND, 2, NULL, 0, 0, 0, IBV_SEND_SIGNALED);
	snprintf(line, sizeof(line), "%s, then", name);
	expect(facts, line, completion_of(pair.cq, 2, &wc), IBV_WC_WR_FLUSH_ERR);
	snprintf(line, sizeof(line), "%s, state", name);
	ibv_query_qp(pair.a, &attributes, IBV_QP_STATE, &init);
	expect(facts, line, attributes.qp_state, IBV_QPS_ERR);
	drop_pair(&pair);
}

void errors(struct facts *facts)
{
	uint64_t there = (uintptr_t)facts->memory + 8192;
	struct ibv_sge good = piece(facts, 0, 64), bad = good;
	struct wish no_access = connected, impatient = connected, dead_end = connected;
	struct ibv_mr *closed = ibv_reg_mr(facts->pd, facts->memory, 4096, IBV_ACCESS_LOCAL_WRITE);
	struct ibv_sge small = piece(facts, 0, 8);
	struct ibv_wc wc;
	struct pair pair;

	no_access.access = 0;
	impatient.rnr_retry = 0;
	dead_end.dead_end = true;
	bad.lkey = 0xdead00;
	one_error(facts, "SEND with a wrong lkey", connected, IBV_WR_SEND, bad, 0, 0,
		  ANY_STATUS);
	one_error(facts, "WRITE with a wrong rkey", connected, IBV_WR_RDMA_WRITE, good, there,
		  0xdead00, IBV_WC_REM_ACCESS_ERR);
	one_error(facts, "WRITE past the end", connected, IBV_WR_RDMA_WRITE, good,
		  (uintptr_t)facts->memory + BUFFER - 32, facts->mr->rkey, IBV_WC_REM_ACCESS_ERR);
	one_error(facts, "READ past the end", connected, IBV_WR_RDMA_READ, good,
		  (uintptr_t)facts->memory + BUFFER - 32, facts->mr->rkey, IBV_WC_REM_ACCESS_ERR);
	one_error(facts, "WRITE to memory that allows none", connected, IBV_WR_RDMA_WRITE, good,
		  (uintptr_t)facts->memory, closed->lkey, IBV_WC_REM_ACCESS_ERR);
	one_error(facts, "WRITE to a QP that allows none", no_access, IBV_WR_RDMA_WRITE, good,
		  there, facts->mr->rkey, IBV_WC_REM_INV_REQ_ERR);
	one_error(facts, "SEND without a receive, no RNR retries", impatient, IBV_WR_SEND, good, 0,
		  0, IBV_WC_RNR_RETRY_EXC_ERR);
	one_error(facts, "SEND to a QP that does not exist", dead_end, IBV_WR_SEND, good, 0, 0,
		  IBV_WC_RETRY_EXC_ERR);
	ibv_dereg_mr(closed);

	make_pair(facts, &pair, connected);
	receive_one(pair.b, 1, &small, 1);
	post_one(pair.a, IBV_WR_SEND, 2, &good, 1, 0, 0, IBV_SEND_SIGNALED);
	same("receive that is too short", completion_of(pair.cq, 1, &wc));
	drop_pair(&pair);
	make_pair(facts, &pair, connected);
	receive_one(pair.b, 1, &small, 1);
	post_one(pair.a, IBV_WR_SEND, 2, &good, 1, 0, 0, IBV_SEND_SIGNALED);
	same("SEND to a receive that is too short", completion_of(pair.cq, 2, &wc));
	drop_pair(&pair);
}

static int event_comes(struct ibv_comp_channel *channel, int milliseconds)
{
	struct pollfd entry = { .fd = channel->fd, .events = POLLIN };

	return poll(&entry, 1, milliseconds);
}

void events(struct facts *facts)
{
	struct ibv_comp_channel *channel = ibv_create_comp_channel(facts->context);
	struct ibv_cq *cq = ibv_create_cq(facts->context, DEPTH, facts, channel, 0), *got = NULL;
	struct ibv_sge sge = piece(facts, 0, 8);
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
					 .cap = { DEPTH, DEPTH, 1, 1, 0 } };
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_INIT, .port_num = 1 };
	struct ibv_qp *qp = ibv_create_qp(facts->pd, &init);
	struct ibv_wc wc;
	void *context = NULL;

	fcntl(channel->fd, F_SETFL, O_NONBLOCK);
	expect(facts, "get an event where there is none", ibv_get_cq_event(channel, &got, &context),
	       -1);
	expect_error(facts, "errno of that", errno, EAGAIN);
	expect_error(facts, "arm a CQ", ibv_req_notify_cq(cq, 0), 0);
	expect(facts, "nothing came, no event", event_comes(channel, 50), 0);
	ibv_modify_qp(qp, &attributes,
		      IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
	receive_one(qp, 1, &sge, 1);
	receive_one(qp, 2, &sge, 1);
	to_error(qp);
	expect(facts, "a completion came, an event", event_comes(channel, 5000), 1);
	expect(facts, "get the event", ibv_get_cq_event(channel, &got, &context), 0);
	expect(facts, "CQ and context of the event", got == cq && context == facts, 1);
	expect(facts, "one event for one arming", event_comes(channel, 50), 0);
	ibv_ack_cq_events(cq, 1);
	expect(facts, "first of two completions", next_completion(cq, &wc), IBV_WC_WR_FLUSH_ERR);
	expect(facts, "its id", wc.wr_id, 1);
	expect(facts, "second", next_completion(cq, &wc), IBV_WC_WR_FLUSH_ERR);
	expect(facts, "its id", wc.wr_id, 2);
	expect_error(facts, "destroy a QP whose receives are flushed", ibv_destroy_qp(qp), 0);
	expect_error(facts, "destroy a CQ whose events are acknowledged", ibv_destroy_cq(cq), 0);
	expect_error(facts, "destroy the channel of it", ibv_destroy_comp_channel(channel), 0);
}

void shared_receive_queue(struct facts *facts)
{
	struct wish wish = connected;
	struct ibv_srq_attr attributes = { .srq_limit = 2 };
	struct ibv_sge sge = piece(facts, 0, 64);
	struct ibv_recv_wr wr = { .sg_list = &sge, .num_sge = 1 }, *bad;
	struct pollfd entry = { .fd = facts->context->async_fd, .events = POLLIN };
	struct ibv_async_event event = { 0 };
	struct pair pair;
	struct ibv_wc wc;
	int accepted = 0, result;

	wish.on_srq = true;
	make_pair(facts, &pair, wish);
	for (; accepted < 16 * DEPTH; accepted++) {
		wr.wr_id = accepted;
		result = ibv_post_srq_recv(pair.srq, &wr, &bad);
		if (result)
			break;
	}
	expect_error(facts, "post to a full SRQ", result, ENOMEM);
	expect(facts, "bad_wr of that", bad == &wr, 1);
	same("receives accepted by an SRQ", accepted);
	same_error("receive to the QP of an SRQ", receive_one(pair.a, 1, &sge, 1));
	attributes.srq_limit = accepted - 1;
	expect_error(facts, "set the limit of an SRQ",
		     ibv_modify_srq(pair.srq, &attributes, IBV_SRQ_LIMIT), 0);
	expect_error(facts, "query an SRQ", ibv_query_srq(pair.srq, &attributes), 0);
	same("max_wr of the SRQ", attributes.max_wr);
	expect(facts, "limit of the SRQ is the one given", (int)attributes.srq_limit == accepted - 1,
	       1);
	for (int i = 0; i < 3; i++) {
		post_one(pair.a, IBV_WR_SEND, 1000, &sge, 1, 0, 0, IBV_SEND_SIGNALED);
		expect(facts, "SEND to an SRQ", completion_of(pair.cq, 1000, &wc), IBV_WC_SUCCESS);
	}
	expect(facts, "asynchronous event at the limit", poll(&entry, 1, 5000), 1);
	if (entry.revents && !ibv_get_async_event(facts->context, &event)) {
		expect(facts, "kind of the event", event.event_type, IBV_EVENT_SRQ_LIMIT_REACHED);
		expect(facts, "its SRQ", event.element.srq == pair.srq, 1);
		ibv_ack_async_event(&event);
	}
	drop_pair(&pair);
}
