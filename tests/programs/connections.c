/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * connections: makes connections by rdma_cm, and in between has nothing but an event channel.
 *
 *   connections --orders FILE
 *
 * Whenever FILE is there, it is removed, and what stands in it is done:
 *   ADDRESS   listens there, connects to itself, sends MESSAGES messages and checks them, and lets go of all of it but the event
 *             channel. Then prints "idle N", N being how often that was done.
 *   hold      makes an id that is bound to nothing, and keeps it. Then prints "holding".
 *   release   destroys it. Then prints "released".
 *
 * SIGTERM ends it, with {"messages":N,"errors":0}.
 */
#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <rdma/rdma_cma.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Soft-RoCE takes seconds for each between two queue pairs of one process that rdma_cm has connected, on the bare device too. */
#define MESSAGES 2
#define LENGTH 512
#define ORDER 64

/* One end of a connection. */
struct end {
	struct rdma_cm_id *id;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_mr *mr;
	unsigned char *buffer;
};

static struct rdma_event_channel *channel;
static uint64_t messages;

static void finish(int number)
{
	(void)number;
	asked_to_stop = 1;
}

/* Waits for an event of this kind, and gives the id that it belongs to. */
static struct rdma_cm_id *wait_for(enum rdma_cm_event_type wanted)
{
	struct rdma_cm_event *event;
	struct rdma_cm_id *id;

	if (rdma_get_cm_event(channel, &event))
		fail("rdma_get_cm_event: %s", strerror(errno));
	if (event->event != wanted)
		fail("event %s (%d) instead of %s", rdma_event_str(event->event), event->status, rdma_event_str(wanted));
	id = event->id;
	if (rdma_ack_cm_event(event))
		fail("rdma_ack_cm_event: %s", strerror(errno));
	return id;
}

static struct rdma_cm_id *create_id(void)
{
	struct rdma_cm_id *id;

	if (rdma_create_id(channel, &id, NULL, RDMA_PS_TCP))
		fail("rdma_create_id: %s", strerror(errno));
	return id;
}

static void create_end(struct end *end, struct rdma_cm_id *id)
{
	struct ibv_qp_init_attr attributes = { .cap = { 4, 4, 1, 1, 0 }, .qp_type = IBV_QPT_RC, .sq_sig_all = 1 };

	end->id = id;
	end->buffer = allocate(LENGTH);
	end->pd = ibv_alloc_pd(id->verbs);
	end->cq = ibv_create_cq(id->verbs, 8, NULL, NULL, 0);
	if (!end->pd || !end->cq)
		fail("a protection domain and a completion queue: %s", strerror(errno));
	end->mr = ibv_reg_mr(end->pd, end->buffer, LENGTH, IBV_ACCESS_LOCAL_WRITE);
	if (!end->mr)
		fail("ibv_reg_mr: %s", strerror(errno));
	attributes.send_cq = attributes.recv_cq = end->cq;
	if (rdma_create_qp(id, end->pd, &attributes))
		fail("rdma_create_qp: %s", strerror(errno));
}

static void destroy_end(struct end *end)
{
	rdma_destroy_qp(end->id);
	if (ibv_dereg_mr(end->mr) || ibv_destroy_cq(end->cq) || ibv_dealloc_pd(end->pd))
		fail("an end cannot be destroyed: %s", strerror(errno));
	if (rdma_destroy_id(end->id))
		fail("rdma_destroy_id: %s", strerror(errno));
	free(end->buffer);
}

static void wait_for_completion(struct end *end, const char *what)
{
	struct ibv_wc wc;
	int count;

	while (!(count = ibv_poll_cq(end->cq, 1, &wc)))
		usleep(100);
	if (count < 0 || wc.status != IBV_WC_SUCCESS)
		fail("%s: %d completions, %s", what, count, count < 0 ? "" : ibv_wc_status_str(wc.status));
}

