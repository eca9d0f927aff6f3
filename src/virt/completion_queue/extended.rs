//! Extended completion queues (`ibv_create_cq_ex`): completions are looked at one by one, between start and end.
//!
//! Each is taken as by a poll of one, and kept where the readers find it. docs/verbs.md, "Extended completion queues", says why.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};

use rdma_core_sys::{
    IBV_CQ_INIT_ATTR_MASK_FLAGS, IBV_WC_EX_WITH_BYTE_LEN, IBV_WC_EX_WITH_DLID_PATH_BITS,
    IBV_WC_EX_WITH_IMM, IBV_WC_EX_WITH_QP_NUM, IBV_WC_EX_WITH_SL, IBV_WC_EX_WITH_SLID,
    IBV_WC_EX_WITH_SRC_QP, ibv_comp_channel, ibv_context, ibv_cq_ex, ibv_cq_init_attr_ex,
    ibv_poll_cq_attr, ibv_wc,
};

use super::{CompletionQueue, make, poll};
use crate::errno::{Errno, Verb};
use crate::virt::lock::QueueLock;

/// What an `ibv_wc` has, and with it what is held back for the application.
const FIELDS: u32 = IBV_WC_EX_WITH_BYTE_LEN
    | IBV_WC_EX_WITH_IMM
    | IBV_WC_EX_WITH_QP_NUM
    | IBV_WC_EX_WITH_SRC_QP
    | IBV_WC_EX_WITH_SLID
    | IBV_WC_EX_WITH_SL
    | IBV_WC_EX_WITH_DLID_PATH_BITS;

/// What an extended queue has besides.
pub(super) struct Extended {
    wc_flags: u64,
    comp_mask: u32,
    flags: u32,
    /// Held from a start that found something to its end. The lock of the queue is not: the application runs in between, and
    /// may ask for a notification, or be stopped while the agent closes the queue.
    polling: QueueLock,
    /// The completion that is being looked at. Touched under `polling` only.
    current: UnsafeCell<ibv_wc>,
}

impl std::fmt::Debug for Extended {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Extended")
            .field("wc_flags", &self.wc_flags)
            .finish_non_exhaustive()
    }
}

impl Extended {
    /// How to make the hardware's queue.
    pub(super) fn attributes(
        &self,
        capacity: c_int,
        cq_context: *mut c_void,
        channel: *mut ibv_comp_channel,
        vector: c_int,
    ) -> ibv_cq_init_attr_ex {
        ibv_cq_init_attr_ex {
            cqe: capacity.cast_unsigned(),
            cq_context,
            channel,
            comp_vector: vector.cast_unsigned(),
            wc_flags: self.wc_flags,
            comp_mask: self.comp_mask,
            flags: self.flags,
            parent_domain: std::ptr::null_mut(),
        }
    }
}

/// `ibv_create_cq_ex`. The functions of the object are left to the caller.
///
/// # Safety
/// As `ibv_create_cq_ex` demands.
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` for fields that an `ibv_wc` does not have, and for parent domains.
pub unsafe fn create_extended(
    app: *mut ibv_context,
    attr: &ibv_cq_init_attr_ex,
) -> Verb<*mut ibv_cq_ex> {
    let known_fields = attr.wc_flags & !u64::from(FIELDS) == 0;
    if !known_fields || attr.comp_mask & !IBV_CQ_INIT_ATTR_MASK_FLAGS != 0 {
        return Err(Errno::NOT_SUPPORTED);
    }
    let extended = Extended {
        wc_flags: attr.wc_flags,
        comp_mask: attr.comp_mask,
        flags: attr.flags,
        polling: QueueLock::default(),
        // SAFETY: zero is a valid completion.
        current: UnsafeCell::new(unsafe { std::mem::zeroed() }),
    };
    // SAFETY: as the caller vouches. An extended queue begins as a queue does.
    unsafe {
        let queue = make(
            app,
            attr.cqe.cast_signed(),
            attr.channel,
            attr.comp_vector.cast_signed(),
            Some(extended),
        )?;
        Ok(queue.cast())
    }
}

/// `ibv_start_poll`.
///
/// # Safety
/// `app` must come from [`create_extended`]; `attr` must be valid.
#[inline]
pub unsafe fn start_poll(app: *mut ibv_cq_ex, attr: *const ibv_poll_cq_attr) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe {
        if (*attr).comp_mask != 0 {
            return libc::EINVAL;
        }
        let extended = extended(app);
        std::mem::forget(extended.polling.lock());
        let code = advance(app, extended);
        if code != 0 {
            extended.polling.give_back();
        }
        code
    }
}

/// `ibv_next_poll`.
///
/// # Safety
/// Between a [`start_poll`] that gave 0 and [`end_poll`].
#[inline]
pub unsafe fn next_poll(app: *mut ibv_cq_ex) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe { advance(app, extended(app)) }
}

/// `ibv_end_poll`.
///
/// # Safety
/// After a [`start_poll`] that gave 0.
#[inline]
pub unsafe fn end_poll(app: *mut ibv_cq_ex) {
    // SAFETY: as the caller vouches, so the lock is the caller's.
    unsafe { extended(app).polling.give_back() };
}

/// What the readers read.
///
/// # Safety
/// Between a [`start_poll`] that gave 0 and [`end_poll`].
#[inline(always)]
pub unsafe fn current<'a>(app: *mut ibv_cq_ex) -> &'a ibv_wc {
    // SAFETY: as the caller vouches: the lock of the poll is held.
    unsafe { &*extended(app).current.get() }
}

#[inline(always)]
unsafe fn advance(app: *mut ibv_cq_ex, extended: &Extended) -> c_int {
    // SAFETY: the lock of the poll is held.
    unsafe {
        let current = extended.current.get();
        match poll(app.cast(), 1, current) {
            0 => libc::ENOENT,
            1 => {
                (*app).status = (*current).status;
                (*app).wr_id = (*current).wr_id;
                0
            }
            _ => libc::EIO,
        }
    }
}

#[inline(always)]
unsafe fn extended<'a>(app: *mut ibv_cq_ex) -> &'a Extended {
    // SAFETY: as the caller vouches.
    unsafe {
        CompletionQueue::of(app.cast())
            .extended
            .as_ref()
            .unwrap_unchecked()
    }
}
