/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * survivor: a process whose peers die.
 *
 * The parent has one RC queue pair to each child, and a pair of queue pairs to itself. Messages are
 * numbered, their content follows from the number. On all queue pairs every request must complete once and in order,
 * and every message must arrive once, in order and whole. When a child is killed, what the parent has on the way to it
 * must end: one request in "retries exceeded" (or flushed at once), all that follow flushed. The parent then says
 * "lost PID", and all its other traffic goes on.
 *
 * SIGTERM ends the parent. The last line of its output is its account. SIGUSR1 makes it say where things stand.
 */
#define _GNU_SOURCE
#include "common.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_PEERS 32
/* One end to each peer and the two of the loop. */
#define MAX_ENDS (MAX_PEERS + 2)
#define SLOTS 8
#define SIZE 512
/* Messages that the other side has not answered. */
#define WINDOW 4
#define PAUSE_US 2000
/* A peer that has nothing to say is still written to, so that its end is noticed. */
#define KNOCK_EVERY 8
/* Half a second each. Not 7 of them: Soft-RoCE takes that for "for ever". */
#define RETRY_TIMEOUT 17
#define RETRIES 4

enum state { ALIVE, FAILING, LOST };

struct introduction {
	union ibv_gid gid;
	uint16_t lid;
	uint32_t qp_num;
	uint64_t door;
	uint32_t door_key;
};

struct end {
	struct ibv_qp *qp;
	/* The child at the other side; 0 where errors are not to be expected. */
	pid_t pid;
	/* Streams: what goes out and what comes in. */
	uint64_t out_stream, in_stream;
	struct introduction self, other;
	struct ibv_mr *out, *in;
	uint64_t posted, retired, sent, received, receives_posted, receives_retired;
	enum state state;
};

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *send_cq, *receive_cq;
static struct ibv_port_attr port;
static union ibv_gid gid;
static struct end ends[MAX_ENDS];
static uint32_t end_count;
static uint64_t seed = 1, messages, lost, rounds;
static const char *device = "rxe0";
static uint32_t gid_index = 1, peers = 2;

static uint64_t id_of(const struct end *end, uint64_t count)
{
	return (uint64_t)(end - ends) << 48 | count;
}

static uint32_t length_of(uint64_t stream, uint64_t count)
{
	return 1 + key_of(seed, stream, count, 'l') % SIZE;
}

static unsigned char *slot(const struct ibv_mr *mr, uint64_t count)
{
	return (unsigned char *)mr->addr + count % SLOTS * SIZE;
}

static void post_receive(struct end *end)
{
	unsigned char *to = slot(end->in, end->receives_posted);
	struct ibv_sge sge = { (uintptr_t)to, SIZE, end->in->lkey };
	struct ibv_recv_wr wr = { .wr_id = id_of(end, end->receives_posted), .sg_list = &sge,
				  .num_sge = 1 }, *bad;
	int result;

	poison(to, SIZE);
	result = ibv_post_recv(end->qp, &wr, &bad);
	if (result)
		fail("ibv_post_recv: %s", strerror(result));
	end->receives_posted++;
}

/* A numbered message, or (to knock) eight bytes into the other side's memory. */
static void post(struct end *end, bool knock)
{
	unsigned char *from = slot(end->out, end->posted);
	uint32_t length = knock ? 8 : length_of(end->out_stream, end->sent);
	struct ibv_sge sge = { (uintptr_t)from, length, end->out->lkey };
	struct ibv_send_wr wr = { .wr_id = id_of(end, end->posted), .sg_list = &sge, .num_sge = 1,
				  .opcode = knock ? IBV_WR_RDMA_WRITE : IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED }, *bad;
	int result;

	wr.wr.rdma.remote_addr = end->other.door;
	wr.wr.rdma.rkey = end->other.door_key;
	fill(from, length, key_of(seed, end->out_stream, end->sent, 'c'));
	result = ibv_post_send(end->qp, &wr, &bad);
	if (result)
		fail("ibv_post_send: %s", strerror(result));
	end->posted++;
	end->sent += !knock;
}

static void end_of_send(struct end *end, const struct ibv_wc *wc)
{
	if (wc->wr_id != id_of(end, end->retired))
		fail("completion 0x%" PRIx64 ", expected 0x%" PRIx64 ": doubled, lost or out of order",
		     wc->wr_id, id_of(end, end->retired));
	end->retired++;
	if (wc->status == IBV_WC_SUCCESS) {
		if (end->state != ALIVE)
			fail("a request succeeded behind one that failed");
		return;
	}
	if (!end->pid)
		fail("a request to itself ended in %s", ibv_wc_status_str(wc->status));
	if (wc->status != IBV_WC_WR_FLUSH_ERR &&
	    (wc->status != IBV_WC_RETRY_EXC_ERR || end->state != ALIVE))
		fail("a request to a dead peer ended in %s", ibv_wc_status_str(wc->status));
	end->state = FAILING;
}

