//! The second way to post (`ibv_wr_*`): requests are written piece by piece between start and complete, straight into the log.
//!
//! The lock of the queue is held meanwhile, as providers do. What is complete goes down as requests of `ibv_post_send` do, all
//! of it or nothing. docs/verbs.md, "The second way to post", has the argument.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::Ordering;

use rdma_core_sys::{
    IBV_WR_BIND_MW, ibv_ah, ibv_data_buf, ibv_qp_ex, ibv_send_wr,
    ibv_send_wr__bindgen_ty_4__bindgen_ty_1 as BindRequest, ibv_sge,
};

use super::QueuePair;
use super::send_queue::{COUNTED, DATAGRAM, HOLD, State};
use crate::errno::{Errno, Verb};
use crate::log::SendSlot;
use crate::virt::context::Context;
use crate::virt::lock::{WANTED, step_aside};
use crate::virt::memory_window;

/// Requests between start and complete.
#[derive(Debug)]
pub(super) struct Batch {
    first: *mut SendSlot,
    /// The request that is being written, which is not part of the log yet; null if none is.
    building: *mut SendSlot,
    /// Requests that are part of the log.
    finished: usize,
    psn_before: u32,
    /// Why none of them will go down.
    failed: Option<Errno>,
    /// The queue's word at the start: of what is looked at, nothing changes while the lock is held.
    general: u32,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            first: ptr::null_mut(),
            building: ptr::null_mut(),
            finished: 0,
            psn_before: 0,
            failed: None,
            general: 0,
        }
    }
}

/// `ibv_wr_start`.
///
/// # Safety
/// `app` must come from [`super::create_extended`].
#[inline]
pub unsafe fn start(app: *mut ibv_qp_ex) {
    // SAFETY: as the caller vouches. The lock stays taken until `complete` or `abort`.
    unsafe {
        let queue = &QueuePair::of(app.cast()).send;
        let mut guard = queue.lock.lock();
        if queue.general.load(Ordering::Relaxed) & WANTED != 0 {
            guard = step_aside(&queue.lock, &queue.general, guard);
        }
        std::mem::forget(guard);
        let state = &mut *queue.state.get();
        state.batch.building = ptr::null_mut();
        state.batch.finished = 0;
        state.batch.psn_before = state.ring.raw_psn();
        state.batch.failed = None;
        state.batch.general = queue.general.load(Ordering::Relaxed);
    }
}

/// The beginning of a request: `ibv_wr_send`, `ibv_wr_rdma_write` and so on. `write` fills in what only this one has.
///
/// # Safety
/// After [`start`].
#[inline(always)]
pub unsafe fn begin(app: *mut ibv_qp_ex, opcode: u32, write: impl FnOnce(&mut ibv_send_wr)) {
    // SAFETY: as the caller vouches; there is room when the entry is begun.
    unsafe {
        let state = started(app);
        if !state.batch.building.is_null() {
            state.finish();
        }
        if state.batch.failed.is_some() || (state.ring.is_at_limit() && !state.make_room()) {
            return;
        }
        let slot = state.ring.begin((*app).wr_id, opcode, (*app).wr_flags);
        write(&mut (*slot).wr);
        if state.batch.general & DATAGRAM != 0 {
            (*slot).wr.wr.ud.ah = ptr::null_mut();
        }
        if state.batch.finished == 0 {
            state.batch.first = slot;
        }
        state.batch.building = slot;
    }
}

/// `ibv_wr_set_sge_list`, and `ibv_wr_set_sge` with a list of one.
///
/// # Safety
/// After [`start`]; `elements` must be valid for `count`.
#[inline(always)]
pub unsafe fn set_elements(app: *mut ibv_qp_ex, elements: *const ibv_sge, count: usize) {
    // SAFETY: as the caller vouches.
    unsafe {
        let state = started(app);
        if let Some(slot) = state.building() {
            let set = state.ring.set_elements(slot, elements, count);
            state.note(set);
        }
    }
}

