/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * leaks: makes every kind of object, uses it, and destroys it, over and over.
 *
 *   leaks --device NAME --gid-index N [--rounds N]
 *
 * Each round opens the device beside a context that stays open, makes objects on both, sends messages, and
 * destroys everything, in one order or another, with requests and completions left in the queues. After it prints
 *
 *   round N descriptors D mappings M heap BYTES resident KIB
 *
 * what the process has while only the lasting objects are there. Without --rounds it goes on until SIGTERM; then
 * it destroys those, too, prints "closed", and waits for another SIGTERM, so that somebody may look at what is
 * left. SIGUSR1 makes it say on stderr what it is doing. The last line is {"messages":N,"errors":0}.
 */
#include "common.h"

#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LENGTH 64
#define GRH 40
#define REGIONS 16
/* A datagram may be lost. In seconds. */
#define LONGEST_WAIT 2

static const char *device = "rxe0";
static uint32_t gid_index = 1;
static uint64_t messages;
static unsigned char *memory;
/* For somebody who asks by SIGUSR1. */
static const char *volatile doing = "starting\n";
static volatile sig_atomic_t sends, receives;

/* A context with one object of each kind. */
struct objects {
	struct ibv_context *context;
	struct ibv_port_attr port;
	union ibv_gid gid;
	struct ibv_pd *pd;
	struct ibv_mr *mr;
	struct ibv_comp_channel *channel;
	/* What is lost of UC and UD may come after all, and must not be taken for something else. */
	struct ibv_cq *cq, *cq_of_uc, *cq_of_ud, *cq_with_events;
	struct ibv_srq *srq;
	struct ibv_qp *rc, *uc, *ud, *rc_on_srq;
	struct ibv_ah *ah;
};

static void *made(void *object, const char *what)
{
	if (!object)
		fail("%s: %s", what, strerror(errno));
	return object;
}

static void done(int result, const char *what)
{
	if (result)
		fail("%s: %s", what, strerror(result));
}

static struct ibv_qp *create_qp(struct objects *of, enum ibv_qp_type type, struct ibv_cq *cq,
				struct ibv_srq *srq)
{
	struct ibv_qp_init_attr init = {
		.send_cq = cq, .recv_cq = cq, .srq = srq, .cap = { 16, 16, 2, 2, 32 },
		.qp_type = type,
	};

	return made(ibv_create_qp(of->pd, &init), "ibv_create_qp");
}

static struct ibv_ah_attr own_address(const struct objects *of)
{
	return (struct ibv_ah_attr){
		.is_global = 1,
		.grh = { .dgid = of->gid, .sgid_index = gid_index, .hop_limit = 64 },
		.dlid = of->port.lid,
		.port_num = 1,
	};
}

/* Connects a queue pair to itself. */
static void connect_here(const struct objects *of, struct ibv_qp *qp)
{
	struct ibv_qp_attr init = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = 0x1234 };
	struct ibv_qp_attr rtr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = qp->qp_num,
		.max_dest_rd_atomic = 1,
		.min_rnr_timer = 12,
		.ah_attr = own_address(of),
	};
	struct ibv_qp_attr rts = {
		.qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7,
		.max_rd_atomic = 1,
	};
	int to_init = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT;
	int to_rtr = IBV_QP_STATE, to_rts = IBV_QP_STATE | IBV_QP_SQ_PSN;

	to_init |= qp->qp_type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS;
	if (qp->qp_type != IBV_QPT_UD)
		to_rtr |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	if (qp->qp_type == IBV_QPT_RC) {
		to_rtr |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
		to_rts |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			  IBV_QP_MAX_QP_RD_ATOMIC;
	}
	done(ibv_modify_qp(qp, &init, to_init), "ibv_modify_qp to INIT");
	done(ibv_modify_qp(qp, &rtr, to_rtr), "ibv_modify_qp to RTR");
	done(ibv_modify_qp(qp, &rts, to_rts), "ibv_modify_qp to RTS");
}

