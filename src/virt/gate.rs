//! The gate of the control verbs (create, modify, query, register, destroy).
//!
//! A control verb is inside from before its inner call until its object is registered, so that a closed gate means:
//! the registry and the hardware agree. While it is closed, control verbs wait; nothing else tells the application.
//! (The data path has gates of its own, one in each queue: `queue_pair`, `completion_queue`.)

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub(crate) struct ControlGate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    inside: u32,
}

/// A control verb that is inside.
#[derive(Debug)]
pub(crate) struct Inside<'a>(&'a ControlGate);

impl ControlGate {
    pub(crate) const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                closed: false,
                inside: 0,
            }),
            changed: Condvar::new(),
        }
    }

    /// Waits until the gate is open.
    pub(crate) fn enter(&self) -> Inside<'_> {
        let mut state = self.lock();
        while state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
        Inside(self)
    }

    /// Closes, and waits for those inside to leave; opens again and gives `false` if they do not within `limit`.
    pub(crate) fn close(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        state.closed = true;
        while state.inside > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.closed = false;
                self.changed.notify_all();
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    pub(crate) fn open(&self) {
        self.lock().closed = false;
        self.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.lock().inside -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::ControlGate;

    #[test]
    fn closing_waits_for_those_inside_and_gives_up_in_time() {
        let gate = ControlGate::new();
        let inside = gate.enter();
        assert!(!gate.close(Duration::from_millis(5)));
        drop(inside);
        assert!(gate.close(Duration::from_millis(5)));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(gate.enter()));
            assert!(!waiting.is_finished());
            gate.open();
            waiting.join().unwrap();
        });
    }
}
