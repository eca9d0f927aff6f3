/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "extended.h"
#include "matrix.h"

#include <endian.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

/* With --rnr receives are posted only after this many loops without anything to do. */
#define LATE 8
/* After this many polls in vain the network is taken to have nothing more for us. */
#define QUIET 500
/* Receives in one chain. */
#define CHAIN 32

static uint64_t receive_id(uint32_t index)
{
	return ((uint64_t)matrix.buffer[index].generation << 16 | index) ^
	       mix(matrix.options.seed + MAX_PROCESSES + side);
}

static unsigned char *receive_buffer(uint32_t index)
{
	return matrix.in.bytes + index * stride();
}

/* Posts at most one chain; says whether there may be more to post. */
static bool post_chain(struct pool *pool)
{
	uint32_t room = GRH_BYTES + matrix.options.max_size, count = 0;
	struct ibv_recv_wr wr[CHAIN], *bad = NULL;
	struct ibv_sge sge[CHAIN][MAX_SGE];
	int result;

	pthread_mutex_lock(&pool->lock);
	for (; pool->idles && count < CHAIN; count++) {
		uint32_t index = pool->idle[--pool->idles];
		struct buffer *buffer = &matrix.buffer[index];

		buffer->posted = true;
		buffer->generation++;
		buffer->place = pool->posted++;
		make_layout(&pool->random, &buffer->layout, room, matrix.options.sges);
		wr[count] = (struct ibv_recv_wr){
			.wr_id = receive_id(index),
			.sg_list = sge[count],
			.num_sge = make_sges(&buffer->layout, sge[count], receive_buffer(index),
					     matrix.in.mr->lkey),
		};
		if (count)
			wr[count - 1].next = &wr[count];
	}
	pthread_mutex_unlock(&pool->lock);
	if (!count)
		return false;
	result = pool->srq ? ibv_post_srq_recv(pool->srq, wr, &bad) :
			     ibv_post_recv(pool->qp, wr, &bad);
	if (result)
		fail("%s: posting %u receives: %s, bad_wr is number %td",
		     pool->srq ? "SRQ" : "queue pair", count, strerror(result), bad - wr);
	return count == CHAIN;
}

void post_receives(struct pool *pool)
{
	while (post_chain(pool))
		;
}

/* The buffer that a completion is about. */
static uint32_t find_buffer(struct pool *pool, const struct ibv_wc *wc)
{
	uint64_t id = wc->wr_id ^ mix(matrix.options.seed + MAX_PROCESSES + side);
	uint32_t index = id & 0xffff;

	pthread_mutex_lock(&pool->lock);
	if (index < pool->first || index >= pool->first + pool->count ||
	    !matrix.buffer[index].posted || matrix.buffer[index].generation != id >> 16)
		fail("receive completion 0x%" PRIx64
		     " on QP 0x%x belongs to no posted receive of it: doubled or invented",
		     wc->wr_id, wc->qp_num);
	if (pool->in_order && matrix.buffer[index].place != pool->completed)
		fail("receive completion %" PRIu64 " on QP 0x%x instead of %" PRIu64
		     ": lost, doubled or out of order",
		     matrix.buffer[index].place, wc->qp_num, pool->completed);
	matrix.buffer[index].posted = false;
	pool->completed++;
	pthread_mutex_unlock(&pool->lock);
	return index;
}

static void drop_buffer(struct pool *pool, uint32_t index)
{
	pthread_mutex_lock(&pool->lock);
	pool->idle[pool->idles++] = index;
	pthread_mutex_unlock(&pool->lock);
}

