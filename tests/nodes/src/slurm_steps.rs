//! Jobs of Slurm in which srun is what reaches the other nodes.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::case::Context;
use crate::clean;
use crate::cluster::{Cluster, others};
use crate::job::{Job, Tree};
use crate::processes::Process;
use crate::slurm::{BatchJob, Slurm};
use crate::slurm_cases::{CHANGE, NODES, Reach, finish, images, not_over, options, submit, tell};

/// Saved from outside of the allocation, and then by the batch script, which is put back into the queue.
///
/// # Errors
/// When anything is not as promised.
pub fn saved(context: &Context<'_>, cluster: &Cluster, slurm: &Slurm) -> Result<String> {
    let (job, number, output) = submit(context, cluster, slurm, Reach::Srun, "--time=60")?;
    has_step(cluster, slurm, number)?;
    let before = job.trees(cluster)?;
    may_use_all_processors(&before)?;
    let image = checkpoint(context, cluster, slurm, &job, "")?;
    ensure!(
        image.starts_with(images(context, number)),
        "{}",
        image.display()
    );
    let deadline = context.deadline.at_most(CHANGE);
    job.wait_for_progress(deadline, || not_over(cluster, slurm, number))?;
    let after = job.trees(cluster)?;
    ensure!(
        before
            .iter()
            .zip(&after)
            .all(|(one, other)| one.pids() == other.pids()),
        "{before:?} have become {after:?}"
    );
    tell(context, cluster, slurm, (&job, number), 1)?;
    job.trees(cluster)?;
    has_step(cluster, slurm, number)?;
    finish(context, cluster, slurm, (&job, number), &output)
}

/// Ended by a checkpoint, and restarted by another batch job on nodes with other names and addresses.
///
/// # Errors
/// When anything is not as promised.
pub fn elsewhere(context: &Context<'_>, cluster: &mut Cluster, slurm: &Slurm) -> Result<String> {
    let (job, number, output) = submit(context, cluster, slurm, Reach::Srun, "--time=60")?;
    let image = checkpoint(context, cluster, slurm, &job, "--stop")?;
    let deadline = context.deadline.at_most(CHANGE);
    slurm.wait_for(cluster, number, deadline, BatchJob::is_over)?;
    clean::check(cluster, &[images(context, number)])?;
    let saved = job.progress()?;

    cluster.power_off_all()?;
    cluster.boot(&others(NODES))?;
    let slurm = Slurm::start(cluster, &context.folder)?;
    let restart = |options: &str| -> Result<u32> {
        let script = context.folder.join("restart");
        let text = format!(
            "#!/bin/bash\nexec '{}' restart '{}' --node n2=m2 {options}\n",
            context.setup.reverbs()?.display(),
            image.display()
        );
        fs::write(&script, text)?;
        slurm.submit(
            cluster,
            &script,
            &self::options(&context.folder.join("restart.out")),
        )
    };
    // Nobody would keep the steps, and what they have started would end with them.
    let refused = restart("")?;
    let over = slurm.wait_for(cluster, refused, deadline, BatchJob::is_over)?;
    let said = fs::read_to_string(context.folder.join("restart.out"))?;
    ensure!(
        over.state == "FAILED" && said.contains("--wait"),
        "{over:?}: {said}"
    );
    clean::check(cluster, &[images(context, number)])?;

    let again = restart("--wait")?;
    job.wait_for_progress(deadline, || not_over(cluster, &slurm, again))?;
    has_step(cluster, &slurm, again)?;
    job.trees(cluster)?;
    ensure!(job.progress()? > saved, "it does not go on");
    job.tell_to_finish()?;
    let over = slurm.wait_for(cluster, again, deadline, BatchJob::is_over)?;
    ensure!(over.state == "COMPLETED", "{over:?}");
    let rounds = job.account(&fs::read_to_string(output)?)?;
    clean::check(cluster, &[images(context, number)])?;
    Ok(format!("{rounds} rounds, {saved} at the checkpoint"))
}

