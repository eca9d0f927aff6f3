/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "common.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int side;
volatile sig_atomic_t asked_to_stop;
volatile sig_atomic_t asked_to_report;

static pid_t child;
static volatile sig_atomic_t child_ended;

void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fprintf(stderr, "ERROR side %d: ", side);
	vfprintf(stderr, format, arguments);
	fprintf(stderr, "\n");
	va_end(arguments);
	exit(1);
}

uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15u;
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

uint64_t key_of(uint64_t seed, uint64_t a, uint64_t b, uint64_t c)
{
	return mix(mix(mix(mix(seed) ^ a) ^ b) ^ c);
}

static uint64_t word(uint64_t key, size_t index)
{
	return (key + index) * 0x9e3779b97f4a7c15u ^ (key >> 29);
}

void fill(void *bytes, size_t length, uint64_t key)
{
	unsigned char *to = bytes;

	for (size_t done = 0; done < length; done += 8) {
		uint64_t value = word(key, done / 8);

		memcpy(to + done, &value, length - done < 8 ? length - done : 8);
	}
}

void check_content(const void *bytes, size_t length, uint64_t key, const char *what)
{
	const unsigned char *from = bytes;

	for (size_t done = 0; done < length; done += 8) {
		uint64_t value = word(key, done / 8);
		size_t part = length - done < 8 ? length - done : 8;

		if (memcmp(from + done, &value, part) == 0)
			continue;
		for (size_t i = 0; i < part; i++) {
			unsigned char expected = ((unsigned char *)&value)[i];

			if (from[done + i] != expected)
				fail("%s: byte %zu of %zu is 0x%02x, expected 0x%02x%s", what,
				     done + i, length, from[done + i], expected,
				     from[done + i] == POISON ? " (never written)" : "");
		}
	}
}

void poison(void *bytes, size_t length)
{
	memset(bytes, POISON, length);
}

void check_poison(const void *bytes, size_t length, const char *what)
{
	const unsigned char *from = bytes;

	for (size_t i = 0; i < length; i++)
		if (from[i] != POISON)
			fail("%s: byte %zu was written (0x%02x) and must not be", what, i, from[i]);
}

void *allocate(size_t length)
{
	size_t page = sysconf(_SC_PAGESIZE);
	void *bytes;

	if (posix_memalign(&bytes, page, (length + page - 1) / page * page))
		fail("no memory for %zu bytes", length);
	poison(bytes, length);
	return bytes;
}

double running_time(void)
{
	static double total, last = -1;
	struct timespec time;
	double now, passed;

	clock_gettime(CLOCK_MONOTONIC, &time);
	now = time.tv_sec + time.tv_nsec / 1e9;
	passed = last < 0 ? 0 : now - last;
	last = now;
	/* Another boot has another clock: it can even go backwards. */
	total += passed < 0 ? 0 : passed > 1 ? 1 : passed;
	return total;
}

static void on_signal(int signal)
{
	if (signal == SIGCHLD)
		child_ended = 1;
	else if (signal == SIGUSR1)
		asked_to_report = 1;
	else
		asked_to_stop = 1;
}

static void handle_signals(void)
{
	struct sigaction action = { .sa_handler = on_signal };

	/* No SA_RESTART: a wait for an event must come back to look at the flags. */
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	action.sa_flags = SA_NOCLDSTOP;
	sigaction(SIGCHLD, &action, NULL);
}

int split_in_two(void)
{
	pid_t parent = getpid();
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		fail("socketpair: %s", strerror(errno));
	handle_signals();
	child = fork();
	if (child < 0)
		fail("fork: %s", strerror(errno));
	side = child == 0;
	if (side) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
	}
	close(ends[!side]);
	return ends[side];
}

void join_child(void)
{
	int status;

	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			fail("waitpid: %s", strerror(errno));
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		fail("the other process ended with wait status 0x%x", status);
}

void check_peer_process(void)
{
	siginfo_t information = { 0 };

	if (side || !child_ended)
		return;
	child_ended = 0;
	/* SIGCHLD also comes for a child that was stopped under a tracer. */
	if (!waitid(P_PID, child, &information, WEXITED | WNOHANG | WNOWAIT) &&
	    information.si_pid == child && (information.si_code != CLD_EXITED || information.si_status))
		fail("the other process is gone (code %d, status %d)", information.si_code,
		     information.si_status);
}

void socket_send(int socket, const void *bytes, size_t length)
{
	while (length) {
		ssize_t sent = send(socket, bytes, length, MSG_NOSIGNAL);

		if (sent < 0 && errno != EINTR)
			fail("send to the other process: %s", strerror(errno));
		if (sent > 0) {
			bytes = (const char *)bytes + sent;
			length -= sent;
		}
	}
}

void socket_receive(int socket, void *bytes, size_t length)
{
	while (length) {
		ssize_t got = recv(socket, bytes, length, 0);

		if (got == 0 || (got < 0 && errno != EINTR))
			fail("receive from the other process: %s", got ? strerror(errno) : "it is gone");
		if (got > 0) {
			bytes = (char *)bytes + got;
			length -= got;
		}
	}
}

void socket_barrier(int socket)
{
	char token = 'b';

	socket_send(socket, &token, 1);
	socket_receive(socket, &token, 1);
}

struct ibv_context *open_device(const char *name)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_context *context = NULL;

	if (!list)
		fail("ibv_get_device_list: %s", strerror(errno));
	for (int i = 0; list[i]; i++) {
		if (strcmp(ibv_get_device_name(list[i]), name))
			continue;
		context = ibv_open_device(list[i]);
		if (!context)
			fail("ibv_open_device %s: %s", name, strerror(errno));
	}
	ibv_free_device_list(list);
	if (!context)
		fail("there is no device %s", name);
	return context;
}

uint64_t number(const char *option, const char *text)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || *end)
		fail("--%s wants a number, not \"%s\"", option, text);
	return value;
}
