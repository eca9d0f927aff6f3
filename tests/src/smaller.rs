//! A restart on a device that offers less than the job uses: refused by the name of the limit, before any process is restored.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process::{Running, the_line};
use crate::setup::WRAPPER;

/// The time limit of the case.
const LIMIT: Duration = Duration::from_secs(600);

/// What the device is made to be (in the words of `tests/wrappers`), and what is said of it then.
const SMALLER: &[(&str, &str)] = &[
    ("queue=4", "requests in a queue (max_qp_wr is 4)"),
    ("fail=create_qp:EINVAL", "RC queue pairs for "),
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "fail-smaller-device".to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::Smaller,
    }]
}

/// Saves and ends a job, tries to bring it back on devices that are too small, and then on its own.
///
/// # Errors
/// When a restart is not refused as it should be, leaves anything, or the job cannot be brought back afterwards.
pub fn run(job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, Kind::TRAFFIC)?;
    started.wait_for_traffic()?;
    let image = started.checkpoint(&["--stop"])?;
    for (number, (plan, said)) in SMALLER.iter().enumerate() {
        let mut command = job.setup.reverbs()?;
        command.arg("--quiet").arg("restart").arg(&image);
        command.env("REVERBS_LIBIBVERBS", job.setup.programs.join(WRAPPER));
        command.env("REVERBS_WRAPPER", plan);
        let mut restart = Running::start(command, &job.folder, &format!("refused-{number}"))?;
        let status = restart.wait(job.deadline.at_most(COMMAND_LIMIT))?;
        ensure!(status.code() == Some(1), "{plan}: {status}");
        let errors = restart.errors()?;
        let line = the_line(&errors)?;
        ensure!(
            line.contains(said) && line.contains("--device"),
            "{plan}: no word of \"{said}\" and of --device in: {line}"
        );
        ensure!(
            !Path::new(&format!("/proc/{}", started.root)).exists(),
            "{plan}: process {} was restored",
            started.root
        );
    }
    let mut command = job.setup.reverbs()?;
    command.arg("restart").arg(&image).arg("--wait");
    let mut restart = Running::start(command, &job.folder, "restart")?;
    restart.wait_for_line(
        job.deadline.at_most(COMMAND_LIMIT),
        &started.root.to_string(),
    )?;
    started.finish_in(&mut restart)
}
