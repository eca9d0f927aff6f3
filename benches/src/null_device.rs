//! A device that does nothing: what is posted comes back as a successful completion at the next poll.
//!
//! Its numbers (queue pairs, keys) are never used twice in a process, so that fresh hardware always has others. It is only
//! ever called through function pointers, as real hardware is, so nothing of it is compiled into its callers.
//!
//! Callers keep the rules of the verbs (objects come from here and are used by one thread at a time): that is the SAFETY
//! argument of every block below that has no other.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::IntoRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rdma_core_sys::{
    IBV_GID_TYPE_ROCE_V2, IBV_LINK_LAYER_ETHERNET, IBV_MTU_1024, IBV_MTU_4096, IBV_PORT_ACTIVE,
    IBV_QP_RQ_PSN, IBV_QP_STATE, IBV_SEND_SIGNALED, IBV_WC_RECV, IBV_WC_SEND, IBV_WC_SUCCESS,
    ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex,
    ibv_device, ibv_gid, ibv_gid_entry, ibv_mr, ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr,
    ibv_qp_init_attr, ibv_qp_init_attr_ex, ibv_recv_wr, ibv_send_wr, ibv_srq, ibv_srq_attr,
    ibv_srq_init_attr, ibv_wc, verbs_context,
};
use reverbs::device::Verbs;

/// The one device there is.
pub const NAME: &CStr = c"null0";
/// The GID of its one port.
pub const GID: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// Completions a queue can hold; a power of two.
const ROOM: usize = 4096;

static DEVICE: AtomicU32 = AtomicU32::new(0);
static NEXT_NUMBER: AtomicU32 = AtomicU32::new(0x100);

/// The device's verbs.
///
/// # Panics
/// The table has a verb that [`resolve`] does not know and whose name cannot be stood in for; never, as all can.
#[must_use]
pub fn verbs() -> &'static Verbs {
    static VERBS: OnceLock<Verbs> = OnceLock::new();
    VERBS.get_or_init(|| {
        // SAFETY: names resolve to functions with the signatures of verbs.h; one that is only stood in for never returns.
        unsafe { Verbs::load(|name| Some(resolve(name)), libc::__errno_location) }
            .expect("every name resolves")
    })
}

/// The function behind a verb's name. Another device may take from here what it does not do in its own way.
#[must_use]
pub fn resolve(name: &CStr) -> *mut c_void {
    let known: *const c_void = match name.to_bytes() {
        b"ibv_get_device_list" => get_device_list as *const c_void,
        b"ibv_free_device_list" => free_device_list as *const c_void,
        b"ibv_get_device_name" => get_device_name as *const c_void,
        b"ibv_open_device" => open_device as *const c_void,
        b"ibv_close_device" => close_device as *const c_void,
        b"_ibv_query_gid_table" => query_gid_table as *const c_void,
        b"ibv_get_async_event" => get_async_event as *const c_void,
        b"ibv_alloc_pd" => alloc_pd as *const c_void,
        b"ibv_dealloc_pd" => dealloc_pd as *const c_void,
        b"ibv_reg_mr_iova2" => reg_mr as *const c_void,
        b"ibv_dereg_mr" => dereg_mr as *const c_void,
        b"ibv_create_cq" => create_cq as *const c_void,
        b"ibv_destroy_cq" => destroy_cq as *const c_void,
        b"ibv_create_srq" => create_srq as *const c_void,
        b"ibv_query_srq" => query_srq as *const c_void,
        b"ibv_destroy_srq" => destroy_srq as *const c_void,
        b"ibv_create_qp" => create_qp as *const c_void,
        b"ibv_query_qp" => query_qp as *const c_void,
        b"ibv_modify_qp" => modify_qp as *const c_void,
        b"ibv_destroy_qp" => destroy_qp as *const c_void,
        _ => not_there as *const c_void,
    };
    known.cast_mut()
}

/// A verb that nothing here calls.
extern "C" fn not_there() -> ! {
    panic!("the null device was asked for a verb that it does not have")
}

fn number() -> u32 {
    NEXT_NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// All zeroes is what calloc gives a C provider for its objects.
fn zeroed<T>() -> T {
    // SAFETY: only used for C structures of numbers, pointers and optional functions.
    unsafe { std::mem::zeroed() }
}

extern "C" fn get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let list = Box::new([DEVICE.as_ptr().cast::<ibv_device>(), std::ptr::null_mut()]);
    // SAFETY: see the top.
    unsafe { *count = 1 };
    Box::into_raw(list).cast()
}

extern "C" fn free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: made by `get_device_list`.
    drop(unsafe { Box::from_raw(list.cast::<[*mut ibv_device; 2]>()) });
}

