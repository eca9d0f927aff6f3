//! Jobs over several nodes below `reverbs run`: started, saved, and brought back.

use std::time::Duration;

use anyhow::{Result, ensure};
use reverbs_tests::setup::Deadline;

use crate::case::{Action, Case, Context};
use crate::cluster::{Cluster, Identity, others, usual};
use crate::job::RANKS;
use crate::launched::{COMMAND_LIMIT, Launched};
use crate::library::Library;

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(120);

/// A job over as many nodes.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    name: &'static str,
    library: Library,
    nodes: u8,
    how: How,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum How {
    /// Nothing: each node has the processes it should have, and no others.
    Runs,
    /// It is saved while it runs on.
    RunsOn,
    /// The same while what has started its processes on the other nodes has not said so yet.
    Starting,
    /// It is asked for its state, and is to be cycled and resumed.
    Commands,
    /// It is stopped, and restarted on the same nodes.
    SameNodes,
    /// On nodes with the same names and addresses that have just been switched on.
    FreshNodes,
    /// On nodes with other names and addresses.
    OtherNodes,
    /// On the same nodes but one.
    ReplacedNode,
    /// On other nodes, saved again, and back on fresh ones of the first names.
    ThereAndBack,
    /// On the same nodes, with nobody to wait for it.
    Unattended,
    /// The folder of images is on each node's own disk. It is saved while it runs on, then stopped, and restarted on other
    /// nodes.
    OwnDisks,
    /// From an image under which it had run on, after the processes of one node had died.
    AfterDeath,
}

const SAVED: &[Saved] = &[
    saved("run-2", 2, How::Runs),
    saved("run-3", 3, How::Runs),
    saved("run-8", 8, How::Runs),
    saved("checkpoint-runs-on-2", 2, How::RunsOn),
    saved("checkpoint-runs-on-3", 3, How::RunsOn),
    saved("checkpoint-runs-on-8", 8, How::RunsOn),
    saved("checkpoint-starting-3", 3, How::Starting),
    saved("commands-2", 2, How::Commands),
    saved("commands-3", 3, How::Commands),
    saved("restart-same-2", 2, How::SameNodes),
    saved("restart-same-3", 3, How::SameNodes),
    saved("restart-same-8", 8, How::SameNodes),
    saved("restart-fresh-2", 2, How::FreshNodes),
    saved("restart-fresh-3", 3, How::FreshNodes),
    saved("restart-fresh-8", 8, How::FreshNodes),
    saved("restart-others-2", 2, How::OtherNodes),
    saved("restart-others-3", 3, How::OtherNodes),
    saved("restart-others-8", 8, How::OtherNodes),
    saved("restart-replaced-3", 3, How::ReplacedNode),
    saved("restart-there-and-back-2", 2, How::ThereAndBack),
    saved("restart-unattended-2", 2, How::Unattended),
    saved("own-disks-2", 2, How::OwnDisks),
    saved("own-disks-3", 3, How::OwnDisks),
    saved("restart-after-death-3", 3, How::AfterDeath),
    with(Library::OpenMpi5, "openmpi5-run-2", 2, How::Runs),
    with(Library::OpenMpi5, "openmpi5-checkpoint-2", 2, How::RunsOn),
    with(
        Library::OpenMpi5,
        "openmpi5-restart-fresh-2",
        2,
        How::FreshNodes,
    ),
    with(
        Library::OpenMpi5,
        "openmpi5-restart-others-2",
        2,
        How::OtherNodes,
    ),
    with(Library::Mpich, "mpich-run-2", 2, How::Runs),
    with(Library::Mpich, "mpich-checkpoint-2", 2, How::RunsOn),
    with(Library::Mpich, "mpich-restart-fresh-2", 2, How::FreshNodes),
    with(Library::Mpich, "mpich-restart-others-2", 2, How::OtherNodes),
    with(Library::Mpich, "mpich-checkpoint-1", 1, How::RunsOn),
    with(Library::Mpich, "mpich-restart-fresh-1", 1, How::FreshNodes),
    with(Library::IntelMpi, "intel-run-2", 2, How::Runs),
    with(Library::IntelMpi, "intel-checkpoint-2", 2, How::RunsOn),
    with(
        Library::IntelMpi,
        "intel-restart-others-2",
        2,
        How::OtherNodes,
    ),
];

const fn saved(name: &'static str, nodes: u8, how: How) -> Saved {
    with(Library::OpenMpi4, name, nodes, how)
}

const fn with(library: Library, name: &'static str, nodes: u8, how: How) -> Saved {
    Saved {
        name,
        library,
        nodes,
        how,
    }
}

impl Saved {
    pub fn library(&self) -> Library {
        self.library
    }
}

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    SAVED
        .iter()
        .map(|saved| Case {
            name: saved.name.to_owned(),
            needs_reverbs: true,
            limit: LIMIT,
            action: Action::Saved(saved),
        })
        .collect()
}

