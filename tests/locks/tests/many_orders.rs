//! What must hold in whatever order the threads of a program and the agent come.

use reverbs_locks::receive::CompletionQueue;
use reverbs_locks::send::SendQueue;
use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;

/// Looks at the clock that are enough for whoever does not wait for somebody that stays.
const ENOUGH: u32 = 1000;

/// In orders that are chosen at random, and in some in which threads are interrupted rarely, but where it hurts (PCT).
fn in_many_orders(work: impl Fn() + Send + Sync + Clone + 'static) {
    shuttle::check_random(work.clone(), 1000);
    shuttle::check_pct(work, 1000, 3);
}

#[test]
fn what_two_threads_post_goes_down_as_it_was_logged() {
    in_many_orders(|| {
        let queue = Arc::new(SendQueue::default());
        let other = Arc::clone(&queue);
        let posting = thread::spawn(move || other.post(1));
        queue.post(2);
        posting.join().unwrap();
        let hardware = queue.hardware();
        assert_eq!(hardware, queue.logged());
        assert_eq!(hardware.len(), 2);
    });
}

#[test]
fn nothing_goes_down_between_close_and_open_and_then_all_does_in_order() {
    in_many_orders(|| {
        let queue = Arc::new(SendQueue::default());
        let posts = Arc::clone(&queue);
        let posting = thread::spawn(move || (1..=3).for_each(|request| posts.post(request)));
        assert!(queue.close(ENOUGH), "nobody stays inside");
        let before = queue.hardware();
        thread::yield_now();
        assert_eq!(before, queue.hardware());
        queue.open();
        posting.join().unwrap();
        assert_eq!(queue.hardware(), [1, 2, 3]);
        assert_eq!(queue.logged(), [1, 2, 3]);
    });
}

#[test]
fn two_threads_that_post_do_not_keep_the_agent_out() {
    in_many_orders(|| {
        let queue = Arc::new(SendQueue::default());
        let posting = [10, 20].map(|first| {
            let posts = Arc::clone(&queue);
            thread::spawn(move || {
                posts.post(first);
                posts.post(first + 1);
            })
        });
        assert!(queue.close(ENOUGH), "nobody stays inside");
        let before = queue.hardware();
        thread::yield_now();
        assert_eq!(before, queue.hardware());
        queue.open();
        for posting in posting {
            posting.join().unwrap();
        }
        let hardware = queue.hardware();
        assert_eq!(hardware, queue.logged());
        for first in [10, 20] {
            let own = hardware
                .iter()
                .filter(|request| **request / 10 == first / 10);
            assert_eq!(own.copied().collect::<Vec<_>>(), [first, first + 1]);
        }
    });
}

#[test]
fn a_thread_that_stays_inside_makes_closing_fail_and_nothing_else() {
    in_many_orders(|| {
        let queue = Arc::new(SendQueue::default());
        let (inside, given_up) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        );
        let (stays, inside_now, until) = (
            Arc::clone(&queue),
            Arc::clone(&inside),
            Arc::clone(&given_up),
        );
        let staying = thread::spawn(move || {
            stays.stay_until(|| {
                inside_now.store(true, Ordering::Release);
                until.load(Ordering::Acquire)
            });
            stays.post(1);
        });
        while !inside.load(Ordering::Acquire) {
            thread::yield_now();
        }
        assert!(!queue.close(3), "somebody is inside");
        given_up.store(true, Ordering::Release);
        staying.join().unwrap();
        queue.post(2);
        assert_eq!(queue.hardware(), [1, 2]);
    });
}

#[test]
fn completions_come_once_and_in_order_whoever_takes_them_from_the_hardware() {
    in_many_orders(|| {
        let queue = Arc::new(CompletionQueue::new(3));
        let polls = Arc::clone(&queue);
        let polling = thread::spawn(move || {
            let mut found = Vec::new();
            for _ in 0..3 {
                found.extend(polls.poll());
            }
            found
        });
        assert!(queue.close(ENOUGH), "nobody stays inside");
        queue.drain();
        queue.open();
        let mut found = polling.join().unwrap();
        while let Some(completion) = queue.poll() {
            found.push(completion);
        }
        assert_eq!(found, [1, 2, 3]);
    });
}
