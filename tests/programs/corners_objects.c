/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Objects beyond the classic ones: extended completion queues and queue pairs, multicast groups, memory windows.
 */
#include "corners.h"
#include "extended.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct wish connected = { .type = IBV_QPT_RC, .access = ALL_REMOTE, .state = IBV_QPS_RTS };

/* A pair of extended queue pairs on one extended completion queue. */
static void make_extended(struct corner *corner)
{
	struct pair *pair = &corner->pair;
	struct ibv_cq *cq = extended_cq(corner->facts->context, 16 * DEPTH, pair, NULL);
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
					 .cap = { DEPTH, DEPTH, 2, 2, 32 } };

	*pair = (struct pair){ .cq = cq, .cq_b = cq };
	if (!cq || !(pair->a = extended_qp(corner->facts->pd, &init)) ||
	    !(pair->b = extended_qp(corner->facts->pd, &init)))
		fail("no extended queues: %s", strerror(errno));
	to_init(pair->a, &corner->wish);
	to_init(pair->b, &corner->wish);
	connect_both(corner);
}

static void build(const struct facts *facts, struct ibv_qp_ex *qp, uint64_t id, uint32_t length)
{
	qp->wr_id = id;
	qp->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_send(qp);
	ibv_wr_set_sge(qp, facts->mr->lkey, (uintptr_t)facts->memory, length);
}

/* Requests that are given up, or refused with others, leave nothing behind. */
static void batches(struct corner *corner)
{
	struct ibv_qp_ex *qp = ibv_qp_to_qp_ex(corner->pair.a);
	struct facts *facts = corner->facts;
	struct ibv_sge many[40];

	for (int i = 0; i < 40; i++)
		many[i] = piece(facts, 0, 8);
	ibv_wr_start(qp);
	expect_error(facts, of(corner, "an empty batch"), ibv_wr_complete(qp), 0);
	ibv_wr_start(qp);
	build(facts, qp, 50, 8);
	build(facts, qp, 51, 8);
	ibv_wr_abort(qp);
	expect_nothing(corner, "completions of what was given up", corner->pair.cq);
	ibv_wr_start(qp);
	build(facts, qp, 52, 8);
	build(facts, qp, 53, 8);
	ibv_wr_set_sge_list(qp, 40, many);
	expect(facts, of(corner, "a batch with too many elements is refused"), !!ibv_wr_complete(qp), 1);
	expect_nothing(corner, "completions of what was refused", corner->pair.cq);
	exchange(corner);
}

/* A completion that is looked at while the hardware is replaced, and the one behind it. */
static void look(struct corner *corner, unsigned int cycles)
{
	struct ibv_cq_ex *cq = (struct ibv_cq_ex *)corner->pair.cq;
	struct ibv_qp_ex *qp = ibv_qp_to_qp_ex(corner->pair.a);
	struct ibv_poll_cq_attr attr = { .comp_mask = 0 };
	struct facts *facts = corner->facts;
	uint64_t sends = 11, receives = 1;

	receive_message(corner, corner->pair.b, 1);
	receive_message(corner, corner->pair.b, 2);
	ibv_wr_start(qp);
	build(facts, qp, 11, 8);
	build(facts, qp, 12, 9);
	expect_error(facts, of(corner, "a batch of two"), ibv_wr_complete(qp), 0);
	/* Until all are there: Soft-RoCE of rdma-core 44 skips one when a next that finds nothing is followed by an end. */
	poll(NULL, 0, 500);
	expect_error(facts, of(corner, "start"), ibv_start_poll(cq, &attr), 0);
	/* Two sends and two receives, in the order of each queue. */
	for (int i = 0; i < 4; i++) {
		uint64_t id = cq->wr_id;
		bool sent = id == sends;

		if (i == 1)
			expect_error(facts, of(corner, "ask for an event meanwhile"),
				     ibv_req_notify_cq(corner->pair.cq, 0), 0);
		if (i == 1)
			cycle(cycles);
		expect(facts, of(corner, "it is the next of its queue"), sent || id == receives, 1);
		expect(facts, of(corner, "it stays what it was"), cq->wr_id, id);
		expect(facts, of(corner, "its status"), cq->status, IBV_WC_SUCCESS);
		expect(facts, of(corner, "its opcode"), ibv_wc_read_opcode(cq),
		       sent ? IBV_WC_SEND : IBV_WC_RECV);
		expect(facts, of(corner, "its queue pair"), ibv_wc_read_qp_num(cq),
		       sent ? corner->pair.a->qp_num : corner->pair.b->qp_num);
		if (!sent)
			expect(facts, of(corner, "its length"), ibv_wc_read_byte_len(cq), 7 + id);
		sends += sent;
		receives += !sent;
		if (i < 3)
			expect_error(facts, of(corner, "next"), ibv_next_poll(cq), 0);
	}
	ibv_end_poll(cq);
	expect_error(facts, of(corner, "start when there is nothing"), ibv_start_poll(cq, &attr), ENOENT);
	exchange(corner);
}

