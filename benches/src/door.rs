//! The operations of the data path, as the provider hands them to libibverbs.
//!
//! Not the provider's own: linked into a program it would register itself with the libibverbs of the process, of which there
//! is none here. These are its shims word for word (`provider/src/verbs.rs`), around the same functions.
//!
//! SAFETY of every block: libibverbs, here the application, vouches for what the verb of that name demands.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rdma_core_sys::{
    IBV_WR_SEND, ibv_context_ops, ibv_cq, ibv_cq_ex, ibv_poll_cq_attr, ibv_qp, ibv_qp_ex,
    ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_srq, ibv_wc,
};
use reverbs::virt::queue_pair::builder;
use reverbs::virt::{completion_queue, queue_pair, shared_receive_queue};

/// Puts the operations where libibverbs puts the provider's.
pub fn set_operations(ops: &mut ibv_context_ops) {
    ops.poll_cq = Some(poll_cq);
    ops.post_send = Some(post_send);
    ops.post_recv = Some(post_recv);
    ops.post_srq_recv = Some(post_srq_recv);
}

/// Puts the functions into an extended queue pair that are needed to send (`provider/src/extended_qp.rs`).
///
/// # Safety
/// It must come from the virtual device.
pub unsafe fn set_builders(pair: *mut ibv_qp_ex) {
    // SAFETY: as the caller vouches.
    let pair = unsafe { &mut *pair };
    pair.wr_start = Some(wr_start);
    pair.wr_send = Some(wr_send);
    pair.wr_set_sge = Some(wr_set_sge);
    pair.wr_complete = Some(wr_complete);
}

/// The same for an extended completion queue (`provider/src/extended_cq.rs`).
///
/// # Safety
/// It must come from the virtual device.
pub unsafe fn set_readers(queue: *mut ibv_cq_ex) {
    // SAFETY: as the caller vouches.
    let queue = unsafe { &mut *queue };
    queue.start_poll = Some(start_poll);
    queue.next_poll = Some(next_poll);
    queue.end_poll = Some(end_poll);
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

unsafe extern "C" fn wr_start(qp: *mut ibv_qp_ex) {
    // SAFETY: see the top.
    guarded_code(
        || unsafe {
            builder::start(qp);
            0
        },
        0,
    );
}

unsafe extern "C" fn wr_send(qp: *mut ibv_qp_ex) {
    // SAFETY: see the top.
    guarded_code(
        || unsafe {
            builder::begin(qp, IBV_WR_SEND, |_| {});
            0
        },
        0,
    );
}

unsafe extern "C" fn wr_set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    // SAFETY: see the top.
    guarded_code(
        || unsafe {
            builder::set_elements(qp, &ibv_sge { addr, length, lkey }, 1);
            0
        },
        0,
    );
}

unsafe extern "C" fn wr_complete(qp: *mut ibv_qp_ex) -> c_int {
    // SAFETY: see the top.
    guarded_code(|| unsafe { builder::complete(qp) }, libc::EIO)
}

unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut ibv_poll_cq_attr) -> c_int {
    // SAFETY: see the top.
    guarded_code(
        || unsafe { completion_queue::start_poll(cq, attr) },
        libc::EIO,
    )
}

unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: see the top.
    guarded_code(|| unsafe { completion_queue::next_poll(cq) }, libc::EIO)
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: see the top.
    unsafe { completion_queue::end_poll(cq) };
}
