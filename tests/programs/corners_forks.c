/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Children of a process that is in the middle of its traffic.
 */
#define _GNU_SOURCE
#include "corners.h"
#include "stream.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct wish connected = { .type = IBV_QPT_RC, .access = ALL_REMOTE,
				       .state = IBV_QPS_RTS, .rnr_retry = 7, .retry_cnt = 7,
				       .mtu = IBV_MTU_1024, .psn = 4711, .two_cqs = true };

bool children_are_refused;

static atomic_bool stop;

/* Files and mappings of a device in this process. */
static int ways_to_a_device(void)
{
	DIR *folder = opendir("/proc/self/fd");
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[4096];
	int found = 0;

	for (struct dirent *entry; (entry = readdir(folder));) {
		ssize_t length = readlinkat(dirfd(folder), entry->d_name, line, sizeof(line) - 1);

		line[length > 0 ? length : 0] = 0;
		found += strstr(line, "infiniband") != NULL;
	}
	while (fgets(line, sizeof(line), maps))
		found += strstr(line, "/dev/infiniband") != NULL;
	closedir(folder);
	fclose(maps);
	return found;
}

/* Every verb is refused, and does nothing. Registered memory may not be there at all (ibv_fork_init). */
static void expect_refusals(struct corner *corner, const char *when)
{
	struct facts *facts = corner->facts;
	struct pair *pair = &corner->pair;
	struct ibv_sge sge = piece(facts, 0, 8);
	struct ibv_send_wr send = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND },
			   *bad_send = NULL;
	struct ibv_recv_wr receive = { .sg_list = &sge, .num_sge = 1 }, *bad_receive = NULL;
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_ERR };
	struct ibv_qp_init_attr init = { .send_cq = pair->cq, .recv_cq = pair->cq,
					 .qp_type = IBV_QPT_RC, .cap = { 1, 1, 1, 1, 0 } };
	struct ibv_srq_init_attr srq = { .attr = { 1, 1, 0 } };
	struct ibv_ah_attr address = { .port_num = 1 };
	struct ibv_device_attr device;
	struct ibv_port_attr port;
	struct ibv_async_event event;
	struct ibv_cq *cq;
	struct ibv_wc wc;
	void *context;

	printf("# verbs of a child %s\n", when);
	expect_error(facts, "child: post a send", ibv_post_send(pair->a, &send, &bad_send), EIO);
	expect(facts, "child: bad_wr of the send", bad_send == &send, 1);
	expect_error(facts, "child: post a receive",
		     ibv_post_recv(pair->b, &receive, &bad_receive), EIO);
	expect(facts, "child: bad_wr of the receive", bad_receive == &receive, 1);
	expect_error(facts, "child: post to an SRQ",
		     ibv_post_srq_recv(pair->srq, &receive, &bad_receive), EIO);
	expect(facts, "child: poll", ibv_poll_cq(pair->cq, 1, &wc) < 0, 1);
	expect_error(facts, "child: arm", ibv_req_notify_cq(pair->cq_b, 0), EIO);
	expect(facts, "child: get a completion event",
	       ibv_get_cq_event(corner->wish.channel, &cq, &context), -1);
	expect(facts, "child: get an asynchronous event",
	       ibv_get_async_event(facts->context, &event), -1);
	expect_error(facts, "child: query the device", ibv_query_device(facts->context, &device), EIO);
	expect_error(facts, "child: query the port", ibv_query_port(facts->context, 1, &port), EIO);
	expect_error(facts, "child: PD", ERROR_OF(ibv_alloc_pd(facts->context)), EIO);
	expect_error(facts, "child: MR",
		     ERROR_OF(ibv_reg_mr(facts->pd, &wc, sizeof(wc), IBV_ACCESS_LOCAL_WRITE)), EIO);
	expect_error(facts, "child: CQ", ERROR_OF(ibv_create_cq(facts->context, 1, NULL, NULL, 0)),
		     EIO);
	expect_error(facts, "child: SRQ", ERROR_OF(ibv_create_srq(facts->pd, &srq)), EIO);
	expect_error(facts, "child: QP", ERROR_OF(ibv_create_qp(facts->pd, &init)), EIO);
	expect_error(facts, "child: AH", ERROR_OF(ibv_create_ah(facts->pd, &address)), EIO);
	expect_error(facts, "child: modify a QP",
		     ibv_modify_qp(pair->a, &attributes, IBV_QP_STATE), EIO);
	expect_error(facts, "child: query a QP",
		     ibv_query_qp(pair->a, &attributes, IBV_QP_STATE, &init), EIO);
	expect_error(facts, "child: query an SRQ", ibv_query_srq(pair->srq, &srq.attr), EIO);
	expect_error(facts, "child: destroy a QP", ibv_destroy_qp(pair->a), EIO);
	expect_error(facts, "child: destroy an SRQ", ibv_destroy_srq(pair->srq), EIO);
	expect_error(facts, "child: destroy a CQ", ibv_destroy_cq(pair->cq), EIO);
	expect_error(facts, "child: deregister memory", ibv_dereg_mr(facts->mr), EIO);
	expect_error(facts, "child: free the PD", ibv_dealloc_pd(facts->pd), EIO);
}

