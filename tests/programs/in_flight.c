/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * in_flight: one process keeps so many bytes on their way to another, and says how fast they arrive.
 *
 *   in_flight --device NAME --gid-index N --bytes N --message N [--send]
 *
 * The bytes are WRITEs, or SENDs, of the given length, each with a completion. After "ready" lines
 * "arrived BYTES SECONDS" come: what has completed so far, and when the last of it did. With 0 bytes
 * nothing is sent but one short WRITE from time to time, without a completion. SIGTERM ends it: both
 * sides check what they have.
 */
#include "common.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST 1024
/* The sender's last word is a SEND of no bytes. */
#define END_ID UINT64_MAX

static const char *device = "rxe0";
static uint32_t gid_index = 1, message = 65536;
static uint64_t bytes;
static bool sends;

static struct ibv_cq *cq;
static struct ibv_qp *qp;
static struct ibv_mr *mr;
static unsigned char *memory;
static uint64_t depth;

struct introduction {
	union ibv_gid gid;
	uint16_t lid;
	uint32_t qp_num, key;
	uint64_t memory;
};

static struct introduction peer;

static void read_options(int count, char **arguments)
{
	static const struct option names[] = {
		{ "device", required_argument, NULL, 'd' },
		{ "gid-index", required_argument, NULL, 'g' },
		{ "bytes", required_argument, NULL, 'b' },
		{ "message", required_argument, NULL, 'm' },
		{ "send", no_argument, NULL, 's' },
		{ NULL, 0, NULL, 0 },
	};
	int option, index;

	while ((option = getopt_long(count, arguments, "", names, &index)) != -1) {
		const char *name = option == '?' ? "" : names[index].name;

		switch (option) {
		case 'd': device = optarg; break;
		case 'g': gid_index = number(name, optarg); break;
		case 'b': bytes = number(name, optarg); break;
		case 'm': message = number(name, optarg); break;
		case 's': sends = true; break;
		default: exit(2);
		}
	}
	if (!message || bytes / message > MOST)
		fail("at most %d messages", MOST);
	depth = bytes / message;
}

