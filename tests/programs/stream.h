/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Threads of corners that go on all the time. Each notes what is wrong; finishing it makes facts of that.
 */
#ifndef REVERBS_TESTS_STREAM_H
#define REVERBS_TESTS_STREAM_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "corners.h"

/* One thread posts numbered SENDs in chains, every third of them signaled, as fast as the queue takes them; another takes
 * the completions of both ends and posts receives. */
struct stream {
	struct corner *corner;
	atomic_bool stop;
	/* Set when the poster has stopped; `posted` is final then. */
	atomic_bool stopped;
	atomic_uint posted;
	unsigned int chains, full, refused, received, completed;
	/* What is wrong first, or NULL. */
	const char *poster_error, *poller_error;
	pthread_t poster, poller;
};

void start_stream(struct stream *stream, struct corner *corner);
void finish_stream(struct stream *stream);

/* One thread READs a number and at once sends on what it has read, behind a fence. */
struct fence {
	struct corner *corner;
	atomic_bool stop;
	unsigned int rounds;
	const char *error;
	pthread_t thread;
};

void start_fence(struct fence *fence, struct corner *corner);
void finish_fence(struct fence *fence);

#endif