/// `ibv_wr_set_inline_data_list`, and `ibv_wr_set_inline_data` with a list of one.
///
/// # Safety
/// After [`start`]; the buffers must be valid for reads.
pub unsafe fn set_inline(app: *mut ibv_qp_ex, buffers: &[ibv_data_buf]) {
    // SAFETY: as the caller vouches.
    unsafe {
        let state = started(app);
        if let Some(slot) = state.building() {
            let pieces = buffers
                .iter()
                .map(|buffer| (buffer.addr.cast_const().cast(), buffer.length));
            let set = state.ring.set_inline(slot, pieces);
            state.note(set);
        }
    }
}

/// `ibv_wr_set_ud_addr`.
///
/// # Safety
/// After [`start`].
#[inline]
pub unsafe fn set_address(app: *mut ibv_qp_ex, handle: *mut ibv_ah, qpn: u32, qkey: u32) {
    // SAFETY: as the caller vouches.
    unsafe {
        if let Some(slot) = started(app).building() {
            let to = &mut (*slot).wr.wr.ud;
            (to.ah, to.remote_qpn, to.remote_qkey) = (handle, qpn, qkey);
        }
    }
}

/// `ibv_wr_bind_mw`.
///
/// # Safety
/// After [`start`]; the window and the region must be ours.
pub unsafe fn bind(app: *mut ibv_qp_ex, request: &BindRequest) {
    // SAFETY: as the caller vouches.
    unsafe {
        match memory_window::below(request) {
            Ok(below) => begin(app, IBV_WR_BIND_MW, |wr| {
                // Some devices refuse a request to bind that has immediate data.
                wr.__bindgen_anon_1.imm_data = 0;
                wr.__bindgen_anon_2.bind_mw = below;
            }),
            Err(error) => started(app).note(Err(error)),
        }
    }
}

/// `ibv_wr_abort`.
///
/// # Safety
/// After [`start`].
pub unsafe fn abort(app: *mut ibv_qp_ex) {
    // SAFETY: as the caller vouches.
    unsafe {
        started(app).undo_batch();
        QueuePair::of(app.cast()).send.lock.give_back();
    }
}

/// `ibv_wr_complete`.
///
/// # Safety
/// After [`start`].
#[inline]
pub unsafe fn complete(app: *mut ibv_qp_ex) -> c_int {
    // SAFETY: as the caller vouches. By pointer: the device is called in between, and what is needed after it is read again.
    unsafe {
        let queue = &QueuePair::of(app.cast()).send;
        let state = queue.state.get();
        if !(*state).batch.building.is_null() {
            (*state).finish();
        }
        let alone = (*state).batch.finished == 1 && (*state).batch.failed.is_none();
        if !alone || queue.general.load(Ordering::Relaxed) != 0 {
            return complete_general(app);
        }
        let mut refused = ptr::null_mut();
        let request = &raw mut (*(*state).batch.first).wr;
        let code = ((*state).post)((*state).hardware, request, &raw mut refused);
        if code != 0 {
            (*state).undo_batch();
        }
        QueuePair::of(app.cast()).send.lock.give_back();
        code
    }
}

/// Several requests, none, or one that cannot go down as it is. Gives the lock back.
unsafe extern "C" fn complete_general(app: *mut ibv_qp_ex) -> c_int {
    // SAFETY: the lock is held since `start`.
    let completed = catch_unwind(AssertUnwindSafe(|| unsafe {
        let pair = QueuePair::of(app.cast());
        let _guard = pair.send.lock.adopt();
        let general = pair.send.general.load(Ordering::Relaxed);
        started(app).complete(general, &pair.context)
    }));
    match completed {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => error.0,
        Err(_) => libc::EIO,
    }
}

/// The state of a queue whose lock is held since [`start`].
#[inline(always)]
unsafe fn started<'a>(app: *mut ibv_qp_ex) -> &'a mut State {
    // SAFETY: as the caller vouches.
    unsafe { &mut *QueuePair::of(app.cast()).send.state.get() }
}

