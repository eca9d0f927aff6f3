/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "ud_srq.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

void read_options(struct options *options, int count, char **arguments)
{
	static const struct option names[] = {
		{ "device", required_argument, NULL, 'd' },
		{ "gid-index", required_argument, NULL, 'g' },
		{ "seed", required_argument, NULL, 's' },
		{ "seconds", required_argument, NULL, 't' },
		{ "messages", required_argument, NULL, 'm' },
		{ NULL, 0, NULL, 0 },
	};
	int option, index;

	*options = (struct options){ .device = "rxe0", .gid_index = 1, .seed = 1 };
	while ((option = getopt_long(count, arguments, "", names, &index)) != -1) {
		const char *name = option == '?' ? "" : names[index].name;

		switch (option) {
		case 'd': options->device = optarg; break;
		case 'g': options->gid_index = number(name, optarg); break;
		case 's': options->seed = number(name, optarg); break;
		case 't': options->seconds = number(name, optarg); break;
		case 'm': options->messages = number(name, optarg); break;
		default: exit(2);
		}
	}
	if (optind != count)
		fail("what is \"%s\"?", arguments[optind]);
}

uint64_t proof_of(uint64_t number)
{
	return mix(number ^ 0x75647372);
}

uint64_t buffer_id(const struct state *state, uint32_t index)
{
	/* The index can be had back from it; nothing else means anything. */
	return mix(state->options.seed + side) << 40 ^ state->buffer[index].generation << 16 ^ index;
}

uint32_t pool_size(enum pool pool)
{
	return pool == POOL_SRQ ? SRQ_BUFFERS : pool == POOL_UD ? UD_BUFFERS : UC_BUFFERS;
}

void post_buffers(struct state *state, enum pool pool)
{
	struct ibv_recv_wr wr[BUFFERS], *bad = NULL;
	struct ibv_sge sge[BUFFERS][2];
	uint32_t count = 0;
	int result;

	for (uint32_t i = 0; i < BUFFERS; i++) {
		struct buffer *buffer = &state->buffer[i];
		unsigned char *bytes = state->in + i * (size_t)STRIDE;
		/* The header of a UD packet goes by itself, or ends in the middle of a piece. */
		uint32_t split = pool == POOL_UD ? GRH_BYTES : 1 + roll(&state->random, 200);

		if (buffer->pool != pool || buffer->posted)
			continue;
		buffer->posted = true;
		buffer->generation++;
		state->order[pool][state->last[pool]++ % pool_size(pool)] = i;
		sge[count][0] = (struct ibv_sge){ (uintptr_t)bytes, split, state->in_mr->lkey };
		sge[count][1] = (struct ibv_sge){ (uintptr_t)bytes + split,
						  GRH_BYTES + LARGEST - split, state->in_mr->lkey };
		wr[count] = (struct ibv_recv_wr){ .wr_id = buffer_id(state, i),
						  .sg_list = sge[count],
						  .num_sge = 2 };
		if (count)
			wr[count - 1].next = &wr[count];
		count++;
	}
	if (!count)
		return;
	if (pool == POOL_SRQ)
		result = ibv_post_srq_recv(state->srq, wr, &bad);
	else
		result = ibv_post_recv(
			state->queue[pool == POOL_UD ? 0 : FIRST_UC + pool - POOL_UC].qp, wr, &bad);
	if (result)
		fail("pool %d: posting %u receives: %s, bad_wr is number %td", pool, count,
		     strerror(result), bad - wr);
}

