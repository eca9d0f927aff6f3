//! Two orchestrators on one job: while one drives, the other is refused and told by whom.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::Numbers;
use crate::interposer::{Interposer, Moment};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process::{self, Running};
use crate::tree;

/// The time limit of the case.
const LIMIT: Duration = Duration::from_secs(600);

/// The case of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "two-orchestrators".to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::Rivals,
    }]
}

/// Holds a cycle in the middle of each of some requests, and lets others try. The remark is what the job checked.
///
/// # Errors
/// When a second orchestrator is let in, or does not name the first, or the job loses anything.
pub fn run(job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, Kind::TRAFFIC)?;
    started.wait_for_traffic()?;
    for request in ["begin", "close", "settle", "connect"] {
        hold_and_try(&mut started, job, request).with_context(|| format!("held at {request}"))?;
    }
    started.finish()
}

fn hold_and_try(started: &mut Started<'_>, job: &Job<'_>, request: &'static str) -> Result<()> {
    let root = started.root;
    let child = *tree::descendants(root).first().context("no child")?;
    let before = Numbers::on(&job.setup.device)?;
    let (held, go_on) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let hold = {
        let (held, go_on) = (Arc::clone(&held), Arc::clone(&go_on));
        move |_| {
            held.store(true, Ordering::Release);
            while !go_on.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    };
    let interposer = Interposer::put_before(child, request, Moment::Answered, Box::new(hold))?;
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    let mut command = job.setup.reverbs()?;
    command.arg("cycle").arg(root.to_string());
    let mut first = Running::start(command, &job.folder, "first")?;
    first.wait_until(deadline, "it asked", |_| {
        Ok(held.load(Ordering::Acquire).then_some(()))
    })?;

    let images = job.folder.join("images");
    let images = images.to_str().context("name of a folder")?;
    let (root, child) = (root.to_string(), child.to_string());
    for rival in [
        &["cycle", &root] as &[&str],
        &["resume", &root],
        &["checkpoint", &root, "--images", images],
        // By the name of another process of the job: only the claim in each process stands in the way.
        &["cycle", &child],
        &["resume", &child],
    ] {
        let mut command = job.setup.reverbs()?;
        command.args(rival);
        let said = process::fail(command, &job.folder, "rival", deadline)?;
        ensure!(
            said.contains(&format!("another reverbs, process {}", first.pid())),
            "{rival:?} is refused, but not because of process {}: {said}",
            first.pid()
        );
    }
    go_on.store(true, Ordering::Release);
    first.wait_for_success(deadline).context(first.errors()?)?;
    drop(interposer);
    Numbers::on(&job.setup.device)?.check_all_new(&before)?;
    started.wait_for_traffic()
}
