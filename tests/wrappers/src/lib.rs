//! A device around a device, which traces, delays, reorders, loses and fails as a [`plan`] says.
//!
//! It has the verbs of `reverbs::device::Verbs` under their names. Around a device made of software it is [`wrap`]ped. Around
//! real ones it is a shared library, which the provider loads in the place of the second libibverbs (`REVERBS_LIBIBVERBS`): it
//! opens that one itself, in the same link namespace, and reads its plan from `REVERBS_WRAPPER`.
//!
//! Callers keep the rules of the verbs: that is the SAFETY argument of every block that has no other.

mod completions;
mod data_path;
pub mod plan;
mod state;
mod verbs;

pub use state::{set_failing, wrap};
