//! Completion queues: notification, and what is held back while the gate is closed.

mod extended;
mod poll;

pub use extended::{create_extended, current, end_poll, next_poll, start_poll};
pub use poll::poll;

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Instant;

use rdma_core_sys::{IBV_WC_WR_FLUSH_ERR, ibv_comp_channel, ibv_context, ibv_cq, ibv_wc};

use self::extended::Extended;
use super::AppCq;
use super::channel::{Channel, wait_until_acknowledged};
use super::context::Context;
use super::lock::{self, QueueGuard, QueueLock};
use super::process::{Registered, process};
use crate::errno::{Errno, Verb};

/// Why a poll cannot simply go to the hardware. Zero is the fast path.
const HELD: u32 = 1;
const CLOSED: u32 = 2;
const TRANSLATE: u32 = 4;

/// Marks the owner of a [`SlotHead`] as a shared receive queue (objects are aligned, the bit is free).
pub(crate) const SHARED: usize = 1;

type Poll = unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int;

/// A completion queue; the application's object is its first field.
#[derive(Debug)]
#[repr(C)]
pub struct CompletionQueue {
    app: AppCq,
    lock: QueueLock,
    /// Changed under the lock, but for [`lock::WANTED`].
    general: AtomicU32,
    state: UnsafeCell<State>,
    pub(crate) context: Arc<Context>,
    channel: Option<Arc<Channel>>,
    vector: c_int,
    /// Events written to the application's channel. Changed under `Process::events` only.
    delivered: AtomicU32,
    index: AtomicUsize,
    /// `None` for a queue that was made with `ibv_create_cq`.
    extended: Option<Extended>,
}

// SAFETY: `state` is only touched under `lock`; the application's fields are libibverbs' business.
unsafe impl Sync for CompletionQueue {}

#[derive(Debug)]
struct State {
    hardware: *mut ibv_cq,
    poll: Poll,
    /// Where the poll that is under way puts them.
    completions: *mut ibv_wc,
    /// Completions that are the application's already, oldest first.
    held: VecDeque<ibv_wc>,
    /// Entries the application asked for.
    capacity: c_int,
    /// How often a notification was asked for, the kind of the last, and how many were given.
    arms: u64,
    solicited_only: c_int,
    events: u64,
}

/// `ibv_create_cq`.
///
/// # Safety
/// As `ibv_create_cq` demands.
///
/// # Errors
/// What the device answers.
pub unsafe fn create(
    app: *mut ibv_context,
    capacity: c_int,
    channel: *mut ibv_comp_channel,
    vector: c_int,
) -> Verb<*mut ibv_cq> {
    // SAFETY: as the caller vouches.
    unsafe { make(app, capacity, channel, vector, None) }
}

/// Makes a queue of either kind.
unsafe fn make(
    app: *mut ibv_context,
    capacity: c_int,
    channel: *mut ibv_comp_channel,
    vector: c_int,
    extended: Option<Extended>,
) -> Verb<*mut ibv_cq> {
    let context = process().context(app)?;
    let _inside = context.enter()?;
    let channel = match channel.is_null() {
        true => None,
        // SAFETY: as the caller vouches; the gate is held.
        false => Some(unsafe { Channel::of(&context, channel)? }),
    };
    let state = State {
        hardware: std::ptr::null_mut(),
        poll: poll_nothing,
        completions: std::ptr::null_mut(),
        held: VecDeque::new(),
        capacity,
        arms: 0,
        solicited_only: 0,
        events: 0,
    };
    let queue = Box::new(CompletionQueue {
        app: AppCq::default(),
        lock: QueueLock::default(),
        general: AtomicU32::new(if process().translates() { TRANSLATE } else { 0 }),
        state: UnsafeCell::new(state),
        context: Arc::clone(&context),
        channel,
        vector,
        delivered: AtomicU32::new(0),
        index: AtomicUsize::new(0),
        extended,
    });
    queue.rebuild()?;
    let queue = Box::leak(queue);
    // SAFETY: `app` is ours until it is returned; the hardware's object was made just now.
    unsafe {
        queue.app.public.context = app;
        queue.app.public.cqe = (*(*queue.state.get()).hardware).cqe;
        queue.app.public.handle = (*(*queue.state.get()).hardware).handle;
    }
    let index = context
        .objects()
        .completion_queues
        .insert(Registered((&*queue).into()));
    queue.index.store(index, Ordering::Relaxed);
    Ok(&raw mut queue.app.public)
}

