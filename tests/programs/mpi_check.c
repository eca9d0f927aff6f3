/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * mpi_check: an MPI program that checks every byte it receives.
 *
 *   mpi_check [--iterations N] [--until FILE] [--progress FILE] [--linger MILLISECONDS] [--late FILE]
 *
 * It goes on for N rounds, or until FILE exists (rank 0 looks). A wrong byte, sum or status aborts
 * the job and says where. Otherwise each rank ends with "rank R done sum S" (S depends only on the
 * number of ranks and rounds), and rank 0 with "ok". With --progress rank 0 keeps the number of
 * rounds done in FILE. With --linger rank 0 says "finalizing" from
 * within MPI_Finalize, and all ranks stay there for so long before anything is taken down. With
 * --late only rank 0 calls MPI_Init at once, and waits in there for the others, until FILE exists.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <mpi.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LARGEST (1 << 20)
/* Messages under way at once to each other rank. */
#define WINDOW 8
#define WINDOW_BYTES 3000
#define BLOCK 600
#define WORDS 64

static int rank, ranks;
static uint64_t round_number;

static _Noreturn void wrong(const char *what, int from, size_t at, uint64_t got, uint64_t expected)
{
	fprintf(stderr,
		"ERROR rank %d round %" PRIu64 ": %s from rank %d: at %zu is 0x%" PRIx64
		", expected 0x%" PRIx64 "\n",
		rank, round_number, what, from, at, got, expected);
	MPI_Abort(MPI_COMM_WORLD, 1);
	abort();
}

static uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15u;
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

static uint64_t key_of(int from, int to, uint64_t tag)
{
	return mix(mix(mix(round_number) ^ from) ^ ((uint64_t)to << 32) ^ tag);
}

static unsigned char byte_of(uint64_t key, size_t index)
{
	uint64_t word = (key + index / 8) * 0x9e3779b97f4a7c15u ^ (key >> 29);

	return word >> index % 8 * 8;
}

static void fill(unsigned char *bytes, size_t length, uint64_t key)
{
	for (size_t i = 0; i < length; i++)
		bytes[i] = byte_of(key, i);
}

/* Also spoils the buffer, so that the next message cannot pass by not arriving. */
static void check(unsigned char *bytes, size_t length, uint64_t key, int from, const char *what)
{
	for (size_t i = 0; i < length; i++)
		if (bytes[i] != byte_of(key, i))
			wrong(what, from, i, bytes[i], byte_of(key, i));
	memset(bytes, 0xA5, length);
}

static void check_status(const MPI_Status *status, int from, int tag, int length, const char *what)
{
	int count;

	MPI_Get_count(status, MPI_BYTE, &count);
	if (status->MPI_SOURCE != from)
		wrong(what, from, 0, status->MPI_SOURCE, from);
	if (status->MPI_TAG != tag)
		wrong(what, from, 1, status->MPI_TAG, tag);
	if (count != length)
		wrong(what, from, 2, count, length);
}

/* One message around the ring: sizes take turns, eager and rendezvous. */
static void ring(unsigned char *out, unsigned char *in)
{
	static const int sizes[] = { 1,	   8,	  100,	 1000,	 8192,	 20000,
				     64,   65536, 3,	 4096,	 262144, 500,
				     2048, 1,	  32768, LARGEST };
	int length = sizes[round_number % (sizeof(sizes) / sizeof(sizes[0]))];
	int right = (rank + 1) % ranks, left = (rank + ranks - 1) % ranks;
	int tag = round_number % 1000;
	MPI_Status status;

	fill(out, length, key_of(rank, right, 'r'));
	MPI_Sendrecv(out, length, MPI_BYTE, right, tag, in, LARGEST, MPI_BYTE, left, tag,
		     MPI_COMM_WORLD, &status);
	check_status(&status, left, tag, length, "ring message");
	check(in, length, key_of(left, rank, 'r'), left, "ring message");
}

/* Many messages at once between all ranks; half of the receives are posted too late. */
static void windows(unsigned char *out, unsigned char *in)
{
	MPI_Request requests[2 * WINDOW];
	MPI_Status statuses[2 * WINDOW];

	for (int distance = 1; distance < ranks; distance++) {
		int to = (rank + distance) % ranks, from = (rank + ranks - distance) % ranks;

		for (int i = 0; i < 2 * WINDOW; i++) {
			bool sending = i >= WINDOW / 2 && i < WINDOW / 2 + WINDOW;
			int which = sending ? i - WINDOW / 2 : i < WINDOW / 2 ? i : i - WINDOW;
			int length = 1 + key_of(sending ? rank : from, sending ? to : rank,
						100 + which) % WINDOW_BYTES;
			unsigned char *bytes = (sending ? out : in) + which * WINDOW_BYTES;

			if (sending) {
				fill(bytes, length, key_of(rank, to, which));
				MPI_Isend(bytes, length, MPI_BYTE, to, which, MPI_COMM_WORLD,
					  &requests[i]);
			} else {
				MPI_Irecv(bytes, WINDOW_BYTES, MPI_BYTE, from, which,
					  MPI_COMM_WORLD, &requests[i]);
			}
		}
		MPI_Waitall(2 * WINDOW, requests, statuses);
		for (int i = 0; i < WINDOW; i++) {
			int length = 1 + key_of(from, rank, 100 + i) % WINDOW_BYTES;
			int request = i < WINDOW / 2 ? i : i + WINDOW;

			check_status(&statuses[request], from, i, length, "window message");
			check(in + i * WINDOW_BYTES, length, key_of(from, rank, i), from,
			      "window message");
		}
	}
}

