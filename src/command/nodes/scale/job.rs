//! The job as a command sees it, with a record of what each request has cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use reverbs::control::message::{HardwarePeer, ProcessNumbers, Reply, Request, Session};

use super::super::ensemble::Ensemble;
use super::cluster::Cluster;
use super::wire::{Host, Wire, start};
use crate::command::interrupt::Interrupt;
use crate::command::job::{
    AgentFailure, Agents, Driver, Hello, NodeId, ProcessId, Unreachable, Whose, barrier_before,
};
use crate::command::node::NodeRequest;
use crate::command::progress::Progress;

/// One request to all.
#[derive(Clone, Debug)]
pub(super) struct Cost {
    pub(super) name: &'static str,
    pub(super) took: Duration,
    /// What the slowest node took itself.
    pub(super) slowest: Duration,
    /// What the first node has sent.
    pub(super) sent: (u64, u64),
    /// What it has been sent.
    pub(super) received: (u64, u64),
    /// What all have sent.
    pub(super) all: (u64, u64),
}

#[derive(Debug)]
pub(super) struct Job {
    ensemble: Ensemble<Host, Wire>,
    cluster: Arc<Cluster>,
    epoch: Instant,
    pub(super) costs: Vec<Cost>,
    pub(super) broken_barriers: Vec<String>,
}

impl Job {
    /// As a command begins, at a time when the clock of the first node stands as it does.
    ///
    /// # Errors
    /// A node cannot be reached.
    pub(super) fn attach(cluster: &Arc<Cluster>, without: &[NodeId]) -> Result<Self> {
        let first = cluster.clock(NodeId::FIRST);
        first.ask_at(first.done());
        let nodes = u32::try_from(cluster.nodes.len())?;
        let names: Vec<_> = (0..nodes).map(|node| format!("node-{node}")).collect();
        let behind: Vec<_> = (1..nodes)
            .map(NodeId)
            .filter(|node| !without.contains(node))
            .map(|node| (node, format!("node-{}", node.0)))
            .collect();
        let began = first.asked();
        let (relay, opened) = start(cluster, NodeId::FIRST, &behind);
        let mut job = Self {
            ensemble: Ensemble::of(relay, opened, names)?,
            cluster: Arc::clone(cluster),
            epoch: Instant::now(),
            costs: Vec::new(),
            broken_barriers: Vec::new(),
        };
        job.note("open", began);
        job.at_cost("attach", |ensemble| {
            ensemble.all(NodeRequest::Attach {
                roots: vec![1; usize::try_from(nodes)?],
                job: Some("of the simulation".into()),
                driving: true,
            })
        })?;
        Ok(job)
    }

    /// How long it is since the simulation began.
    pub(super) fn elapsed(&self) -> Duration {
        self.cluster.clock(NodeId::FIRST).done()
    }

    fn at_cost<T>(
        &mut self,
        name: &'static str,
        act: impl FnOnce(&mut Ensemble<Host, Wire>) -> T,
    ) -> T {
        let began = self.elapsed();
        self.cluster.clock(NodeId::FIRST).ask_at(began);
        let outcome = act(&mut self.ensemble);
        self.note(name, began);
        outcome
    }

    fn note(&mut self, name: &'static str, began: Duration) {
        let sent = self.cluster.traffic(NodeId::FIRST).take();
        let others = self.cluster.take_traffic();
        self.costs.push(Cost {
            name,
            took: self.elapsed() - began,
            slowest: std::mem::take(&mut *self.cluster.slowest.lock().unwrap()),
            sent,
            received: self.cluster.to_first.take(),
            all: (sent.0 + others.0, sent.1 + others.1),
        });
    }

    fn check_barrier(&mut self, request: &Request) {
        let Some(phase) = barrier_before(request) else {
            return;
        };
        let early = self
            .cluster
            .agents()
            .into_iter()
            .filter(|(_, agent)| agent.phase < phase);
        let named = early.map(|(process, agent)| {
            format!("{} while {process} is {:?}", request.name(), agent.phase)
        });
        self.broken_barriers.extend(named);
    }
}

impl Agents for Job {
    fn scan(&mut self) -> Vec<Result<Hello, Unreachable>> {
        self.at_cost("scan", Ensemble::scan)
    }

    fn ask(
        &mut self,
        targets: &[ProcessId],
        request: &Request,
    ) -> Vec<(ProcessId, Result<Reply, AgentFailure>)> {
        if targets.is_empty() {
            return Vec::new();
        }
        self.check_barrier(request);
        self.at_cost(request.name(), |ensemble| ensemble.ask(targets, request))
    }

    fn now(&self) -> Instant {
        self.epoch + self.elapsed()
    }

    fn name(&self, process: ProcessId) -> String {
        self.ensemble.name(process)
    }

    fn is_alive(&self, _: &Session) -> bool {
        // Commands of the simulation come one after the other.
        false
    }

    fn publish(&mut self, numbers: &[ProcessNumbers]) -> Result<()> {
        self.at_cost("leave", |ensemble| ensemble.publish(numbers))
    }

    fn whose(&mut self, peer: &HardwarePeer, device: Option<(NodeId, &str)>) -> Result<Whose> {
        self.at_cost("whose", |ensemble| ensemble.whose(peer, device))
    }
}

/// Runs one command on a job. `id` is that of its session.
pub(super) fn drive<T>(job: &mut Job, id: &str, act: impl FnOnce(&mut Driver<'_, Job>) -> T) -> T {
    let session = Session {
        id: id.to_owned(),
        pid: 1,
    };
    let mut progress = Progress::new(true);
    act(&mut Driver::new(
        job,
        &mut progress,
        Interrupt::default(),
        session,
        Vec::new(),
    ))
}

pub(super) fn cycle(driver: &mut Driver<'_, Job>) -> Result<()> {
    driver.attach()?;
    driver.release()?;
    driver.restore_service()
}
