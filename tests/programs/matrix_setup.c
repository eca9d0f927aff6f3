/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "extended.h"
#include "matrix.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint32_t one_of(const char *option, const char *text, const char *const *names, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		if (!strcmp(text, names[i]))
			return i;
	fail("--%s does not know \"%s\"", option, text);
}

static void check_options(const struct options *options)
{
	uint32_t peers = options->processes - 1;

	if (options->processes < 2 || options->processes > MAX_PROCESSES)
		fail("--processes is from 2 to %d", MAX_PROCESSES);
	if (!options->threads || options->threads > MAX_THREADS)
		fail("--threads is from 1 to %d", MAX_THREADS);
	if (!options->qps || peers * options->threads * options->qps > MAX_LANES)
		fail("--qps times --threads times other processes is from 1 to %d", MAX_LANES);
	if (options->window < 8 || options->window > MAX_WINDOW)
		fail("--window is from 8 to %d", MAX_WINDOW);
	if (options->max_size < UD_LARGEST || options->max_size > 1 << 20)
		fail("--max-size is from %d to 1048576", UD_LARGEST);
	if (!options->sges || options->sges > MAX_SGE)
		fail("--sges is from 1 to %d", MAX_SGE);
	if (options->unsignaled > SEND_DEPTH / 2)
		fail("--unsignaled is at most %d", SEND_DEPTH / 2);
	if (!options->chain || options->chain > MAX_CHAIN)
		fail("--chain is from 1 to %d", MAX_CHAIN);
	if (options->rnr && !is_reliable(options->transport))
		fail("--rnr is for rc and srq: the others lose what meets no receive");
}

void read_options(int count, char **arguments)
{
	static const char *const transports[] = { "rc", "uc", "ud", "srq", "mix" };
	static const char *const sharings[] = { "nothing", "cqs", "qps" };
	static const struct option names[] = {
		{ "device", required_argument, NULL, 'd' },
		{ "gid-index", required_argument, NULL, 'g' },
		{ "seed", required_argument, NULL, 's' },
		{ "messages", required_argument, NULL, 'm' },
		{ "processes", required_argument, NULL, 'p' },
		{ "threads", required_argument, NULL, 't' },
		{ "qps", required_argument, NULL, 'q' },
		{ "transport", required_argument, NULL, 'T' },
		{ "share", required_argument, NULL, 'h' },
		{ "window", required_argument, NULL, 'w' },
		{ "max-size", required_argument, NULL, 'l' },
		{ "sges", required_argument, NULL, 'S' },
		{ "unsignaled", required_argument, NULL, 'u' },
		{ "chain", required_argument, NULL, 'c' },
		{ "patience", required_argument, NULL, 'P' },
		{ "inline", no_argument, NULL, 'i' },
		{ "events", no_argument, NULL, 'e' },
		{ "slow-receiver", no_argument, NULL, 'o' },
		{ "rnr", no_argument, NULL, 'r' },
		{ "extended", no_argument, NULL, 'x' },
		{ NULL, 0, NULL, 0 },
	};
	struct options *options = &matrix.options;
	int option, index;

	*options = (struct options){
		.device = "rxe0", .gid_index = 1, .seed = 1, .processes = 2, .threads = 1,
		.qps = 2, .window = 16, .max_size = 4096, .sges = 1, .chain = 1, .patience = 60,
	};
	while ((option = getopt_long(count, arguments, "", names, &index)) != -1) {
		const char *name = option == '?' ? "" : names[index].name;

		switch (option) {
		case 'd': options->device = optarg; break;
		case 'g': options->gid_index = number(name, optarg); break;
		case 's': options->seed = number(name, optarg); break;
		case 'm': options->messages = number(name, optarg); break;
		case 'p': options->processes = number(name, optarg); break;
		case 't': options->threads = number(name, optarg); break;
		case 'q': options->qps = number(name, optarg); break;
		case 'T': options->transport = one_of(name, optarg, transports, 5); break;
		case 'h': options->sharing = one_of(name, optarg, sharings, 3); break;
		case 'w': options->window = number(name, optarg); break;
		case 'l': options->max_size = number(name, optarg); break;
		case 'S': options->sges = number(name, optarg); break;
		case 'u': options->unsignaled = number(name, optarg); break;
		case 'c': options->chain = number(name, optarg); break;
		case 'P': options->patience = number(name, optarg); break;
		case 'i': options->inlined = true; break;
		case 'e': options->events = true; break;
		case 'o': options->slow_receiver = true; break;
		case 'r': options->rnr = true; break;
		case 'x': options->extended = true; break;
		default: exit(2);
		}
	}
	if (optind != count)
		fail("what is \"%s\"?", arguments[optind]);
	check_options(options);
}

