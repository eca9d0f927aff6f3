//! `cargo xtask test`: the tests of the host, then those of the test machine.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::stage::{self, cargo};
use crate::test_plan::{NODE_CASES, RUNS, Run};
use crate::vm::{self, Machine, Output};
use crate::{command, demo, fuzz, nodes, paths, setup};

/// Passed and failed tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed, and runs that broke off.
    pub failed: u64,
    /// Names of those that failed.
    pub names: Vec<String>,
}

impl Count {
    fn one_passed() -> Count {
        Count {
            passed: 1,
            ..Count::default()
        }
    }

    fn one_failed(name: &str) -> Count {
        Count {
            failed: 1,
            names: vec![name.to_owned()],
            ..Count::default()
        }
    }

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.names.extend(other.names);
    }
}

/// Seconds for each fuzz target.
const FUZZ: u64 = 60;

/// The same in the long run.
const FUZZ_LONG: u64 = 600;

/// How often the job over two machines is saved and finished in the long run.
const NODES_LONG: u32 = 10;

/// Runs everything (`long`: also what takes long) whose name contains `filter`. The sum is the
/// last line on stdout; what failed is named before it.
///
/// # Errors
/// When packages are missing, the provider cannot be built, no test ran, or stdout is closed. Failed tests
/// are no error: they are in the count.
pub fn run(long: bool, filter: Option<&str>) -> Result<Count> {
    setup::ensure()?;
    heading("tests on the host");
    let mut count = cargo_tests(&["--workspace", "--exclude", "reverbs-benches"], filter)?;
    heading("the data path, optimized: its logs, and what it costs in instructions");
    count.add(cargo_tests(
        &["--release", "--package", "reverbs-benches"],
        filter,
    )?);
    count.add(fuzz_targets(if long { FUZZ_LONG } else { FUZZ }, filter)?);
    let guest = Guest::prepare()?;
    for run in RUNS.iter().filter(|run| long || !run.long) {
        if let Some(cases) = guest.cases(run, filter)? {
            count.add(guest.run(run, &cases)?);
        }
    }
    count.add(guest.node_tests(long, filter)?);
    if count == Count::default() {
        bail!("no test ran: none has such a name");
    }
    if filter.is_none() {
        if long {
            heading("the demonstration: saved on one machine, finished on another");
            count.add(one("demo", demo::run()));
        }
        heading("a job over two machines: saved there, finished on two others");
        count.add(one("nodes", nodes::run(if long { NODES_LONG } else { 1 })));
    }
    let mut stdout = std::io::stdout();
    for name in &count.names {
        writeln!(stdout, "failed: {name}")?;
    }
    writeln!(
        stdout,
        "{} passed, {} failed in {} min",
        count.passed,
        count.failed,
        started().elapsed().as_secs().div_ceil(60)
    )?;
    Ok(count)
}

/// What has no cases of its own is one test.
fn one(name: &str, done: Result<()>) -> Count {
    match done {
        Ok(()) => Count::one_passed(),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            Count::one_failed(name)
        }
    }
}

/// Each target is one test, by the name `fuzz-TARGET`.
fn fuzz_targets(seconds: u64, filter: Option<&str>) -> Result<Count> {
    let mut targets = fuzz::targets()?;
    targets.retain(|target| filter.is_none_or(|filter| format!("fuzz-{target}").contains(filter)));
    let mut count = Count::default();
    if targets.is_empty() {
        return Ok(count);
    }
    heading("inputs of every kind: each fuzz target for a while");
    fuzz::build()?;
    // Each keeps one processor busy.
    let at_once = std::thread::available_parallelism()?.get();
    for some in targets.chunks(at_once) {
        std::thread::scope(|scope| {
            let running: Vec<_> = some
                .iter()
                .map(|target| (target, scope.spawn(|| fuzz::run(target, seconds))))
                .collect();
            for (target, run) in running {
                let name = format!("fuzz-{target}");
                count.add(match run.join() {
                    Ok(done) => one(&name, done),
                    Err(_) => Count::one_failed(&name),
                });
            }
        });
    }
    Ok(count)
}

