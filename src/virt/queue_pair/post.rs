//! Posting: the hot path. docs/work-logs.md has the argument and the budget.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use rdma_core_sys::{IBV_WR_SEND, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_sge};

use super::QueuePair;
use super::post_general::{remote_key, remote_key_place};
use super::send_queue::{SendQueue, TRANSLATE};
use crate::log::copy_payload;
use crate::virt::context::Context;
use crate::virt::lock::{QueueGuard, forget_origin, step_aside};

/// `ibv_post_send`.
///
/// # Safety
/// As `ibv_post_send` demands.
#[inline]
pub unsafe fn post_send(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: as the caller vouches.
    let pair = unsafe { QueuePair::of(app) };
    let queue = &pair.send;
    // Whatever is not the plain case is left to a function that is not come back from and does not unwind: so this one has
    // next to nothing in registers that it would have to save.
    let Some(guard) = queue.lock.try_lock() else {
        // SAFETY: as the caller vouches.
        return unsafe { post_contended(app, request, bad) };
    };
    // SAFETY: as the caller vouches; `state` is only touched under the lock. By pointer: the device is called in between,
    // and what is needed after it is read again. Nothing here unwinds, so no guard has to be kept for that.
    unsafe {
        std::mem::forget(guard);
        let state = queue.state.get();
        if queue.general.load(Ordering::Relaxed) != 0 {
            return post_translated(app, request, bad);
        }
        let wr = &*request;
        if !(*state).ring.takes_plain(wr) {
            return post_slowly(app, request, bad);
        }
        let element = wr.sg_list;
        if !(*state).ring.is_one_packet((*element).length) {
            return post_large(app, request, bad);
        }
        post_plain(app, request, element, 1, bad)
    }
}

/// Logs a plain request and posts it as it is. Gives the lock back.
#[inline(always)]
unsafe fn post_plain(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    element: *const ibv_sge,
    packets: u32,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    let request = forget_origin(request);
    // SAFETY: the lock is held; the caller vouches for the rest. By pointer, as above.
    unsafe {
        let state = QueuePair::of(app).send.state.get();
        (*state).request = request;
        (*state).bad = bad;
        let slot = (*state).ring.log_one(request, element, packets);
        (*state).ring.commit(slot);
        let code = ((*state).post)((*state).hardware, &raw mut (*slot).wr, bad);
        if code != 0 {
            return take_back(app, code);
        }
        QueuePair::of(forget_origin(app)).send.lock.give_back();
        code
    }
}

/// A plain request of any number of packets.
unsafe extern "C" fn post_large(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the rest.
    unsafe {
        let ring = &(*QueuePair::of(app).send.state.get()).ring;
        let element = (*request).sg_list;
        let packets = ring.packets((*request).opcode, (*element).length);
        post_plain(app, request, element, packets, bad)
    }
}

/// The lock was taken when it was wanted.
#[cold]
unsafe extern "C" fn post_contended(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe {
        std::mem::forget(QueuePair::of(app).send.lock.lock());
        post_slowly(app, request, bad)
    }
}

/// The device refused the request that was logged last. Gives the lock back.
#[cold]
unsafe extern "C" fn take_back(app: *mut ibv_qp, code: c_int) -> c_int {
    // SAFETY: the lock is held; the caller has just logged and posted one request, and kept where it came from.
    unsafe {
        let queue = &QueuePair::of(app).send;
        let _guard = queue.lock.adopt();
        let state = &mut *queue.state.get();
        state.ring.undo_last();
        *state.bad = state.request;
    }
    code
}

