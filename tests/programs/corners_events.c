/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Events that are asked for, on their way, unread or not acknowledged while the hardware is replaced.
 *
 * After a cycle each armed queue may fire once with nothing behind it (docs/events.md, "Armed or not"); a program cannot tell
 * that from an event whose completion it has polled already. Anything else is as on hardware.
 */
#define _GNU_SOURCE
#include "corners.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/epoll.h>

static const struct wish connected = { .type = IBV_QPT_RC, .access = ALL_REMOTE,
				       .state = IBV_QPS_RTS, .rnr_retry = 7, .retry_cnt = 7,
				       .mtu = IBV_MTU_1024, .psn = 77, .two_cqs = true };

static bool readable(int fd, int milliseconds)
{
	struct pollfd entry = { .fd = fd, .events = POLLIN };

	return poll(&entry, 1, milliseconds) == 1;
}

/* Takes an event that is there; the queue it names must be the peer's. */
static void take_event(struct corner *corner, bool acknowledge)
{
	struct ibv_cq *cq = NULL;
	void *context = NULL;

	must(ibv_get_cq_event(corner->wish.channel, &cq, &context), "ibv_get_cq_event");
	expect(corner->facts, of(corner, "queue and context of the event"),
	       cq == corner->pair.cq_b && context == &corner->pair, 1);
	if (acknowledge)
		ibv_ack_cq_events(cq, 1);
}

static void arm(struct corner *corner, int solicited_only)
{
	must(ibv_req_notify_cq(corner->pair.cq_b, solicited_only), "ibv_req_notify_cq");
}

static void make(struct corner *corner)
{
	if (!corner->wish.channel)
		corner->wish.channel = ibv_create_comp_channel(corner->facts->context);
	if (!corner->wish.channel)
		fail("no completion channel");
	make_pair(corner->facts, &corner->pair, corner->wish);
}

static void drop(struct corner *corner)
{
	drop_pair(&corner->pair);
	must(ibv_destroy_comp_channel(corner->wish.channel), "ibv_destroy_comp_channel");
}

static void send_solicited(struct corner *corner, unsigned int id, int flag)
{
	struct ibv_sge sge = piece(corner->facts, corner->area, 8);

	must(post_one(corner->pair.a, IBV_WR_SEND, id, &sge, 1, 0, 0, IBV_SEND_SIGNALED | flag),
	     "ibv_post_send");
	expect_next(corner, "send", corner->pair.cq, id, IBV_WC_SUCCESS);
}

/* As a program does that waits for a message: event, acknowledge, arm, poll. Nothing is polled without an event. */
static void expect_announced(struct corner *corner, int solicited_only, unsigned int id)
{
	struct ibv_wc wc = { 0 };
	int got = 0, empty = 0;

	while (!got && readable(corner->wish.channel->fd, 5000)) {
		take_event(corner, true);
		arm(corner, solicited_only);
		got = ibv_poll_cq(corner->pair.cq_b, 1, &wc);
		empty += !got;
	}
	expect(corner->facts, of(corner, "the completion is announced"), got, 1);
	expect(corner->facts, of(corner, "its id"), wc.wr_id, id);
	expect(corner->facts, of(corner, "events with nothing behind them, at most one"), empty <= 1, 1);
}

/* Armed; the message comes after the cycle. */
static void armed(struct corner *corner)
{
	make(corner);
	arm(corner, 0);
	receive_message(corner, corner->pair.b, 1);
}

static void after_armed(struct corner *corner)
{
	send_solicited(corner, 1, 0);
	expect_announced(corner, 0, 1);
	drop(corner);
}

static void armed_for_solicited(struct corner *corner)
{
	make(corner);
	arm(corner, 1);
	receive_message(corner, corner->pair.b, 1);
	receive_message(corner, corner->pair.b, 2);
	send_solicited(corner, 1, 0);
	expect(corner->facts, of(corner, "event for an unsolicited message"),
	       readable(corner->wish.channel->fd, 50), 0);
}

static void after_armed_for_solicited(struct corner *corner)
{
	struct ibv_wc wc;

	expect(corner->facts, of(corner, "unsolicited message"),
	       next_completion(corner->pair.cq_b, &wc) == IBV_WC_SUCCESS && wc.wr_id == 1, 1);
	send_solicited(corner, 2, IBV_SEND_SOLICITED);
	expect_announced(corner, 1, 2);
	/* It is armed for solicited ones now, whatever was before. */
	receive_message(corner, corner->pair.b, 3);
	receive_message(corner, corner->pair.b, 4);
	send_solicited(corner, 3, 0);
	expect(corner->facts, of(corner, "event for another unsolicited one"),
	       readable(corner->wish.channel->fd, 100), 0);
	send_solicited(corner, 4, IBV_SEND_SOLICITED);
	expect(corner->facts, of(corner, "event for a solicited one"),
	       readable(corner->wish.channel->fd, 5000), 1);
	take_event(corner, true);
	expect(corner->facts, of(corner, "one event for one arming"),
	       readable(corner->wish.channel->fd, 100), 0);
	drop(corner);
}

