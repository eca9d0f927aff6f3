//! `corners`: what objects and threads in every situation see of a cycle.
//!
//! The program asks for a cycle when everything is in place, and goes on when it is told that it is over. On the bare device
//! nothing happens meanwhile, and the very same answers are expected.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::hardware::{self, Numbers};
use crate::jobs::COMMAND_LIMIT;
use crate::process::{self, Running};
use crate::setup::{Mode, Setup};
use crate::{evidence, facts, own_programs};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(300);

/// The time limit of a single cycle.
const CYCLE_LIMIT: Duration = Duration::from_secs(60);

/// Between two looks at what is ending.
const PAUSE: Duration = Duration::from_millis(20);

/// How long a cycle of the bare device takes, so that threads that go on meanwhile do something.
const NO_CYCLE: Duration = Duration::from_millis(300);

/// A part of the program.
#[derive(Debug)]
pub struct Part {
    case: &'static str,
    part: &'static str,
    /// More options of the program.
    options: &'static [&'static str],
    variable: Option<&'static str>,
    /// Cycles in whose place a checkpoint is made, after which the program runs on.
    checkpoints: &'static [u32],
    /// In the place of each cycle the program is saved and ended, and brought back from the image.
    restarts: bool,
    /// A cycle that must be refused, and what is said then.
    refused: Option<(u32, &'static str)>,
}

const PARTS: &[Part] = &[
    Part::new("corner-states", "states"),
    Part::new("corner-posts", "posts"),
    Part::new("corner-events", "events"),
    Part::new("corner-threads", "threads"),
    Part::new("corner-objects", "objects"),
    // Nobody can tell to what the windows are bound; once they are gone, it is as always.
    Part {
        refused: Some((1, "memory window with rkey 0x")),
        ..Part::new("corner-windows", "windows")
    },
    Part {
        restarts: true,
        ..Part::new("restart-states", "states")
    },
    Part {
        restarts: true,
        ..Part::new("restart-posts", "posts")
    },
    Part {
        restarts: true,
        ..Part::new("restart-events", "events")
    },
    Part {
        restarts: true,
        ..Part::new("restart-objects", "objects")
    },
    // The second has a child that lives on, the fifth one that has opened a device for itself.
    Part {
        checkpoints: &[2, 5],
        ..Part::new("fork-plain", "forks")
    },
    Part {
        options: &["--fork-init"],
        ..Part::new("fork-init", "forks")
    },
    Part {
        variable: Some("RDMAV_FORK_SAFE"),
        ..Part::new("fork-variable", "forks")
    },
];

impl Part {
    const fn new(case: &'static str, part: &'static str) -> Self {
        Self {
            case,
            part,
            options: &[],
            variable: None,
            checkpoints: &[],
            restarts: false,
            refused: None,
        }
    }
}

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    PARTS
        .iter()
        .map(|part| Case {
            name: part.case.to_owned(),
            needs: Needs::AnyMode,
            limit: LIMIT,
            action: Action::Corners(part),
        })
        .collect()
}

/// Runs a part under cycles, and on the bare device; compares what they found.
///
/// # Errors
/// When a cycle fails or changes nothing, or the program finds anything wrong.
pub fn run(part: &Part, job: &Job<'_>) -> Result<String> {
    let (expected, cycles) = match job.setup.mode {
        Mode::Bare => return collect(part, job).map(|(found, _)| remark(&found, 0)),
        Mode::Provider { .. } => {
            let bare = Setup {
                mode: Mode::Bare,
                ..job.setup.clone()
            };
            let folder = job.folder.join("bare");
            fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
            collect(
                part,
                &Job {
                    setup: &bare,
                    folder,
                    ..*job
                },
            )
            .context("on the bare device")?
        }
    };
    let (found, done) = collect(part, job)?;
    ensure!(done == cycles, "{done} cycles, {cycles} on the bare device");
    facts::compare(&found, &expected)?;
    Ok(remark(&found, done))
}

fn remark(found: &str, cycles: u32) -> String {
    let checks = found.lines().filter(|line| line.starts_with("ok ")).count();
    format!("{checks} checks, {cycles} cycles")
}

