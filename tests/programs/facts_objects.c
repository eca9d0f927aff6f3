/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "facts.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#define EVERY_ATTRIBUTE 0x1fffff

void queries(struct facts *facts)
{
	struct ibv_device_attr device;
	struct ibv_port_attr port;
	union ibv_gid gid;
	__be16 pkey;
	int result = ibv_query_device(facts->context, &device);

	expect_error(facts, "query the device", result, 0);
	same("largest number of queue pairs", device.max_qp);
	same("largest queue", device.max_qp_wr);
	same("scatter elements", device.max_sge);
	same("atomics", device.atomic_cap);
	same("port state", facts->port.state);
	same("port MTU", facts->port.active_mtu);
	same("port LID", facts->port.lid);
	same("GIDs of the port", facts->port.gid_tbl_len);
	same("P_Keys of the port", facts->port.pkey_tbl_len);
	same_error("query a port that does not exist", ibv_query_port(facts->context, 77, &port));
	same("query a GID that does not exist",
	     ibv_query_gid(facts->context, 1, facts->port.gid_tbl_len, &gid));
	expect(facts, "query a P_Key", ibv_query_pkey(facts->context, 1, 0, &pkey), 0);
	same("the P_Key", be16toh(pkey));
	expect(facts, "completion vectors are there", facts->context->num_comp_vectors >= 1, 1);
}

static int try_qp(struct facts *facts, struct ibv_cq *cq, struct ibv_qp_cap cap,
		  struct ibv_qp_cap *given)
{
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .cap = cap,
					 .qp_type = IBV_QPT_RC };
	struct ibv_qp *qp;
	int error = ERROR_OF(qp = ibv_create_qp(facts->pd, &init));

	if (qp) {
		*given = init.cap;
		ibv_destroy_qp(qp);
	}
	return error;
}

void creation(struct facts *facts)
{
	struct ibv_cq *cq = ibv_create_cq(facts->context, DEPTH, NULL, NULL, 0), *other;
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = 99,
					 .cap = { 1, 1, 1, 1, 0 } };
	struct ibv_srq_init_attr srq = { .attr = { .max_wr = 1 << 30, .max_sge = 1 } };
	struct ibv_qp_cap given = { 0 };
	struct ibv_ah_attr way = { .port_num = 77, .is_global = 1 };

	expect(facts, "a CQ has at least the entries asked for", cq && cq->cqe >= DEPTH, 1);
	same("entries of a CQ", cq->cqe);
	expect_error(facts, "CQ of 0 entries", ERROR_OF(ibv_create_cq(facts->context, 0, 0, 0, 0)),
		     EINVAL);
	expect_error(facts, "CQ of 2^30 entries",
		     ERROR_OF(ibv_create_cq(facts->context, 1 << 30, 0, 0, 0)), EINVAL);
	expect_error(facts, "CQ on a vector that does not exist",
		     ERROR_OF(other = ibv_create_cq(facts->context, 1, 0, 0, 1 << 20)), EINVAL);
	expect_error(facts, "QP with inline data of 1 MiB",
		     try_qp(facts, cq, (struct ibv_qp_cap){ 1, 1, 1, 1, 1 << 20 }, &given), EINVAL);
	expect_error(facts, "QP with 2^30 sends",
		     try_qp(facts, cq, (struct ibv_qp_cap){ 1 << 30, 1, 1, 1, 0 }, &given), EINVAL);
	expect_error(facts, "QP with 10000 elements a send",
		     try_qp(facts, cq, (struct ibv_qp_cap){ 1, 1, 10000, 1, 0 }, &given), EINVAL);
	optional_error("QP of an unknown type", ERROR_OF(ibv_create_qp(facts->pd, &init)));
	expect_error(facts, "SRQ of 2^30 receives", ERROR_OF(ibv_create_srq(facts->pd, &srq)),
		     EINVAL);
	same_error("QP with room for nothing",
		   try_qp(facts, cq, (struct ibv_qp_cap){ 0, 0, 0, 0, 0 }, &given));
	expect_error(facts, "ordinary QP",
		     try_qp(facts, cq, (struct ibv_qp_cap){ DEPTH, DEPTH, 2, 2, 32 }, &given), 0);
	same("given max_send_wr", given.max_send_wr);
	same("given max_recv_wr", given.max_recv_wr);
	same("given max_send_sge", given.max_send_sge);
	same("given max_recv_sge", given.max_recv_sge);
	same("given max_inline_data", given.max_inline_data);
	same_error("AH on a port that does not exist", ERROR_OF(ibv_create_ah(facts->pd, &way)));
	way = (struct ibv_ah_attr){ .port_num = 1, .is_global = 1,
				    .grh = { .sgid_index = 250, .dgid = facts->gid } };
	same_error("AH from a GID that does not exist", ERROR_OF(ibv_create_ah(facts->pd, &way)));
	ibv_destroy_cq(cq);
}

