//! What the driver asks of the agents of a job, wherever they are.

use std::time::Instant;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use reverbs::control::message::{HardwarePeer, Phase, ProcessNumbers, Reply, Request, Session};
use reverbs::control::owner::Whose;

use super::place::{NodeId, ProcessId};

/// What an agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) process: ProcessId,
    pub(crate) phase: Phase,
    pub(crate) session: Option<Session>,
}

/// An agent that does not answer, or speaks another version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unreachable {
    pub(crate) process: ProcessId,
    pub(crate) why: String,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AgentFailure {
    /// The process, or its agent, is not there any more.
    Ended,
    /// It is there but did not answer in time, or not in our language.
    Broken(String),
}

/// Whoever can be asked: the processes of all nodes of a job, or actors in a test.
pub(crate) trait Agents {
    /// All agents of the job that there are now; or why one that is there cannot be spoken to.
    fn scan(&mut self) -> Vec<Result<Hello, Unreachable>>;

    /// Asks all of `targets` the same, at the same time.
    fn ask(
        &mut self,
        targets: &[ProcessId],
        request: &Request,
    ) -> Vec<(ProcessId, Result<Reply, AgentFailure>)>;

    /// What the time is where they are.
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// What people call a process: its id, and its node where there are several.
    fn name(&self, process: ProcessId) -> String;

    /// Whether the orchestrator of a session is still there.
    fn is_alive(&self, session: &Session) -> bool;

    /// Leaves the numbers of the job for processes that open their first device later.
    ///
    /// # Errors
    /// They cannot be left.
    fn publish(&mut self, numbers: &[ProcessNumbers]) -> Result<()>;

    /// Who has a queue pair that is none of the job's. `device` is one of the job that has its address, if one has.
    ///
    /// # Errors
    /// A host cannot be asked.
    fn whose(&mut self, peer: &HardwarePeer, device: Option<(NodeId, &str)>) -> Result<Whose>;
}
