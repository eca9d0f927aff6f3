//! The virtual device on a fabric that exists only here, where a test says what happens and when.
//!
//! [`fabric`] is a device of all three transports: it executes a message packet by packet, acknowledges it only when it is told
//! to, and loses what is not acknowledged when it is told to, so a checkpoint can meet a connection in every state there is. Its
//! numbers come from a small pool in a random order, so fresh hardware is handed numbers that others had. [`program`] is an
//! application over the virtual device on it, which knows what must have happened; [`cycle`] takes it through a checkpoint, phase
//! by phase, under orchestrators that may die. Nothing depends on time, or on threads that are not waited for; [`apart`] gives each
//! program a process of its own.

pub mod apart;
pub mod cycle;
mod events;
pub mod fabric;
pub mod program;
pub mod verbs;
