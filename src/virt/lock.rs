//! The lock of a queue: one atomic decrement to take, one store to give back.
//!
//! Held for the length of one inner post or poll. The agent takes every one of them to close the gate, so a thread that
//! is stopped inside must not make it wait for ever: [`QueueLock::lock_before`].

use std::arch::asm;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// How often to try before the processor is given to somebody else.
const SPINS: u32 = 128;

/// 1 is free. Whoever takes it away has the lock; whoever finds it gone leaves a number below, which giving back mends.
#[derive(Debug)]
pub(crate) struct QueueLock(AtomicU32);

const FREE: u32 = 1;

impl Default for QueueLock {
    fn default() -> Self {
        Self(AtomicU32::new(FREE))
    }
}

/// Gives the lock back when dropped.
#[derive(Debug)]
pub(crate) struct QueueGuard<'a>(&'a QueueLock);

impl QueueLock {
    #[inline(always)]
    pub(crate) fn lock(&self) -> QueueGuard<'_> {
        if !self.take() {
            self.wait(None);
        }
        QueueGuard(self)
    }

    /// `None` if somebody has it. For the hot path, which leaves the waiting to a function that it does not come back from,
    /// and so has nothing to save for afterwards.
    #[inline(always)]
    pub(crate) fn try_lock(&self) -> Option<QueueGuard<'_>> {
        self.take().then(|| QueueGuard(self))
    }

    /// The guard of a lock that was taken by a caller who forgot the guard.
    ///
    /// # Safety
    /// There is no other guard.
    pub(crate) unsafe fn adopt(&self) -> QueueGuard<'_> {
        QueueGuard(self)
    }

    /// Gives back a lock whose guard was forgotten.
    ///
    /// # Safety
    /// There is no other guard.
    #[inline(always)]
    pub(crate) unsafe fn give_back(&self) {
        self.0.store(FREE, Ordering::Release);
    }

    /// `None` if the lock could not be had before `limit`.
    pub(crate) fn lock_before(&self, limit: Instant) -> Option<QueueGuard<'_>> {
        (self.take() || self.wait(Some(limit))).then_some(QueueGuard(self))
    }

    /// One decrement, whose flags tell.
    #[inline(always)]
    fn take(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Acquire) == FREE
    }

    #[cold]
    fn wait(&self, limit: Option<Instant>) -> bool {
        loop {
            for _ in 0..SPINS {
                if self.0.load(Ordering::Relaxed) == FREE && self.take() {
                    return true;
                }
                spin_loop();
            }
            if limit.is_some_and(|limit| Instant::now() >= limit) {
                return false;
            }
            std::thread::yield_now();
        }
    }
}

/// The same pointer. The compiler no longer knows that addresses behind it were computed before, and so folds them into the
/// instructions that use them instead of keeping them: three instructions less.
#[inline(always)]
#[allow(
    clippy::pointers_in_nomem_asm_block,
    reason = "no memory is touched: there is no instruction in it"
)]
pub(crate) fn forget_origin<T>(mut pointer: *mut T) -> *mut T {
    // SAFETY: there is no instruction in it.
    unsafe {
        asm!("/* {0} */", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags));
    }
    pointer
}

impl Drop for QueueGuard<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: this is the guard, and it is going.
        unsafe { self.0.give_back() };
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::QueueLock;

    #[test]
    fn a_holder_that_stays_makes_the_bounded_wait_fail() {
        let lock = QueueLock::default();
        let held = lock.lock();
        assert!(
            lock.lock_before(Instant::now() + Duration::from_millis(5))
                .is_none()
        );
        drop(held);
        assert!(lock.lock_before(Instant::now()).is_some());
    }

    #[test]
    fn only_one_thread_is_inside() {
        let lock = QueueLock::default();
        let inside = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let _held = lock.lock();
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::Relaxed), 0);
                        inside.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
                    }
                });
            }
        });
    }
}
