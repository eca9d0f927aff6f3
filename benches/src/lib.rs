//! What the virtual device adds to a verb, measured over a device that does nothing.
//!
//! [`null_device`] is the device: its verbs remember a request and give it back as a completion, nothing else. [`door`] are
//! the operations that the provider hands to libibverbs, and [`application`] is a program that posts and polls, either over
//! the device itself or over the virtual device in between. [`restart`] replaces the hardware under it, through the agent's
//! socket, as the `reverbs` command does. docs/performance.md has the figures.

pub mod application;
pub mod door;
mod extended;
pub mod null_device;
pub mod restart;
pub mod shape;