void destruction(struct facts *facts)
{
	struct ibv_comp_channel *channel = ibv_create_comp_channel(facts->context);
	struct ibv_cq *cq = ibv_create_cq(facts->context, DEPTH, NULL, channel, 0);
	struct ibv_pd *pd = ibv_alloc_pd(facts->context);
	struct ibv_srq_init_attr srq_init = { .attr = { .max_wr = DEPTH, .max_sge = 1 } };
	struct ibv_srq *srq = ibv_create_srq(pd, &srq_init);
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .srq = srq,
					 .cap = { 1, 0, 1, 0, 0 }, .qp_type = IBV_QPT_RC };
	struct ibv_qp *qp = ibv_create_qp(pd, &init);
	struct ibv_mr *mr = ibv_reg_mr(pd, facts->memory, 4096, IBV_ACCESS_LOCAL_WRITE);
	struct ibv_ah_attr way = { .port_num = 1, .is_global = 1,
				   .grh = { .sgid_index = facts->gid_index, .dgid = facts->gid } };
	struct ibv_ah *ah = ibv_create_ah(pd, &way);

	if (!channel || !cq || !pd || !srq || !qp || !mr || !ah)
		fail("cannot create objects to destroy: %s", strerror(errno));
	expect_error(facts, "destroy a CQ in use", ibv_destroy_cq(cq), EBUSY);
	expect_error(facts, "destroy an SRQ in use", ibv_destroy_srq(srq), EBUSY);
	expect_error(facts, "destroy a channel in use", ibv_destroy_comp_channel(channel), EBUSY);
	expect_error(facts, "free a PD that has a QP", ibv_dealloc_pd(pd), EBUSY);
	expect_error(facts, "destroy the QP", ibv_destroy_qp(qp), 0);
	expect_error(facts, "free a PD that has an SRQ", ibv_dealloc_pd(pd), EBUSY);
	expect_error(facts, "destroy the SRQ", ibv_destroy_srq(srq), 0);
	expect_error(facts, "free a PD that has an MR", ibv_dealloc_pd(pd), EBUSY);
	expect_error(facts, "deregister the MR", ibv_dereg_mr(mr), 0);
	expect_error(facts, "free a PD that has an AH", ibv_dealloc_pd(pd), EBUSY);
	expect_error(facts, "destroy the AH", ibv_destroy_ah(ah), 0);
	expect_error(facts, "free the PD", ibv_dealloc_pd(pd), 0);
	expect_error(facts, "destroy the CQ", ibv_destroy_cq(cq), 0);
	expect_error(facts, "destroy the channel", ibv_destroy_comp_channel(channel), 0);
}

