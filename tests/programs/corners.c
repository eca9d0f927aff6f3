/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Helpers and main; see corners.h.
 */
#define _GNU_SOURCE
#include "corners.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *answers;

static void pause_for(long milliseconds)
{
	struct timespec pause = { milliseconds / 1000, milliseconds % 1000 * 1000000 };

	nanosleep(&pause, NULL);
}

void cycle(unsigned int count)
{
	static unsigned int number;
	char path[4096];

	while (count--) {
		snprintf(path, sizeof(path), "%s/%u", answers, ++number);
		printf("cycle? %u\n", number);
		while (access(path, F_OK))
			pause_for(2);
	}
}

const char *of(const struct corner *corner, const char *what)
{
	static char text[200];

	snprintf(text, sizeof(text), "%s: %s", corner->name, what);
	return text;
}

enum ibv_qp_state state_of(struct ibv_qp *qp)
{
	struct ibv_qp_attr attributes;
	struct ibv_qp_init_attr init;

	must(ibv_query_qp(qp, &attributes, IBV_QP_STATE, &init), "ibv_query_qp");
	return attributes.qp_state;
}

int change_state(struct ibv_qp *qp, enum ibv_qp_state state)
{
	struct ibv_qp_attr attributes = { .qp_state = state };

	return ibv_modify_qp(qp, &attributes, IBV_QP_STATE);
}

void connect_both(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	to_rtr(corner->facts, pair->a, pair->b->qp_num, &corner->wish);
	to_rtr(corner->facts, pair->b, pair->a->qp_num, &corner->wish);
	to_rts(pair->a, &corner->wish);
	to_rts(pair->b, &corner->wish);
}

static unsigned char *slot(const struct corner *corner, unsigned int number)
{
	return corner->facts->memory + corner->area + number * SLOT;
}

static uint64_t key(const struct corner *corner, unsigned int id)
{
	return key_of(1, corner->area, id, 0);
}

void send_message(struct corner *corner, struct ibv_qp *qp, unsigned int id)
{
	struct ibv_sge sge = piece(corner->facts, corner->area + id % SLOTS * SLOT, LENGTH);

	fill(slot(corner, id % SLOTS), LENGTH, key(corner, id));
	must(post_one(qp, IBV_WR_SEND, id, &sge, 1, 0, 0, IBV_SEND_SIGNALED), "ibv_post_send");
}

void receive_message(struct corner *corner, struct ibv_qp *qp, unsigned int id)
{
	unsigned int number = SLOTS + id % SLOTS;
	struct ibv_sge sge = piece(corner->facts, corner->area + number * SLOT, SLOT);

	poison(slot(corner, number), SLOT);
	must(receive_one(qp, id, &sge, 1), "ibv_post_recv");
}

void expect_message(struct corner *corner, struct ibv_cq *cq, unsigned int id)
{
	unsigned char *bytes = slot(corner, SLOTS + id % SLOTS);
	struct ibv_wc wc = { 0 };
	char text[40];

	snprintf(text, sizeof(text), "message %u arrives", id);
	if (next_completion(cq, &wc) != IBV_WC_SUCCESS)
		wc.wr_id = -1 - (uint64_t)wc.status;
	expect(corner->facts, of(corner, text), wc.wr_id, id);
	if (wc.wr_id != id)
		return;
	snprintf(text, sizeof(text), "length of message %u", id);
	expect(corner->facts, of(corner, text), wc.byte_len, LENGTH);
	check_content(bytes, LENGTH, key(corner, id), of(corner, "content"));
	check_poison(bytes + LENGTH, SLOT - LENGTH, of(corner, "behind a message"));
}

void expect_next(struct corner *corner, const char *what, struct ibv_cq *cq, uint64_t id, int status)
{
	struct ibv_wc wc = { 0 };
	int got = next_completion(cq, &wc);
	char text[100];

	snprintf(text, sizeof(text), "%s, id", what);
	expect(corner->facts, of(corner, text), got < 0 ? -1 : (long long)wc.wr_id, id);
	expect(corner->facts, of(corner, what), got, status);
}