/* Checks what a WRITE has put into its slot, and poisons it again. A lost one may have left a part. */
static void check_slot(struct lane *lane, uint64_t number, bool lost)
{
	enum transport transport = lane->endpoint->transport;
	uint32_t length = length_of(transport, lane->peer_key, number);
	unsigned char *slot = matrix.slots.bytes + slot_offset(lane->index, number);
	uint64_t content = content_of(lane->peer_key, number);
	const char *what = describe(lane, "WRITE", number);
	unsigned char whole[length + 8];

	if (lost) {
		fill(whole, length, content);
		for (uint32_t i = 0; i < length; i++)
			if (slot[i] == POISON)
				slot[i] = whole[i];
	}
	check_content(slot, length, content, what);
	check_poison(slot + length, GAP, what);
	poison(slot, length);
}

/* A message of an RC lane. Those before it must have come, but for what other threads hold. */
static void note_in_order(struct worker *worker, struct lane *lane, uint64_t number)
{
	enum transport transport = lane->endpoint->transport;
	uint32_t missing = 0;

	for (uint64_t i = lane->verified; i < number; i++)
		missing += is_message(kind_of(transport, lane->peer_key, i)) &&
			   !lane->seen[i % MAX_WINDOW];
	if (missing > most_missing(worker->poller) || lane->seen[number % MAX_WINDOW])
		fail("%s: %u are missing before it: lost, doubled or out of order",
		     describe(lane, "message", number), missing);
	lane->seen[number % MAX_WINDOW] = true;
	if (number + 1 > lane->newest)
		lane->newest = number + 1;
	for (; lane->verified < lane->newest; lane->verified++) {
		enum kind kind = kind_of(transport, lane->peer_key, lane->verified);

		if (is_message(kind) && !lane->seen[lane->verified % MAX_WINDOW])
			break;
		lane->seen[lane->verified % MAX_WINDOW] = false;
		/* RC executes in order: what was written before a message is there. */
		if (kind == WRITE)
			check_slot(lane, lane->verified, false);
	}
}

/* A UC or UD lane goes on to `number`; what was skipped is lost. */
static void skip_to(struct worker *worker, struct lane *lane, uint64_t number)
{
	for (; lane->verified < number; lane->verified++) {
		enum kind kind =
			kind_of(lane->endpoint->transport, lane->peer_key, lane->verified);

		worker->counted[LOST] += is_message(kind);
		if (kind == WRITE || kind == WRITE_IMM)
			check_slot(lane, lane->verified, true);
	}
}

/* Checks one message; `bytes` are what it put into its receive. */
static void check_message(struct worker *worker, struct lane *lane, uint64_t number,
			  const struct ibv_wc *wc, const unsigned char *bytes, uint32_t length)
{
	const struct endpoint *endpoint = lane->endpoint;
	enum kind kind = kind_of(endpoint->transport, lane->peer_key, number);
	const char *what;

	if (number < lane->verified || number >= lane->receiving->acknowledged + matrix.options.window)
		fail("%s: expected %" PRIu64 ": doubled or out of order",
		     describe(lane, "message", number), lane->verified);
	what = describe(lane, kind_name[kind], number);
	if (wc->opcode != (kind == WRITE_IMM ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV))
		fail("%s: receive completion has opcode %d", what, wc->opcode);
	if (!!(wc->wc_flags & IBV_WC_WITH_IMM) != (kind != SEND))
		fail("%s: flags are 0x%x", what, wc->wc_flags);
	if (kind != SEND && be32toh(wc->imm_data) !=
				    immediate_of(endpoint->peer_key, lane->place, number))
		fail("%s: immediate data 0x%x", what, be32toh(wc->imm_data));
	if (length != length_of(endpoint->transport, lane->peer_key, number))
		fail("%s: byte_len %u", what, wc->byte_len);
	if (kind == WRITE_IMM)
		check_slot(lane, number, false);
	else
		check_content(bytes + sizeof(struct header), length - sizeof(struct header),
			      content_of(lane->peer_key, number), what);
	if (is_reliable(endpoint->transport)) {
		note_in_order(worker, lane, number);
	} else {
		skip_to(worker, lane, number);
		lane->verified++;
	}
	if (lane->receiving->acknowledged < lane->verified)
		lane->receiving->acknowledged = lane->verified;
	worker->counted[MESSAGES]++;
}

