/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Queue pairs in every state. Each situation is there during the same cycles as all others.
 */
#include "corners.h"

#include <poll.h>
#include <stdio.h>

static const struct wish connected = { .type = IBV_QPT_RC, .access = ALL_REMOTE,
				       .state = IBV_QPS_RTS, .rnr_retry = 7, .retry_cnt = 7,
				       .mtu = IBV_MTU_1024, .psn = 0x123456, .two_cqs = true };

static void make(struct corner *corner, enum ibv_qp_state state)
{
	corner->wish.state = state;
	make_pair(corner->facts, &corner->pair, corner->wish);
}

static void expect_state(struct corner *corner, const char *what, struct ibv_qp *qp,
			 enum ibv_qp_state state)
{
	expect(corner->facts, of(corner, what), state_of(qp), state);
}

static void in_reset(struct corner *corner)
{
	make(corner, IBV_QPS_RESET);
}

static void after_reset(struct corner *corner)
{
	expect_state(corner, "state", corner->pair.a, IBV_QPS_RESET);
	to_init(corner->pair.a, &corner->wish);
	to_init(corner->pair.b, &corner->wish);
	connect_both(corner);
	exchange(corner);
}

static void in_init(struct corner *corner)
{
	make(corner, IBV_QPS_INIT);
	for (int id = 1; id <= 3; id++)
		receive_message(corner, corner->pair.b, id);
}

static void after_init(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_state(corner, "state", pair->a, IBV_QPS_INIT);
	expect_state(corner, "state with receives", pair->b, IBV_QPS_INIT);
	receive_message(corner, pair->b, 4);
	connect_both(corner);
	for (int id = 1; id <= 4; id++)
		send_message(corner, pair->a, id);
	for (int id = 1; id <= 4; id++) {
		expect_message(corner, pair->cq_b, id);
		expect_next(corner, "send", pair->cq, id, IBV_WC_SUCCESS);
	}
	exchange(corner);
}

/* A sends, its peer is not there yet. */
static void before_its_peer(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	make(corner, IBV_QPS_INIT);
	to_rtr(corner->facts, pair->a, pair->b->qp_num, &corner->wish);
	to_rts(pair->a, &corner->wish);
	receive_message(corner, pair->b, 1);
	send_message(corner, pair->a, 1);
	send_message(corner, pair->a, 2);
}

static void after_its_peer(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_state(corner, "state", pair->a, IBV_QPS_RTS);
	expect_state(corner, "state of the peer", pair->b, IBV_QPS_INIT);
	expect_nothing(corner, "completions while the peer is in INIT", pair->cq);
	to_rtr(corner->facts, pair->b, pair->a->qp_num, &corner->wish);
	expect_message(corner, pair->cq_b, 1);
	receive_message(corner, pair->b, 2);
	expect_message(corner, pair->cq_b, 2);
	expect_next(corner, "first send", pair->cq, 1, IBV_WC_SUCCESS);
	expect_next(corner, "second send", pair->cq, 2, IBV_WC_SUCCESS);
	to_rts(pair->b, &corner->wish);
	exchange(corner);
}

/* A peer that receives and cannot send yet. */
static void in_rtr(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	make(corner, IBV_QPS_INIT);
	to_rtr(corner->facts, pair->b, pair->a->qp_num, &corner->wish);
	to_rtr(corner->facts, pair->a, pair->b->qp_num, &corner->wish);
	to_rts(pair->a, &corner->wish);
	for (int id = 1; id <= 3; id++)
		receive_message(corner, pair->b, id);
	send_message(corner, pair->a, 1);
	expect_message(corner, pair->cq_b, 1);
	expect_next(corner, "send before", pair->cq, 1, IBV_WC_SUCCESS);
	/* Nobody looks at this one before the cycle. */
	send_message(corner, pair->a, 2);
}

static void after_rtr(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_state(corner, "state", pair->b, IBV_QPS_RTR);
	send_message(corner, pair->a, 3);
	for (int id = 2; id <= 3; id++) {
		expect_message(corner, pair->cq_b, id);
		expect_next(corner, "send", pair->cq, id, IBV_WC_SUCCESS);
	}
	to_rts(pair->b, &corner->wish);
	exchange(corner);
}

static void in_sqd(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	make(corner, IBV_QPS_RTS);
	exchange(corner);
	must(change_state(pair->a, IBV_QPS_SQD), "ibv_modify_qp to SQD");
	for (int id = 1; id <= 3; id++) {
		receive_message(corner, pair->b, id);
		send_message(corner, pair->a, id);
	}
	expect_nothing(corner, "completions in SQD", pair->cq);
}

