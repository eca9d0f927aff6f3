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

/// Drain may take this many times as long as the link needs for the bytes in flight, and a fixed time: what it takes where
/// nothing is in flight but an unsignaled request, of which nobody ever hears. That is three rounds of 20 ms
/// without a sign of progress, and the agents' answers.
const MOST: f64 = 1.2;

/// Rates that are averaged, of half a second each.
const RATES: usize = 4;

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
    write(4 * MIB, 64 * KIB),
    write(16 * MIB, 64 * KIB),
    write(16 * MIB, MIB),
    write(16 * MIB, 16 * MIB),
    write(32 * MIB, 8 * MIB),
    send(MIB, 64 * KIB),
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
    seconds: f64,
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
    let fixed = cycle_under(IDLE, job)?.seconds;
    let mut lines = vec![format!("fixed {fixed:.3} s")];
    let mut too_long = Vec::new();
    for load in LOADS {
        let drained = cycle_under(*load, job).with_context(|| load.describe())?;
        let link = load.bytes as f64 / drained.rate;
        let line = format!(
            "{} {:.3} s (link {link:.3} s at {:.1} MB/s, {} outstanding)",
            load.describe(),
            drained.seconds,
            drained.rate / 1e6,
            drained.outstanding
        );
        if drained.outstanding > 0 || drained.seconds > MOST * link + fixed {
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

/// One cycle of a process that keeps `load` in flight.
fn cycle_under(load: Load, job: &Job<'_>) -> Result<Drained> {
    let mut running = load.start(job)?;
    running.wait_for_line(job.deadline, "ready")?;
    evidence::check_mode(running.pid(), &job.setup.mode)?;
    // The first half second is that of the start.
    running.wait_until(job.deadline, "it told its rates", |_| {
        let output = fs::read_to_string(job.folder.join("in_flight.out"))?;
        Ok((rates(&output).len() > RATES).then_some(()))
    })?;
    let before = Numbers::on(&job.setup.device)?;
    let rates = rates(&running.output()?);
    replace_hardware(&running, job)?.check_all_new(&before)?;
    let (seconds, outstanding) = drain_of(&fs::read_to_string(job.folder.join("cycle.err"))?)?;
    running.signal(Signal::TERM)?;
    running.wait_for_success(job.deadline.at_most(END_LIMIT))?;
    own_programs::check_account(&running.output()?)?;
    let last = &rates[rates.len() - RATES..];
    Ok(Drained {
        rate: last.iter().sum::<f64>() / RATES as f64,
        seconds,
        outstanding,
    })
}

/// The lines `rate N`.
fn rates(output: &str) -> Vec<f64> {
    let rates = output
        .lines()
        .filter_map(|line| line.strip_prefix("rate ")?.parse().ok());
    rates.collect()
}

/// Seconds and outstanding sends of `reverbs: drain 0.021 s  52 completions held, 0 sends outstanding`.
fn drain_of(errors: &str) -> Result<(f64, u64)> {
    for line in errors.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if let [
            "reverbs:",
            "drain",
            seconds,
            "s",
            _,
            "completions",
            "held,",
            outstanding,
            ..,
        ] = words[..]
        {
            return Ok((seconds.parse()?, outstanding.parse()?));
        }
    }
    bail!("no drain in {errors}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_drain_is_found() {
        let errors = "reverbs: close         0.068 s  3 processes\n\
                      reverbs: drain         0.021 s  52 completions held, 7 sends outstanding\n";
        assert_eq!(drain_of(errors).unwrap(), (0.021, 7));
        drain_of("reverbs: close 0.068 s  3 processes\n").unwrap_err();
    }

    #[test]
    fn half_a_line_is_no_rate() {
        assert_eq!(rates("ready\nrate 5\nrate \n"), [5.0]);
    }
}
