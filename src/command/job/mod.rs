//! A job: the processes of one tree, the agents inside them, and the way through the phases.

mod agents;
mod driver;
#[cfg(test)]
mod driver_tests;
#[cfg(test)]
mod fake;
mod lock;
mod place;
mod sockets;
mod tree;

pub(crate) use agents::{AgentFailure, Agents, Hello, Unreachable};
pub(crate) use driver::Driver;
#[cfg(test)]
pub(crate) use fake::{FakeAgent, FakeJob, Mishap, barrier_before};
pub(crate) use lock::JobLock;
pub(crate) use place::{NodeId, ProcessId};
#[cfg(test)]
pub(crate) use sockets::patience;
pub(crate) use sockets::{SocketAgents, ask_once, listening};
#[cfg(test)]
pub(crate) use tree::Member;
pub(crate) use tree::{ProcessTree, is_reverbs, root_of};

pub(crate) use reverbs::control::owner::Whose;

use reverbs::control::message::Session;

/// A claim that no other orchestrator can make by accident.
///
/// # Errors
/// The kernel gives no random bytes.
pub(crate) fn new_session() -> anyhow::Result<Session> {
    let mut bytes = [0; 16];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    anyhow::ensure!(filled == bytes.len(), "too few random bytes");
    Ok(Session {
        id: format!("{:032x}", u128::from_ne_bytes(bytes)),
        pid: std::process::id().cast_signed(),
    })
}
