//! An orchestrator that dies in the middle: `reverbs resume` brings the job back from wherever it stands.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process::{self, Running};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(900);

/// A phase may be over before the blow falls, so it is tried so often.
const TRIES: u32 = 6;

/// Between two looks at what the orchestrator says.
const PAUSE: Duration = Duration::from_millis(1);

/// An orchestrator that is killed when it says that a phase is done, so in the next.
#[derive(Debug)]
pub struct Killed {
    name: &'static str,
    what: What,
    /// As the command calls them.
    phases: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum What {
    Cycle,
    Checkpoint,
}

const KILLED: &[Killed] = &[
    Killed {
        name: "killed-cycle",
        what: What::Cycle,
        phases: &[
            "close", "drain", "stop", "settle", "release", "rebuild", "connect",
        ],
    },
    Killed {
        name: "killed-checkpoint",
        what: What::Checkpoint,
        // In the midst of CRIU's work, and after it.
        phases: &["release", "save"],
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    KILLED
        .iter()
        .map(|killed| Case {
            name: killed.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Killed(killed),
        })
        .collect()
}

/// Kills the orchestrator of a running job after each phase and resumes the job. The remark says after which phases it died.
///
/// # Errors
/// When the job cannot be resumed, does not go on, or loses anything; or when fewer than all but one of the phases were hit.
pub fn run(killed: &Killed, job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, Kind::TRAFFIC)?;
    started.wait_for_traffic()?;
    let images = job.folder.join("images");
    let mut hit = Vec::new();
    for phase in killed.phases {
        for _ in 0..TRIES {
            let dead = kill_after(killed.what, phase, &started, &images, job)
                .with_context(|| format!("killed after {phase}"))?;
            started
                .wait_for_traffic()
                .with_context(|| format!("after the orchestrator was killed after {phase}"))?;
            if dead {
                hit.push(*phase);
                break;
            }
        }
    }
    ensure!(
        hit.len() + 1 >= killed.phases.len(),
        "died only after {hit:?}"
    );
    let done = started.finish()?;
    Ok(format!("{done}; died after {}", hit.join(", ")))
}

/// `false` if it was faster than we.
fn kill_after(
    what: What,
    phase: &str,
    started: &Started<'_>,
    images: &Path,
    job: &Job<'_>,
) -> Result<bool> {
    let command = match what {
        What::Checkpoint => started.checkpoint_command(images)?,
        What::Cycle => {
            let mut command = job.setup.reverbs()?;
            command.arg("cycle").arg(started.root.to_string());
            command
        }
    };
    let mut orchestrator = Running::start(command, &job.folder, "orchestrator")?;
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    let line = format!("reverbs: {phase} ");
    while !orchestrator.errors()?.contains(&line) {
        ensure!(!deadline.passed(), "it does not get as far as {phase}");
        if orchestrator.ended()?.is_some() {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    orchestrator.signal(Signal::KILL)?;
    let dead = !orchestrator.wait(deadline)?.success();

    let mut command = job.setup.reverbs()?;
    command.arg("resume").arg(started.root.to_string());
    process::run(command, &job.folder, "resume", deadline)?;
    if dead && what == What::Checkpoint {
        let visible = fs::read_dir(images)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
        for image in visible {
            let manifest = image.path().join("manifest.json");
            ensure!(
                manifest.is_file(),
                "{} is half an image",
                image.path().display()
            );
        }
    }
    Ok(dead)
}
