/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Sending, the main loop and the final account; see ud_srq.h.
 */
#include "ud_srq.h"

#include <endian.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#define CHECK_EVERY 2048
/* A UD or UC flow goes on after this many loops without news from its receiver. */
#define LONG_QUIET 20000
/* Nothing is on its way any more after this many polls without a completion. */
#define SURELY_EMPTY 5000

static struct state state;

static uint32_t room(const struct queue *queue)
{
	return SEND_DEPTH - (queue->posted - queue->retired);
}

/* Posts one request, signaled now and then or when it must be. */
static void post(struct queue *queue, struct ibv_send_wr *wr, bool force_signal)
{
	uint64_t position = queue->posted;
	struct ibv_send_wr *bad = NULL;
	bool signaled = force_signal || queue->unsignaled + 1 >= MAX_UNSIGNALED ||
			roll(&state.random, 4) == 0;
	int result;

	wr->wr_id = key_of(state.options.seed, side, queue - state.queue, position);
	if (signaled)
		wr->send_flags |= IBV_SEND_SIGNALED;
	queue->unsignaled = signaled ? 0 : queue->unsignaled + 1;
	queue->ring[position % SEND_DEPTH].id = wr->wr_id;
	queue->ring[position % SEND_DEPTH].signaled = signaled;
	result = ibv_post_send(queue->qp, wr, &bad);
	if (result)
		fail("QP %td: ibv_post_send after %" PRIu64 " posted, %" PRIu64 " retired: %s",
		     queue - state.queue, queue->posted, queue->retired, strerror(result));
	queue->posted++;
}

static void read_acknowledgement(struct flow *flow, uint32_t which)
{
	/* The device writes here: read it anew each time. */
	volatile struct acknowledgement *there = &state.acknowledgements[which];
	uint64_t number = there->number, proof = there->proof;

	if (proof != proof_of(number) || number == flow->acknowledged)
		return;
	if (number > flow->next)
		fail("flow %u: acknowledged up to %" PRIu64 ", sent are %" PRIu64, which, number,
		     flow->next);
	if (number < flow->acknowledged && flow->type == IBV_QPT_RC)
		fail("flow %u: acknowledged up to %" PRIu64 " after %" PRIu64, which, number,
		     flow->acknowledged);
	if (number > flow->acknowledged) {
		flow->acknowledged = number;
		flow->quiet = 0;
	}
}

/* Whether the flow may send now. */
static bool may_send(struct flow *flow, uint32_t which)
{
	read_acknowledgement(flow, which);
	/* One place stays free for an acknowledgement. */
	if (flow->last_sent || room(&state.queue[flow->from]) < 2)
		return false;
	if (flow->next < flow->acknowledged + WINDOW)
		return true;
	if (flow->type == IBV_QPT_RC || ++flow->quiet < LONG_QUIET)
		return false;
	flow->quiet = 0;
	flow->acknowledged = flow->next;
	state.totals.gone_on++;
	return true;
}

static bool send_message(uint32_t which)
{
	struct flow *flow = &state.flow[which];
	struct queue *queue = &state.queue[flow->from];
	unsigned char *bytes = state.out + (flow->from * SEND_DEPTH + queue->posted % SEND_DEPTH) *
						   (size_t)STRIDE;
	bool last = asked_to_stop ||
		    (state.options.messages && flow->next >= state.options.messages);
	struct header header = { .flow = which, .number = flow->next, .last = last };
	struct ibv_sge sge[2];
	struct ibv_send_wr wr = { .sg_list = sge, .num_sge = 2 };

	if (!may_send(flow, which))
		return false;
	header.length = last ? sizeof(header) : length_of(&state, side, which, flow->next);
	memcpy(bytes, &header, sizeof(header));
	fill(bytes + sizeof(header), header.length - sizeof(header),
	     content_of(&state, side, which, flow->next));
	sge[0] = (struct ibv_sge){ (uintptr_t)bytes, sizeof(header) / 2, state.out_mr->lkey };
	sge[1] = (struct ibv_sge){ (uintptr_t)bytes + sizeof(header) / 2,
				   header.length - sizeof(header) / 2, state.out_mr->lkey };
	wr.opcode = has_immediate(flow->next) ? IBV_WR_SEND_WITH_IMM : IBV_WR_SEND;
	wr.imm_data = htobe32(flow->next);
	if (header.length <= 64 && roll(&state.random, 2))
		wr.send_flags |= IBV_SEND_INLINE;
	if (flow->type == IBV_QPT_UD) {
		wr.wr.ud.ah = state.ah[flow->from];
		wr.wr.ud.remote_qpn = state.peer.qp_num[flow->to];
		wr.wr.ud.remote_qkey = QKEY;
	}
	post(queue, &wr, last);
	flow->next++;
	flow->last_sent = last;
	state.totals.sent[which]++;
	state.totals.bytes += header.length;
	return true;
}