/* The event is there and nobody has read it. */
static void unread(struct corner *corner)
{
	make(corner);
	arm(corner, 0);
	receive_message(corner, corner->pair.b, 1);
	send_message(corner, corner->pair.a, 1);
	expect(corner->facts, of(corner, "event"), readable(corner->wish.channel->fd, 5000), 1);
}

static void after_unread(struct corner *corner)
{
	expect(corner->facts, of(corner, "event after the cycle"),
	       readable(corner->wish.channel->fd, 0), 1);
	take_event(corner, true);
	expect(corner->facts, of(corner, "one event for one arming"),
	       readable(corner->wish.channel->fd, 100), 0);
	expect_message(corner, corner->pair.cq_b, 1);
	drop(corner);
}

/* Destroying the queue takes the event with it. */
static void after_unread_and_destroyed(struct corner *corner)
{
	drop_pair(&corner->pair);
	expect(corner->facts, of(corner, "event of a queue that is gone"),
	       readable(corner->wish.channel->fd, 0), 0);
	must(ibv_destroy_comp_channel(corner->wish.channel), "ibv_destroy_comp_channel");
}

/* The event was read, its acknowledgment is missing; a thread waits for it in ibv_destroy_cq. */
static pthread_t destroyer;
static atomic_bool destroyed;

static void *destroy_queue(void *argument)
{
	must(ibv_destroy_cq(argument), "ibv_destroy_cq");
	destroyed = true;
	return NULL;
}

static void unacknowledged(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	unread(corner);
	take_event(corner, false);
	must(ibv_destroy_qp(pair->b), "ibv_destroy_qp");
	must(ibv_destroy_qp(pair->a), "ibv_destroy_qp");
	destroyed = false;
	must(pthread_create(&destroyer, NULL, destroy_queue, pair->cq_b), "pthread_create");
	poll(NULL, 0, 50);
}

static void after_unacknowledged(struct corner *corner)
{
	expect(corner->facts, of(corner, "destroyed before the acknowledgment"), destroyed, 0);
	ibv_ack_cq_events(corner->pair.cq_b, 1);
	for (int i = 0; i < 1000 && !destroyed; i++)
		poll(NULL, 0, 5);
	expect(corner->facts, of(corner, "destroyed after it"), destroyed, 1);
	pthread_join(destroyer, NULL);
	must(ibv_destroy_cq(corner->pair.cq), "ibv_destroy_cq");
	must(ibv_destroy_comp_channel(corner->wish.channel), "ibv_destroy_comp_channel");
}

/* The same, destroyed after the cycle. */
static void unacknowledged_yet(struct corner *corner)
{
	unread(corner);
	take_event(corner, false);
}

static void after_unacknowledged_yet(struct corner *corner)
{
	expect_message(corner, corner->pair.cq_b, 1);
	ibv_ack_cq_events(corner->pair.cq_b, 1);
	drop(corner);
}

/* Two queues of one channel; one of them has something. */
static struct ibv_cq *idle;

static void sharing_a_channel(struct corner *corner)
{
	make(corner);
	idle = ibv_create_cq(corner->facts->context, DEPTH, NULL, corner->wish.channel, 0);
	if (!idle)
		fail("ibv_create_cq");
	arm(corner, 0);
	must(ibv_req_notify_cq(idle, 0), "ibv_req_notify_cq");
	receive_message(corner, corner->pair.b, 1);
	send_message(corner, corner->pair.a, 1);
}

static void after_sharing_a_channel(struct corner *corner)
{
	int of_busy = 0, of_idle = 0;
	struct ibv_cq *cq;
	void *context;

	expect_next(corner, "send", corner->pair.cq, 1, IBV_WC_SUCCESS);
	while (readable(corner->wish.channel->fd, of_busy ? 100 : 5000)) {
		must(ibv_get_cq_event(corner->wish.channel, &cq, &context), "ibv_get_cq_event");
		*(cq == idle ? &of_idle : &of_busy) += 1;
		ibv_ack_cq_events(cq, 1);
	}
	expect(corner->facts, of(corner, "events of the queue with the completion"), of_busy, 1);
	expect(corner->facts, of(corner, "events of the other, at most one"), of_idle <= 1, 1);
	expect_message(corner, corner->pair.cq_b, 1);
	must(ibv_destroy_cq(idle), "ibv_destroy_cq");
	drop(corner);
}

