/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The main loop and the final account; see rc_traffic.h.
 */
#include "rc_traffic.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>

/* All handles are compared again after this many loops. */
#define CHECK_EVERY 2048
/* Acknowledgements come as WRITEs, which raise no event: a wait is never longer than this. */
#define LONGEST_WAIT_MS 5

static struct traffic traffic;

static void report(void)
{
	asked_to_report = 0;
	for (uint32_t i = 0; i < traffic.options.qps; i++) {
		const struct stream *stream = &traffic.stream[i];

		fprintf(stderr,
			"side %d QP %u (0x%x): posted %" PRIu64 " retired %" PRIu64 " | number %" PRIu64
			" acknowledged %" PRIu64 " last %d | received %" PRIu64 " of %" PRIu64
			" verified %" PRIu64 " said %" PRIu64 " last %d\n",
			side, i, stream->qp->qp_num, stream->posted, stream->retired,
			stream->next_number, stream->acknowledged, stream->last_sent,
			stream->received, stream->receives_posted, stream->verified, stream->said,
			stream->last_received);
	}
	fprintf(stderr, "side %d: armed %d %d, events owed %d %d\n", side, traffic.notify.armed[0],
		traffic.notify.armed[1], traffic.notify.owed[0], traffic.notify.owed[1]);
}

static void look_at_signals(void)
{
	if (asked_to_report)
		report();
	check_processes();
}

static bool finished(void)
{
	for (uint32_t i = 0; i < traffic.options.qps; i++) {
		const struct stream *stream = &traffic.stream[i];

		if (!stream->last_sent || !stream->last_said || stream->retired != stream->posted)
			return false;
	}
	return true;
}

/* One round over everything; says whether there was anything to do. */
static bool work(void)
{
	bool busy = take_send_completions(&traffic);

	busy |= take_receive_completions(&traffic);
	busy |= post_late_receives(&traffic);
	for (uint32_t i = 0; i < traffic.options.qps; i++) {
		busy |= send_acknowledgement(&traffic, &traffic.stream[i]);
		busy |= send_more(&traffic, &traffic.stream[i]);
	}
	return busy;
}

static void wait_for_event(void)
{
	collect_owed_events(&traffic.notify);
	arm(&traffic.notify);
	if (!work())
		wait_for_events(&traffic.notify, LONGEST_WAIT_MS);
}

static void run(void)
{
	uint64_t loops = 0;

	while (!finished()) {
		look_at_signals();
		if (work()) {
			traffic.idle = 0;
		} else {
			traffic.idle++;
			if (traffic.notify.channel)
				wait_for_event();
			else
				sched_yield();
		}
		if (++loops % CHECK_EVERY == 0)
			check_handles(&traffic.handles);
		if (loops % 64 == 0 && running_time() >= traffic.options.seconds &&
		    traffic.options.seconds)
			asked_to_stop = 1;
	}
	collect_owed_events(&traffic.notify);
	check_handles(&traffic.handles);
}

/* Both sides are quiet now: nothing may be missing, and nothing too much. */
static void check_memory(const struct totals *peer)
{
	uint32_t qps = traffic.options.qps;
	uint64_t theirs[2 * MAX_QPS], ours[2 * MAX_QPS];

	check_poison(traffic.slots, acknowledgement_offset(&traffic, 0), "memory for WRITEs");
	check_poison(traffic.results, traffic.results_length, "memory for results");
	for (uint32_t page = 0; page < qps; page++)
		check_content(traffic.library + page * (size_t)traffic.options.max_size,
			      traffic.options.max_size, library_key(&traffic, side, page),
			      "memory that is only read");
	for (uint32_t i = 0; i < qps; i++) {
		ours[2 * i] = traffic.stream[i].added;
		ours[2 * i + 1] = traffic.stream[i].swapped;
	}
	socket_send(traffic.socket, ours, 2 * qps * sizeof(uint64_t));
	socket_receive(traffic.socket, theirs, 2 * qps * sizeof(uint64_t));
	for (uint32_t i = 0; i < 2 * qps; i++)
		if (traffic.counters[i] != theirs[i])
			fail("counter %u is 0x%" PRIx64 ", the other side made it 0x%" PRIx64, i,
			     traffic.counters[i], theirs[i]);
	if (traffic.counters[2 * qps] - counter_start(&traffic, side, 2 * qps) !=
	    peer->shared_added)
		fail("the shared counter grew by 0x%" PRIx64 ", the other side added 0x%" PRIx64,
		     traffic.counters[2 * qps] - counter_start(&traffic, side, 2 * qps),
		     peer->shared_added);
	for (uint32_t i = 0; i < qps; i++) {
		const struct acknowledgement *said =
			(void *)(traffic.slots + acknowledgement_offset(&traffic, i));

		if (said->verified != traffic.stream[i].next_number)
			fail("QP %u: %" PRIu64 " operations sent, %" PRIu64 " verified", i,
			     traffic.stream[i].next_number, said->verified);
	}
}

static void print_totals(const struct totals *peer)
{
	const struct totals *own = &traffic.totals;

	printf("{\"program\":\"rc_traffic\"");
	for (int kind = 0; kind < KINDS; kind++)
		printf(",\"%s\":%" PRIu64, kind_name[kind], own->operations[kind] + peer->operations[kind]);
	printf(",\"messages\":%" PRIu64 ",\"bytes\":%" PRIu64 ",\"send_completions\":%" PRIu64
	       ",\"receive_completions\":%" PRIu64 ",\"events\":%" PRIu64
	       ",\"handle_checks\":%" PRIu64 ",\"seconds\":%.1f,\"errors\":0}\n",
	       own->messages + peer->messages, own->bytes + peer->bytes,
	       own->send_completions + peer->send_completions,
	       own->receive_completions + peer->receive_completions, own->events + peer->events,
	       own->handle_checks + peer->handle_checks, running_time());
}

int main(int count, char **arguments)
{
	struct totals peer;

	read_options(&traffic.options, count, arguments);
	traffic.socket = split_in_two();
	traffic.notify.look_around = look_at_signals;
	set_up(&traffic);
	for (uint32_t i = 0; i < traffic.options.qps; i++) {
		traffic.stream[i].added = counter_start(&traffic, !side, 2 * i);
		traffic.stream[i].swapped = counter_start(&traffic, !side, 2 * i + 1);
	}
	running_time();
	if (side == 0) {
		printf("ready\n");
		fflush(stdout);
	}
	run();
	traffic.totals.events = traffic.notify.events;
	traffic.totals.handle_checks = traffic.handles.checks;
	socket_send(traffic.socket, &traffic.totals, sizeof(traffic.totals));
	socket_receive(traffic.socket, &peer, sizeof(peer));
	check_memory(&peer);
	socket_barrier(traffic.socket);
	tear_down(&traffic);
	if (side == 0) {
		join_children();
		print_totals(&peer);
	}
	return 0;
}