static void after_sqd(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_state(corner, "state", pair->a, IBV_QPS_SQD);
	expect_nothing(corner, "completions in SQD after it", pair->cq);
	expect_nothing(corner, "messages in SQD after it", pair->cq_b);
	expect_error(corner->facts, of(corner, "back to RTS"), change_state(pair->a, IBV_QPS_RTS), 0);
	/* Soft-RoCE looks at its queue only when the next request is posted. */
	receive_message(corner, pair->b, 4);
	send_message(corner, pair->a, 4);
	for (int id = 1; id <= 4; id++) {
		expect_message(corner, pair->cq_b, id);
		expect_next(corner, "send", pair->cq, id, IBV_WC_SUCCESS);
	}
	exchange(corner);
}

/* A request fails; nobody polls before the cycle. */
static void in_error_of_its_own(struct corner *corner)
{
	struct pair *pair = &corner->pair;
	struct ibv_sge sge = piece(corner->facts, corner->area, 64);

	make(corner, IBV_QPS_RTS);
	receive_message(corner, pair->b, 11);
	receive_message(corner, pair->a, 12);
	must(post_one(pair->a, IBV_WR_RDMA_WRITE, 1, &sge, 1, (uintptr_t)corner->facts->memory,
		      0xdead00, IBV_SEND_SIGNALED),
	     "ibv_post_send");
	send_message(corner, pair->a, 2);
	send_message(corner, pair->a, 3);
	for (int i = 0; i < 1000 && state_of(pair->a) != IBV_QPS_ERR; i++)
		poll(NULL, 0, 5);
	expect_state(corner, "state before", pair->a, IBV_QPS_ERR);
	/* What is flushed is there a moment later. */
	poll(NULL, 0, 50);
}

/* The flushed requests of one direction come in order; those of two in any. */
static void expect_flushed(struct corner *corner, const char *what, struct ibv_cq *cq,
			   const uint64_t *sends, const uint64_t *receives)
{
	struct ibv_wc wc = { 0 };
	int wrong = 0;

	while (!wrong && (*sends || *receives)) {
		wrong = next_completion(cq, &wc) != IBV_WC_WR_FLUSH_ERR;
		if (*sends && wc.wr_id == *sends)
			sends++;
		else if (*receives && wc.wr_id == *receives)
			receives++;
		else
			wrong = 1;
	}
	if (wrong)
		printf("# wr_id %llu, status %d\n", (unsigned long long)wc.wr_id, wc.status);
	expect(corner->facts, of(corner, what), !wrong, 1);
}

static void after_error_of_its_own(struct corner *corner)
{
	static const uint64_t sends[] = { 2, 3, 0 }, receives[] = { 12, 0 }, none[] = { 0 };
	struct pair *pair = &corner->pair;
	struct ibv_wc wc;
	int left = 0;

	expect_state(corner, "state", pair->a, IBV_QPS_ERR);
	expect_next(corner, "the one that failed", pair->cq, 1, IBV_WC_REM_ACCESS_ERR);
	expect_flushed(corner, "what was behind it is flushed", pair->cq, sends, receives);
	expect_nothing(corner, "anything else", pair->cq);
	send_message(corner, pair->a, 4);
	expect_flushed(corner, "what is posted then is flushed", pair->cq, (uint64_t[]){ 4, 0 }, none);
	/* Devices differ in whether they put the responder in error, too. */
	same(of(corner, "state of the peer"), state_of(pair->b));
	while (next_completion_within(pair->cq_b, &wc, 100) >= 0)
		left += wc.status == IBV_WC_WR_FLUSH_ERR ? 1 : 100;
	same(of(corner, "flushed receives of the peer"), left);
}

static void in_error_by_request(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	make(corner, IBV_QPS_RTS);
	/* Their peer has no receive, so they are there until they are flushed. */
	send_message(corner, pair->a, 1);
	send_message(corner, pair->a, 2);
	receive_message(corner, pair->a, 11);
	receive_message(corner, pair->a, 12);
	must(to_error(pair->a), "ibv_modify_qp to ERR");
	poll(NULL, 0, 50);
}

