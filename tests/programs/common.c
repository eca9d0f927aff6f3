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

void (*before_failing)(void);

static pid_t child[MAX_PROCESSES - 1];
static int children;
static volatile sig_atomic_t child_ended;

void fail(const char *format, ...)
{
	void (*say_more)(void) = before_failing;
	va_list arguments;

	va_start(arguments, format);
	fprintf(stderr, "ERROR side %d: ", side);
	vfprintf(stderr, format, arguments);
	fprintf(stderr, "\n");
	va_end(arguments);
	before_failing = NULL;
	if (say_more)
		say_more();
	exit(1);
}

uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15u;
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

uint32_t roll(uint64_t *sequence, uint32_t sides)
{
	return (mix((*sequence)++) >> 16) % sides;
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

void split_into(int processes)
{
	pid_t parent = getpid();

	handle_signals();
	for (int i = 0; i < processes - 1; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork: %s", strerror(errno));
		if (pid == 0) {
			side = i + 1;
			children = 0;
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != parent)
				_exit(1);
			return;
		}
		child[children++] = pid;
	}
}

int split_in_two(void)
{
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		fail("socketpair: %s", strerror(errno));
	split_into(2);
	close(ends[!side]);
	return ends[side];
}

void join_children(void)
{
	for (int i = 0; i < children; i++) {
		int status;

		while (waitpid(child[i], &status, 0) < 0)
			if (errno != EINTR)
				fail("waitpid: %s", strerror(errno));
		if (!WIFEXITED(status) || WEXITSTATUS(status))
			fail("process %d ended with wait status 0x%x", i + 1, status);
	}
}

void check_processes(void)
{
	if (side || !child_ended)
		return;
	child_ended = 0;
	for (int i = 0; i < children; i++) {
		siginfo_t information = { 0 };

		/* SIGCHLD also comes for a child that was stopped under a tracer. */
		if (!waitid(P_PID, child[i], &information, WEXITED | WNOHANG | WNOWAIT) &&
		    information.si_pid == child[i] &&
		    (information.si_code != CLD_EXITED || information.si_status))
			fail("process %d is gone (code %d, status %d)", i + 1, information.si_code,
			     information.si_status);
	}
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

void must(int result, const char *what)
{
	if (result)
		fail("%s: %s", what, strerror(result));
}

struct ibv_mr *register_memory(struct ibv_pd *pd, void *memory, size_t length, int access)
{
	struct ibv_mr *mr = ibv_reg_mr(pd, memory, length, access);

	if (!mr)
		fail("ibv_reg_mr of %zu bytes, access 0x%x: %s", length, access, strerror(errno));
	return mr;
}

struct ibv_ah_attr address_of(const struct way *way)
{
	return (struct ibv_ah_attr){
		.is_global = 1,
		.grh = { .dgid = way->gid, .sgid_index = way->gid_index, .hop_limit = 64 },
		.dlid = way->lid,
		.port_num = 1,
	};
}

void initialize_qp(struct ibv_qp *qp, int access, uint32_t qkey)
{
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_INIT, .port_num = 1,
					  .qp_access_flags = access, .qkey = qkey };
	int own = qp->qp_type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS;

	must(ibv_modify_qp(qp, &attributes,
			   IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | own),
	     "ibv_modify_qp to INIT");
}

void connect_qp(struct ibv_qp *qp, const struct way *way)
{
	struct ibv_qp_attr attributes = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = way->port->active_mtu < IBV_MTU_1024 ? way->port->active_mtu :
								   IBV_MTU_1024,
		.dest_qp_num = way->qp_num,
		.rq_psn = way->receive_psn,
		.max_dest_rd_atomic = way->reads,
		.min_rnr_timer = 6,
		.ah_attr = address_of(way),
	};
	int mask = IBV_QP_STATE;

	if (qp->qp_type != IBV_QPT_UD)
		mask |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	if (qp->qp_type == IBV_QPT_RC)
		mask |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
	must(ibv_modify_qp(qp, &attributes, mask), "ibv_modify_qp to RTR");
	attributes = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTS,
		.sq_psn = way->send_psn,
		.timeout = 14,
		.retry_cnt = 7,
		.rnr_retry = 7,
		.max_rd_atomic = way->reads,
	};
	mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
	if (qp->qp_type == IBV_QPT_RC)
		mask |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			IBV_QP_MAX_QP_RD_ATOMIC;
	must(ibv_modify_qp(qp, &attributes, mask), "ibv_modify_qp to RTS");
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