void expect_nothing(struct corner *corner, const char *what, struct ibv_cq *cq)
{
	struct ibv_wc wc;
	int got = 0;

	for (int i = 0; i < 10 && !got; i++) {
		got = ibv_poll_cq(cq, 1, &wc);
		pause_for(2);
	}
	if (got)
		printf("# wr_id %llu, status %d\n", (unsigned long long)wc.wr_id, wc.status);
	expect(corner->facts, of(corner, what), got, 0);
}

void exchange(struct corner *corner)
{
	struct pair *pair = &corner->pair;

	receive_message(corner, pair->b, 101);
	send_message(corner, pair->a, 101);
	expect_message(corner, pair->cq_b, 101);
	expect_next(corner, "there", pair->cq, 101, IBV_WC_SUCCESS);
	receive_message(corner, pair->a, 102);
	send_message(corner, pair->b, 102);
	expect_message(corner, pair->cq, 102);
	expect_next(corner, "and back", pair->cq_b, 102, IBV_WC_SUCCESS);
	expect_nothing(corner, "completions at the end", pair->cq);
	expect_nothing(corner, "completions of the peer at the end", pair->cq_b);
}

int main(int count, char **arguments)
{
	static const struct option names[] = {
		{ "device", required_argument, NULL, 'd' },
		{ "gid-index", required_argument, NULL, 'g' },
		{ "answers", required_argument, NULL, 'a' },
		{ "part", required_argument, NULL, 'p' },
		{ "fork-init", no_argument, NULL, 'f' },
		{ "children-are-refused", no_argument, NULL, 'r' },
		{ NULL, 0, NULL, 0 },
	};
	static const struct {
		const char *name;
		void (*run)(struct facts *facts, unsigned int cycles);
		/* How many cycles in a row each round asks for. */
		unsigned int rounds[3];
	} parts[] = {
		{ "states", states_of_queue_pairs, { 1, 2 } },
		{ "posts", held_posts, { 1, 2 } },
		{ "events", events_over_cycles, { 1, 3 } },
		{ "threads", threads_over_cycles, { 10 } },
		{ "forks", children, { 1 } },
		{ "objects", objects_over_cycles, { 1, 2 } },
		{ "windows", windows, { 1 } },
	};
	struct facts facts = { .gid_index = 1 };
	const char *device = "rxe0", *part = "";
	struct ibv_qp *kept;
	struct ibv_cq *cq;
	int option;

	while ((option = getopt_long(count, arguments, "", names, NULL)) != -1) {
		switch (option) {
		case 'd': device = optarg; break;
		case 'g': facts.gid_index = number("gid-index", optarg); break;
		case 'a': answers = optarg; break;
		case 'p': part = optarg; break;
		case 'f': must(ibv_fork_init(), "ibv_fork_init"); break;
		case 'r': children_are_refused = true; break;
		default: exit(2);
		}
	}
	if (!answers)
		fail("--answers is missing");
	open_facts(&facts, device);
	/* So that there is always a queue pair whose number can be seen to change. */
	cq = ibv_create_cq(facts.context, 1, NULL, NULL, 0);
	kept = cq ? ibv_create_qp(facts.pd, &(struct ibv_qp_init_attr){
						    .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
						    .cap = { 1, 1, 1, 1, 0 } }) :
		    NULL;
	if (!kept)
		fail("no queue pair: %s", strerror(errno));
	for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++)
		for (int round = 0; round < 3 && parts[i].rounds[round]; round++)
			if (!strcmp(part, parts[i].name))
				parts[i].run(&facts, parts[i].rounds[round]);
	expect_error(&facts, "destroy the queue pair that was always there", ibv_destroy_qp(kept), 0);
	expect_error(&facts, "destroy its completion queue", ibv_destroy_cq(cq), 0);
	return close_facts(&facts);
}
