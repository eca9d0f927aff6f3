//! Objects that come and go, and what is left of them: on the hardware, in the process, in its memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::case::{Action, Case, Job, Needs};
use crate::cycles::replace_hardware;
use crate::hardware::{Numbers, count_objects};
use crate::process::Running;
use crate::setup::Mode;
use crate::{evidence, own_programs};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(1800);

/// How long a round of the program may take: under valgrind, in an emulated machine.
const ROUND_LIMIT: Duration = Duration::from_secs(120);

/// What the heap may grow by between two of the compared moments, in bytes: less than one leaked byte in a thousand.
const HEAP_ALLOWANCE: u64 = 16 << 10;

/// The same of resident memory, which comes and goes in pages, in KiB.
const RESIDENT_ALLOWANCE: u64 = 1 << 10;

/// Exit status of valgrind when it has found anything.
const FOUND: &str = "99";

/// What is not the provider's.
const SUPPRESSIONS: &str = include_str!("../programs/leaks.supp");

/// One case.
#[derive(Debug)]
pub struct Leaks {
    name: &'static str,
    /// Under valgrind's memcheck.
    valgrind: bool,
    /// One in this many of the cycles that the command line asks for.
    share: u32,
}

const LEAKS: &[Leaks] = &[
    Leaks {
        name: "leak-cycles",
        valgrind: false,
        share: 1,
    },
    Leaks {
        name: "leak-valgrind",
        valgrind: true,
        share: 20,
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    LEAKS
        .iter()
        .map(|leaks| Case {
            name: leaks.name.to_owned(),
            needs: Needs::AnyMode,
            limit: LIMIT,
            action: Action::Leaks(leaks),
        })
        .collect()
}

/// Runs the program under cycles, then looks at what is left. Without the provider there are rounds, but no cycles.
///
/// # Errors
/// When anything is left, or grows.
pub fn run(leaks: &Leaks, job: &Job<'_>) -> Result<String> {
    let nothing = count_objects(&job.setup.device)?;
    let mut program = leaks.start(job)?;
    let outcome = leaks.look(&mut program, job, &nothing);
    if outcome.is_err() {
        own_programs::ask_for_report(&mut program, &job.folder);
    }
    match leaks.valgrind {
        true => outcome.with_context(|| last_line(&job.folder.join("valgrind"))),
        false => outcome,
    }
}

impl Leaks {
    fn start(&self, job: &Job<'_>) -> Result<Running> {
        let mut program = own_programs::command(job.setup, "leaks")?;
        if !self.valgrind {
            // What a thread keeps back for its next allocations would count as used.
            program.env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");
            return Running::start(program, &job.folder, "leaks");
        }
        let mut command = Command::new("valgrind");
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
            .args([
                "--leak-check=full",
                // Else a thread that polls without a pause hardly lets the agent run.
                "--fair-sched=try",
                "--num-callers=30",
            ])
            .args([
                "--show-leak-kinds=definite,indirect",
                "--errors-for-leak-kinds=definite,indirect",
            ])
            .arg(format!(
                "--suppressions={}",
                Self::suppressions(job)?.display()
            ))
            .arg(format!("--error-exitcode={FOUND}"))
            .arg(format!(
                "--log-file={}",
                job.folder.join("valgrind").display()
            ))
            .arg(program.get_program())
            .args(program.get_args());
        Running::start(command, &job.folder, "leaks")
    }

    /// The file of what is not the provider's, beside the output.
    fn suppressions(job: &Job<'_>) -> Result<PathBuf> {
        let file = job.folder.join("suppressions");
        std::fs::write(&file, SUPPRESSIONS).with_context(|| file.display().to_string())?;
        Ok(file)
    }

    fn look(
        &self,
        program: &mut Running,
        job: &Job<'_>,
        nothing: &BTreeMap<&str, usize>,
    ) -> Result<String> {
        program.wait_for_line(job.deadline.at_most(ROUND_LIMIT), "ready")?;
        evidence::check_mode(program.pid(), &job.setup.mode)?;
        let cycles = (job.setup.cycles / self.share).max(3);
        let early = cycles / 5;
        cycle(program, job, early)?;
        let first = self.moment(program, job)?;
        cycle(program, job, cycles - early)?;
        let last = self.moment(program, job)?;
        program.signal(Signal::TERM)?;
        program.wait_for_line(job.deadline.at_most(ROUND_LIMIT), "closed")?;
        let left = count_objects(&job.setup.device)?;
        ensure!(
            left == *nothing,
            "left on the device: {left:?}, before {nothing:?}"
        );
        ensure!(
            !evidence::has_device_open(program.pid()),
            "a file of the device is left open"
        );
        program.signal(Signal::TERM)?;
        program.wait_for_success(job.deadline.at_most(ROUND_LIMIT))?;
        let output = program.output()?;
        let messages = own_programs::check_account(&output)?;
        let rounds = Round::all(&output)?.len();
        let remark = format!("{cycles} cycles, {rounds} rounds, {messages} messages");
        if self.valgrind {
            return Ok(remark);
        }
        let remark = format!("{remark}; after {early} cycles {first}, at the end {last}");
        last.check_not_more_than(&first)
            .with_context(|| remark.clone())?;
        Ok(remark)
    }

    /// What the process has: the least of several rounds, as the agent may just be at work in one.
    fn moment(&self, program: &mut Running, job: &Job<'_>) -> Result<Round> {
        let rounds = if self.valgrind { 1 } else { 5 };
        let before = Round::all(&program.output()?)?.len();
        wait_for_rounds(program, job, before + rounds)?;
        Ok(Round::least(&Round::all(&program.output()?)?[before..]))
    }
}

/// Cycles, at least one round apart; on the bare device there are only the rounds.
fn cycle(program: &mut Running, job: &Job<'_>, cycles: u32) -> Result<()> {
    for number in 1..=cycles {
        let rounds = Round::all(&program.output()?)?.len();
        wait_for_rounds(program, job, rounds + 1)?;
        if job.setup.mode != Mode::Bare {
            let before = Numbers::on(&job.setup.device)?;
            replace_hardware(program, job)
                .and_then(|after| after.check_all_new(&before))
                .with_context(|| format!("cycle {number} of {cycles}"))?;
        }
    }
    Ok(())
}

fn wait_for_rounds(program: &mut Running, job: &Job<'_>, rounds: usize) -> Result<()> {
    let deadline = job.deadline.at_most(ROUND_LIMIT);
    program.wait_for_line(deadline, &format!("round {rounds} "))?;
    Ok(())
}

fn last_line(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().last().unwrap_or_default().to_owned()
}

/// What the process had after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Round(BTreeMap<String, u64>);

impl Round {
    /// Reads all lines `round N descriptors D ...` that are complete.
    fn all(output: &str) -> Result<Vec<Self>> {
        output
            .split_inclusive('\n')
            .filter(|line| line.starts_with("round ") && line.ends_with('\n'))
            .map(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                let pairs = words.chunks_exact(2).map(|pair| {
                    let value = pair[1].parse().with_context(|| line.to_owned())?;
                    Ok((pair[0].to_owned(), value))
                });
                Ok(Self(pairs.collect::<Result<_>>()?))
            })
            .collect()
    }

    /// The least of each number.
    fn least(rounds: &[Self]) -> Self {
        let mut least = rounds[0].clone();
        for round in rounds {
            for (name, value) in &mut least.0 {
                *value = (*value).min(round.0[name]);
            }
        }
        least
    }

    fn check_not_more_than(&self, earlier: &Self) -> Result<()> {
        for (name, allowance) in [
            ("descriptors", 0),
            ("mappings", 0),
            ("heap", HEAP_ALLOWANCE),
            ("resident", RESIDENT_ALLOWANCE),
        ] {
            let (now, before) = (self.0[name], earlier.0[name]);
            if now > before + allowance {
                bail!("{name} grew from {before} to {now}");
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Round {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numbers = self.0.iter().filter(|(name, _)| *name != "round");
        let numbers: Vec<_> = numbers
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        out.write_str(&numbers.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::Round;

    const OUTPUT: &str = "ready\nround 1 descriptors 9 mappings 80 heap 50000 resident 4000\n\
         round 2 descriptors 8 mappings 80 heap 60000 resident 4000\nround 3 desc";

    #[test]
    fn lines_are_read_and_compared() {
        let rounds = Round::all(OUTPUT).unwrap();
        assert_eq!(rounds.len(), 2);
        let least = Round::least(&rounds);
        assert_eq!((least.0["descriptors"], least.0["heap"]), (8, 50_000));
        least.check_not_more_than(&rounds[0]).unwrap();
        rounds[0].check_not_more_than(&least).unwrap_err();
        let mut more = rounds[1].clone();
        more.0.insert("heap".into(), 60_000 + (16 << 10) + 1);
        more.check_not_more_than(&rounds[1]).unwrap_err();
    }
}