static void set_up(int socket)
{
	struct ibv_context *context = open_device(device);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	struct ibv_qp_init_attr init = { .cap = { MOST + 1, MOST + 1, 1, 1, 0 },
					 .qp_type = IBV_QPT_RC };
	size_t length = (depth + 1) * (size_t)message;
	struct ibv_port_attr port;
	struct introduction self;

	cq = ibv_create_cq(context, 2 * (MOST + 1), NULL, NULL, 0);
	if (!pd || !cq)
		fail("protection domain or completion queue: %s", strerror(errno));
	memory = allocate(length);
	mr = register_memory(pd, memory, length, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	init.send_cq = init.recv_cq = cq;
	qp = ibv_create_qp(pd, &init);
	if (!qp)
		fail("ibv_create_qp: %s", strerror(errno));
	if (ibv_query_port(context, 1, &port) || ibv_query_gid(context, 1, gid_index, &self.gid))
		fail("port 1 of %s: %s", device, strerror(errno));
	initialize_qp(qp, IBV_ACCESS_REMOTE_WRITE, 0);
	self.lid = port.lid;
	self.qp_num = qp->qp_num;
	self.key = mr->rkey;
	self.memory = (uintptr_t)memory;
	socket_send(socket, &self, sizeof(self));
	socket_receive(socket, &peer, sizeof(peer));
	connect_qp(qp, &(struct way){ .gid = peer.gid, .lid = peer.lid, .qp_num = peer.qp_num,
				      .gid_index = gid_index, .port = &port, .reads = 1 });
}

/* Message `number`, which is always the same for its place. */
static void post_send(uint64_t number)
{
	uint64_t place = number % depth * message;
	struct ibv_sge sge = { (uintptr_t)memory + place, message, mr->lkey };
	struct ibv_send_wr wr = {
		.wr_id = number, .sg_list = &sge, .num_sge = 1,
		.opcode = sends ? IBV_WR_SEND : IBV_WR_RDMA_WRITE,
		.send_flags = IBV_SEND_SIGNALED,
		.wr.rdma = { peer.memory + place, peer.key },
	}, *bad;

	must(ibv_post_send(qp, &wr, &bad), "ibv_post_send");
}

static void post_receive(uint64_t number)
{
	struct ibv_sge sge = { (uintptr_t)memory + (depth ? number % depth * message : 0), message,
			       mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = number, .sg_list = &sge, .num_sge = 1 }, *bad;

	must(ibv_post_recv(qp, &wr, &bad), "ibv_post_recv");
}

/* Polls one completion; fails unless it is the one that has to come next. */
static bool completed(uint64_t expected)
{
	struct ibv_wc wc;
	int count = ibv_poll_cq(cq, 1, &wc);

	if (count < 0 || (count && wc.status))
		fail("completion %d: %s", count, count < 0 ? "" : ibv_wc_status_str(wc.status));
	if (count && wc.wr_id != expected)
		fail("completion %" PRIu64 " instead of %" PRIu64, wc.wr_id, expected);
	return count;
}

static void wait_a_little(void)
{
	check_processes();
	sched_yield();
}

/* So many messages have completed by now; said at most five times a second. */
static void say_arrived(uint64_t done)
{
	static double said;
	double now = running_time();

	if (now - said < 0.2)
		return;
	printf("arrived %" PRIu64 " %.6f\n", done * message, now);
	fflush(stdout);
	said = now;
}

static void say_ready(void)
{
	printf("ready\n");
	fflush(stdout);
}

/* The last request has a completion, so everything before it is over too. */
static void end_stream(void)
{
	struct ibv_send_wr wr = { .wr_id = END_ID, .opcode = IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED }, *bad;

	must(ibv_post_send(qp, &wr, &bad), "ibv_post_send");
	while (!completed(END_ID))
		wait_a_little();
}

static uint64_t run_sender(void)
{
	uint64_t posted = 0, done = 0;

	for (uint64_t i = 0; i < depth; i++)
		fill(memory + i * message, message, i);
	say_ready();
	while (!asked_to_stop || done < posted) {
		for (; !asked_to_stop && posted < done + depth; posted++)
			post_send(posted);
		if (completed(done))
			say_arrived(++done);
		else
			wait_a_little();
	}
	end_stream();
	return done;
}

/* Short WRITEs whose end is never seen, as if nothing were on its way. */
static uint64_t run_idle(void)
{
	struct ibv_sge sge = { (uintptr_t)memory, 8, mr->lkey };
	struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
				  .wr.rdma = { peer.memory, peer.key } }, *bad;
	uint64_t done = 0;

	say_ready();
	for (; !asked_to_stop; done++) {
		must(ibv_post_send(qp, &wr, &bad), "ibv_post_send");
		usleep(100000);
		check_processes();
		say_arrived(0);
		if (done % 100 != 99)
			continue;
		wr.send_flags = IBV_SEND_SIGNALED;
		must(ibv_post_send(qp, &wr, &bad), "ibv_post_send");
		while (!completed(0))
			wait_a_little();
		wr.send_flags = 0;
	}
	end_stream();
	return done;
}

/* The receiver of SENDs keeps one receive more than there are messages, for the end. */
static void run_receiver(void)
{
	uint64_t received = 0, posted = 0;

	for (uint64_t last = sends ? depth : 0; posted <= last; posted++)
		post_receive(posted);
	for (;;) {
		struct ibv_wc wc;
		int count = ibv_poll_cq(cq, 1, &wc);

		if (count < 0 || (count && wc.status))
			fail("completion %d: %s", count, count < 0 ? "" : ibv_wc_status_str(wc.status));
		if (!count) {
			sched_yield();
			continue;
		}
		if (wc.wr_id != received++)
			fail("receive %" PRIu64 " instead of %" PRIu64, wc.wr_id, received - 1);
		if (wc.byte_len == 0)
			break;
		post_receive(posted++);
	}
	for (uint64_t i = 0; i < depth; i++)
		check_content(memory + i * message, message, i, "what has arrived");
}

int main(int count, char **arguments)
{
	uint64_t done = 0;
	int socket;

	read_options(count, arguments);
	socket = split_in_two();
	set_up(socket);
	socket_barrier(socket);
	if (side) {
		run_receiver();
		return 0;
	}
	done = depth ? run_sender() : run_idle();
	join_children();
	printf("{\"program\":\"in_flight\",\"messages\":%" PRIu64 ",\"errors\":0}\n", done);
	return 0;
}
