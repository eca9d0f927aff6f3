//! The second way to post and to poll, over the virtual device: calls through the objects themselves.
//!
//! SAFETY of every block: as in [`crate::application`].

use rdma_core_sys::{
    IBV_QP_EX_WITH_SEND, IBV_QP_INIT_ATTR_PD, IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, IBV_QPT_RC,
    IBV_WC_SUCCESS, ibv_context, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_pd, ibv_poll_cq_attr,
    ibv_qp, ibv_qp_cap, ibv_qp_ex, ibv_qp_init_attr_ex, ibv_send_wr,
};
use reverbs::virt::{completion_queue, queue_pair};

use crate::door;
use crate::shape::BATCH;

pub(crate) unsafe fn create_cq(context: *mut ibv_context) -> *mut ibv_cq {
    // SAFETY: see the top; zero is valid.
    unsafe {
        let mut attr: ibv_cq_init_attr_ex = std::mem::zeroed();
        attr.cqe = 2048;
        let queue = completion_queue::create_extended(context, &attr).expect("cq_ex");
        door::set_readers(queue);
        (*queue).context = context;
        queue.cast()
    }
}

pub(crate) unsafe fn create_qp(
    domain: *mut ibv_pd,
    completions: *mut ibv_cq,
    capacity: &ibv_qp_cap,
) -> *mut ibv_qp {
    // SAFETY: see the top; zero is valid.
    unsafe {
        let mut init: ibv_qp_init_attr_ex = std::mem::zeroed();
        (init.send_cq, init.recv_cq) = (completions, completions);
        (init.cap, init.qp_type) = (*capacity, IBV_QPT_RC);
        init.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
        (init.pd, init.send_ops_flags) = (domain, u64::from(IBV_QP_EX_WITH_SEND));
        let pair = queue_pair::create_extended(&mut init).expect("qp_ex");
        door::set_builders(pair.cast());
        pair
    }
}

/// Sends all, in batches of so many.
#[inline(always)]
pub(crate) unsafe fn send(pair: *mut ibv_qp, sends: &mut [ibv_send_wr], batch: usize, first: u64) {
    // SAFETY: see the top.
    unsafe {
        let pair: *mut ibv_qp_ex = pair.cast();
        let mut number = first;
        for sends in sends.chunks_mut(batch) {
            (*pair).wr_start.unwrap_unchecked()(pair);
            for send in sends {
                (*pair).wr_id = number;
                (*pair).wr_flags = send.send_flags;
                (*pair).wr_send.unwrap_unchecked()(pair);
                let element = &*send.sg_list;
                let set_sge = (*pair).wr_set_sge.unwrap_unchecked();
                set_sge(pair, element.lkey, element.addr, element.length);
                number += 1;
            }
            assert_eq!((*pair).wr_complete.unwrap_unchecked()(pair), 0);
        }
    }
}

/// Looks at the completions of a batch.
#[inline(always)]
pub(crate) unsafe fn look(queue: *mut ibv_cq, first: u64) {
    // SAFETY: see the top.
    unsafe {
        let queue: *mut ibv_cq_ex = queue.cast();
        let mut attr = ibv_poll_cq_attr { comp_mask: 0 };
        let mut code = (*queue).start_poll.unwrap_unchecked()(queue, &raw mut attr);
        for due in first..first + BATCH as u64 {
            assert_eq!(code, 0, "nothing is there, {due} is due");
            assert_eq!(((*queue).status, (*queue).wr_id), (IBV_WC_SUCCESS, due));
            if due + 1 < first + BATCH as u64 {
                code = (*queue).next_poll.unwrap_unchecked()(queue);
            }
        }
        (*queue).end_poll.unwrap_unchecked()(queue);
    }
}
