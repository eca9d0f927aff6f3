/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Threads of all kinds that know nothing of the cycles.
 */
#include "corners.h"
#include "stream.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

static const struct wish connected = { .type = IBV_QPT_RC, .access = ALL_REMOTE,
				       .state = IBV_QPS_RTS, .rnr_retry = 7, .retry_cnt = 7,
				       .mtu = IBV_MTU_1024, .psn = 0xabcdef, .two_cqs = true };

#define MESSAGES 3

static atomic_bool stop;

/* Waits for MESSAGES messages, blocked in the kernel. */
struct waiter {
	struct corner corner;
	/* In poll() on a channel that does not block, or in ibv_get_cq_event. */
	bool polls;
	atomic_uint received;
	const char *error;
	pthread_t thread;
};

static bool wait_for_event(struct waiter *waiter, struct ibv_cq **cq)
{
	struct ibv_comp_channel *channel = waiter->corner.wish.channel;
	struct pollfd entry = { .fd = channel->fd, .events = POLLIN };
	void *context;

	if (waiter->polls && poll(&entry, 1, -1) != 1)
		return false;
	return !ibv_get_cq_event(channel, cq, &context) && context == &waiter->corner.pair;
}

static void *wait_for_messages(void *argument)
{
	struct waiter *waiter = argument;
	struct ibv_cq *cq;
	struct ibv_wc wc;

	while (waiter->received < MESSAGES && !waiter->error) {
		if (!wait_for_event(waiter, &cq)) {
			waiter->error = "waiting for an event failed";
			break;
		}
		ibv_ack_cq_events(cq, 1);
		must(ibv_req_notify_cq(cq, 0), "ibv_req_notify_cq");
		while (ibv_poll_cq(cq, 1, &wc) == 1) {
			if (wc.status || wc.wr_id != waiter->received)
				waiter->error = "not the next message";
			waiter->received++;
		}
	}
	return NULL;
}

static void start_waiter(struct waiter *waiter, struct facts *facts, bool polls, size_t area)
{
	struct corner *corner = &waiter->corner;

	waiter->polls = polls;
	*corner = (struct corner){ .facts = facts, .wish = connected, .area = area,
				   .name = polls ? "blocked in poll" :
						   "blocked in ibv_get_cq_event" };
	corner->wish.channel = ibv_create_comp_channel(facts->context);
	if (!corner->wish.channel)
		fail("no completion channel");
	make_pair(facts, &corner->pair, corner->wish);
	if (polls)
		fcntl(corner->wish.channel->fd, F_SETFL, O_NONBLOCK);
	must(ibv_req_notify_cq(corner->pair.cq_b, 0), "ibv_req_notify_cq");
	for (int i = 0; i < MESSAGES; i++)
		receive_message(corner, corner->pair.b, i);
	must(pthread_create(&waiter->thread, NULL, wait_for_messages, waiter), "pthread_create");
}

static void finish_waiter(struct waiter *waiter)
{
	struct corner *corner = &waiter->corner;

	expect(corner->facts, of(corner, "messages before any was sent"), waiter->received, 0);
	for (int i = 0; i < MESSAGES; i++) {
		send_message(corner, corner->pair.a, i);
		expect_next(corner, "send", corner->pair.cq, i, IBV_WC_SUCCESS);
		for (int look = 0; look < 1000 && waiter->received <= (unsigned int)i; look++)
			poll(NULL, 0, 5);
	}
	expect(corner->facts, of(corner, "messages that woke the thread"), waiter->received, MESSAGES);
	/* One that was not woken would never come back. */
	if (waiter->received < MESSAGES && !waiter->error)
		fail("the thread is still blocked");
	pthread_join(waiter->thread, NULL);
	if (waiter->error)
		printf("# %s\n", waiter->error);
	expect(corner->facts, of(corner, "errors"), waiter->error != NULL, 0);
	drop_pair(&corner->pair);
	must(ibv_destroy_comp_channel(corner->wish.channel), "ibv_destroy_comp_channel");
}

/* Blocked in ibv_get_async_event all the time. */
struct listener {
	struct facts *facts;
	struct ibv_srq *srq;
	atomic_bool heard;
	bool right;
	pthread_t thread;
};

static void *listen_for_event(void *argument)
{
	struct listener *listener = argument;
	struct ibv_async_event event;

	/* Packets on a fresh connection raise events of another kind. */
	do {
		must(ibv_get_async_event(listener->facts->context, &event), "ibv_get_async_event");
		listener->right = event.event_type == IBV_EVENT_SRQ_LIMIT_REACHED &&
				  event.element.srq == listener->srq;
		ibv_ack_async_event(&event);
	} while (event.event_type == IBV_EVENT_COMM_EST);
	listener->heard = true;
	return NULL;
}

static void finish_listener(struct listener *listener, struct corner *corner)
{
	struct ibv_sge sge = piece(corner->facts, corner->area, 8);
	struct ibv_wc wc;

	expect(corner->facts, of(corner, "event before there was one"), listener->heard, 0);
	must(post_one(corner->pair.a, IBV_WR_SEND, 1, &sge, 1, 0, 0, IBV_SEND_SIGNALED), "send");
	must(next_completion(corner->pair.cq, &wc), "completion");
	must(next_completion(corner->pair.cq_b, &wc), "completion of the peer");
	for (int look = 0; look < 1000 && !listener->heard; look++)
		poll(NULL, 0, 5);
	expect(corner->facts, of(corner, "event that woke the thread"), listener->heard, 1);
	if (!listener->heard)
		fail("the thread is still blocked");
	pthread_join(listener->thread, NULL);
	expect(corner->facts, of(corner, "its kind and SRQ"), listener->right, 1);
}

