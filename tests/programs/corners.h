/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * corners: what verbs answer when the hardware below was replaced meanwhile. Objects are brought into a situation, the
 * program asks for cycles, and then looks at what became of them. What is expected is what a device answers on which nothing
 * was replaced: the program runs on the bare device too, where a cycle is nothing.
 *
 *   cycle? N       on stdout asks for the Nth cycle; it is over when there is a file of the name N in the folder --answers
 */
#ifndef REVERBS_TESTS_CORNERS_H
#define REVERBS_TESTS_CORNERS_H

#include "facts.h"

/* Messages of several packets, each of the other content. */
#define LENGTH 2500
/* Room of a situation in the registered memory: outgoing messages, then incoming ones. */
#define SLOT 4096
#define SLOTS 4
#define AREA (2 * SLOTS * SLOT)

/* One situation. */
struct corner {
	struct facts *facts;
	const char *name;
	struct wish wish;
	struct pair pair;
	/* Its room, as an offset in the registered memory. */
	size_t area;
	/* Asynchronous events of its queue pairs: for each kind as many as two bits can count, kind 0 lowest. */
	long long events;
};

/* Asks for this many cycles, one after the other. */
void cycle(unsigned int count);

/* The name of a fact of a situation; overwritten by the next. */
const char *of(const struct corner *corner, const char *what);

enum ibv_qp_state state_of(struct ibv_qp *qp);
int change_state(struct ibv_qp *qp, enum ibv_qp_state state);
/* Brings both ends from INIT to RTS. */
void connect_both(struct corner *corner);

/* Message `id` and the receive for it: signaled SEND of LENGTH bytes that belong to the id. */
void send_message(struct corner *corner, struct ibv_qp *qp, unsigned int id);
void receive_message(struct corner *corner, struct ibv_qp *qp, unsigned int id);
/* The next completion is the one of receive `id`, with its content. */
void expect_message(struct corner *corner, struct ibv_cq *cq, unsigned int id);
/* The next completion is the one of this request. */
void expect_next(struct corner *corner, const char *what, struct ibv_cq *cq, uint64_t id, int status);
void expect_nothing(struct corner *corner, const char *what, struct ibv_cq *cq);
/* A message in each direction arrives. */
void exchange(struct corner *corner);

/* corners_states.c */
void states_of_queue_pairs(struct facts *facts, unsigned int cycles);

/* corners_posts.c */
void held_posts(struct facts *facts, unsigned int cycles);

/* corners_events.c */
void events_over_cycles(struct facts *facts, unsigned int cycles);

/* corners_threads.c: all kinds of threads at once. */
void threads_over_cycles(struct facts *facts, unsigned int cycles);

/* corners_objects.c */
void objects_over_cycles(struct facts *facts, unsigned int cycles);
void windows(struct facts *facts, unsigned int cycles);

/* corners_forks.c: forked children. Below the provider they are refused what they have inherited. */
extern bool children_are_refused;
void children(struct facts *facts, unsigned int cycles);

#endif
