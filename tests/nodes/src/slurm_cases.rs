//! Slurm's own jobs, and jobs below `reverbs run` that Slurm puts back into its queue.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs_tests::setup::Deadline;

use crate::case::{Action, Case, Context};
use crate::clean;
use crate::cluster::{Cluster, usual};
use crate::job::{Job, RANKS};
use crate::library::Library;
use crate::slurm::{BatchJob, Slurm};
use crate::slurm_steps;

/// The time limit of each of these cases. Slurm counts time limits in minutes.
const LIMIT: Duration = Duration::from_secs(240);

pub(crate) const NODES: u8 = 2;

/// So long a job may take from one state to the next.
pub(crate) const CHANGE: Duration = Duration::from_secs(60);

/// Slurm sends the signal up to a minute early, and looks every half minute.
const TIME_LIMIT: Duration = Duration::from_secs(150);

/// What a case shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Batch {
    /// Slurm works, without reverbs: steps, batch scripts, the queue.
    Bare,
    /// A job that is told to end as often comes back of itself each time.
    Told(u32),
    /// The same when the time limit is near.
    TimeLimit,
    /// Nobody says how other nodes are reached, so srun is used: the job is saved from outside of its allocation too.
    Steps,
    /// Such a job is ended, and restarted in an allocation of other nodes.
    StepsElsewhere,
    /// Ranks that srun itself has started are refused.
    StepOfRanks,
}

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    [
        ("bare-slurm", Batch::Bare),
        ("slurm-requeue", Batch::Told(2)),
        ("slurm-time-limit", Batch::TimeLimit),
        ("slurm-steps", Batch::Steps),
        ("slurm-steps-elsewhere", Batch::StepsElsewhere),
        ("slurm-srun-refused", Batch::StepOfRanks),
    ]
    .into_iter()
    .map(|(name, batch)| Case {
        name: name.to_owned(),
        needs_reverbs: batch != Batch::Bare,
        limit: LIMIT,
        action: Action::Batch(batch),
    })
    .collect()
}

/// Runs a case.
///
/// # Errors
/// When anything is not as promised.
pub fn run(batch: Batch, context: &Context<'_>) -> Result<String> {
    let mut cluster = context.cluster(&usual(NODES))?;
    let slurm = Slurm::start(&mut cluster, &context.folder)?;
    match batch {
        Batch::Bare => bare(context, &cluster, &slurm),
        Batch::Told(times) => requeued(context, &cluster, &slurm, times),
        Batch::TimeLimit => time_limit(context, &cluster, &slurm),
        Batch::Steps => slurm_steps::saved(context, &cluster, &slurm),
        Batch::StepOfRanks => slurm_steps::of_ranks(context, &cluster, &slurm),
        Batch::StepsElsewhere => slurm_steps::elsewhere(context, &mut cluster, &slurm),
    }
}

fn bare(context: &Context<'_>, cluster: &Cluster, slurm: &Slurm) -> Result<String> {
    let names = slurm.run(cluster, "srun -N 2 hostname | sort | tr '\\n' ' '")?;
    ensure!(names == "n1 n2 ", "srun: {names}");
    let job = Job::over(cluster, context, Library::OpenMpi4)?;
    let script = context.folder.join("batch");
    // Open MPI has Slurm start its daemons on the other nodes.
    fs::write(&script, format!("#!/bin/bash\nexec {}\n", in_shell(&job)?))?;
    let output = context.folder.join("batch.out");
    let number = slurm.submit(cluster, &script, &options(&output))?;
    let deadline = || context.deadline.at_most(CHANGE);
    slurm.wait_for(cluster, number, deadline(), |job| job.state == "RUNNING")?;
    job.wait_for_progress(deadline(), || Ok(()))?;
    slurm.run(cluster, &format!("scontrol requeue {number}"))?;
    slurm.wait_for(cluster, number, deadline(), |job| {
        job.state == "RUNNING" && job.restarts == 1
    })?;
    job.wait_for_progress(deadline(), || Ok(()))?;
    // Without reverbs it begins anew.
    ensure!(starts(&output)? == 2, "{} starts", starts(&output)?);
    job.tell_to_finish()?;
    let over = slurm.wait_for(cluster, number, deadline(), BatchJob::is_over)?;
    ensure!(over.state == "COMPLETED", "{over:?}");
    let text = fs::read_to_string(&output)?;
    let rounds = job.account(&text)?;
    clean::check(cluster, &[])?;
    Ok(format!("{rounds} rounds"))
}

/// How often the program was started: each time it says once that it is ready.
fn starts(output: &Path) -> Result<usize> {
    let text = fs::read_to_string(output)?;
    Ok(text.lines().filter(|line| *line == "ready").count())
}

/// Of sbatch, for all cases.
pub(crate) fn options(output: &Path) -> String {
    format!("-N {NODES} --open-mode=append -o '{}'", output.display())
}

/// The command of a job as a shell reads it.
fn in_shell(job: &Job) -> Result<String> {
    let mpirun = job.mpirun()?;
    let words = std::iter::once(mpirun.get_program()).chain(mpirun.get_args());
    let words: Option<Vec<&str>> = words.map(std::ffi::OsStr::to_str).collect();
    let words = words.context("a name is not UTF-8")?;
    Ok(words
        .iter()
        .map(|word| format!("'{word}'"))
        .collect::<Vec<_>>()
        .join(" "))
}

/// What reaches the other nodes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reach {
    /// The nodes' remote shell.
    Rsh,
    /// What is taken where nobody says anything.
    Srun,
}

