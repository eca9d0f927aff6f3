//! Posting receives: the same for the receive queue of a queue pair and for a shared receive queue.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::time::Instant;

use rdma_core_sys::{ibv_recv_wr, ibv_sge};

use super::context::Context;
use super::lock::QueueLock;
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
    /// Room for the elements of one translated request.
    elements: Box<[ibv_sge]>,
}

impl Default for ReceiveQueue {
    /// A queue without hardware or room.
    fn default() -> Self {
        let state = State {
            translate: false,
            hardware: std::ptr::null_mut(),
            post: hold,
            ring: ReceiveRing::default(),
            elements: Box::default(),
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
    #[inline]
    pub(super) unsafe fn post(
        &self,
        context: &Context,
        first: *mut ibv_recv_wr,
        bad: *mut *mut ibv_recv_wr,
    ) -> c_int {
        let _guard = self.lock.lock();
        // SAFETY: the lock is held; the caller vouches for the chain. Each entry is logged before it is posted and taken
        // out again if the device refuses it.
        unsafe {
            let state = &mut *self.state.get();
            let mut request = first;
            while !request.is_null() {
                let posted = state.ring.log(request).and_then(|slot| {
                    state.ring.commit(slot);
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
                state.elements = vec![
                    ibv_sge {
                        addr: 0,
                        length: 0,
                        lkey: 0
                    };
                    max_sge.max(1) as usize
                ]
                .into();
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
        self.attach(std::ptr::null_mut(), hold);
    }

    /// The queue's lock can be had: no thread is stuck inside.
    pub(crate) fn check(&self, limit: Instant) -> bool {
        self.lock.lock_before(limit).is_some()
    }

    /// From the first restart on, requests go down as translated copies.
    pub(super) fn translate(&self) {
        self.with(|state| state.translate = true);
    }

    /// After a rebuild: attaches the fresh hardware and posts again all that was posted and has not completed, with the keys
    /// as they are now; in one step, so that what the application posts meanwhile goes down once.
    pub(super) fn restart(
        &self,
        context: &Context,
        hardware: *mut c_void,
        post: PostReceive,
    ) -> Verb<()> {
        self.with(|state| {
            (state.hardware, state.post) = (hardware, post);
            state.translate = true;
            for slot in state.ring.posted() {
                // SAFETY: an entry of the ring, which the fresh hardware does not have yet.
                unsafe { state.post_slot(context, slot)? };
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

impl State {
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
}

/// The hardware's key for an element; its length decides whether the key means anything (IBTA 10.8.2.1).
///
/// # Errors
/// `EINVAL` for a key that is not one of this context's: never passed on as it is.
#[inline]
pub(super) fn local_key(context: &Context, element: &ibv_sge) -> Verb<u32> {
    match context.lkeys.get(element.lkey) {
        Some(key) => Ok(key),
        None if element.length == 0 => Ok(element.lkey),
        None => Err(Errno::INVALID),
    }
}