impl State {
    /// The request that setters are about, unless the batch has failed.
    #[inline(always)]
    fn building(&self) -> Option<*mut SendSlot> {
        let building = self.batch.building;
        (!building.is_null() && self.batch.failed.is_none()).then_some(building)
    }

    /// The first error is the one that complete answers.
    #[inline(always)]
    fn note(&mut self, outcome: Verb<()>) {
        if let Err(error) = outcome {
            self.batch.failed.get_or_insert(error);
        }
    }

    #[cold]
    fn make_room(&mut self) -> bool {
        let made = self.ring.make_room();
        self.note(made);
        made.is_ok()
    }

    /// Makes the request that was being written part of the log.
    #[inline(always)]
    unsafe fn finish(&mut self) {
        let slot = std::mem::replace(&mut self.batch.building, ptr::null_mut());
        if self.batch.failed.is_some() {
            return;
        }
        // SAFETY: begun, and not finished yet.
        unsafe {
            if self.batch.general & DATAGRAM != 0 && (*slot).wr.wr.ud.ah.is_null() {
                return self.note(Err(Errno::INVALID));
            }
            let finished = self.ring.finish(slot);
            if finished.is_err() {
                return self.note(finished);
            }
            if self.batch.general & COUNTED != 0 {
                self.ring.count_receives(slot);
            }
        }
        self.batch.finished += 1;
    }

    /// Takes all of the batch out of the log again.
    #[cold]
    unsafe fn undo_batch(&mut self) {
        if self.batch.finished > 0 {
            // SAFETY: the first of the batch is outstanding, as nothing of it went down.
            unsafe { self.ring.undo(self.batch.first, self.batch.psn_before) };
        }
    }

    /// All of it or nothing: whatever could be refused is looked at before the first request goes down.
    unsafe fn complete(&mut self, general: u32, context: &Context) -> Verb<()> {
        // SAFETY: the lock is held; the batch is what was logged last.
        unsafe {
            let whole = self.check_batch(general, context);
            if whole.is_err() {
                self.undo_batch();
            }
            whole?;
            if self.batch.finished == 0 {
                return Ok(());
            }
            if general & HOLD != 0 {
                if self.held_from().is_null() {
                    self.hold_from(self.batch.first);
                }
                return Ok(());
            }
            if general & !(WANTED | COUNTED) != 0 {
                return self.post_one_by_one(general, context);
            }
            let mut slot = self.batch.first;
            for _ in 1..self.batch.finished {
                let next = self.ring.after(slot);
                (*slot).wr.next = &raw mut (*next).wr;
                slot = next;
            }
            match self.post_chain(self.batch.first, self.batch.psn_before) {
                None => Ok(()),
                Some((_, error)) => Err(error),
            }
        }
    }

    unsafe fn check_batch(&self, general: u32, context: &Context) -> Verb<()> {
        self.batch.failed.map_or(Ok(()), Err)?;
        // One request is the device's to refuse, as with `ibv_post_send`.
        if self.batch.finished < 2 && general & HOLD == 0 {
            return Ok(());
        }
        if self.ring.exceeds(self.capacity) {
            return Err(Errno::NO_MEMORY);
        }
        let mut slot = self.batch.first;
        for _ in 0..self.batch.finished {
            // SAFETY: an entry of the batch.
            unsafe { self.check(general, context, &(*slot).wr)? };
            slot = self.ring.after(slot);
        }
        Ok(())
    }

    /// As copies, in the hardware's terms.
    unsafe fn post_one_by_one(&mut self, general: u32, context: &Context) -> Verb<()> {
        let (mut slot, mut psn) = (self.batch.first, self.batch.psn_before);
        for _ in 0..self.batch.finished {
            // SAFETY: an entry of the batch. One that is refused, and those after it, leave the log.
            unsafe {
                if let Err(error) = self.post_slot(general, context, slot) {
                    self.ring.undo(slot, psn);
                    return Err(error);
                }
                psn = (*slot).psn_after;
            }
            slot = self.ring.after(slot);
        }
        Ok(())
    }
}
