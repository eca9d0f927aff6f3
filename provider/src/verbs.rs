//! The operations: C in, C out. Each hands its arguments to the virtual device and turns the answer into what libibverbs
//! expects. No panic passes.

use std::ffi::{CStr, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use rdma_core_sys::{
    ibv_ah, ibv_ah_attr, ibv_comp_channel, ibv_context, ibv_cq, ibv_device_attr_ex, ibv_gid,
    ibv_mr, ibv_mw, ibv_mw_bind, ibv_mw_type, ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr,
    ibv_qp_init_attr, ibv_query_device_ex_input, ibv_recv_wr, ibv_send_wr, ibv_srq, ibv_srq_attr,
    ibv_srq_init_attr, ibv_wc,
};
use reverbs::errno::{Errno, Verb};
use reverbs::virt::{
    address_handle, completion_queue, context, memory_region, memory_window, protection_domain,
    queue_pair, shared_receive_queue,
};

use crate::{extended_cq, extended_qp, native, register};

/// What is announced to libibverbs, by slot name. A slot that is not here answers EOPNOTSUPP.
pub(crate) const OPS: &[(&str, *const c_void)] = &[
    ("alloc_mw", alloc_mw as *const c_void),
    ("alloc_pd", alloc_pd as *const c_void),
    ("attach_mcast", attach_mcast as *const c_void),
    ("bind_mw", bind_mw as *const c_void),
    ("create_ah", create_ah as *const c_void),
    ("create_cq", create_cq as *const c_void),
    ("create_cq_ex", extended_cq::create_cq_ex as *const c_void),
    ("create_qp", create_qp as *const c_void),
    ("create_qp_ex", extended_qp::create_qp_ex as *const c_void),
    ("create_srq", create_srq as *const c_void),
    ("dealloc_mw", dealloc_mw as *const c_void),
    ("dealloc_pd", dealloc_pd as *const c_void),
    ("dereg_mr", dereg_mr as *const c_void),
    ("destroy_ah", destroy_ah as *const c_void),
    ("destroy_cq", destroy_cq as *const c_void),
    ("destroy_qp", destroy_qp as *const c_void),
    ("destroy_srq", destroy_srq as *const c_void),
    ("detach_mcast", detach_mcast as *const c_void),
    ("free_context", free_context as *const c_void),
    ("modify_qp", modify_qp as *const c_void),
    ("modify_srq", modify_srq as *const c_void),
    ("poll_cq", poll_cq as *const c_void),
    ("post_recv", post_recv as *const c_void),
    ("post_send", post_send as *const c_void),
    ("post_srq_recv", post_srq_recv as *const c_void),
    ("query_device_ex", query_device_ex as *const c_void),
    ("query_port", query_port as *const c_void),
    ("query_qp", query_qp as *const c_void),
    ("query_srq", query_srq as *const c_void),
    ("reg_mr", reg_mr as *const c_void),
    ("req_notify_cq", req_notify_cq as *const c_void),
    ("resize_cq", resize_cq as *const c_void),
];

/// Called while libibverbs opens a device, once the operations are set.
///
/// # Errors
/// An errno; the context is then not opened.
pub(crate) fn opened(app: *mut ibv_context, device_name: &CStr) -> Result<(), c_int> {
    let verbs = native::verbs().map_err(|what| {
        tracing::error!(device = %device_name.to_string_lossy(), what, "cannot open");
        libc::ENODEV
    })?;
    crate::fork::watch();
    crate::journal::start();
    reverbs::agent::set_rdma_core(register::release_name());
    // SAFETY: libibverbs is opening this context.
    unsafe {
        let opened =
            context::open(app, device_name, verbs, lead_queries).map_err(|error| error.0)?;
        (*app).async_fd = opened.async_fd;
        (*app).num_comp_vectors = opened.completion_vectors;
    }
    Ok(())
}

/// libibverbs asks the kernel for GIDs by ioctl, and remembers for the context if there are no ioctls; from then on it
/// reads the folder whose path is in the device (docs/identity.md).
unsafe fn lead_queries(app: *mut ibv_context, tree: &Path) -> Verb<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = tree.as_os_str().as_bytes();
    if path.len() >= register::IBDEV_PATH_SIZE {
        return Err(Errno(libc::ENAMETOOLONG));
    }
    // SAFETY: the context is open; the array has room for the path and its zero, which is written first behind it, so that a
    // reader never runs over the end.
    unsafe {
        let to = register::sysfs_facts(app).ibdev_path.cast::<u8>();
        to.add(path.len()).write(0);
        to.copy_from_nonoverlapping(path.as_ptr(), path.len());
    }
    // SAFETY: libibverbs is loaded, it called us; the verb writes one GID.
    unsafe {
        let found = register::public_function(c"ibv_query_gid").ok_or(Errno::NOT_SUPPORTED)?;
        type QueryGid =
            unsafe extern "C" fn(*mut ibv_context, u8, c_int, *mut rdma_core_sys::ibv_gid) -> c_int;
        let query = std::mem::transmute::<*const c_void, QueryGid>(found);
        let mut gid: rdma_core_sys::ibv_gid = std::mem::zeroed();
        // The answer does not matter: the command file is /dev/null now, which knows no ioctl.
        query(app, 1, 0, &raw mut gid);
    }
    Ok(())
}

