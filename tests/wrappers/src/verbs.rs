//! The verbs that are called by name.

use std::ffi::{c_char, c_int, c_void};

use rdma_core_sys::{
    IBV_QP_STATE, IBV_QPS_ERR, IBV_QPS_RESET, ibv_ah, ibv_ah_attr, ibv_async_event,
    ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_gid, ibv_gid_entry, ibv_mr, ibv_pd,
    ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_srq, ibv_srq_attr, ibv_srq_init_attr,
};
use reverbs::device::Verbs;

use crate::data_path::{settle, wrap_operations};
use crate::state::state;

/// A verb of each kind that answers in a way of its own: with a pointer or null, with 0 or an errno, or not in a way that could fail.
macro_rules! verbs {
    ($($answer:ident $name:ident as $short:block ($($arg:ident : $kind:ty),*) $(-> $result:ty)?
        $(, before $before:block)? $(, after |$made:ident| $after:block)?;)*) => {
        /// The verbs, as a table.
        pub(crate) fn table() -> Verbs {
            Verbs { $($name,)* errno_location: state().below.errno_location }
        }

        $(
            // SAFETY: the name is that of the verb in the libibverbs that the library stands for.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($arg: $kind),*) $(-> $result)? {
                verbs!(@fail $answer $short);
                $($before)?
                // SAFETY: see the top.
                let result = unsafe { (state().below.$name)($($arg),*) };
                verbs!(@note $answer $short result);
                $({
                    let $made = &result;
                    $after
                })?
                result
            }
        )*
    };
    (@fail pointer $short:block) => {
        if let Some(errno) = state().failure($short) {
            state().set_errno(errno);
            return std::ptr::null_mut();
        }
    };
    (@fail code $short:block) => {
        if let Some(errno) = state().failure($short) {
            return errno;
        }
    };
    (@fail plain $short:block) => {};
    (@note pointer $short:block $result:ident) => {
        let outcome = if $result.is_null() { "failed" } else { "ok" };
        state().note($short, format_args!("{outcome}"));
    };
    (@note code $short:block $result:ident) => {
        let outcome = if $result == 0 { "ok" } else { "failed" };
        state().note($short, format_args!("{outcome}"));
    };
    (@note plain $short:block $result:ident) => {};
}

/// Moving a queue pair to the error state is a verb of its own: it stops, all others build.
fn name_of_modify(attr: *const ibv_qp_attr, mask: c_int) -> &'static str {
    // SAFETY: see the top.
    let state = unsafe { (*attr).qp_state };
    match mask as u32 & IBV_QP_STATE != 0 && state == IBV_QPS_ERR {
        true => "stop_qp",
        false => "modify_qp",
    }
}

verbs! {
    plain ibv_get_device_list as {"get_device_list"} (count: *mut c_int) -> *mut *mut ibv_device;
    plain ibv_free_device_list as {"free_device_list"} (list: *mut *mut ibv_device);
    plain ibv_get_device_name as {"get_device_name"} (device: *mut ibv_device) -> *const c_char;
    pointer ibv_open_device as {"open_device"} (device: *mut ibv_device) -> *mut ibv_context, after |made| {
        if !made.is_null() {
            // SAFETY: opened just now.
            unsafe { wrap_operations(*made) };
        }
    };
    code ibv_close_device as {"close_device"} (context: *mut ibv_context) -> c_int, after |_code| {
        state().forget_operations(context.addr());
    };
    plain ibv_get_async_event as {"get_async_event"} (context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
    plain ibv_ack_async_event as {"ack_async_event"} (event: *mut ibv_async_event);
    plain _ibv_query_gid_table as {"query_gid_table"} (context: *mut ibv_context, entries: *mut ibv_gid_entry, room: usize,
        flags: u32, entry_size: usize) -> isize;
    pointer ibv_alloc_pd as {"alloc_pd"} (context: *mut ibv_context) -> *mut ibv_pd;
    code ibv_dealloc_pd as {"dealloc_pd"} (pd: *mut ibv_pd) -> c_int;
    pointer ibv_reg_mr_iova2 as {"reg_mr"} (pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: u32)
        -> *mut ibv_mr;
    code ibv_dereg_mr as {"dereg_mr"} (mr: *mut ibv_mr) -> c_int;
    pointer ibv_create_comp_channel as {"create_comp_channel"} (context: *mut ibv_context) -> *mut ibv_comp_channel;
    code ibv_destroy_comp_channel as {"destroy_comp_channel"} (channel: *mut ibv_comp_channel) -> c_int;
    pointer ibv_create_cq as {"create_cq"} (context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void,
        channel: *mut ibv_comp_channel, vector: c_int) -> *mut ibv_cq;
    code ibv_resize_cq as {"resize_cq"} (cq: *mut ibv_cq, cqe: c_int) -> c_int;
    code ibv_destroy_cq as {"destroy_cq"} (cq: *mut ibv_cq) -> c_int, after |code| {
        if *code == 0 {
            state().completions().forget(cq.addr());
        }
    };
    plain ibv_get_cq_event as {"get_cq_event"} (channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq,
        context: *mut *mut c_void) -> c_int;
    plain ibv_ack_cq_events as {"ack_cq_events"} (cq: *mut ibv_cq, count: u32);
    pointer ibv_create_srq as {"create_srq"} (pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
    code ibv_modify_srq as {"modify_srq"} (srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int;
    code ibv_query_srq as {"query_srq"} (srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int;
    code ibv_destroy_srq as {"destroy_srq"} (srq: *mut ibv_srq) -> c_int;
    pointer ibv_create_qp as {"create_qp"} (pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    code ibv_query_qp as {"query_qp"} (qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int, init: *mut ibv_qp_init_attr)
        -> c_int;
    code ibv_modify_qp as {name_of_modify(attr, mask)} (qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int, before {
        // SAFETY: see the top.
        unsafe {
            if mask as u32 & IBV_QP_STATE != 0 && (*attr).qp_state == IBV_QPS_RESET {
                settle(qp);
            }
        }
    };
    code ibv_destroy_qp as {"destroy_qp"} (qp: *mut ibv_qp) -> c_int, before {
        // SAFETY: see the top.
        unsafe { settle(qp) };
    };
    code ibv_attach_mcast as {"attach_mcast"} (qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    code ibv_detach_mcast as {"detach_mcast"} (qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    pointer ibv_create_ah as {"create_ah"} (pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah;
    code ibv_destroy_ah as {"destroy_ah"} (ah: *mut ibv_ah) -> c_int;
}
