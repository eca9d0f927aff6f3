//! The lock of a queue, taken by real threads. (`tests/locks` tries many orders of events.)

use std::time::{Duration, Instant};

use super::lock::QueueLock;

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