/* Tells the peer how far one of its flows has come here. */
static bool send_acknowledgement(uint32_t which)
{
	struct flow *flow = &state.flow[which];
	struct queue *queue = &state.queue[FIRST_RC + which % RCS];
	struct acknowledgement value = { flow->expected, proof_of(flow->expected) };
	struct ibv_sge sge = { (uintptr_t)&value, sizeof(value), 0 };
	struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
				  .send_flags = IBV_SEND_INLINE };
	bool due = flow->expected - flow->said >= WINDOW / 4 ||
		   (flow->last_received && !flow->last_said);

	if (!due || !room(queue))
		return false;
	wr.wr.rdma.remote_addr = state.peer.acknowledgements + which * sizeof(value);
	wr.wr.rdma.rkey = state.peer.key;
	post(queue, &wr, true);
	flow->said = flow->expected;
	flow->last_said = flow->last_received;
	return true;
}

static void take_send_completion(const struct ibv_wc *wc)
{
	struct queue *queue = NULL;
	uint64_t expected;

	for (uint32_t i = 0; i < QUEUES; i++)
		if (state.queue[i].qp->qp_num == wc->qp_num)
			queue = &state.queue[i];
	if (!queue)
		fail("send completion names QP 0x%x, which is not ours; status %d", wc->qp_num,
		     wc->status);
	if (wc->status)
		fail("QP %td (0x%x): send completion with status %d (%s), vendor error 0x%x",
		     queue - state.queue, wc->qp_num, wc->status, ibv_wc_status_str(wc->status),
		     wc->vendor_err);
	while (queue->retired < queue->posted && !queue->ring[queue->retired % SEND_DEPTH].signaled)
		queue->retired++;
	if (queue->retired == queue->posted)
		fail("QP %td: send completion 0x%" PRIx64 ", but nothing is outstanding: doubled",
		     queue - state.queue, wc->wr_id);
	expected = queue->ring[queue->retired % SEND_DEPTH].id;
	if (wc->wr_id != expected)
		fail("QP %td: send completion 0x%" PRIx64 " instead of 0x%" PRIx64
		     ": lost, doubled or out of order",
		     queue - state.queue, wc->wr_id, expected);
	queue->retired++;
	state.totals.send_completions++;
}

static bool take_send_completions(void)
{
	struct ibv_wc wc[16];
	int count = ibv_poll_cq(state.send_cq, 16, wc);

	if (count < 0)
		fail("ibv_poll_cq: %d", count);
	for (int i = 0; i < count; i++)
		take_send_completion(&wc[i]);
	return count > 0;
}

static void report(void)
{
	asked_to_report = 0;
	for (uint32_t i = 0; i < QUEUES; i++)
		fprintf(stderr, "side %d QP %u (0x%x): posted %" PRIu64 " retired %" PRIu64 "\n",
			side, i, state.queue[i].qp->qp_num, state.queue[i].posted,
			state.queue[i].retired);
	for (uint32_t i = 0; i < FLOWS; i++) {
		const struct flow *flow = &state.flow[i];

		fprintf(stderr,
			"side %d flow %u: next %" PRIu64 " acknowledged %" PRIu64
			" last %d | expected %" PRIu64 " received %" PRIu64 " said %" PRIu64
			" last %d\n",
			side, i, flow->next, flow->acknowledged, flow->last_sent, flow->expected,
			flow->received, flow->said, flow->last_received);
	}
}

