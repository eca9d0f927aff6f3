//! A CRIU that is killed while it saves a job: before it has touched a process, and when it has written everything and
//! holds all processes and their TCP connections. The checkpoint says so and leaves nothing; the job goes on, and can be
//! saved.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process;

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(600);

/// The stages at which CRIU calls the scripts that it was given.
const STAGES: [&str; 2] = ["pre-dump", "post-dump"];

/// In each rule of CRIU's.
const MARK: &str = "0xc114";

/// A job whose CRIU is killed.
#[derive(Debug)]
pub struct KilledCriu {
    name: &'static str,
    kind: Kind,
}

const KILLED: &[KilledCriu] = &[
    KilledCriu {
        name: "killed-criu",
        kind: Kind::TRAFFIC,
    },
    // With TCP connections between its processes.
    KilledCriu {
        name: "killed-criu-mpi",
        kind: Kind::Mpi { ranks: 2 },
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
            action: Action::KilledCriu(killed),
        })
        .collect()
}

/// Kills CRIU at each stage. The remark is what the job checked.
///
/// # Errors
/// When the checkpoint does not fail as it should, or leaves anything, or the job loses anything.
pub fn run(killed: &KilledCriu, job: &Job<'_>) -> Result<String> {
    let mut started = Started::start(job, killed.kind)?;
    started.wait_for_traffic()?;
    let images = job.folder.join("images");
    let rules = firewall_rules()?;
    for stage in STAGES {
        let mut command = started.checkpoint_command(&images)?;
        command.arg("--quiet");
        command.env("REVERBS_CRIU", killed_at(stage, started.root)?);
        let deadline = job.deadline.at_most(COMMAND_LIMIT);
        let said = process::fail(command, &job.folder, stage, deadline).context(stage)?;
        ensure!(
            said.contains("no image was made, the job runs on: CRIU failed (signal: 9"),
            "killed at {stage} it says: {said}"
        );
        let left = fs::read_dir(&images)?.count();
        ensure!(left == 0, "killed at {stage} it left {left} entries");
        ensure!(
            firewall_rules()? == rules,
            "killed at {stage} it left rules in the firewall: {:?}",
            firewall_rules()?
        );
        let held = fs::read_to_string(rules_when_killed(started.root))?;
        let locks = matches!(killed.kind, Kind::Mpi { .. }) && stage == "post-dump";
        ensure!(
            held.contains(MARK) == locks,
            "killed at {stage}, the firewall had the rules {held}"
        );
        started.wait_for_traffic().context(stage)?;
    }
    started.checkpoint(&[])?;
    started.wait_for_traffic()?;
    started.finish()
}

/// A command in CRIU's place, which is killed at this stage of a dump.
fn killed_at(stage: &str, root: u32) -> Result<PathBuf> {
    // Not on the share, which is slow.
    let script = Path::new("/tmp").join(format!("kill-criu-{root}"));
    let command = Path::new("/tmp").join(format!("killed-criu-{root}"));
    let kill = format!(
        "[ \"$CRTOOLS_SCRIPT_ACTION\" = {stage} ] || exit 0\niptables -S > {}\nkill -KILL $PPID",
        rules_when_killed(root).display()
    );
    let start = format!(
        "[ \"$1\" = dump ] || exec criu \"$@\"\nexec criu \"$@\" --action-script {}",
        script.display()
    );
    for (path, text) in [(&script, kill), (&command, start)] {
        fs::write(path, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(path, PermissionsExt::from_mode(0o755))?;
    }
    Ok(command)
}

fn rules_when_killed(root: u32) -> PathBuf {
    Path::new("/tmp").join(format!("rules-{root}"))
}

fn firewall_rules() -> Result<String> {
    let listed = Command::new("iptables").arg("-S").output()?;
    ensure!(listed.status.success(), "iptables -S: {}", listed.status);
    Ok(String::from_utf8_lossy(&listed.stdout).into_owned())
}