static void after_error_by_request(struct corner *corner)
{
	static const uint64_t sends[] = { 1, 2, 0 }, receives[] = { 11, 12, 0 }, none[] = { 0 };
	struct pair *pair = &corner->pair;
	/* What an unreliable queue pair sends leaves at once. */
	const bool reliable = corner->wish.type == IBV_QPT_RC;

	if (!reliable) {
		expect_next(corner, "first send", pair->cq, 1, IBV_WC_SUCCESS);
		expect_next(corner, "second send", pair->cq, 2, IBV_WC_SUCCESS);
	}
	expect_flushed(corner, "flushed in order", pair->cq, reliable ? sends : sends + 2, receives);
	expect_nothing(corner, "anything else", pair->cq);
	expect_state(corner, "state", pair->a, IBV_QPS_ERR);
	expect_state(corner, "state of the peer", pair->b, IBV_QPS_RTS);
	/* (Soft-RoCE does not notice a receive that is posted in ERR.) */
	send_message(corner, pair->a, 3);
	expect_flushed(corner, "what is posted then is flushed", pair->cq, (uint64_t[]){ 3, 0 }, none);
	/* Both can be used again. */
	expect_error(corner->facts, of(corner, "to RESET"), change_state(pair->a, IBV_QPS_RESET), 0);
	expect_error(corner->facts, of(corner, "peer to RESET"),
		     change_state(pair->b, IBV_QPS_RESET), 0);
	to_init(pair->a, &corner->wish);
	to_init(pair->b, &corner->wish);
	connect_both(corner);
	exchange(corner);
}

static void in_error_before_it_was_connected(struct corner *corner)
{
	make(corner, IBV_QPS_INIT);
	receive_message(corner, corner->pair.a, 1);
	must(to_error(corner->pair.a), "ibv_modify_qp to ERR");
	must(to_error(corner->pair.b), "ibv_modify_qp to ERR");
}

static void after_error_before_it_was_connected(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_state(corner, "state", pair->a, IBV_QPS_ERR);
	expect_next(corner, "flushed receive", pair->cq, 1, IBV_WC_WR_FLUSH_ERR);
	expect_nothing(corner, "anything else", pair->cq);
	must(change_state(pair->a, IBV_QPS_RESET), "ibv_modify_qp to RESET");
	must(change_state(pair->b, IBV_QPS_RESET), "ibv_modify_qp to RESET");
	to_init(pair->a, &corner->wish);
	to_init(pair->b, &corner->wish);
	connect_both(corner);
	exchange(corner);
}

static void without_its_peer(struct corner *corner)
{
	corner->wish.retry_cnt = 1;
	make(corner, IBV_QPS_RTS);
	exchange(corner);
	must(ibv_destroy_qp(corner->pair.b), "ibv_destroy_qp");
	corner->pair.b = NULL;
}

static void after_without_its_peer(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_state(corner, "state", pair->a, IBV_QPS_RTS);
	send_message(corner, pair->a, 1);
	expect_next(corner, "send to nobody", pair->cq, 1, IBV_WC_RETRY_EXC_ERR);
	send_message(corner, pair->a, 2);
	expect_next(corner, "the next", pair->cq, 2, IBV_WC_WR_FLUSH_ERR);
	expect_state(corner, "state then", pair->a, IBV_QPS_ERR);
	expect_nothing(corner, "anything else", pair->cq);
}

/* Its peer goes while a request is on the way to it. */
static void losing_its_peer(struct corner *corner)
{
	corner->wish.retry_cnt = 6;
	make(corner, IBV_QPS_RTS);
	/* There is no receive for it. */
	send_message(corner, corner->pair.a, 1);
	poll(NULL, 0, 20);
	must(ibv_destroy_qp(corner->pair.b), "ibv_destroy_qp");
	corner->pair.b = NULL;
}

static void after_losing_its_peer(struct corner *corner)
{
	struct ibv_wc wc = { 0 };
	int status = next_completion(corner->pair.cq, &wc);

	/* RETRY_EXC_ERR, or FLUSH_ERR where the hardware was replaced before the retries had run out. */
	expect(corner->facts, of(corner, "the request fails"), status > IBV_WC_SUCCESS, 1);
	expect(corner->facts, of(corner, "its id"), wc.wr_id, 1);
	expect_state(corner, "state", corner->pair.a, IBV_QPS_ERR);
	expect_nothing(corner, "anything else", corner->pair.cq);
}

static void unpolled(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	make(corner, IBV_QPS_RTS);
	for (int id = 1; id <= 3; id++) {
		receive_message(corner, pair->b, id);
		send_message(corner, pair->a, id);
	}
}

/* One pair goes, another comes, between two cycles. */
static void after_unpolled(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	for (int id = 1; id <= 3; id++) {
		expect_message(corner, pair->cq_b, id);
		expect_next(corner, "send", pair->cq, id, IBV_WC_SUCCESS);
	}
	exchange(corner);
	drop_pair(pair);
	make(corner, IBV_QPS_RTS);
	exchange(corner);
	cycle(1);
	exchange(corner);
}