fn cargo_tests(options: &[&str], filter: Option<&str>) -> Result<Count> {
    let mut child = cargo()
        .args(["test", "--no-fail-fast"])
        .args(options)
        .args(filter)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let stream = child.stdout.take().context("cargo has no stdout")?;
    let mut count = Count::default();
    for line in BufReader::new(stream).lines() {
        let line = line?;
        writeln!(std::io::stdout(), "{line}")?;
        count.names.extend(failed_name(&line));
        if let Some(result) = line.strip_prefix("test result: ") {
            count.add(parse_count(result).context("cargo test speaks another language now")?);
        }
    }
    let status = child.wait()?;
    if !status.success() && count.failed == 0 {
        // It did not compile, or a test program died.
        count.add(Count::one_failed("cargo test"));
    }
    Ok(count)
}

/// What the runs in the machine need, built on the host: compiling is slow in there.
struct Guest {
    runner: PathBuf,
    stage: PathBuf,
    programs: PathBuf,
}

impl Guest {
    fn prepare() -> Result<Guest> {
        heading("building what the test machine runs");
        let target = paths::target()?;
        let programs = target.join("test-programs");
        let guest = Guest {
            runner: stage::programs(&programs)?,
            stage: target.join("stage"),
            programs,
        };
        stage::stage(&guest.stage)?;
        let packages = [
            "--package",
            "reverbs-node-tests",
            "--package",
            "reverbs-wrappers",
        ];
        command::run(cargo().arg("build").args(packages))?;
        let wrapper = "libreverbs_wrappers.so";
        fs::copy(
            target.join("debug").join(wrapper),
            guest.programs.join(wrapper),
        )
        .context(wrapper)?;
        Ok(guest)
    }

    /// The names of the run's cases that the filter leaves; `None` without any.
    fn cases(&self, run: &Run, filter: Option<&str>) -> Result<Option<Vec<String>>> {
        let listed = command::output(Command::new(&self.runner).arg("--list").args(run.cases))?;
        if listed.trim().is_empty() {
            bail!("the run {} in test_plan.rs names no case", run.name);
        }
        let Some(filter) = filter else {
            return Ok(Some(
                run.cases.iter().map(|part| (*part).to_owned()).collect(),
            ));
        };
        let cases: Vec<String> = listed
            .lines()
            .filter(|name| name.contains(filter))
            .map(str::to_owned)
            .collect();
        Ok((!cases.is_empty()).then_some(cases))
    }

    fn run(&self, run: &Run, cases: &[String]) -> Result<Count> {
        heading(&format!("test machine: {}", run.name));
        let share = paths::make(paths::machine()?.join("tests"))?;
        let output = format!("{}/{}", vm::SHARE, run.name);
        let mut program = vec![text(&self.runner)?.to_owned()];
        if run.bare {
            program.push("--bare".to_owned());
        } else {
            program.extend(["--stage".to_owned(), text(&self.stage)?.to_owned()]);
        }
        program.extend(["--programs".to_owned(), text(&self.programs)?.to_owned()]);
        program.extend(["--output".to_owned(), output]);
        program.extend(run.options.iter().map(|option| (*option).to_owned()));
        program.extend(cases.iter().cloned());
        let outcome = Machine::default()
            .counted(run.counted)
            .share(&share)
            .timeout(Duration::from_secs(run.timeout))
            .output(Output::Both)
            .run(&program)?;
        let stdout = String::from_utf8_lossy(&outcome.stdout);
        let mut count = stdout
            .lines()
            .rev()
            .find_map(parse_count)
            .unwrap_or_default();
        count.names.extend(stdout.lines().filter_map(failed_name));
        if !outcome.success() && count.failed == 0 {
            eprintln!(
                "xtask: the run {} did not end well: {:?}; its files are in {}",
                run.name,
                outcome.end,
                share.join(run.name).display()
            );
            count.add(Count::one_failed(run.name));
        }
        Ok(count)
    }

