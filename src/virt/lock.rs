//! The lock of a queue: one exchange to take, one store to give back.
//!
//! Held for the length of one inner post or poll. The agent takes every one of them to close the gate, so a thread that
//! is stopped inside must not make it wait for ever: [`QueueLock::lock_before`].

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// How often to try before the processor is given to somebody else.
const SPINS: u32 = 128;

#[derive(Debug, Default)]
pub(crate) struct QueueLock(AtomicU32);

/// Gives the lock back when dropped.
#[derive(Debug)]
pub(crate) struct QueueGuard<'a>(&'a QueueLock);

impl QueueLock {
    #[inline(always)]
    pub(crate) fn lock(&self) -> QueueGuard<'_> {
        if self.0.swap(1, Ordering::Acquire) != 0 {
            self.wait(None);
        }
        QueueGuard(self)
    }

    /// `None` if the lock could not be had before `limit`.
    pub(crate) fn lock_before(&self, limit: Instant) -> Option<QueueGuard<'_>> {
        (self.0.swap(1, Ordering::Acquire) == 0 || self.wait(Some(limit)))
            .then_some(QueueGuard(self))
    }

    #[cold]
    fn wait(&self, limit: Option<Instant>) -> bool {
        loop {
            for _ in 0..SPINS {
                if self.0.load(Ordering::Relaxed) == 0 && self.0.swap(1, Ordering::Acquire) == 0 {
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

impl Drop for QueueGuard<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
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
