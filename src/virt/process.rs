//! What there is once in a process: the gate, the open contexts, what was learnt at the last restart.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    contexts: Mutex<Vec<&'static Context>>,
    channels: Mutex<Vec<Arc<Channel>>>,
    directory: Mutex<Option<Arc<Directory>>>,
    /// Held while an event is handed to the application, and while an object that events can name is destroyed.
    events: Mutex<()>,
    rebuilds: AtomicU64,
    translates: AtomicBool,
    /// This is a forked child: the hardware objects are its parent's.
    forked: AtomicBool,
}

static PROCESS: Process = Process {
    gate: ControlGate::new(),
    contexts: Mutex::new(Vec::new()),
    channels: Mutex::new(Vec::new()),
    directory: Mutex::new(None),
    events: Mutex::new(()),
    rebuilds: AtomicU64::new(0),
    translates: AtomicBool::new(false),
    forked: AtomicBool::new(false),
};

/// The virtual device of this process.
#[must_use]
pub fn process() -> &'static Process {
    &PROCESS
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// Open contexts, in the order in which they were opened.
    #[must_use]
    pub fn contexts(&self) -> Vec<&'static Context> {
        lock(&self.contexts).clone()
    }

    pub(crate) fn add_context(&self, context: &'static Context) {
        lock(&self.contexts).push(context);
    }

    pub(crate) fn remove_context(&self, context: &'static Context) {
        lock(&self.contexts).retain(|other| !std::ptr::eq(*other, context));
    }

    /// The context the application knows by this pointer.
    ///
    /// # Errors
    /// `EINVAL` if it is not one of ours.
    pub fn context(&self, app: *mut ibv_context) -> Verb<&'static Context> {
        lock(&self.contexts)
            .iter()
            .find(|context| context.app() == app)
            .copied()
            .ok_or(Errno::INVALID)
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

    /// # Errors
    /// `EIO` in a forked child, which owns no hardware.
    pub(crate) fn check_owner(&self) -> Verb<()> {
        if self.forked.load(Ordering::Acquire) {
            Err(Errno::IO)
        } else {
            Ok(())
        }
    }

    /// The calling process is a forked child.
    pub fn disown(&self) {
        self.forked.store(true, Ordering::Release);
    }

    /// In a forked child: the files that lead to the parent's hardware. Locks that another thread of the parent held at the
    /// fork are never given back here, so none is waited for.
    #[must_use]
    pub fn hardware_files_in_child(&self) -> Vec<HardwareFile> {
        let mut files = Vec::new();
        let mut add = |number, seen_by_application| {
            files.push(HardwareFile {
                number,
                seen_by_application,
            })
        };
        if let Ok(contexts) = self.contexts.try_lock() {
            for context in contexts.iter() {
                // SAFETY: the child has a copy of both objects; only numbers are read.
                unsafe {
                    add((*context.app()).cmd_fd, true);
                    if let Some(hardware) = context.hardware().as_ref() {
                        add(hardware.cmd_fd, false);
                        add(hardware.async_fd, false);
                    }
                }
            }
        }
        if let Ok(channels) = self.channels.try_lock() {
            // SAFETY: as above.
            let hardware = channels
                .iter()
                .filter_map(|channel| unsafe { channel.hardware().as_ref() });
            hardware.for_each(|hardware| add(hardware.fd, false));
        }
        files
    }

    #[must_use]
    pub fn is_disowned(&self) -> bool {
        self.forked.load(Ordering::Acquire)
    }
}

/// A file that leads to the hardware.
#[derive(Clone, Copy, Debug)]
pub struct HardwareFile {
    pub number: i32,
    /// The application may name this number, so it must stay open on something.
    pub seen_by_application: bool,
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
