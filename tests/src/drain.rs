//! How long a checkpoint waits for what is on its way, beside how long the link takes to bring it.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::cycles::replace_hardware;
use crate::hardware::Numbers;
use crate::process::Running;
use crate::{evidence, own_programs};

/// The time limit of the case.
const LIMIT: Duration = Duration::from_secs(900);

/// How long a program may take to end once it is told to.
const END_LIMIT: Duration = Duration::from_secs(120);

/// Until the network is empty it may take this many times as long as the link needs for the bytes in flight, and a fixed time: what it
/// takes where nothing is in flight but an unsignaled request, of which nobody ever hears. That is the agents' answers
/// to Examine, Close and Drain, and three rounds of 20 ms in Drain without a sign of progress.
const MOST: f64 = 1.2;

/// A cycle is beside the rate just before it, and where the machine got slower in between it is no measurement. So there are up to so
/// many, until one is within the bound. What is always too slow is too slow in each of them.
const MOST_CYCLES: usize = 8;

/// Between two lines that tell what has arrived there are at least 0.2 s; so many are looked at.
const LINES: usize = 5;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// What is kept in flight.
#[derive(Clone, Copy, Debug)]
struct Load {
    send: bool,
    bytes: u64,
    message: u64,
}

const IDLE: Load = write(0, 64 * KIB);

const LOADS: &[Load] = &[
    write(64 * KIB, 64 * KIB),
    write(MIB, 64 * KIB),
    write(16 * MIB, 64 * KIB),
    write(16 * MIB, MIB),
    write(16 * MIB, 16 * MIB),
    write(32 * MIB, 8 * MIB),
    send(16 * MIB, 64 * KIB),
    send(16 * MIB, 4 * MIB),
];

const fn write(bytes: u64, message: u64) -> Load {
    Load {
        send: false,
        bytes,
        message,
    }
}

const fn send(bytes: u64, message: u64) -> Load {
    Load {
        send: true,
        bytes,
        message,
    }
}

/// What a cycle showed.
#[derive(Clone, Copy, Debug)]
struct Drained {
    /// Bytes of a second that arrived just before.
    rate: f64,
    /// Of Close and Drain: Soft-RoCE sends inside of `ibv_post_send`, so Close already waits for what is on its way.
    close: f64,
    drain: f64,
    /// Sends that had not completed when Drain ended.
    outstanding: u64,
}

/// The case of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "drain-time".to_owned(),
        needs: Needs::Provider,
        limit: LIMIT,
        action: Action::DrainTime,
    }]
}

/// Cycles a process with ever more bytes in flight. The remark is the fixed time, and for each load the time beside the link's.
///
/// # Errors
/// When Drain takes longer than it may, or gives up on what is on its way.
pub fn run(job: &Job<'_>) -> Result<String> {
    let fixed = cycles_under(IDLE, job, |_| true)?
        .last()
        .map(Drained::waited)
        .context("no cycle")?;
    let mut lines = vec![format!("fixed {fixed:.3} s")];
    let mut too_long = Vec::new();
    for load in LOADS {
        let within = |drained: &Drained| drained.waited() <= MOST * drained.link(*load) + fixed;
        let cycles = cycles_under(*load, job, within).with_context(|| load.describe())?;
        let last = cycles.last().context("no cycle")?;
        let line = format!("{}, cycle {}", last.describe(*load), cycles.len());
        // Giving up on what is on its way is wrong in any of them.
        let given_up = cycles.iter().find(|drained| drained.outstanding > 0);
        if let Some(drained) = given_up {
            too_long.push(drained.describe(*load));
        } else if !within(last) {
            too_long.push(line.clone());
        }
        lines.push(line);
    }
    fs::write(job.folder.join("table"), lines.join("\n"))?;
    ensure!(
        too_long.is_empty(),
        "not within {MOST} x link + fixed: {}; all: {}",
        too_long.join("; "),
        lines.join("; ")
    );
    Ok(lines.join("; "))
}

impl Drained {
    /// Until the network was empty.
    fn waited(&self) -> f64 {
        self.close + self.drain
    }

    /// How long the link needs for the bytes.
    fn link(&self, load: Load) -> f64 {
        load.bytes as f64 / self.rate
    }

    fn describe(&self, load: Load) -> String {
        format!(
            "{} close {:.3} drain {:.3} s (link {:.3} s at {:.1} MB/s), {} outstanding",
            load.describe(),
            self.close,
            self.drain,
            self.link(load),
            self.rate / 1e6,
            self.outstanding
        )
    }
}

