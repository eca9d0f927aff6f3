/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "rc_traffic.h"

#include <endian.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static uint32_t room(const struct stream *stream)
{
	return SEND_DEPTH - (stream->posted - stream->retired);
}

static unsigned char *ring_buffer(const struct traffic *traffic, unsigned char *region,
				  const struct stream *stream, uint64_t position)
{
	return region +
	       (stream->index * SEND_DEPTH + position % SEND_DEPTH) * buffer_size(traffic);
}

/* Starts the next work request of a chain, and its record. */
static struct posted *begin(struct traffic *traffic, struct stream *stream, struct chain *chain,
			    enum kind kind, bool force_signal)
{
	uint64_t position = stream->posted + chain->length;
	struct posted *posted = &stream->ring[position % SEND_DEPTH];
	struct ibv_send_wr *wr;

	*posted = (struct posted){
		.id = key_of(traffic->options.seed, side, stream->index, position),
		.number = stream->next_number,
		.kind = kind,
		.signaled = force_signal || stream->unsignaled + 1 >= MAX_UNSIGNALED ||
			    roll(&traffic->random, 4) == 0,
	};
	stream->unsignaled = posted->signaled ? 0 : stream->unsignaled + 1;
	wr = extend(chain, kind, posted->id);
	if (posted->signaled)
		wr->send_flags |= IBV_SEND_SIGNALED;
	return posted;
}

/* Hands the chain to the device, and spoils the inline content. */
static void post(struct traffic *traffic, struct stream *stream, struct chain *chain)
{
	struct ibv_send_wr *bad = NULL;
	int result = ibv_post_send(stream->qp, chain->wr, &bad);

	if (result)
		fail("QP %u: ibv_post_send of %u after %" PRIu64 " posted, %" PRIu64
		     " retired: %s, bad_wr is number %td",
		     stream->index, chain->length, stream->posted, stream->retired,
		     strerror(result), bad - chain->wr);
	for (uint32_t i = 0; i < chain->length; i++)
		traffic->totals.operations[stream->ring[(stream->posted + i) % SEND_DEPTH].kind]++;
	stream->posted += chain->length;
	spoil(chain);
}

/* Lays the content of a message or WRITE out in pieces, inline if it may be. */
static void add_content(struct traffic *traffic, struct stream *stream, struct chain *chain,
			struct posted *posted)
{
	uint32_t index = chain->length - 1;
	struct ibv_send_wr *wr = &chain->wr[index];
	uint64_t position = stream->posted + index;
	bool is_inline = posted->length <= stream->max_inline && roll(&traffic->random, 2);
	unsigned char *buffer = is_inline ? chain->small[index] :
					    ring_buffer(traffic, traffic->out, stream, position);
	unsigned char content[posted->length + 1];
	struct layout layout;

	fill(content, posted->length, content_of(traffic, side, stream->index, posted->number));
	make_layout(&traffic->random, &layout, posted->length, MAX_SGE);
	/* Inline content needs no key: the one given here is nobody's. */
	wr->num_sge = make_sges(&layout, wr->sg_list, buffer,
				is_inline ? 0xdeadbeef : traffic->out_mr->lkey);
	scatter(wr, content);
	if (is_inline)
		wr->send_flags |= IBV_SEND_INLINE;
	traffic->totals.bytes += posted->length;
}

static void add_read(struct traffic *traffic, struct stream *stream, struct chain *chain,
		     struct posted *posted)
{
	uint32_t index = chain->length - 1, page = posted->number % traffic->options.qps;
	struct ibv_send_wr *wr = &chain->wr[index];
	unsigned char *result =
		ring_buffer(traffic, traffic->results, stream, stream->posted + index);

	poison(result, posted->length);
	wr->sg_list[0] = (struct ibv_sge){ (uintptr_t)result, posted->length,
					   traffic->results_mr->lkey };
	wr->num_sge = posted->length ? 1 : 0;
	wr->wr.rdma.remote_addr =
		traffic->peer.library + page * (uint64_t)traffic->options.max_size;
	wr->wr.rdma.rkey = traffic->peer.library_key;
	posted->expected = library_key(traffic, !side, page);
}

/* Nobody else writes the two counters of a queue pair, so what an atomic must return is known
 * exactly. The counter that all queue pairs share is only summed. */
static void add_atomic(struct traffic *traffic, struct stream *stream, struct chain *chain,
		       struct posted *posted)
{
	uint32_t index = chain->length - 1, counter = 2 * stream->index;
	struct ibv_send_wr *wr = &chain->wr[index];
	unsigned char *result =
		ring_buffer(traffic, traffic->results, stream, stream->posted + index);
	uint64_t value = content_of(traffic, side, stream->index, posted->number);

