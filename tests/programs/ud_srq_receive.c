/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "ud_srq.h"

#include <endian.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Where the IPv4 header lies in the 40 bytes before a UD message over RoCE v2. */
#define IPV4_AT 20

uint32_t length_of(const struct state *state, int from, uint32_t flow, uint64_t number)
{
	uint64_t choice = key_of(state->options.seed, from * FLOWS + flow, number, 'l');
	uint32_t largest = state->flow[flow].type == IBV_QPT_UD ? UD_LARGEST : LARGEST;
	uint32_t most = choice % 4 ? 200 : largest - sizeof(struct header);

	return sizeof(struct header) + (choice >> 32) % most;
}

uint64_t content_of(const struct state *state, int from, uint32_t flow, uint64_t number)
{
	return key_of(state->options.seed, from * FLOWS + flow, number, 'c');
}

bool has_immediate(uint64_t number)
{
	return number % 3 == 1;
}

static bool is_ipv4(const union ibv_gid *gid)
{
	static const uint8_t prefix[12] = { [10] = 0xff, [11] = 0xff };

	return memcmp(gid->raw, prefix, sizeof(prefix)) == 0;
}

static bool checksum_fits(const uint8_t *header)
{
	uint32_t sum = 0;

	for (int i = 0; i < 20; i += 2)
		sum += header[i] << 8 | header[i + 1];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum == 0xffff;
}

static void same_address(const uint8_t *now, const uint8_t *expected, size_t length,
			 const char *what)
{
	if (memcmp(now, expected, length))
		fail("UD packet: %s ends in %u.%u.%u.%u, expected %u.%u.%u.%u", what,
		     now[length - 4], now[length - 3], now[length - 2], now[length - 1],
		     expected[length - 4], expected[length - 3], expected[length - 2],
		     expected[length - 1]);
}

/* The addresses in front of a UD message must be the ones that both processes saw first, and
 * everything else that does not change from packet to packet must stay. */
static void check_grh(struct state *state, const struct ibv_wc *wc, const uint8_t *grh)
{
	struct packet_facts *facts = &state->facts;
	bool ipv4 = is_ipv4(&state->self.gid);

	if (!(wc->wc_flags & IBV_WC_GRH))
		fail("UD packet without IBV_WC_GRH, flags 0x%x", wc->wc_flags);
	if (ipv4) {
		same_address(grh + IPV4_AT + 12, state->peer.gid.raw + 12, 4, "source");
		same_address(grh + IPV4_AT + 16, state->self.gid.raw + 12, 4, "destination");
	} else {
		same_address(grh + 8, state->peer.gid.raw, 16, "source");
		same_address(grh + 24, state->self.gid.raw, 16, "destination");
	}
	if (!facts->known) {
		facts->known = true;
		memcpy(facts->grh, grh, GRH_BYTES);
		facts->checksum_fits = checksum_fits(grh + IPV4_AT);
		facts->slid = wc->slid;
		facts->sl = wc->sl;
		facts->pkey_index = wc->pkey_index;
	}
	/* Version, header length, type of service; time to live, protocol. */
	if (ipv4 && (memcmp(grh + IPV4_AT, facts->grh + IPV4_AT, 2) ||
		     memcmp(grh + IPV4_AT + 8, facts->grh + IPV4_AT + 8, 2)))
		fail("UD packet: the IPv4 header differs from the first one's");
	if (ipv4 && facts->checksum_fits && !checksum_fits(grh + IPV4_AT))
		fail("UD packet: the checksum of the IPv4 header does not fit any more");
	if (wc->slid != facts->slid || wc->sl != facts->sl || wc->pkey_index != facts->pkey_index)
		fail("UD packet: slid %u sl %u pkey_index %u, first seen as %u, %u, %u", wc->slid,
		     wc->sl, wc->pkey_index, facts->slid, facts->sl, facts->pkey_index);
}

/* Takes a completed buffer out of its pool. */
static uint32_t take_buffer(struct state *state, const struct ibv_wc *wc, enum pool pool)
{
	uint32_t index = (wc->wr_id ^ mix(state->options.seed + side) << 40) & 0xffff;

	if (index >= BUFFERS || !state->buffer[index].posted ||
	    buffer_id(state, index) != wc->wr_id)
		fail("receive completion 0x%" PRIx64
		     " belongs to no posted receive: doubled or invented",
		     wc->wr_id);
	if (state->buffer[index].pool != pool)
		fail("receive completion of pool %d on a queue pair of pool %d",
		     state->buffer[index].pool, pool);
	if (pool != POOL_SRQ && state->order[pool][state->first[pool] % pool_size(pool)] != index)
		fail("pool %d: receive completion out of order", pool);
	state->first[pool]++;
	return index;
}

