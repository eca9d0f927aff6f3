//! The phases of a checkpoint inside a process, in the order in which they are entered.
//!
//! Each is asked for by the orchestrator (`control`), carried out by the agent's thread, and leaves the process in one of
//! the phases of [`crate::control::message::Phase`]. docs/checkpoint.md has the why.

mod close;
mod drain;
mod examine;
mod needs;
mod peers;
mod rebuild;
mod release;
mod status;

pub(crate) use close::{close, reopen, resume};
pub(crate) use drain::{Stopped, drain, responders, settle, stop};
pub(crate) use examine::{examine, numbers_bytes};
pub(crate) use peers::{Outside, peers, require_datagrams_inside};
pub(crate) use rebuild::{connect, numbers, rebuild};
pub(crate) use release::{Let, release};
pub(crate) use status::status;

/// Why a phase could not be entered, in words for the user.
pub(crate) type Phase<T> = Result<T, String>;
