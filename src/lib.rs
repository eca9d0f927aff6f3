//! Checkpoint and restart for RDMA applications, below the verbs API.
//!
//! A verb comes in through the door (the `provider` crate), meets the virtual device here, and goes on to a device below:
//! see docs/architecture.md for the way of a verb and the way of a checkpoint.

pub mod agent;
mod checkpoint;
pub mod control;
pub mod device;
pub mod errno;
pub mod handle;
pub mod image;
pub mod log;
pub mod translate;
pub mod virt;
