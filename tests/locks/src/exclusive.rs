//! What one thread at a time may touch.

use std::cell::UnsafeCell;

use shuttle::sync::atomic::{AtomicBool, Ordering};

/// Memory that says so when a second thread comes.
#[derive(Debug)]
pub(crate) struct Exclusive<T> {
    inside: AtomicBool,
    memory: UnsafeCell<T>,
}

// SAFETY: `with` lets nobody in while somebody is inside.
unsafe impl<T: Send> Sync for Exclusive<T> {}

impl<T> Exclusive<T> {
    pub(crate) fn new(memory: T) -> Self {
        Self {
            inside: AtomicBool::new(false),
            memory: UnsafeCell::new(memory),
        }
    }

    /// Works on the memory; others may run meanwhile.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let another = self.inside.swap(true, Ordering::SeqCst);
        assert!(!another, "two threads hold one lock");
        // SAFETY: nobody else is inside.
        let result = work(unsafe { &mut *self.memory.get() });
        self.inside.store(false, Ordering::SeqCst);
        result
    }
}
