/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * verb_costs: what verbs cost, and something for a checkpoint to take its time over.
 *
 *   verb_costs --device NAME --gid-index N --loop N
 *       A queue pair connected to itself: N times one SEND of 64 bytes, posted and polled. Prints
 *       {"nanoseconds":...} for one.
 *
 *   verb_costs --device NAME --gid-index N --qps N --mrs N
 *       Makes N queue pairs, each connected to itself, and N regions of 1 MiB; measures the verbs, there and
 *       back, once. Then makes them again, prints {"qps_up":...} (seconds, see print below) and
 *       "ready", and sends over every queue pair and checks every handle until SIGTERM.
 */
#include "common.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MOST 1024
#define REGION (1 << 20)
#define LENGTH 64

static const char *device = "rxe0";
static uint32_t gid_index = 1, qps, mrs;
static uint64_t loops;

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_mr *buffer_mr;
static unsigned char *buffer, *memory;
static struct ibv_qp *qp[MOST];
static struct ibv_mr *mr[MOST];
static struct ibv_port_attr port;
static union ibv_gid gid;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static void create_pair(uint32_t index)
{
	struct ibv_qp_init_attr init = {
		.send_cq = cq, .recv_cq = cq, .cap = { 8, 8, 1, 1, 0 }, .qp_type = IBV_QPT_RC,
	};

	qp[index] = ibv_create_qp(pd, &init);
	if (!qp[index])
		fail("ibv_create_qp: %s", strerror(errno));
}

static void connect_pair(uint32_t index)
{
	struct way way = {
		.gid = gid,
		.lid = port.lid,
		.qp_num = qp[index]->qp_num,
		.gid_index = gid_index,
		.port = &port,
		.reads = 1,
	};

	initialize_qp(qp[index], 0, 0);
	connect_qp(qp[index], &way);
}

