//! `cargo xtask demo`: an MPI benchmark is saved in mid-run on one machine and finished on
//! another, which has only a device of another name and address.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::handles::Handles;
use crate::vm::{self, Machine, Outcome};
use crate::{paths, setup, stage};

const INPUT: &str = include_str!("guest/hpccinf.txt");
const FIRST: &str = include_str!("guest/demo-first.sh");
const SECOND: &str = include_str!("guest/demo-second.sh");

/// The only device of the second machine.
const OTHER_DEVICE: &str = "rdma9@10.99.0.1/24";

/// The longest that one of the machines may take.
const LIMIT: Duration = Duration::from_secs(400);

/// Runs the demonstration and prints what happened on stdout.
///
/// # Errors
/// When something cannot be built or started, the job does not finish, its own checks fail,
/// or its handles are not as they must be.
pub fn run() -> Result<()> {
    setup::ensure()?;
    let target = paths::target()?;
    let staged = target.join("stage");
    stage::stage(&staged)?;
    let share = fresh_share(&target.join("vm/demo"))?;
    let job = share.join("job");
    let machine = Machine::default()
        .share(&share)
        .timeout(LIMIT)
        .environment(
            "REVERBS",
            staged
                .join("bin/reverbs")
                .to_str()
                .context("a name is not UTF-8")?,
        )
        .folder(Path::new("/"));

    let begin = Instant::now();
    say("first machine: rxe0 at 10.77.0.1, rxe1 at 10.78.0.1; hpcc on two ranks over rxe0");
    finished(&machine.run_script(FIRST)?)?;
    let image = share_path(&share, fs::read_to_string(job.join("image"))?.trim())?;
    let before = Handles::read(&job.join("status-before.json"))?;
    say("the job is saved, the machine off. Second machine: only rdma9 at 10.99.0.1");
    let other = machine.devices(vec![OTHER_DEVICE.parse()?]);
    finished(&other.run_script(SECOND)?)?;
    let after = Handles::read(&job.join("status-after.json"))?;
    let total = begin.elapsed();

    let verdict = verdict(&fs::read_to_string(job.join("hpccoutf.txt"))?)?;
    let mut report = String::from("\nphase              seconds\n");
    for (moment, log) in [("checkpoint", "checkpoint.log"), ("restart", "restart.log")] {
        for (phase, seconds) in phases(&fs::read_to_string(job.join(log))?) {
            report += &format!("{:<18} {seconds:>7.3}\n", format!("{moment} {phase}"));
        }
    }
    report += &format!("\nimage: {} bytes\n\n", bytes_below(&image)?);
    report += &before.beside(&after)?;
    report += &format!(
        "\nhpcc: {verdict}\nall of it: {:.0} s\n",
        total.as_secs_f64()
    );
    std::io::stdout().write_all(report.as_bytes())?;
    Ok(())
}

/// An empty folder that both machines see, with the job's input.
fn fresh_share(folder: &Path) -> Result<PathBuf> {
    let share = empty(folder)?;
    paths::make(share.join("images"))?;
    let job = paths::make(share.join("job"))?;
    fs::write(job.join("hpccinf.txt"), INPUT)?;
    Ok(share)
}

/// Makes the folder anew.
pub(crate) fn empty(folder: &Path) -> Result<PathBuf> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    paths::make(folder.to_owned())
}

/// # Errors
/// When the script in the machine did not end well.
pub(crate) fn finished(outcome: &Outcome) -> Result<()> {
    if !outcome.success() {
        bail!("the script failed in the machine: {:?}", outcome.end);
    }
    Ok(())
}

/// The host's name of a path in the guest's share.
pub(crate) fn share_path(share: &Path, guest: &str) -> Result<PathBuf> {
    let inside = Path::new(guest)
        .strip_prefix(vm::SHARE)
        .with_context(|| format!("the image `{guest}` is not in the share"))?;
    Ok(share.join(inside))
}

/// The times in what `reverbs` says on stderr: `reverbs: PHASE  1.234 s  ...`.
pub(crate) fn phases(log: &str) -> Vec<(String, f64)> {
    log.lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("reverbs: ")?.split_whitespace();
            let phase = words.next()?;
            let seconds = words.next()?.parse().ok()?;
            (words.next() == Some("s")).then(|| (phase.to_owned(), seconds))
        })
        .collect()
}

/// What hpcc says of its own results.
fn verdict(output: &str) -> Result<String> {
    let has = |text: &str| output.contains(text);
    ensure!(has("End of HPC Challenge tests."), "hpcc did not finish");
    ensure!(
        has("Success=1") && !has("FAILED") && !has("(failed)"),
        "hpcc found wrong results: see hpccoutf.txt"
    );
    let number = |text: &str| output.matches(text).count();
    Ok(format!(
        "finished; {} residual checks and {} memory checks passed, none failed",
        number("PASSED"),
        number("(passed)")
    ))
}

/// The size of all files in a folder.
pub(crate) fn bytes_below(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let found = entry.metadata()?;
        sum += if found.is_dir() {
            bytes_below(&entry.path())?
        } else {
            found.len()
        };
    }
    Ok(sum)
}

fn say(text: &str) {
    eprintln!("xtask: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_read() {
        let log = "reverbs: close         0.012 s  2 processes\nreverbs: a note\n\
                   reverbs: save          3.500 s\n";
        let expected = [("close".to_owned(), 0.012), ("save".to_owned(), 3.5)];
        assert_eq!(phases(log), expected);
    }

    #[test]
    fn wrong_results_are_seen() {
        let good = "x PASSED\nFound 0 errors in 4 locations (passed).\nSuccess=1\n\
                    End of HPC Challenge tests.";
        assert!(verdict(good).is_ok());
        assert!(verdict("Success=1").is_err());
        assert!(verdict(&good.replace("(passed)", "(failed)")).is_err());
        assert!(verdict(&good.replace("PASSED", "FAILED")).is_err());
        assert!(verdict(&good.replace("Success=1", "Success=0")).is_err());
    }
}
