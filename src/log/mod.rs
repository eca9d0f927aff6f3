//! Work logs: what each queue has posted and not yet retired.
//!
//! The entry of a log *is* the work request that is posted: the device gets a pointer into the ring, with the address of
//! the entry's [`SlotHead`] as `wr_id`. A completion therefore leads to its entry, its queue and the application's own
//! `wr_id` without any look-up, whatever its opcode or status (the opcode of a failed completion is undefined), and for
//! shared receive queues, which complete in any order. See docs/work-logs.md.

mod build;
mod receive;
mod ring;
mod send;

pub use receive::{ReceiveRing, ReceiveSlot};
pub use send::{SendRing, SendSlot, copy_payload, is_local, is_simple, takes_receive};

use std::ffi::c_void;
use std::sync::atomic::AtomicU64;

/// What a completion needs to know of the request it completes; at a fixed place in send and receive entries alike.
#[derive(Debug)]
#[repr(C)]
pub struct SlotHead {
    /// The application's `wr_id`.
    pub app_wr_id: u64,
    /// Where a completion leaves the address of this head: the queue's "last completed" for sends, this entry's own
    /// `mark` for receives.
    pub retire: *const AtomicU64,
    /// The queue pair or shared receive queue that owns the ring.
    pub owner: *mut c_void,
    /// Receives: a sequence number shifted left and made odd while posted, anything even when free. Sends: unused.
    pub mark: AtomicU64,
}

impl SlotHead {
    /// The head whose address came back as a completion's `wr_id`.
    ///
    /// # Safety
    /// `wr_id` must be one that a ring of ours put there, of a queue that still exists.
    #[inline(always)]
    #[must_use]
    pub unsafe fn of<'a>(wr_id: u64) -> &'a Self {
        // SAFETY: as the caller vouches; provenance was exposed when the ring was made.
        unsafe { &*std::ptr::with_exposed_provenance::<Self>(wr_id as usize) }
    }

    /// The number that goes down as `wr_id`.
    #[inline(always)]
    #[must_use]
    pub fn wr_id(&self) -> u64 {
        std::ptr::from_ref(self).expose_provenance() as u64
    }
}