/// Runs a case. The remark is what the job has checked.
///
/// # Errors
/// When a command fails, the job finds anything wrong, or something is left.
pub fn run(saved: &Saved, context: &Context<'_>) -> Result<String> {
    let own = usual(saved.nodes);
    let mut cluster = context.cluster(&own)?;
    if saved.how == How::Starting {
        cluster.hold_answers()?;
    }
    let mut job = Launched::start(context, &cluster, saved.library)?;
    match saved.how {
        How::Runs => job.job().nothing_else(&cluster)?,
        How::RunsOn => {
            let first = job.checkpoint(&cluster)?;
            let second = job.checkpoint(&cluster)?;
            ensure!(first != second, "one image for two checkpoints");
        }
        How::Starting => starting(&cluster, &mut job)?,
        How::Commands => commands(&cluster, &mut job)?,
        How::SameNodes => {
            let image = job.checkpoint_and_stop(&cluster)?;
            job.restart(&cluster, &image, &[])?;
        }
        How::FreshNodes => {
            let image = job.checkpoint_and_stop(&cluster)?;
            cluster.power_off_all()?;
            cluster.boot(&own)?;
            job.restart(&cluster, &image, &[])?;
        }
        How::OtherNodes => {
            let image = job.checkpoint_and_stop(&cluster)?;
            replace(&mut cluster, &others(saved.nodes))?;
            job.restart(&cluster, &image, &moves(&own, &others(saved.nodes)))?;
        }
        How::ReplacedNode => {
            let image = job.checkpoint_and_stop(&cluster)?;
            let (Some(old), Some(new)) = (own.last(), others(saved.nodes).pop()) else {
                anyhow::bail!("no nodes");
            };
            cluster.power_off(&old.name)?;
            cluster.boot(std::slice::from_ref(&new))?;
            job.restart(&cluster, &image, &[(old.name.clone(), new.name)])?;
        }
        How::ThereAndBack => {
            let there = others(saved.nodes);
            let image = job.checkpoint_and_stop(&cluster)?;
            replace(&mut cluster, &there)?;
            job.restart(&cluster, &image, &moves(&own, &there))?;
            let image = job.checkpoint_and_stop(&cluster)?;
            replace(&mut cluster, &own)?;
            job.restart(&cluster, &image, &moves(&there, &own))?;
        }
        How::Unattended => {
            let image = job.checkpoint_and_stop(&cluster)?;
            let rounds = job.restart_unattended(&cluster, &image)?;
            return Ok(format!("{rounds} rounds"));
        }
        How::OwnDisks => {
            job.keep_images_apart(&cluster)?;
            job.checkpoint(&cluster)?;
            job.nothing_apart(&cluster)?;
            let image = job.checkpoint_and_stop(&cluster)?;
            job.require_phase("fetch")?;
            job.nothing_apart(&cluster)?;
            replace(&mut cluster, &others(saved.nodes))?;
            job.keep_images_apart(&cluster)?;
            job.restart(&cluster, &image, &moves(&own, &others(saved.nodes)))?;
            job.require_phase("send")?;
            job.nothing_apart(&cluster)?;
        }
        How::AfterDeath => {
            let image = job.checkpoint(&cluster)?;
            let dying = cluster.node(&own[own.len() - 1].name)?;
            let killed = dying.signal(rustix::process::Signal::KILL, |_| true);
            ensure!(killed == 1 + RANKS, "{killed} processes killed");
            job.wait_for_failure()?;
            replace(&mut cluster, &others(saved.nodes))?;
            job.restart(&cluster, &image, &moves(&own, &others(saved.nodes)))?;
        }
    }
    let rounds = job.finish(&cluster)?;
    Ok(format!("{rounds} rounds"))
}

/// The job is at work, and `reverbs run` has not heard of all of it: a checkpoint waits for that.
fn starting(cluster: &Cluster, job: &mut Launched<'_>) -> Result<()> {
    /// Longer than it would take.
    const AT_LEAST: Duration = Duration::from_secs(2);
    let mut command = job.begin(cluster, "checkpoint", &[])?;
    std::thread::sleep(AT_LEAST);
    ensure!(command.ended()?.is_none(), "it has not waited");
    cluster.let_answers_arrive()?;
    command.wait_for_success(Deadline::after(COMMAND_LIMIT))?;
    job.image(cluster, &command.output()?)?;
    job.left_alone(cluster)?;
    job.wait_for_progress()?;
    job.job().nothing_else(cluster)
}

/// Here nobody opens an RDMA device, so that no process has an agent: the commands that speak to agents say so, and leave
/// the job as it is.
fn commands(cluster: &Cluster, job: &mut Launched<'_>) -> Result<()> {
    let before = job.job().trees(cluster)?;
    for (verb, code, said) in [
        ("status", 1, "runs under reverbs"),
        ("cycle", 1, "runs under reverbs"),
        ("resume", 0, "nothing to resume"),
    ] {
        let mut command = job.begin(cluster, verb, &[])?;
        let status = command.wait(Deadline::after(COMMAND_LIMIT))?;
        let errors = command.errors()?;
        ensure!(
            status.code() == Some(code) && errors.contains(said),
            "{verb}: {status}: {errors}"
        );
        job.left_alone(cluster)?;
        job.job().nothing_else(cluster)?;
        job.wait_for_progress()?;
    }
    let after = job.job().trees(cluster)?;
    ensure!(
        before
            .iter()
            .zip(&after)
            .all(|(before, after)| before.root.pid == after.root.pid),
        "{before:?} have become {after:?}"
    );
    Ok(())
}

/// All nodes off, these on.
fn replace(cluster: &mut Cluster, fresh: &[Identity]) -> Result<()> {
    cluster.power_off_all()?;
    cluster.boot(fresh)
}

fn moves(from: &[Identity], to: &[Identity]) -> Vec<(String, String)> {
    let names = |nodes: &[Identity]| -> Vec<String> {
        nodes.iter().map(|node| node.name.clone()).collect()
    };
    names(from).into_iter().zip(names(to)).collect()
}
