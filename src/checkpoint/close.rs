//! Closing and opening the gates.

use std::time::{Duration, Instant};

use super::Phase;
use super::drain::{each_completion_queue, each_pair};
use super::examine::memory_windows;
use crate::virt::completion_queue::CompletionQueue;
use crate::virt::process::process;

/// Closes all gates. On failure they are all open again.
pub(crate) fn close(limit: Duration) -> Phase<()> {
    let process = process();
    if !process.gate.close(limit) {
        return Err(
            "a thread has stayed inside a control verb; is it stopped, or in a debugger?".into(),
        );
    }
    // Asked for here once more: one may have been made since Examine, and from here on none is.
    if let Some(window) = memory_windows().into_iter().next() {
        process.gate.open();
        return Err(window);
    }
    let until = Instant::now() + limit;
    for context in &process.contexts() {
        let objects = context.objects();
        // SAFETY: the gate is closed, so nothing is destroyed.
        let stuck = unsafe {
            let pair = objects
                .queue_pairs
                .iter()
                .find(|(_, pair)| !pair.get().close(until));
            let pair = pair.map(|(_, pair)| format!("queue pair {:#x}", pair.get().number().0));
            pair.or_else(|| {
                let queue = objects
                    .shared_queues
                    .iter()
                    .find(|(_, queue)| !queue.get().queue.check(until));
                queue.map(|_| "a shared receive queue".into())
            })
            .or_else(|| {
                let queue = objects
                    .completion_queues
                    .iter()
                    .find(|(_, queue)| !queue.get().close(until));
                queue.map(|_| "a completion queue".into())
            })
        };
        drop(objects);
        if let Some(stuck) = stuck {
            let reopened = reopen();
            let what = format!(
                "a thread has stayed inside a post or poll of {stuck}; is it stopped, or in a debugger?"
            );
            return Err(reopened
                .err()
                .map_or(what.clone(), |error| format!("{what} And: {error}")));
        }
    }
    Ok(())
}

/// Opens all gates, after what is held went down; whatever cannot go down is said, and the gates are open all the same. Whoever waits
/// for an event gets one: it may have found a closed queue empty that was not.
pub(crate) fn reopen() -> Phase<()> {
    let process = process();
    let mut failed = Vec::new();
    each_completion_queue(CompletionQueue::open);
    each_pair(|_, pair| {
        if let Err(error) = pair.open() {
            failed.push(format!("queue pair {:#x}: {error}", pair.number().0));
        }
        Ok(())
    })?;
    notify_armed();
    process.gate.open();
    if failed.is_empty() {
        Ok(())
    } else {
        Err(format!("held sends were refused: {}", failed.join("; ")))
    }
}

/// Not before the queues are open: whoever wakes up polls, and asks for the next event if it finds nothing.
fn notify_armed() {
    let _events = process().events();
    each_completion_queue(CompletionQueue::notify_armed);
}

/// After a rebuild: numbers may differ; then the gates open.
pub(crate) fn resume() -> Phase<()> {
    each_completion_queue(CompletionQueue::translate_numbers);
    reopen()
}
