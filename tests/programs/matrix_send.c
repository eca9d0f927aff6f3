/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "extended.h"
#include "matrix.h"

#include <endian.h>
#include <inttypes.h>
#include <string.h>

/* A completion leads back to its lane and operation by its id, which means nothing to others. */
static uint64_t id_of(const struct lane *lane, uint64_t number)
{
	return ((uint64_t)lane->index << 48 | number) ^ mix(matrix.options.seed + side);
}

static uint64_t ticket_of(const struct lane *lane, uint64_t number)
{
	return key_of(lane->key, number, 't', 0);
}

/* Starts the next operation, and its record. */
static struct posted *begin(struct worker *worker, struct lane *lane, struct chain *chain, bool last)
{
	enum transport transport = lane->endpoint->transport;
	struct posted *posted = &lane->ring[lane->next % SEND_DEPTH];
	uint64_t limit = lane->sending->acknowledged + matrix.options.window;
	/* A UC or UD lane that may not go on has to know that all of it has left. */
	bool must_know = last || (!is_reliable(transport) && lane->next + 1 >= limit);

	*posted = (struct posted){
		.kind = kind_of(transport, lane->key, lane->next),
		.signaled = must_know || lane->unsignaled >= matrix.options.unsignaled ||
			    roll(&lane->random, 4) == 0,
		.length = length_of(transport, lane->key, lane->next),
	};
	lane->unsignaled = posted->signaled ? 0 : lane->unsignaled + 1;
	extend(chain, posted->kind, id_of(lane, lane->next))->send_flags =
		posted->signaled ? IBV_SEND_SIGNALED : 0;
	worker->counted[UNSIGNALED] += !posted->signaled;
	worker->counted[posted->kind]++;
	return posted;
}

/* Lays the content of a message or WRITE out in pieces, inline if it may be. */
static void add_content(struct worker *worker, struct lane *lane, struct chain *chain,
			struct posted *posted)
{
	struct ibv_send_wr *wr = &chain->wr[chain->length - 1];
	bool is_inline = matrix.options.inlined && posted->length <= lane->endpoint->max_inline;
	unsigned char *buffer = is_inline ? chain->small[chain->length - 1] :
					    ring_buffer(&matrix.out, lane, lane->next);
	struct header header = { lane->place, posted->length, lane->next };
	uint32_t before = is_message(posted->kind) && posted->kind != WRITE_IMM ? sizeof(header) : 0;
	unsigned char content[posted->length + 1];
	struct layout layout;

	memcpy(content, &header, before);
	fill(content + before, posted->length - before, content_of(lane->key, lane->next));
	make_layout(&lane->random, &layout, posted->length, matrix.options.sges);
	/* Inline content needs no key: the one given here is nobody's. */
	wr->num_sge = make_sges(&layout, wr->sg_list, buffer,
				is_inline ? 0xdeadbeef : matrix.out.mr->lkey);
	scatter(wr, content);
	if (is_inline)
		wr->send_flags |= IBV_SEND_INLINE;
	worker->counted[INLINED] += is_inline && posted->length;
	worker->counted[SCATTERED] += layout.pieces > 1;
	worker->counted[BYTES] += posted->length;
}

/* READs and atomics. */
static void add_result(struct lane *lane, struct chain *chain, struct posted *posted)
{
	const struct introduction *peer = &matrix.shared->introduction[lane->endpoint->peer];
	struct ibv_send_wr *wr = &chain->wr[chain->length - 1];
	unsigned char *result = ring_buffer(&matrix.results, lane, lane->next);
	uint64_t words = peer->words;

	poison(result, posted->length);
	wr->sg_list[0] = (struct ibv_sge){ (uintptr_t)result, posted->length,
					   matrix.results.mr->lkey };
	wr->num_sge = posted->length ? 1 : 0;
	if (posted->kind == READ) {
		posted->expected = library_key(lane->endpoint->peer);
		wr->wr.rdma.remote_addr = peer->library;
		wr->wr.rdma.rkey = peer->library_key;
		return;
	}
	wr->wr.atomic.rkey = peer->words_key;
	if (posted->kind == CMP_SWAP) {
		posted->expected = lane->ticket;
		wr->wr.atomic.compare_add = lane->ticket;
		wr->wr.atomic.swap = ticket_of(lane, lane->next);
		wr->wr.atomic.remote_addr = words + MAX_LANES * sizeof(uint64_t);
	} else {
		posted->expected = lane->counter;
		wr->wr.atomic.compare_add = content_of(lane->key, lane->next);
		wr->wr.atomic.remote_addr = words + lane->far * sizeof(uint64_t);
		lane->counter += wr->wr.atomic.compare_add;
	}
}