static void end_of_receive(struct end *end, const struct ibv_wc *wc)
{
	unsigned char *at = slot(end->in, end->receives_retired);
	uint32_t length = length_of(end->in_stream, end->received);

	if (wc->wr_id != id_of(end, end->receives_retired))
		fail("receive 0x%" PRIx64 ", expected 0x%" PRIx64 ": doubled, lost or out of order",
		     wc->wr_id, id_of(end, end->receives_retired));
	end->receives_retired++;
	if (wc->status == IBV_WC_WR_FLUSH_ERR && end->pid) {
		if (end->state == ALIVE)
			end->state = FAILING;
		return;
	}
	if (wc->status)
		fail("a receive ended in %s", ibv_wc_status_str(wc->status));
	if (wc->byte_len != length)
		fail("message %" PRIu64 " has %u bytes, expected %u", end->received, wc->byte_len, length);
	check_content(at, length, key_of(seed, end->in_stream, end->received, 'c'), "message");
	check_poison(at + length, SIZE - length, "behind the message");
	end->received++;
	messages++;
	if (end->state == ALIVE)
		post_receive(end);
}

static bool take_completions(void)
{
	struct ibv_wc wc[16];
	int sends = ibv_poll_cq(send_cq, 16, wc), receives;

	for (int i = 0; i < sends; i++)
		end_of_send(&ends[wc[i].wr_id >> 48], &wc[i]);
	receives = ibv_poll_cq(receive_cq, 16, wc);
	for (int i = 0; i < receives; i++)
		end_of_receive(&ends[wc[i].wr_id >> 48], &wc[i]);
	if (sends < 0 || receives < 0)
		fail("ibv_poll_cq failed");
	return sends + receives;
}

static struct ibv_mr *make_memory(size_t length, int access)
{
	struct ibv_mr *mr = ibv_reg_mr(pd, allocate(length), length, access);

	if (!mr)
		fail("ibv_reg_mr: %s", strerror(errno));
	return mr;
}

static void set_state(struct end *end, struct ibv_qp_attr attributes, int mask, const char *name)
{
	int result = ibv_modify_qp(end->qp, &attributes, mask | IBV_QP_STATE);

	if (result)
		fail("ibv_modify_qp to %s: %s", name, strerror(result));
}

static void make_end(struct end *end, uint64_t out_stream, uint64_t in_stream)
{
	struct ibv_qp_init_attr init = { .send_cq = send_cq, .recv_cq = receive_cq,
					 .cap = { SLOTS, SLOTS, 1, 1, 0 }, .qp_type = IBV_QPT_RC };
	struct ibv_mr *door = make_memory(8, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);

	end->out_stream = out_stream;
	end->in_stream = in_stream;
	end->out = make_memory(SLOTS * SIZE, 0);
	end->in = make_memory(SLOTS * SIZE, IBV_ACCESS_LOCAL_WRITE);
	end->qp = ibv_create_qp(pd, &init);
	if (!end->qp)
		fail("ibv_create_qp: %s", strerror(errno));
	end->self.door = (uintptr_t)door->addr;
	end->self.door_key = door->rkey;
	end->self.gid = gid;
	end->self.lid = port.lid;
	end->self.qp_num = end->qp->qp_num;
	set_state(end,
		  (struct ibv_qp_attr){ .qp_state = IBV_QPS_INIT, .port_num = 1,
					.qp_access_flags = IBV_ACCESS_REMOTE_WRITE },
		  IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, "INIT");
	for (int i = 0; i < SLOTS; i++)
		post_receive(end);
}

static void connect_end(struct end *end)
{
	const struct introduction *other = &end->other;

	set_state(end,
		  (struct ibv_qp_attr){
			  .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024,
			  .dest_qp_num = other->qp_num, .rq_psn = 1, .max_dest_rd_atomic = 1,
			  .min_rnr_timer = 6,
			  .ah_attr = { .is_global = 1,
				       .grh = { .dgid = other->gid, .sgid_index = gid_index, .hop_limit = 64 },
				       .dlid = other->lid, .port_num = 1 } },
		  IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER, "RTR");
	set_state(end,
		  (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .sq_psn = 1, .timeout = RETRY_TIMEOUT,
					.retry_cnt = RETRIES, .rnr_retry = 7, .max_rd_atomic = 1 },
		  IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			  IBV_QP_MAX_QP_RD_ATOMIC, "RTS");
}

static void open_and_make_queues(uint32_t depth)
{
	context = open_device(device);
	if (ibv_query_port(context, 1, &port) || ibv_query_gid(context, 1, gid_index, &gid))
		fail("cannot query the port");
	pd = ibv_alloc_pd(context);
	send_cq = ibv_create_cq(context, depth, NULL, NULL, 0);
	receive_cq = ibv_create_cq(context, depth, NULL, NULL, 0);
	if (!pd || !send_cq || !receive_cq)
		fail("cannot make queues: %s", strerror(errno));
}

