//! rdma-core's own test suite (pyverbs), as Debian ships it: every test that passes on the bare device must pass.
//!
//! `tests/suites/rdma-core-44.txt` has the names of those that do, on rxe of Debian 12 with GID index 1.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::process::{self, Running};
use crate::setup::Mode;
use crate::{evidence, own_programs};

/// Where the package python3-pyverbs has the tests.
const INSTALLED: &str = "/usr/share/doc/rdma-core/tests";

/// Debian's own interpreter: the package's modules are made for it.
const PYTHON: &str = "/usr/bin/python3";

const RUNNER: &str = include_str!("../suites/outcomes.py");

/// The tests that pass on the bare device.
pub const PASSES: &str = include_str!("../suites/rdma-core-44.txt");

/// In the folder of the case: what [`RUNNER`] writes.
pub const NOTES: &str = "outcomes";

/// Tests that do not pass on the bare device, and why.
const FAILS: &[(&str, &str)] = &[(
    "tests.test_qpex.QpExTestCase.test_qp_ex_rc_atomic_write",
    "rdma-core 44 offers atomic writes on rxe, and kernel 6.1 does not have them",
)];

/// The time limit of the whole suite; it takes a sixth of it under emulation.
pub const LIMIT: Duration = Duration::from_secs(900);

/// A test that takes longer hangs. The slowest takes a fifth of it.
const TEST_LIMIT: Duration = Duration::from_secs(60);

/// After that many tests that hang or end the interpreter, the rest is not tried any more.
const MOST_ENDS: usize = 4;

/// The case of this module.
pub fn cases() -> Vec<Case> {
    vec![Case {
        name: "python-suite".to_owned(),
        needs: Needs::AnyMode,
        limit: LIMIT,
        action: Action::Suite,
    }]
}

/// Runs the suite and compares.
///
/// # Errors
/// When a test does not do what it does on the bare device; the error names each.
pub fn run(job: &Job<'_>) -> Result<String> {
    let tests = unpack(job)?;
    let runner = job.folder.join("outcomes.py");
    fs::write(&runner, RUNNER)?;
    let notes = job.folder.join(NOTES);
    let mut ends = 0;
    while ends < MOST_ENDS && !go_on(job, &tests, &runner, &notes)? {
        ends += 1;
    }
    let outcomes = Outcomes::read(&fs::read_to_string(&notes)?)?;
    outcomes.compare(PASSES, job.setup.mode == Mode::Bare)
}

/// A copy of the tests; the package has some of them compressed.
fn unpack(job: &Job<'_>) -> Result<PathBuf> {
    ensure!(
        Path::new(INSTALLED).is_dir(),
        "no tests in {INSTALLED}: is python3-pyverbs installed, with its documentation?"
    );
    let tests = job.folder.join("tests");
    let mut copy = Command::new("cp");
    copy.arg("-r").arg(INSTALLED).arg(&tests);
    process::run(copy, &job.folder, "copy", job.deadline)?;
    let mut unpack = Command::new("gunzip");
    unpack.arg("-rf").arg(&tests);
    process::run(unpack, &job.folder, "unpack", job.deadline)?;
    Ok(tests)
}

/// Runs the tests that are not in the notes yet. `false` if one of them hung or ended the interpreter, which is noted.
fn go_on(job: &Job<'_>, tests: &Path, runner: &Path, notes: &Path) -> Result<bool> {
    let setup = job.setup;
    let mut command = setup.command(PYTHON);
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command.arg(runner).arg(tests).arg(notes);
    command.args(["--dev", &setup.device]);
    command.args(["--gid", &setup.gid_index.to_string(), "-v"]);
    let number = lines(notes).len();
    let mut python = Running::start(command, &job.folder, &format!("python-{number}"))?;
    evidence::wait_for_mode(&mut python, &setup.mode, job.deadline)?;
    let mut known = 0;
    let mut since = Instant::now();
    let end = loop {
        let left = TEST_LIMIT.saturating_sub(since.elapsed());
        if python
            .wait(job.deadline.at_most(left.min(Duration::from_secs(1))))
            .is_ok()
        {
            break "crash";
        }
        let now = lines(notes).len();
        if now != known {
            (known, since) = (now, Instant::now());
        }
        if left.is_zero() || job.deadline.passed() {
            own_programs::ask_for_report(&mut python, &job.folder);
            break "hang";
        }
    };
    drop(python);
    let written = lines(notes);
    let last = written.last().context("no test was started")?;
    let Some(test) = last.strip_prefix("start ") else {
        return match last.starts_with("end ") {
            true => Ok(true),
            false => bail!("the interpreter ended after: {last}"),
        };
    };
    let mut file = fs::File::options().append(true).open(notes)?;
    writeln!(file, "{end} {}", test.trim())?;
    Ok(false)
}