/// `reverbs run -- srun PROGRAM`: the processes are below Slurm's daemons, on all nodes.
///
/// # Errors
/// When it is not refused by name, or something is touched.
pub fn of_ranks(context: &Context<'_>, cluster: &Cluster, slurm: &Slurm) -> Result<String> {
    const PROGRAM: &str = "sleep";
    let reverbs = context.setup.reverbs()?;
    let reverbs = reverbs.display();
    let images = context.folder.join("images");
    let script = context.folder.join("batch");
    let text = format!(
        "#!/bin/bash\nexec {reverbs} run --images '{}' -- srun -N {NODES} -n {NODES} {PROGRAM} 600\n",
        images.display()
    );
    fs::write(&script, text)?;
    let number = slurm.submit(
        cluster,
        &script,
        &options(&context.folder.join("batch.out")),
    )?;
    let deadline = context.deadline.at_most(CHANGE);
    let mut before = Vec::new();
    for node in cluster.nodes() {
        before.extend(node.wait_for(PROGRAM, 1, deadline)?);
    }
    let runners = cluster.first()?.called("reverbs");
    let runner = runners.first().context("no `reverbs run`")?.inner;
    let said = slurm.run(
        cluster,
        &format!("{reverbs} checkpoint {runner} 2>&1 || true"),
    )?;
    ensure!(
        said.contains("cannot be checkpointed") && said.contains("(srun) leads out of the job"),
        "{said}"
    );
    for process in before {
        let now = Process::read(process.pid);
        let same = now.is_some_and(|now| now.inner == process.inner && !now.is_stopped());
        ensure!(same, "{process:?} was touched");
    }
    slurm.run(cluster, &format!("scancel {number}"))?;
    slurm.wait_for(cluster, number, deadline, BatchJob::is_over)?;
    clean::check(cluster, std::slice::from_ref(&images))?;
    let left = fs::read_dir(&images)?.count();
    ensure!(left == 0, "{left} images");
    Ok(String::new())
}

/// `reverbs checkpoint` by a user who is logged in on the first node. Gives the image.
fn checkpoint(
    context: &Context<'_>,
    cluster: &Cluster,
    slurm: &Slurm,
    job: &Job,
    options: &str,
) -> Result<PathBuf> {
    let trees = job.trees(cluster)?;
    let root = &trees.first().context("no tree")?.root;
    let command = context.setup.reverbs()?;
    let text = format!("{} checkpoint {} {options}", command.display(), root.inner);
    let printed = slurm.run(cluster, &text)?;
    let image = PathBuf::from(printed.trim_end());
    ensure!(image.join("job.json").is_file(), "no image: {printed}");
    Ok(image)
}

/// A step of one task would get one processor for it, and all ranks of its node would be on that.
fn may_use_all_processors(trees: &[Tree]) -> Result<()> {
    let allowed = |pid: u32| -> Result<String> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find(|line| line.starts_with("Cpus_allowed:"));
        Ok(line.context("no Cpus_allowed")?.to_owned())
    };
    let own = allowed(std::process::id())?;
    for pid in trees.iter().flat_map(Tree::pids) {
        let found = allowed(pid)?;
        ensure!(found == own, "process {pid} has {found} and not {own}");
    }
    Ok(())
}

/// The other node was reached by a step of the job, which is still there.
fn has_step(cluster: &Cluster, slurm: &Slurm, number: u32) -> Result<()> {
    let other = cluster.nodes().last().context("no nodes")?.name();
    let listed = slurm.run(
        cluster,
        &format!("squeue --steps -h -j {number} -o '%i %N'"),
    )?;
    let is_step = |line: &str| {
        line.split_once(' ').is_some_and(|(step, node)| {
            node == other && step.starts_with(&format!("{number}.")) && !step.ends_with("batch")
        })
    };
    ensure!(listed.lines().any(is_step), "no step on {other}: {listed}");
    Ok(())
}
