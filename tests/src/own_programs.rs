//! Our own C programs, each run to its end by itself.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::case::{Action, Case, Job, Needs};
use crate::mpi::Library;
use crate::process::{self, Running};
use crate::setup::Setup;
use crate::{evidence, mpi, tree};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(300);

/// One of our programs with its options.
#[derive(Debug)]
pub struct Own {
    name: &'static str,
    program: &'static str,
    options: &'static str,
}

const OWN: &[Own] = &[
    Own {
        name: "rc-polled",
        program: "rc_traffic",
        options: "--messages 400",
    },
    Own {
        name: "rc-events",
        program: "rc_traffic",
        options: "--messages 300 --qps 1 --window 8 --events --seed 2",
    },
    Own {
        name: "rc-many-qps",
        program: "rc_traffic",
        options: "--messages 100 --qps 16 --seed 3",
    },
    Own {
        name: "rc-slow-receiver",
        program: "rc_traffic",
        options: "--messages 150 --rnr",
    },
    Own {
        name: "rc-slow-receiver-events",
        program: "rc_traffic",
        options: "--messages 100 --rnr --events --seed 4",
    },
    Own {
        name: "ud-srq-uc",
        program: "ud_srq",
        options: "--messages 200 --seed 5",
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    let verbs = OWN.iter().map(|own| (own.name, Action::Own(own)));
    let mpi = [
        (
            "mpi-np2",
            Action::Mpi {
                library: Library::OpenMpi,
                ranks: 2,
                rounds: 32,
            },
        ),
        (
            "mpich-np2",
            Action::Mpi {
                library: Library::Mpich,
                ranks: 2,
                rounds: 32,
            },
        ),
        (
            "mpi-np4",
            Action::Mpi {
                library: Library::OpenMpi,
                ranks: 4,
                rounds: 16,
            },
        ),
    ];
    std::iter::once(("verbs-facts", Action::Facts))
        .chain(verbs)
        .chain(mpi)
        .map(|(name, action)| Case {
            name: name.to_owned(),
            needs: Needs::AnyMode,
            limit: LIMIT,
            action,
        })
        .collect()
}

/// Runs a program and checks its account. The remark is how many messages were checked.
///
/// # Errors
/// When it fails, or did not drive the device in the wanted way.
pub fn run(own: &Own, job: &Job<'_>) -> Result<String> {
    let options: Vec<_> = own.options.split_whitespace().collect();
    let mut program = start(job, own.program, &options)?;
    // The child checks everything that the parent does, so the parent stands for both.
    program.wait_for_line(job.deadline, "ready")?;
    evidence::check_mode(program.pid(), &job.setup.mode)?;
    let ended = program.wait_for_success(job.deadline);
    if ended.is_err() {
        ask_for_report(&mut program, &job.folder);
    }
    ended?;
    Ok(format!("{} messages", check_account(&program.output()?)?))
}

/// Runs `mpi_check` to its end. The remark is the number of rounds.
///
/// # Errors
/// When it fails, or its ranks did not drive the device in the wanted way.
pub fn run_mpi(library: Library, ranks: u32, rounds: u32, job: &Job<'_>) -> Result<String> {
    let rounds_wanted = rounds.to_string();
    let mut mpirun = mpi::start_check(job, library, ranks, &["--iterations", &rounds_wanted])?;
    let done = mpi::finish_check(&mut mpirun, ranks, job.deadline)?;
    ensure!(
        done == u64::from(rounds),
        "{done} rounds instead of {rounds}"
    );
    Ok(format!("{done} rounds"))
}

/// Makes a program that hangs write to its standard error where it stands, and notes in
/// `FOLDER/threads` what its threads wait for.
pub fn ask_for_report(program: &mut Running, folder: &Path) {
    if !matches!(program.ended(), Ok(None)) {
        return;
    }
    let mut pids = tree::descendants(program.pid());
    pids.push(program.pid());
    // For people only: a case that has failed already does not fail for want of this.
    let _ = fs::write(folder.join("threads"), process::describe_threads(&pids));
    process::signal_each(&pids, Signal::USR1);
    // Nothing tells when what it writes is complete.
    std::thread::sleep(Duration::from_millis(500));
}

/// Starts one of our verbs programs on the device of the run.
///
/// # Errors
/// When it is not there or cannot be started.
pub fn start(job: &Job<'_>, name: &str, options: &[&str]) -> Result<Running> {
    let mut command = command(job.setup, name)?;
    command.args(options);
    Running::start(command, &job.folder, name)
}

/// A command for one of our verbs programs, with the device of the run.
///
/// # Errors
/// When it was not compiled.
pub fn command(setup: &Setup, name: &str) -> Result<Command> {
    let mut command = setup.command(setup.own_program(name)?);
    command.args(["--device", &setup.device]);
    command.args(["--gid-index", &setup.gid_index.to_string()]);
    Ok(command)
}

/// Reads the line of JSON with which a program ends.
///
/// # Errors
/// When there is none, it tells of errors, or no message was checked.
pub fn account(output: &str) -> Result<Value> {
    let line = output.lines().last().context("the program wrote nothing")?;
    let account: Value =
        serde_json::from_str(line).with_context(|| format!("not an account: {line}"))?;
    ensure!(account["errors"] == 0, "errors in {line}");
    let messages = account["messages"]
        .as_u64()
        .context("no number of messages")?;
    ensure!(messages > 0, "no message was checked");
    Ok(account)
}

/// The number of checked messages in a program's account.
///
/// # Errors
/// As [`account`].
pub fn check_account(output: &str) -> Result<u64> {
    Ok(account(output)?["messages"].as_u64().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_without_traffic_or_with_errors_fails() {
        assert_eq!(
            check_account("ready\n{\"messages\":7,\"errors\":0}\n").unwrap(),
            7
        );
        check_account("ready\n{\"messages\":0,\"errors\":0}\n").unwrap_err();
        check_account("ready\n{\"messages\":7,\"errors\":1}\n").unwrap_err();
        check_account("ready\n{\"messages\":7}\n").unwrap_err();
        check_account("ready\n").unwrap_err();
    }
}
