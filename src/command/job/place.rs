//! Which process of which node.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A node of a job, by its place in the job's list; the first is the one where the job was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct NodeId(pub(crate) u32);

impl NodeId {
    pub(crate) const FIRST: Self = Self(0);
}

/// A process of a job. Its id alone does not tell: each node has ids of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) node: NodeId,
    pub(crate) pid: i32,
}

impl fmt::Display for ProcessId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "process {}", self.pid)?;
        if self.node != NodeId::FIRST {
            write!(out, " of node {}", self.node.0)?;
        }
        Ok(())
    }
}