static const union ibv_gid group = { .raw = { 0xff, 0x0e, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xe6, 1,
					      2, 3 } };

/* The command file under another number, as programs that share objects with others make one. */
static bool is_command_file(const struct facts *facts, int number)
{
	struct stat one, other;

	must(fstat(facts->context->cmd_fd, &one), "fstat");
	must(fstat(number, &other), "fstat");
	return S_ISCHR(other.st_mode) && one.st_rdev == other.st_rdev && one.st_ino == other.st_ino;
}

void objects_over_cycles(struct facts *facts, unsigned int cycles)
{
	struct corner extended = { .facts = facts, .name = "extended", .wish = connected };
	struct corner datagrams = { .facts = facts, .name = "group",
				    .wish = { .type = IBV_QPT_UD, .state = IBV_QPS_RTS } };
	struct ibv_qp *qp;
	int duplicate = dup(facts->context->cmd_fd), null = open("/dev/null", O_RDWR);

	expect(facts, "another file is not the command file", is_command_file(facts, null), 0);
	expect(facts, "its duplicate is", is_command_file(facts, duplicate), 1);
	make_pair(facts, &datagrams.pair, datagrams.wish);
	qp = datagrams.pair.a;
	expect_error(facts, of(&datagrams, "attach"), ibv_attach_mcast(qp, &group, 0), 0);
	expect_error(facts, of(&datagrams, "attach once more"), ibv_attach_mcast(qp, &group, 0), 0);
	make_extended(&extended);
	exchange(&extended);
	batches(&extended);
	look(&extended, cycles);
	expect(facts, "its duplicate still is", is_command_file(facts, duplicate), 1);
	close(duplicate);
	close(null);
	batches(&extended);
	drop_pair(&extended.pair);
	/* The kernel says so of the hardware's queue pair. */
	expect_error(facts, of(&datagrams, "destroy it while it is attached"), ibv_destroy_qp(qp), EBUSY);
	expect_error(facts, of(&datagrams, "detach"), ibv_detach_mcast(qp, &group, 0), 0);
	expect_error(facts, of(&datagrams, "detach once more"), ibv_detach_mcast(qp, &group, 0), EINVAL);
	drop_pair(&datagrams.pair);
}

/* A WRITE of 8 bytes by a to where b's window is. */
static int write_through(struct corner *corner, uint32_t rkey)
{
	struct facts *facts = corner->facts;
	struct ibv_sge sge = piece(facts, 0, 8);
	struct ibv_wc wc;

	must(post_one(corner->pair.a, IBV_WR_RDMA_WRITE, 7, &sge, 1, (uintptr_t)facts->memory + SLOT,
		      rkey, IBV_SEND_SIGNALED),
	     "ibv_post_send");
	return next_completion(corner->pair.cq, &wc);
}

static struct ibv_mw_bind_info window_of(const struct facts *facts, struct ibv_mr *mr)
{
	return (struct ibv_mw_bind_info){ .mr = mr, .addr = (uintptr_t)facts->memory + SLOT,
					  .length = SLOT, .mw_access_flags = IBV_ACCESS_REMOTE_WRITE };
}

static int post_and_wait(struct corner *corner, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad;
	struct ibv_wc wc;

	wr->send_flags = IBV_SEND_SIGNALED;
	must(ibv_post_send(corner->pair.b, wr, &bad), "ibv_post_send");
	return next_completion(corner->pair.cq, &wc);
}

