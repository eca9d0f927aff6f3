//! Work that a thread of the application must do, because the kernel looks at who does it.
//!
//! A uverbs file accepts `write` only from a thread with the very credentials object it was opened with
//! (`ib_safe_file_access`), and some devices ring their doorbell by `write` (rxe). Threads of a process share that object
//! until CRIU restores them: then each has one of its own. So after a restore devices are opened, and held
//! sends posted, by the thread that uses them: the next one that polls, or waits in a control verb, while the gate is closed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::process::lock;

type Work = Box<dyn FnOnce() + Send>;

static WANTED: AtomicBool = AtomicBool::new(false);
static WORK: Mutex<Option<Work>> = Mutex::new(None);

/// Has `work` done by a thread of the application, or by the calling thread if none comes by within `limit`.
pub(crate) fn run<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let outcome = Arc::new((Mutex::new(None), Condvar::new()));
    let there = Arc::clone(&outcome);
    *lock(&WORK) = Some(Box::new(move || {
        let result = work();
        *lock(&there.0) = Some(result);
        there.1.notify_all();
    }));
    WANTED.store(true, Ordering::Release);
    let until = Instant::now() + limit;
    let mut result = lock(&outcome.0);
    loop {
        if let Some(result) = result.take() {
            return result;
        }
        let waited = outcome.1.wait_timeout(result, Duration::from_millis(20));
        result = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        if result.is_none() && Instant::now() >= until {
            drop(result);
            // Nobody came, unless the work is being done right now.
            if let Some(work) = take() {
                tracing::warn!(
                    "no thread of the application came by; devices that check who writes may refuse its sends"
                );
                work();
            }
            result = lock(&outcome.0);
        }
    }
}

/// Does the work, if there is any. Called where the application waits for us, with no lock held.
pub(crate) fn serve() {
    if WANTED.load(Ordering::Acquire)
        && let Some(work) = take()
    {
        work();
    }
}

fn take() -> Option<Work> {
    let work = lock(&WORK).take();
    WANTED.store(false, Ordering::Release);
    work
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    #[test]
    fn work_is_done_by_who_comes_by_or_else_by_the_caller() {
        let here = std::thread::current().id();
        assert_eq!(
            super::run(Duration::ZERO, || std::thread::current().id()),
            here
        );
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let seen = std::sync::Arc::clone(&stop);
        let other = std::thread::spawn(move || {
            while !seen.load(std::sync::atomic::Ordering::Relaxed) {
                super::serve();
                std::thread::yield_now();
            }
        });
        let by = super::run(Duration::from_secs(30), || std::thread::current().id());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(by, other.thread().id());
        other.join().unwrap();
    }
}
