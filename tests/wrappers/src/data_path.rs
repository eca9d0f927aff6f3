//! Posts and polls, which go through the operations of the context.

use std::ffi::c_int;
use std::sync::OnceLock;

use rdma_core_sys::{
    IBV_QPT_UC, IBV_QPT_UD, IBV_WC_SEND, IBV_WR_RDMA_WRITE, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM,
    ibv_context, ibv_cq, ibv_device_attr_ex, ibv_qp, ibv_query_device_ex_input, ibv_recv_wr,
    ibv_send_wr, ibv_srq, ibv_wc,
};
use reverbs::device::extended;

use crate::state::state;

/// Puts the wrapper's operations into a context that was just opened.
pub(crate) unsafe fn wrap_operations(context: *mut ibv_context) {
    // SAFETY: nobody else has it yet.
    let ops = unsafe { &mut (*context).ops };
    state().keep_operations(context.addr(), *ops);
    ops.poll_cq = Some(poll_cq);
    ops.req_notify_cq = Some(req_notify_cq);
    ops.post_send = Some(post_send);
    ops.post_recv = Some(post_recv);
    ops.post_srq_recv = Some(post_srq_recv);
    if state().plan.queue > 0 {
        // SAFETY: a context of libibverbs, which nobody else has yet.
        let query = unsafe { &mut (*extended(context)).query_device_ex };
        if let Some(below) = query.replace(query_device) {
            let _ = QUERY_DEVICE.set(below);
        }
    }
}

type QueryDevice = unsafe extern "C" fn(
    *mut ibv_context,
    *const ibv_query_device_ex_input,
    *mut ibv_device_attr_ex,
    usize,
) -> c_int;

/// That of the device below.
static QUERY_DEVICE: OnceLock<QueryDevice> = OnceLock::new();

unsafe extern "C" fn query_device(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    let Some(below) = QUERY_DEVICE.get() else {
        return libc::EOPNOTSUPP;
    };
    // SAFETY: see the top.
    unsafe {
        let code = below(context, input, attr, size);
        if code == 0 {
            (*attr).orig_attr.max_qp_wr = state().plan.queue;
        }
        code
    }
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, count: c_int, completions: *mut ibv_wc) -> c_int {
    let state = state();
    // SAFETY: see the top; zero is a valid completion.
    unsafe {
        let code = pull(cq);
        if code < 0 {
            return code;
        }
        let mut held = state.completions();
        held.ripen(cq.addr());
        for given in 0..count {
            match held.take(cq.addr(), state) {
                Some(completion) => completions.add(given as usize).write(completion),
                None => return given,
            }
        }
        count
    }
}

/// Takes what the device has; gives what it answers last.
unsafe fn pull(cq: *mut ibv_cq) -> c_int {
    const BATCH: usize = 32;
    let state = state();
    // SAFETY: see the top; zero is a valid completion.
    unsafe {
        let poll = state.operations((*cq).context.addr()).poll_cq;
        let poll = poll.expect("a device that polls");
        loop {
            let mut found: [ibv_wc; BATCH] = std::mem::zeroed();
            let got = poll(cq, BATCH as c_int, found.as_mut_ptr());
            for completion in found.iter().take(usize::try_from(got).unwrap_or(0)) {
                let polls = state.random(state.plan.delay + 1) + 1;
                state.completions().add(cq.addr(), *completion, polls);
            }
            if got < BATCH as c_int {
                return got;
            }
        }
    }
}

/// Whoever polls after a queue pair went, or was reset, finds all there will ever be of it.
pub(crate) unsafe fn settle(qp: *mut ibv_qp) {
    // SAFETY: see the top.
    let queues = unsafe { [(*qp).send_cq, (*qp).recv_cq] };
    for cq in queues {
        // SAFETY: as above.
        unsafe { pull(cq) };
    }
    let wanted = |queue| queues.iter().any(|cq| cq.addr() == queue);
    state().completions().ripen_all(wanted);
}

