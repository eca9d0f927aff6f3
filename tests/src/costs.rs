//! What the provider costs on a real device: instructions of a loop, and the time of a cycle with many objects.
//!
//! Times in an emulated machine say nothing by themselves. So a loop is counted in instructions (`cargo xtask vm -i`, where
//! the clock counts them), and the phases of a cycle stand beside the verbs that it has to call anyway,
//! measured in the same machine on the bare device.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::Numbers;
use crate::process::{self, Running};
use crate::{evidence, own_programs};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(600);

/// The time limit of one program or command.
const STEP_LIMIT: Duration = Duration::from_secs(300);

/// Messages of a measured loop.
const LOOP: &str = "2000";

/// Loops of each kind, taken in turn; the fastest counts.
const ROUNDS: u32 = 3;

/// The most that the provider may add, where the clock counts instructions.
const MOST_ADDED: f64 = 0.02;

/// A process with so many objects.
#[derive(Debug)]
pub struct Objects {
    name: &'static str,
    queue_pairs: u32,
    /// Of 1 MiB.
    regions: u32,
}

const OBJECTS: &[Objects] = &[
    Objects {
        name: "cost-qps-1",
        queue_pairs: 1,
        regions: 0,
    },
    Objects {
        name: "cost-qps-64",
        queue_pairs: 64,
        regions: 0,
    },
    Objects {
        name: "cost-qps-1024",
        queue_pairs: 1024,
        regions: 0,
    },
    Objects {
        name: "cost-mrs-1",
        queue_pairs: 0,
        regions: 1,
    },
    Objects {
        name: "cost-mrs-64",
        queue_pairs: 0,
        regions: 64,
    },
    Objects {
        name: "cost-mrs-1024",
        queue_pairs: 0,
        regions: 1024,
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    let counted = ("cost-loop", Needs::Counting, Action::Loop);
    let objects = OBJECTS
        .iter()
        .map(|objects| (objects.name, Needs::Provider, Action::Objects(objects)));
    std::iter::once(counted)
        .chain(objects)
        .map(|(name, needs, action)| Case {
            name: name.to_owned(),
            needs,
            limit: LIMIT,
            action,
        })
        .collect()
}

/// Runs the loop on the bare device and through the provider. The remark is what that adds.
///
/// # Errors
/// When it adds more than it may.
pub fn run_loop(job: &Job<'_>) -> Result<String> {
    let (mut bare, mut through) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        let mut command = own_programs::command(job.setup, "verb_costs")?;
        command.env_remove("RDMAV_DRIVERS");
        bare = bare.min(one_loop(job, command)?);
        let command = own_programs::command(job.setup, "verb_costs")?;
        through = through.min(one_loop(job, command)?);
    }
    let added = through / bare - 1.0;
    let remark = format!(
        "{bare:.0} ns bare, {through:.0} ns through the provider: {:+.2} %",
        added * 100.0
    );
    ensure!(
        added <= MOST_ADDED,
        "more than {} %: {remark}",
        MOST_ADDED * 100.0
    );
    Ok(remark)
}

/// Nanoseconds for one message of the loop.
fn one_loop(job: &Job<'_>, mut command: Command) -> Result<f64> {
    command.args(["--loop", LOOP]);
    let output = process::run(
        command,
        &job.folder,
        "verb_costs",
        job.deadline.at_most(STEP_LIMIT),
    )?;
    let found: Value = serde_json::from_str(&output).with_context(|| output.clone())?;
    found["nanoseconds"].as_f64().context(output)
}

/// Cycles a process with many objects twice. The remark has the phases of the second cycle beside the verbs.
///
/// # Errors
/// When the cycle fails or changes nothing, or the process finds anything wrong.
pub fn run_objects(objects: &Objects, job: &Job<'_>) -> Result<String> {
    let mut command = objects.command(job)?;
    command.env_remove("RDMAV_DRIVERS");
    let raw = finish(objects.start(job, "bare", command)?, job)?;

    let mut running = objects.start(job, "job", objects.command(job)?)?;
    evidence::check_mode(running.pid(), &job.setup.mode)?;
    let mut before = Numbers::on(&job.setup.device)?;
    for _ in 0..2 {
        let mut command = job.setup.reverbs()?;
        command.arg("cycle").arg(running.pid().to_string());
        process::run(
            command,
            &job.folder,
            "cycle",
            job.deadline.at_most(STEP_LIMIT),
        )?;
        let after = Numbers::on(&job.setup.device)?;
        if objects.queue_pairs > 0 {
            after.check_all_new(&before)?;
        }
        after.check_as_many(&before)?;
        ensure!(
            after.keys.is_disjoint(&before.keys),
            "a key of the hardware has stayed"
        );
        before = after;
    }
    running.wait_for_line(job.deadline, "ready")?;
    finish(running, job)?;
    let phases = std::fs::read_to_string(job.folder.join("cycle.err"))?;
    Ok(format!(
        "{}; verbs: {}",
        phases_of(&phases),
        verbs_of(&raw)?
    ))
}

impl Objects {
    fn command(&self, job: &Job<'_>) -> Result<Command> {
        let mut command = own_programs::command(job.setup, "verb_costs")?;
        command.args(["--qps", &self.queue_pairs.to_string()]);
        command.args(["--mrs", &self.regions.to_string()]);
        Ok(command)
    }

    fn start(&self, job: &Job<'_>, name: &str, command: Command) -> Result<Running> {
        let mut running = Running::start(command, &job.folder, name)?;
        running.wait_for_line(job.deadline.at_most(STEP_LIMIT), "ready")?;
        Ok(running)
    }
}

/// Ends the program; gives the first line of what it wrote.
fn finish(mut running: Running, job: &Job<'_>) -> Result<String> {
    running.signal(Signal::TERM)?;
    running.wait_for_success(job.deadline.at_most(STEP_LIMIT))?;
    let output = running.output()?;
    ensure!(output.lines().last() == Some("ok"), "it did not say ok");
    Ok(output.lines().next().unwrap_or_default().to_owned())
}

/// `close 0.004, drain 0.001, ...` from the lines of `reverbs cycle`.
fn phases_of(errors: &str) -> String {
    let phases: Vec<_> = errors
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("reverbs: ")?.split_whitespace();
            Some(format!("{} {}", words.next()?, words.next()?))
        })
        .collect();
    phases.join(", ")
}

fn verbs_of(line: &str) -> Result<String> {
    let found: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
    let found = found.as_object().context("no object")?;
    let verbs: Vec<_> = found
        .iter()
        .filter_map(|(name, seconds)| {
            let seconds = seconds.as_f64().filter(|seconds| *seconds > 1e-5)?;
            Some(format!("{} {seconds:.3}", name.replace('_', " ")))
        })
        .collect();
    Ok(verbs.join(", "))
}