/* A channel that no queue has used yet, with settings of the application's. */
static void unused(struct corner *corner)
{
	corner->wish.channel = ibv_create_comp_channel(corner->facts->context);
	if (!corner->wish.channel)
		fail("no completion channel");
	fcntl(corner->wish.channel->fd, F_SETFL, O_NONBLOCK);
}

static void after_unused(struct corner *corner)
{
	struct ibv_cq *cq;
	void *context;

	expect(corner->facts, of(corner, "get an event where there is none"),
	       ibv_get_cq_event(corner->wish.channel, &cq, &context), -1);
	armed(corner);
	after_armed(corner);
}

/* Both event files in an epoll set, one by level and one by edge. */
static int set;

#define CHANNEL_DATA 0xdeadbeefcafe1234
#define ASYNC_DATA 0x1234567812345678

static void add(int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = { .events = events, .data.u64 = data };

	must(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

static void in_epoll(struct corner *corner)
{
	set = epoll_create1(EPOLL_CLOEXEC);
	make(corner);
	fcntl(corner->wish.channel->fd, F_SETFL,
	      fcntl(corner->wish.channel->fd, F_GETFL) | O_NONBLOCK);
	add(corner->wish.channel->fd, EPOLLIN | EPOLLET, CHANNEL_DATA);
	add(corner->facts->context->async_fd, EPOLLIN, ASYNC_DATA);
	arm(corner, 0);
	receive_message(corner, corner->pair.b, 1);
}

static void after_in_epoll(struct corner *corner)
{
	int channel = corner->wish.channel->fd, async = corner->facts->context->async_fd;
	struct ibv_async_event event;
	struct epoll_event got = { 0 };

	expect(corner->facts, of(corner, "O_NONBLOCK of the channel"),
	       (fcntl(channel, F_GETFL) & O_NONBLOCK) != 0, 1);
	expect(corner->facts, of(corner, "O_NONBLOCK of the asynchronous events"),
	       (fcntl(async, F_GETFL) & O_NONBLOCK) != 0, 0);
	expect(corner->facts, of(corner, "close-on-exec of the channel"), fcntl(channel, F_GETFD),
	       FD_CLOEXEC);
	send_solicited(corner, 1, 0);
	expect(corner->facts, of(corner, "epoll_wait"), epoll_wait(set, &got, 1, 5000), 1);
	expect(corner->facts, of(corner, "data of the channel"), got.data.u64 == CHANNEL_DATA, 1);
	expect_announced(corner, 0, 1);
	expect(corner->facts, of(corner, "epoll_wait by edge, again"), epoll_wait(set, &got, 1, 100), 0);
	/* The first packet raises an event; an unused receive that is flushed does not. */
	while (readable(async, 0) && !ibv_get_async_event(corner->facts->context, &event))
		ibv_ack_async_event(&event);
	must(epoll_ctl(set, EPOLL_CTL_DEL, channel, NULL), "epoll_ctl");
	must(epoll_ctl(set, EPOLL_CTL_DEL, async, NULL), "epoll_ctl");
	close(set);
	drop(corner);
}

/* The limit of an SRQ, which fires once. */
static void make_limited(struct corner *corner, int receives)
{
	struct ibv_srq_attr attributes = { .srq_limit = 3 };
	struct ibv_sge sge = piece(corner->facts, corner->area, 8);
	struct ibv_recv_wr wr = { .wr_id = 1, .sg_list = &sge, .num_sge = 1 }, *bad;

	corner->wish.on_srq = true;
	corner->wish.two_cqs = false;
	make_pair(corner->facts, &corner->pair, corner->wish);
	while (receives--)
		must(ibv_post_srq_recv(corner->pair.srq, &wr, &bad), "ibv_post_srq_recv");
	must(ibv_modify_srq(corner->pair.srq, &attributes, IBV_SRQ_LIMIT), "ibv_modify_srq");
}

static void use_receives(struct corner *corner, int count)
{
	struct ibv_sge sge = piece(corner->facts, corner->area, 8);
	struct ibv_wc wc;

	while (count--) {
		must(post_one(corner->pair.a, IBV_WR_SEND, 2, &sge, 1, 0, 0, IBV_SEND_SIGNALED),
		     "ibv_post_send");
		must(next_completion(corner->pair.cq, &wc), "first completion");
		must(next_completion(corner->pair.cq, &wc), "second completion");
	}
}

static uint32_t limit_of(struct ibv_srq *srq)
{
	struct ibv_srq_attr attributes;

	must(ibv_query_srq(srq, &attributes), "ibv_query_srq");
	return attributes.srq_limit;
}

/* The next asynchronous event is the one of this SRQ; it is left to be acknowledged. */
static void expect_limit_event(struct corner *corner, struct ibv_async_event *event)
{
	bool there = readable(corner->facts->context->async_fd, 5000);

	expect(corner->facts, of(corner, "limit event"), there, 1);
	if (!there)
		fail("without it nothing can go on");
	must(ibv_get_async_event(corner->facts->context, event), "ibv_get_async_event");
	expect(corner->facts, of(corner, "kind of the event"), event->event_type,
	       IBV_EVENT_SRQ_LIMIT_REACHED);
	expect(corner->facts, of(corner, "its SRQ"), event->element.srq == corner->pair.srq, 1);
}

static void limit_set(struct corner *corner)
{
	make_limited(corner, 6);
}

static void after_limit_set(struct corner *corner)
{
	struct ibv_async_event event;

	expect(corner->facts, of(corner, "limit"), limit_of(corner->pair.srq), 3);
	use_receives(corner, 2);
	expect(corner->facts, of(corner, "event above the limit"),
	       readable(corner->facts->context->async_fd, 50), 0);
	use_receives(corner, 2);
	expect_limit_event(corner, &event);
	ibv_ack_async_event(&event);
	expect(corner->facts, of(corner, "it fires once"),
	       readable(corner->facts->context->async_fd, 50), 0);
	drop_pair(&corner->pair);
}

static struct ibv_async_event kept;

static void limit_reached(struct corner *corner)
{
	make_limited(corner, 4);
	use_receives(corner, 2);
	expect(corner->facts, of(corner, "event"), readable(corner->facts->context->async_fd, 5000), 1);
}

static void after_limit_reached(struct corner *corner)
{
	expect_limit_event(corner, &kept);
	ibv_ack_async_event(&kept);
	expect(corner->facts, of(corner, "limit that has fired"), limit_of(corner->pair.srq), 0);
	use_receives(corner, 2);
	expect(corner->facts, of(corner, "it fires once"),
	       readable(corner->facts->context->async_fd, 100), 0);
	drop_pair(&corner->pair);
}

static void limit_unacknowledged(struct corner *corner)
{
	limit_reached(corner);
	expect_limit_event(corner, &kept);
}

static void after_limit_unacknowledged(struct corner *corner)
{
	ibv_ack_async_event(&kept);
	drop_pair(&corner->pair);
}

static const struct {
	const char *name;
	void (*before)(struct corner *corner);
	void (*after)(struct corner *corner);
} situations[] = {
	{ "armed", armed, after_armed },
	{ "armed for solicited", armed_for_solicited, after_armed_for_solicited },
	{ "unread event", unread, after_unread },
	{ "unread event of a queue that goes", unread, after_unread_and_destroyed },
	{ "event not acknowledged, in ibv_destroy_cq", unacknowledged, after_unacknowledged },
	{ "event not acknowledged", unacknowledged_yet, after_unacknowledged_yet },
	{ "two queues of one channel", sharing_a_channel, after_sharing_a_channel },
	{ "channel not used yet", unused, after_unused },
	{ "epoll", in_epoll, after_in_epoll },
}, one_by_one[] = {
	{ "SRQ limit", limit_set, after_limit_set },
	{ "SRQ limit reached", limit_reached, after_limit_reached },
	{ "SRQ limit event not acknowledged", limit_unacknowledged, after_limit_unacknowledged },
};

#define SITUATIONS (sizeof(situations) / sizeof(*situations))

void events_over_cycles(struct facts *facts, unsigned int cycles)
{
	struct corner corner[SITUATIONS];

	for (size_t i = 0; i < SITUATIONS; i++) {
		corner[i] = (struct corner){ .facts = facts, .name = situations[i].name,
					     .wish = connected, .area = i * AREA };
		situations[i].before(&corner[i]);
	}
	cycle(cycles);
	for (size_t i = 0; i < SITUATIONS; i++)
		situations[i].after(&corner[i]);
	/* Asynchronous events all come through one file. */
	for (size_t i = 0; i < sizeof(one_by_one) / sizeof(*one_by_one); i++) {
		corner[0] = (struct corner){ .facts = facts, .name = one_by_one[i].name,
					     .wish = connected };
		one_by_one[i].before(&corner[0]);
		cycle(cycles);
		one_by_one[i].after(&corner[0]);
	}
}