/// `ibv_destroy_cq`: waits, as the hardware's does, until every event that was handed out is acknowledged.
///
/// # Safety
/// `app` must come from [`create`] and not be used after success.
///
/// # Errors
/// What the device answers: `EBUSY` while a queue pair uses it.
pub unsafe fn destroy(app: *mut ibv_cq) -> Verb<()> {
    // SAFETY: as the caller vouches.
    let queue = unsafe { CompletionQueue::of(app) };
    let delivered = {
        let _inside = queue.context.enter()?;
        let _events = process().events();
        let mut state = queue.lock();
        if !state.hardware.is_null() {
            // SAFETY: the device's own; nobody polls it, as the lock is held.
            Errno::check(unsafe { (queue.context.verbs.ibv_destroy_cq)(state.hardware) })?;
        }
        state.hardware = std::ptr::null_mut();
        state.poll = poll_nothing;
        queue
            .context
            .objects()
            .completion_queues
            .remove(queue.index.load(Ordering::Relaxed));
        drop(state);
        let pointer = (app.expose_provenance() as u64).to_ne_bytes();
        let unread = queue
            .channel
            .as_ref()
            .map_or(0, |channel| channel.pipe.purge(|event| event == pointer));
        queue.delivered.load(Ordering::Relaxed).wrapping_sub(unread)
    };
    // SAFETY: libibverbs initialized mutex and condition when the queue was created; nobody finds the queue any more.
    unsafe {
        wait_until_acknowledged(
            &raw mut (*app).mutex,
            &raw mut (*app).cond,
            &raw const (*app).comp_events_completed,
            delivered,
        );
        drop(Box::from_raw(app.cast::<CompletionQueue>()));
    }
    Ok(())
}

/// `ibv_resize_cq`.
///
/// # Safety
/// `app` must come from [`create`].
///
/// # Errors
/// What the device answers.
pub unsafe fn resize(app: *mut ibv_cq, capacity: c_int) -> Verb<()> {
    // SAFETY: as the caller vouches.
    let queue = unsafe { CompletionQueue::of(app) };
    let _inside = queue.context.enter()?;
    let mut state = queue.lock();
    // SAFETY: the gate is held, so the hardware is there; nobody polls, as the lock is held.
    unsafe {
        Errno::check((queue.context.verbs.ibv_resize_cq)(
            state.hardware,
            capacity,
        ))?;
        (*app).cqe = (*state.hardware).cqe;
    }
    state.capacity = capacity;
    Ok(())
}

/// `ibv_req_notify_cq`.
///
/// # Safety
/// `app` must come from [`create`].
pub unsafe fn request_notification(app: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: as the caller vouches.
    let queue = unsafe { CompletionQueue::of(app) };
    let mut state = queue.lock();
    state.arms += 1;
    state.solicited_only = solicited_only;
    if state.hardware.is_null() {
        return 0;
    }
    // SAFETY: the hardware is there, and is not released while the lock is held.
    unsafe { arm(&state) }
}

unsafe fn arm(state: &State) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe {
        match (*(*state.hardware).context).ops.req_notify_cq {
            Some(request) => request(state.hardware, state.solicited_only),
            None => libc::EOPNOTSUPP,
        }
    }
}

unsafe extern "C" fn poll_nothing(_: *mut ibv_cq, _: c_int, _: *mut ibv_wc) -> c_int {
    0
}

/// The state, while its lock is held.
struct Locked<'a> {
    _guard: QueueGuard<'a>,
    state: &'a mut State,
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;
    #[inline(always)]
    fn deref(&self) -> &State {
        self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut State {
        self.state
    }
}

impl CompletionQueue {
    /// Completions that it has room for.
    pub(crate) fn entries(&self) -> u32 {
        u32::try_from(self.app.public.cqe).unwrap_or(0)
    }

    /// # Safety
    /// `app` must come from [`create`] and not be destroyed while the reference is used.
    #[inline(always)]
    pub(crate) unsafe fn of<'a>(app: *mut ibv_cq) -> &'a Self {
        // SAFETY: as the caller vouches; `app` is the first field.
        unsafe { &*app.cast::<Self>() }
    }