static void join(struct end *end, int socket)
{
	socket_send(socket, &end->self, sizeof(end->self));
	socket_receive(socket, &end->other, sizeof(end->other));
	connect_end(end);
	socket_barrier(socket);
}

/* A child answers each message with one of its own, until it is killed. */
static _Noreturn void be_a_peer(uint32_t index, int socket)
{
	struct end *end = &ends[0];

	side = 1;
	open_and_make_queues(2 * SLOTS);
	make_end(end, 2 * index + 1, 2 * index);
	join(end, socket);
	for (;;) {
		while (end->sent < end->received && end->posted - end->retired < SLOTS)
			post(end, false);
		if (!take_completions())
			usleep(PAUSE_US);
	}
}

static void start_peers(int *sockets)
{
	for (uint32_t i = 0; i < peers; i++) {
		int pair[2];

		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
			fail("socketpair: %s", strerror(errno));
		ends[i].pid = fork();
		if (ends[i].pid < 0)
			fail("fork: %s", strerror(errno));
		if (ends[i].pid == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			close(pair[0]);
			be_a_peer(i, pair[1]);
		}
		close(pair[1]);
		sockets[i] = pair[0];
	}
}

static void on_signal(int signal)
{
	if (signal == SIGUSR1)
		asked_to_report = 1;
	else
		asked_to_stop = 1;
}

static void report(void)
{
	asked_to_report = 0;
	for (uint32_t i = 0; i < end_count; i++)
		fprintf(stderr,
			"end %u to %d (0x%x), state %d: posted %" PRIu64 " retired %" PRIu64 " | sent %" PRIu64
			" received %" PRIu64 " | receives %" PRIu64 " of %" PRIu64 "\n",
			i, ends[i].pid, ends[i].qp->qp_num, ends[i].state, ends[i].posted, ends[i].retired,
			ends[i].sent, ends[i].received, ends[i].receives_retired,
			ends[i].receives_posted);
}

static void work_on(struct end *end, uint64_t answered)
{
	uint64_t outstanding = end->posted - end->retired;

	if (end->state == FAILING && !outstanding && end->receives_retired == end->receives_posted) {
		end->state = LOST;
		lost++;
		printf("lost %d\n", end->pid);
		fflush(stdout);
	}
	if (end->state != ALIVE || outstanding >= SLOTS)
		return;
	if (end->sent - answered < WINDOW)
		post(end, false);
	else if (end->pid && !outstanding && rounds % KNOCK_EVERY == 0)
		post(end, true);
}

int main(int count, char **arguments)
{
	static const struct option names[] = { { "device", 1, NULL, 'd' }, { "gid-index", 1, NULL, 'g' },
					       { "peers", 1, NULL, 'p' }, { "seed", 1, NULL, 's' }, { 0 } };
	struct sigaction action = { .sa_handler = on_signal };
	int sockets[MAX_PEERS], option;
	struct end *loop;

	while ((option = getopt_long(count, arguments, "", names, NULL)) >= 0) {
		if (option == 'd')
			device = optarg;
		else if (option == 'g')
			gid_index = number("gid-index", optarg);
		else if (option == 'p')
			peers = number("peers", optarg);
		else if (option == 's')
			seed = number("seed", optarg);
		else
			return 2;
	}
	if (peers < 1 || peers > MAX_PEERS)
		fail("1 to %d peers", MAX_PEERS);
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	start_peers(sockets);
	end_count = peers + 2;
	open_and_make_queues(end_count * SLOTS);
	for (uint32_t i = 0; i < peers; i++) {
		make_end(&ends[i], 2 * i, 2 * i + 1);
		join(&ends[i], sockets[i]);
	}
	loop = &ends[peers];
	make_end(&loop[0], 2 * peers, 2 * peers + 1);
	make_end(&loop[1], 2 * peers + 1, 2 * peers);
	loop[0].other = loop[1].self;
	loop[1].other = loop[0].self;
	connect_end(&loop[0]);
	connect_end(&loop[1]);
	printf("ready\n");
	fflush(stdout);
	while (!asked_to_stop) {
		rounds++;
		if (asked_to_report)
			report();
		for (uint32_t i = 0; i < peers; i++)
			work_on(&ends[i], ends[i].received);
		work_on(&loop[0], loop[1].received);
		work_on(&loop[1], loop[0].received);
		if (!take_completions())
			usleep(PAUSE_US);
	}
	printf("{\"program\":\"survivor\",\"messages\":%" PRIu64 ",\"lost\":%" PRIu64 ",\"errors\":0}\n",
	       messages, lost);
	return 0;
}
