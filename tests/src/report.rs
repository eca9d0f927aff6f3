//! Runs tests one after the other and says what came out.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use crate::setup::Deadline;
use crate::tree;

/// The first TCP port given to a test; each further one gets the next.
const FIRST_PORT: u16 = 20_000;

/// How many lines of each captured file are shown for a failed test.
const LINES_SHOWN: usize = 24;

/// What can be run by name.
pub trait Test {
    fn name(&self) -> &str;

    /// What this run lacks that the test needs.
    fn lacking(&self) -> Option<&'static str>;

    /// A test that takes longer is ended and has failed.
    fn limit(&self) -> Duration;

    /// Runs the test. The text is a remark for the report, "" for none.
    ///
    /// # Errors
    /// When anything is not as promised; the error says what.
    fn run(&self, place: Place) -> Result<String>;
}

/// What belongs to one run of one test.
#[derive(Debug)]
pub struct Place {
    /// The test's own folder for captured output; it exists.
    pub folder: PathBuf,
    pub deadline: Deadline,
    /// A TCP port that no other test of this run uses.
    pub port: u16,
}

/// Whether a filter of the command line means this name: a part of it; with `^` in front, its beginning; with `=`, all
/// of it.
pub fn matches(name: &str, filter: &str) -> bool {
    match (filter.strip_prefix('^'), filter.strip_prefix('=')) {
        (Some(beginning), _) => name.starts_with(beginning),
        (_, Some(whole)) => name == whole,
        _ => name.contains(filter),
    }
}

/// Runs the tests, each with a folder of its own below `output`, and writes one line for each, then
/// `N passed, N failed[, N skipped]`. True when none failed.
///
/// # Errors
/// When the report itself cannot be written.
pub fn run_all(tests: &[impl Test], output: &Path, out: &mut impl Write) -> Result<bool> {
    tree::adopt_orphans()?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (test, port) in tests.iter().zip(FIRST_PORT..) {
        if let Some(what) = test.lacking() {
            writeln!(out, "{:<28} skipped: needs {what}", test.name())?;
            skipped += 1;
            continue;
        }
        let start = Instant::now();
        let folder = output.join(test.name());
        let outcome = run_one(test, folder.clone(), port);
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(remark) => {
                passed += 1;
                let line = format!("{:<28} ok     {seconds:6.1} s  {remark}", test.name());
                writeln!(out, "{}", line.trim_end())?;
            }
            Err(error) => {
                failed += 1;
                writeln!(out, "{:<28} FAILED {seconds:6.1} s  {error:#}", test.name())?;
                show_output(&folder, out)?;
            }
        }
        out.flush()?;
    }
    write!(out, "{passed} passed, {failed} failed")?;
    if skipped > 0 {
        write!(out, ", {skipped} skipped")?;
    }
    writeln!(out)?;
    Ok(failed == 0)
}

fn run_one(test: &impl Test, folder: PathBuf, port: u16) -> Result<String> {
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let outcome = test.run(Place {
        folder,
        deadline: Deadline::after(test.limit()),
        port,
    });
    let left_behind = tree::end_all();
    match outcome {
        Ok(_) if left_behind > 0 => Err(anyhow!("{left_behind} processes were left behind")),
        other => other,
    }
}

/// Shows the ends of the captured files.
fn show_output(folder: &Path, out: &mut impl Write) -> io::Result<()> {
    let mut files: Vec<_> = fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    for file in files.iter().filter(|file| file.is_file()) {
        let text = fs::read(file)?;
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LINES_SHOWN)..];
        if tail.is_empty() {
            continue;
        }
        writeln!(out, "    {}:", file.display())?;
        for line in tail {
            writeln!(out, "      {line}")?;
        }
    }
    Ok(())
}