	poison(result, 8);
	posted->length = 8;
	posted->check_result = true;
	if (posted->kind == CMP_SWAP) {
		bool must_miss = value % 4 == 0;

		counter++;
		posted->expected = stream->swapped;
		wr->wr.atomic.compare_add = must_miss ? ~stream->swapped : stream->swapped;
		wr->wr.atomic.swap = value;
		if (!must_miss)
			stream->swapped = value;
	} else if (value % 4 == 0) {
		counter = 2 * traffic->options.qps;
		posted->check_result = false;
		wr->wr.atomic.compare_add = value;
		traffic->totals.shared_added += value;
	} else {
		posted->expected = stream->added;
		wr->wr.atomic.compare_add = value;
		stream->added += value;
	}
	wr->wr.atomic.remote_addr = traffic->peer.counters + counter * sizeof(uint64_t);
	wr->wr.atomic.rkey = traffic->peer.counters_key;
	wr->sg_list[0] = (struct ibv_sge){ (uintptr_t)result, 8, traffic->results_mr->lkey };
	wr->num_sge = 1;
}

static void add_operation(struct traffic *traffic, struct stream *stream, struct chain *chain,
			  bool last)
{
	uint64_t number = stream->next_number;
	enum kind kind = last ? SEND_IMM : kind_of(traffic, side, stream->index, number);
	struct posted *posted = begin(traffic, stream, chain, kind, last);
	struct ibv_send_wr *wr = &chain->wr[chain->length - 1];

	posted->length = last ? 0 : length_of(traffic, side, stream->index, number);
	switch (kind) {
	case READ:
		add_read(traffic, stream, chain, posted);
		break;
	case FETCH_ADD:
	case CMP_SWAP:
		add_atomic(traffic, stream, chain, posted);
		break;
	default:
		add_content(traffic, stream, chain, posted);
	}
	if (kind == WRITE || kind == WRITE_IMM) {
		wr->wr.rdma.remote_addr =
			traffic->peer.slots + slot_offset(traffic, stream->index, number);
		wr->wr.rdma.rkey = traffic->peer.slots_key;
	}
	if (kind == SEND_IMM || kind == WRITE_IMM)
		wr->imm_data = htobe32(immediate_of(traffic, side, stream->index, number) |
				       (last ? LAST_FLAG : 0));
	if (kind != WRITE && kind != READ && roll(&traffic->random, 4) == 0)
		wr->send_flags |= IBV_SEND_SOLICITED;
	stream->next_number++;
	stream->last_sent = last;
}

/* Looks at what the other side has written about this stream. */
static void read_acknowledgement(struct traffic *traffic, struct stream *stream)
{
	/* The device writes here: read it anew each time. */
	volatile struct acknowledgement *there =
		(void *)(traffic->slots + acknowledgement_offset(traffic, stream->index));
	uint64_t verified = there->verified, proof = there->proof;

	if (proof != proof_of(verified))
		return;
	if (verified < stream->acknowledged || verified > stream->next_number)
		fail("QP %u: acknowledged up to %" PRIu64 " after %" PRIu64 ", sent are %" PRIu64,
		     stream->index, verified, stream->acknowledged, stream->next_number);
	stream->acknowledged = verified;
}

bool send_more(struct traffic *traffic, struct stream *stream)
{
	uint64_t messages = traffic->options.messages;
	struct chain chain = { 0 };
	uint32_t wanted = 1 + roll(&traffic->random, MAX_CHAIN);

	read_acknowledgement(traffic, stream);
	/* One place stays free for an acknowledgement. */
	while (!stream->last_sent && chain.length < wanted && chain.length + 1 < room(stream) &&
	       stream->next_number < stream->acknowledged + traffic->options.window) {
		bool enough = asked_to_stop || (messages && stream->next_number >= messages);

		add_operation(traffic, stream, &chain, enough && stream->next_number % 4 == 3);
	}
	if (!chain.length)
		return false;
	post(traffic, stream, &chain);
	return true;
}