/* The lane and the number of a message, from its immediate data (which it must have) or header. */
static struct lane *identify(const struct endpoint *endpoint, const struct ibv_wc *wc,
			     const struct header *header, uint64_t *number)
{
	uint32_t word = be32toh(wc->imm_data) ^ (uint32_t)endpoint->peer_key;
	bool written = wc->opcode == IBV_WC_RECV_RDMA_WITH_IMM;
	uint32_t place = written ? word >> 24 : header->lane;
	uint64_t verified;

	if (place >= endpoint->lanes)
		fail("QP 0x%x: a message (opcode %d, immediate data 0x%x) names lane %u",
		     wc->qp_num, wc->opcode, be32toh(wc->imm_data), place);
	pthread_mutex_lock(&endpoint->lane[place].lock);
	verified = endpoint->lane[place].verified;
	*number = written ? verified + ((word - verified) & 0xffffff) : header->number;
	return &endpoint->lane[place];
}

static struct pool *take_one(struct worker *worker, const struct ibv_wc *wc)
{
	unsigned char content[GRH_BYTES + matrix.options.max_size + 8];
	struct endpoint *endpoint = NULL;
	uint32_t index, before, received;
	struct header header;
	struct lane *lane;
	uint64_t number;

	for (uint32_t i = 0; i < matrix.endpoints; i++)
		if (matrix.endpoint[i].qp->qp_num == wc->qp_num)
			endpoint = &matrix.endpoint[i];
	if (!endpoint)
		fail("receive completion names QP 0x%x, which is not ours; status %d", wc->qp_num,
		     wc->status);
	if (wc->status)
		fail("QP 0x%x: receive completion with status %d (%s), vendor error 0x%x",
		     wc->qp_num, wc->status, ibv_wc_status_str(wc->status), wc->vendor_err);
	index = find_buffer(endpoint->pool, wc);
	before = endpoint->transport == UD ? GRH_BYTES : 0;
	received = wc->opcode == IBV_WC_RECV_RDMA_WITH_IMM ? 0 : wc->byte_len;
	if (received > GRH_BYTES + matrix.options.max_size ||
	    (wc->opcode == IBV_WC_RECV && received < before + sizeof(header)))
		fail("QP 0x%x: byte_len %u", wc->qp_num, wc->byte_len);
	gather(&matrix.buffer[index].layout, receive_buffer(index), content, received,
	       "a receive buffer");
	memcpy(&header, content + before, sizeof(header));
	lane = identify(endpoint, wc, &header, &number);
	if (before && (!(wc->wc_flags & IBV_WC_GRH) ||
		       wc->src_qp != matrix.shared->introduction[endpoint->peer].qp_num[endpoint->far]))
		fail("%s: flags 0x%x, src_qp 0x%x", describe(lane, "message", number), wc->wc_flags,
		     wc->src_qp);
	check_message(worker, lane, number, wc, content + before, wc->byte_len - before);
	pthread_mutex_unlock(&lane->lock);
	drop_buffer(endpoint->pool, index);
	worker->counted[RECEIVE_COMPLETIONS]++;
	matrix.progress++;
	return endpoint->pool;
}

bool take_receive_completions(struct worker *worker)
{
	struct poller *poller = worker->poller;
	int asked = 1 + roll(&worker->random, BATCH), count;
	struct pool *pool[BATCH];
	struct ibv_wc wc[BATCH];

	if (!poller->concurrent && pthread_mutex_trylock(&poller->lock))
		return false;
	count = (matrix.options.extended ? extended_poll : ibv_poll_cq)(
		poller->notify.cq[RECEIVE_CQ], asked, wc);
	if (count < 0)
		fail("ibv_poll_cq: %d", count);
	note_poll(&poller->notify, RECEIVE_CQ, count, asked);
	poller->polls++;
	if (count)
		poller->found_at = poller->polls;
	for (int i = 0; i < count; i++)
		pool[i] = take_one(worker, &wc[i]);
	if (!poller->concurrent)
		pthread_mutex_unlock(&poller->lock);
	if (count && matrix.options.slow_receiver && roll(&worker->random, 4) == 0)
		usleep(roll(&worker->random, 8000));
	for (int i = 0; i < count && !matrix.options.rnr; i++)
		post_receives(pool[i]);
	return count > 0;
}

