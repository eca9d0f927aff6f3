/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "rc_traffic.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void read_options(struct options *options, int count, char **arguments)
{
	static const struct option names[] = {
		{ "device", required_argument, NULL, 'd' },
		{ "gid-index", required_argument, NULL, 'g' },
		{ "seed", required_argument, NULL, 's' },
		{ "seconds", required_argument, NULL, 't' },
		{ "messages", required_argument, NULL, 'm' },
		{ "qps", required_argument, NULL, 'q' },
		{ "window", required_argument, NULL, 'w' },
		{ "max-size", required_argument, NULL, 'l' },
		{ "events", no_argument, NULL, 'e' },
		{ "rnr", no_argument, NULL, 'r' },
		{ "late", required_argument, NULL, 'a' },
		{ NULL, 0, NULL, 0 },
	};
	int option, index;

	*options = (struct options){
		.device = "rxe0", .gid_index = 1, .seed = 1, .qps = 4, .window = 32, .max_size = 8192,
	};
	while ((option = getopt_long(count, arguments, "", names, &index)) != -1) {
		const char *name = option == '?' ? "" : names[index].name;

		switch (option) {
		case 'd': options->device = optarg; break;
		case 'g': options->gid_index = number(name, optarg); break;
		case 's': options->seed = number(name, optarg); break;
		case 't': options->seconds = number(name, optarg); break;
		case 'm': options->messages = number(name, optarg); break;
		case 'q': options->qps = number(name, optarg); break;
		case 'w': options->window = number(name, optarg); break;
		case 'l': options->max_size = number(name, optarg); break;
		case 'e': options->events = true; break;
		case 'r': options->rnr = true; break;
		case 'a': options->late = optarg; break;
		default: exit(2);
		}
	}
	if (optind != count)
		fail("what is \"%s\"?", arguments[optind]);
	if (!options->qps || options->qps > MAX_QPS)
		fail("--qps is from 1 to %d", MAX_QPS);
	if (options->window < 8 || options->window > WATCHED - 4)
		fail("--window is from 8 to %d", WATCHED - 4);
	if (options->max_size < 64 || options->max_size > 1 << 20)
		fail("--max-size is from 64 to 1048576");
}

static struct ibv_mr *watched_memory(struct traffic *traffic, void *memory, size_t length,
				     int access)
{
	struct ibv_mr *mr = register_memory(traffic->pd, memory, length, access);

	watch_mr(&traffic->handles, mr);
	return mr;
}

static void make_memory(struct traffic *traffic)
{
	const struct options *options = &traffic->options;
	size_t size = buffer_size(traffic);

	traffic->out_length = options->qps * SEND_DEPTH * size;
	traffic->out = allocate(traffic->out_length);
	traffic->out_mr = watched_memory(traffic, traffic->out, traffic->out_length, 0);

	traffic->results_length = options->qps * SEND_DEPTH * size;
	traffic->results = allocate(traffic->results_length);
	traffic->results_mr = watched_memory(traffic, traffic->results, traffic->results_length,
					      IBV_ACCESS_LOCAL_WRITE);

	traffic->in_length = options->qps * traffic->receive_depth * size;
	traffic->in = allocate(traffic->in_length);
	traffic->in_mr =
		watched_memory(traffic, traffic->in, traffic->in_length, IBV_ACCESS_LOCAL_WRITE);

	traffic->slots_length = acknowledgement_offset(traffic, options->qps);
	traffic->slots = allocate(traffic->slots_length);
	traffic->slots_mr = watched_memory(traffic, traffic->slots, traffic->slots_length,
					    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);

	traffic->library_length = options->qps * (size_t)options->max_size;
	traffic->library = allocate(traffic->library_length);
	for (uint32_t page = 0; page < options->qps; page++)
		fill(traffic->library + page * (size_t)options->max_size, options->max_size,
		     library_key(traffic, side, page));
	traffic->library_mr = watched_memory(traffic, traffic->library, traffic->library_length,
					      IBV_ACCESS_REMOTE_READ);

	/* Two counters for each queue pair, and one that all share. */
	traffic->counters_length = (2 * options->qps + 1) * sizeof(uint64_t);
	traffic->counters = allocate(traffic->counters_length);
	for (uint32_t i = 0; i <= 2 * options->qps; i++)
		traffic->counters[i] = counter_start(traffic, side, i);
	traffic->counters_mr = watched_memory(traffic, traffic->counters, traffic->counters_length,
					       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_ATOMIC);
}

static struct ibv_cq *make_cq(struct traffic *traffic, uint32_t entries)
{
	struct ibv_cq *cq = ibv_create_cq(traffic->context, entries, traffic, traffic->notify.channel, 0);

	if (!cq)
		fail("ibv_create_cq with %u entries: %s", entries, strerror(errno));
	watch_cq(&traffic->handles, cq);
	return cq;
}