/// What the program writes, and how many cycles it has asked for.
fn collect(part: &Part, job: &Job<'_>) -> Result<(String, u32)> {
    let answers = job.folder.join("answers");
    fs::create_dir(&answers).with_context(|| answers.display().to_string())?;
    let mut command = own_programs::command(job.setup, "corners")?;
    command.args(part.options).args(["--part", part.part]);
    command.arg("--answers").arg(&answers);
    command.envs(part.variable.map(|name| (name, "1")));
    if job.setup.mode != Mode::Bare {
        command.arg("--children-are-refused");
    }
    let mut program = Running::start(command, &job.folder, "corners")?;
    program.wait_for_line(job.deadline, "ready")?;
    evidence::check_mode(program.pid(), &job.setup.mode)?;
    let root = program.pid();
    let output_file = program.output_file().to_owned();
    let mut cycles = 0;
    while wait_for_question(&mut program, &output_file, job, cycles + 1)? {
        cycles += 1;
        match job.setup.mode {
            Mode::Bare => std::thread::sleep(NO_CYCLE),
            Mode::Provider { .. } if part.restarts => {
                program = restart(root, program, job, cycles)
                    .with_context(|| format!("restart {cycles}"))?;
            }
            Mode::Provider { .. } => replace_hardware(root, job, cycles, part)?,
        }
        let answer = answers.join(cycles.to_string());
        fs::write(&answer, "").with_context(|| answer.display().to_string())?;
    }
    let status = program.wait(job.deadline)?;
    let output = fs::read_to_string(&output_file)?;
    facts::check(&output, status, &program.errors()?)?;
    ensure!(cycles > 0, "the program asked for no cycle");
    Ok((output, cycles))
}

/// Whether the program, or the restart that it runs below, asks for that cycle, or is at its end.
fn wait_for_question(
    program: &mut Running,
    output: &Path,
    job: &Job<'_>,
    number: u32,
) -> Result<bool> {
    let question = format!("cycle? {number}");
    loop {
        let ended = program.ended()?.is_some();
        let written = fs::read_to_string(output)?;
        if written.lines().any(|line| line == question) {
            return Ok(true);
        }
        if ended {
            return Ok(false);
        }
        ensure!(
            !job.deadline.passed(),
            "time ran out before the program asked for cycle {number}: {}",
            written.lines().last().unwrap_or_default()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Saves and ends what `running` runs, and brings it back; gives the restart that waits for it. Every number of the hardware must
/// be another one afterwards.
fn restart(root: u32, mut running: Running, job: &Job<'_>, number: u32) -> Result<Running> {
    let device = &job.setup.device;
    let before = Numbers::on(device)?;
    let mut command = job.setup.reverbs()?;
    command.args(["checkpoint", "--stop", &root.to_string()]);
    command.arg("--images").arg(job.folder.join("images"));
    let mut checkpoint = Running::start(command, &job.folder, &format!("checkpoint-{number}"))?;
    let deadline = job.deadline.at_most(COMMAND_LIMIT);
    while checkpoint.ended()?.is_none() && !deadline.passed() {
        // Its id is free only when its parent has taken note of its end.
        running.ended()?;
        std::thread::sleep(PAUSE);
    }
    checkpoint
        .wait_for_success(deadline)
        .context(checkpoint.errors()?)?;
    running.wait(deadline)?;
    let none = Numbers::on(device)?;
    ensure!(
        none.queue_pairs.is_empty(),
        "the program has ended, and the hardware has {none:?}"
    );
    let mut command = job.setup.reverbs()?;
    command
        .args(["restart", "--wait"])
        .arg(checkpoint.output()?.trim_end());
    let mut restart = Running::start(command, &job.folder, &format!("restart-{number}"))?;
    restart.wait_for_line(deadline, &root.to_string())?;
    Numbers::on(device)?.check_all_new(&before)?;
    Ok(restart)
}

/// `reverbs cycle`, or a checkpoint; every number of the hardware must be another one afterwards.
fn replace_hardware(root: u32, job: &Job<'_>, number: u32, part: &Part) -> Result<()> {
    let device = &job.setup.device;
    let before = Numbers::on(device)?;
    if let Some((refused, said)) = part.refused
        && refused == number
    {
        let mut command = job.setup.reverbs()?;
        command.args(["--quiet", "cycle", &root.to_string()]);
        let limit = job.deadline.at_most(CYCLE_LIMIT);
        let why = process::fail(command, &job.folder, "refused", limit)?;
        ensure!(why.contains(said), "no word of \"{said}\": {why}");
        ensure!(
            Numbers::on(device)? == before,
            "the refused cycle has changed something"
        );
        return Ok(());
    }
    // What of the hardware is kept open by somebody who ought not to is still listed.
    let open = hardware::contexts(device)?;
    let mut command = job.setup.reverbs()?;
    let verb = match part.checkpoints.contains(&number) {
        true => "checkpoint",
        false => "cycle",
    };
    command.arg(verb).arg(root.to_string());
    if verb == "checkpoint" {
        command.arg("--images").arg(job.folder.join("images"));
    }
    let name = format!("{verb}-{number}");
    process::run(
        command,
        &job.folder,
        &name,
        job.deadline.at_most(CYCLE_LIMIT),
    )
    .with_context(|| format!("cycle {number}"))?;
    let open_now = hardware::contexts(device)?;
    ensure!(
        open_now == open,
        "cycle {number}: the device was open {open} times and is {open_now} times"
    );
    Numbers::on(device)?
        .check_all_new(&before)
        .with_context(|| format!("cycle {number}"))
}
