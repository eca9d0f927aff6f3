//! Posting receives: the same for the receive queue of a queue pair and for a shared receive queue.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Instant;

use rdma_core_sys::{ibv_recv_wr, ibv_sge};

use super::context::Context;
use super::local_key::{LastKey, local_key};
use super::lock::{QueueGuard, QueueLock, forget_origin};
use super::process::process;
use crate::errno::{Errno, Verb};
use crate::log::{ReceiveRing, ReceiveSlot};

/// `ibv_post_recv` or `ibv_post_srq_recv` of the hardware; both take their queue, a chain and where to leave a bad one.
pub(super) type PostReceive =
    unsafe extern "C" fn(*mut c_void, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int;

#[derive(Debug)]
pub(crate) struct ReceiveQueue {
    lock: QueueLock,
    state: UnsafeCell<State>,
}

// SAFETY: `state` is only touched under `lock`.
unsafe impl Sync for ReceiveQueue {}

#[derive(Debug)]
struct State {
    /// Local keys may differ: a restart has happened.
    translate: bool,
    hardware: *mut c_void,
    post: PostReceive,
    ring: ReceiveRing,
    /// Receives that had completed when the connection was made.
    counted_from: u64,
    /// What was granted. The ring has more room, and without hardware nobody else counts.
    capacity: u32,
    /// The request being posted and where to say that it is bad; kept here, not in registers saved on every call.
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
    /// Room for the elements of one translated request.
    elements: Box<[ibv_sge]>,
    /// A translated request of one element, with `sg_list` at `elements` and no next.
    copy: ibv_recv_wr,
    last_key: LastKey,
    /// The mark of the last receive that a restart has given to the hardware.
    restarted: u64,
}

impl Default for ReceiveQueue {
    /// A queue without hardware or room.
    fn default() -> Self {
        let state = State {
            translate: false,
            hardware: std::ptr::null_mut(),
            post: hold,
            ring: ReceiveRing::default(),
            counted_from: 0,
            capacity: 0,
            request: std::ptr::null_mut(),
            bad: std::ptr::null_mut(),
            elements: Box::default(),
            copy: ibv_recv_wr {
                wr_id: 0,
                next: std::ptr::null_mut(),
                sg_list: std::ptr::null_mut(),
                num_sge: 1,
            },
            last_key: LastKey::NONE,
            restarted: 0,
        };
        Self {
            lock: QueueLock::default(),
            state: UnsafeCell::new(state),
        }
    }
}

/// Stands in for the hardware's function while there is none: the request is in the log and goes down at the rebuild.
unsafe extern "C" fn hold(_: *mut c_void, _: *mut ibv_recv_wr, _: *mut *mut ibv_recv_wr) -> c_int {
    0
}

impl ReceiveQueue {
    /// Posts a chain.
    ///
    /// # Safety
    /// As `ibv_post_recv` demands.
    #[inline(always)]
    pub(super) unsafe fn post(
        &self,
        context: &Context,
        first: *mut ibv_recv_wr,
        bad: *mut *mut ibv_recv_wr,
    ) -> c_int {
        let Some(guard) = self.lock.try_lock() else {
            // SAFETY: as the caller vouches.
            return unsafe { post_contended(self, context, first, bad) };
        };
        // As with sends: what is not the plain case is left to functions that are not come back from.
        std::mem::forget(guard);
        // SAFETY: the lock is held; the caller vouches for the chain. By pointer: the device is called in between.
        unsafe {
            let state = self.state.get();
            if (*state).translate || !(*state).ring.takes_plain(first) {
                return post_translated(self, context, first, bad);
            }
            (*state).request = first;
            (*state).bad = bad;
            let slot = (*state).ring.log_one(first);
            (*state).ring.commit(slot);
            let code = ((*state).post)((*state).hardware, &raw mut (*slot).wr, bad);
            let this = forget_origin(std::ptr::from_ref(self).cast_mut());
            if code != 0 {
                return take_back(&*this, code);
            }
            (*this).lock.give_back();
            code
        }
    }

    /// Everything else.
    unsafe fn post_chain(
        &self,
        guard: QueueGuard<'_>,
        context: &Context,
        first: *mut ibv_recv_wr,
        bad: *mut *mut ibv_recv_wr,
    ) -> c_int {
        let _guard = guard;
        // SAFETY: the lock is held; the caller vouches for the chain. Each entry is logged before it is posted and taken
        // out again if the device refuses it.
        unsafe {
            let state = &mut *self.state.get();
            let mut request = first;
            while !request.is_null() {
                if state.hardware.is_null()
                    && state.ring.is_allocated()
                    && state.ring.count_posted() >= state.capacity as usize
                {
                    *bad = request;
                    return libc::ENOMEM;
                }
                let posted = state.ring.log(request).and_then(|slot| {
                    state.ring.commit(slot);
                    if state.hardware.is_null() {
                        state.ring.leave_plain_path();
                    }
                    let posted = state.post_slot(context, slot);
                    if posted.is_err() {
                        state.ring.undo(slot);
                    }
                    posted
                });
                if let Err(error) = posted {
                    *bad = request;
                    return error.0;
                }
                request = (*request).next;
            }
            0
        }
    }

    /// Makes the ring, if there is none yet.
    pub(super) fn allocate(&self, capacity: u32, max_sge: u32, owner: *mut c_void) -> Verb<()> {
        self.with(|state| {
            if !state.ring.is_allocated() {
                state.ring = ReceiveRing::new(capacity, max_sge, owner)?;
                state.capacity = capacity;
                state.elements = vec![
                    ibv_sge {
                        addr: 0,
                        length: 0,
                        lkey: 0
                    };
                    max_sge.max(1) as usize
                ]
                .into();
                state.copy.sg_list = state.elements.as_mut_ptr();
                state.translate = process().translates();
            }
            Ok(())
        })
    }

    /// The application reset the queue.
    pub(super) fn forget_all(&self) {
        self.with(|state| state.ring.forget_all());
    }

    /// Whom to post to.
    pub(super) fn attach(&self, hardware: *mut c_void, post: PostReceive) {
        self.with(|state| (state.hardware, state.post) = (hardware, post));
    }

    /// Nobody to post to: requests are held.
    pub(super) fn detach(&self) {
        self.with(|state| {
            state.detach();
            state.restarted = 0;
        });
    }

    /// The queue's lock can be had: no thread is stuck inside.
    pub(crate) fn check(&self, limit: Instant) -> bool {
        self.lock.lock_before(limit).is_some()
    }

    /// A connection is about to be made: what completes from here on belongs to it.
    pub(super) fn start_counting(&self) {
        self.with(|state| state.counted_from = state.ring.completed());
    }

    /// Receives that have completed on this connection, modulo 2^32.
    pub(super) fn completed(&self) -> u32 {
        self.with(|state| (state.ring.completed() - state.counted_from) as u32)
    }

    /// From the first restart on, requests go down as translated copies.
    pub(super) fn translate(&self) {
        self.with(|state| (state.translate, state.last_key) = (true, LastKey::NONE));
    }

    /// After a rebuild: attaches the fresh hardware and posts again all that was posted and has not completed, with the keys
    /// as they are now; in one step, so that what the application posts meanwhile goes down once. If the device refuses one, the
    /// next try goes on from there, unless the hardware is `empty` again.
    pub(super) fn restart(
        &self,
        context: &Context,
        hardware: *mut c_void,
        post: PostReceive,
        empty: bool,
    ) -> Verb<()> {
        self.with(|state| {
            if state.hardware == hardware && !empty {
                return Ok(());
            }
            if empty {
                state.restarted = 0;
            }
            (state.hardware, state.post) = (hardware, post);
            (state.translate, state.last_key) = (true, LastKey::NONE);
            for slot in state.ring.posted() {
                // SAFETY: an entry of the ring, under its lock.
                let mark = unsafe { (*slot).head.mark.load(Ordering::Acquire) };
                if mark <= state.restarted {
                    continue;
                }
                // SAFETY: an entry of the ring, which the fresh hardware does not have yet.
                let posted = unsafe {
                    match state.post_slot(context, slot) {
                        // Its memory was deregistered since it was posted. A message that needs it ends the queue pair in an
                        // error; so does one that an empty receive is too short for.
                        Err(Errno::INVALID) => state.post_empty(slot),
                        posted => posted,
                    }
                };
                if let Err(error) = posted {
                    state.detach();
                    return Err(error);
                }
                state.restarted = mark;
            }
            Ok(())
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let _guard = self.lock.lock();
        // SAFETY: the lock is held.
        work(unsafe { &mut *self.state.get() })
    }
}

/// The lock was taken when it was wanted.
#[cold]
unsafe extern "C" fn post_contended(
    queue: &ReceiveQueue,
    context: &Context,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    std::mem::forget(queue.lock.lock());
    // SAFETY: as the caller vouches.
    unsafe { post_slowly(queue, context, first, bad) }
}

/// After a restart a plain request is logged as it is, and posted as a copy with the hardware's key. Gives the lock back.
unsafe extern "C" fn post_translated(
    queue: &ReceiveQueue,
    context: &Context,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the chain. By pointer, as above.
    unsafe {
        let state = queue.state.get();
        if !(*state).ring.takes_plain(first) {
            return post_slowly(queue, context, first, bad);
        }
        let element = (*first).sg_list;
        if !(*state).last_key.is(context, (*element).lkey) {
            return look_up(queue, context, first, bad);
        }
        (*state).request = first;
        (*state).bad = bad;
        let slot = (*state).ring.log_one(first);
        (*state).ring.commit(slot);
        let copy = &raw mut (*state).copy;
        (*copy).wr_id = (*slot).wr.wr_id;
        let translated = (*copy).sg_list;
        *translated = *element;
        (*translated).lkey = (*state).last_key.hardware;
        let code = ((*state).post)((*state).hardware, copy, bad);
        if code != 0 {
            return take_back(queue, code);
        }
        queue.lock.give_back();
        code
    }
}

/// [`post_translated`] with another key than last time.
unsafe extern "C" fn look_up(
    queue: &ReceiveQueue,
    context: &Context,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the request, which has one element.
    unsafe {
        let state = queue.state.get();
        let key = (*(*first).sg_list).lkey;
        match (*state).last_key.look_up(context, key) {
            true => post_translated(queue, context, first, bad),
            // Refused, or of no length.
            false => post_slowly(queue, context, first, bad),
        }
    }
}

/// Everything else. Gives the lock back.
unsafe extern "C" fn post_slowly(
    queue: &ReceiveQueue,
    context: &Context,
    first: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the chain.
    let posted = catch_unwind(AssertUnwindSafe(|| unsafe {
        queue.post_chain(queue.lock.adopt(), context, first, bad)
    }));
    posted.unwrap_or(libc::EIO)
}

/// The device refused the request that was logged last. Gives the lock back.
#[cold]
unsafe extern "C" fn take_back(queue: &ReceiveQueue, code: c_int) -> c_int {
    // SAFETY: the lock is held; the caller has just logged and posted one request, and kept where it came from.
    unsafe {
        let _guard = queue.lock.adopt();
        let state = &mut *queue.state.get();
        state.ring.undo(state.ring.last());
        *state.bad = state.request;
    }
    code
}

impl State {
    fn detach(&mut self) {
        (self.hardware, self.post) = (std::ptr::null_mut(), hold);
        self.ring.leave_plain_path();
    }

    /// Gives an entry to the hardware: as it is, or from the first restart on a copy with the hardware's keys. The log
    /// itself stays in the application's terms, so that it can go down again after the next restart.
    #[inline(always)]
    unsafe fn post_slot(&mut self, context: &Context, slot: *mut ReceiveSlot) -> Verb<()> {
        let mut refused = std::ptr::null_mut();
        // SAFETY: the caller has the entry under the queue's lock; `elements` has room for as many as an entry.
        unsafe {
            if !self.translate {
                return Errno::check((self.post)(
                    self.hardware,
                    &raw mut (*slot).wr,
                    &raw mut refused,
                ));
            }
            let mut copy = (*slot).wr;
            for (to, from) in self.elements.iter_mut().zip((*slot).elements()) {
                *to = ibv_sge {
                    lkey: local_key(context, from)?,
                    ..*from
                };
            }
            copy.sg_list = self.elements.as_mut_ptr();
            Errno::check((self.post)(self.hardware, &raw mut copy, &raw mut refused))
        }
    }

    /// Gives the hardware an entry without its elements.
    unsafe fn post_empty(&mut self, slot: *mut ReceiveSlot) -> Verb<()> {
        let mut refused = std::ptr::null_mut();
        // SAFETY: the caller has the entry under the queue's lock.
        unsafe {
            let mut copy = (*slot).wr;
            copy.num_sge = 0;
            Errno::check((self.post)(self.hardware, &raw mut copy, &raw mut refused))
        }
    }
}