/* Without traffic. */
static void datagram_in_init(struct corner *corner)
{
	make(corner, IBV_QPS_INIT);
	receive_message(corner, corner->pair.a, 1);
	to_rtr(corner->facts, corner->pair.b, 0, &corner->wish);
	receive_message(corner, corner->pair.b, 1);
}

static void after_datagram_in_init(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_state(corner, "state", pair->a, IBV_QPS_INIT);
	expect_state(corner, "state of the other", pair->b, IBV_QPS_RTR);
	to_rtr(corner->facts, pair->a, 0, &corner->wish);
	to_rts(pair->a, &corner->wish);
	to_rts(pair->b, &corner->wish);
	expect_state(corner, "state at last", pair->b, IBV_QPS_RTS);
	must(to_error(pair->a), "ibv_modify_qp to ERR");
	must(to_error(pair->b), "ibv_modify_qp to ERR");
	expect_next(corner, "flushed receive", pair->cq, 1, IBV_WC_WR_FLUSH_ERR);
	expect_next(corner, "flushed receive of the other", pair->cq_b, 1, IBV_WC_WR_FLUSH_ERR);
}

static const struct {
	const char *name;
	enum ibv_qp_type type;
	void (*before)(struct corner *corner);
	void (*after)(struct corner *corner);
} situations[] = {
	{ "RC in RESET", IBV_QPT_RC, in_reset, after_reset },
	{ "RC in INIT", IBV_QPT_RC, in_init, after_init },
	{ "RC whose peer is in INIT", IBV_QPT_RC, before_its_peer, after_its_peer },
	{ "RC in RTR", IBV_QPT_RC, in_rtr, after_rtr },
	{ "RC in SQD", IBV_QPT_RC, in_sqd, after_sqd },
	{ "RC in error of its own", IBV_QPT_RC, in_error_of_its_own, after_error_of_its_own },
	{ "RC moved to ERR", IBV_QPT_RC, in_error_by_request, after_error_by_request },
	{ "RC moved to ERR from INIT", IBV_QPT_RC, in_error_before_it_was_connected,
	  after_error_before_it_was_connected },
	{ "RC whose peer was destroyed", IBV_QPT_RC, without_its_peer, after_without_its_peer },
	{ "RC whose peer is destroyed with a request on the way", IBV_QPT_RC, losing_its_peer,
	  after_losing_its_peer },
	{ "RC replaced by another", IBV_QPT_RC, unpolled, after_unpolled },
	{ "UC in RESET", IBV_QPT_UC, in_reset, after_reset },
	{ "UC in INIT", IBV_QPT_UC, in_init, after_init },
	{ "UC in RTR", IBV_QPT_UC, in_rtr, after_rtr },
	{ "UC moved to ERR", IBV_QPT_UC, in_error_by_request, after_error_by_request },
	{ "UC moved to ERR from INIT", IBV_QPT_UC, in_error_before_it_was_connected,
	  after_error_before_it_was_connected },
	{ "UD in INIT and RTR", IBV_QPT_UD, datagram_in_init, after_datagram_in_init },
};

#define SITUATIONS (sizeof(situations) / sizeof(*situations))

_Static_assert(SITUATIONS * AREA <= BUFFER, "room for all");

/* Takes the asynchronous events that have come, all of which name a queue pair. */
static void note_events(struct facts *facts, struct corner *corner)
{
	struct pollfd entry = { .fd = facts->context->async_fd, .events = POLLIN };
	struct ibv_async_event event;

	while (poll(&entry, 1, 20) == 1) {
		struct corner *owner = NULL;

		must(ibv_get_async_event(facts->context, &event), "ibv_get_async_event");
		for (size_t i = 0; i < SITUATIONS; i++)
			if (event.element.qp == corner[i].pair.a ||
			    event.element.qp == corner[i].pair.b)
				owner = &corner[i];
		if (!owner)
			fail("an asynchronous event of kind %d names nothing", event.event_type);
		owner->events += 1ll << 2 * event.event_type;
		ibv_ack_async_event(&event);
	}
}

void states_of_queue_pairs(struct facts *facts, unsigned int cycles)
{
	struct corner corner[SITUATIONS];

	for (size_t i = 0; i < SITUATIONS; i++) {
		corner[i] = (struct corner){ .facts = facts, .name = situations[i].name,
					     .wish = connected, .area = i * AREA };
		corner[i].wish.type = situations[i].type;
		situations[i].before(&corner[i]);
	}
	note_events(facts, corner);
	cycle(cycles);
	for (size_t i = 0; i < SITUATIONS; i++) {
		situations[i].after(&corner[i]);
		note_events(facts, corner);
		same(of(&corner[i], "asynchronous events"), corner[i].events);
		drop_pair(&corner[i].pair);
	}
}
