//! A completion queue: what the hardware has is polled, or held back while the queue is closed, and then served first.

use std::collections::VecDeque;

use crate::exclusive::Exclusive;
use crate::lock::{QueueGuard, QueueLock, WANTED, close};
use crate::sync::{AtomicU32, Instant, Ordering};

const HELD: u32 = 1;
const CLOSED: u32 = 2;

/// The queue.
#[derive(Debug)]
pub struct CompletionQueue {
    lock: QueueLock,
    word: AtomicU32,
    state: Exclusive<State>,
}

#[derive(Debug)]
struct State {
    hardware: VecDeque<u32>,
    held: VecDeque<u32>,
    closed: bool,
}

impl CompletionQueue {
    /// Of hardware that has so many completions, numbered from 1.
    #[must_use]
    pub fn new(completions: u32) -> Self {
        Self {
            lock: QueueLock::default(),
            word: AtomicU32::new(0),
            state: Exclusive::new(State {
                hardware: (1..=completions).collect(),
                held: VecDeque::new(),
                closed: false,
            }),
        }
    }

    /// As `completion_queue::poll`.
    pub fn poll(&self) -> Option<u32> {
        let guard = match self.lock.try_lock() {
            Some(guard) if self.word.load(Ordering::Relaxed) == 0 => {
                return self.poll_hardware(&guard);
            }
            Some(guard) => guard,
            None => self.lock.lock(),
        };
        let word = self.word.load(Ordering::Relaxed);
        if word & WANTED != 0 {
            drop(guard);
            shuttle::thread::yield_now();
            return None;
        }
        if word & HELD != 0 {
            return self.with(&guard, |state| {
                let first = state.held.pop_front();
                if state.held.is_empty() {
                    self.word.fetch_and(!HELD, Ordering::Relaxed);
                }
                first
            });
        }
        match word & CLOSED {
            0 => self.poll_hardware(&guard),
            _ => None,
        }
    }

    fn poll_hardware(&self, guard: &QueueGuard<'_>) -> Option<u32> {
        self.with(guard, |state| {
            assert!(!state.closed, "a poll goes down past the gate");
            assert!(state.held.is_empty(), "a poll overtakes what is held back");
            state.hardware.pop_front()
        })
    }

    /// As `CompletionQueue::close`.
    pub fn close(&self, looks: u32) -> bool {
        close(&self.lock, &self.word, CLOSED, Instant(looks), || {
            self.state.with(|state| state.closed = true);
        })
    }

    /// As `CompletionQueue::drain`.
    pub fn drain(&self) {
        let guard = self.lock.lock();
        self.with(&guard, |state| {
            if let Some(first) = state.hardware.pop_front() {
                state.held.push_back(first);
                self.word.fetch_or(HELD, Ordering::Relaxed);
            }
        });
    }

    /// As `CompletionQueue::open`.
    pub fn open(&self) {
        let guard = self.lock.lock();
        self.with(&guard, |state| state.closed = false);
        self.word.fetch_and(!CLOSED, Ordering::Relaxed);
    }

    fn with<T>(&self, _: &QueueGuard<'_>, work: impl FnOnce(&mut State) -> T) -> T {
        self.state.with(work)
    }
}