fn lines(notes: &Path) -> Vec<String> {
    let text = fs::read_to_string(notes).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// What came of each test: `pass`, `skip`, `fail`, `hang` or `crash`, and why.
#[derive(Debug)]
struct Outcomes(BTreeMap<String, (String, String)>);

impl Outcomes {
    fn read(notes: &str) -> Result<Self> {
        let mut outcomes = BTreeMap::new();
        for line in notes.lines() {
            let mut words = line.splitn(3, ' ');
            let outcome = words.next().unwrap_or_default();
            let test = words.next().with_context(|| format!("a note {line:?}"))?;
            let why = words.next().unwrap_or_default().trim();
            if !["start", "end", "chaos"].contains(&outcome) {
                outcomes.insert(test.to_owned(), (outcome.to_owned(), why.to_owned()));
            }
        }
        Ok(Self(outcomes))
    }

    /// Names every test that did not do what it does on the bare device.
    fn compare(&self, passes: &str, bare: bool) -> Result<String> {
        let expected: Vec<_> = passes.lines().collect();
        let mut differing = Vec::new();
        for test in &expected {
            match self.0.get(*test) {
                Some((outcome, _)) if outcome == "pass" => {}
                Some((outcome, why)) => differing.push(format!("{test}: {outcome} ({why})")),
                None => differing.push(format!("{test}: was not run")),
            }
        }
        let is_expected = |test: &str| expected.contains(&test);
        let may_fail = |test: &str| FAILS.iter().any(|(name, _)| *name == test);
        for (test, (outcome, why)) in self.0.iter().filter(|(test, _)| !is_expected(test)) {
            match outcome.as_str() {
                "skip" => {}
                "pass" if bare => differing.push(format!("{test}: passes, and is not in the list")),
                "pass" => {}
                "fail" if may_fail(test) => {}
                _ => differing.push(format!(
                    "{test}: {outcome} ({why}), and not on the bare device"
                )),
            }
        }
        ensure!(differing.is_empty(), "{}", differing.join("\n"));
        ensure!(!expected.is_empty(), "the list is empty");
        Ok(format!("{} tests pass of {}", expected.len(), self.0.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTES: &str =
        "start a.B.one \npass a.B.one \nstart a.B.two \nskip a.B.two no such device\nend -\n";

    fn compare(notes: &str, bare: bool) -> Result<String> {
        Outcomes::read(notes)?.compare("a.B.one", bare)
    }

    #[test]
    fn what_passes_on_the_bare_device_must_pass() {
        compare(NOTES, false).unwrap();
        for outcome in ["skip", "fail", "hang", "crash"] {
            let notes = NOTES.replace("pass a", &format!("{outcome} a"));
            let error = compare(&notes, false).unwrap_err().to_string();
            assert!(error.starts_with(&format!("a.B.one: {outcome}")), "{error}");
        }
        compare("end -\n", false).unwrap_err();
    }

    #[test]
    fn what_is_skipped_on_the_bare_device_must_not_fail() {
        compare(&NOTES.replace("skip", "fail"), false).unwrap_err();
        compare(&NOTES.replace("skip", "pass"), false).unwrap();
    }

    #[test]
    fn the_bare_device_shows_a_list_that_is_too_short() {
        compare(NOTES, true).unwrap();
        compare(&NOTES.replace("skip", "pass"), true).unwrap_err();
    }

    #[test]
    fn the_list_has_names_once_and_in_order() {
        let names: Vec<_> = PASSES.lines().collect();
        assert!(names.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