static void add_operation(struct worker *worker, struct lane *lane, struct chain *chain, bool last)
{
	const struct endpoint *endpoint = lane->endpoint;
	const struct introduction *peer = &matrix.shared->introduction[endpoint->peer];
	struct posted *posted = begin(worker, lane, chain, last);
	struct ibv_send_wr *wr = &chain->wr[chain->length - 1];

	if (posted->kind == READ || posted->kind == FETCH_ADD || posted->kind == CMP_SWAP)
		add_result(lane, chain, posted);
	else
		add_content(worker, lane, chain, posted);
	if (posted->kind == WRITE || posted->kind == WRITE_IMM) {
		wr->wr.rdma.remote_addr = peer->slots + slot_offset(lane->far, lane->next);
		wr->wr.rdma.rkey = peer->slots_key;
	}
	if (posted->kind == SEND_IMM || posted->kind == WRITE_IMM)
		wr->imm_data = htobe32(immediate_of(endpoint->key, lane->place, lane->next));
	if (endpoint->transport == UD) {
		wr->wr.ud.ah = endpoint->ah;
		wr->wr.ud.remote_qpn = peer->qp_num[endpoint->far];
		wr->wr.ud.remote_qkey = QKEY;
	}
	lane->next++;
	lane->last_sent = last;
}

/* All that was sent is over: the account can be read by others. */
static void close_account(struct lane *lane)
{
	if (!lane->last_sent || lane->retired != lane->next || lane->sending->ended != UINT64_MAX)
		return;
	lane->sending->counter = lane->counter;
	lane->sending->links = lane->links;
	lane->sending->ended = lane->next;
}

bool send_more(struct worker *worker, struct lane *lane)
{
	uint32_t wanted = 1 + roll(&lane->random, matrix.options.chain);
	struct ibv_send_wr *bad = NULL;
	struct chain chain = { 0 };
	uint64_t limit;
	int result;

	pthread_mutex_lock(&lane->lock);
	limit = lane->sending->acknowledged + matrix.options.window;
	while (!lane->last_sent && chain.length < wanted && lane->next < limit &&
	       lane->next - lane->retired < SEND_DEPTH)
		add_operation(worker, lane, &chain,
			      matrix.shared->stop || (matrix.options.messages &&
						      lane->next + 1 >= matrix.options.messages));
	/* Whoever is not heard of asks whether there is anything left to hear. */
	if (!chain.length && !is_reliable(lane->endpoint->transport) && lane->next == limit &&
	    lane->retired == lane->next)
		lane->sending->asked = lane->next;
	close_account(lane);
	pthread_mutex_unlock(&lane->lock);
	if (!chain.length)
		return false;
	result = matrix.options.extended ? extended_post(lane->endpoint->qp, chain.wr) :
					   ibv_post_send(lane->endpoint->qp, chain.wr, &bad);
	if (result)
		fail("%s: ibv_post_send of %u, bad_wr is number %td: %s",
		     describe(lane, "before", lane->next), chain.length, bad - chain.wr,
		     strerror(result));
	worker->counted[CHAINED] += chain.length > 1;
	spoil(&chain);
	return true;
}

