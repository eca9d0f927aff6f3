//! The locks of the queues (`src/virt/lock.rs`), made of shuttle's atomics instead of the processor's: a few threads that post, poll and
//! close are run in thousands of orders of events, of which each can be repeated. (Every access is seen by all at once: what a processor
//! may make of a relaxed access is not explored.)
//!
//! The queues here are as small as they can be: a log, the hardware below, and the word. What a post and a poll do with the lock and
//! the word is what `queue_pair/post.rs` and `completion_queue/poll.rs` do; taking, closing and stepping aside is their very code.

mod exclusive;
#[allow(dead_code, reason = "the product's, of which not all is needed here")]
#[path = "../../../src/virt/lock.rs"]
mod lock;
pub mod receive;
pub mod send;
mod sync;