/// A program that has asked for an event and polls once more must find what is there.
unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    let state = state();
    // SAFETY: see the top.
    unsafe {
        let operations = state.operations((*cq).context.addr());
        let code = (operations.req_notify_cq.expect("a device with events"))(cq, solicited_only);
        pull(cq);
        state.completions().ripen_all(|queue| queue == cq.addr());
        code
    }
}

/// A request of a chain.
trait Chained {
    fn next(&mut self) -> &mut *mut Self;
}

impl Chained for ibv_send_wr {
    fn next(&mut self) -> &mut *mut Self {
        &mut self.next
    }
}

impl Chained for ibv_recv_wr {
    fn next(&mut self) -> &mut *mut Self {
        &mut self.next
    }
}

/// Posts a chain up to the request that is to fail.
unsafe fn post_chain<W: Chained>(
    verb: &'static str,
    first: *mut W,
    bad: *mut *mut W,
    post: impl Fn(*mut W) -> c_int,
) -> c_int {
    // SAFETY: see the top: a chain that ends in null.
    unsafe {
        let mut before: *mut W = std::ptr::null_mut();
        let mut request = first;
        while !request.is_null() {
            if let Some(errno) = state().failure(verb) {
                if !before.is_null() {
                    *(*before).next() = std::ptr::null_mut();
                    let code = post(first);
                    *(*before).next() = request;
                    if code != 0 {
                        return code;
                    }
                }
                *bad = request;
                return errno;
            }
            before = request;
            request = *(*request).next();
        }
    }
    post(first)
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    first: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let post = state().operations((*qp).context.addr()).post_send;
        let post = post.expect("a device that sends");
        post_chain("post_send", first, bad, |first| {
            if !is_losing(qp) {
                return post(qp, first, bad);
            }
            // One by one, as each may be lost.
            let mut request = first;
            while !request.is_null() {
                let mut copy = *request;
                copy.next = std::ptr::null_mut();
                if state().random(100) < state().plan.lose {
                    lose(qp, &mut copy);
                }
                let mut refused = std::ptr::null_mut();
                let code = post(qp, &raw mut copy, &raw mut refused);
                if code != 0 {
                    *bad = request;
                    return code;
                }
                request = (*request).next;
            }
            0
        })
    }
}

unsafe fn is_losing(qp: *mut ibv_qp) -> bool {
    // SAFETY: see the top.
    state().plan.lose > 0 && [IBV_QPT_UC, IBV_QPT_UD].contains(unsafe { &(*qp).qp_type })
}

/// No device gets as far as this queue pair number.
const NOBODY: u32 = 0xff_fffe;

/// Turns a message into one that its receiver does not take.
unsafe fn lose(qp: *mut ibv_qp, request: &mut ibv_send_wr) {
    // SAFETY: see the top; the transport says which field of the union is meant.
    unsafe {
        if (*qp).qp_type == IBV_QPT_UD {
            request.wr.ud.remote_qpn = NOBODY;
        } else if [IBV_WR_SEND, IBV_WR_SEND_WITH_IMM].contains(&request.opcode) {
            // A WRITE of no bytes does nothing.
            request.opcode = IBV_WR_RDMA_WRITE;
            request.num_sge = 0;
            request.wr.rdma.remote_addr = 0;
            request.wr.rdma.rkey = 0;
            let key = ((*qp).qp_num, request.wr_id);
            state().completions().lost.insert(key, IBV_WC_SEND);
        } else {
            return;
        }
        state().note("post_send", format_args!("lost"));
    }
}

unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let post = state().operations((*qp).context.addr()).post_recv;
        let post = post.expect("a device that receives");
        post_chain("post_recv", first, bad, |first| post(qp, first, bad))
    }
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let post = state().operations((*srq).context.addr()).post_srq_recv;
        let post = post.expect("a device that shares receives");
        post_chain("post_srq_recv", first, bad, |first| post(srq, first, bad))
    }
}
