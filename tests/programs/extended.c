/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "extended.h"
#include "messages.h"

#include <errno.h>
#include <string.h>

struct ibv_cq *extended_cq(struct ibv_context *context, uint32_t entries, void *cq_context,
			   struct ibv_comp_channel *channel)
{
	struct ibv_cq_init_attr_ex init = {
		.cqe = entries,
		.cq_context = cq_context,
		.channel = channel,
		.wc_flags = IBV_WC_STANDARD_FLAGS,
	};
	struct ibv_cq_ex *cq = ibv_create_cq_ex(context, &init);

	return cq ? ibv_cq_ex_to_cq(cq) : NULL;
}

struct ibv_qp *extended_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
	struct ibv_qp_init_attr_ex all = {
		.qp_context = init->qp_context,
		.send_cq = init->send_cq,
		.recv_cq = init->recv_cq,
		.srq = init->srq,
		.cap = init->cap,
		.qp_type = init->qp_type,
		.sq_sig_all = init->sq_sig_all,
		.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
		.pd = pd,
		.send_ops_flags = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM,
	};
	struct ibv_qp *qp;

	if (init->qp_type != IBV_QPT_UD)
		all.send_ops_flags |= IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM;
	if (init->qp_type == IBV_QPT_RC)
		all.send_ops_flags |= IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP |
				      IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD;
	qp = ibv_create_qp_ex(pd->context, &all);
	if (qp && !ibv_qp_to_qp_ex(qp))
		fail("ibv_qp_to_qp_ex gives nothing");
	init->cap = all.cap;
	return qp;
}

static void read_completion(struct ibv_cq_ex *cq, struct ibv_wc *wc)
{
	*wc = (struct ibv_wc){
		.wr_id = cq->wr_id,
		.status = cq->status,
		.opcode = ibv_wc_read_opcode(cq),
		.vendor_err = ibv_wc_read_vendor_err(cq),
		.byte_len = ibv_wc_read_byte_len(cq),
		.imm_data = ibv_wc_read_imm_data(cq),
		.qp_num = ibv_wc_read_qp_num(cq),
		.src_qp = ibv_wc_read_src_qp(cq),
		.wc_flags = ibv_wc_read_wc_flags(cq),
		.slid = ibv_wc_read_slid(cq),
		.sl = ibv_wc_read_sl(cq),
		.dlid_path_bits = ibv_wc_read_dlid_path_bits(cq),
	};
}

int extended_poll(struct ibv_cq *cq, int count, struct ibv_wc *wc)
{
	struct ibv_cq_ex *extended = (struct ibv_cq_ex *)cq;
	struct ibv_poll_cq_attr attr = { 0 };
	int result = ibv_start_poll(extended, &attr), got = 0;

	if (result == ENOENT)
		return 0;
	while (!result) {
		read_completion(extended, &wc[got++]);
		if (got == count)
			break;
		result = ibv_next_poll(extended);
	}
	if (result && result != ENOENT)
		return -1;
	ibv_end_poll(extended);
	return got;
}

static void begin(struct ibv_qp_ex *qp, const struct ibv_send_wr *wr)
{
	switch (wr->opcode) {
	case IBV_WR_SEND:
		ibv_wr_send(qp);
		break;
	case IBV_WR_SEND_WITH_IMM:
		ibv_wr_send_imm(qp, wr->imm_data);
		break;
	case IBV_WR_RDMA_WRITE:
		ibv_wr_rdma_write(qp, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr);
		break;
	case IBV_WR_RDMA_WRITE_WITH_IMM:
		ibv_wr_rdma_write_imm(qp, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr, wr->imm_data);
		break;
	case IBV_WR_RDMA_READ:
		ibv_wr_rdma_read(qp, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr);
		break;
	case IBV_WR_ATOMIC_CMP_AND_SWP:
		ibv_wr_atomic_cmp_swp(qp, wr->wr.atomic.rkey, wr->wr.atomic.remote_addr,
				      wr->wr.atomic.compare_add, wr->wr.atomic.swap);
		break;
	case IBV_WR_ATOMIC_FETCH_AND_ADD:
		ibv_wr_atomic_fetch_add(qp, wr->wr.atomic.rkey, wr->wr.atomic.remote_addr,
					wr->wr.atomic.compare_add);
		break;
	default:
		fail("opcode %d cannot be built", wr->opcode);
	}
}

static void set_content(struct ibv_qp_ex *qp, const struct ibv_send_wr *wr)
{
	struct ibv_data_buf pieces[MAX_SGE];

	if (!(wr->send_flags & IBV_SEND_INLINE)) {
		if (wr->num_sge == 1)
			ibv_wr_set_sge(qp, wr->sg_list->lkey, wr->sg_list->addr,
				       wr->sg_list->length);
		else
			ibv_wr_set_sge_list(qp, wr->num_sge, wr->sg_list);
		return;
	}
	for (int i = 0; i < wr->num_sge; i++)
		pieces[i] = (struct ibv_data_buf){ (void *)(uintptr_t)wr->sg_list[i].addr,
						   wr->sg_list[i].length };
	if (wr->num_sge == 1)
		ibv_wr_set_inline_data(qp, pieces[0].addr, pieces[0].length);
	else
		ibv_wr_set_inline_data_list(qp, wr->num_sge, pieces);
}

int extended_post(struct ibv_qp *qp, const struct ibv_send_wr *wr)
{
	struct ibv_qp_ex *extended = ibv_qp_to_qp_ex(qp);

	ibv_wr_start(extended);
	for (; wr; wr = wr->next) {
		extended->wr_id = wr->wr_id;
		/* Soft-RoCE looks for inline bytes only where the flag says so, whatever was set. */
		extended->wr_flags = wr->send_flags;
		begin(extended, wr);
		if (qp->qp_type == IBV_QPT_UD)
			ibv_wr_set_ud_addr(extended, wr->wr.ud.ah, wr->wr.ud.remote_qpn,
					   wr->wr.ud.remote_qkey);
		set_content(extended, wr);
	}
	return ibv_wr_complete(extended);
}