    #[inline(always)]
    fn lock(&self) -> Locked<'_> {
        let guard = self.lock.lock();
        // SAFETY: the lock is held.
        let state = unsafe { &mut *self.state.get() };
        Locked {
            _guard: guard,
            state,
        }
    }

    /// The hardware's queue; null while released.
    pub(crate) fn hardware(&self) -> *mut ibv_cq {
        self.lock().hardware
    }

    pub(crate) fn app(&self) -> *mut ibv_cq {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// Closes the gate of this queue: polls serve what is held back.
    pub(crate) fn close(&self, limit: Instant) -> bool {
        lock::close(&self.lock, &self.general, CLOSED, limit, || {})
    }

    pub(crate) fn open(&self) {
        let _state = self.lock();
        self.general.fetch_and(!CLOSED, Ordering::Relaxed);
    }

    pub(crate) fn held(&self) -> u64 {
        self.lock().held.len() as u64
    }

    /// Takes all completions from the hardware and holds them back for the application, but for those that `ours`
    /// recognizes as caused by us, which never happened for the application. Gives their number.
    pub(crate) fn drain(&self, mut ours: impl FnMut(&ibv_wc) -> bool) -> u64 {
        const BATCH: usize = 32;
        let mut found = 0;
        let mut state = self.lock();
        if state.hardware.is_null() {
            return found;
        }
        loop {
            // SAFETY: all zeroes is a valid completion; the hardware is there.
            let mut batch: [ibv_wc; BATCH] = unsafe { std::mem::zeroed() };
            // SAFETY: the batch has room.
            let got = unsafe { (state.poll)(state.hardware, BATCH as c_int, batch.as_mut_ptr()) };
            let got = usize::try_from(got).unwrap_or(0);
            for completion in &mut batch[..got] {
                if ours(completion) {
                    continue;
                }
                // SAFETY: a completion of this queue, polled just now.
                unsafe { self.hand_over(completion) };
                state.held.push_back(*completion);
                self.general.fetch_or(HELD, Ordering::Relaxed);
            }
            found += got as u64;
            if got < BATCH {
                return found;
            }
        }
    }

    /// Holds back a completion that the hardware never gave but the peer has proven.
    pub(crate) fn hold(&self, completion: ibv_wc) {
        let mut state = self.lock();
        state.held.push_back(completion);
        self.general.fetch_or(HELD, Ordering::Relaxed);
    }

    /// Hands an event on, unless the application has had all that it asked for. The caller holds `Process::events`.
    pub(crate) fn notify(&self) {
        let Some(channel) = &self.channel else { return };
        let mut state = self.lock();
        if state.events >= state.arms {
            return;
        }
        state.events += 1;
        drop(state);
        let pointer = (self.app().expose_provenance() as u64).to_ne_bytes();
        if channel.pipe.write(&pointer) {
            self.delivered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lets go of the hardware. Its queue pairs are gone and nothing is left in it.
    pub(crate) fn release(&self) -> Verb<()> {
        let mut state = self.lock();
        let hardware = std::mem::replace(&mut state.hardware, std::ptr::null_mut());
        state.poll = poll_nothing;
        drop(state);
        if hardware.is_null() {
            return Ok(());
        }
        // SAFETY: the device's own, which nobody can reach any more.
        Errno::check(unsafe { (self.context.verbs.ibv_destroy_cq)(hardware) })
    }

    /// Takes a fresh one.
    pub(crate) fn rebuild(&self) -> Verb<()> {
        let mut state = self.lock();
        let channel = self
            .channel
            .as_ref()
            .map_or(std::ptr::null_mut(), |channel| channel.hardware());
        let verbs = self.context.verbs;
        let (device, own) = (
            self.context.hardware(),
            std::ptr::from_ref(self).cast_mut().cast(),
        );
        // SAFETY: the context is open; `self` keeps its address until the hardware's queue is destroyed.
        unsafe {
            let hardware = match &self.extended {
                None => verbs.pointer((verbs.ibv_create_cq)(
                    device,
                    state.capacity,
                    own,
                    channel,
                    self.vector,
                ))?,
                Some(extended) => {
                    let mut attr = extended.attributes(state.capacity, own, channel, self.vector);
                    verbs.create_cq_ex(device, &mut attr)?
                }
            };
            state.poll = (*(*hardware).context)
                .ops
                .poll_cq
                .ok_or(Errno::NOT_SUPPORTED)?;
            state.hardware = hardware;
        }
        Ok(())
    }

    /// After a restart: numbers may differ.
    pub(crate) fn translate_numbers(&self) {
        let _state = self.lock();
        self.general.fetch_or(TRANSLATE, Ordering::Relaxed);
    }

    /// An armed queue fires. (docs/events.md, "Armed or not", says why.) The caller holds `Process::events`.
    pub(crate) fn notify_armed(&self) {
        let mut state = self.lock();
        if state.arms > state.events {
            state.events = state.arms - 1;
            drop(state);
            self.notify();
        }
    }
}

/// Was this completion made by moving a queue pair to the error state?
pub(crate) fn is_flushed(completion: &ibv_wc) -> bool {
    completion.status == IBV_WC_WR_FLUSH_ERR
}
