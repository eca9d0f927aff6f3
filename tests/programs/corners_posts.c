/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Posting while the hardware is replaced: order, chains, fences, full queues, exact completion queues.
 */
#include "corners.h"
#include "stream.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>

static const struct wish connected = { .type = IBV_QPT_RC, .access = ALL_REMOTE,
				       .state = IBV_QPS_RTS, .rnr_retry = 7, .retry_cnt = 7,
				       .mtu = IBV_MTU_1024, .psn = 0xfffff0, .two_cqs = true };

static void make(struct corner *corner)
{
	make_pair(corner->facts, &corner->pair, corner->wish);
}

/* Fills a send queue that nobody empties. */
struct filler {
	struct ibv_qp *qp;
	unsigned int accepted;
	int error;
	atomic_bool stop;
	pthread_t thread;
};

static int fill_once(struct filler *filler)
{
	uint64_t value = filler->accepted;
	struct ibv_sge sge = { (uintptr_t)&value, sizeof(value), 0 };
	int error = post_one(filler->qp, IBV_WR_SEND, value, &sge, 1, 0, 0,
			     IBV_SEND_SIGNALED | IBV_SEND_INLINE);

	filler->accepted += !error;
	return error;
}

static void *fill_slowly(void *argument)
{
	struct filler *filler = argument;

	while (!filler->stop) {
		int error = fill_once(filler);

		if (error && error != ENOMEM)
			filler->error = error;
		poll(NULL, 0, 20);
	}
	return NULL;
}

static void start_filler(struct corner *corner, struct filler *filler)
{
	make(corner);
	*filler = (struct filler){ .qp = corner->pair.a };
	for (int i = 0; i < 5; i++)
		must(fill_once(filler), "ibv_post_send");
	must(pthread_create(&filler->thread, NULL, fill_slowly, filler), "pthread_create");
}

static void finish_filler(struct corner *corner, struct filler *filler)
{
	const unsigned char *bytes = corner->facts->memory + corner->area;
	struct pair *pair = &corner->pair;
	struct ibv_sge sge = piece(corner->facts, corner->area, 8);
	unsigned int arrived = 0, completed = 0;
	struct ibv_wc wc;

	filler->stop = true;
	pthread_join(filler->thread, NULL);
	expect_error(corner->facts, of(corner, "errors but ENOMEM"), filler->error, 0);
	while (filler->accepted < 16 * DEPTH && !fill_once(filler))
		;
	expect_error(corner->facts, of(corner, "post to the full queue"), fill_once(filler), ENOMEM);
	same(of(corner, "sends accepted"), filler->accepted);
	for (; arrived < filler->accepted; arrived++) {
		uint64_t value;

		must(receive_one(pair->b, arrived, &sge, 1), "ibv_post_recv");
		if (next_completion(pair->cq_b, &wc) != IBV_WC_SUCCESS || wc.wr_id != arrived)
			break;
		memcpy(&value, bytes, sizeof(value));
		if (value != arrived)
			break;
	}
	expect(corner->facts, of(corner, "each arrives once, in order"), arrived, filler->accepted);
	while (completed < filler->accepted && next_completion(pair->cq, &wc) == IBV_WC_SUCCESS &&
	       wc.wr_id == completed)
		completed++;
	expect(corner->facts, of(corner, "each completes once, in order"), completed,
	       filler->accepted);
	exchange(corner);
	drop_pair(pair);
}

/* A SEND that waits for a receive all the time. */
static void start_waiting(struct corner *corner)
{
	make(corner);
	send_message(corner, corner->pair.a, 1);
	send_message(corner, corner->pair.a, 2);
}

static void finish_waiting(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	expect_nothing(corner, "completions without a receive", pair->cq);
	for (int id = 1; id <= 2; id++) {
		receive_message(corner, pair->b, id);
		expect_message(corner, pair->cq_b, id);
		expect_next(corner, "send", pair->cq, id, IBV_WC_SUCCESS);
	}
	exchange(corner);
	drop_pair(pair);
}

/* A completion queue with room for exactly what is outstanding. */
#define EXACT 7

static void start_exact(struct corner *corner)
{
	struct pair *pair = &corner->pair;
	struct ibv_cq *cq = ibv_create_cq(corner->facts->context, 2 * EXACT + 1, NULL, NULL, 0);
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
					 .cap = { EXACT, EXACT + 1, 1, 1, 0 } };

	*pair = (struct pair){ .cq = cq, .cq_b = cq };
	if (!cq || !(pair->a = ibv_create_qp(corner->facts->pd, &init)) ||
	    !(pair->b = ibv_create_qp(corner->facts->pd, &init)))
		fail("no queues");
	to_init(pair->a, &corner->wish);
	to_init(pair->b, &corner->wish);
	connect_both(corner);
	same(of(corner, "room"), cq->cqe);
	receive_message(corner, pair->a, 100);
	for (int id = 0; id < EXACT; id++) {
		if (id < 3)
			receive_message(corner, pair->b, 10 + id);
		send_message(corner, pair->a, id);
	}
}

static void finish_exact(struct corner *corner)
{
	struct pollfd entry = { .fd = corner->facts->context->async_fd, .events = POLLIN };
	struct pair *pair = &corner->pair;
	uint64_t sends = 0, receives = 10;
	struct ibv_wc wc;
	int wrong = 0;

	for (int id = 3; id < EXACT; id++)
		receive_message(corner, pair->b, 10 + id);
	/* Nobody looks until all of them are there. */
	poll(NULL, 0, 500);
	expect(corner->facts, of(corner, "asynchronous events"), poll(&entry, 1, 0), 0);
	for (int i = 0; i < 2 * EXACT && !wrong; i++) {
		wrong = next_completion(pair->cq, &wc) != IBV_WC_SUCCESS;
		if (wc.wr_id == sends)
			sends++;
		else if (wc.wr_id == receives)
			receives++;
		else
			wrong = 1;
	}
	expect(corner->facts, of(corner, "both sides in order"), !wrong, 1);
	expect(corner->facts, of(corner, "sends"), sends, EXACT);
	expect(corner->facts, of(corner, "receives"), receives, 10 + EXACT);
	expect_nothing(corner, "anything else", pair->cq);
	send_message(corner, pair->b, 100);
	must(next_completion(pair->cq, &wc), "the last receive");
	must(next_completion(pair->cq, &wc), "the last send");
	drop_pair(pair);
}

void held_posts(struct facts *facts, unsigned int cycles)
{
	struct corner corner[5];
	struct filler filler;
	struct stream stream;
	struct fence fence;
	const char *names[] = { "stream", "fence", "full queue", "no receive", "exact" };

	for (int i = 0; i < 5; i++) {
		corner[i] = (struct corner){ .facts = facts, .name = names[i], .wish = connected,
					     .area = i * AREA };
		if (i < 2)
			make(&corner[i]);
	}
	start_waiting(&corner[3]);
	start_exact(&corner[4]);
	start_stream(&stream, &corner[0]);
	start_fence(&fence, &corner[1]);
	start_filler(&corner[2], &filler);
	cycle(cycles);
	finish_filler(&corner[2], &filler);
	finish_fence(&fence);
	finish_stream(&stream);
	finish_exact(&corner[4]);
	finish_waiting(&corner[3]);
	drop_pair(&corner[0].pair);
	drop_pair(&corner[1].pair);
}