static void make_limited(struct corner *corner, struct listener *listener)
{
	struct ibv_srq_attr attributes = { .srq_limit = 2 };
	struct ibv_sge sge = piece(corner->facts, corner->area, 8);
	struct ibv_recv_wr wr = { .sg_list = &sge, .num_sge = 1 }, *bad;

	corner->wish.on_srq = true;
	make_pair(corner->facts, &corner->pair, corner->wish);
	for (int i = 0; i < 2; i++)
		must(ibv_post_srq_recv(corner->pair.srq, &wr, &bad), "ibv_post_srq_recv");
	must(ibv_modify_srq(corner->pair.srq, &attributes, IBV_SRQ_LIMIT), "ibv_modify_srq");
	*listener = (struct listener){ .facts = corner->facts, .srq = corner->pair.srq };
	must(pthread_create(&listener->thread, NULL, listen_for_event, listener), "pthread_create");
}

/* Makes, asks and destroys all the time. */
static void *call_control_verbs(void *argument)
{
	struct corner *corner = argument;
	struct facts *facts = corner->facts;
	unsigned long rounds = 0;

	for (; !stop; rounds++) {
		unsigned char *memory = facts->memory + corner->area;
		struct ibv_mr *mr = ibv_reg_mr(facts->pd, memory, SLOT, IBV_ACCESS_LOCAL_WRITE);
		struct ibv_port_attr port;

		make_pair(facts, &corner->pair, corner->wish);
		if (!mr || mr->addr != memory || ibv_query_port(facts->context, 1, &port) ||
		    port.state != IBV_PORT_ACTIVE || state_of(corner->pair.a) != IBV_QPS_RTS)
			fail("a control verb failed: %s", strerror(errno));
		if (rounds % 4 == 0) {
			struct ibv_sge sge = { (uintptr_t)memory, 8, mr->lkey };
			struct ibv_wc wc;

			must(receive_one(corner->pair.b, 1, &sge, 1), "ibv_post_recv");
			must(post_one(corner->pair.a, IBV_WR_SEND, 1, &sge, 1, 0, 0,
				      IBV_SEND_SIGNALED),
			     "ibv_post_send");
			must(next_completion(corner->pair.cq, &wc), "send on a fresh queue pair");
			must(next_completion(corner->pair.cq_b, &wc), "receive on a fresh queue pair");
		}
		drop_pair(&corner->pair);
		must(ibv_dereg_mr(mr), "ibv_dereg_mr");
	}
	return (void *)rounds;
}

/* Polls a queue on which nothing ever happens. */
static void *poll_in_vain(void *argument)
{
	unsigned long found = 0;
	struct ibv_wc wc;

	while (!stop)
		found += ibv_poll_cq(argument, 1, &wc) != 0;
	return (void *)found;
}

void threads_over_cycles(struct facts *facts, unsigned int cycles)
{
	struct corner churn = { .facts = facts, .name = "control verbs", .wish = connected };
	struct corner moving = { .facts = facts, .name = "stream", .wish = connected, .area = AREA };
	struct corner fenced = { .facts = facts, .name = "fence", .wish = connected,
				 .area = 2 * AREA };
	struct corner limited = { .facts = facts, .name = "blocked in ibv_get_async_event",
				  .wish = connected, .area = 3 * AREA };
	struct ibv_cq *empty = ibv_create_cq(facts->context, DEPTH, NULL, NULL, 0);
	struct waiter getting = { 0 }, polling = { 0 };
	struct listener listener;
	struct stream stream;
	struct fence fence;
	pthread_t caller, poller;
	void *rounds, *found;

	make_pair(facts, &moving.pair, moving.wish);
	make_pair(facts, &fenced.pair, fenced.wish);
	start_waiter(&getting, facts, false, 4 * AREA);
	start_waiter(&polling, facts, true, 5 * AREA);
	make_limited(&limited, &listener);
	start_stream(&stream, &moving);
	start_fence(&fence, &fenced);
	must(pthread_create(&caller, NULL, call_control_verbs, &churn), "pthread_create");
	must(pthread_create(&poller, NULL, poll_in_vain, empty), "pthread_create");
	cycle(cycles);
	stop = true;
	pthread_join(caller, &rounds);
	pthread_join(poller, &found);
	printf("# %lu rounds of control verbs\n", (unsigned long)rounds);
	expect(facts, "rounds of control verbs were made", (unsigned long)rounds > 1, 1);
	expect(facts, "polls that found something where there is nothing", (unsigned long)found, 0);
	finish_fence(&fence);
	finish_stream(&stream);
	finish_waiter(&getting);
	finish_waiter(&polling);
	finish_listener(&listener, &limited);
	drop_pair(&moving.pair);
	drop_pair(&fenced.pair);
	drop_pair(&limited.pair);
	must(ibv_destroy_cq(empty), "ibv_destroy_cq");
}