extern "C" fn get_device_name(_: *mut ibv_device) -> *const c_char {
    NAME.as_ptr()
}

/// Opens the device: a context whose operations may be replaced.
///
/// # Panics
/// There is no `/dev/null`.
pub extern "C" fn open_device(_: *mut ibv_device) -> *mut ibv_context {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .expect("/dev/null");
    let mut context: Box<verbs_context> = Box::new(zeroed());
    context.sz = size_of::<verbs_context>();
    context.query_port = Some(query_port);
    context.create_cq_ex = Some(create_cq_ex);
    context.create_qp_ex = Some(create_qp_ex);
    context.context.cmd_fd = null.into_raw_fd();
    // SAFETY: makes a descriptor. Nothing ever happens, so it is never readable.
    context.context.async_fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    context.context.num_comp_vectors = 1;
    let ops = &mut context.context.ops;
    ops.poll_cq = Some(poll_cq);
    ops.post_send = Some(post_send);
    ops.post_recv = Some(post_recv);
    ops.post_srq_recv = Some(post_srq_recv);
    ops.req_notify_cq = Some(req_notify_cq);
    &raw mut Box::leak(context).context
}

extern "C" fn close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: made by `open_device`; the context is the last field of what was allocated.
    unsafe {
        libc::close((*context).cmd_fd);
        libc::close((*context).async_fd);
        drop(Box::from_raw(reverbs::device::extended(context)));
    }
    0
}

unsafe extern "C" fn query_port(
    _: *mut ibv_context,
    _: u8,
    attr: *mut ibv_port_attr,
    _: usize,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        *attr = ibv_port_attr {
            state: IBV_PORT_ACTIVE,
            max_mtu: IBV_MTU_4096,
            active_mtu: IBV_MTU_1024,
            gid_tbl_len: 1,
            pkey_tbl_len: 1,
            link_layer: IBV_LINK_LAYER_ETHERNET as u8,
            ..zeroed()
        };
    }
    0
}

extern "C" fn query_gid_table(
    _: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    room: usize,
    _: u32,
    _: usize,
) -> isize {
    assert!(room > 0, "room for the one entry");
    // SAFETY: see the top.
    unsafe {
        *entries = ibv_gid_entry {
            gid: ibv_gid { raw: GID },
            gid_index: 0,
            port_num: 1,
            gid_type: IBV_GID_TYPE_ROCE_V2,
            ndev_ifindex: 0,
        };
    }
    1
}

/// No event ever happens.
extern "C" fn get_async_event(_: *mut ibv_context, _: *mut ibv_async_event) -> c_int {
    -1
}

extern "C" fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    Box::into_raw(Box::new(ibv_pd { context, handle: 0 }))
}

extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: made by `alloc_pd`.
    drop(unsafe { Box::from_raw(pd) });
    0
}

extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    _: u64,
    _: u32,
) -> *mut ibv_mr {
    Box::into_raw(Box::new(ibv_mr {
        // SAFETY: see the top.
        context: unsafe { (*pd).context },
        pd,
        addr,
        length,
        handle: 0,
        lkey: number(),
        rkey: number(),
    }))
}

extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: made by `reg_mr`.
    drop(unsafe { Box::from_raw(mr) });
    0
}

/// A completion queue: a ring of what was posted.
#[repr(C)]
struct Completions {
    public: ibv_cq,
    posted: usize,
    polled: usize,
    ring: [Completion; ROOM],
}

#[derive(Clone, Copy)]
struct Completion {
    wr_id: u64,
    qp_num: u32,
    opcode: u32,
}

impl Completions {
    #[inline(always)]
    fn push(&mut self, completion: Completion) -> bool {
        if self.posted - self.polled == ROOM {
            return false;
        }
        self.ring[self.posted % ROOM] = completion;
        self.posted += 1;
        true
    }
}

extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    _: c_int,
) -> *mut ibv_cq {
    let public = ibv_cq {
        context,
        channel,
        cq_context,
        cqe,
        ..zeroed()
    };
    let completions = Completions {
        public,
        ..zeroed::<Completions>()
    };
    Box::into_raw(Box::new(completions)).cast()
}

/// As any other: what an extended queue has besides is never asked for below the virtual device.
unsafe extern "C" fn create_cq_ex(
    context: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    // SAFETY: see the top.
    let attr = unsafe { &*attr };
    let cqe = attr.cqe.cast_signed();
    create_cq(context, cqe, attr.cq_context, attr.channel, 0).cast()
}

extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: made by `create_cq`.
    drop(unsafe { Box::from_raw(cq.cast::<Completions>()) });
    0
}

unsafe extern "C" fn req_notify_cq(_: *mut ibv_cq, _: c_int) -> c_int {
    0
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, count: c_int, completions: *mut ibv_wc) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let queue = &mut *cq.cast::<Completions>();
        let give = (queue.posted - queue.polled).min(count as usize);
        for index in 0..give {
            let completion = queue.ring[queue.polled % ROOM];
            queue.polled += 1;
            let to = &mut *completions.add(index);
            to.wr_id = completion.wr_id;
            to.status = IBV_WC_SUCCESS;
            to.opcode = completion.opcode;
            to.qp_num = completion.qp_num;
            to.src_qp = 0;
            to.wc_flags = 0;
        }
        give as c_int
    }
}

/// A queue pair, and what it was told.
#[repr(C)]
struct Pair {
    public: ibv_qp,
    attr: ibv_qp_attr,
}

extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: see the top.
    let (context, init) = unsafe { ((*pd).context, &*init) };
    let public = ibv_qp {
        context,
        qp_context: init.qp_context,
        pd,
        send_cq: init.send_cq,
        recv_cq: init.recv_cq,
        srq: init.srq,
        qp_num: number(),
        qp_type: init.qp_type,
        ..zeroed()
    };
    // SAFETY: null or made by `create_srq`.
    if let Some(shared) = unsafe { init.srq.cast::<SharedQueue>().as_mut() } {
        (shared.cq, shared.qp_num) = (init.recv_cq, public.qp_num);
    }
    let pair = Pair {
        public,
        attr: zeroed(),
    };
    Box::into_raw(Box::new(pair)).cast()
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
        *attr = (*qp.cast::<Pair>()).attr;
        *init = zeroed();
    }
    0
}

extern "C" fn modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let known = &mut (*qp.cast::<Pair>()).attr;
        if mask as u32 & IBV_QP_STATE != 0 {
            known.qp_state = (*attr).qp_state;
        }
        if mask as u32 & IBV_QP_RQ_PSN != 0 {
            known.rq_psn = (*attr).rq_psn;
        }
    }
    0
}

extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: made by `create_qp`.
    drop(unsafe { Box::from_raw(qp.cast::<Pair>()) });
    0
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    first: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        // Seen from a queue pair that sends to itself, the responder has come as far.
        (*qp.cast::<Pair>()).attr.rq_psn += 1;
        let queue = &mut *(*qp).send_cq.cast::<Completions>();
        let mut request = first;
        while !request.is_null() {
            let completion = Completion {
                wr_id: (*request).wr_id,
                qp_num: (*qp).qp_num,
                opcode: IBV_WC_SEND,
            };
            if (*request).send_flags & IBV_SEND_SIGNALED != 0 && !queue.push(completion) {
                *bad = request;
                return libc::ENOMEM;
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
    unsafe { receive((*qp).recv_cq, (*qp).qp_num, first, bad) }
}

#[inline(always)]
unsafe fn receive(
    cq: *mut ibv_cq,
    qp_num: u32,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let queue = &mut *cq.cast::<Completions>();
        let mut request = first;
        while !request.is_null() {
            let completion = Completion {
                wr_id: (*request).wr_id,
                qp_num,
                opcode: IBV_WC_RECV,
            };
            if !queue.push(completion) {
                *bad = request;
                return libc::ENOMEM;
            }
            request = (*request).next;
        }
    }
    0
}

/// A shared receive queue; what it receives completes at the queue pair that was made for it last.
#[repr(C)]
struct SharedQueue {
    public: ibv_srq,
    attr: ibv_srq_attr,
    cq: *mut ibv_cq,
    qp_num: u32,
}

extern "C" fn create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: see the top.
    let (context, init) = unsafe { ((*pd).context, &*init) };
    let public = ibv_srq {
        context,
        srq_context: init.srq_context,
        pd,
        ..zeroed()
    };
    let queue = SharedQueue {
        public,
        attr: init.attr,
        cq: std::ptr::null_mut(),
        qp_num: 0,
    };
    Box::into_raw(Box::new(queue)).cast()
}

extern "C" fn query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    // SAFETY: see the top.
    unsafe { *attr = (*srq.cast::<SharedQueue>()).attr };
    0
}

extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: made by `create_srq`.
    drop(unsafe { Box::from_raw(srq.cast::<SharedQueue>()) });
    0
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see the top.
    unsafe {
        let queue = &*srq.cast::<SharedQueue>();
        receive(queue.cq, queue.qp_num, first, bad)
    }
}
