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

/* Which of the two processes this is: 0 is the parent, 1 its child. */
extern int side;

/* SIGTERM or SIGINT came: finish properly. SIGUSR1 came: say where things stand. */
extern volatile sig_atomic_t asked_to_stop;
extern volatile sig_atomic_t asked_to_report;

/* Prints what is wrong to stderr and ends the process with status 1. */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A well-mixed function of `value` (the finaliser of splitmix64). */
uint64_t mix(uint64_t value);

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

/* Splits into two processes joined by a socket; sets `side`. Call it before any verb.
 * The child gets SIGKILL when the parent ends; the parent fails when the child ends early. */
int split_in_two(void);

/* In the parent: waits for the child, and fails unless it ended with status 0. */
void join_child(void);

/* To be called in every waiting loop: fails if the other process is gone. */
void check_peer_process(void);

/* The whole of `length` bytes to or from the other process. Fails if it is gone. */
void socket_send(int socket, const void *bytes, size_t length);
void socket_receive(int socket, void *bytes, size_t length);

/* Both processes have called this. */
void socket_barrier(int socket);

/* Opens the device with this name. Fails if there is none. */
struct ibv_context *open_device(const char *name);

/* The value of a numeric command line option. Fails on anything else. */
uint64_t number(const char *option, const char *text);

#endif
