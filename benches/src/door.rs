//! The operations of the data path, as the provider hands them to libibverbs.
//!
//! Not the provider's own: linked into a program it would register itself with the libibverbs of the process, of which there
//! is none here. These are its shims word for word (`provider/src/verbs.rs`), around the same functions.
//!
//! SAFETY of every block: libibverbs, here the application, vouches for what the verb of that name demands.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rdma_core_sys::{ibv_context_ops, ibv_cq, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_srq, ibv_wc};
use reverbs::virt::{completion_queue, queue_pair, shared_receive_queue};

/// Puts the operations where libibverbs puts the provider's.
pub fn set_operations(ops: &mut ibv_context_ops) {
    ops.poll_cq = Some(poll_cq);
    ops.post_send = Some(post_send);
    ops.post_recv = Some(post_recv);
    ops.post_srq_recv = Some(post_srq_recv);
}

#[inline(always)]
fn guarded_code(verb: impl FnOnce() -> c_int, on_panic: c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(verb)).unwrap_or(on_panic)
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, count: c_int, completions: *mut ibv_wc) -> c_int {
    // SAFETY: see the top.
    guarded_code(
        || unsafe { completion_queue::poll(cq, count, completions) },
        -libc::EIO,
    )
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: see the top.
    guarded_code(
        || unsafe { queue_pair::post_send(qp, request, bad) },
        libc::EIO,
    )
}

unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    guarded_code(
        || unsafe { queue_pair::post_receive(qp, request, bad) },
        libc::EIO,
    )
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    guarded_code(
        || unsafe { shared_receive_queue::post(srq, request, bad) },
        libc::EIO,
    )
}