/// The script that users copy, with our command in the place of theirs.
fn example(context: &Context<'_>, cluster: &Cluster, job: &Job, reach: Reach) -> Result<PathBuf> {
    let file = xtask::paths::workspace().join("packaging/slurm/mpi-job.sh");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let theirs = "mpirun --host \"$hosts\" ./my-program";
    ensure!(
        text.matches(theirs).count() == 1,
        "no `{theirs}` in {}",
        file.display()
    );
    let hosts: Vec<_> = job
        .hosts()
        .iter()
        .map(|host| format!("{host}:{RANKS}"))
        .collect();
    // Ours is told the nodes in the same way.
    let given = format!("'--host' '{}'", hosts.join(","));
    let ours = in_shell(job)?;
    ensure!(ours.matches(&given).count() == 1, "no {given} in {ours}");
    let ours = ours.replace(&given, "--host \"$hosts\"");
    let reverbs = context.setup.reverbs()?;
    let bin = reverbs.parent().context("no folder")?;
    let rsh = match reach {
        Reach::Rsh => format!("REVERBS_RSH={}", cluster.rsh().display()),
        Reach::Srun => String::new(),
    };
    let setting = format!("\nexport PATH={}:$PATH {rsh}\n\nimages=", bin.display());
    let text = text
        .replace(theirs, &ours)
        .replacen("\nimages=", &setting, 1);
    ensure!(text.contains(&setting), "no images= in {}", file.display());
    let script = context.folder.join("batch");
    fs::write(&script, text)?;
    Ok(script)
}

/// Submits the example and waits until its job is at work.
pub(crate) fn submit(
    context: &Context<'_>,
    cluster: &Cluster,
    slurm: &Slurm,
    reach: Reach,
    more: &str,
) -> Result<(Job, u32, PathBuf)> {
    let job = Job::over(cluster, context, Library::OpenMpi4)?;
    let script = example(context, cluster, &job, reach)?;
    let output = context.folder.join("batch.out");
    let options = format!("{} --ntasks-per-node={RANKS} {more}", options(&output));
    let number = slurm.submit(cluster, &script, &options)?;
    job.wait_for_progress(context.deadline.at_most(CHANGE), || {
        not_over(cluster, slurm, number)
    })?;
    Ok((job, number, output))
}

pub(crate) fn not_over(cluster: &Cluster, slurm: &Slurm, number: u32) -> Result<()> {
    let job = slurm.job(cluster, number)?;
    ensure!(!job.is_over(), "it has ended: {job:?}");
    Ok(())
}

/// Waits until the job is at work again, and that it has gone on from where it was.
fn wait_for_restart(
    cluster: &Cluster,
    slurm: &Slurm,
    (job, number): (&Job, u32),
    restarts: u32,
    deadline: Deadline,
) -> Result<()> {
    let before = job.progress()?;
    let again = slurm.wait_for(cluster, number, deadline, |job| {
        job.is_over() || job.state == "RUNNING" && job.restarts == restarts
    })?;
    ensure!(!again.is_over(), "it has ended: {again:?}");
    job.wait_for_progress(deadline, || {
        let now = job.progress()?;
        ensure!(now >= before, "from round {before} to round {now}");
        not_over(cluster, slurm, number)
    })
}

/// Sends the batch script what Slurm sends it before the time limit.
pub(crate) fn tell(
    context: &Context<'_>,
    cluster: &Cluster,
    slurm: &Slurm,
    (job, number): (&Job, u32),
    time: u32,
) -> Result<()> {
    slurm.run(cluster, &format!("scancel --batch --signal=TERM {number}"))?;
    let deadline = context.deadline.at_most(CHANGE);
    wait_for_restart(cluster, slurm, (job, number), time, deadline)
}

fn requeued(context: &Context<'_>, cluster: &Cluster, slurm: &Slurm, times: u32) -> Result<String> {
    let (job, number, output) = submit(context, cluster, slurm, Reach::Rsh, "--time=60")?;
    for time in 1..=times {
        tell(context, cluster, slurm, (&job, number), time)?;
    }
    finish(context, cluster, slurm, (&job, number), &output)
}

fn time_limit(context: &Context<'_>, cluster: &Cluster, slurm: &Slurm) -> Result<String> {
    let (job, number, output) = submit(
        context,
        cluster,
        slurm,
        Reach::Rsh,
        "--time=2 --signal=B:TERM@60",
    )?;
    let deadline = context.deadline.at_most(TIME_LIMIT);
    wait_for_restart(cluster, slurm, (&job, number), 1, deadline)?;
    finish(context, cluster, slurm, (&job, number), &output)
}

/// Lets the job end, and checks what it says and what is left.
pub(crate) fn finish(
    context: &Context<'_>,
    cluster: &Cluster,
    slurm: &Slurm,
    (job, number): (&Job, u32),
    output: &Path,
) -> Result<String> {
    job.tell_to_finish()?;
    let deadline = context.deadline.at_most(CHANGE);
    let over = slurm.wait_for(cluster, number, deadline, BatchJob::is_over)?;
    ensure!(
        over.state == "COMPLETED" && over.exit_code == "0:0",
        "{over:?}"
    );
    let rounds = job.account(&fs::read_to_string(output)?)?;
    ensure!(starts(output)? == 1, "it was started anew");
    let images = images(context, number);
    ensure!(images.is_dir(), "there are no images");
    clean::check(cluster, &[images])?;
    Ok(format!("{rounds} rounds, {} restarts", over.restarts))
}

/// Where the example keeps its images.
pub(crate) fn images(context: &Context<'_>, number: u32) -> PathBuf {
    context.folder.join(format!("images-{number}"))
}
