/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The threads, and the final account; see matrix.h.
 */
#include "matrix.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

/* All handles are compared again after this many loops of the main thread. */
#define CHECK_EVERY 2048
/* News of the other side's receivers raise no event: a wait is never longer than this. */
#define LONGEST_WAIT_MS 5
/* After so many loops without anything to do others may need the processor more. */
#define LONG_IDLE 64
/* Nothing is on its way any more after this many polls without a completion. */
#define SURELY_EMPTY 500

struct matrix matrix;

static __thread bool is_main;

/* Without locks: it is called when something is wrong. */
static void report(void)
{
	asked_to_report = 0;
	fprintf(stderr, "side %d: seed %" PRIu64 "\n", side, matrix.options.seed);
	for (uint32_t i = 0; i < matrix.lanes; i++) {
		const struct lane *lane = &matrix.lane[i];

		fprintf(stderr,
			"side %d %s retired %" PRIu64 " acknowledged %" PRIu64 " asked %" PRIu64
			" last %d | verified %" PRIu64 " newest %" PRIu64 " ended %" PRId64 "\n",
			side, describe(lane, "next", lane->next), lane->retired,
			lane->sending->acknowledged, lane->sending->asked, lane->last_sent,
			lane->verified, lane->newest, (int64_t)lane->receiving->ended);
	}
	for (uint32_t i = 0; i < matrix.pollers; i++) {
		const struct notify *notify = &matrix.poller[i].notify;

		fprintf(stderr, "side %d: armed %d %d, events owed %d %d\n", side,
			notify->armed[SEND_CQ], notify->armed[RECEIVE_CQ], notify->owed[SEND_CQ],
			notify->owed[RECEIVE_CQ]);
	}
}

/* Signals are for the main thread. */
static void look_around(void)
{
	if (!is_main)
		return;
	if (asked_to_report)
		report();
	if (asked_to_stop)
		matrix.shared->stop = true;
	check_processes();
}

static void look_for_standstill(void)
{
	static double since;
	static uint64_t seen;

	if (seen != matrix.progress)
		since = running_time();
	seen = matrix.progress;
	if (running_time() - since > matrix.options.patience)
		fail("no completion for %" PRIu64 " s: lost", matrix.options.patience);
}

static bool finished(const struct worker *worker)
{
	for (uint32_t i = 0; i < matrix.lanes; i++) {
		const struct lane *lane = &matrix.lane[i];

		if (lane->thread == worker->index &&
		    (lane->sending->ended == UINT64_MAX || !lane->complete))
			return false;
	}
	return true;
}

/* One round over everything; says whether there was anything to do. */
static bool work(struct worker *worker)
{
	bool busy = take_send_completions(worker);

	busy |= take_receive_completions(worker);
	busy |= post_late_receives(worker);
	for (uint32_t i = 0; i < matrix.lanes; i++) {
		struct lane *lane = &matrix.lane[i];

		if (lane->thread != worker->index)
			continue;
		follow(worker, lane);
		busy |= send_more(worker, lane);
	}
	return busy;
}

/* Of threads that share CQs one waits; the others try again. */
static void wait_for_work(struct worker *worker)
{
	struct poller *poller = worker->poller;

	if (!poller->notify.channel || pthread_mutex_trylock(&poller->lock)) {
		if (worker->idle < LONG_IDLE)
			sched_yield();
		else
			usleep(500);
		return;
	}
	collect_owed_events(&poller->notify);
	arm(&poller->notify);
	pthread_mutex_unlock(&poller->lock);
	if (work(worker) || pthread_mutex_trylock(&poller->lock))
		return;
	wait_for_events(&poller->notify, LONGEST_WAIT_MS);
	pthread_mutex_unlock(&poller->lock);
}

