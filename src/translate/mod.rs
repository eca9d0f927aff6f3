//! From virtual to hardware and back.
//!
//! Before the first restart nothing is in these tables and nobody looks. A restart fills them, all processes at once
//! (docs/identity.md). That a number "means itself" because it is younger than the restart is decided in one place for each
//! kind: [`Directory`], [`KeyTable::get`]'s callers.

mod directory;
mod keys;

pub use directory::{Address, Directory, Peer};
pub use keys::KeyTable;