static void create(struct objects *of)
{
	struct ibv_srq_init_attr srq = { .attr = { .max_wr = 16, .max_sge = 2 } };
	struct ibv_ah_attr address;

	of->context = open_device(device);
	done(ibv_query_port(of->context, 1, &of->port), "ibv_query_port");
	done(ibv_query_gid(of->context, 1, gid_index, &of->gid), "ibv_query_gid");
	of->pd = made(ibv_alloc_pd(of->context), "ibv_alloc_pd");
	of->mr = made(ibv_reg_mr(of->pd, memory, 2 * (LENGTH + GRH), IBV_ACCESS_LOCAL_WRITE),
		      "ibv_reg_mr");
	of->channel = made(ibv_create_comp_channel(of->context), "ibv_create_comp_channel");
	of->cq = made(ibv_create_cq(of->context, 64, NULL, NULL, 0), "ibv_create_cq");
	of->cq_of_uc = made(ibv_create_cq(of->context, 64, NULL, NULL, 0), "ibv_create_cq");
	of->cq_of_ud = made(ibv_create_cq(of->context, 64, NULL, NULL, 0), "ibv_create_cq");
	of->cq_with_events =
		made(ibv_create_cq(of->context, 64, of, of->channel, 0), "ibv_create_cq");
	of->srq = made(ibv_create_srq(of->pd, &srq), "ibv_create_srq");
	of->rc = create_qp(of, IBV_QPT_RC, of->cq_with_events, NULL);
	of->uc = create_qp(of, IBV_QPT_UC, of->cq_of_uc, NULL);
	of->ud = create_qp(of, IBV_QPT_UD, of->cq_of_ud, NULL);
	of->rc_on_srq = create_qp(of, IBV_QPT_RC, of->cq, of->srq);
	address = own_address(of);
	of->ah = made(ibv_create_ah(of->pd, &address), "ibv_create_ah");
	connect_here(of, of->rc);
	connect_here(of, of->uc);
	connect_here(of, of->ud);
	connect_here(of, of->rc_on_srq);
}

static void post_receive(struct objects *of, struct ibv_qp *qp)
{
	struct ibv_sge to = { (uintptr_t)memory + LENGTH + GRH, LENGTH + GRH, of->mr->lkey };
	struct ibv_recv_wr receive = { .wr_id = 1, .sg_list = &to, .num_sge = 1 }, *bad;

	if (qp->srq)
		done(ibv_post_srq_recv(qp->srq, &receive, &bad), "ibv_post_srq_recv");
	else
		done(ibv_post_recv(qp, &receive, &bad), "ibv_post_recv");
}

static void post_send(struct objects *of, struct ibv_qp *qp)
{
	struct ibv_sge from = { (uintptr_t)memory, LENGTH, of->mr->lkey };
	struct ibv_send_wr send = {
		.wr_id = 2, .sg_list = &from, .num_sge = 1, .opcode = IBV_WR_SEND,
		.send_flags = IBV_SEND_SIGNALED,
	}, *bad;

	if (qp->qp_type == IBV_QPT_UD) {
		send.wr.ud.ah = of->ah;
		send.wr.ud.remote_qpn = qp->qp_num;
		send.wr.ud.remote_qkey = 0x1234;
	}
	done(ibv_post_send(qp, &send, &bad), "ibv_post_send");
}

/* Waits for an event of the queue that has one, and arms it again. */
static void wait_for_event(struct objects *of)
{
	struct ibv_cq *cq;
	void *context;

	while (ibv_get_cq_event(of->channel, &cq, &context))
		if (errno != EINTR)
			fail("ibv_get_cq_event: %s", strerror(errno));
	if (cq != of->cq_with_events || context != of)
		fail("an event of another queue");
	ibv_ack_cq_events(cq, 1);
}