void states(struct facts *facts)
{
	struct ibv_qp_attr attributes = { .qp_state = IBV_QPS_RTS };
	struct ibv_qp_init_attr init;
	struct pair pair;

	make_pair(facts, &pair, (struct wish){ .type = IBV_QPT_RC });
	expect(facts, "state of a new QP", pair.a->state, IBV_QPS_RESET);
	expect_error(facts, "RESET to RTS", ibv_modify_qp(pair.a, &attributes, IBV_QP_STATE),
		     EINVAL);
	attributes.qp_state = IBV_QPS_INIT;
	expect_error(facts, "RESET to INIT without a port",
		     ibv_modify_qp(pair.a, &attributes, IBV_QP_STATE), EINVAL);
	attributes.port_num = 77;
	expect_error(facts, "RESET to INIT on a port that does not exist",
		     ibv_modify_qp(pair.a, &attributes,
				   IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
					   IBV_QP_ACCESS_FLAGS),
		     EINVAL);
	expect(facts, "state after refused changes", pair.a->state, IBV_QPS_RESET);
	drop_pair(&pair);

	make_pair(facts, &pair, (struct wish){ .type = IBV_QPT_RC, .state = IBV_QPS_RTS,
					       .rnr_retry = 5,
					       .access = IBV_ACCESS_REMOTE_WRITE });
	expect(facts, "state of a connected QP", pair.a->state, IBV_QPS_RTS);
	expect_error(facts, "query a QP",
		     ibv_query_qp(pair.a, &attributes, EVERY_ATTRIBUTE, &init), 0);
	expect(facts, "queried state", attributes.qp_state, IBV_QPS_RTS);
	expect(facts, "queried peer is the one given", attributes.dest_qp_num == pair.b->qp_num, 1);
	expect(facts, "queried destination GID is the one given",
	       memcmp(&attributes.ah_attr.grh.dgid, &facts->gid, 16), 0);
	expect(facts, "queried sgid_index", attributes.ah_attr.grh.sgid_index, facts->gid_index);
	same("queried hop limit", attributes.ah_attr.grh.hop_limit);
	expect(facts, "queried path MTU", attributes.path_mtu, IBV_MTU_256);
	expect(facts, "queried retry count", attributes.retry_cnt, 1);
	expect(facts, "queried RNR retry", attributes.rnr_retry, 5);
	expect(facts, "queried timeout", attributes.timeout, 12);
	expect(facts, "queried RNR timer", attributes.min_rnr_timer, 1);
	same("queried max_rd_atomic", attributes.max_rd_atomic);
	same("queried max_dest_rd_atomic", attributes.max_dest_rd_atomic);
	expect(facts, "queried access", attributes.qp_access_flags, IBV_ACCESS_REMOTE_WRITE);
	expect(facts, "queried receive packet number", attributes.rq_psn, 0);
	expect(facts, "queried send packet number", attributes.sq_psn, 0);
	expect(facts, "queried CQs are the ones given",
	       init.send_cq == pair.cq && init.recv_cq == pair.cq, 1);
	same("queried max_send_wr", init.cap.max_send_wr);
	same("queried max_inline_data", init.cap.max_inline_data);
	attributes.min_rnr_timer = 9;
	expect_error(facts, "change the RNR timer of a connected QP",
		     ibv_modify_qp(pair.a, &attributes, IBV_QP_MIN_RNR_TIMER), 0);
	ibv_query_qp(pair.a, &attributes, IBV_QP_MIN_RNR_TIMER, &init);
	expect(facts, "queried RNR timer after the change", attributes.min_rnr_timer, 9);
	expect_error(facts, "connected QP to ERR", to_error(pair.a), 0);
	ibv_query_qp(pair.a, &attributes, IBV_QP_STATE, &init);
	expect(facts, "queried state after ERR", attributes.qp_state, IBV_QPS_ERR);
	attributes.qp_state = IBV_QPS_RESET;
	expect_error(facts, "QP from ERR to RESET", ibv_modify_qp(pair.a, &attributes, IBV_QP_STATE),
		     0);
	expect(facts, "state after RESET", pair.a->state, IBV_QPS_RESET);
	drop_pair(&pair);
}

