//! Polling: the hot path, and what differs while the gate is closed and after a restart.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use rdma_core_sys::{IBV_WC_RECV, IBV_WC_SUCCESS, ibv_cq, ibv_wc};

use super::{CLOSED, CompletionQueue, HELD, Locked, SHARED, TRANSLATE};
use crate::log::SlotHead;
use crate::virt::lock::{QueueGuard, WANTED, forget_origin};
use crate::virt::process::{lock, process};
use crate::virt::queue_pair::{QueuePair, rewrite_datagram};

/// `ibv_poll_cq`.
///
/// # Safety
/// `app` must come from [`create`]; `completions` must have room for `count`.
#[inline]
pub unsafe fn poll(app: *mut ibv_cq, count: c_int, completions: *mut ibv_wc) -> c_int {
    // SAFETY: as the caller vouches.
    let queue = unsafe { CompletionQueue::of(app) };
    let Some(guard) = queue.lock.try_lock() else {
        // SAFETY: as the caller vouches.
        return unsafe { poll_contended(app, count, completions) };
    };
    if queue.general.load(Ordering::Relaxed) != 0 {
        // The function called does not unwind, so there is nothing to save for that.
        std::mem::forget(guard);
        // SAFETY: as the caller vouches; the lock is its now.
        return unsafe { poll_translated(app, count, completions) };
    }
    // SAFETY: the lock is held; `hardware` is there while the queue is neither closed nor held; its completions carry our
    // `wr_id`s.
    unsafe {
        std::mem::forget(guard);
        let state = queue.state.get();
        // Kept there, not in a register saved on every call.
        (*state).completions = completions;
        let got = ((*state).poll)((*state).hardware, count, completions);
        let queue = CompletionQueue::of(forget_origin(app));
        let mut at = (*queue.state.get()).completions;
        // Many polls find one; only more are worth an unrolled loop.
        if got == 1 {
            retire(at);
        } else {
            for _ in 0..got {
                retire(at);
                at = at.add(1);
            }
        }
        queue.lock.give_back();
        got
    }
}

/// Gives a completion of the hardware the application's `wr_id`, and retires its request.
#[inline(always)]
unsafe fn retire(completion: *mut ibv_wc) {
    // SAFETY: the caller has polled it just now; all that was posted carries the address of its entry.
    unsafe {
        let head = SlotHead::of((*completion).wr_id);
        (*completion).wr_id = head.app_wr_id;
        (*head.retire).store(head.wr_id(), Ordering::Release);
    }
}

/// The lock was taken when it was wanted.
#[cold]
unsafe extern "C" fn poll_contended(
    app: *mut ibv_cq,
    count: c_int,
    completions: *mut ibv_wc,
) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe {
        std::mem::forget(CompletionQueue::of(app).lock.lock());
        poll_general(app, count, completions)
    }
}

/// After a restart. Gives the lock back.
unsafe extern "C" fn poll_translated(
    app: *mut ibv_cq,
    count: c_int,
    completions: *mut ibv_wc,
) -> c_int {
    // SAFETY: the lock is held, the hardware is there; the caller vouches for the room.
    unsafe {
        let queue = CompletionQueue::of(app);
        if queue.general.load(Ordering::Relaxed) != TRANSLATE {
            return poll_general(app, count, completions);
        }
        let _guard = queue.lock.adopt();
        let state = queue.state.get();
        let got = ((*state).poll)((*state).hardware, count, completions);
        let mut at = completions;
        for _ in 0..got {
            let completion = &mut *at;
            let head = SlotHead::of(completion.wr_id);
            if completion.opcode & IBV_WC_RECV != 0 || head.owner.addr() & SHARED != 0 {
                // What may have to be looked up or rewritten.
                std::hint::cold_path();
                if !hand_over(app, completion) {
                    return -libc::EIO;
                }
            } else {
                completion.wr_id = head.app_wr_id;
                completion.qp_num = (*head.owner.cast::<QueuePair>()).number().0;
                (*head.retire).store(head.wr_id(), Ordering::Release);
            }
            at = at.add(1);
        }
        got
    }
}

