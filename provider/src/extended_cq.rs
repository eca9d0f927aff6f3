//! The functions of extended completion queues, which libibverbs' inline verbs call through the object itself.
//!
//! SAFETY of every block: the application vouches for what the verb of that name demands, and the queue is one of ours.

use std::ffi::{c_int, c_uint};

use rdma_core_sys::{
    IBV_WC_EX_WITH_BYTE_LEN, IBV_WC_EX_WITH_DLID_PATH_BITS, IBV_WC_EX_WITH_IMM,
    IBV_WC_EX_WITH_QP_NUM, IBV_WC_EX_WITH_SL, IBV_WC_EX_WITH_SLID, IBV_WC_EX_WITH_SRC_QP,
    ibv_context, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_poll_cq_attr,
};
use reverbs::virt::completion_queue;

use crate::verbs::{guarded_code, pointer};

/// The operation.
pub(crate) unsafe extern "C" fn create_cq_ex(
    app: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    // SAFETY: see the top.
    pointer(|| unsafe {
        let queue = completion_queue::create_extended(app, &*attr)?;
        set_functions(&mut *queue, (*attr).wc_flags);
        Ok(queue)
    })
}

/// A field that was not asked for has no reader.
fn set_functions(queue: &mut ibv_cq_ex, wc_flags: u64) {
    let asked = |field: u32| wc_flags & u64::from(field) != 0;
    queue.start_poll = Some(start_poll);
    queue.next_poll = Some(next_poll);
    queue.end_poll = Some(end_poll);
    queue.read_opcode = Some(read_opcode);
    queue.read_vendor_err = Some(read_vendor_err);
    queue.read_wc_flags = Some(read_wc_flags);
    queue.read_byte_len = asked(IBV_WC_EX_WITH_BYTE_LEN).then_some(read_byte_len);
    queue.read_imm_data = asked(IBV_WC_EX_WITH_IMM).then_some(read_imm_data);
    queue.read_qp_num = asked(IBV_WC_EX_WITH_QP_NUM).then_some(read_qp_num);
    queue.read_src_qp = asked(IBV_WC_EX_WITH_SRC_QP).then_some(read_src_qp);
    queue.read_slid = asked(IBV_WC_EX_WITH_SLID).then_some(read_slid);
    queue.read_sl = asked(IBV_WC_EX_WITH_SL).then_some(read_sl);
    queue.read_dlid_path_bits = asked(IBV_WC_EX_WITH_DLID_PATH_BITS).then_some(read_dlid_path_bits);
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

macro_rules! readers {
    ($($name:ident($completion:ident) -> $kind:ty $value:block)*) => {
        $(unsafe extern "C" fn $name(cq: *mut ibv_cq_ex) -> $kind {
            // SAFETY: see the top; the union's field is plain bytes either way.
            unsafe {
                let $completion = completion_queue::current(cq);
                $value
            }
        })*
    };
}

readers! {
    read_opcode(completion) -> c_uint { completion.opcode }
    read_vendor_err(completion) -> u32 { completion.vendor_err }
    read_byte_len(completion) -> u32 { completion.byte_len }
    read_imm_data(completion) -> u32 { completion.__bindgen_anon_1.imm_data }
    read_qp_num(completion) -> u32 { completion.qp_num }
    read_src_qp(completion) -> u32 { completion.src_qp }
    read_wc_flags(completion) -> c_uint { completion.wc_flags }
    read_slid(completion) -> u32 { u32::from(completion.slid) }
    read_sl(completion) -> u8 { completion.sl }
    read_dlid_path_bits(completion) -> u8 { completion.dlid_path_bits }
}
