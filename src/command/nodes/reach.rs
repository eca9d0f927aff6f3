//! What the tree of connections is made of: so that it can also be grown without hosts.

use std::fmt::Debug;
use std::io;

use anyhow::Result;

use super::relay::{Answers, Call};
use crate::command::job::NodeId;
use crate::command::node::{NodeReply, NodeRequest, Part};

/// What a node does itself.
pub(crate) trait Handle: Debug {
    /// Does what is asked.
    ///
    /// # Errors
    /// Why it was not done, for people.
    fn handle(&mut self, request: &NodeRequest) -> Result<NodeReply>;
}

impl Handle for Part {
    fn handle(&mut self, request: &NodeRequest) -> Result<NodeReply> {
        Self::handle(self, request)
    }
}

/// How a node gets connections to others.
pub(crate) trait Reach: Debug + Sync {
    type Connection: Ask;

    /// Reaches the first of `chunk`, which then reaches the others. Gives what all of them say.
    ///
    /// # Errors
    /// The first cannot be reached.
    fn open(&self, chunk: &[(NodeId, String)]) -> Result<(Self::Connection, Answers)>;
}

/// A connection to a node that can be asked.
pub(crate) trait Ask: Debug + Send {
    /// What it and those behind it say.
    ///
    /// # Errors
    /// It has ended, or is silent.
    fn ask(&mut self, call: &Call) -> io::Result<Answers>;
}
