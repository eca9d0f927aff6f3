//! Jobs of thousands of processes on more nodes than there are, in a time that is passed in.
//!
//! The driver, the ensemble and the tree of connections are those of the command. Below them are simulated nodes (`cluster`),
//! whose processes are the fakes of the driver's own tests, and connections that deliver in no time what takes some on the
//! `clock` of each node (`wire`). `job` keeps what each request has cost; `faults` has what goes wrong, `numbers` what
//! processes tell each other at a restart, measured for real, and `report` what docs/scale.md shows.

mod clock;
mod cluster;
mod faults;
mod job;
mod numbers;
mod report;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use reverbs::control::message::Phase;

use self::cluster::Cluster;
use self::job::{Cost, Job, cycle, drive};
use self::wire::{LATENCY, time_of};
use super::ensemble::FAN_OUT;
use crate::command::job::NodeId;

/// Of each node.
const PROCESSES: i32 = 8;

/// A whole cycle of a job on so many nodes, and what it has cost.
fn cycle_of(nodes: u32, prepare: impl FnOnce(&Cluster)) -> (Arc<Cluster>, Job) {
    let cluster = Arc::new(Cluster::of(nodes, PROCESSES, FAN_OUT));
    prepare(&cluster);
    let mut job = Job::attach(&cluster, &[]).unwrap();
    drive(&mut job, "cycle", cycle).unwrap();
    (cluster, job)
}

/// Everybody who is left runs, nobody's claim is left, and nobody did what it must not.
fn assert_all_run(cluster: &Cluster, job: &Job, case: &str) {
    for (process, agent) in cluster.agents() {
        assert_eq!(agent.phase, Phase::Running, "{case}: {process} {agent:?}");
        assert_eq!(agent.session, None, "{case}: {process} is still claimed");
    }
    assert_eq!(job.broken_barriers, [""; 0], "{case}");
    assert_eq!(cluster.broken_rules(), [""; 0], "{case}");
}

/// How many connections the last node is away.
fn depth(nodes: usize) -> u32 {
    let mut behind = nodes - 1;
    let mut depth = 0;
    while behind > 0 {
        behind = behind.div_ceil(FAN_OUT) - 1;
        depth += 1;
    }
    depth
}

/// The time of a request beyond the slowest node is that of the way down the tree and up again.
fn assert_cheap(costs: &[Cost], nodes: usize) {
    for cost in costs.iter().filter(|cost| cost.name != "open") {
        let each = |(messages, bytes): (u64, u64)| bytes.div_ceil(messages.max(1));
        // Subtrees may differ by a node.
        let bytes = (each(cost.sent) + each(cost.received)) * 11 / 10;
        let one = time_of(bytes, FAN_OUT) + LATENCY;
        let on_the_way = cost.took - cost.slowest;
        assert!(on_the_way <= one * depth(nodes), "{nodes} nodes: {cost:?}");
        assert!(
            on_the_way < Duration::from_millis(100),
            "{nodes} nodes: {cost:?}"
        );
    }
}

#[test]
fn a_cycle_takes_everybody_through_every_phase_once_however_many_there_are() {
    for nodes in [1, 2, 10, 100, 1250] {
        let (cluster, job) = cycle_of(nodes, |_| {});
        assert_all_run(&cluster, &job, "cycle");
        let agents = cluster.agents();
        assert_eq!(agents.len(), nodes as usize * 8);
        assert!(
            agents
                .iter()
                .all(|(_, agent)| (agent.rebuilds, agent.resumed) == (1, 1))
        );
        let asked: Vec<_> = job.costs.iter().map(|cost| cost.name).collect();
        assert_eq!(
            asked,
            [
                "open",
                "attach",
                "scan",
                "begin",
                "examine",
                "close",
                "scan",
                "peers",
                "drain",
                "stop",
                "responders",
                "settle",
                "release",
                "scan",
                "rebuild",
                "publish",
                "leave",
                "scan",
                "connect",
                "resume",
            ],
            "{nodes} nodes"
        );
        assert_cheap(&job.costs, nodes as usize);
        let links = u64::from(nodes - 1).min(FAN_OUT as u64);
        for cost in &job.costs[1..] {
            assert_eq!((cost.sent.0, cost.received.0), (links, links), "{cost:?}");
            // Each of the others is asked once and answers once, on all levels together.
            assert_eq!(cost.all.0, 2 * u64::from(nodes - 1), "{cost:?}");
        }
    }
}

#[test]
fn a_straggler_is_waited_for_and_costs_what_it_takes_itself() {
    let slow = |cluster: &Cluster| cluster.node(NodeId(70)).slowness = 100.0;
    let (cluster, job) = cycle_of(100, slow);
    assert_all_run(&cluster, &job, "straggler");
    assert_cheap(&job.costs, 100);
    let release = job
        .costs
        .iter()
        .find(|cost| cost.name == "release")
        .unwrap();
    assert!(release.slowest > Duration::from_secs(40), "{release:?}");
    assert!(job.elapsed() < Duration::from_secs(600));
}