static void run(struct worker *worker)
{
	bool done = false;

	for (uint64_t loops = 1; !done || (is_main && matrix.working); loops++) {
		look_around();
		if (work(worker)) {
			worker->idle = 0;
		} else {
			worker->idle++;
			wait_for_work(worker);
		}
		if (is_main && loops % 64 == 0)
			look_for_standstill();
		if (is_main && loops % CHECK_EVERY == 0)
			check_handles(&matrix.handles);
		if (!done && finished(worker)) {
			done = true;
			matrix.working--;
		}
	}
}

static void *run_thread(void *worker)
{
	run(worker);
	return NULL;
}

static void run_all(void)
{
	sigset_t all, before;

	is_main = true;
	matrix.working = matrix.options.threads;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	for (uint32_t i = 0; i < matrix.options.threads; i++) {
		struct worker *worker = &matrix.worker[i];

		worker->index = i;
		worker->poller = &matrix.poller[matrix.pollers == 1 ? 0 : i];
		worker->random = key_of(matrix.options.seed, side, i, 'w');
		if (i)
			must(pthread_create(&worker->thread, NULL, run_thread, worker),
			     "pthread_create");
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	run(&matrix.worker[0]);
	for (uint32_t i = 1; i < matrix.options.threads; i++)
		must(pthread_join(matrix.worker[i].thread, NULL), "pthread_join");
}

/* Nobody sends any more; what is on its way still comes. */
static void sweep(void)
{
	for (uint32_t i = 0; i < matrix.pollers; i++) {
		struct worker *worker = &matrix.worker[i];

		for (int empty = 0; empty < SURELY_EMPTY; empty++) {
			if (take_send_completions(worker) || take_receive_completions(worker))
				empty = 0;
			sched_yield();
		}
		collect_owed_events(&worker->poller->notify);
	}
}

static void add_up(void)
{
	_Atomic uint64_t *counted = matrix.shared->counted;

	for (uint32_t i = 0; i < matrix.options.threads; i++)
		for (int what = 0; what < COUNTED; what++)
			counted[what] += matrix.worker[i].counted[what];
	for (uint32_t i = 0; i < matrix.pollers; i++)
		counted[EVENTS] += matrix.poller[i].notify.events;
	counted[HANDLE_CHECKS] += matrix.handles.checks;
}

static void print_account(void)
{
	static const char *const names[COUNTED] = {
		[MESSAGES] = "messages", [BYTES] = "bytes",
		[SEND_COMPLETIONS] = "send_completions",
		[RECEIVE_COMPLETIONS] = "receive_completions",
		[INLINED] = "inline", [SCATTERED] = "scattered", [UNSIGNALED] = "unsignaled",
		[CHAINED] = "chains", [SWAPPED] = "swapped", [LOST] = "lost",
		[LATE_RECEIVES] = "late_receives", [EVENTS] = "events",
		[HANDLE_CHECKS] = "handle_checks",
	};

	printf("{\"program\":\"matrix\",\"seed\":%" PRIu64, matrix.options.seed);
	for (int what = 0; what < COUNTED; what++)
		if (what != ACK)
			printf(",\"%s\":%" PRIu64, what < KINDS ? kind_name[what] : names[what],
			       (uint64_t)matrix.shared->counted[what]);
	printf(",\"seconds\":%.1f,\"errors\":0}\n", running_time());
}

int main(int count, char **arguments)
{
	read_options(count, arguments);
	before_failing = report;
	/* Many threads that poll: the command that is to stop them must get its turn. */
	nice(10);
	for (uint32_t i = 0; i < MAX_THREADS; i++)
		matrix.poller[i].notify.look_around = look_around;
	set_up();
	running_time();
	if (side == 0) {
		printf("seed %" PRIu64 "\nready\n", matrix.options.seed);
		fflush(stdout);
	}
	run_all();
	meet();
	sweep();
	check_memory(&matrix.worker[0]);
	check_handles(&matrix.handles);
	add_up();
	meet();
	tear_down();
	if (side == 0) {
		join_children();
		print_account();
	}
	return 0;
}
