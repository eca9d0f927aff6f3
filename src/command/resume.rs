//! `reverbs resume`: after an orchestrator was killed half-way.

use std::process::ExitCode;

use anyhow::Result;

use super::checkpoint::Unfinished;
use super::cli::ResumeOptions;
use super::interrupt::Interrupt;
use super::job::{Driver, ProcessTree, new_session, root_of};
use super::node::NodeRequest;
use super::nodes::Ensemble;
use super::progress::{Progress, count};

/// # Errors
/// Another command drives the job, or a process cannot be brought back: it is named, and the others run.
pub(crate) fn resume(options: &ResumeOptions, quiet: bool) -> Result<ExitCode> {
    let root = root_of(options.pid)?;
    ProcessTree::of(root)?.require_user()?;
    let mut job = Ensemble::attach(root, &options.without)?;
    job.all(NodeRequest::Unlock)?;
    Unfinished::of(root)?.remove();
    let mut progress = Progress::new(quiet);
    // Not interruptible: half-way is what this ends.
    let mut driver = Driver::new(
        &mut job,
        &mut progress,
        Interrupt::default(),
        new_session()?,
        options.devices.choices.clone(),
    );
    let found = driver.attach_abandoned()?;
    if found == 0 {
        progress.note("no process of the job uses RDMA: there was nothing to resume");
        return Ok(ExitCode::SUCCESS);
    }
    driver.bring_back()?;
    progress.note(&format!("{} running", count(found, "process", "processes")));
    Ok(ExitCode::SUCCESS)
}
