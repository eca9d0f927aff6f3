//! A job over several nodes: how the first node reaches the others, and speaks with all of them. docs/nodes.md has the whole
//! of it.
//!
//! `launcher` starts a command on another node by what the user has for that; `channel` is an authenticated connection over
//! its standard input and output; `relay` is one node in the tree of connections, and what it does for those behind it (`reach`:
//! over what);
//! `copy` brings parts of an image from and to nodes that do not share a disk; `stream` are limits of waiting;
//! `serve` is what runs on the other nodes; `record` remembers which nodes a job has; `start` puts its processes there, when the
//! launcher of the MPI library asks for it (`hooks`);
//! `ensemble` is the whole job as the commands see it.

mod channel;
mod copy;
mod ensemble;
mod hooks;
mod launcher;
mod reach;
mod record;
mod relay;
#[cfg(test)]
mod scale;
mod serve;
pub(crate) mod start;
mod stream;

pub(crate) use copy::{Direction, Parcel, copy_all, serve_copy};
pub(crate) use ensemble::Ensemble;
pub(crate) use launcher::Launcher;
pub(crate) use record::{JobRecord, RecordedNode};
pub(crate) use serve::serve;
