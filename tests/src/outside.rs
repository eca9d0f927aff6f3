//! A job that is connected to a process that is not part of it: refused by name, or its queue pair ends in error.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::evidence;
use crate::hardware::Numbers;
use crate::jobs::{COMMAND_LIMIT, wait_for_traffic};
use crate::process::{self, Running};

/// The time limit of the case.
const LIMIT: Duration = Duration::from_secs(300);

/// More than it can do within that.
const ROUNDS: &str = "100000000";

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "outside".to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::Outside,
    }]
}

/// A server and a client that know nothing of each other's process tree; the server is the job.
///
/// # Errors
/// When a cycle is not refused, names the wrong thing or disturbs anybody; or does not end the connection when it is allowed.
pub fn run(job: &Job<'_>) -> Result<String> {
    let mut server = Running::start(pingpong(job), &job.folder, "server")?;
    server.wait_until(job.deadline, "it listened", |pid| {
        Ok((evidence::has_device_open(pid) && evidence::is_listening(job.port)?).then_some(()))
    })?;
    evidence::check_mode(server.pid(), &job.setup.mode)?;
    let mut client = pingpong(job);
    client.arg("127.0.0.1");
    let mut client = Running::start(client, &job.folder, "client")?;
    let device = &job.setup.device;
    wait_for_traffic(&mut server, device, job.deadline)?;

    let before = Numbers::on(device)?;
    let refused = refused(&server, &client, job)?;
    ensure!(
        Numbers::on(device)? == before,
        "the refused cycle has changed something"
    );
    wait_for_traffic(&mut client, device, job.deadline).context("after the refusal")?;

    let mut command = job.setup.reverbs()?;
    command.args(["cycle", "--allow-outside", &server.pid().to_string()]);
    process::run(
        command,
        &job.folder,
        "allowed",
        job.deadline.at_most(COMMAND_LIMIT),
    )?;
    // What it had posted comes back flushed, as on a broken connection.
    let flushed = "Work Request Flushed Error";
    let status = server.wait(job.deadline)?;
    let errors = server.errors()?;
    ensure!(!status.success(), "server: {status}");
    ensure!(
        errors.contains(flushed),
        "no word of \"{flushed}\": {errors}"
    );
    // The client waits for an answer, or for the end of its retries, as it would if the server had died.
    client.signal(Signal::KILL)?;
    client.wait(job.deadline)?;
    Ok(refused)
}

fn pingpong(job: &Job<'_>) -> Command {
    let mut command = job.setup.command("ibv_rc_pingpong");
    command.args(["-d", &job.setup.device, "-p", &job.port.to_string()]);
    command.args(["-n", ROUNDS, "-g", &job.setup.gid_index.to_string()]);
    command
}

/// A cycle that must be refused because of the client; gives what it says.
fn refused(server: &Running, client: &Running, job: &Job<'_>) -> Result<String> {
    let mut command = job.setup.reverbs()?;
    command.args(["--quiet", "cycle", &server.pid().to_string()]);
    let mut cycle = Running::start(command, &job.folder, "refused")?;
    let status = cycle.wait(job.deadline.at_most(COMMAND_LIMIT))?;
    let errors = cycle.errors()?;
    ensure!(status.code() == Some(1), "{status}: {errors}");
    for part in [
        format!("process {}: queue pair", server.pid()),
        format!("of process {} (ibv_rc_pingpong)", client.pid()),
        "--allow-outside".to_owned(),
    ] {
        ensure!(errors.contains(&part), "no word of \"{part}\": {errors}");
    }
    Ok(errors.trim().to_owned())
}
