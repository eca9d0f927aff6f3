/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "stream.h"

#include <poll.h>
#include <sched.h>
#include <stdio.h>

/* A request is signaled if its number is the last of three. */
#define SIGNALED_OF(number) ((number) % 3 == 2 ? IBV_SEND_SIGNALED : 0)
/* Places for outgoing numbers: more than can be outstanding. */
#define PLACES 64
#define CHAIN 4

static uint64_t content(unsigned int number)
{
	return mix(number + 1);
}

/* Posts a chain of numbers from `first` on; gives how many were accepted. One in eight chains has a request in it that no
 * queue takes. */
static int post_numbers(struct stream *stream, unsigned int first)
{
	struct corner *corner = stream->corner;
	uint64_t *places = (uint64_t *)(corner->facts->memory + corner->area);
	struct ibv_send_wr wr[CHAIN], *bad = NULL;
	struct ibv_sge sge[CHAIN];
	uint64_t random = mix(stream->chains++);
	int length = 1 + random % CHAIN, odd = random >> 8 & 7 ? -1 : (int)(random >> 16) % length;
	int error, accepted;

	for (int i = 0; i < length; i++) {
		unsigned int number = first + i;
		bool is_inline = mix(number) >> 32 & 1;

		places[number % PLACES] = content(number);
		sge[i] = piece(corner->facts, corner->area + number % PLACES * 8, 8);
		wr[i] = (struct ibv_send_wr){
			.wr_id = number,
			.sg_list = &sge[i],
			.num_sge = i == odd ? 64 : 1,
			.opcode = IBV_WR_SEND_WITH_IMM,
			.imm_data = htobe32(number),
			.send_flags = SIGNALED_OF(number) | (is_inline ? IBV_SEND_INLINE : 0),
			.next = i + 1 < length ? &wr[i + 1] : NULL,
		};
	}
	error = ibv_post_send(corner->pair.a, wr, &bad);
	accepted = error ? bad - wr : length;
	for (int i = 0; i < accepted; i++)
		if (wr[i].send_flags & IBV_SEND_INLINE)
			places[(first + i) % PLACES] = POISON;
	if (error == ENOMEM)
		stream->full++;
	else if (error == EINVAL && accepted == odd)
		stream->refused++;
	else if (error)
		stream->poster_error = "a post was refused";
	else if (odd >= 0)
		stream->poster_error = "a bad request was accepted";
	if (accepted < 0 || accepted > length)
		stream->poster_error = "bad_wr is not of the chain";
	return accepted;
}

static void *post_all_the_time(void *argument)
{
	struct stream *stream = argument;

	while (!stream->stop && !stream->poster_error) {
		int accepted = post_numbers(stream, stream->posted);

		stream->posted += accepted;
		if (!accepted)
			poll(NULL, 0, 1);
	}
	/* What comes last must be signaled, so that it is seen to complete. */
	while (stream->posted % 3 && !stream->poster_error) {
		uint64_t value = content(stream->posted);
		struct ibv_sge sge = { (uintptr_t)&value, 8, 0 };
		struct ibv_send_wr *bad, wr = {
			.wr_id = stream->posted, .sg_list = &sge, .num_sge = 1,
			.opcode = IBV_WR_SEND_WITH_IMM, .imm_data = htobe32(stream->posted),
			.send_flags = SIGNALED_OF(stream->posted) | IBV_SEND_INLINE,
		};

		if (ibv_post_send(stream->corner->pair.a, &wr, &bad))
			poll(NULL, 0, 1);
		else
			stream->posted++;
	}
	stream->stopped = true;
	return NULL;
}

static size_t place_in(const struct stream *stream, unsigned int number)
{
	return stream->corner->area + SLOTS * SLOT + number % PLACES * 8;
}

static void receive_number(struct stream *stream, unsigned int number)
{
	struct ibv_sge sge = piece(stream->corner->facts, place_in(stream, number), 8);

	if (receive_one(stream->corner->pair.b, number, &sge, 1))
		stream->poller_error = "a receive was refused";
}