static bool finished(void)
{
	for (uint32_t i = 0; i < FLOWS; i++) {
		const struct flow *flow = &state.flow[i];

		if (!flow->last_sent || (flow->type == IBV_QPT_RC && !flow->last_said))
			return false;
	}
	for (uint32_t i = 0; i < QUEUES; i++) {
		const struct queue *queue = &state.queue[i];

		/* An unsignaled acknowledgement or message at the end would never be heard of. */
		if (queue->posted - queue->retired > queue->unsignaled)
			return false;
	}
	return true;
}

static void run(void)
{
	uint64_t loops = 0;

	while (!finished()) {
		bool busy = take_send_completions();

		if (asked_to_report)
			report();
		check_processes();
		busy |= take_receive_completions(&state);
		for (uint32_t i = 0; i < FLOWS; i++) {
			busy |= send_acknowledgement(i);
			busy |= send_message(i);
		}
		if (!busy)
			sched_yield();
		if (++loops % CHECK_EVERY == 0)
			check_handles(&state.handles);
		if (loops % 64 == 0 && running_time() >= state.options.seconds &&
		    state.options.seconds)
			asked_to_stop = 1;
	}
	/* The peer sends nothing new after this; what is on its way still comes. */
	socket_barrier(state.socket);
	for (int empty = 0; empty < SURELY_EMPTY; empty++) {
		if (take_receive_completions(&state) || take_send_completions())
			empty = 0;
		sched_yield();
	}
	check_handles(&state.handles);
	state.totals.handle_checks = state.handles.checks;
}

static void check_totals(const struct totals *peer)
{
	for (uint32_t i = 0; i < FLOWS; i++) {
		uint64_t sent = peer->sent[i], received = state.totals.received[i];

		if (received > sent || (state.flow[i].type == IBV_QPT_RC && received != sent))
			fail("flow %u: %" PRIu64 " sent, %" PRIu64 " received", i, sent, received);
		if (!received)
			fail("flow %u: nothing was received of %" PRIu64, i, sent);
	}
}

static void print_totals(const struct totals *peer)
{
	static const char *const names[] = { [IBV_QPT_RC] = "rc", [IBV_QPT_UC] = "uc",
					     [IBV_QPT_UD] = "ud" };
	uint64_t sent[IBV_QPT_UD + 1] = { 0 }, received[IBV_QPT_UD + 1] = { 0 }, messages = 0;

	for (uint32_t i = 0; i < FLOWS; i++) {
		sent[state.flow[i].type] += state.totals.sent[i] + peer->sent[i];
		received[state.flow[i].type] += state.totals.received[i] + peer->received[i];
		messages += state.totals.received[i] + peer->received[i];
	}
	printf("{\"program\":\"ud_srq\"");
	for (int type = IBV_QPT_RC; type <= IBV_QPT_UD; type++)
		if (names[type])
			printf(",\"%s_sent\":%" PRIu64 ",\"%s_received\":%" PRIu64, names[type],
			       sent[type], names[type], received[type]);
	printf(",\"messages\":%" PRIu64 ",\"bytes\":%" PRIu64 ",\"send_completions\":%" PRIu64
	       ",\"gone_on_without_news\":%" PRIu64 ",\"handle_checks\":%" PRIu64
	       ",\"checksums\":%s,\"seconds\":%.1f,\"errors\":0}\n",
	       messages, state.totals.bytes + peer->bytes,
	       state.totals.send_completions + peer->send_completions,
	       state.totals.gone_on + peer->gone_on,
	       state.totals.handle_checks + peer->handle_checks,
	       state.facts.checksum_fits ? "true" : "false", running_time());
}

int main(int count, char **arguments)
{
	struct totals peer;

	read_options(&state.options, count, arguments);
	state.socket = split_in_two();
	set_up(&state);
	running_time();
	if (side == 0) {
		printf("ready\n");
		fflush(stdout);
	}
	run();
	socket_send(state.socket, &state.totals, sizeof(state.totals));
	socket_receive(state.socket, &peer, sizeof(peer));
	check_totals(&peer);
	socket_barrier(state.socket);
	tear_down(&state);
	if (side == 0) {
		join_children();
		print_totals(&peer);
	}
	return 0;
}
