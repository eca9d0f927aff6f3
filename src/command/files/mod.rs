//! Files that CRIU expects to find at a restore, and how they come to be there.
//!
//! CRIU saves the contents of deleted files and of memory, but no file that has a name: it opens those by name and checks
//! their size. Two kinds need help. Files on *volatile* file systems (`volatile`) are gone after a reboot or on another host:
//! they are carried in the image (`carry`). Files that a process writes to may have grown since: their length is kept, and
//! they are cut back (`written`). What a process holds is found in `held`.

mod carry;
mod held;
mod volatile;
mod written;

pub(crate) use carry::{carry, put_back};
pub(crate) use held::{Held, survey};
#[cfg(test)]
pub(crate) use held::{HeldDevice, HeldPipe};
pub(crate) use volatile::Volatility;
pub(crate) use written::{cut_back, record};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What a restart does with a file that is there and is not as it was at the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum FilePolicy {
    /// Make it as it was, and keep what it had beyond that in a file beside it.
    #[default]
    Cut,
    /// Leave it; CRIU may then refuse.
    Keep,
    /// Fail, naming it.
    Refuse,
}