bool send_acknowledgement(struct traffic *traffic, struct stream *stream)
{
	struct chain chain = { 0 };
	struct acknowledgement *value = (void *)chain.small[0];
	struct ibv_send_wr *wr = chain.wr;
	/* A quarter of a window at a time is enough to keep the sender going. */
	bool due = stream->verified - stream->said >= traffic->options.window / 4 ||
		   (stream->last_received && !stream->last_said);

	if (!due || !room(stream))
		return false;
	/* What is not acknowledged yet, the sender may not write again. */
	for (uint64_t number = stream->said; number < stream->verified; number++)
		check_poison(traffic->slots + slot_offset(traffic, stream->index, number), GAP,
			     "memory of a WRITE that was verified");
	begin(traffic, stream, &chain, ACK, stream->last_received);
	value->verified = stream->verified;
	value->proof = proof_of(stream->verified);
	wr->sg_list[0] = (struct ibv_sge){ (uintptr_t)value, sizeof(*value), 0 };
	wr->num_sge = 1;
	wr->send_flags |= IBV_SEND_INLINE;
	wr->wr.rdma.remote_addr =
		traffic->peer.slots + acknowledgement_offset(traffic, stream->index);
	wr->wr.rdma.rkey = traffic->peer.slots_key;
	post(traffic, stream, &chain);
	stream->said = stream->verified;
	stream->last_said = stream->last_received;
	return true;
}

/* The oldest request is over: look at what it brought. */
static void retire(struct traffic *traffic, struct stream *stream)
{
	const struct posted *posted = &stream->ring[stream->retired % SEND_DEPTH];
	unsigned char *result = ring_buffer(traffic, traffic->results, stream, stream->retired);
	char what[80];
	uint64_t value;

	snprintf(what, sizeof(what), "QP %u: result of operation %" PRIu64, stream->index,
		 posted->number);
	if (posted->kind == READ) {
		check_content(result, posted->length, posted->expected, what);
		poison(result, posted->length);
	}
	if (posted->kind == FETCH_ADD || posted->kind == CMP_SWAP) {
		memcpy(&value, result, 8);
		if (posted->check_result && value != posted->expected)
			fail("%s (%s) is 0x%" PRIx64 ", expected 0x%" PRIx64, what,
			     posted->kind == FETCH_ADD ? "fetch and add" : "compare and swap",
			     value, posted->expected);
		poison(result, 8);
	}
	check_poison(result + posted->length, GAP, what);
	stream->retired++;
}

static struct stream *stream_of(struct traffic *traffic, const struct ibv_wc *wc)
{
	for (uint32_t i = 0; i < traffic->options.qps; i++)
		if (traffic->stream[i].qp->qp_num == wc->qp_num)
			return &traffic->stream[i];
	fail("send completion names QP 0x%x, which is not ours; status %d", wc->qp_num, wc->status);
}

static void take_one(struct traffic *traffic, const struct ibv_wc *wc)
{
	struct stream *stream = stream_of(traffic, wc);
	const struct posted *posted;

	if (wc->status)
		fail("QP %u (0x%x): send completion with status %d (%s), vendor error 0x%x, id 0x%" PRIx64
		     ", posted %" PRIu64 ", retired %" PRIu64,
		     stream->index, wc->qp_num, wc->status, ibv_wc_status_str(wc->status),
		     wc->vendor_err, wc->wr_id, stream->posted, stream->retired);
	/* What is unsignaled before it is over as well. */
	while (stream->retired < stream->posted &&
	       !stream->ring[stream->retired % SEND_DEPTH].signaled)
		retire(traffic, stream);
	if (stream->retired == stream->posted)
		fail("QP %u: send completion 0x%" PRIx64 ", but nothing is outstanding: doubled",
		     stream->index, wc->wr_id);
	posted = &stream->ring[stream->retired % SEND_DEPTH];
	if (wc->wr_id != posted->id)
		fail("QP %u: send completion 0x%" PRIx64 " instead of 0x%" PRIx64
		     " (operation %" PRIu64 ", kind %d): lost, doubled or out of order",
		     stream->index, wc->wr_id, posted->id, posted->number, posted->kind);
	if (wc->opcode != completed_as[posted->kind])
		fail("QP %u: completion of kind %d has opcode %d, expected %d", stream->index,
		     posted->kind, wc->opcode, completed_as[posted->kind]);
	retire(traffic, stream);
	traffic->totals.send_completions++;
}

bool take_send_completions(struct traffic *traffic)
{
	struct ibv_wc wc[16];
	int asked = 1 + roll(&traffic->random, 16);
	int count = ibv_poll_cq(traffic->notify.cq[SEND_CQ], asked, wc);

	if (count < 0)
		fail("ibv_poll_cq: %d", count);
	note_poll(&traffic->notify, SEND_CQ, count, asked);
	for (int i = 0; i < count; i++)
		take_one(traffic, &wc[i]);
	return count > 0;
}