impl Load {
    fn describe(&self) -> String {
        let verb = if self.send { "SEND" } else { "WRITE" };
        format!(
            "{verb} {} x {} KiB",
            self.bytes / self.message,
            self.message / KIB
        )
    }

    fn start(&self, job: &Job<'_>) -> Result<Running> {
        let (bytes, message) = (self.bytes.to_string(), self.message.to_string());
        let mut options = vec!["--bytes", &bytes, "--message", &message];
        options.extend(self.send.then_some("--send"));
        own_programs::start(job, "in_flight", &options)
    }
}

/// Cycles of a process that keeps `load` in flight, until one is `enough`.
fn cycles_under(
    load: Load,
    job: &Job<'_>,
    enough: impl Fn(&Drained) -> bool,
) -> Result<Vec<Drained>> {
    let mut running = load.start(job)?;
    running.wait_for_line(job.deadline, "ready")?;
    evidence::check_mode(running.pid(), &job.setup.mode)?;
    let mut cycles = Vec::new();
    while cycles.len() < MOST_CYCLES && !cycles.last().is_some_and(&enough) {
        let before = Numbers::on(&job.setup.device)?;
        let rate = rate_from_now(&mut running, job)?;
        replace_hardware(&running, job)?.check_all_new(&before)?;
        let errors = fs::read_to_string(job.folder.join("cycle.err"))?;
        let (close, _) = phase_of(&errors, "close")?;
        let (drain, detail) = phase_of(&errors, "drain")?;
        cycles.push(Drained {
            rate,
            close,
            drain,
            outstanding: outstanding_of(&detail)?,
        });
    }
    running.signal(Signal::TERM)?;
    running.wait_for_success(job.deadline.at_most(END_LIMIT))?;
    own_programs::check_account(&running.output()?)?;
    Ok(cycles)
}

/// Bytes of a second, over the next lines that tell what has arrived.
fn rate_from_now(running: &mut Running, job: &Job<'_>) -> Result<f64> {
    let output = job.folder.join("in_flight.out");
    let known = arrivals(&fs::read_to_string(&output)?).len();
    running.wait_until(job.deadline, "it told what has arrived", |_| {
        let arrivals = arrivals(&fs::read_to_string(&output)?);
        Ok(arrivals.get(known..).and_then(|new| match new {
            [first, .., last] if new.len() > LINES => Some((last.0 - first.0) / (last.1 - first.1)),
            _ => None,
        }))
    })
}

/// Bytes and seconds of the lines `arrived BYTES SECONDS` that are complete.
fn arrivals(output: &str) -> Vec<(f64, f64)> {
    let complete = output
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let arrivals = complete.filter_map(|line| {
        let (bytes, seconds) = line.trim().strip_prefix("arrived ")?.split_once(' ')?;
        Some((bytes.parse().ok()?, seconds.parse().ok()?))
    });
    arrivals.collect()
}

/// Seconds and detail of a line like `reverbs: drain 0.021 s  52 completions held, 0 sends outstanding`.
fn phase_of(errors: &str, phase: &str) -> Result<(f64, String)> {
    for line in errors.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["reverbs:", name, seconds, "s", detail @ ..] = &words[..]
            && *name == phase
        {
            return Ok((seconds.parse()?, detail.join(" ")));
        }
    }
    bail!("no {phase} in {errors}")
}

/// The second number of `52 completions held, 0 sends outstanding`.
fn outstanding_of(detail: &str) -> Result<u64> {
    let number = detail
        .strip_suffix(" sends outstanding")
        .and_then(|text| text.rsplit_once(' '));
    let (_, number) = number.with_context(|| detail.to_owned())?;
    Ok(number.parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_and_what_was_outstanding_are_found() {
        let errors = "reverbs: close         0.068 s  3 processes\n\
                      reverbs: drain         0.021 s  52 completions held, 7 sends outstanding\n";
        assert_eq!(phase_of(errors, "close").unwrap().0, 0.068);
        let (seconds, detail) = phase_of(errors, "drain").unwrap();
        assert_eq!((seconds, outstanding_of(&detail).unwrap()), (0.021, 7));
        phase_of(errors, "stop").unwrap_err();
        outstanding_of("3 processes").unwrap_err();
    }

    #[test]
    fn half_a_line_is_not_read() {
        assert_eq!(
            arrivals("ready\narrived 5 0.25\narrived 50 0.2"),
            [(5.0, 0.25)]
        );
    }
}
