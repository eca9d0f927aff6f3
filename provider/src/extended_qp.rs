//! The functions of extended queue pairs, which libibverbs' inline verbs (`ibv_wr_*`) call through the object itself.
//!
//! SAFETY of every block: the application vouches for what the verb of that name demands, and the queue pair is one of ours.

use std::ffi::{c_int, c_void};

use rdma_core_sys::{
    IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP, IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD, IBV_QP_EX_WITH_BIND_MW,
    IBV_QP_EX_WITH_LOCAL_INV, IBV_QP_EX_WITH_RDMA_READ, IBV_QP_EX_WITH_RDMA_WRITE,
    IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM, IBV_QP_EX_WITH_SEND, IBV_QP_EX_WITH_SEND_WITH_IMM,
    IBV_QP_EX_WITH_SEND_WITH_INV, IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, IBV_WR_ATOMIC_CMP_AND_SWP,
    IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE,
    IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, IBV_WR_SEND_WITH_INV, ibv_ah,
    ibv_context, ibv_data_buf, ibv_mw, ibv_mw_bind_info, ibv_qp, ibv_qp_ex, ibv_qp_init_attr_ex,
    ibv_send_wr, ibv_send_wr__bindgen_ty_4__bindgen_ty_1 as BindRequest, ibv_sge,
};
use reverbs::virt::queue_pair::{self, builder};

use crate::register;
use crate::verbs::{guarded_code, pointer};

/// `VERBS_QP_EX` of driver.h: `ibv_qp_to_qp_ex` gives the object.
const VERBS_QP_EX: u32 = 2;

/// The operation.
pub(crate) unsafe extern "C" fn create_qp_ex(
    _: *mut ibv_context,
    init: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    // SAFETY: see the top. Our object has room for the private type of every release.
    pointer(|| unsafe {
        let made = queue_pair::create_extended(&mut *init)?;
        if (*init).comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS != 0 {
            set_functions(made.cast(), (*init).send_ops_flags);
            let mask = made.byte_add(register::layout().verbs_qp_comp_mask_offset);
            *mask.cast::<u32>() |= VERBS_QP_EX;
        }
        Ok(made)
    })
}

/// An operation that was not asked for has no function. By field, as the structure is shorter in older releases.
unsafe fn set_functions(pair: *mut ibv_qp_ex, send_ops: u64) {
    let asked = |operation: u32| send_ops & u64::from(operation) != 0;
    // SAFETY: see the top.
    unsafe {
        (*pair).wr_start = Some(wr_start);
        (*pair).wr_complete = Some(wr_complete);
        (*pair).wr_abort = Some(wr_abort);
        (*pair).wr_set_sge = Some(wr_set_sge);
        (*pair).wr_set_sge_list = Some(wr_set_sge_list);
        (*pair).wr_set_inline_data = Some(wr_set_inline_data);
        (*pair).wr_set_inline_data_list = Some(wr_set_inline_data_list);
        (*pair).wr_set_ud_addr = Some(wr_set_ud_addr);
        (*pair).wr_send = asked(IBV_QP_EX_WITH_SEND).then_some(wr_send);
        (*pair).wr_send_imm = asked(IBV_QP_EX_WITH_SEND_WITH_IMM).then_some(wr_send_imm);
        (*pair).wr_rdma_write = asked(IBV_QP_EX_WITH_RDMA_WRITE).then_some(wr_rdma_write);
        (*pair).wr_rdma_write_imm =
            asked(IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM).then_some(wr_rdma_write_imm);
        (*pair).wr_rdma_read = asked(IBV_QP_EX_WITH_RDMA_READ).then_some(wr_rdma_read);
        (*pair).wr_atomic_cmp_swp =
            asked(IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP).then_some(wr_atomic_cmp_swp);
        (*pair).wr_atomic_fetch_add =
            asked(IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD).then_some(wr_atomic_fetch_add);
        (*pair).wr_bind_mw = asked(IBV_QP_EX_WITH_BIND_MW).then_some(wr_bind_mw);
        (*pair).wr_local_inv = asked(IBV_QP_EX_WITH_LOCAL_INV).then_some(wr_local_inv);
        (*pair).wr_send_inv = asked(IBV_QP_EX_WITH_SEND_WITH_INV).then_some(wr_send_inv);
    }
}

