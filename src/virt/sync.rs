//! What the locks are made of. `tests/locks` has the same names of shuttle instead, and tries many orders of events.

pub(super) use std::hint::spin_loop;
pub(super) use std::sync::atomic::{AtomicU32, Ordering};
pub(super) use std::thread::yield_now;
pub(super) use std::time::Instant;

/// How often to try a lock before the processor is given to somebody else.
pub(super) const SPINS: u32 = 128;
