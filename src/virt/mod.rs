//! The virtual device: the objects the application holds, and the verbs on them.
//!
//! Each object is allocated once, keeps its address for life, and points at the hardware object that stands for it now.
//! What every verb obeys is in docs/architecture.md: control verbs go through the gate (`gate`), the data path through
//! the lock of its queue (`lock`), and a hardware pointer is only followed under one of the two.
//!
//! This is, with `log`, the place where memory is shared with the application and with the device: unsafe code is here,
//! not above.

pub mod address_handle;
mod app;
pub mod channel;
pub mod completion_queue;
pub mod context;
pub mod fork;
pub(crate) mod gate;
mod local_key;
mod lock;
#[cfg(test)]
mod lock_tests;
pub mod memory_region;
pub mod memory_window;
mod own_pair;
pub mod ports;
pub mod process;
pub mod protection_domain;
pub mod queue_pair;
mod receive_queue;
mod responder;
pub mod shared_receive_queue;
mod sync;

pub use app::{AppCq, AppMr, AppQp, AppSrq};