bool post_late_receives(struct worker *worker)
{
	if (!matrix.options.rnr || worker->idle < LATE)
		return false;
	for (uint32_t i = 0; i < matrix.pools; i++) {
		worker->counted[LATE_RECEIVES] += matrix.pool[i].idles;
		post_receives(&matrix.pool[i]);
	}
	worker->idle = 0;
	return true;
}

/* Whether the network has had time to bring what a UC or UD sender has said of. */
static bool is_quiet(struct worker *worker, struct lane *lane, uint64_t told)
{
	uint64_t polls = worker->poller->polls, found_at = worker->poller->found_at;

	if (lane->told != told) {
		lane->told = told;
		lane->told_at = polls;
	}
	return polls >= lane->told_at + QUIET && polls >= found_at + QUIET;
}

void follow(struct worker *worker, struct lane *lane)
{
	enum transport transport = lane->endpoint->transport;
	struct flow *flow = lane->receiving;
	uint64_t ended = flow->ended, asked = flow->asked;

	pthread_mutex_lock(&lane->lock);
	if (!is_reliable(transport)) {
		/* It may also be that completions are held back for a checkpoint. So nothing is
		 * skipped, and the sender gets one window ahead, for which there are slots. */
		if (ended != UINT64_MAX)
			lane->complete |= is_quiet(worker, lane, ended);
		else if (asked > flow->acknowledged &&
			 asked <= lane->verified + matrix.options.window &&
			 is_quiet(worker, lane, asked))
			flow->acknowledged = asked;
	} else if (ended != UINT64_MAX && !lane->complete) {
		/* The sender knows that all is executed, so that no message needs to say so. */
		for (; lane->verified < ended; lane->verified++) {
			enum kind kind = kind_of(transport, lane->peer_key, lane->verified);

			if (is_message(kind))
				break;
			if (kind == WRITE)
				check_slot(lane, lane->verified, false);
		}
		flow->acknowledged = lane->verified;
		lane->complete = lane->verified == ended;
	}
	pthread_mutex_unlock(&lane->lock);
}

void check_memory(struct worker *worker)
{
	const uint64_t *words = (void *)matrix.words.bytes;
	uint64_t links = 0;

	for (uint32_t i = 0; i < matrix.lanes; i++) {
		struct lane *lane = &matrix.lane[i];

		if (is_reliable(lane->endpoint->transport) && lane->verified != lane->receiving->ended)
			fail("%s of %" PRIu64, describe(lane, "verified up to", lane->verified),
			     lane->receiving->ended);
		skip_to(worker, lane, lane->receiving->ended);
		if (words[i] != lane->receiving->counter)
			fail("%s is 0x%" PRIx64 ", the other side made it 0x%" PRIx64,
			     describe(lane, "counter", i), words[i], lane->receiving->counter);
		links += lane->receiving->links;
	}
	/* Each link takes one ticket away and puts the next there, so all but the ends cancel out. */
	if (mix(words[MAX_LANES]) - mix(first_ticket(side)) != links)
		fail("the chain of tickets is broken: the last is 0x%" PRIx64, words[MAX_LANES]);
	check_poison(matrix.slots.bytes, matrix.slots.length, "memory for WRITEs");
	check_poison(matrix.results.bytes, matrix.results.length, "memory for results");
	check_content(matrix.library.bytes, matrix.library.length, library_key(side),
		      "memory that is only read");
}
