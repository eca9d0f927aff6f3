//! The time on one simulated node, and what it has sent and received.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

thread_local! {
    /// The clock for which this thread has opened a connection last, when that was asked, and until when it took.
    static OPENED: Cell<(usize, Duration, Duration)> = const { Cell::new((0, Duration::ZERO, Duration::ZERO)) };
}

/// A node is asked one thing at a time. All that it has others do for that begins when it was asked, and it is done with the
/// last of them; so threads may note their ends in any order.
#[derive(Debug, Default)]
pub(super) struct Clock {
    asked: AtomicU64,
    /// Connections that were lost are opened before anything else is done.
    opened: AtomicU64,
    done: AtomicU64,
}

/// Messages and bytes in both directions.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Clock {
    pub(super) fn ask_at(&self, at: Duration) {
        for each in [&self.asked, &self.opened, &self.done] {
            each.store(nanoseconds(at), Relaxed);
        }
    }

    pub(super) fn asked(&self) -> Duration {
        Duration::from_nanos(self.asked.load(Relaxed))
    }

    /// When what was asked can be begun.
    pub(super) fn begun(&self) -> Duration {
        Duration::from_nanos(self.opened.load(Relaxed))
    }

    pub(super) fn done(&self) -> Duration {
        Duration::from_nanos(self.done.load(Relaxed))
    }

    /// What one thread opens takes its time one after the other.
    pub(super) fn begun_by_this_thread(&self) -> Duration {
        match OPENED.get() {
            (clock, asked, opened) if (clock, asked) == (self.address(), self.asked()) => opened,
            _ => self.asked(),
        }
    }

    pub(super) fn opened_by_this_thread(&self, at: Duration) {
        OPENED.set((self.address(), self.asked(), at));
        self.opened.fetch_max(nanoseconds(at), Relaxed);
        self.busy_until(at);
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    pub(super) fn busy_until(&self, at: Duration) {
        self.done.fetch_max(nanoseconds(at), Relaxed);
    }
}

impl Traffic {
    pub(super) fn count(&self, bytes: u64) {
        self.messages.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    /// Since this was asked last.
    pub(super) fn take(&self) -> (u64, u64) {
        (self.messages.swap(0, Relaxed), self.bytes.swap(0, Relaxed))
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