/// A verb that answers a pointer, or null and `errno`.
pub(crate) fn pointer<T>(verb: impl FnOnce() -> Verb<*mut T>) -> *mut T {
    match guarded(verb) {
        Ok(object) => object,
        Err(error) => {
            // SAFETY: this thread's errno.
            unsafe { *libc::__errno_location() = error.0 };
            std::ptr::null_mut()
        }
    }
}

/// A verb that answers 0 or an errno. Some of the older ones are also read through `errno` by their callers.
fn code(verb: impl FnOnce() -> Verb<()>) -> c_int {
    match guarded(verb) {
        Ok(()) => 0,
        Err(error) => {
            // SAFETY: this thread's errno.
            unsafe { *libc::__errno_location() = error.0 };
            error.0
        }
    }
}

fn guarded<T>(verb: impl FnOnce() -> Verb<T>) -> Verb<T> {
    catch_unwind(AssertUnwindSafe(verb)).unwrap_or_else(|_| {
        tracing::error!("a defect in reverbs; the verb fails with EIO");
        Err(Errno::IO)
    })
}

/// The data path: as [`guarded`], with nothing on the good way.
#[inline(always)]
pub(crate) fn guarded_code(verb: impl FnOnce() -> c_int, on_panic: c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(verb)).unwrap_or(on_panic)
}

// Below: for every function, libibverbs vouches for what the verb of that name demands of its arguments, and objects are
// those that we handed out. That is the SAFETY argument of each block.

unsafe extern "C" fn free_context(app: *mut ibv_context) {
    // SAFETY: see above.
    code(|| unsafe {
        let closed = context::close(app);
        register::uninit_context(app);
        closed
    });
}

unsafe extern "C" fn query_device_ex(
    app: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { context::query_device(app, input, attr, size) })
}

unsafe extern "C" fn query_port(
    app: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { context::query_port(app, port, attr) })
}

unsafe extern "C" fn alloc_pd(app: *mut ibv_context) -> *mut ibv_pd {
    pointer(|| protection_domain::alloc(app))
}

unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { protection_domain::dealloc(pd) })
}

unsafe extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: see above.
    pointer(|| unsafe { memory_region::register(pd, addr, length, iova, access) })
}

unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { memory_region::deregister(mr) })
}

unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, kind: ibv_mw_type) -> *mut ibv_mw {
    // SAFETY: see above.
    pointer(|| unsafe { memory_window::alloc(pd, kind) })
}

unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { memory_window::dealloc(mw) })
}

unsafe extern "C" fn bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { memory_window::bind(qp, mw, &*bind) })
}

unsafe extern "C" fn create_cq(
    app: *mut ibv_context,
    cqe: c_int,
    channel: *mut ibv_comp_channel,
    vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: see above.
    pointer(|| unsafe { completion_queue::create(app, cqe, channel, vector) })
}

unsafe extern "C" fn resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { completion_queue::resize(cq, cqe) })
}

unsafe extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { completion_queue::destroy(cq) })
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: see above.
    guarded_code(
        || unsafe { completion_queue::request_notification(cq, solicited_only) },
        libc::EIO,
    )
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, count: c_int, completions: *mut ibv_wc) -> c_int {
    // SAFETY: see above.
    guarded_code(
        || unsafe { completion_queue::poll(cq, count, completions) },
        -libc::EIO,
    )
}

unsafe extern "C" fn create_srq(pd: *mut ibv_pd, init: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    // SAFETY: see above.
    pointer(|| unsafe { shared_receive_queue::create(pd, init) })
}

unsafe extern "C" fn modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { shared_receive_queue::modify(srq, attr, mask) })
}

unsafe extern "C" fn query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { shared_receive_queue::query(srq, attr) })
}

unsafe extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { shared_receive_queue::destroy(srq) })
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: see above.
    guarded_code(
        || unsafe { shared_receive_queue::post(srq, request, bad) },
        libc::EIO,
    )
}

unsafe extern "C" fn create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: see above.
    pointer(|| unsafe { queue_pair::create(pd, init) })
}

unsafe extern "C" fn modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { queue_pair::modify(qp, attr, mask) })
}

unsafe extern "C" fn query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { queue_pair::query(qp, attr, mask, init) })
}

unsafe extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { queue_pair::destroy(qp) })
}

unsafe extern "C" fn attach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { queue_pair::attach(qp, gid, lid) })
}

unsafe extern "C" fn detach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { queue_pair::detach(qp, gid, lid) })
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: see above.
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
    // SAFETY: see above.
    guarded_code(
        || unsafe { queue_pair::post_receive(qp, request, bad) },
        libc::EIO,
    )
}

unsafe extern "C" fn create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    // SAFETY: see above.
    pointer(|| unsafe { address_handle::create(pd, attr) })
}

unsafe extern "C" fn destroy_ah(ah: *mut ibv_ah) -> c_int {
    // SAFETY: see above.
    code(|| unsafe { address_handle::destroy(ah) })
}