/* A window that can be written through, before and after a cycle that is refused because of it. */
void windows(struct facts *facts, unsigned int cycles)
{
	struct corner corner = { .facts = facts, .name = "window", .wish = connected };
	struct ibv_mr *mr = ibv_reg_mr(facts->pd, facts->memory, BUFFER,
				       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND |
					       IBV_ACCESS_REMOTE_WRITE);
	struct ibv_mw *first = ibv_alloc_mw(facts->pd, IBV_MW_TYPE_1),
		      *second = ibv_alloc_mw(facts->pd, IBV_MW_TYPE_2);
	struct ibv_mw_bind bind = { .wr_id = 1, .send_flags = IBV_SEND_SIGNALED };
	struct ibv_send_wr wr = { .wr_id = 2, .opcode = IBV_WR_BIND_MW };
	struct ibv_wc wc;

	if (!mr || !first || !second)
		fail("no region or windows: %s", strerror(errno));
	make_pair(facts, &corner.pair, corner.wish);
	bind.bind_info = window_of(facts, mr);
	expect_error(facts, "bind a window of type 1", ibv_bind_mw(corner.pair.b, first, &bind), 0);
	expect(facts, "it is bound", next_completion(corner.pair.cq, &wc), IBV_WC_SUCCESS);
	expect(facts, "the opcode of a binding", wc.opcode, IBV_WC_BIND_MW);
	expect(facts, "write through it", write_through(&corner, first->rkey), IBV_WC_SUCCESS);
	wr.bind_mw.mw = second;
	wr.bind_mw.rkey = ibv_inc_rkey(second->rkey);
	wr.bind_mw.bind_info = window_of(facts, mr);
	expect(facts, "bind a window of type 2", post_and_wait(&corner, &wr), IBV_WC_SUCCESS);
	second->rkey = wr.bind_mw.rkey;
	expect(facts, "write through that", write_through(&corner, second->rkey), IBV_WC_SUCCESS);
	/* Refused. */
	cycle(cycles);
	expect(facts, "write through the first again", write_through(&corner, first->rkey),
	       IBV_WC_SUCCESS);
	expect(facts, "write through the second again", write_through(&corner, second->rkey),
	       IBV_WC_SUCCESS);
	wr = (struct ibv_send_wr){ .wr_id = 3, .opcode = IBV_WR_LOCAL_INV,
				   .invalidate_rkey = second->rkey };
	expect(facts, "invalidate the second", post_and_wait(&corner, &wr), IBV_WC_SUCCESS);
	expect(facts, "the first is as it was", write_through(&corner, first->rkey), IBV_WC_SUCCESS);
	expect(facts, "the second is no more", write_through(&corner, second->rkey),
	       IBV_WC_REM_ACCESS_ERR);
	drop_pair(&corner.pair);
	expect_error(facts, "free the first", ibv_dealloc_mw(first), 0);
	expect_error(facts, "free the second", ibv_dealloc_mw(second), 0);
	/* Not refused. */
	cycle(cycles);
	make_pair(facts, &corner.pair, corner.wish);
	second = ibv_alloc_mw(facts->pd, IBV_MW_TYPE_2);
	if (!second)
		fail("no window: %s", strerror(errno));
	wr = (struct ibv_send_wr){ .wr_id = 4, .opcode = IBV_WR_BIND_MW };
	wr.bind_mw.mw = second;
	wr.bind_mw.rkey = ibv_inc_rkey(second->rkey);
	wr.bind_mw.bind_info = window_of(facts, mr);
	expect(facts, "bind one that is younger", post_and_wait(&corner, &wr), IBV_WC_SUCCESS);
	expect(facts, "write through it", write_through(&corner, wr.bind_mw.rkey), IBV_WC_SUCCESS);
	/* The peer has the key, and takes it away. */
	struct ibv_sge sge = piece(facts, 2 * SLOT, 64);

	must(receive_one(corner.pair.b, 5, &sge, 1), "ibv_post_recv");
	wr = (struct ibv_send_wr){ .wr_id = 6, .opcode = IBV_WR_SEND_WITH_INV,
				   .invalidate_rkey = wr.bind_mw.rkey,
				   .send_flags = IBV_SEND_SIGNALED };
	struct ibv_send_wr *bad;
	uint32_t gone = wr.invalidate_rkey;

	must(ibv_post_send(corner.pair.a, &wr, &bad), "ibv_post_send");
	for (int i = 0; i < 2; i++) {
		expect(facts, "a message that invalidates", next_completion(corner.pair.cq, &wc),
		       IBV_WC_SUCCESS);
		if (wc.opcode == IBV_WC_RECV) {
			/* Soft-RoCE does not. */
			same("it says so", !!(wc.wc_flags & IBV_WC_WITH_INV));
			expect(facts, "and of which key", wc.invalidated_rkey == gone, 1);
		}
	}
	expect(facts, "it is no more", write_through(&corner, gone), IBV_WC_REM_ACCESS_ERR);
	drop_pair(&corner.pair);
	expect_error(facts, "free it", ibv_dealloc_mw(second), 0);
	expect_error(facts, "deregister its region", ibv_dereg_mr(mr), 0);
}