static void send_one(struct end *from, struct end *to)
{
	struct ibv_sge in = { (uintptr_t)to->buffer, LENGTH, to->mr->lkey };
	struct ibv_sge out = { (uintptr_t)from->buffer, LENGTH, from->mr->lkey };
	struct ibv_recv_wr receive = { .sg_list = &in, .num_sge = 1 }, *bad_receive;
	struct ibv_send_wr send = { .sg_list = &out, .num_sge = 1, .opcode = IBV_WR_SEND }, *bad_send;

	poison(to->buffer, LENGTH);
	fill(from->buffer, LENGTH, messages);
	if (ibv_post_recv(to->id->qp, &receive, &bad_receive) || ibv_post_send(from->id->qp, &send, &bad_send))
		fail("posting: %s", strerror(errno));
	wait_for_completion(from, "send");
	wait_for_completion(to, "receive");
	check_content(to->buffer, LENGTH, messages, "received");
	messages++;
}

/* From nothing to a connection and back. */
static void exchange(const char *address)
{
	struct sockaddr_in there = { .sin_family = AF_INET };
	struct rdma_conn_param parameters = { .retry_count = 7, .rnr_retry_count = 7 };
	struct rdma_cm_id *listener = create_id(), *active = create_id();
	struct end client, server;

	if (inet_pton(AF_INET, address, &there.sin_addr) != 1)
		fail("not an address: %s", address);
	if (rdma_bind_addr(listener, (struct sockaddr *)&there) || rdma_listen(listener, 1))
		fail("listening on %s: %s", address, strerror(errno));
	there.sin_port = rdma_get_src_port(listener);
	if (rdma_resolve_addr(active, NULL, (struct sockaddr *)&there, 2000))
		fail("rdma_resolve_addr: %s", strerror(errno));
	wait_for(RDMA_CM_EVENT_ADDR_RESOLVED);
	if (rdma_resolve_route(active, 2000))
		fail("rdma_resolve_route: %s", strerror(errno));
	wait_for(RDMA_CM_EVENT_ROUTE_RESOLVED);
	create_end(&client, active);
	if (rdma_connect(active, &parameters))
		fail("rdma_connect: %s", strerror(errno));
	create_end(&server, wait_for(RDMA_CM_EVENT_CONNECT_REQUEST));
	if (rdma_accept(server.id, &parameters))
		fail("rdma_accept: %s", strerror(errno));
	wait_for(RDMA_CM_EVENT_ESTABLISHED);
	wait_for(RDMA_CM_EVENT_ESTABLISHED);
	for (int i = 0; i < MESSAGES; i++) {
		send_one(&client, &server);
		send_one(&server, &client);
	}
	if (rdma_disconnect(client.id))
		fail("rdma_disconnect: %s", strerror(errno));
	wait_for(RDMA_CM_EVENT_DISCONNECTED);
	wait_for(RDMA_CM_EVENT_DISCONNECTED);
	destroy_end(&client);
	destroy_end(&server);
	if (rdma_destroy_id(listener))
		fail("rdma_destroy_id: %s", strerror(errno));
}

/* Takes the order that is in a file, if there is one. */
static bool take_order(const char *name, char order[ORDER])
{
	FILE *file = fopen(name, "r");
	bool taken;

	if (!file)
		return false;
	taken = fgets(order, ORDER, file);
	fclose(file);
	if (taken && unlink(name))
		fail("%s: %s", name, strerror(errno));
	return taken;
}

int main(int count, char **arguments)
{
	struct rdma_cm_id *held = NULL;
	char order[ORDER];
	int exchanges = 0;

	if (count != 3 || strcmp(arguments[1], "--orders"))
		fail("usage: connections --orders FILE");
	signal(SIGTERM, finish);
	setvbuf(stdout, NULL, _IOLBF, 0);
	channel = rdma_create_event_channel();
	if (!channel)
		fail("rdma_create_event_channel: %s", strerror(errno));
	while (!asked_to_stop) {
		if (!take_order(arguments[2], order)) {
			usleep(10000);
		} else if (!strcmp(order, "hold")) {
			held = create_id();
			printf("holding\n");
		} else if (!strcmp(order, "release")) {
			if (rdma_destroy_id(held))
				fail("rdma_destroy_id: %s", strerror(errno));
			printf("released\n");
		} else {
			exchange(order);
			printf("idle %d\n", ++exchanges);
		}
	}
	rdma_destroy_event_channel(channel);
	printf("{\"messages\":%llu,\"errors\":0}\n", (unsigned long long)messages);
	return 0;
}
