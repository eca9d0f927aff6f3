//! The fabric's device, as the verbs of a libibverbs.
//!
//! Callers keep the rules of the verbs (objects come from here): that is the SAFETY argument of every block that has no other.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

use rdma_core_sys::{
    IBV_QP_DEST_QPN, IBV_QP_PATH_MTU, IBV_QP_QKEY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE,
    IBV_QPS_ERR, IBV_QPS_INIT, IBV_QPS_RESET, IBV_QPS_RTR, IBV_QPS_RTS, ibv_ah, ibv_ah_attr,
    ibv_comp_channel, ibv_context, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_device, ibv_mr,
    ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_qp_init_attr_ex, ibv_recv_wr, ibv_send_wr,
    ibv_srq, ibv_srq_attr, ibv_srq_init_attr, ibv_wc,
};
use reverbs::device::Verbs;
use reverbs_benches::null_device;
use reverbs_wrappers::plan::Plan;

use crate::events;
use crate::fabric::{Completions, KEYS, NUMBERS, Pair, Region, fabric};

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

/// The device's verbs behind a wrapper.
///
/// # Panics
/// The wrapper does not take the plan, or this process has one already.
#[must_use]
pub fn wrapped(plan: Plan) -> &'static Verbs {
    let table = reverbs_wrappers::wrap(verbs(), plan).expect("one wrapper");
    reverbs_wrappers::set_failing(false);
    Box::leak(Box::new(table))
}

/// What a fabric changes; the rest is that of a device that does nothing.
fn resolve(name: &CStr) -> *mut c_void {
    let known: *const c_void = match name.to_bytes() {
        b"ibv_open_device" => open_device as *const c_void,
        b"ibv_reg_mr_iova2" => reg_mr as *const c_void,
        b"ibv_dereg_mr" => dereg_mr as *const c_void,
        b"ibv_create_cq" => create_cq as *const c_void,
        b"ibv_destroy_cq" => destroy_cq as *const c_void,
        b"ibv_create_comp_channel" => events::create_comp_channel as *const c_void,
        b"ibv_destroy_comp_channel" => events::destroy_comp_channel as *const c_void,
        b"ibv_get_cq_event" => events::get_cq_event as *const c_void,
        b"ibv_ack_cq_events" => events::ack_cq_events as *const c_void,
        b"ibv_create_srq" => create_srq as *const c_void,
        b"ibv_query_srq" => query_srq as *const c_void,
        b"ibv_destroy_srq" => destroy_srq as *const c_void,
        b"ibv_create_ah" => create_ah as *const c_void,
        b"ibv_destroy_ah" => destroy_ah as *const c_void,
        b"ibv_create_qp" => create_qp as *const c_void,
        b"ibv_query_qp" => query_qp as *const c_void,
        b"ibv_modify_qp" => modify_qp as *const c_void,
        b"ibv_destroy_qp" => destroy_qp as *const c_void,
        _ => return null_device::resolve(name),
    };
    known.cast_mut()
}

/// All zeroes is what calloc gives a C provider for its objects.
pub(crate) fn zeroed<T>() -> T {
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
    ops.req_notify_cq = Some(req_notify_cq);
    fabric().has_told = false;
    // SAFETY: as above.
    let extended = unsafe { &mut *reverbs::device::extended(context) };
    extended.create_cq_ex = Some(create_cq_ex);
    extended.create_qp_ex = Some(create_qp_ex);
    context
}

extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    _: u32,
) -> *mut ibv_mr {
    let mut fabric = fabric();
    let key = fabric.number(KEYS, |fabric, key| fabric.regions.contains_key(&key));
    let region = Region {
        address: iova,
        length: length as u64,
    };
    fabric.regions.insert(key, region);
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
    fabric().regions.remove(&mr.rkey);
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
    // SAFETY: null or made by `create_comp_channel`.
    let events = unsafe { events::attach(channel, queue) };
    let completions = Completions {
        events,
        ..Completions::default()
    };
    fabric().completions.insert(queue.addr(), completions);
    queue
}

/// Nothing of what an extended queue has besides is looked at through the device's object.
unsafe extern "C" fn create_cq_ex(
    context: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    // SAFETY: see the top.
    let attr = unsafe { &*attr };
    let vector = attr.comp_vector.cast_signed();
    let queue = create_cq(
        context,
        attr.cqe.cast_signed(),
        attr.cq_context,
        attr.channel,
        vector,
    );
    queue.cast()
}

extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    let mut fabric = fabric();
    let used = |pair: &Pair| [pair.send_completions, pair.receive_completions].contains(&cq.addr());
    if fabric.pairs.values().any(used) {
        return libc::EBUSY;
    }
    fabric.completions.remove(&cq.addr());
    // SAFETY: made by `create_cq`.
    unsafe {
        events::detach((*cq).channel, cq);
        drop(Box::from_raw(cq));
    }
    0
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, _: c_int) -> c_int {
    match fabric().completions.get_mut(&cq.addr()) {
        Some(queue) => queue.armed = true,
        None => return libc::EINVAL,
    }
    0
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, count: c_int, completions: *mut ibv_wc) -> c_int {
    let mut fabric = fabric();
    let Some(queue) = fabric.completions.get_mut(&cq.addr()) else {
        return -1;
    };
    let give = queue.entries.len().min(usize::try_from(count).unwrap_or(0));
    for (index, completion) in queue.entries.drain(..give).enumerate() {
        // SAFETY: see the top.
        unsafe { completions.add(index).write(completion) };
    }
    give as c_int
}

