/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * What the test programs share: generated content, failing, the two processes and their socket.
 */
#ifndef REVERBS_TESTS_COMMON_H
#define REVERBS_TESTS_COMMON_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <infiniband/verbs.h>

/* The value of every byte that nobody has written. */
#define POISON 0xA5

/* Most processes of a program. */
#define MAX_PROCESSES 4

/* Which of the processes this is: 0 is the parent, the others are its children. */
extern int side;

/* SIGTERM or SIGINT came: finish properly. SIGUSR1 came: say where things stand. */
extern volatile sig_atomic_t asked_to_stop;
extern volatile sig_atomic_t asked_to_report;

/* Called once by fail(), to say more. */
extern void (*before_failing)(void);

/* Prints what is wrong to stderr and ends the process with status 1. */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A well-mixed function of `value` (the finaliser of splitmix64). */
uint64_t mix(uint64_t value);

/* The next of a sequence of numbers, from 0 to `sides` - 1. */
uint32_t roll(uint64_t *sequence, uint32_t sides);

/* A number that depends on all arguments and nothing else. */
uint64_t key_of(uint64_t seed, uint64_t a, uint64_t b, uint64_t c);

/* Fills `length` bytes with the content that belongs to `key`. */
void fill(void *bytes, size_t length, uint64_t key);

/* Fails, naming `what`, at the first byte that is not the content that belongs to `key`. */
void check_content(const void *bytes, size_t length, uint64_t key, const char *what);

void poison(void *bytes, size_t length);

/* Fails, naming `what`, at the first byte that somebody has written since poison(). */
void check_poison(const void *bytes, size_t length, const char *what);

/* Memory at page boundaries, poisoned. Fails rather than returning NULL. */
void *allocate(size_t length);

/* Time that has passed while the process ran: a gap (a stop, a restore elsewhere) counts as at most
 * one second, so a restored process goes on where it was. In seconds, from the first call. */
double running_time(void);

/* Splits into so many processes; sets `side`. Call it before any verb.
 * A child gets SIGKILL when the parent ends; the parent fails when a child ends early. */
void split_into(int processes);

/* Splits into two processes joined by a socket, this one's end of which it returns. */
int split_in_two(void);

/* In the parent: waits for the children, and fails unless each ended with status 0. */
void join_children(void);

/* To be called in every waiting loop: fails if another process is gone. */
void check_processes(void);

/* The whole of `length` bytes to or from the other process. Fails if it is gone. */
void socket_send(int socket, const void *bytes, size_t length);
void socket_receive(int socket, void *bytes, size_t length);

/* Both processes have called this. */
void socket_barrier(int socket);

/* Opens the device with this name. Fails if there is none. */
struct ibv_context *open_device(const char *name);

/* Fails, naming `what`, unless `result` is 0; else it is what errno would be. */
void must(int result, const char *what);

struct ibv_mr *register_memory(struct ibv_pd *pd, void *memory, size_t length, int access);

/* From a queue pair on port 1 to another. */
struct way {
	/* The other end. */
	union ibv_gid gid;
	uint16_t lid;
	uint32_t qp_num;
	/* The first packet numbers. */
	uint32_t receive_psn, send_psn;
	/* This end. */
	uint32_t gid_index;
	const struct ibv_port_attr *port;
	/* READs and atomics under way at once. */
	uint8_t reads;
};

struct ibv_ah_attr address_of(const struct way *way);

/* From RESET to INIT, with these rights (RC, UC) or this key (UD). */
void initialize_qp(struct ibv_qp *qp, int access, uint32_t qkey);

/* From INIT to RTS. Whatever runs out is tried again without end. */
void connect_qp(struct ibv_qp *qp, const struct way *way);

/* The value of a numeric command line option. Fails on anything else. */
uint64_t number(const char *option, const char *text);

#endif