/// `false` if it met a defect.
unsafe extern "C" fn hand_over(app: *mut ibv_cq, completion: &mut ibv_wc) -> bool {
    // SAFETY: as the caller vouches: a completion of this queue, polled just now.
    let handed = catch_unwind(AssertUnwindSafe(|| unsafe {
        CompletionQueue::of(app).hand_over(completion);
    }));
    handed.is_ok()
}

/// Held back, closed, or after waiting for the lock. Gives the lock back.
unsafe extern "C" fn poll_general(
    app: *mut ibv_cq,
    count: c_int,
    completions: *mut ibv_wc,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the rest.
    let polled = catch_unwind(AssertUnwindSafe(|| unsafe {
        let queue = CompletionQueue::of(app);
        queue.poll_general(queue.lock.adopt(), count, completions)
    }));
    polled.unwrap_or(-libc::EIO)
}

impl CompletionQueue {
    unsafe fn poll_general(
        &self,
        guard: QueueGuard<'_>,
        count: c_int,
        completions: *mut ibv_wc,
    ) -> c_int {
        // SAFETY: the lock is held.
        let state = unsafe { &mut *self.state.get() };
        let mut state = Locked {
            _guard: guard,
            state,
        };
        let room = usize::try_from(count).unwrap_or(0);
        let general = self.general.load(Ordering::Relaxed);
        if general & WANTED != 0 {
            drop(state);
            std::thread::yield_now();
            return 0;
        }
        if general & HELD != 0 {
            let serve = room.min(state.held.len());
            for (index, completion) in state.held.drain(..serve).enumerate() {
                // SAFETY: the caller vouches for `count` entries.
                unsafe { completions.add(index).write(completion) };
            }
            if state.held.is_empty() {
                self.general.fetch_and(!HELD, Ordering::Relaxed);
            }
            return serve as c_int;
        }
        if general & CLOSED != 0 {
            return 0;
        }
        // SAFETY: not closed, so the hardware is there.
        unsafe {
            let got = (state.poll)(state.hardware, count, completions);
            for index in 0..usize::try_from(got).unwrap_or(0) {
                self.hand_over(&mut *completions.add(index));
            }
            got
        }
    }

    /// Turns a completion of the hardware into the application's, and retires its request.
    pub(super) unsafe fn hand_over(&self, completion: &mut ibv_wc) {
        // SAFETY: all that was posted carries the address of its entry.
        let head = unsafe { SlotHead::of(completion.wr_id) };
        completion.wr_id = head.app_wr_id;
        if process().translates() {
            // SAFETY: the owner outlives its completions: they are taken from the hardware before it is destroyed.
            unsafe { self.translate(completion, head) };
        }
        // SAFETY: the cell lives as long as its queue. Last, as the entry may be used again from here on.
        unsafe { (*head.retire).store(head.wr_id(), Ordering::Release) };
    }

    unsafe fn translate(&self, completion: &mut ibv_wc, head: &SlotHead) {
        let owner = head.owner;
        let received = completion.status == IBV_WC_SUCCESS && completion.opcode & IBV_WC_RECV != 0;
        if owner.addr() & SHARED == 0 {
            // SAFETY: as the caller vouches.
            let pair = unsafe { &*owner.cast::<QueuePair>() };
            completion.qp_num = pair.number().0;
            if received && pair.is_datagram() {
                // SAFETY: a received datagram of this pair.
                unsafe { rewrite_datagram(completion, head) };
            }
        } else {
            // SAFETY: as the caller vouches.
            unsafe { self.translate_shared(completion, head, received) };
        }
    }

    unsafe fn translate_shared(&self, completion: &mut ibv_wc, head: &SlotHead, received: bool) {
        let hardware = completion.qp_num;
        // One that is in no table is younger than the last restart and means itself.
        let known = lock(&self.context.qpns_back).get(hardware);
        completion.qp_num = known.unwrap_or(hardware);
        if received && completion.src_qp != 0 {
            // SAFETY: a receive completed by a queue pair of ours.
            unsafe { rewrite_datagram(completion, head) };
        }
    }
}
