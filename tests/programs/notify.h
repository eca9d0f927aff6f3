/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Completion events of a send and a receive CQ on one channel: each arming must bring exactly one.
 */
#ifndef REVERBS_TESTS_NOTIFY_H
#define REVERBS_TESTS_NOTIFY_H

#include "common.h"

enum { SEND_CQ, RECEIVE_CQ, CQS };

/* Not for two threads at once. */
struct notify {
	/* NULL where nobody asks for events. */
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq[CQS];
	/* Of the CQs. */
	void *context;
	/* Armed; found empty since then, so that all that comes now raises an event; something did
	 * come, so an event is owed. */
	bool armed[CQS], settled[CQS], owed[CQS];
	uint32_t unacked[CQS];
	uint64_t events;
	/* Called in every waiting loop. */
	void (*look_around)(void);
};

/* Makes the channel, which does not block. */
void make_channel(struct notify *notify, struct ibv_context *context);

/* A poll of this CQ gave `count` of at most `asked`. */
void note_poll(struct notify *notify, int which, int count, int asked);

/* Asks for an event of each CQ that is not armed. */
void arm(struct notify *notify);

/* Waits for events, for at most `milliseconds`, and takes them. */
void wait_for_events(struct notify *notify, int milliseconds);

/* Takes all events that are owed. There is no limit: if one is lost, the process hangs here. */
void collect_owed_events(struct notify *notify);

/* Acknowledges all events, so that the CQs can be destroyed. */
void acknowledge_events(struct notify *notify);

#endif