static void make_queue_pair(struct traffic *traffic, struct stream *stream)
{
	struct ibv_qp_init_attr init = {
		.qp_context = stream,
		.send_cq = traffic->notify.cq[SEND_CQ],
		.recv_cq = traffic->notify.cq[RECEIVE_CQ],
		.cap = { SEND_DEPTH, traffic->receive_depth, MAX_SGE, MAX_SGE, 64 },
		.qp_type = IBV_QPT_RC,
	};

	stream->qp = ibv_create_qp(traffic->pd, &init);
	if (!stream->qp)
		fail("ibv_create_qp: %s", strerror(errno));
	stream->max_inline =
		init.cap.max_inline_data < MAX_INLINE ? init.cap.max_inline_data : MAX_INLINE;
	initialize_qp(stream->qp,
		      IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC,
		      0);
}

static void connect_queue_pair(struct traffic *traffic, struct stream *stream)
{
	const struct introduction *peer = &traffic->peer;
	struct way way = {
		.gid = peer->gid,
		.lid = peer->lid,
		.qp_num = peer->qp_num[stream->index],
		.receive_psn = peer->psn[stream->index],
		.send_psn = traffic->self.psn[stream->index],
		.gid_index = traffic->options.gid_index,
		.port = &traffic->handles.port,
		.reads = 4,
	};

	connect_qp(stream->qp, &way);
	watch_qp(&traffic->handles, stream->qp);
}

static void introduce(struct traffic *traffic)
{
	struct introduction *self = &traffic->self;

	self->gid = traffic->handles.gid;
	self->lid = traffic->handles.port.lid;
	for (uint32_t i = 0; i < traffic->options.qps; i++) {
		self->qp_num[i] = traffic->stream[i].qp->qp_num;
		self->psn[i] = key_of(traffic->options.seed, side, i, 'p') & 0xffffff;
	}
	self->slots = (uintptr_t)traffic->slots;
	self->slots_key = traffic->slots_mr->rkey;
	self->library = (uintptr_t)traffic->library;
	self->library_key = traffic->library_mr->rkey;
	self->counters = (uintptr_t)traffic->counters;
	self->counters_key = traffic->counters_mr->rkey;
	socket_send(traffic->socket, self, sizeof(*self));
	socket_receive(traffic->socket, &traffic->peer, sizeof(traffic->peer));
}

void set_up(struct traffic *traffic)
{
	const struct options *options = &traffic->options;

	while (options->late && side == 1 && access(options->late, F_OK)) {
		check_processes();
		usleep(10000);
	}
	traffic->random = options->seed * 2 + side;
	/* Deep enough for a whole window, or so shallow that receives run out. */
	traffic->receive_depth = options->rnr ? 2 : options->window + 4;
	traffic->context = open_device(options->device);
	watch_device(&traffic->handles, traffic->context, options->gid_index);
	traffic->pd = ibv_alloc_pd(traffic->context);
	if (!traffic->pd)
		fail("ibv_alloc_pd: %s", strerror(errno));
	watch_pd(&traffic->handles, traffic->pd);
	if (options->events) {
		make_channel(&traffic->notify, traffic->context);
		watch_channel(&traffic->handles, traffic->notify.channel);
	}
	traffic->notify.context = traffic;
	traffic->notify.cq[SEND_CQ] = make_cq(traffic, options->qps * SEND_DEPTH);
	traffic->notify.cq[RECEIVE_CQ] = make_cq(traffic, options->qps * traffic->receive_depth);
	make_memory(traffic);
	for (uint32_t i = 0; i < options->qps; i++) {
		traffic->stream[i].index = i;
		make_queue_pair(traffic, &traffic->stream[i]);
		post_receives(traffic, &traffic->stream[i]);
	}
	if (options->late && side == 0) {
		printf("waiting\n");
		fflush(stdout);
	}
	introduce(traffic);
	for (uint32_t i = 0; i < options->qps; i++)
		connect_queue_pair(traffic, &traffic->stream[i]);
	socket_barrier(traffic->socket);
}

void tear_down(struct traffic *traffic)
{
	acknowledge_events(&traffic->notify);
	for (uint32_t i = 0; i < traffic->options.qps; i++)
		must(ibv_destroy_qp(traffic->stream[i].qp), "ibv_destroy_qp");
	must(ibv_destroy_cq(traffic->notify.cq[SEND_CQ]), "ibv_destroy_cq");
	must(ibv_destroy_cq(traffic->notify.cq[RECEIVE_CQ]), "ibv_destroy_cq");
	if (traffic->notify.channel)
		must(ibv_destroy_comp_channel(traffic->notify.channel), "ibv_destroy_comp_channel");
	must(ibv_dereg_mr(traffic->out_mr), "ibv_dereg_mr");
	must(ibv_dereg_mr(traffic->in_mr), "ibv_dereg_mr");
	must(ibv_dereg_mr(traffic->results_mr), "ibv_dereg_mr");
	must(ibv_dereg_mr(traffic->slots_mr), "ibv_dereg_mr");
	must(ibv_dereg_mr(traffic->library_mr), "ibv_dereg_mr");
	must(ibv_dereg_mr(traffic->counters_mr), "ibv_dereg_mr");
	must(ibv_dealloc_pd(traffic->pd), "ibv_dealloc_pd");
	must(ibv_close_device(traffic->context), "ibv_close_device");
	free(traffic->out);
	free(traffic->in);
	free(traffic->results);
	free(traffic->slots);
	free(traffic->library);
	free(traffic->counters);
}