extern "C" fn create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    let queue = Box::into_raw(Box::new(ibv_srq {
        // SAFETY: see the top.
        context: unsafe { (*pd).context },
        // SAFETY: as above.
        srq_context: unsafe { (*init).srq_context },
        pd,
        ..zeroed()
    }));
    fabric().shared.insert(queue.addr(), Default::default());
    queue
}

extern "C" fn query_srq(_: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    // SAFETY: see the top.
    unsafe { *attr = zeroed() };
    0
}

extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    let mut fabric = fabric();
    if fabric.pairs.values().any(|pair| pair.shared == srq.addr()) {
        return libc::EBUSY;
    }
    fabric.shared.remove(&srq.addr());
    // SAFETY: made by `create_srq`.
    drop(unsafe { Box::from_raw(srq) });
    0
}

extern "C" fn create_ah(pd: *mut ibv_pd, _: *mut ibv_ah_attr) -> *mut ibv_ah {
    let handle = Box::into_raw(Box::new(ibv_ah {
        // SAFETY: see the top.
        context: unsafe { (*pd).context },
        pd,
        handle: 0,
    }));
    fabric().handles.insert(handle.addr());
    handle
}

extern "C" fn destroy_ah(ah: *mut ibv_ah) -> c_int {
    fabric().handles.remove(&ah.addr());
    // SAFETY: made by `create_ah`.
    drop(unsafe { Box::from_raw(ah) });
    0
}

extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: see the top.
    let (context, init) = unsafe { ((*pd).context, &*init) };
    let mut fabric = fabric();
    let number = fabric.number(NUMBERS, |fabric, number| fabric.pairs.contains_key(&number));
    let pair = Pair::new(init);
    fabric.pairs.insert(number, pair);
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

unsafe extern "C" fn create_qp_ex(
    _: *mut ibv_context,
    attr: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    // SAFETY: see the top. It begins with the fields of the other.
    unsafe { create_qp((*attr).pd, attr.cast()) }
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
        let mut fabric = fabric();
        let Some(pair) = fabric.pairs.get(&(*qp).qp_num) else {
            return libc::EINVAL;
        };
        (*attr).qp_state = pair.state;
        (*attr).rq_psn = match fabric.stale {
            true => pair.first_expected.unwrap_or_default(),
            false => pair.expected,
        };
        (*attr).sq_psn = pair.next_psn;
        fabric.has_told |= !fabric.stale && pair.peer == (*qp).qp_num;
    }
    0
}

/// Is there a way from one state to the other (`ibv_modify_qp(3)`)?
fn leads(from: u32, to: u32, mask: u32) -> bool {
    match to {
        IBV_QPS_RESET => true,
        IBV_QPS_ERR => from != IBV_QPS_RESET,
        IBV_QPS_INIT => [IBV_QPS_RESET, IBV_QPS_INIT].contains(&from),
        IBV_QPS_RTR => from == IBV_QPS_INIT,
        IBV_QPS_RTS => from == IBV_QPS_RTR || from == IBV_QPS_RTS && mask & IBV_QP_SQ_PSN == 0,
        _ => false,
    }
}

extern "C" fn modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    let mask = mask as u32;
    // SAFETY: see the top.
    let (number, attr) = unsafe { ((*qp).qp_num, &*attr) };
    let mut fabric = fabric();
    let Some(pair) = fabric.pairs.get_mut(&number) else {
        return libc::EINVAL;
    };
    if mask & IBV_QP_STATE != 0 && !leads(pair.state, attr.qp_state, mask) {
        return libc::EINVAL;
    }
    if mask & IBV_QP_DEST_QPN != 0 {
        pair.peer = attr.dest_qp_num;
    }
    if mask & IBV_QP_RQ_PSN != 0 {
        (pair.expected, pair.first_expected) = (attr.rq_psn, Some(attr.rq_psn));
    }
    if mask & IBV_QP_SQ_PSN != 0 {
        pair.next_psn = attr.sq_psn;
    }
    if mask & IBV_QP_PATH_MTU != 0 {
        pair.mtu = 128 << attr.path_mtu;
    }
    if mask & IBV_QP_QKEY != 0 {
        pair.key = attr.qkey;
    }
    if mask & IBV_QP_STATE != 0 {
        fabric.set_state(number, attr.qp_state);
    }
    0
}

extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: made by `create_qp`.
    let qp = unsafe { Box::from_raw(qp) };
    fabric().pairs.remove(&qp.qp_num);
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
            let code = fabric().post_send((*qp).qp_num, &*request);
            if code != 0 {
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
    _: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let mut request = first;
        while !request.is_null() {
            fabric().post_receive((*qp).qp_num, &*request);
            request = (*request).next;
        }
    }
    0
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    first: *mut ibv_recv_wr,
    _: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let mut request = first;
        while !request.is_null() {
            fabric().post_shared_receive(srq.addr(), &*request);
            request = (*request).next;
        }
    }
    0
}
