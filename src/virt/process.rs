//! What there is once in a process: the gate, the open contexts, what was learnt at the last restart.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdma_core_sys::ibv_context;

use super::channel::Channel;
use super::context::Context;
use super::gate::ControlGate;
use crate::errno::{Errno, Verb};
use crate::translate::Directory;

/// The virtual device of this process.
#[derive(Debug)]
pub struct Process {
    pub(crate) gate: ControlGate,
    contexts: Mutex<Vec<Arc<Context>>>,
    /// Devices that are being opened or closed: their files are there, and the context is not.
    unsettled: AtomicU32,
    channels: Mutex<Vec<Arc<Channel>>>,
    directory: Mutex<Option<Arc<Directory>>>,
    /// Held while an event is handed to the application, and while an object that events can name is destroyed.
    events: Mutex<()>,
    rebuilds: AtomicU64,
    translates: AtomicBool,
    /// Of a forked child: what it has inherited and does not own.
    parent: Option<&'static Process>,
}

static FIRST: Process = Process::new(None);

static CURRENT: AtomicPtr<Process> = AtomicPtr::new((&raw const FIRST).cast_mut());

/// The virtual device of this process.
#[must_use]
pub fn process() -> &'static Process {
    // SAFETY: the first, or one that was leaked by `start_anew`.
    unsafe { &*CURRENT.load(Ordering::Relaxed) }
}

/// In a forked child: what was there is the parent's, and the child begins with nothing.
pub(super) fn start_anew() {
    let own = Box::leak(Box::new(Process::new(Some(process()))));
    CURRENT.store(own, Ordering::Relaxed);
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    const fn new(parent: Option<&'static Self>) -> Self {
        Self {
            gate: ControlGate::new(),
            contexts: Mutex::new(Vec::new()),
            unsettled: AtomicU32::new(0),
            channels: Mutex::new(Vec::new()),
            directory: Mutex::new(None),
            events: Mutex::new(()),
            rebuilds: AtomicU64::new(0),
            translates: AtomicBool::new(false),
            parent,
        }
    }

    /// Open contexts, in the order in which they were opened.
    #[must_use]
    pub fn contexts(&self) -> Vec<Arc<Context>> {
        lock(&self.contexts).clone()
    }

    pub(crate) fn add_context(&self, context: &Arc<Context>) {
        lock(&self.contexts).push(Arc::clone(context));
    }

    /// Says that a device is being opened or closed, until it is dropped.
    pub(crate) fn unsettle(&self) -> Unsettled<'_> {
        self.unsettled.fetch_add(1, Ordering::AcqRel);
        Unsettled(&self.unsettled)
    }

    /// A thread is inside of opening or closing a device.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.unsettled.load(Ordering::Acquire) > 0
    }

    pub(crate) fn remove_context(&self, context: &Arc<Context>) {
        lock(&self.contexts).retain(|other| !Arc::ptr_eq(other, context));
    }

    /// The context the application knows by this pointer.
    ///
    /// # Errors
    /// `EIO` if it was opened before this process was forked; `EINVAL` if it is not one of ours.
    pub fn context(&self, app: *mut ibv_context) -> Verb<Arc<Context>> {
        let own = lock(&self.contexts)
            .iter()
            .find(|context| context.app() == app)
            .cloned();
        own.ok_or(match self.has_inherited(app) {
            true => Errno::IO,
            false => Errno::INVALID,
        })
    }

    /// This process is a forked child and has got the context from its parent, which owns the hardware.
    pub(crate) fn has_inherited(&self, app: *mut ibv_context) -> bool {
        self.parent
            .is_some_and(|parent| !matches!(parent.context(app), Err(Errno::INVALID)))
    }

    /// Held around a fork, so that the child finds these in order: events, channels, contexts.
    pub(super) fn still(&'static self) -> Still {
        Still {
            _events: self.events(),
            channels: self.channels(),
            contexts: lock(&self.contexts),
        }
    }

    pub(crate) fn channels(&self) -> MutexGuard<'_, Vec<Arc<Channel>>> {
        lock(&self.channels)
    }

    /// Old and new numbers of the job; `None` before the first restart.
    #[must_use]
    pub fn directory(&self) -> Option<Arc<Directory>> {
        lock(&self.directory).clone()
    }

    pub(crate) fn learn(&self, directory: Arc<Directory>) {
        *lock(&self.directory) = Some(directory);
        self.translates.store(true, Ordering::Release);
    }

    pub(crate) fn events(&self) -> MutexGuard<'_, ()> {
        lock(&self.events)
    }

    /// How often the hardware was replaced.
    #[must_use]
    pub fn rebuilds(&self) -> u64 {
        self.rebuilds.load(Ordering::Acquire)
    }

    pub(crate) fn count_rebuild(&self) {
        self.rebuilds.fetch_add(1, Ordering::AcqRel);
        self.translates.store(true, Ordering::Release);
    }

    /// Virtual and hardware numbers may differ: the process, or the job before it came to it, was restarted.
    #[must_use]
    pub fn translates(&self) -> bool {
        self.translates.load(Ordering::Acquire)
    }
}

/// A device is being opened or closed.
#[derive(Debug)]
pub(crate) struct Unsettled<'a>(&'a AtomicU32);

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a process keeps still while it forks.
#[derive(Debug)]
pub(super) struct Still {
    _events: MutexGuard<'static, ()>,
    pub(super) channels: MutexGuard<'static, Vec<Arc<Channel>>>,
    pub(super) contexts: MutexGuard<'static, Vec<Arc<Context>>>,
}

/// A pointer to an object of ours in a registry. Registries are emptied of an object before it is freed.
#[derive(Debug)]
pub struct Registered<T>(pub(crate) NonNull<T>);

impl<T> Clone for Registered<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Registered<T> {}

// SAFETY: only the pointer moves between threads; what it points at is used under the gate or the object's locks.
unsafe impl<T> Send for Registered<T> {}

impl<T> Registered<T> {
    /// # Safety
    /// The object must not be freed while the reference is used: the gate must be held or closed.
    pub(crate) unsafe fn get<'a>(self) -> &'a T {
        // SAFETY: as the caller vouches.
        unsafe { self.0.as_ref() }
    }
}