/* One message from a queue pair to itself. */
static void send_and_receive(struct objects *of, struct ibv_qp *qp)
{
	bool events = qp->send_cq == of->cq_with_events;
	bool reliable = qp->qp_type == IBV_QPT_RC;
	size_t offset = LENGTH + GRH + (qp->qp_type == IBV_QPT_UD ? GRH : 0);
	double until = running_time() + LONGEST_WAIT;

	sends = receives = 0;
	fill(memory, LENGTH, ++messages);
	poison(memory + LENGTH + GRH, LENGTH + GRH);
	if (events)
		done(ibv_req_notify_cq(qp->send_cq, 0), "ibv_req_notify_cq");
	post_receive(of, qp);
	post_send(of, qp);
	if (events)
		wait_for_event(of);
	while (!sends || !receives) {
		struct ibv_wc completion;
		int got = ibv_poll_cq(qp->send_cq, 1, &completion);

		if (got < 0)
			fail("ibv_poll_cq: %d", got);
		if (!got && !reliable && running_time() > until) {
			/* Lost. The next round has other queue pairs. */
			messages--;
			return;
		}
		if (!got) {
			/* valgrind runs one thread at a time: the agent has its turn now. */
			usleep(200);
			continue;
		}
		if (completion.status != IBV_WC_SUCCESS)
			fail("status %d of %lu", completion.status, completion.wr_id);
		if (completion.wr_id == 1)
			receives++;
		else
			sends++;
	}
	if (sends > 1 || receives > 1)
		fail("a completion has come twice");
	check_content(memory + offset, LENGTH, messages, "a message");
}

/* In one of two orders; what is still in the queues goes with them. */
static void destroy(struct objects *of, bool regions_first)
{
	if (regions_first)
		done(ibv_dereg_mr(of->mr), "ibv_dereg_mr");
	done(ibv_destroy_qp(of->rc), "ibv_destroy_qp");
	done(ibv_destroy_qp(of->uc), "ibv_destroy_qp");
	done(ibv_destroy_qp(of->ud), "ibv_destroy_qp");
	done(ibv_destroy_qp(of->rc_on_srq), "ibv_destroy_qp");
	done(ibv_destroy_ah(of->ah), "ibv_destroy_ah");
	done(ibv_destroy_srq(of->srq), "ibv_destroy_srq");
	done(ibv_destroy_cq(of->cq_with_events), "ibv_destroy_cq");
	done(ibv_destroy_cq(of->cq_of_uc), "ibv_destroy_cq");
	done(ibv_destroy_cq(of->cq_of_ud), "ibv_destroy_cq");
	done(ibv_destroy_cq(of->cq), "ibv_destroy_cq");
	done(ibv_destroy_comp_channel(of->channel), "ibv_destroy_comp_channel");
	if (!regions_first)
		done(ibv_dereg_mr(of->mr), "ibv_dereg_mr");
	done(ibv_dealloc_pd(of->pd), "ibv_dealloc_pd");
	done(ibv_close_device(of->context), "ibv_close_device");
}

/* Objects that come and go on the context that stays. */
static void come_and_go(struct objects *on)
{
	struct ibv_ah_attr address = own_address(on);
	struct ibv_mr *mr[REGIONS];
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	struct ibv_ah *ah;

	for (int i = 0; i < REGIONS; i++)
		mr[i] = made(ibv_reg_mr(on->pd, memory, LENGTH, 0), "ibv_reg_mr");
	cq = made(ibv_create_cq(on->context, 16, NULL, on->channel, 0), "ibv_create_cq");
	qp = create_qp(on, IBV_QPT_RC, cq, NULL);
	ah = made(ibv_create_ah(on->pd, &address), "ibv_create_ah");
	connect_here(on, qp);
	/* Never polled. */
	post_receive(on, qp);
	post_send(on, qp);
	done(ibv_destroy_qp(qp), "ibv_destroy_qp");
	done(ibv_destroy_ah(ah), "ibv_destroy_ah");
	done(ibv_destroy_cq(cq), "ibv_destroy_cq");
	for (int i = 0; i < REGIONS; i++)
		done(ibv_dereg_mr(mr[i]), "ibv_dereg_mr");
}

