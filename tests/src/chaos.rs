//! Programs whose process replaces its own hardware all the time (`REVERBS_CHAOS`).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::setup::Setup;
use crate::suite;

const SUITE: &str = "python-suite-chaos";

/// From the end of a cycle to the begin of the next.
const CHAOS: &str = "cycle:20ms";

/// Each cycle, done or skipped, is a line.
const LOG: &str = "reverbs::agent::chaos=debug";

/// Tests of rdma-core during which the hardware cannot be replaced, and why.
const SUITE_SKIPS: &str = include_str!("../suites/rdma-core-44-chaos.txt");

/// Fewer cycles in the whole suite are no chaos. There are 200 to 300 under emulation.
const FEWEST_CYCLES: u64 = 100;

/// Fewer of the tests that pass are too few: some open no device, or for a moment only. About 60 see a cycle.
const FEWEST_CYCLED: usize = 30;

/// The case of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: SUITE.to_owned(),
        needs: Needs::Provider,
        limit: suite::LIMIT,
        action: Action::SuiteUnderChaos,
    }]
}

/// Makes a program replace its hardware, and say so in a log in `folder`.
pub fn ask_for(command: &mut Command, folder: &Path) {
    command.env("REVERBS_CHAOS", CHAOS).env("REVERBS_LOG", LOG);
    command.env("REVERBS_RUNTIME_DIR", folder);
}

/// Runs rdma-core's own tests.
///
/// # Errors
/// When one does not do what it does on the bare device, or too little was replaced under them.
pub fn run_suite(job: &Job<'_>) -> Result<String> {
    // Not with the output: sockets are made there.
    let folder = std::env::temp_dir().join(format!("reverbs-{SUITE}"));
    let setup = Setup {
        chaos: Some(folder.clone()),
        ..job.setup.clone()
    };
    let job = Job {
        setup: &setup,
        ..job.clone()
    };
    let outcome = suite::run(&job);
    let kept = keep_logs(&folder, &job.folder);
    let passed = outcome?;
    kept?;
    let notes = fs::read_to_string(job.folder.join(suite::NOTES))?;
    Ok(format!("{passed}; {}", check_suite(&notes, suite::PASSES)?))
}

/// Puts the logs beside what the programs wrote.
fn keep_logs(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| from.display().to_string())?;
    for entry in entries {
        let entry = entry?;
        if entry.path().extension().is_some_and(|kind| kind == "log") {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Checks that the hardware of rdma-core's tests was replaced: by their notes, as `suites/outcomes.py` writes them.
///
/// # Errors
/// When too little was replaced, or something stood in the way in a test that is not listed.
pub fn check_suite(notes: &str, passes: &str) -> Result<String> {
    let expected: BTreeSet<_> = passes.lines().collect();
    let may_skip = listed(SUITE_SKIPS)?;
    let mut chaos = Counts::default();
    let mut cycled = 0;
    let mut before_may_skip = false;
    let mut unexpected = Vec::new();
    for (test, counts) in read(notes)? {
        chaos.done += counts.done;
        chaos.skipped += counts.skipped;
        cycled += usize::from(counts.done > 0 && expected.contains(test));
        // What is seen during one test may be written at the begin of the next.
        if counts.skipped > 0 && !may_skip.contains(test) && !before_may_skip {
            unexpected.push(format!("{test}: {} cycles skipped", counts.skipped));
        }
        before_may_skip = may_skip.contains(test);
    }
    ensure!(unexpected.is_empty(), "{}", unexpected.join("\n"));
    ensure!(
        chaos.done >= FEWEST_CYCLES && cycled >= FEWEST_CYCLED,
        "only {} cycles, in {cycled} tests",
        chaos.done
    );
    Ok(format!(
        "{} cycles in {cycled} of them, {} skipped",
        chaos.done, chaos.skipped
    ))
}

/// Cycles of a test.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    done: u64,
    skipped: u64,
}

fn read(notes: &str) -> Result<Vec<(&str, Counts)>> {
    let lines = notes.lines().filter_map(|line| line.strip_prefix("chaos "));
    lines
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let [test, done, skipped] = words[..] else {
                anyhow::bail!("a note {line:?}");
            };
            let (done, skipped) = (done.parse()?, skipped.parse()?);
            Ok((test, Counts { done, skipped }))
        })
        .collect()
}

/// The tests of a list; each has a reason behind its name.
fn listed(list: &str) -> Result<BTreeSet<&str>> {
    let names = list.lines().map(|line| {
        let named = line
            .split_once(' ')
            .filter(|(_, why)| !why.trim().is_empty());
        Ok(named.with_context(|| format!("no reason: {line:?}"))?.0)
    });
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes(tests: impl IntoIterator<Item = (String, u64, u64)>) -> String {
        let each = tests.into_iter();
        each.map(|(test, done, skipped)| format!("pass {test} \nchaos {test} {done} {skipped}\n"))
            .collect()
    }

    fn many(done: u64) -> Vec<(String, u64, u64)> {
        (0..FEWEST_CYCLED)
            .map(|test| (format!("a.{test}"), done, 0))
            .collect()
    }

    fn check(counts: Vec<(String, u64, u64)>) -> Result<String> {
        let passes: String = counts
            .iter()
            .map(|(test, ..)| format!("{test}\n"))
            .collect();
        check_suite(&notes(counts), &passes)
    }

    #[test]
    fn many_cycles_in_many_tests_are_chaos() {
        check(many(10)).unwrap();
        check(many(1)).unwrap_err();
        check(many(0)).unwrap_err();
        let one = vec![("a.b".to_owned(), 10 * FEWEST_CYCLES, 0)];
        check(one).unwrap_err();
    }

    #[test]
    fn cycles_are_skipped_only_in_tests_that_are_listed() {
        let listed = listed(SUITE_SKIPS).unwrap();
        let listed = listed.first().unwrap();
        let mut counts = many(10);
        counts.push(((*listed).to_owned(), 0, 3));
        counts.push(("a.after".to_owned(), 0, 1));
        check(counts.clone()).unwrap();
        counts.push(("a.later".to_owned(), 1, 1));
        let error = check(counts).unwrap_err().to_string();
        assert_eq!(error, "a.later: 1 cycles skipped");
    }
}