static void *poll_all_the_time(void *argument)
{
	struct stream *stream = argument;
	struct corner *corner = stream->corner;
	struct ibv_wc wc;

	while (!stream->poller_error &&
	       !(stream->stopped && stream->received == stream->posted &&
		 stream->completed == stream->posted / 3)) {
		uint64_t value;
		int got = ibv_poll_cq(corner->pair.cq_b, 1, &wc);

		if (got) {
			memcpy(&value, corner->facts->memory + place_in(stream, stream->received), 8);
			if (got < 0 || wc.status || wc.wr_id != stream->received ||
			    be32toh(wc.imm_data) != stream->received || wc.byte_len != 8 ||
			    wc.qp_num != corner->pair.b->qp_num)
				stream->poller_error = "a received message is not the next";
			else if (value != content(stream->received))
				stream->poller_error = "the content of a message is wrong";
			stream->received++;
			receive_number(stream, stream->received + DEPTH - 1);
		}
		got = ibv_poll_cq(corner->pair.cq, 1, &wc);
		if (got) {
			if (got < 0 || wc.status || wc.wr_id != 3 * stream->completed + 2 ||
			    wc.qp_num != corner->pair.a->qp_num)
				stream->poller_error = "a completed send is not the next signaled one";
			stream->completed++;
		} else {
			sched_yield();
		}
		if (stream->poster_error)
			break;
	}
	return NULL;
}

void start_stream(struct stream *stream, struct corner *corner)
{
	memset(stream, 0, sizeof(*stream));
	stream->corner = corner;
	for (unsigned int i = 0; i < DEPTH; i++)
		receive_number(stream, i);
	must(pthread_create(&stream->poster, NULL, post_all_the_time, stream), "pthread_create");
	must(pthread_create(&stream->poller, NULL, poll_all_the_time, stream), "pthread_create");
}

static void expect_no_error(struct corner *corner, const char *what, const char *error)
{
	if (error)
		printf("# %s\n", error);
	expect(corner->facts, of(corner, what), error != NULL, 0);
}

void finish_stream(struct stream *stream)
{
	struct corner *corner = stream->corner;

	stream->stop = true;
	pthread_join(stream->poster, NULL);
	pthread_join(stream->poller, NULL);
	printf("# %u posted, %u times full, %u chains refused\n", stream->posted, stream->full,
	       stream->refused);
	expect_no_error(corner, "posting", stream->poster_error);
	expect_no_error(corner, "polling", stream->poller_error);
	expect(corner->facts, of(corner, "all arrive"), stream->received, stream->posted);
	expect(corner->facts, of(corner, "all signaled ones complete"), stream->completed,
	       stream->posted / 3);
	expect(corner->facts, of(corner, "chains were refused in the middle"), stream->refused > 0, 1);
	expect_nothing(corner, "anything else", corner->pair.cq);
	expect_nothing(corner, "anything else at the peer", corner->pair.cq_b);
}

/* The number that is read lies in the first slot, its copy in the second, what arrives in the third. */
static void *read_and_send(void *argument)
{
	struct fence *fence = argument;
	struct corner *corner = fence->corner;
	volatile uint64_t *source = (uint64_t *)(corner->facts->memory + corner->area);
	volatile uint64_t *copy = source + SLOT / 8, *arrived = source + 2 * SLOT / 8;
	struct ibv_sge to = piece(corner->facts, corner->area + SLOT, 8);
	struct ibv_sge in = piece(corner->facts, corner->area + 2 * SLOT, 8);
	struct ibv_wc wc;

	while (!fence->stop && !fence->error) {
		unsigned int round = fence->rounds;
		int read, sent;

		*source = content(round);
		*copy = *arrived = POISON;
		must(receive_one(corner->pair.b, round, &in, 1), "ibv_post_recv");
		read = post_one(corner->pair.a, IBV_WR_RDMA_READ, round, &to, 1, (uintptr_t)source,
				corner->facts->mr->rkey, 0);
		sent = post_one(corner->pair.a, IBV_WR_SEND, round, &to, 1, 0, 0,
				IBV_SEND_SIGNALED | IBV_SEND_FENCE);
		if (read || sent)
			fence->error = "a post was refused";
		else if (next_completion(corner->pair.cq_b, &wc) || wc.wr_id != round)
			fence->error = "no message";
		else if (next_completion(corner->pair.cq, &wc) || wc.wr_id != round)
			fence->error = "no completion";
		else if (*copy != content(round))
			fence->error = "the READ brought something else";
		else if (*arrived != content(round))
			fence->error = "the SEND went before the READ it is behind";
		fence->rounds++;
	}
	return NULL;
}

void start_fence(struct fence *fence, struct corner *corner)
{
	memset(fence, 0, sizeof(*fence));
	fence->corner = corner;
	must(pthread_create(&fence->thread, NULL, read_and_send, fence), "pthread_create");
}

void finish_fence(struct fence *fence)
{
	fence->stop = true;
	pthread_join(fence->thread, NULL);
	expect_no_error(fence->corner, "a SEND behind a fence", fence->error);
	expect(fence->corner->facts, of(fence->corner, "rounds were made"), fence->rounds > 1, 1);
	expect_nothing(fence->corner, "anything else", fence->corner->pair.cq);
}