/// A function that answers nothing: after a panic the batch is as it was, and complete finds it so.
macro_rules! functions {
    ($($name:ident($qp:ident $(, $arg:ident : $kind:ty)*) $body:expr;)*) => {
        $(unsafe extern "C" fn $name($qp: *mut ibv_qp_ex $(, $arg: $kind)*) {
            // SAFETY: see the top.
            guarded_code(|| unsafe { $body; 0 }, 0);
        })*
    };
}

functions! {
    wr_start(qp) builder::start(qp);
    wr_abort(qp) builder::abort(qp);
    wr_send(qp) builder::begin(qp, IBV_WR_SEND, |_| {});
    wr_send_imm(qp, imm: u32) builder::begin(qp, IBV_WR_SEND_WITH_IMM, |wr| wr.__bindgen_anon_1.imm_data = imm);
    wr_rdma_write(qp, rkey: u32, addr: u64) builder::begin(qp, IBV_WR_RDMA_WRITE, |wr| rdma(wr, rkey, addr));
    wr_rdma_write_imm(qp, rkey: u32, addr: u64, imm: u32) builder::begin(qp, IBV_WR_RDMA_WRITE_WITH_IMM, |wr| {
        wr.__bindgen_anon_1.imm_data = imm;
        rdma(wr, rkey, addr);
    });
    wr_rdma_read(qp, rkey: u32, addr: u64) builder::begin(qp, IBV_WR_RDMA_READ, |wr| rdma(wr, rkey, addr));
    wr_atomic_cmp_swp(qp, rkey: u32, addr: u64, compare: u64, swap: u64)
        builder::begin(qp, IBV_WR_ATOMIC_CMP_AND_SWP, |wr| atomic(wr, rkey, addr, compare, swap));
    wr_atomic_fetch_add(qp, rkey: u32, addr: u64, add: u64)
        builder::begin(qp, IBV_WR_ATOMIC_FETCH_AND_ADD, |wr| atomic(wr, rkey, addr, add, 0));
    wr_bind_mw(qp, mw: *mut ibv_mw, rkey: u32, info: *const ibv_mw_bind_info)
        builder::bind(qp, &BindRequest { mw, rkey, bind_info: *info });
    wr_local_inv(qp, rkey: u32)
        builder::begin(qp, IBV_WR_LOCAL_INV, |wr| wr.__bindgen_anon_1.invalidate_rkey = rkey);
    wr_send_inv(qp, rkey: u32)
        builder::begin(qp, IBV_WR_SEND_WITH_INV, |wr| wr.__bindgen_anon_1.invalidate_rkey = rkey);
    wr_set_ud_addr(qp, ah: *mut ibv_ah, remote_qpn: u32, remote_qkey: u32)
        builder::set_address(qp, ah, remote_qpn, remote_qkey);
    wr_set_sge(qp, lkey: u32, addr: u64, length: u32)
        builder::set_elements(qp, &ibv_sge { addr, length, lkey }, 1);
    wr_set_sge_list(qp, count: usize, list: *const ibv_sge) builder::set_elements(qp, list, count);
    wr_set_inline_data(qp, addr: *mut c_void, length: usize)
        builder::set_inline(qp, &[ibv_data_buf { addr, length }]);
    wr_set_inline_data_list(qp, count: usize, list: *const ibv_data_buf)
        builder::set_inline(qp, match count {
            // The list may be null then.
            0 => &[],
            _ => std::slice::from_raw_parts(list, count),
        });
}

unsafe extern "C" fn wr_complete(qp: *mut ibv_qp_ex) -> c_int {
    // SAFETY: see the top.
    guarded_code(|| unsafe { builder::complete(qp) }, libc::EIO)
}

#[inline(always)]
fn rdma(wr: &mut ibv_send_wr, rkey: u32, remote_addr: u64) {
    wr.wr.rdma.remote_addr = remote_addr;
    wr.wr.rdma.rkey = rkey;
}

#[inline(always)]
fn atomic(wr: &mut ibv_send_wr, rkey: u32, remote_addr: u64, compare_add: u64, swap: u64) {
    wr.wr.atomic.remote_addr = remote_addr;
    wr.wr.atomic.compare_add = compare_add;
    wr.wr.atomic.swap = swap;
    wr.wr.atomic.rkey = rkey;
}
