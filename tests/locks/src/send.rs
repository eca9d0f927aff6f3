//! A send queue: what is posted is logged and goes down at once, or is held while the queue is closed.

use crate::exclusive::Exclusive;
use crate::lock::{QueueGuard, QueueLock, close, step_aside};
use crate::sync::{AtomicU32, Instant, Ordering};

const HOLD: u32 = 1;

/// The queue.
#[derive(Debug)]
pub struct SendQueue {
    lock: QueueLock,
    word: AtomicU32,
    state: Exclusive<State>,
}

/// What is changed under the lock alone.
#[derive(Debug, Default)]
struct State {
    log: Vec<u32>,
    hardware: Vec<u32>,
    held_from: Option<usize>,
    closed: bool,
}

impl Default for SendQueue {
    fn default() -> Self {
        Self {
            lock: QueueLock::default(),
            word: AtomicU32::new(0),
            state: Exclusive::new(State::default()),
        }
    }
}

impl SendQueue {
    /// As `queue_pair::post_send`.
    pub fn post(&self, request: u32) {
        let guard = match self.lock.try_lock() {
            Some(guard) if self.word.load(Ordering::Relaxed) == 0 => {
                self.post_plain(guard, request);
                return;
            }
            Some(guard) => guard,
            None => self.lock.lock(),
        };
        let guard = step_aside(&self.lock, &self.word, guard);
        if self.word.load(Ordering::Relaxed) & HOLD == 0 {
            self.post_plain(guard, request);
            return;
        }
        self.with(&guard, |state| {
            state.held_from.get_or_insert(state.log.len());
            state.log.push(request);
        });
    }

    fn post_plain(&self, guard: QueueGuard<'_>, request: u32) {
        self.with(&guard, |state| {
            assert!(!state.closed, "a post goes down past the gate");
            state.log.push(request);
            state.hardware.push(request);
        });
    }

    /// As `SendQueue::close`, by an agent that looks at the clock so often.
    pub fn close(&self, looks: u32) -> bool {
        close(&self.lock, &self.word, HOLD, Instant(looks), || {
            self.state.with(|state| state.closed = true);
        })
    }

    /// As `SendQueue::open`.
    pub fn open(&self) {
        let guard = self.lock.lock();
        self.word.fetch_and(!HOLD, Ordering::Relaxed);
        self.with(&guard, |state| {
            state.closed = false;
            let held = state.held_from.take().unwrap_or(state.log.len());
            state.hardware.extend_from_slice(&state.log[held..]);
        });
    }

    /// What the hardware has, in order.
    pub fn hardware(&self) -> Vec<u32> {
        let guard = self.lock.lock();
        self.with(&guard, |state| state.hardware.clone())
    }

    /// What was logged, in order.
    pub fn logged(&self) -> Vec<u32> {
        let guard = self.lock.lock();
        self.with(&guard, |state| state.log.clone())
    }

    /// Stays inside until `gone` says so.
    pub fn stay_until(&self, gone: impl Fn() -> bool) {
        let _guard = self.lock.lock();
        while !gone() {
            shuttle::thread::yield_now();
        }
    }

    fn with<T>(&self, _: &QueueGuard<'_>, work: impl FnOnce(&mut State) -> T) -> T {
        self.state.with(work)
    }
}