/* Lays out who is connected with whom: both ends find the same. */
static void plan(void)
{
	const struct options *options = &matrix.options;
	uint32_t groups = options->sharing == SHARE_QPS ? 1 : options->threads;
	uint32_t lanes = options->threads / groups, each = groups * options->qps;
	struct shared *shared = matrix.shared;

	matrix.pollers = options->sharing == SHARE_NOTHING ? options->threads : 1;
	matrix.endpoints = (options->processes - 1) * each;
	matrix.lanes = matrix.endpoints * lanes;
	for (uint32_t i = 0; i < matrix.endpoints; i++) {
		struct endpoint *endpoint = &matrix.endpoint[i];
		uint32_t slot = i / each, q = i % options->qps, group = i % each / options->qps;
		uint32_t peer = slot < (uint32_t)side ? slot : slot + 1;
		uint32_t far = ((uint32_t)side < peer ? side : side - 1) * each + i % each;

		*endpoint = (struct endpoint){
			.transport = options->transport == MIX ? q % TRANSPORTS : options->transport,
			.index = i, .far = far, .peer = peer, .lanes = lanes,
			.key = key_of(options->seed, side, i, 'e'),
			.peer_key = key_of(options->seed, peer, far, 'e'),
			.lane = &matrix.lane[i * lanes],
			.poller = &matrix.poller[matrix.pollers == 1 ? 0 : group],
		};
		for (uint32_t place = 0; place < lanes; place++) {
			struct lane *lane = &endpoint->lane[place];
			uint32_t here = i * lanes + place, there = far * lanes + place;

			*lane = (struct lane){
				.endpoint = endpoint, .index = here, .far = there, .place = place,
				.thread = groups == 1 ? place : group,
				.random = key_of(options->seed, side, here, 'x'),
				.key = key_of(options->seed, side, here, 'l'),
				.peer_key = key_of(options->seed, peer, there, 'l'),
				.sending = &shared->flow[side][here],
				.receiving = &shared->flow[peer][there],
				.counter = first_count(peer, there), .ticket = first_ticket(peer),
			};
			pthread_mutex_init(&lane->lock, NULL);
		}
	}
}

static void make_region(struct region *region, size_t length, int access)
{
	region->length = length;
	region->bytes = allocate(length);
	region->mr = register_memory(matrix.pd, region->bytes, length, access);
	watch_mr(&matrix.handles, region->mr);
}

/* Adds a pool of so many buffers. */
static struct pool *make_pool(uint32_t count)
{
	struct pool *pool = &matrix.pool[matrix.pools++];

	pthread_mutex_init(&pool->lock, NULL);
	pool->first = matrix.buffers;
	pool->random = key_of(matrix.options.seed, side, pool->first, 'b');
	for (; pool->count < count; pool->count++)
		pool->idle[pool->idles++] = matrix.buffers++;
	return pool;
}

static void plan_receives(void)
{
	const struct options *options = &matrix.options;
	uint32_t shared = 0;

	for (uint32_t i = 0; i < matrix.endpoints; i++) {
		struct endpoint *endpoint = &matrix.endpoint[i];
		/* Deep enough for a whole window, or so shallow that receives run out. */
		uint32_t depth = options->rnr ? 2 : endpoint->lanes * options->window;
		/* Acknowledged before they are posted again. */
		uint32_t under_way = options->rnr ? 0 : options->threads * BATCH;

		if (endpoint->transport == SRQ) {
			shared += depth + (shared ? 0 : under_way);
			continue;
		}
		endpoint->pool = make_pool(depth + under_way);
		endpoint->pool->in_order = options->sharing == SHARE_NOTHING;
	}
	if (shared) {
		struct pool *pool = make_pool(shared);

		for (uint32_t i = 0; i < matrix.endpoints; i++)
			if (matrix.endpoint[i].transport == SRQ)
				matrix.endpoint[i].pool = pool;
	}
	matrix.buffer = calloc(matrix.buffers, sizeof(*matrix.buffer));
	if (!matrix.buffer)
		fail("no memory for %u buffers", matrix.buffers);
}