static void one_round(struct objects *lasting, uint64_t number)
{
	struct objects fresh;

	doing = "creating\n";
	create(&fresh);
	doing = "RC, with events\n";
	send_and_receive(&fresh, fresh.rc);
	doing = "UC\n";
	send_and_receive(&fresh, fresh.uc);
	doing = "UD\n";
	send_and_receive(&fresh, fresh.ud);
	doing = "RC on a shared queue\n";
	send_and_receive(&fresh, fresh.rc_on_srq);
	doing = "RC of the lasting context\n";
	send_and_receive(lasting, lasting->rc);
	doing = "coming and going on the lasting context\n";
	come_and_go(lasting);
	doing = "destroying\n";
	/* Left where they are. */
	post_receive(&fresh, fresh.uc);
	post_receive(&fresh, fresh.rc);
	if (number % 3) {
		post_send(&fresh, fresh.rc);
		post_send(&fresh, fresh.rc);
	}
	destroy(&fresh, number % 2);
}

static unsigned int count_descriptors(void)
{
	DIR *folder = made(opendir("/proc/self/fd"), "/proc/self/fd");
	unsigned int count = 0;

	while (readdir(folder))
		count++;
	closedir(folder);
	/* Itself, and the two names of folders. */
	return count - 3;
}

static unsigned int count_mappings(void)
{
	FILE *file = made(fopen("/proc/self/maps", "r"), "/proc/self/maps");
	unsigned int count = 0;

	for (int byte; (byte = getc(file)) != EOF;)
		count += byte == '\n';
	fclose(file);
	return count;
}

static unsigned long resident(void)
{
	FILE *file = made(fopen("/proc/self/statm", "r"), "/proc/self/statm");
	unsigned long pages;

	if (fscanf(file, "%*u %lu", &pages) != 1)
		fail("/proc/self/statm");
	fclose(file);
	return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void on_signal(int signal)
{
	if (signal == SIGTERM)
		asked_to_stop = 1;
	else if (write(STDERR_FILENO, doing, strlen(doing)) < 0 ||
		 write(STDERR_FILENO, sends ? "sent\n" : "not sent\n", sends ? 5 : 9) < 0 ||
		 write(STDERR_FILENO, receives ? "received\n" : "not received\n",
		       receives ? 9 : 13) < 0)
		_exit(1);
}

static void wait_until_asked(void)
{
	sigset_t term, before;

	sigemptyset(&term);
	sigaddset(&term, SIGTERM);
	sigprocmask(SIG_BLOCK, &term, &before);
	while (!asked_to_stop)
		sigsuspend(&before);
	asked_to_stop = 0;
	sigprocmask(SIG_SETMASK, &before, NULL);
}

int main(int count, char **arguments)
{
	static const struct option options[] = {
		{ "device", required_argument, NULL, 'd' },
		{ "gid-index", required_argument, NULL, 'g' },
		{ "rounds", required_argument, NULL, 'r' },
		{ 0 },
	};
	struct sigaction action = { .sa_handler = on_signal };
	struct objects lasting;
	uint64_t rounds = 0;

	for (int option; (option = getopt_long(count, arguments, "", options, NULL)) != -1;) {
		if (option == 'd')
			device = optarg;
		else if (option == 'g')
			gid_index = number("gid-index", optarg);
		else if (option == 'r')
			rounds = number("rounds", optarg);
		else
			return 2;
	}
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	setvbuf(stdout, NULL, _IOLBF, 0);
	memory = allocate(2 * (LENGTH + GRH));
	create(&lasting);
	printf("ready\n");
	for (uint64_t round = 1; !asked_to_stop && (!rounds || round <= rounds); round++) {
		one_round(&lasting, round);
		printf("round %lu descriptors %u mappings %u heap %zu resident %lu\n", round,
		       count_descriptors(), count_mappings(), mallinfo2().uordblks, resident());
	}
	destroy(&lasting, false);
	free(memory);
	if (asked_to_stop) {
		asked_to_stop = 0;
		printf("closed\n");
		wait_until_asked();
	}
	printf("{\"messages\":%lu,\"errors\":0}\n", messages);
	return 0;
}