/* The oldest request is over: look at what it brought. */
static void retire(struct worker *worker, struct lane *lane)
{
	const struct posted *posted = &lane->ring[lane->retired % SEND_DEPTH];
	unsigned char *result = ring_buffer(&matrix.results, lane, lane->retired);
	const char *what;
	uint64_t value;

	if (posted->kind != READ && posted->kind != FETCH_ADD && posted->kind != CMP_SWAP) {
		lane->retired++;
		return;
	}
	what = describe(lane, kind_name[posted->kind], lane->retired);
	if (posted->kind == READ)
		check_content(result, posted->length, posted->expected, what);
	memcpy(&value, result, 8);
	if (posted->kind == FETCH_ADD && value != posted->expected)
		fail("%s brought 0x%" PRIx64 ", expected 0x%" PRIx64, what, value,
		     posted->expected);
	if (posted->kind == CMP_SWAP && value != posted->expected)
		lane->ticket = value;
	if (posted->kind == CMP_SWAP && value == posted->expected) {
		lane->ticket = ticket_of(lane, lane->retired);
		lane->links += mix(lane->ticket) - mix(value);
		worker->counted[SWAPPED]++;
	}
	poison(result, posted->length);
	check_poison(result, posted->length + GAP, what);
	lane->retired++;
}

/* A completion of operation `number`. Fails if more are missing before it than others may hold. */
static void note_done(struct worker *worker, struct lane *lane, uint64_t number,
		      enum ibv_wc_opcode completed)
{
	enum kind kind = lane->ring[number % SEND_DEPTH].kind;
	uint32_t missing = 0;

	if (number < lane->retired || number >= lane->next ||
	    lane->ring[number % SEND_DEPTH].done || !lane->ring[number % SEND_DEPTH].signaled)
		fail("%s: not outstanding (%" PRIu64 " to %" PRIu64 "), or unsignaled: doubled",
		     describe(lane, "send completion", number), lane->retired, lane->next);
	if (completed != completed_as[kind])
		fail("%s: opcode %d, expected %d", describe(lane, kind_name[kind], number),
		     completed, completed_as[kind]);
	for (uint64_t i = lane->retired; i < number; i++) {
		const struct posted *posted = &lane->ring[i % SEND_DEPTH];

		missing += posted->signaled && !posted->done;
	}
	if (missing > most_missing(worker->poller))
		fail("%s: %u are missing before it: lost or out of order",
		     describe(lane, "send completion", number), missing);
	lane->ring[number % SEND_DEPTH].done = true;
	if (number > lane->newest_done)
		lane->newest_done = number;
	/* What is unsignaled before a completed one is over as well. */
	while (lane->retired < lane->next) {
		const struct posted *posted = &lane->ring[lane->retired % SEND_DEPTH];

		if (posted->signaled ? !posted->done : lane->retired > lane->newest_done)
			break;
		retire(worker, lane);
	}
}

static void take_one(struct worker *worker, const struct ibv_wc *wc)
{
	uint64_t id = wc->wr_id ^ mix(matrix.options.seed + side);
	struct lane *lane = &matrix.lane[id >> 48];
	uint64_t number = id & 0xffffffffffff;

	if (id >> 48 >= matrix.lanes)
		fail("send completion 0x%" PRIx64 " on QP 0x%x, status %d, was never asked for",
		     wc->wr_id, wc->qp_num, wc->status);
	if (wc->status)
		fail("%s: status %d (%s), vendor error 0x%x", describe(lane, "send", number),
		     wc->status, ibv_wc_status_str(wc->status), wc->vendor_err);
	if (wc->qp_num != lane->endpoint->qp->qp_num)
		fail("%s: the completion names QP 0x%x", describe(lane, "send", number),
		     wc->qp_num);
	pthread_mutex_lock(&lane->lock);
	note_done(worker, lane, number, wc->opcode);
	pthread_mutex_unlock(&lane->lock);
	worker->counted[SEND_COMPLETIONS]++;
	matrix.progress++;
}

bool take_send_completions(struct worker *worker)
{
	struct poller *poller = worker->poller;
	struct ibv_wc wc[BATCH];
	int asked = 1 + roll(&worker->random, BATCH), count;

	if (!poller->concurrent && pthread_mutex_trylock(&poller->lock))
		return false;
	count = (matrix.options.extended ? extended_poll : ibv_poll_cq)(
		poller->notify.cq[SEND_CQ], asked, wc);
	if (count < 0)
		fail("ibv_poll_cq: %d", count);
	note_poll(&poller->notify, SEND_CQ, count, asked);
	for (int i = 0; i < count; i++)
		take_one(worker, &wc[i]);
	if (!poller->concurrent)
		pthread_mutex_unlock(&poller->lock);
	return count > 0;
}
