//! The device's verbs.
//!
//! Callers keep the rules of the verbs (objects come from here): that is the SAFETY argument of every block that has no other.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

use rdma_core_sys::{
    IBV_QP_DEST_QPN, IBV_QP_PATH_MTU, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, ibv_ah,
    ibv_ah_attr, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_mr, ibv_pd, ibv_qp,
    ibv_qp_attr, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr, ibv_srq, ibv_srq_attr,
    ibv_srq_init_attr, ibv_wc,
};
use reverbs::device::Verbs;
use reverbs_benches::null_device;

use crate::device::{Pair, Shared, device};

/// The device's verbs.
///
/// # Panics
/// Never: every name resolves, if only to a function that says that it is not there.
#[must_use]
pub fn verbs() -> &'static Verbs {
    static VERBS: OnceLock<Verbs> = OnceLock::new();
    VERBS.get_or_init(|| {
        // SAFETY: names resolve to functions with the signatures of verbs.h; one that is only stood in for never returns.
        unsafe { Verbs::load(|name| Some(resolve(name)), libc::__errno_location) }
            .expect("every name resolves")
    })
}

/// The rest is that of a device that does nothing.
fn resolve(name: &CStr) -> *mut c_void {
    let known: *const c_void = match name.to_bytes() {
        b"ibv_open_device" => open_device as *const c_void,
        b"ibv_reg_mr_iova2" => reg_mr as *const c_void,
        b"ibv_dereg_mr" => dereg_mr as *const c_void,
        b"ibv_create_ah" => create_ah as *const c_void,
        b"ibv_destroy_ah" => destroy_ah as *const c_void,
        b"ibv_create_cq" => create_cq as *const c_void,
        b"ibv_destroy_cq" => destroy_cq as *const c_void,
        b"ibv_create_srq" => create_srq as *const c_void,
        b"ibv_query_srq" => query_srq as *const c_void,
        b"ibv_destroy_srq" => destroy_srq as *const c_void,
        b"ibv_create_qp" => create_qp as *const c_void,
        b"ibv_query_qp" => query_qp as *const c_void,
        b"ibv_modify_qp" => modify_qp as *const c_void,
        b"ibv_destroy_qp" => destroy_qp as *const c_void,
        _ => return null_device::resolve(name),
    };
    known.cast_mut()
}

/// All zeroes is what calloc gives a C provider for its objects.
fn zeroed<T>() -> T {
    // SAFETY: only used for C structures of numbers, pointers and optional functions.
    unsafe { std::mem::zeroed() }
}

extern "C" fn open_device(device: *mut ibv_device) -> *mut ibv_context {
    let context = null_device::open_device(device);
    // SAFETY: just made, and nobody else's.
    let ops = unsafe { &mut (*context).ops };
    ops.poll_cq = Some(poll_cq);
    ops.post_send = Some(post_send);
    ops.post_recv = Some(post_recv);
    ops.post_srq_recv = Some(post_srq_recv);
    context
}

extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    _: u64,
    _: u32,
) -> *mut ibv_mr {
    let mut device = device();
    let key = device.number(|device, key| device.keys.contains(&key));
    device.keys.insert(key);
    Box::into_raw(Box::new(ibv_mr {
        // SAFETY: see the top.
        context: unsafe { (*pd).context },
        pd,
        addr,
        length,
        handle: 0,
        lkey: key,
        rkey: key,
    }))
}

extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: made by `reg_mr`.
    let mr = unsafe { Box::from_raw(mr) };
    device().keys.remove(&mr.lkey);
    0
}

extern "C" fn create_ah(pd: *mut ibv_pd, _: *mut ibv_ah_attr) -> *mut ibv_ah {
    let handle = Box::into_raw(Box::new(ibv_ah {
        // SAFETY: see the top.
        context: unsafe { (*pd).context },
        pd,
        handle: 0,
    }));
    device().handles.insert(handle.addr());
    handle
}

extern "C" fn destroy_ah(ah: *mut ibv_ah) -> c_int {
    device().handles.remove(&ah.addr());
    // SAFETY: made by `create_ah`.
    drop(unsafe { Box::from_raw(ah) });
    0
}

extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    _: c_int,
) -> *mut ibv_cq {
    let queue = Box::into_raw(Box::new(ibv_cq {
        context,
        channel,
        cq_context,
        cqe,
        ..zeroed()
    }));
    device()
        .completions
        .insert(queue.addr(), Default::default());
    queue
}

extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    device().completions.remove(&cq.addr());
    // SAFETY: made by `create_cq`.
    drop(unsafe { Box::from_raw(cq) });
    0
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, count: c_int, completions: *mut ibv_wc) -> c_int {
    let mut device = device();
    if device.eager {
        device.settle();
    }
    let Some(queue) = device.completions.get_mut(&cq.addr()) else {
        return -1;
    };
    let give = queue.len().min(usize::try_from(count).unwrap_or(0));
    for (index, completion) in queue.drain(..give).enumerate() {
        // SAFETY: see the top.
        unsafe { completions.add(index).write(completion) };
    }
    give as c_int
}

extern "C" fn create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: see the top.
    let (context, init) = unsafe { ((*pd).context, &*init) };
    let queue = Box::into_raw(Box::new(ibv_srq {
        context,
        srq_context: init.srq_context,
        pd,
        ..zeroed()
    }));
    let shared = Shared {
        max_wr: init.attr.max_wr,
        max_sge: init.attr.max_sge,
        ..Shared::default()
    };
    device().shared.insert(queue.addr(), shared);
    queue
}

extern "C" fn query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    let device = device();
    let Some(shared) = device.shared.get(&srq.addr()) else {
        return libc::EINVAL;
    };
    let found = ibv_srq_attr {
        max_wr: shared.max_wr,
        max_sge: shared.max_sge,
        srq_limit: 0,
    };
    // SAFETY: see the top.
    unsafe { *attr = found };
    0
}

extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    device().shared.remove(&srq.addr());
    // SAFETY: made by `create_srq`.
    drop(unsafe { Box::from_raw(srq) });
    0
}

extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: see the top.
    let (context, init) = unsafe { ((*pd).context, &*init) };
    let mut device = device();
    let number = device.number(|device, number| device.pairs.contains_key(&number));
    let completions = (init.send_cq.addr(), init.recv_cq.addr());
    let signal_all = init.sq_sig_all != 0;
    let shared = init.srq.addr();
    let pair = Pair::new(init.qp_type, init.cap, signal_all, completions, shared);
    device.pairs.insert(number, pair);
    Box::into_raw(Box::new(ibv_qp {
        context,
        qp_context: init.qp_context,
        pd,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        qp_num: number,
        qp_type: init.qp_type,
        ..zeroed()
    }))
}

extern "C" fn query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        (*attr, *init) = (zeroed(), zeroed());
        let device = device();
        let Some(pair) = device.pairs.get(&(*qp).qp_num) else {
            return libc::EINVAL;
        };
        (*attr).qp_state = pair.state;
        (*attr).rq_psn = pair.expected;
        (*attr).sq_psn = pair.next_psn;
        (*attr).cap = pair.capacity;
    }
    0
}

extern "C" fn modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    let mask = mask as u32;
    // SAFETY: see the top.
    let (number, attr) = unsafe { ((*qp).qp_num, &*attr) };
    let mut device = device();
    let Some(pair) = device.pairs.get_mut(&number) else {
        return libc::EINVAL;
    };
    // What the kernel checks, too: 24 bits, and one of five sizes.
    if mask & IBV_QP_RQ_PSN != 0 && attr.rq_psn >> 24 != 0
        || mask & IBV_QP_SQ_PSN != 0 && attr.sq_psn >> 24 != 0
        || mask & IBV_QP_PATH_MTU != 0 && !(1..=5).contains(&attr.path_mtu)
    {
        return libc::EINVAL;
    }
    if mask & IBV_QP_DEST_QPN != 0 {
        pair.peer = attr.dest_qp_num;
    }
    if mask & IBV_QP_RQ_PSN != 0 {
        pair.expected = attr.rq_psn;
    }
    if mask & IBV_QP_SQ_PSN != 0 {
        pair.next_psn = attr.sq_psn;
    }
    if mask & IBV_QP_PATH_MTU != 0 {
        pair.mtu = 128 << attr.path_mtu;
    }
    if mask & IBV_QP_STATE != 0 {
        device.set_state(number, attr.qp_state);
    }
    0
}

extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: made by `create_qp`.
    let qp = unsafe { Box::from_raw(qp) };
    device().pairs.remove(&qp.qp_num);
    0
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    first: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let mut request = first;
        while !request.is_null() {
            if let Err(code) = device().post_send((*qp).qp_num, &*request) {
                *bad = request;
                return code;
            }
            request = (*request).next;
        }
    }
    0
}

unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let mut request = first;
        while !request.is_null() {
            if let Err(code) = device().post_receive((*qp).qp_num, &*request) {
                *bad = request;
                return code;
            }
            request = (*request).next;
        }
    }
    0
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let mut request = first;
        while !request.is_null() {
            if let Err(code) = device().post_shared(srq.addr(), &*request) {
                *bad = request;
                return code;
            }
            request = (*request).next;
        }
    }
    0
}
