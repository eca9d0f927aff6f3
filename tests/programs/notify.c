/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "notify.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>

void make_channel(struct notify *notify, struct ibv_context *context)
{
	notify->channel = ibv_create_comp_channel(context);
	if (!notify->channel)
		fail("ibv_create_comp_channel: %s", strerror(errno));
	if (fcntl(notify->channel->fd, F_SETFL, O_NONBLOCK))
		fail("fcntl: %s", strerror(errno));
}

/* What came before the arming raises no event; what comes after the CQ was seen empty must. */
void note_poll(struct notify *notify, int which, int count, int asked)
{
	if (notify->settled[which] && count)
		notify->owed[which] = true;
	if (notify->armed[which] && count < asked)
		notify->settled[which] = true;
}

void arm(struct notify *notify)
{
	for (int i = 0; i < CQS; i++) {
		if (!notify->armed[i])
			must(ibv_req_notify_cq(notify->cq[i], 0), "ibv_req_notify_cq");
		notify->armed[i] = true;
	}
}

/* Takes one event; it must be one that was asked for. */
static bool take_event(struct notify *notify)
{
	struct ibv_cq *cq;
	void *context;
	int which;

	if (ibv_get_cq_event(notify->channel, &cq, &context)) {
		if (errno == EINTR || errno == EAGAIN)
			return false;
		fail("ibv_get_cq_event: %s", strerror(errno));
	}
	which = cq == notify->cq[RECEIVE_CQ];
	if (cq != notify->cq[which] || context != notify->context)
		fail("event for CQ %p with context %p, neither is ours", (void *)cq, context);
	if (!notify->armed[which])
		fail("event for a CQ that was not armed: doubled");
	notify->armed[which] = notify->settled[which] = notify->owed[which] = false;
	notify->events++;
	if (++notify->unacked[which] == 10) {
		ibv_ack_cq_events(cq, 10);
		notify->unacked[which] = 0;
	}
	return true;
}

static bool readable(const struct notify *notify, int timeout)
{
	struct pollfd entry = { .fd = notify->channel->fd, .events = POLLIN };
	int result = poll(&entry, 1, timeout);

	if (result < 0 && errno != EINTR)
		fail("poll: %s", strerror(errno));
	return result > 0;
}

void wait_for_events(struct notify *notify, int milliseconds)
{
	if (readable(notify, milliseconds))
		while (readable(notify, 0) && take_event(notify))
			;
}

void collect_owed_events(struct notify *notify)
{
	while (notify->owed[SEND_CQ] || notify->owed[RECEIVE_CQ]) {
		notify->look_around();
		if (readable(notify, -1))
			take_event(notify);
	}
}

void acknowledge_events(struct notify *notify)
{
	for (int i = 0; i < CQS; i++) {
		ibv_ack_cq_events(notify->cq[i], notify->unacked[i]);
		notify->unacked[i] = 0;
	}
}
