//! `reverbs resume`: after an orchestrator was killed half-way.

use std::process::ExitCode;

use anyhow::{Result, bail};

use reverbs::control::socket::runtime_dir;

use super::cli::ResumeOptions;
use super::interrupt::Interrupt;
use super::job::{Driver, JobLock, ProcessTree, SocketAgents, new_session, root_of};
use super::progress::{Progress, count};
use super::tcp_lock;

/// # Errors
/// Another command drives the job, or a process cannot be brought back: it is named, and the others run.
pub(crate) fn resume(options: &ResumeOptions, quiet: bool) -> Result<ExitCode> {
    let root = root_of(options.pid)?;
    let tree = ProcessTree::of(root)?;
    tree.require_user()?;
    let runtime_dir = runtime_dir()?;
    let _lock = JobLock::take(&runtime_dir, root)?;
    if !tree.is_traced() {
        // A CRIU that was killed together with the command, and not one that is still at work.
        tcp_lock::release(root, &tree.pids());
    }
    let mut agents = SocketAgents::new(root, runtime_dir);
    let mut progress = Progress::new(quiet);
    // Not interruptible: half-way is what this ends.
    let mut driver = Driver::new(
        &mut agents,
        &mut progress,
        Interrupt::default(),
        new_session()?,
        options.devices.choices.clone(),
    );
    let found = driver.attach_abandoned()?;
    if found == 0 {
        bail!("no process of the job runs under reverbs: there is nothing to resume");
    }
    driver.bring_back()?;
    progress.note(&format!("{} running", count(found, "process", "processes")));
    Ok(ExitCode::SUCCESS)
}