static void register_region(uint32_t index)
{
	mr[index] = register_memory(pd, memory + index * (size_t)REGION, REGION,
				    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
}

static void destroy_pair(uint32_t index)
{
	must(ibv_destroy_qp(qp[index]), "ibv_destroy_qp");
}

static void deregister_region(uint32_t index)
{
	must(ibv_dereg_mr(mr[index]), "ibv_dereg_mr");
}

/* Seconds that one verb takes for all. */
static double all(void (*verb)(uint32_t), uint32_t count)
{
	double start = now();

	for (uint32_t i = 0; i < count; i++)
		verb(i);
	return now() - start;
}

/* One message from a queue pair to itself. */
static void send_and_check(uint32_t index, uint64_t key)
{
	struct ibv_sge to = { (uintptr_t)buffer + LENGTH, LENGTH, buffer_mr->lkey };
	struct ibv_sge from = { (uintptr_t)buffer, LENGTH, buffer_mr->lkey };
	struct ibv_recv_wr receive = { .wr_id = 1, .sg_list = &to, .num_sge = 1 }, *bad_receive;
	struct ibv_send_wr send = {
		.wr_id = 2, .sg_list = &from, .num_sge = 1, .opcode = IBV_WR_SEND,
		.send_flags = IBV_SEND_SIGNALED,
	}, *bad_send;
	int missing = 2;

	fill(buffer, LENGTH, key);
	must(ibv_post_recv(qp[index], &receive, &bad_receive), "ibv_post_recv");
	must(ibv_post_send(qp[index], &send, &bad_send), "ibv_post_send");
	while (missing) {
		struct ibv_wc wc;
		int count = ibv_poll_cq(cq, 1, &wc);

		if (count < 0 || (count && wc.status))
			fail("completion %d: %s", count, count < 0 ? "" : ibv_wc_status_str(wc.status));
		if (count && wc.qp_num != qp[index]->qp_num)
			fail("completion of QP 0x%x for one of QP 0x%x", qp[index]->qp_num, wc.qp_num);
		missing -= count;
	}
	check_content(buffer + LENGTH, LENGTH, key, "message");
}

static void read_options(int count, char **arguments)
{
	static const struct option names[] = {
		{ "device", required_argument, NULL, 'd' }, { "gid-index", required_argument, NULL, 'g' },
		{ "loop", required_argument, NULL, 'l' },   { "qps", required_argument, NULL, 'q' },
		{ "mrs", required_argument, NULL, 'm' },    { NULL, 0, NULL, 0 },
	};
	int option, index;

	while ((option = getopt_long(count, arguments, "", names, &index)) != -1) {
		const char *name = option == '?' ? "" : names[index].name;

		switch (option) {
		case 'd': device = optarg; break;
		case 'g': gid_index = number(name, optarg); break;
		case 'l': loops = number(name, optarg); break;
		case 'q': qps = number(name, optarg); break;
		case 'm': mrs = number(name, optarg); break;
		default: exit(2);
		}
	}
	if (qps > MOST || mrs > MOST)
		fail("at most %d", MOST);
}

static void run_loop(void)
{
	double start;

	create_pair(0);
	connect_pair(0);
	for (uint64_t i = 0; i < 100; i++)
		send_and_check(0, i);
	start = now();
	for (uint64_t i = 0; i < loops; i++)
		send_and_check(0, i);
	printf("{\"nanoseconds\":%.1f}\n", (now() - start) * 1e9 / loops);
}

static void run_objects(void)
{
	double up, connected, down, registered, deregistered;
	uint32_t numbers[MOST], keys[MOST];

	memory = allocate(mrs * (size_t)REGION + 1);
	up = all(create_pair, qps);
	connected = all(connect_pair, qps);
	registered = all(register_region, mrs);
	down = all(destroy_pair, qps);
	deregistered = all(deregister_region, mrs);
	printf("{\"create_qps\":%.6f,\"connect_qps\":%.6f,\"destroy_qps\":%.6f,\"register_mrs\":%.6f,"
	       "\"deregister_mrs\":%.6f}\n",
	       up, connected, down, registered, deregistered);
	all(create_pair, qps);
	all(connect_pair, qps);
	all(register_region, mrs);
	for (uint32_t i = 0; i < qps; i++)
		numbers[i] = qp[i]->qp_num;
	for (uint32_t i = 0; i < mrs; i++)
		keys[i] = mr[i]->rkey;
	printf("ready\n");
	fflush(stdout);
	for (uint64_t key = 0; !asked_to_stop; key++) {
		if (qps)
			send_and_check(key % qps, key);
		else
			usleep(1000);
		for (uint32_t i = 0; i < qps; i++)
			if (qp[i]->qp_num != numbers[i])
				fail("QP number 0x%x has become 0x%x", numbers[i], qp[i]->qp_num);
		for (uint32_t i = 0; i < mrs; i++)
			if (mr[i]->rkey != keys[i])
				fail("rkey 0x%x has become 0x%x", keys[i], mr[i]->rkey);
	}
	printf("ok\n");
}

static void stop(int signal_number)
{
	(void)signal_number;
	asked_to_stop = 1;
}

int main(int count, char **arguments)
{
	read_options(count, arguments);
	signal(SIGTERM, stop);
	context = open_device(device);
	if (ibv_query_port(context, 1, &port) || ibv_query_gid(context, 1, gid_index, &gid))
		fail("port 1 of %s: %s", device, strerror(errno));
	pd = ibv_alloc_pd(context);
	cq = ibv_create_cq(context, 64, NULL, NULL, 0);
	buffer = allocate(2 * LENGTH);
	if (!pd || !cq)
		fail("protection domain or completion queue: %s", strerror(errno));
	buffer_mr = register_memory(pd, buffer, 2 * LENGTH, IBV_ACCESS_LOCAL_WRITE);
	if (loops)
		run_loop();
	else
		run_objects();
	return 0;
}