/// After a restart a plain request is logged as it is, and posted as a copy with the hardware's keys. Gives the lock back.
unsafe extern "C" fn post_translated(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the request. By pointer, as above.
    unsafe {
        let pair = QueuePair::of(app);
        let state = pair.send.state.get();
        let element = (*request).sg_list;
        if pair.send.general.load(Ordering::Relaxed) != TRANSLATE
            || !(*state).ring.takes_plain(&*request)
        {
            return post_slowly(app, request, bad);
        }
        if !(*state).last_local.is(&pair.context, (*element).lkey) {
            return look_up_local(app, request, bad);
        }
        let remote = (*request).opcode & !1 != IBV_WR_SEND;
        // Kept for the copy, which has its key in the same place.
        let place = match remote {
            true => remote_key_place((*request).opcode),
            false => 0,
        };
        if remote && u64::from(*request.byte_add(place).cast::<u32>()) != (*state).last_remote.0 {
            return look_up_remote(app, request, bad);
        }
        (*state).request = request;
        (*state).bad = bad;
        let packets = match (*state).ring.is_one_packet((*element).length) {
            true => 1,
            false => (*state).ring.packets((*request).opcode, (*element).length),
        };
        let slot = (*state).ring.log_one(request, element, packets);
        (*state).ring.commit(slot);
        let copy = &raw mut (*state).copy;
        (*copy).wr_id = (*slot).wr.wr_id;
        copy_payload(request, copy);
        let translated = (*copy).sg_list;
        *translated = *element;
        (*translated).lkey = (*state).last_local.hardware;
        if remote {
            *copy.byte_add(place).cast::<u32>() = (*state).last_remote.1;
        }
        let code = ((*state).post)((*state).hardware, copy, bad);
        if code != 0 {
            return take_back(app, code);
        }
        pair.send.lock.give_back();
        code
    }
}

/// [`post_translated`] with another remote key than last time.
unsafe extern "C" fn look_up_remote(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the request, which is not a SEND.
    unsafe {
        let pair = QueuePair::of(app);
        (*pair.send.state.get()).remote(*remote_key(request));
        post_translated(app, request, bad)
    }
}

/// [`post_translated`] with another local key than last time.
unsafe extern "C" fn look_up_local(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the request.
    unsafe {
        let pair = QueuePair::of(app);
        let key = (*(*request).sg_list).lkey;
        match (*pair.send.state.get())
            .last_local
            .look_up(&pair.context, key)
        {
            true => post_translated(app, request, bad),
            // Refused, or of no length.
            false => post_slowly(app, request, bad),
        }
    }
}

/// Everything else. Gives the lock back.
unsafe extern "C" fn post_slowly(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the chain.
    unsafe {
        let queue = &QueuePair::of(app).send;
        let ring = &mut (*queue.state.get()).ring;
        // Once or twice in a lap over the ring there is room after all. Each of these leads here again only if this is not so.
        if ring.is_at_limit() && ring.make_room().is_ok() {
            return match queue.general.load(Ordering::Relaxed) {
                0 if ring.takes_plain(&*request) => post_large(app, request, bad),
                _ => post_translated(app, request, bad),
            };
        }
    }
    // SAFETY: as above.
    let posted = catch_unwind(AssertUnwindSafe(|| unsafe {
        let pair = QueuePair::of(app);
        pair.send
            .post_slowly(pair.send.lock.adopt(), &pair.context, request, bad)
    }));
    posted.unwrap_or(libc::EIO)
}

/// `ibv_post_recv`.
///
/// # Safety
/// As `ibv_post_recv` demands.
#[inline]
pub unsafe fn post_receive(
    app: *mut ibv_qp,
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe {
        let pair = QueuePair::of(app);
        pair.receive.post(&pair.context, request, bad)
    }
}

impl SendQueue {
    unsafe fn post_slowly(
        &self,
        guard: QueueGuard<'_>,
        context: &Context,
        first: *mut ibv_send_wr,
        bad: *mut *mut ibv_send_wr,
    ) -> c_int {
        let _guard = step_aside(&self.lock, &self.general, guard);
        let general = self.general.load(Ordering::Relaxed);
        // SAFETY: the lock is held; the caller vouches for the chain.
        unsafe { (*self.state.get()).post_general(general, context, first, bad) }
    }
}