    /// Jobs over several nodes, natively.
    fn node_tests(&self, long: bool, filter: Option<&str>) -> Result<Count> {
        let chosen: &[&str] = if long { &[] } else { NODE_CASES };
        let runner = self.runner.with_file_name("node-tests");
        let listed = command::output(Command::new(&runner).arg("--list").args(chosen))?;
        let cases: Vec<String> = listed
            .lines()
            .filter(|name| filter.is_none_or(|filter| name.contains(filter)))
            .map(|name| format!("={name}"))
            .collect();
        if cases.is_empty() {
            return Ok(Count::default());
        }
        if !setup::is_root()? {
            heading("several nodes: skipped, since only root can make them");
            return Ok(Count::default());
        }
        heading("several nodes: namespaces of this machine");
        let mut child = Command::new(&runner)
            .arg("--stage")
            .arg(&self.stage)
            .arg("--programs")
            .arg(&self.programs)
            .arg("--output")
            .arg(paths::target()?.join("node-tests"))
            .args(cases)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start node-tests")?;
        let stream = child.stdout.take().context("node-tests has no stdout")?;
        let mut count = Count::default();
        for line in BufReader::new(stream).lines() {
            let line = line?;
            writeln!(std::io::stdout(), "{line}")?;
            count.names.extend(failed_name(&line));
            if let Some(Count { passed, failed, .. }) = parse_count(&line) {
                (count.passed, count.failed) = (passed, failed);
            }
        }
        if !child.wait()?.success() && count.failed == 0 {
            count.add(Count::one_failed("node-tests"));
        }
        Ok(count)
    }
}

/// Reads `3 passed[,;] 1 failed...`, also after `ok. `.
fn parse_count(line: &str) -> Option<Count> {
    let mut passed = None;
    let mut failed = None;
    for part in line.split([',', ';', '.']) {
        match part.trim().split_once(' ') {
            Some((number, "passed")) => passed = number.parse().ok(),
            Some((number, "failed")) => failed = number.parse().ok(),
            _ => {}
        }
    }
    Some(Count {
        passed: passed?,
        failed: failed?,
        names: Vec::new(),
    })
}

/// The name in a line that says that a test failed: of cargo's (`test NAME ... FAILED`) or of our runners (`NAME FAILED ...`).
fn failed_name(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let name = match line.strip_prefix("test ") {
        Some(of_cargo) => of_cargo.strip_suffix(" ... FAILED")?,
        // What is indented is quoted from a file.
        None if line.starts_with(char::is_whitespace) => return None,
        None => words.next().filter(|_| words.next() == Some("FAILED"))?,
    };
    Some(name.to_owned())
}

/// When the first heading was shown.
fn started() -> Instant {
    static STARTED: OnceLock<Instant> = OnceLock::new();
    *STARTED.get_or_init(Instant::now)
}

fn heading(text: &str) {
    let seconds = started().elapsed().as_secs();
    eprintln!("xtask: {:02}:{:02} {text}", seconds / 60, seconds % 60);
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a name is not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read() {
        let expected = Some(Count {
            passed: 12,
            failed: 3,
            names: Vec::new(),
        });
        assert_eq!(parse_count("12 passed, 3 failed"), expected);
        let cargo = "FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(parse_count(cargo), expected);
        assert_eq!(parse_count("passed it all"), None);
        assert_eq!(parse_count("12 passed"), None);
    }

    #[test]
    fn names_of_what_failed_are_read() {
        let name = |line| failed_name(line).unwrap_or_default();
        assert_eq!(
            name("test image::it_is_whole ... FAILED"),
            "image::it_is_whole"
        );
        assert_eq!(
            name("leak-valgrind                FAILED  110.0 s  why"),
            "leak-valgrind"
        );
        assert_eq!(name("      leak-valgrind FAILED"), "");
        assert_eq!(name("test image::it_is_whole ... ok"), "");
        assert_eq!(name("test result: FAILED. 12 passed; 3 failed"), "");
        assert_eq!(name("leak-valgrind                ok      110.0 s"), "");
    }
}
