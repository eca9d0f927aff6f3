//! Runs cases one after the other and says what came out.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};

use crate::case::{Case, Job};
use crate::setup::{Deadline, Setup};
use crate::tree;

/// The first TCP port given to a case; each further case gets the next one.
const FIRST_PORT: u16 = 20_000;

/// How many lines of each captured file are shown for a failed case.
const LINES_SHOWN: usize = 24;

/// Runs the cases and writes one line for each, then `N passed, N failed[, N skipped]`.
/// True when none failed.
///
/// # Errors
/// When the report itself cannot be written.
pub fn run_all(cases: &[Case], setup: &Setup, out: &mut impl Write) -> Result<bool> {
    tree::adopt_orphans()?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (case, port) in cases.iter().zip(FIRST_PORT..) {
        if let Some(what) = case.needs.lacking(setup) {
            writeln!(out, "{:<28} skipped: needs {what}", case.name)?;
            skipped += 1;
            continue;
        }
        let start = Instant::now();
        let outcome = run_one(case, setup, port);
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(remark) => {
                passed += 1;
                let line = format!("{:<28} ok     {seconds:6.1} s  {remark}", case.name);
                writeln!(out, "{}", line.trim_end())?;
            }
            Err(error) => {
                failed += 1;
                writeln!(out, "{:<28} FAILED {seconds:6.1} s  {error:#}", case.name)?;
                show_output(&setup.output.join(&case.name), out)?;
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

fn run_one(case: &Case, setup: &Setup, port: u16) -> Result<String> {
    let folder = setup.output.join(&case.name);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let job = Job {
        setup,
        folder,
        deadline: Deadline::after(case.limit),
        port,
    };
    let outcome = case.run(&job);
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