void memory(struct facts *facts)
{
	unsigned char *gone = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
				   -1, 0);
	unsigned char *constant =
		mmap(NULL, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *one, *two;

	munmap(gone, 8192);
	expect_error(facts, "register memory that is not mapped",
		     ERROR_OF(ibv_reg_mr(facts->pd, gone, 8192, IBV_ACCESS_LOCAL_WRITE)), EFAULT);
	same_error("register nothing",
		   ERROR_OF(one = ibv_reg_mr(facts->pd, facts->memory, 0, IBV_ACCESS_LOCAL_WRITE)));
	if (one)
		ibv_dereg_mr(one);
	expect_error(facts, "register read-only memory for writing",
		     ERROR_OF(ibv_reg_mr(facts->pd, constant, 8192, IBV_ACCESS_LOCAL_WRITE)),
		     EFAULT);
	expect_error(facts, "register for remote writes but not local ones",
		     ERROR_OF(ibv_reg_mr(facts->pd, facts->memory, 4096, IBV_ACCESS_REMOTE_WRITE)),
		     EINVAL);
	one = ibv_reg_mr(facts->pd, constant, 8192, 0);
	two = ibv_reg_mr(facts->pd, facts->memory, 100, IBV_ACCESS_LOCAL_WRITE);
	expect(facts, "register read-only memory for reading", one != NULL, 1);
	expect(facts, "register a part again", two != NULL, 1);
	if (one && two) {
		expect(facts, "keys of two regions differ", one->lkey != two->lkey, 1);
		expect(facts, "address, length, PD and context of a region",
		       two->addr == facts->memory && two->length == 100 && two->pd == facts->pd &&
			       two->context == facts->context,
		       1);
		expect_error(facts, "deregister one", ibv_dereg_mr(one), 0);
		expect_error(facts, "deregister the other", ibv_dereg_mr(two), 0);
	}
	munmap(constant, 8192);
}

static void try_resize(struct facts *facts)
{
	struct ibv_cq *cq = ibv_create_cq(facts->context, DEPTH, NULL, NULL, 0);
	int result = ibv_resize_cq(cq, 10 * DEPTH);

	optional_error("resize a CQ", result);
	if (!result)
		expect(facts, "entries of the resized CQ suffice", cq->cqe >= 10 * DEPTH, 1);
	ibv_destroy_cq(cq);
}

void optional_verbs(struct facts *facts)
{
	struct ibv_cq_init_attr_ex cq_init = { .cqe = DEPTH };
	struct ibv_device_attr_ex device;
	struct ibv_td_init_attr td_init = { 0 };
	struct ibv_cq_ex *cq;
	struct ibv_td *td;
	struct ibv_mw *mw;
	struct ibv_xrcd_init_attr xrcd_init = { .comp_mask = IBV_XRCD_INIT_ATTR_FD |
							     IBV_XRCD_INIT_ATTR_OFLAGS,
						.fd = -1 };
	struct ibv_xrcd *xrcd;

	try_resize(facts);
	optional_error("memory window of type 1", ERROR_OF(mw = ibv_alloc_mw(facts->pd,
									     IBV_MW_TYPE_1)));
	if (mw)
		expect_error(facts, "free the memory window", ibv_dealloc_mw(mw), 0);
	optional_error("memory window of type 2", ERROR_OF(mw = ibv_alloc_mw(facts->pd,
									     IBV_MW_TYPE_2)));
	if (mw)
		expect_error(facts, "free the memory window", ibv_dealloc_mw(mw), 0);
	optional_error("extended CQ", ERROR_OF(cq = ibv_create_cq_ex(facts->context, &cq_init)));
	if (cq)
		expect_error(facts, "destroy the extended CQ", ibv_destroy_cq(ibv_cq_ex_to_cq(cq)),
			     0);
	optional_error("extended query of the device",
		       ibv_query_device_ex(facts->context, NULL, &device));
	optional_error("thread domain", ERROR_OF(td = ibv_alloc_td(facts->context, &td_init)));
	if (td)
		ibv_dealloc_td(td);
	optional_error("XRC domain", ERROR_OF(xrcd = ibv_open_xrcd(facts->context, &xrcd_init)));
	if (xrcd)
		ibv_close_xrcd(xrcd);
}
