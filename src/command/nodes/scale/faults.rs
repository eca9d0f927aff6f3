//! What goes wrong, at each step: the command ends in bounded time, nobody goes on without one that is silent, and a later
//! command brings back everybody who is left.

use std::sync::Arc;
use std::time::Duration;

use reverbs::control::message::Phase;

use super::cluster::{Cluster, FIRST_PID, Fault};
use super::job::{Job, cycle, drive};
use super::{PROCESSES, assert_all_run};
use crate::command::job::{Mishap, NodeId, ProcessId};

/// All that nodes are asked in a cycle: its name, and how many of that name come before.
const STEPS: [(&str, usize); 18] = [
    ("scan", 0),
    ("begin", 0),
    ("examine", 0),
    ("close", 0),
    ("scan", 1),
    ("peers", 0),
    ("drain", 0),
    ("stop", 0),
    ("responders", 0),
    ("settle", 0),
    ("release", 0),
    ("scan", 2),
    ("rebuild", 0),
    ("publish", 0),
    ("leave", 0),
    ("scan", 3),
    ("connect", 0),
    ("resume", 0),
];
/// The place of the first step that has no way back.
const STOP: usize = 7;
/// The first node reaches 4 others, and begins with node 1, which reaches those up to 10, and so on.
const NODES: u32 = 40;
const FAN_OUT: usize = 4;
/// One that others are reached by, and one that is reached by others.
const INNER: NodeId = NodeId(1);
const OUTER: NodeId = NodeId(NODES - 1);
/// All of a command that has to do without a node.
const LONGEST: Duration = Duration::from_secs(120);

fn cluster() -> Arc<Cluster> {
    Arc::new(Cluster::of(NODES, 2, FAN_OUT))
}

fn resume(cluster: &Arc<Cluster>, without: &[NodeId], case: &str) {
    let mut job = Job::attach(cluster, without).unwrap_or_else(|error| panic!("{case}: {error:#}"));
    drive(&mut job, "resume", |driver| {
        driver.attach_abandoned()?;
        driver.bring_back()
    })
    .unwrap_or_else(|error| panic!("{case}: {error:#}"));
    assert_all_run(cluster, &job, case);
}

/// The cycle fails, and what the command says in the end.
fn fail(job: &mut Job, case: &str) -> String {
    drive(job, "cycle", |driver| {
        let error = cycle(driver).expect_err(case);
        format!("{:#}", driver.recover(error, "back"))
    })
}

#[test]
fn nobody_goes_on_without_a_node_that_is_silent() {
    for (place, (step, before)) in STEPS.into_iter().enumerate() {
        for node in [INNER, OUTER] {
            for fault in [Fault::PowerOff, Fault::CutBefore, Fault::CutAfter] {
                let case = format!("{fault:?} of node {} at {step} {before}", node.0);
                let cluster = cluster();
                cluster.node(node).fault = Some((step, before, fault));
                let mut job = Job::attach(&cluster, &[]).unwrap();
                let began = job.elapsed();
                let told = fail(&mut job, &case);
                assert!(told.contains(&format!("node-{}", node.0)), "{case}: {told}");
                assert!(told.contains("reverbs resume"), "{case}: {told}");
                assert!(
                    job.elapsed() - began < LONGEST,
                    "{case}: {:?}",
                    job.elapsed()
                );
                // Those that were connected may run: nothing that they send is lost.
                let waits = place >= STOP && step != "resume";
                for (process, agent) in cluster.agents() {
                    let runs = agent.phase == Phase::Running;
                    let is_cut_off = process.node == node || (node == INNER && process.node.0 < 11);
                    assert!(
                        runs != waits || is_cut_off && !runs,
                        "{case}: {process} {agent:?}"
                    );
                }
                assert_eq!(job.broken_barriers, [""; 0], "{case}");
                drop(job);
                cluster.heal();
                let without = [node];
                let is_off = fault == Fault::PowerOff;
                resume(&cluster, if is_off { &without } else { &[] }, &case);
                let rebuilt = u64::from(place >= STOP);
                for (process, agent) in cluster.agents() {
                    assert_eq!(agent.rebuilds, rebuilt, "{case}: {process} {agent:?}");
                }
                assert_eq!(
                    cluster.agents().len(),
                    2 * NODES as usize - if is_off { 2 } else { 0 }
                );
            }
        }
    }
}

