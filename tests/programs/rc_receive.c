/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "rc_traffic.h"

#include <endian.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* With --rnr receives are posted only after this many loops without anything to do. */
#define LATE 8

static uint64_t receive_id(const struct traffic *traffic, const struct stream *stream,
			   uint64_t position)
{
	return key_of(traffic->options.seed, side, ~(uint64_t)stream->index, position);
}

static unsigned char *receive_buffer(const struct traffic *traffic, const struct stream *stream,
				     uint64_t position)
{
	return traffic->in +
	       (stream->index * traffic->receive_depth + position % traffic->receive_depth) *
		       buffer_size(traffic);
}

/* Posts as many receives as have room, as one chain. */
void post_receives(struct traffic *traffic, struct stream *stream)
{
	uint32_t depth = traffic->receive_depth, count = 0;
	struct ibv_recv_wr wr[WATCHED], *bad = NULL;
	struct ibv_sge sge[WATCHED][MAX_SGE];
	int result;

	for (; stream->receives_posted + count < stream->received + depth; count++) {
		uint64_t position = stream->receives_posted + count;
		struct layout *layout = &stream->layout[position % depth];

		make_layout(&traffic->random, layout, traffic->options.max_size, MAX_SGE);
		wr[count] = (struct ibv_recv_wr){
			.wr_id = receive_id(traffic, stream, position),
			.sg_list = sge[count],
			.num_sge = make_sges(layout, sge[count],
					     receive_buffer(traffic, stream, position),
					     traffic->in_mr->lkey),
		};
		if (count)
			wr[count - 1].next = &wr[count];
	}
	if (!count)
		return;
	result = ibv_post_recv(stream->qp, wr, &bad);
	if (result)
		fail("QP %u: ibv_post_recv of %u: %s, bad_wr is number %td", stream->index, count,
		     strerror(result), bad - wr);
	stream->receives_posted += count;
}

/* Gathers what was received, and checks it and everything around it. */
static void check_received(struct traffic *traffic, struct stream *stream, uint64_t position,
			   uint32_t length, uint64_t key, const char *what)
{
	unsigned char content[length + 1];

	gather(&stream->layout[position % traffic->receive_depth],
	       receive_buffer(traffic, stream, position), content, length, what);
	check_content(content, length, key, what);
}

/* Checks what a WRITE has put into its slot, and poisons it again. */
static void check_slot(struct traffic *traffic, struct stream *stream, uint64_t number)
{
	uint32_t length = length_of(traffic, !side, stream->index, number);
	unsigned char *slot = traffic->slots + slot_offset(traffic, stream->index, number);
	char what[80];

	snprintf(what, sizeof(what), "QP %u: WRITE %" PRIu64 " of %u bytes", stream->index, number,
		 length);
	check_content(slot, length, content_of(traffic, !side, stream->index, number), what);
	check_poison(slot + length, GAP, what);
	poison(slot, length);
}

static void check_message(struct traffic *traffic, struct stream *stream, const struct ibv_wc *wc,
			  uint64_t position)
{
	uint64_t number = stream->verified;
	enum kind kind = kind_of(traffic, !side, stream->index, number);
	uint32_t length = length_of(traffic, !side, stream->index, number);
	uint32_t immediate = immediate_of(traffic, !side, stream->index, number);
	uint32_t got = wc->wc_flags & IBV_WC_WITH_IMM ? be32toh(wc->imm_data) : 0;
	bool last = number % 4 == 3 && got == (immediate | LAST_FLAG);
	char what[80];

	if (last) {
		kind = SEND_IMM;
		length = 0;
		immediate |= LAST_FLAG;
	}
	snprintf(what, sizeof(what), "QP %u: message %" PRIu64 " (kind %d, %u bytes)",
		 stream->index, number, kind, length);
	if (wc->opcode != (kind == WRITE_IMM ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV))
		fail("%s: receive completion has opcode %d", what, wc->opcode);
	if (!!(wc->wc_flags & IBV_WC_WITH_IMM) != (kind != SEND))
		fail("%s: flags are 0x%x", what, wc->wc_flags);
	if (kind != SEND && got != immediate)
		fail("%s: immediate data 0x%x, expected 0x%x: lost, doubled or out of order", what,
		     got, immediate);
	if (wc->byte_len != length)
		fail("%s: byte_len is %u", what, wc->byte_len);
	if (kind == WRITE_IMM)
		check_slot(traffic, stream, number);
	check_received(traffic, stream, position, kind == WRITE_IMM ? 0 : length,
		       content_of(traffic, !side, stream->index, number), what);
	stream->last_received = last;
	stream->verified++;
	traffic->totals.messages++;
	/* Whoever hears that the other side was told to stop, ends too. */
	if (last && !traffic->options.messages)
		asked_to_stop = 1;
}

static void take_one(struct traffic *traffic, const struct ibv_wc *wc)
{
	struct stream *stream = NULL;
	uint64_t position;

	for (uint32_t i = 0; i < traffic->options.qps; i++)
		if (traffic->stream[i].qp->qp_num == wc->qp_num)
			stream = &traffic->stream[i];
	if (!stream)
		fail("receive completion names QP 0x%x, which is not ours; status %d", wc->qp_num,
		     wc->status);
	if (wc->status)
		fail("QP %u (0x%x): receive completion with status %d (%s), vendor error 0x%x",
		     stream->index, wc->qp_num, wc->status, ibv_wc_status_str(wc->status),
		     wc->vendor_err);
	position = stream->received;
	if (position == stream->receives_posted)
		fail("QP %u: receive completion 0x%" PRIx64 ", but no receive is posted: doubled",
		     stream->index, wc->wr_id);
	if (wc->wr_id != receive_id(traffic, stream, position))
		fail("QP %u: receive completion 0x%" PRIx64 " instead of 0x%" PRIx64
		     ": lost, doubled or out of order",
		     stream->index, wc->wr_id, receive_id(traffic, stream, position));
	if (stream->last_received)
		fail("QP %u: a message after the last one", stream->index);
	/* RC executes in order: what was written before this message is there. */
	for (;; stream->verified++) {
		enum kind kind = kind_of(traffic, !side, stream->index, stream->verified);

		if (is_message(kind))
			break;
		if (kind == WRITE)
			check_slot(traffic, stream, stream->verified);
	}
	check_message(traffic, stream, wc, position);
	stream->received++;
	traffic->totals.receive_completions++;
}

bool take_receive_completions(struct traffic *traffic)
{
	struct ibv_wc wc[16];
	int asked = 1 + roll(&traffic->random, 16);
	int count = ibv_poll_cq(traffic->notify.cq[RECEIVE_CQ], asked, wc);

	if (count < 0)
		fail("ibv_poll_cq: %d", count);
	note_poll(&traffic->notify, RECEIVE_CQ, count, asked);
	for (int i = 0; i < count; i++)
		take_one(traffic, &wc[i]);
	if (count && !traffic->options.rnr)
		for (uint32_t i = 0; i < traffic->options.qps; i++)
			post_receives(traffic, &traffic->stream[i]);
	return count > 0;
}

bool post_late_receives(struct traffic *traffic)
{
	if (!traffic->options.rnr || traffic->idle < LATE)
		return false;
	for (uint32_t i = 0; i < traffic->options.qps; i++)
		post_receives(traffic, &traffic->stream[i]);
	traffic->idle = 0;
	return true;
}