static uint32_t queue_of(const struct state *state, const struct ibv_wc *wc)
{
	for (uint32_t i = 0; i < QUEUES; i++)
		if (state->queue[i].qp->qp_num == wc->qp_num)
			return i;
	fail("receive completion names QP 0x%x, which is not ours; status %d", wc->qp_num,
	     wc->status);
}

/* The flow that a message must belong to, from what the completion says. */
static uint32_t flow_of(const struct state *state, const struct ibv_wc *wc, uint32_t queue)
{
	if (queue >= FIRST_RC)
		return UDS * UDS + queue - FIRST_RC;
	for (uint32_t from = 0; from < UDS; from++)
		if (state->peer.qp_num[from] == wc->src_qp)
			return from * UDS + queue;
	fail("UD packet: src_qp is 0x%x, the peer has 0x%x and 0x%x", wc->src_qp,
	     state->peer.qp_num[0], state->peer.qp_num[1]);
}

static void check_number(struct flow *flow, const struct header *header, const char *what)
{
	if (flow->last_received)
		fail("%s: after the last one", what);
	if (header->number < flow->expected)
		fail("%s: number %" PRIu64 " came before: doubled or out of order", what,
		     header->number);
	if (flow->type == IBV_QPT_RC && header->number != flow->expected)
		fail("%s: number %" PRIu64 " after a gap: lost", what, header->number);
}

static void take_one(struct state *state, const struct ibv_wc *wc)
{
	uint32_t queue = queue_of(state, wc);
	enum pool pool = queue == 0 ? POOL_UD :
			 queue >= FIRST_UC ? POOL_UC + queue - FIRST_UC : POOL_SRQ;
	bool is_ud = queue < FIRST_RC;
	uint32_t before = is_ud ? GRH_BYTES : 0, index, which, length;
	struct header header;
	unsigned char *bytes;
	struct flow *flow;
	char what[100];

	if (wc->status)
		fail("QP %u (0x%x): receive completion with status %d (%s), vendor error 0x%x",
		     queue, wc->qp_num, wc->status, ibv_wc_status_str(wc->status), wc->vendor_err);
	index = take_buffer(state, wc, pool);
	bytes = state->in + index * (size_t)STRIDE;
	which = flow_of(state, wc, queue);
	flow = &state->flow[which];
	memcpy(&header, bytes + before, sizeof(header));
	snprintf(what, sizeof(what), "flow %u (%s), expected %" PRIu64 ", received %" PRIu64, which,
		 flow->type == IBV_QPT_UD ? "UD" : flow->type == IBV_QPT_RC ? "RC" : "UC",
		 flow->expected, flow->received);
	if (is_ud)
		check_grh(state, wc, bytes);
	if (header.flow != which)
		fail("%s: the header names flow %u", what, header.flow);
	check_number(flow, &header, what);
	length = header.last ? sizeof(header) : length_of(state, !side, which, header.number);
	if (header.length != length || wc->byte_len != before + length)
		fail("%s: message %" PRIu64 " of %u bytes has byte_len %u, %u in the header", what,
		     header.number, length, wc->byte_len, header.length);
	if (wc->opcode != IBV_WC_RECV)
		fail("%s: opcode %d", what, wc->opcode);
	if (!!(wc->wc_flags & IBV_WC_WITH_IMM) != has_immediate(header.number) ||
	    (has_immediate(header.number) && be32toh(wc->imm_data) != (uint32_t)header.number))
		fail("%s: flags 0x%x, immediate data 0x%x", what, wc->wc_flags,
		     be32toh(wc->imm_data));
	check_content(bytes + before + sizeof(header), length - sizeof(header),
		      content_of(state, !side, which, header.number), what);
	check_poison(bytes + before + length, MARGIN, what);
	poison(bytes, before + length);
	state->buffer[index].posted = false;
	flow->expected = header.number + 1;
	flow->received++;
	flow->last_received = header.last;
	state->totals.received[which]++;
	if (header.last && !state->options.messages)
		asked_to_stop = 1;
}

bool take_receive_completions(struct state *state)
{
	struct ibv_wc wc[16];
	int count = ibv_poll_cq(state->receive_cq, 1 + roll(&state->random, 16), wc);

	if (count < 0)
		fail("ibv_poll_cq: %d", count);
	for (int i = 0; i < count; i++)
		take_one(state, &wc[i]);
	if (count)
		for (int pool = 0; pool < (int)POOLS; pool++)
			post_buffers(state, pool);
	return count > 0;
}
