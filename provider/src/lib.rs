//! The door: a libibverbs provider, C in and C out.
//!
//! Nothing but this crate knows libibverbs' private interface. `release` has what differs between its releases, `register`
//! makes it load us, `verbs` are the operations it calls, and `native` is the second libibverbs that drives the hardware.

mod extended_cq;
mod extended_qp;
mod fork;
mod journal;
mod native;
pub mod register;
pub mod release;
mod verbs;
#[cfg(test)]
mod verbs_page;