static void all_to_all(unsigned char *out, unsigned char *in)
{
	for (int to = 0; to < ranks; to++)
		fill(out + to * BLOCK, BLOCK, key_of(rank, to, 'a'));
	MPI_Alltoall(out, BLOCK, MPI_BYTE, in, BLOCK, MPI_BYTE, MPI_COMM_WORLD);
	for (int from = 0; from < ranks; from++)
		check(in + from * BLOCK, BLOCK, key_of(from, rank, 'a'), from, "all-to-all block");
}

/* Returns a number that is the same on all ranks. */
static uint64_t sums(void)
{
	uint64_t mine[WORDS], sum[WORDS], total = 0;

	for (int i = 0; i < WORDS; i++)
		mine[i] = key_of(rank, i, 's');
	MPI_Allreduce(mine, sum, WORDS, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD);
	for (int i = 0; i < WORDS; i++) {
		uint64_t expected = 0;

		for (int from = 0; from < ranks; from++)
			expected += key_of(from, i, 's');
		if (sum[i] != expected)
			wrong("sum", -1, i, sum[i], expected);
		total += sum[i];
	}
	return total;
}

static void broadcast(unsigned char *bytes)
{
	int root = round_number % ranks, length = 1 + mix(round_number) % 20000;

	if (rank == root)
		fill(bytes, length, key_of(root, -1, 'b'));
	MPI_Bcast(bytes, length, MPI_BYTE, root, MPI_COMM_WORLD);
	check(bytes, length, key_of(root, -1, 'b'), root, "broadcast");
}

static bool go_on(uint64_t iterations, const char *until)
{
	int answer = rank ? 0 : iterations ? round_number < iterations : access(until, F_OK) != 0;

	MPI_Bcast(&answer, 1, MPI_INT, 0, MPI_COMM_WORLD);
	return answer;
}

/* Always as many bytes, so that a reader never finds a part of the number. */
static void note_progress(const char *file)
{
	char text[21];
	int descriptor = open(file, O_WRONLY | O_CREAT, 0644);

	snprintf(text, sizeof(text), "%019" PRIu64 "\n", round_number + 1);
	if (descriptor < 0 || pwrite(descriptor, text, 20, 0) != 20) {
		perror(file);
		MPI_Abort(MPI_COMM_WORLD, 2);
	}
	close(descriptor);
}

/* MPI_Finalize begins with the attributes of MPI_COMM_SELF (MPI 3.1, 8.7.1). */
static int linger(MPI_Comm communicator, int key, void *milliseconds, void *state)
{
	(void)communicator, (void)key, (void)state;
	if (rank == 0) {
		printf("finalizing\n");
		fflush(stdout);
	}
	usleep(*(unsigned int *)milliseconds * 1000);
	return MPI_SUCCESS;
}

/* Open MPI tells a process its rank in the environment. */
static void wait_if_late(const char *file)
{
	const char *own = getenv("OMPI_COMM_WORLD_RANK");

	while (own && strcmp(own, "0") && access(file, F_OK))
		usleep(10000);
}

int main(int count, char **arguments)
{
	uint64_t iterations = 0, total = 0;
	const char *until = NULL, *progress = NULL;
	unsigned int milliseconds = 0;
	unsigned char *out, *in;

	for (int i = 1; i + 1 < count; i += 2)
		if (!strcmp(arguments[i], "--late"))
			wait_if_late(arguments[i + 1]);
	MPI_Init(&count, &arguments);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	for (int i = 1; i + 1 < count; i += 2) {
		if (!strcmp(arguments[i], "--iterations"))
			iterations = strtoull(arguments[i + 1], NULL, 0);
		if (!strcmp(arguments[i], "--until"))
			until = arguments[i + 1];
		if (!strcmp(arguments[i], "--progress"))
			progress = arguments[i + 1];
		if (!strcmp(arguments[i], "--linger"))
			milliseconds = strtoul(arguments[i + 1], NULL, 0);
	}
	if (!iterations == !until) {
		fprintf(stderr, "usage: mpi_check --iterations N | --until FILE\n");
		MPI_Abort(MPI_COMM_WORLD, 2);
	}
	out = malloc(LARGEST);
	in = malloc(LARGEST);
	if (!out || !in || ranks * BLOCK > LARGEST)
		MPI_Abort(MPI_COMM_WORLD, 2);

	MPI_Barrier(MPI_COMM_WORLD);
	if (rank == 0) {
		printf("ready\n");
		fflush(stdout);
	}
	for (; go_on(iterations, until); round_number++) {
		ring(out, in);
		windows(out, in);
		all_to_all(out, in);
		total += sums();
		broadcast(in);
		if (rank == 0 && progress)
			note_progress(progress);
	}
	printf("rank %d done sum %" PRIu64 " rounds %" PRIu64 "\n", rank, total, round_number);
	fflush(stdout);
	MPI_Barrier(MPI_COMM_WORLD);
	if (milliseconds) {
		int key;

		MPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, linger, &key, NULL);
		MPI_Comm_set_attr(MPI_COMM_SELF, key, &milliseconds);
	}
	MPI_Finalize();
	if (rank == 0)
		printf("ok\n");
	return 0;
}