static void make_memory(struct state *state)
{
	size_t out = QUEUES * SEND_DEPTH * (size_t)STRIDE, in = BUFFERS * (size_t)STRIDE;
	size_t acknowledgements = FLOWS * sizeof(struct acknowledgement);

	state->out = allocate(out);
	state->in = allocate(in);
	state->acknowledgements = allocate(acknowledgements);
	state->out_mr = register_memory(state->pd, state->out, out, 0);
	state->in_mr = register_memory(state->pd, state->in, in, IBV_ACCESS_LOCAL_WRITE);
	state->acknowledgements_mr =
		register_memory(state->pd, state->acknowledgements, acknowledgements,
				IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	watch_mr(&state->handles, state->out_mr);
	watch_mr(&state->handles, state->in_mr);
	watch_mr(&state->handles, state->acknowledgements_mr);
	for (uint32_t i = 0; i < BUFFERS; i++) {
		uint32_t rest = i < SRQ_BUFFERS ? 0 : i - SRQ_BUFFERS;

		if (i < SRQ_BUFFERS)
			state->buffer[i].pool = POOL_SRQ;
		else if (rest < UD_BUFFERS)
			state->buffer[i].pool = POOL_UD;
		else
			state->buffer[i].pool = POOL_UC + (rest - UD_BUFFERS) / UC_BUFFERS;
	}
}

static void make_queues(struct state *state)
{
	struct ibv_srq_init_attr srq = { .srq_context = state,
					 .attr = { .max_wr = SRQ_BUFFERS, .max_sge = 2 } };

	state->send_cq = ibv_create_cq(state->context, QUEUES * SEND_DEPTH, state, NULL, 0);
	state->receive_cq = ibv_create_cq(state->context, BUFFERS, state, NULL, 0);
	if (!state->send_cq || !state->receive_cq)
		fail("ibv_create_cq: %s", strerror(errno));
	watch_cq(&state->handles, state->send_cq);
	watch_cq(&state->handles, state->receive_cq);
	state->srq = ibv_create_srq(state->pd, &srq);
	if (!state->srq)
		fail("ibv_create_srq: %s", strerror(errno));
	watch_srq(&state->handles, state->srq);
}

static void make_queue_pair(struct state *state, uint32_t index)
{
	bool is_ud = index < FIRST_RC, is_uc = index >= FIRST_UC;
	bool on_srq = !is_uc && index != 0;
	struct ibv_qp_init_attr init = {
		.qp_context = &state->queue[index],
		.send_cq = state->send_cq,
		.recv_cq = state->receive_cq,
		.srq = on_srq ? state->srq : NULL,
		.cap = { SEND_DEPTH, on_srq ? 0 : is_uc ? UC_BUFFERS : UD_BUFFERS, 2,
			 on_srq ? 0 : 2, 64 },
		.qp_type = is_ud ? IBV_QPT_UD : is_uc ? IBV_QPT_UC : IBV_QPT_RC,
	};
	struct ibv_qp *qp = ibv_create_qp(state->pd, &init);

	if (!qp)
		fail("ibv_create_qp of type %d: %s", init.qp_type, strerror(errno));
	initialize_qp(qp, !is_ud && !is_uc ? IBV_ACCESS_REMOTE_WRITE : 0, QKEY);
	state->queue[index].qp = qp;
}

static void introduce(struct state *state)
{
	struct introduction *self = &state->self;

	self->gid = state->handles.gid;
	self->lid = state->handles.port.lid;
	for (uint32_t i = 0; i < QUEUES; i++)
		self->qp_num[i] = state->queue[i].qp->qp_num;
	self->acknowledgements = (uintptr_t)state->acknowledgements;
	self->key = state->acknowledgements_mr->rkey;
	socket_send(state->socket, self, sizeof(*self));
	socket_receive(state->socket, &state->peer, sizeof(state->peer));
}

/* To the queue pair of the other side with the same index. */
static struct way way_to_peer(const struct state *state, uint32_t index)
{
	return (struct way){
		.gid = state->peer.gid,
		.lid = state->peer.lid,
		.qp_num = state->peer.qp_num[index],
		.gid_index = state->options.gid_index,
		.port = &state->handles.port,
		.reads = 1,
	};
}

static void connect_queue_pair(struct state *state, uint32_t index)
{
	struct way way = way_to_peer(state, index);

	connect_qp(state->queue[index].qp, &way);
	watch_qp(&state->handles, state->queue[index].qp);
}

void set_up(struct state *state)
{
	const struct options *options = &state->options;

	state->random = options->seed * 2 + side;
	state->context = open_device(options->device);
	watch_device(&state->handles, state->context, options->gid_index);
	state->pd = ibv_alloc_pd(state->context);
	if (!state->pd)
		fail("ibv_alloc_pd: %s", strerror(errno));
	watch_pd(&state->handles, state->pd);
	make_memory(state);
	make_queues(state);
	for (uint32_t i = 0; i < QUEUES; i++)
		make_queue_pair(state, i);
	for (int pool = 0; pool < (int)POOLS; pool++)
		post_buffers(state, pool);
	introduce(state);
	for (uint32_t i = 0; i < UDS; i++) {
		struct way way = way_to_peer(state, i);
		struct ibv_ah_attr address = address_of(&way);

		state->ah[i] = ibv_create_ah(state->pd, &address);
		if (!state->ah[i])
			fail("ibv_create_ah: %s", strerror(errno));
		watch_ah(&state->handles, state->ah[i]);
	}
	for (uint32_t i = 0; i < QUEUES; i++)
		connect_queue_pair(state, i);
	for (uint32_t i = 0; i < FLOWS; i++) {
		struct flow *flow = &state->flow[i];
		uint32_t rest = i - UDS * UDS;

		if (i < UDS * UDS)
			*flow = (struct flow){ .type = IBV_QPT_UD, .from = i / UDS, .to = i % UDS };
		else if (rest < RCS)
			*flow = (struct flow){ .type = IBV_QPT_RC, .from = FIRST_RC + rest,
					       .to = FIRST_RC + rest };
		else
			*flow = (struct flow){ .type = IBV_QPT_UC, .from = FIRST_RC + rest,
					       .to = FIRST_RC + rest };
	}
	socket_barrier(state->socket);
}

void tear_down(struct state *state)
{
	for (uint32_t i = 0; i < UDS; i++)
		must(ibv_destroy_ah(state->ah[i]), "ibv_destroy_ah");
	for (uint32_t i = 0; i < QUEUES; i++)
		must(ibv_destroy_qp(state->queue[i].qp), "ibv_destroy_qp");
	must(ibv_destroy_srq(state->srq), "ibv_destroy_srq");
	must(ibv_destroy_cq(state->send_cq), "ibv_destroy_cq");
	must(ibv_destroy_cq(state->receive_cq), "ibv_destroy_cq");
	must(ibv_dereg_mr(state->out_mr), "ibv_dereg_mr");
	must(ibv_dereg_mr(state->in_mr), "ibv_dereg_mr");
	must(ibv_dereg_mr(state->acknowledgements_mr), "ibv_dereg_mr");
	must(ibv_dealloc_pd(state->pd), "ibv_dealloc_pd");
	must(ibv_close_device(state->context), "ibv_close_device");
	free(state->out);
	free(state->in);
	free(state->acknowledgements);
}
