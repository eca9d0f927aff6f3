//! Simulated nodes, the processes on them, and what happens to them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use reverbs::control::message::{Phase, Request};

use super::clock::{Clock, Traffic};
use crate::command::job::{FakeAgent, FakeJob, NodeId, ProcessId};

/// Ids of the processes of each node begin here.
pub(super) const FIRST_PID: i32 = 100;

/// What happens to a node when it gets a certain request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Its power is off, and its processes are gone.
    PowerOff,
    /// It is cut from the network before it has done what was asked; its processes live.
    CutBefore,
    /// It has done it, but its answer gets lost.
    CutAfter,
    /// `reverbs node` is killed there; it can be started again.
    KilledBefore,
    KilledAfter,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) job: FakeJob,
    /// With the name of the request, and how many of that name go well before.
    pub(super) fault: Option<(&'static str, usize, Fault)>,
    pub(super) is_off: bool,
    pub(super) is_cut: bool,
    /// A straggler's is above 1.
    pub(super) slowness: f64,
    random: fastrand::Rng,
}

/// All nodes, whether a command speaks with them or not.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) nodes: Vec<Mutex<Node>>,
    pub(super) clocks: Vec<Clock>,
    /// What each node has sent.
    pub(super) traffic: Vec<Traffic>,
    /// What the first node has been sent.
    pub(super) to_first: Traffic,
    /// The size of the last call that a node got: it passes the same on.
    pub(super) calls: Vec<Mutex<u64>>,
    /// How long the slowest node took itself for the last request.
    pub(super) slowest: Mutex<Duration>,
    pub(super) fan_out: usize,
}

impl Cluster {
    /// That many nodes with so many processes on each, all running.
    pub(super) fn of(nodes: u32, processes: i32, fan_out: usize) -> Self {
        let node = |number| {
            let id = |pid| ProcessId {
                node: NodeId(number),
                pid,
            };
            let pids = FIRST_PID..FIRST_PID + processes;
            let agents: BTreeMap<_, _> = pids
                .map(|pid| (id(pid), FakeAgent::at(Phase::Running)))
                .collect();
            Mutex::new(Node {
                job: FakeJob {
                    agents,
                    ..FakeJob::default()
                },
                fault: None,
                is_off: false,
                is_cut: false,
                slowness: 1.0,
                random: fastrand::Rng::with_seed(u64::from(number)),
            })
        };
        Self {
            nodes: (0..nodes).map(node).collect(),
            clocks: (0..nodes).map(|_| Clock::default()).collect(),
            traffic: (0..nodes).map(|_| Traffic::default()).collect(),
            to_first: Traffic::default(),
            calls: (0..nodes).map(|_| Mutex::default()).collect(),
            slowest: Mutex::default(),
            fan_out,
        }
    }

    pub(super) fn node(&self, node: NodeId) -> MutexGuard<'_, Node> {
        self.nodes[index(node)].lock().unwrap()
    }

    pub(super) fn clock(&self, node: NodeId) -> &Clock {
        &self.clocks[index(node)]
    }

    pub(super) fn traffic(&self, node: NodeId) -> &Traffic {
        &self.traffic[index(node)]
    }

    /// How many messages, and bytes of them, all nodes have sent since this was asked last.
    pub(super) fn take_traffic(&self) -> (u64, u64) {
        self.traffic
            .iter()
            .map(Traffic::take)
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// Everybody who is left.
    pub(super) fn agents(&self) -> Vec<(ProcessId, FakeAgent)> {
        let of = |node: &Mutex<Node>| -> Vec<_> {
            let node = node.lock().unwrap();
            let agents = node.job.agents.iter();
            agents.map(|(id, agent)| (*id, agent.clone())).collect()
        };
        self.nodes.iter().flat_map(of).collect()
    }

    pub(super) fn broken_rules(&self) -> Vec<String> {
        let of = |node: &Mutex<Node>| node.lock().unwrap().job.broken_rules.clone();
        self.nodes.iter().flat_map(of).collect()
    }

    /// The network is whole again, and stopped processes go on.
    pub(super) fn heal(&self) {
        for node in &self.nodes {
            let mut node = node.lock().unwrap();
            node.is_cut = false;
            for agent in node.job.agents.values_mut() {
                agent.stopped = false;
            }
        }
    }
}

impl Node {
    /// The fault that this request brings about.
    pub(super) fn fault_at(&mut self, request: &'static str) -> Option<Fault> {
        let (at, good, fault) = self.fault.as_mut()?;
        if *at != request {
            return None;
        }
        if *good > 0 {
            *good -= 1;
            return None;
        }
        let fault = *fault;
        self.fault = None;
        if fault == Fault::PowerOff {
            self.is_off = true;
            self.job.agents.clear();
        }
        Some(fault)
    }

    /// How long one process takes for a request: log-normal, around what a process with 1,024 queue pairs took in
    /// docs/performance.md (where that was read at all), in a machine that was emulated.
    pub(super) fn sample(&mut self, request: &Request) -> Duration {
        const SPREAD: f64 = 0.3;
        let median = match request {
            Request::Close { .. } => 0.047,
            Request::Drain { .. } => 0.010,
            Request::Stop { .. } => 0.040,
            Request::Responders | Request::Settle { .. } => 0.167,
            Request::Release => 0.649,
            Request::Rebuild { .. } => 0.633,
            Request::Connect { .. } => 0.432,
            Request::Resume => 0.011,
            // Not listed there.
            _ => 0.005,
        };
        let (radius, angle) = (self.random.f64(), self.random.f64());
        let normal = (-2.0 * (1.0 - radius).ln()).sqrt() * (std::f64::consts::TAU * angle).cos();
        Duration::from_secs_f64(median * (SPREAD * normal).exp() * self.slowness)
    }
}

pub(super) fn index(node: NodeId) -> usize {
    usize::try_from(node.0).unwrap()
}