#[test]
fn where_only_our_part_of_a_node_was_killed_everybody_is_back_at_once() {
    for (step, before) in STEPS {
        for node in [INNER, OUTER] {
            for fault in [Fault::KilledBefore, Fault::KilledAfter] {
                let case = format!("{fault:?} of node {} at {step} {before}", node.0);
                let cluster = cluster();
                cluster.node(node).fault = Some((step, before, fault));
                let mut job = Job::attach(&cluster, &[]).unwrap();
                let began = job.elapsed();
                let told = fail(&mut job, &case);
                assert!(told.starts_with("back: "), "{case}: {told}");
                assert!(told.contains(&format!("node-{}", node.0)), "{case}: {told}");
                assert!(job.elapsed() - began < LONGEST, "{case}");
                assert_all_run(&cluster, &job, &case);
            }
        }
    }
}

#[test]
fn a_process_that_fails_at_any_step_is_no_worse_than_on_one_node() {
    let process = ProcessId {
        node: OUTER,
        pid: FIRST_PID,
    };
    let steps = STEPS.iter().enumerate();
    for (place, (step, _)) in steps.filter(|(_, (step, _))| !matches!(*step, "scan" | "leave")) {
        for mishap in [
            Mishap::Refuses,
            Mishap::Hangs,
            Mishap::AnswerLost,
            Mishap::Dies,
            Mishap::Stops,
        ] {
            let case = format!("{mishap:?} at {step}");
            let cluster = cluster();
            let mut node = cluster.node(OUTER);
            node.job.agents.get_mut(&process).unwrap().mishap = Some((step, mishap));
            drop(node);
            let mut job = Job::attach(&cluster, &[]).unwrap();
            let began = job.elapsed();
            match mishap {
                Mishap::Dies => {
                    drive(&mut job, "cycle", cycle)
                        .unwrap_or_else(|error| panic!("{case}: {error:#}"));
                }
                Mishap::Stops => {
                    let told = fail(&mut job, &case);
                    assert!(
                        told.contains("process 100 on node-39: stopped"),
                        "{case}: {told}"
                    );
                    assert!(told.contains("reverbs resume"), "{case}: {told}");
                    let waits = place >= STOP && *step != "resume";
                    for (other, agent) in cluster.agents() {
                        let runs = agent.phase == Phase::Running;
                        assert!(
                            other == process || runs != waits,
                            "{case}: {other} {agent:?}"
                        );
                    }
                    cluster.heal();
                    resume(&cluster, &[], &case);
                }
                _ => assert!(fail(&mut job, &case).starts_with("back: "), "{case}"),
            }
            // The longest that one process is waited for is ten minutes.
            assert!(
                job.elapsed() - began < Duration::from_secs(700),
                "{case}: {:?}",
                job.elapsed()
            );
            assert_all_run(&cluster, &job, &case);
        }
    }
}

#[test]
fn many_nodes_that_are_lost_at_once_are_waited_for_at_the_same_time() {
    let cluster = cluster();
    // All that the first node reaches itself.
    for node in [1, 11, 21, 31] {
        cluster.node(NodeId(node)).fault = Some(("release", 0, Fault::CutBefore));
    }
    let mut job = Job::attach(&cluster, &[]).unwrap();
    let began = job.elapsed();
    fail(&mut job, "release");
    let took = job.elapsed() - began;
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(job.costs.last().unwrap().received.0, 0, "one still answers");
    cluster.heal();
    resume(&cluster, &[], "release");
}

#[test]
fn a_job_of_full_size_comes_through_all_at_once() {
    const SIZE: u32 = 1250;
    let cluster = Arc::new(Cluster::of(SIZE, PROCESSES, super::FAN_OUT));
    cluster.node(INNER).fault = Some(("release", 0, Fault::PowerOff));
    cluster.node(NodeId(700)).slowness = 10.0;
    let dies = ProcessId {
        node: NodeId(900),
        pid: FIRST_PID,
    };
    let mut node = cluster.node(dies.node);
    node.job.agents.get_mut(&dies).unwrap().mishap = Some(("close", Mishap::Dies));
    drop(node);
    let mut job = Job::attach(&cluster, &[]).unwrap();
    let told = fail(&mut job, "full size");
    assert!(
        told.contains("node-1") && told.contains("reverbs resume"),
        "{told}"
    );
    assert!(job.elapsed() < LONGEST, "{:?}", job.elapsed());
    let runs = |phase| phase == Phase::Running;
    assert!(cluster.agents().iter().all(|(_, agent)| !runs(agent.phase)));
    drop(job);
    resume(&cluster, &[INNER], "full size");
    let agents = cluster.agents();
    // Those of one node, and one more.
    assert_eq!(agents.len(), 10_000 - 8 - 1);
    assert!(agents.iter().all(|(_, agent)| agent.rebuilds == 1));
}
