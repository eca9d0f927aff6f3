//! `verbs_facts`: what the verbs answer, compared with what the bare device answers.

use std::collections::BTreeMap;
use std::process::ExitStatus;

use anyhow::{Context as _, Result, ensure};

use crate::case::Job;
use crate::setup::{Mode, Setup};
use crate::{evidence, own_programs};

/// What an optional verb may answer whatever the device does.
const NOT_SUPPORTED: &str = "EOPNOTSUPP";

/// Collects the facts; with the provider also on the bare device, and compares them.
///
/// # Errors
/// When a verb breaks its contract, or answers something else through the provider.
pub fn run(job: &Job<'_>) -> Result<String> {
    let found = collect(job)?;
    let checked = found.lines().filter(|line| line.starts_with("ok ")).count();
    if job.setup.mode == Mode::Bare {
        return Ok(format!("{checked} checks"));
    }
    let bare = Setup {
        mode: Mode::Bare,
        ..job.setup.clone()
    };
    let folder = job.folder.join("bare");
    std::fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    let expected = collect(&Job {
        setup: &bare,
        folder,
        ..*job
    })?;
    let compared = compare(&found, &expected)?;
    ensure!(compared > 0, "nothing to compare");
    Ok(format!(
        "{checked} checks, {compared} answers as on the bare device"
    ))
}

fn collect(job: &Job<'_>) -> Result<String> {
    let mut program = own_programs::start(job, "verbs_facts", &[])?;
    program.wait_for_line(job.deadline, "ready")?;
    evidence::check_mode(program.pid(), &job.setup.mode)?;
    let status = program.wait(job.deadline)?;
    let output = program.output()?;
    check(&output, status, &program.errors()?)?;
    Ok(output)
}

/// Checks that a program that checks facts found nothing wrong and came to its end.
///
/// # Errors
/// When it did not.
pub(crate) fn check(output: &str, status: ExitStatus, errors: &str) -> Result<()> {
    let broken: Vec<_> = output
        .lines()
        .filter(|line| line.starts_with("FAIL "))
        .collect();
    ensure!(broken.is_empty(), "{}", broken.join("; "));
    ensure!(status.success(), "{status}: {}", errors.trim());
    ensure!(
        output.ends_with("\n0 failed\n"),
        "the program did not come to its end"
    );
    Ok(())
}

/// Compares the answers that differ from device to device. Gives how many there are.
///
/// # Errors
/// When one of them is another.
pub(crate) fn compare(found: &str, expected: &str) -> Result<usize> {
    let expected = answers(expected);
    let found = answers(found);
    let mut differing = Vec::new();
    for (name, (optional, value)) in &expected {
        let answer = found.get(name).map_or("nothing", |(_, answer)| *answer);
        let excused = *optional && answer == NOT_SUPPORTED;
        if answer != *value && !excused {
            differing.push(format!("{name}: {answer}, the bare device answers {value}"));
        }
    }
    ensure!(differing.is_empty(), "{}", differing.join("; "));
    Ok(expected.len())
}

/// Name, whether the verb is optional, and the answer.
fn answers(output: &str) -> BTreeMap<&str, (bool, &str)> {
    output
        .lines()
        .filter_map(|line| {
            let (kind, rest) = line.split_once(' ')?;
            let (name, value) = rest.rsplit_once(": ")?;
            matches!(kind, "same" | "optional").then_some((name, (kind == "optional", value)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: &str = "ok a: 1\nsame b: EINVAL\noptional c: works\n";

    #[test]
    fn only_optional_verbs_may_be_missing() {
        assert_eq!(compare(BARE, BARE).unwrap(), 2);
        compare(&BARE.replace("c: works", "c: EOPNOTSUPP"), BARE).unwrap();
        compare(&BARE.replace("c: works", "c: EINVAL"), BARE).unwrap_err();
        compare(&BARE.replace("b: EINVAL", "b: EOPNOTSUPP"), BARE).unwrap_err();
        compare("ok a: 1\noptional c: works\n", BARE).unwrap_err();
    }
}
