//! A process of the job is killed while a `reverbs cycle` is on its way: the cycle ends and names it, the others end what
//! they had for it in errors, lose nothing else, and can be cycled again.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::Numbers;
use crate::interposer::{Interposer, Moment};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process::{self, Running};
use crate::tree;

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(900);

/// How long a cycle may take in which a process dies. None of the limits of the protocol may have to run out for it.
const CYCLE_LIMIT: Duration = Duration::from_secs(30);

/// How long the survivor may take to end what it had for the dead.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A moment of a cycle.
#[derive(Clone, Copy, Debug)]
struct When(&'static str, Moment);

/// Processes that are killed.
#[derive(Debug)]
pub struct Dead {
    name: &'static str,
    moments: &'static [When],
}

use Moment::{Answered, Asked};

const DEAD: &[Dead] = &[
    // Each request, inside it or after it.
    Dead {
        name: "dead-process",
        moments: &[
            When("hello", Asked),
            When("begin", Answered),
            When("close", Asked),
            When("drain", Answered),
            When("stop", Asked),
            When("responders", Answered),
            When("settle", Asked),
            When("release", Answered),
            When("rebuild", Asked),
            When("publish", Answered),
            When("connect", Asked),
            When("resume", Answered),
        ],
    },
    // The other way round.
    Dead {
        name: "dead-process-more",
        moments: &[
            When("hello", Answered),
            When("begin", Asked),
            When("examine", Asked),
            When("examine", Answered),
            When("close", Answered),
            When("drain", Asked),
            When("stop", Answered),
            When("responders", Asked),
            When("settle", Answered),
            When("release", Asked),
            When("rebuild", Answered),
            When("publish", Asked),
            When("connect", Answered),
            When("resume", Asked),
        ],
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    DEAD.iter()
        .map(|dead| Case {
            name: dead.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Dead(dead),
        })
        .collect()
}

/// Kills one process of the job at each moment. The remark says how many, and what the survivor checked.
///
/// # Errors
/// When a cycle does not end in time or names nobody, or the survivor loses anything but its dead peers.
pub fn run(dead: &Dead, job: &Job<'_>) -> Result<String> {
    let peers = u32::try_from(dead.moments.len())?;
    let mut started = Started::start(job, Kind::Survivor { peers })?;
    started.wait_for_traffic()?;
    let children = tree::descendants(started.root);
    ensure!(children.len() == dead.moments.len(), "{children:?}");
    let mut longest = Duration::ZERO;
    for (When(request, moment), victim) in dead.moments.iter().zip(children) {
        let took = kill_in_cycle(&mut started, job, victim, request, *moment)
            .with_context(|| format!("process {victim} killed at {request}, {moment:?}"))?;
        longest = longest.max(took);
    }
    let done = started.finish()?;
    Ok(format!(
        "{done}; {peers} died, a cycle took {:.1} s at most",
        longest.as_secs_f64()
    ))
}

fn kill_in_cycle(
    started: &mut Started<'_>,
    job: &Job<'_>,
    victim: u32,
    request: &'static str,
    moment: Moment,
) -> Result<Duration> {
    let before = Numbers::on(&job.setup.device)?;
    let interposer =
        Interposer::put_before(victim, request, moment, Box::new(move |_| kill(victim)))?;
    let cycle = |name: &str| {
        let mut command = job.setup.reverbs()?;
        command.arg("cycle").arg(started.root.to_string());
        let began = Instant::now();
        let mut cycle = Running::start(command, &job.folder, name)?;
        cycle
            .wait_for_success(job.deadline.at_most(COMMAND_LIMIT))
            .context(cycle.errors()?)?;
        Ok::<_, anyhow::Error>((cycle.errors()?, began.elapsed()))
    };
    let (said, took) = cycle("cycle")?;
    interposer.check_happened()?;
    ensure!(took < CYCLE_LIMIT, "the cycle took {took:?}");
    // At the last answer it had done its part, and at the first request it did not belong to the job yet.
    let named = (request, moment) != ("resume", Moment::Answered) && request != "hello";
    ensure!(
        said.contains(&format!("process {victim} ended")) == named,
        "the cycle said: {said}"
    );
    started.wait_for_line_or_report(&format!("lost {victim}"), END_LIMIT)?;
    Numbers::on(&job.setup.device)?.check_all_new(&before)?;
    started.wait_for_traffic()?;
    Ok(took)
}

/// Returns when the process has let go of everything.
fn kill(victim: u32) {
    process::signal_each(&[victim], Signal::KILL);
    while fs::read_to_string(format!("/proc/{victim}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z "))
    {
        std::thread::sleep(Duration::from_millis(1));
    }
}
