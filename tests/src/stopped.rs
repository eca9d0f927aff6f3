//! A process of the job is stopped (SIGSTOP) before a cycle or in the middle of it: the cycle fails in bounded time and names
//! it. Nobody goes on without it where anything was moved, so that after SIGCONT and `reverbs resume` nothing is missing.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reverbs::control::message::Phase;
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::Numbers;
use crate::interposer::{Interposer, Moment};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process;
use crate::stand_in::standing;
use crate::tree;

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(600);

/// What a cycle may take at most: the 20 s after which a stopped process is given up, the 10 s in which it does not say where
/// it stands, and the rest of the cycle.
const CYCLE_LIMIT: Duration = Duration::from_secs(50);

/// A process that is stopped when it is asked this.
#[derive(Debug)]
pub struct Stopped {
    name: &'static str,
    request: &'static str,
}

const STOPPED: &[Stopped] = &[
    Stopped {
        name: "stopped-before",
        request: "hello",
    },
    Stopped {
        name: "stopped-in-close",
        request: "close",
    },
    Stopped {
        name: "stopped-in-settle",
        request: "settle",
    },
    Stopped {
        name: "stopped-in-rebuild",
        request: "rebuild",
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    STOPPED
        .iter()
        .map(|stopped| Case {
            name: stopped.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Stopped(stopped),
        })
        .collect()
}

/// Stops a process of a running job in a cycle. The remark says how long the cycle took to find out.
///
/// # Errors
/// When the cycle takes too long or does not name it, or the job loses anything.
pub fn run(stopped: &Stopped, job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, Kind::TRAFFIC)?;
    started.wait_for_traffic()?;
    let root = started.root;
    let victim = *tree::descendants(root).first().context("no child")?;
    let before = Numbers::on(&job.setup.device)?;

    let interposer = Interposer::put_before(
        victim,
        stopped.request,
        Moment::Asked,
        Box::new(move |_| stop(victim)),
    )?;
    let mut command = job.setup.reverbs()?;
    command.args(["--quiet", "cycle", &root.to_string()]);
    let began = Instant::now();
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    let said = process::fail(command, &job.folder, "cycle", deadline)?;
    let took = began.elapsed();
    interposer.check_happened()?;
    drop(interposer);
    ensure!(took < CYCLE_LIMIT, "the cycle took {took:?}");
    for part in [
        format!("process {victim}: no answer to \"{}\"", stopped.request),
        format!("kill -CONT {victim}"),
    ] {
        ensure!(said.contains(&part), "no word of \"{part}\" in: {said}");
    }

    process::signal_each(&[victim], Signal::CONT);
    let touched = !matches!(stopped.request, "hello" | "close");
    let others = standing(root)?
        .remove(&root)
        .context("no agent in the root")?;
    ensure!(
        (others.phase != Phase::Running) == touched,
        "the other process is in {:?}",
        others.phase
    );
    if stopped.request != "hello" {
        started.resume()?;
    }
    started.wait_for_traffic()?;
    let after = Numbers::on(&job.setup.device)?;
    match touched {
        true => after.check_all_new(&before)?,
        false => ensure!(after == before, "the numbers changed"),
    }
    started.cycle()?;
    started.wait_for_traffic()?;
    let done = started.finish()?;
    Ok(format!("{done}; found after {:.0} s", took.as_secs_f64()))
}

/// Returns when no thread of the process runs any more: only the one that takes the signal stops at once.
fn stop(victim: u32) {
    process::signal_each(&[victim], Signal::STOP);
    let threads = format!("/proc/{victim}/task");
    let is_stopped = |thread: fs::DirEntry| {
        fs::read_to_string(thread.path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
    };
    while fs::read_dir(&threads).is_ok_and(|mut all| !all.all(|one| one.is_ok_and(is_stopped))) {
        std::thread::sleep(Duration::from_millis(1));
    }
}