/* The child says that it is ready, and waits until it is told to end. */
static void wait_for_parent(int parent)
{
	char token = 'r';

	socket_send(parent, &token, 1);
	socket_receive(parent, &token, 1);
}

static int live_on(struct corner *corner, int parent)
{
	int result = 0;

	if (children_are_refused) {
		expect_refusals(corner, "before");
		expect(corner->facts, "child: ways to a device", ways_to_a_device(), 0);
	}
	wait_for_parent(parent);
	if (children_are_refused) {
		expect_refusals(corner, "after");
		expect(corner->facts, "child: ways to a device after it", ways_to_a_device(), 0);
		result = ibv_close_device(corner->facts->context);
		expect_error(corner->facts, "child: close the device", result, 0);
	}
	return corner->facts->failed;
}

/* A child that opens a device for itself, and has traffic of its own. */
static int open_own(struct corner *inherited, int parent)
{
	struct facts facts = { .gid_index = inherited->facts->gid_index };
	struct corner corner = { .facts = &facts, .name = "child", .wish = connected };
	struct stream stream;

	open_facts(&facts, ibv_get_device_name(inherited->facts->context->device));
	make_pair(&facts, &corner.pair, corner.wish);
	start_stream(&stream, &corner);
	if (children_are_refused)
		expect_refusals(inherited, "that has a device of its own");
	wait_for_parent(parent);
	finish_stream(&stream);
	drop_pair(&corner.pair);
	return close_facts(&facts) + inherited->facts->failed;
}

struct child {
	pid_t pid;
	int socket;
};

static struct child start_child(struct corner *corner, int (*run)(struct corner *corner, int parent))
{
	struct child child;
	int ends[2];

	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
	child = (struct child){ .pid = fork(), .socket = ends[0] };
	if (child.pid < 0)
		fail("fork: %s", strerror(errno));
	if (!child.pid) {
		/* What the parent has found wrong is not the child's. */
		corner->facts->failed = 0;
		_exit(run(corner, ends[1]));
	}
	close(ends[1]);
	return child;
}

static void wait_until_ready(struct child child)
{
	char token;

	socket_receive(child.socket, &token, 1);
}

static void tell_to_end(struct child child)
{
	socket_send(child.socket, "e", 1);
}

static void end_child(struct corner *corner, struct child child, const char *what)
{
	int status = -1;

	close(child.socket);
	if (waitpid(child.pid, &status, 0) != child.pid)
		fail("waitpid: %s", strerror(errno));
	expect(corner->facts, what, status, 0);
}

static int exit_at_once(struct corner *corner, int parent)
{
	(void)corner, (void)parent;
	return 0;
}

static int execute(struct corner *corner, int parent)
{
	(void)corner, (void)parent;
	execl("/bin/true", "true", NULL);
	return 1;
}

/* Programs that are started all the time. */
static void *start_programs(void *argument)
{
	unsigned long started = 0;

	(void)argument;
	for (; !stop; started++) {
		FILE *pipe = popen("echo yes", "r");
		char answer[8] = "";

		if (!pipe || !fgets(answer, sizeof(answer), pipe) || strcmp(answer, "yes\n") ||
		    pclose(pipe) || system("true"))
			fail("a program could not be started");
	}
	return (void *)started;
}

void children(struct facts *facts, unsigned int cycles)
{
	struct corner corner = { .facts = facts, .name = "stream", .wish = connected };
	struct ibv_srq_init_attr init = { .attr = { .max_wr = 1, .max_sge = 1 } };
	struct child living, owning;
	struct stream stream;
	pthread_t starter;
	void *started;

	corner.wish.channel = ibv_create_comp_channel(facts->context);
	if (!corner.wish.channel)
		fail("no completion channel");
	make_pair(facts, &corner.pair, corner.wish);
	corner.pair.srq = ibv_create_srq(facts->pd, &init);
	if (!corner.pair.srq)
		fail("no SRQ");
	start_stream(&stream, &corner);
	for (int i = 0; i < 3; i++) {
		end_child(&corner, start_child(&corner, exit_at_once), "a child that exits");
		end_child(&corner, start_child(&corner, execute), "a child that executes a program");
	}
	cycle(cycles);
	living = start_child(&corner, live_on);
	wait_until_ready(living);
	cycle(cycles);
	owning = start_child(&corner, open_own);
	wait_until_ready(owning);
	must(pthread_create(&starter, NULL, start_programs, NULL), "pthread_create");
	cycle(2 * cycles);
	stop = true;
	pthread_join(starter, &started);
	printf("# %lu programs started\n", (unsigned long)started);
	expect(facts, "programs were started", (unsigned long)started > 0, 1);
	tell_to_end(living);
	end_child(&corner, living, "a child that lived on");
	cycle(cycles);
	tell_to_end(owning);
	end_child(&corner, owning, "a child with a device of its own");
	cycle(cycles);
	finish_stream(&stream);
	drop_pair(&corner.pair);
	must(ibv_destroy_comp_channel(corner.wish.channel), "ibv_destroy_comp_channel");
}
