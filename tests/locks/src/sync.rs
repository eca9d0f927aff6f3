//! In the place of `src/virt/sync.rs`.

use std::cell::Cell;

pub(super) use shuttle::hint::spin_loop;
pub(super) use shuttle::sync::atomic::{AtomicU32, Ordering};
pub(super) use shuttle::thread::yield_now;

/// Whoever waits lets others run at once.
pub(super) const SPINS: u32 = 1;

/// A moment: how often this thread has looked at the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(pub(crate) u32);

shuttle::thread_local! {
    static LOOKS: Cell<u32> = Cell::new(0)
}

impl Instant {
    pub(super) fn now() -> Self {
        LOOKS.with(|looks| {
            looks.set(looks.get() + 1);
            Self(looks.get())
        })
    }
}
