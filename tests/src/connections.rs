//! Connections made by `rdma_cm`: a job that has one is not touched, and one that has none at the moment makes another later.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::{Numbers, connection_states, context_numbers};
use crate::jobs::{COMMAND_LIMIT, wait_for_traffic};
use crate::process::{self, Running};
use crate::{clients, evidence, mpi, own_programs, tree};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(300);

/// Both ends of `rping`, without an end. Arguments: the address, the port.
const PINGS: &str = r#"
rping -s -a $1 -p $2 -v -V &
sleep 1
rping -c -a $1 -p $2 -v -V
"#;

/// A job with connections of `rdma_cm`.
#[derive(Clone, Copy, Debug)]
pub enum Connections {
    /// Messages go over one all the time.
    Live,
    /// None between two cycles, one after each.
    Idle,
    /// An id that is bound to no device.
    Unbound,
}

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    [
        ("fail-connection", Connections::Live),
        ("connection-unbound", Connections::Unbound),
        ("cycle-connection-idle", Connections::Idle),
    ]
    .into_iter()
    .map(|(name, connections)| Case {
        name: name.to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::Connections(connections),
    })
    .collect()
}

/// The remark is what a refusal says, or how many messages were checked.
///
/// # Errors
/// When a cycle or checkpoint does not do what it should, or the job suffers.
pub fn run(connections: Connections, job: &Job<'_>) -> Result<String> {
    match connections {
        Connections::Live => live(job),
        Connections::Idle => idle(job),
        Connections::Unbound => unbound(job),
    }
}

fn live(job: &Job<'_>) -> Result<String> {
    let device = &job.setup.device;
    let address = clients::address(job.setup)?.to_string();
    let mut command = job.setup.command("sh");
    command
        .args(["-c", PINGS, "sh", &address])
        .arg(job.port.to_string());
    let mut both = Running::start(command, &job.folder, "pings")?;
    wait_for_traffic(&mut both, device, job.deadline)?;
    let ends = mpi::processes_called(both.pid(), "rping");
    ensure!(ends.len() == 2, "processes found: {ends:?}");
    for end in &ends {
        evidence::check_mode(*end, &job.setup.mode)?;
    }

    let before = Numbers::on(device)?;
    let said = refused(&both, job, &["cycle"])?;
    for word in ["rdma_cm: cm_id ", device, "CONNECT", &address, "end it"] {
        ensure!(said.contains(word), "no word of \"{word}\": {said}");
    }
    let images = job.folder.join("images");
    let images = images.display().to_string();
    let of_checkpoint = refused(&both, job, &["checkpoint", "--images", &images])?;
    ensure!(
        of_checkpoint.contains("rdma_cm: cm_id "),
        "no word of a connection: {of_checkpoint}"
    );
    ensure!(
        Numbers::on(device)? == before,
        "what was refused has changed something"
    );
    // Both would end if a message went wrong.
    wait_for_traffic(&mut both, device, job.deadline).context("after the refusal")?;
    let now = mpi::processes_called(both.pid(), "rping");
    ensure!(now == ends, "the processes were {ends:?} and are {now:?}");
    process::signal_each(&ends, Signal::KILL);
    both.wait(job.deadline)?;
    tree::wait_until_gone(&ends, job.deadline)?;
    Ok(said)
}

/// `connections` of the test programs, and the file by which it is told what to do.
struct Program {
    running: Running,
    orders: PathBuf,
}

impl Program {
    fn start(job: &Job<'_>) -> Result<Self> {
        let orders = job.folder.join("orders");
        let mut command = job.setup.command(job.setup.own_program("connections")?);
        command.arg("--orders").arg(&orders);
        let running = Running::start(command, &job.folder, "connections")?;
        Ok(Self { running, orders })
    }

    /// Has it do something, and waits until it says so.
    fn order(&mut self, job: &Job<'_>, order: &str, answer: &str) -> Result<()> {
        // All of it at once.
        let written = self.orders.with_extension("new");
        fs::write(&written, order)?;
        fs::rename(&written, &self.orders)?;
        let deadline = job.deadline.at_most(COMMAND_LIMIT);
        self.running.wait_for_line(deadline, answer).map(drop)
    }

    fn finish(mut self, job: &Job<'_>) -> Result<String> {
        self.running.signal(Signal::TERM)?;
        let deadline = job.deadline.at_most(COMMAND_LIMIT);
        self.running.wait_for_success(deadline)?;
        let messages = own_programs::check_account(&self.running.output()?)?;
        Ok(format!("{messages} messages"))
    }
}

fn idle(job: &Job<'_>) -> Result<String> {
    const CYCLES: u32 = 3;
    let address = clients::address(job.setup)?.to_string();
    let mut program = Program::start(job)?;
    program.order(job, &address, "idle 1")?;
    evidence::check_mode(program.running.pid(), &job.setup.mode)?;
    for number in 1..=CYCLES {
        cycle(&program.running, job).with_context(|| format!("cycle {number}"))?;
        program.order(job, &address, &format!("idle {}", number + 1))?;
    }
    let messages = program.finish(job)?;
    Ok(format!("{CYCLES} cycles, {messages}"))
}

fn unbound(job: &Job<'_>) -> Result<String> {
    let address = clients::address(job.setup)?.to_string();
    let mut program = Program::start(job)?;
    program.order(job, &address, "idle 1")?;
    program.order(job, "hold", "holding")?;
    ensure!(
        connection_states(&job.setup.device)?.is_empty(),
        "the kernel lists an id that is bound to no device"
    );
    let said = refused(&program.running, job, &["cycle"])?;
    let wanted = "rdma_cm: 1 id that is bound to no device";
    ensure!(said.contains(wanted), "no word of \"{wanted}\": {said}");
    program.order(job, "release", "released")?;
    cycle(&program.running, job)?;
    program.order(job, &address, "idle 2")?;
    program.finish(job)?;
    Ok(said)
}

/// Fresh hardware under a job that has no connection: all that it has is open devices.
fn cycle(running: &Running, job: &Job<'_>) -> Result<()> {
    let before = context_numbers(&job.setup.device)?;
    let mut command = job.setup.reverbs()?;
    command.arg("cycle").arg(running.pid().to_string());
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    process::run(command, &job.folder, "cycle", deadline)?;
    let now = context_numbers(&job.setup.device)?;
    ensure!(
        !now.is_empty() && now.is_disjoint(&before),
        "the open devices were {before:?} and are {now:?}"
    );
    Ok(())
}

/// A command on the job that must fail; gives what it says.
fn refused(running: &Running, job: &Job<'_>, arguments: &[&str]) -> Result<String> {
    let mut command = job.setup.reverbs()?;
    command
        .arg("--quiet")
        .args(arguments)
        .arg(running.pid().to_string());
    let name = format!("refused-{}", arguments[0]);
    let mut refused = Running::start(command, &job.folder, &name)?;
    let status = refused.wait(job.deadline.at_most(COMMAND_LIMIT))?;
    let errors = refused.errors()?;
    ensure!(status.code() == Some(1), "{status}: {errors}");
    Ok(errors.trim().to_owned())
}
