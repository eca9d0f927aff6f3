//! The second way to post: the requests of a chain as one batch.

use rdma_core_sys::{
    IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP, IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD,
    IBV_QP_EX_WITH_RDMA_READ, IBV_QP_EX_WITH_RDMA_WRITE, IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM,
    IBV_QP_EX_WITH_SEND, IBV_QP_EX_WITH_SEND_WITH_IMM, IBV_QP_INIT_ATTR_PD,
    IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, IBV_QPT_UD, IBV_SEND_INLINE, ibv_data_buf, ibv_pd, ibv_qp,
    ibv_qp_ex, ibv_qp_init_attr, ibv_qp_init_attr_ex, ibv_send_wr,
};
use reverbs::virt::queue_pair::{self, builder};

const OPERATIONS: u32 = IBV_QP_EX_WITH_RDMA_WRITE
    | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | IBV_QP_EX_WITH_SEND
    | IBV_QP_EX_WITH_SEND_WITH_IMM
    | IBV_QP_EX_WITH_RDMA_READ
    | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD;

/// # Safety
/// As of [`queue_pair::create`].
pub(super) unsafe fn create(domain: *mut ibv_pd, init: &ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: zero is valid; as the caller vouches.
    unsafe {
        let mut all: ibv_qp_init_attr_ex = std::mem::zeroed();
        (all.send_cq, all.recv_cq, all.srq) = (init.send_cq, init.recv_cq, init.srq);
        (all.cap, all.qp_type, all.sq_sig_all) = (init.cap, init.qp_type, init.sq_sig_all);
        all.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
        all.pd = domain;
        all.send_ops_flags = u64::from(OPERATIONS);
        queue_pair::create_extended(&mut all).expect("create_qp_ex")
    }
}

/// Builds all of `requests`; gives what complete answers. An abandoned batch comes before, and must leave nothing behind.
///
/// # Safety
/// The queue pair must come from [`create`].
pub(super) unsafe fn post(pair: *mut ibv_qp, requests: &[ibv_send_wr]) -> i32 {
    let pair: *mut ibv_qp_ex = pair.cast();
    // SAFETY: as the caller vouches; the requests have their elements.
    unsafe {
        builder::start(pair);
        build(pair, &requests[0]);
        builder::abort(pair);
        builder::start(pair);
        for request in requests {
            build(pair, request);
        }
        builder::complete(pair)
    }
}

unsafe fn build(pair: *mut ibv_qp_ex, request: &ibv_send_wr) {
    // SAFETY: as above.
    unsafe {
        ((*pair).wr_id, (*pair).wr_flags) = (request.wr_id, request.send_flags);
        builder::begin(pair, request.opcode, |wr| {
            wr.__bindgen_anon_1 = request.__bindgen_anon_1;
            wr.wr = request.wr;
        });
        if (*pair).qp_base.qp_type == IBV_QPT_UD {
            let to = request.wr.ud;
            builder::set_address(pair, to.ah, to.remote_qpn, to.remote_qkey);
        }
        let count = request.num_sge as usize;
        if request.send_flags & IBV_SEND_INLINE == 0 {
            return builder::set_elements(pair, request.sg_list, count);
        }
        let elements = std::slice::from_raw_parts(request.sg_list, count);
        let buffers: Vec<_> = elements
            .iter()
            .map(|element| ibv_data_buf {
                addr: std::ptr::with_exposed_provenance_mut(element.addr as usize),
                length: element.length as usize,
            })
            .collect();
        builder::set_inline(pair, &buffers);
    }
}