static void make_memory(void)
{
	const struct options *options = &matrix.options;
	uint32_t window = options->window;
	uint64_t *words;

	make_region(&matrix.out, matrix.lanes * SEND_DEPTH * stride(), 0);
	make_region(&matrix.results, matrix.lanes * SEND_DEPTH * stride(), IBV_ACCESS_LOCAL_WRITE);
	make_region(&matrix.in, matrix.buffers * stride(), IBV_ACCESS_LOCAL_WRITE);
	make_region(&matrix.slots, matrix.lanes * SLOTS * stride(),
		    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	make_region(&matrix.library, options->max_size, IBV_ACCESS_REMOTE_READ);
	fill(matrix.library.bytes, matrix.library.length, library_key(side));
	/* The counters of the lanes, and the word that holds the ticket. */
	make_region(&matrix.words, (MAX_LANES + 1) * sizeof(uint64_t),
		    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_ATOMIC);
	words = (void *)matrix.words.bytes;
	for (uint32_t i = 0; i < MAX_LANES; i++)
		words[i] = first_count(side, i);
	words[MAX_LANES] = first_ticket(side);
}

static struct ibv_cq *make_cq(struct poller *poller, uint32_t entries)
{
	struct ibv_comp_channel *channel = poller->notify.channel;
	struct ibv_cq *cq = matrix.options.extended ?
				    extended_cq(matrix.context, entries, poller, channel) :
				    ibv_create_cq(matrix.context, entries, poller, channel, 0);

	if (!cq)
		fail("ibv_create_cq with %u entries: %s", entries, strerror(errno));
	watch_cq(&matrix.handles, cq);
	return cq;
}

static void make_pollers(void)
{
	const struct options *options = &matrix.options;

	for (uint32_t i = 0; i < matrix.pollers; i++) {
		struct poller *poller = &matrix.poller[i];

		pthread_mutex_init(&poller->lock, NULL);
		poller->notify.context = poller;
		if (options->events) {
			make_channel(&poller->notify, matrix.context);
			watch_channel(&matrix.handles, poller->notify.channel);
		}
		poller->notify.cq[SEND_CQ] = make_cq(poller, matrix.lanes * SEND_DEPTH);
		poller->notify.cq[RECEIVE_CQ] = make_cq(poller, matrix.buffers);
		/* Events, and lanes that lose messages, are looked at in order. */
		poller->concurrent = options->sharing == SHARE_CQS && !options->events &&
				     is_reliable(options->transport);
	}
}

static void make_srq(struct pool *pool)
{
	struct ibv_srq_init_attr init = {
		.srq_context = pool, .attr = { .max_wr = pool->count, .max_sge = MAX_SGE },
	};

	matrix.srq = ibv_create_srq(matrix.pd, &init);
	if (!matrix.srq)
		fail("ibv_create_srq: %s", strerror(errno));
	pool->srq = matrix.srq;
	watch_srq(&matrix.handles, matrix.srq);
}

static void make_endpoint(struct endpoint *endpoint)
{
	static const enum ibv_qp_type types[] = { IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD, IBV_QPT_RC };
	bool on_srq = endpoint->transport == SRQ;
	struct ibv_qp_init_attr init = {
		.qp_context = endpoint,
		.send_cq = endpoint->poller->notify.cq[SEND_CQ],
		.recv_cq = endpoint->poller->notify.cq[RECEIVE_CQ],
		.srq = on_srq ? matrix.srq : NULL,
		.cap = { endpoint->lanes * SEND_DEPTH, on_srq ? 0 : endpoint->pool->count, MAX_SGE,
			 on_srq ? 0 : MAX_SGE, matrix.options.inlined ? 64 : 0 },
		.qp_type = types[endpoint->transport],
	};
	int access = IBV_ACCESS_REMOTE_WRITE;

	endpoint->qp = matrix.options.extended ? extended_qp(matrix.pd, &init) :
						 ibv_create_qp(matrix.pd, &init);
	if (!endpoint->qp)
		fail("ibv_create_qp: %s", strerror(errno));
	endpoint->max_inline =
		init.cap.max_inline_data < MAX_INLINE ? init.cap.max_inline_data : MAX_INLINE;
	if (is_reliable(endpoint->transport))
		access |= IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
	initialize_qp(endpoint->qp, access, QKEY);
	if (!on_srq)
		endpoint->pool->qp = endpoint->qp;
}

static void introduce(void)
{
	struct introduction *self = &matrix.shared->introduction[side];

	self->gid = matrix.handles.gid;
	self->lid = matrix.handles.port.lid;
	for (uint32_t i = 0; i < matrix.endpoints; i++) {
		self->qp_num[i] = matrix.endpoint[i].qp->qp_num;
		self->psn[i] = key_of(matrix.options.seed, side, i, 'p') & 0xffffff;
	}
	self->slots = (uintptr_t)matrix.slots.bytes;
	self->slots_key = matrix.slots.mr->rkey;
	self->library = (uintptr_t)matrix.library.bytes;
	self->library_key = matrix.library.mr->rkey;
	self->words = (uintptr_t)matrix.words.bytes;
	self->words_key = matrix.words.mr->rkey;
}

static void connect_endpoint(struct endpoint *endpoint)
{
	const struct introduction *self = &matrix.shared->introduction[side];
	const struct introduction *peer = &matrix.shared->introduction[endpoint->peer];
	struct way way = {
		.gid = peer->gid,
		.lid = peer->lid,
		.qp_num = peer->qp_num[endpoint->far],
		.receive_psn = peer->psn[endpoint->far],
		.send_psn = self->psn[endpoint->index],
		.gid_index = matrix.options.gid_index,
		.port = &matrix.handles.port,
		.reads = 4,
	};
	struct ibv_ah_attr address = address_of(&way);

	connect_qp(endpoint->qp, &way);
	watch_qp(&matrix.handles, endpoint->qp);
	if (endpoint->transport != UD)
		return;
	endpoint->ah = ibv_create_ah(matrix.pd, &address);
	if (!endpoint->ah)
		fail("ibv_create_ah: %s", strerror(errno));
	watch_ah(&matrix.handles, endpoint->ah);
}

void meet(void)
{
	_Atomic uint64_t *arrived = &matrix.shared->arrived;
	uint64_t processes = matrix.options.processes;
	/* All who come are in the same round: nobody can be a round ahead. */
	uint64_t round = (*arrived)++ / processes;

	while (*arrived < (round + 1) * processes) {
		check_processes();
		usleep(1000);
	}
}

void set_up(void)
{
	matrix.shared = mmap(NULL, sizeof(*matrix.shared), PROT_READ | PROT_WRITE,
			     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (matrix.shared == MAP_FAILED)
		fail("mmap: %s", strerror(errno));
	for (int i = 0; i < MAX_PROCESSES; i++)
		for (int lane = 0; lane < MAX_LANES; lane++)
			matrix.shared->flow[i][lane].ended = UINT64_MAX;
	split_into(matrix.options.processes);
	plan();
	plan_receives();
	matrix.context = open_device(matrix.options.device);
	watch_device(&matrix.handles, matrix.context, matrix.options.gid_index);
	matrix.pd = ibv_alloc_pd(matrix.context);
	if (!matrix.pd)
		fail("ibv_alloc_pd: %s", strerror(errno));
	watch_pd(&matrix.handles, matrix.pd);
	make_memory();
	make_pollers();
	/* The pool of the SRQ is the last one. */
	for (uint32_t i = 0; i < matrix.endpoints && !matrix.srq; i++)
		if (matrix.endpoint[i].transport == SRQ)
			make_srq(matrix.endpoint[i].pool);
	for (uint32_t i = 0; i < matrix.endpoints; i++)
		make_endpoint(&matrix.endpoint[i]);
	for (uint32_t i = 0; i < matrix.pools; i++)
		post_receives(&matrix.pool[i]);
	introduce();
	meet();
	for (uint32_t i = 0; i < matrix.endpoints; i++)
		connect_endpoint(&matrix.endpoint[i]);
	meet();
}

static void drop_region(struct region *region)
{
	must(ibv_dereg_mr(region->mr), "ibv_dereg_mr");
	free(region->bytes);
}

void tear_down(void)
{
	for (uint32_t i = 0; i < matrix.endpoints; i++) {
		if (matrix.endpoint[i].ah)
			must(ibv_destroy_ah(matrix.endpoint[i].ah), "ibv_destroy_ah");
		must(ibv_destroy_qp(matrix.endpoint[i].qp), "ibv_destroy_qp");
	}
	if (matrix.srq)
		must(ibv_destroy_srq(matrix.srq), "ibv_destroy_srq");
	for (uint32_t i = 0; i < matrix.pollers; i++) {
		struct notify *notify = &matrix.poller[i].notify;

		acknowledge_events(notify);
		must(ibv_destroy_cq(notify->cq[SEND_CQ]), "ibv_destroy_cq");
		must(ibv_destroy_cq(notify->cq[RECEIVE_CQ]), "ibv_destroy_cq");
		if (notify->channel)
			must(ibv_destroy_comp_channel(notify->channel), "ibv_destroy_comp_channel");
	}
	drop_region(&matrix.out);
	drop_region(&matrix.in);
	drop_region(&matrix.results);
	drop_region(&matrix.slots);
	drop_region(&matrix.library);
	drop_region(&matrix.words);
	must(ibv_dealloc_pd(matrix.pd), "ibv_dealloc_pd");
	must(ibv_close_device(matrix.context), "ibv_close_device");
	free(matrix.buffer);
}
