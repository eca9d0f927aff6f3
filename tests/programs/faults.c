/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * faults: a library to preload into a test program that breaks one promise, so that the program can
 * be seen to notice. FAULT names the promise; it is broken in the parent, after some traffic: once, or
 * from then on where one time may have no effect.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <endian.h>
#include <infiniband/verbs.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* How many chances pass before one is taken; arming a CQ is rarer than the rest. */
#define PATIENCE (strcmp(fault, "lost-event") ? 50 : 5)

static struct ibv_context_ops real;
static const char *fault;
static atomic_int chances;
static pid_t started;

__attribute__((constructor)) static void remember_parent(void)
{
	started = getpid();
}

/* Whether this chance to commit `name` is the one. */
static bool now(const char *name)
{
	return fault && !strcmp(fault, name) && ++chances == PATIENCE;
}

/* Whether the time for `name` has come, now and for ever. */
static bool from_now_on(const char *name)
{
	return fault && !strcmp(fault, name) && ++chances >= PATIENCE;
}

static bool is_receive(const struct ibv_wc *wc)
{
	return wc->opcode & IBV_WC_RECV;
}

static int poll_cq(struct ibv_cq *cq, int entries, struct ibv_wc *wc)
{
	static struct ibv_wc again;
	static struct ibv_cq *again_on;
	int count;

	if (again_on == cq && entries > 0) {
		again_on = NULL;
		wc[0] = again;
		return 1;
	}
	count = real.poll_cq(cq, entries, wc);
	if (count < 1)
		return count;
	if (is_receive(&wc[0]) ? now("lost-receive-completion") : now("lost-send-completion"))
		memmove(wc, wc + 1, --count * sizeof(*wc));
	if (is_receive(&wc[0]) ? now("doubled-receive-completion") :
				 now("doubled-send-completion")) {
		again = wc[0];
		again_on = cq;
	}
	if (count > 1 && wc[0].qp_num == wc[1].qp_num && now("swapped-completions")) {
		struct ibv_wc first = wc[0];

		wc[0] = wc[1];
		wc[1] = first;
	}
	if (is_receive(&wc[0]) && wc[0].wc_flags & IBV_WC_WITH_IMM && now("wrong-immediate"))
		wc[0].imm_data ^= htobe32(1);
	if (now("wrong-queue-pair-number"))
		wc[0].qp_num++;
	return count;
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	bool plain = !(wr->send_flags & IBV_SEND_INLINE) && wr->num_sge && wr->sg_list->length;
	bool message = wr->opcode == IBV_WR_SEND || wr->opcode == IBV_WR_SEND_WITH_IMM;
	bool swap = wr->opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
	bool doubled;

	if (plain && message && now("wrong-byte"))
		*(unsigned char *)(uintptr_t)wr->sg_list->addr ^= 1;
	if (plain && wr->opcode == IBV_WR_RDMA_WRITE && now("wrong-byte-written"))
		*(unsigned char *)(uintptr_t)wr->sg_list->addr ^= 1;
	if (now("changed-handle"))
		qp->qp_num++;
	if (message && !wr->next && now("lost-message"))
		return 0;
	if (swap && from_now_on("wrong-swap"))
		wr->wr.atomic.swap ^= 1;
	doubled = (swap && from_now_on("doubled-swap")) ||
		  (message && now("doubled-message")) ||
		  (wr->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD && now("doubled-atomic"));
	if (doubled) {
		struct ibv_send_wr copy = *wr;

		copy.next = NULL;
		copy.send_flags &= ~IBV_SEND_SIGNALED;
		real.post_send(qp, &copy, bad);
	}
	return real.post_send(qp, wr, bad);
}

static int req_notify_cq(struct ibv_cq *cq, int solicited_only)
{
	return now("lost-event") ? 0 : real.req_notify_cq(cq, solicited_only);
}

struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	struct ibv_context *(*open)(struct ibv_device *) =
		(struct ibv_context * (*)(struct ibv_device *)) dlsym(RTLD_NEXT, "ibv_open_device");
	struct ibv_context *context = open(device);

	if (!context || getpid() != started)
		return context;
	fault = getenv("FAULT");
	real = context->ops;
	context->ops.poll_cq = poll_cq;
	context->ops.post_send = post_send;
	context->ops.req_notify_cq = req_notify_cq;
	return context;
}
