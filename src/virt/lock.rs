//! The lock of a queue: one atomic decrement to take, one store to give back. And the word beside it, which every post and poll
//! looks at under the lock, and by which the agent closes the queue.
//!
//! The lock is held for the length of one inner post or poll. The agent takes every one of them to close the gate, so a thread that
//! is stopped inside must not make it wait for ever: [`QueueLock::lock_before`].

use std::arch::asm;

use super::sync::{AtomicU32, Instant, Ordering, SPINS, spin_loop, yield_now};

/// In the word of a queue: the agent wants the lock. A thread that posts or polls all the time would hardly ever leave it free.
pub(crate) const WANTED: u32 = 8;

/// Closes a queue: sets `bit` in its word, and does what there is to do at that moment. `false` if a thread stays inside; then the queue
/// is as it was.
pub(crate) fn close(
    lock: &QueueLock,
    word: &AtomicU32,
    bit: u32,
    limit: Instant,
    at_that_moment: impl FnOnce(),
) -> bool {
    word.fetch_or(WANTED, Ordering::Relaxed);
    let guard = lock.lock_before(limit);
    if guard.is_some() {
        word.fetch_or(bit, Ordering::Relaxed);
        at_that_moment();
    }
    word.fetch_and(!WANTED, Ordering::Relaxed);
    guard.is_some()
}

/// Leaves the lock to the agent as long as it wants it.
#[inline(always)]
pub(crate) fn step_aside<'a>(
    lock: &'a QueueLock,
    word: &AtomicU32,
    mut guard: QueueGuard<'a>,
) -> QueueGuard<'a> {
    while word.load(Ordering::Relaxed) & WANTED != 0 {
        drop(guard);
        yield_now();
        guard = lock.lock();
    }
    guard
}

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
            yield_now();
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
