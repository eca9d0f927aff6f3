//! The numbers of a job since its last restart, for processes of it that open their first device later.
//!
//! Peers tell such a process virtual numbers, so it must know the tables that the others learnt at Connect. The
//! orchestrator leaves them in the runtime folder under the process id of the job's root, before it looks for newcomers a last
//! time; a process makes its socket before it looks for the file. So one of the two finds the other.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::message::ProcessNumbers;

#[derive(Debug, Serialize, Deserialize)]
struct Published {
    /// When the root started, so that another process of its id is not taken for it.
    root_started: Start,
    processes: Vec<ProcessNumbers>,
}

const SUFFIX: &str = ".numbers";

fn file(runtime_dir: &Path, root: i32) -> PathBuf {
    runtime_dir.join(format!("job-{root}{SUFFIX}"))
}

/// Leaves the numbers of the job whose tree begins at process `root`; removes what jobs that have ended left.
///
/// # Errors
/// There is no process `root`, or the file cannot be written.
pub fn publish(runtime_dir: &Path, root: i32, processes: &[ProcessNumbers]) -> io::Result<()> {
    remove_old(runtime_dir);
    let published = Published {
        root_started: start_of(root).ok_or(io::ErrorKind::NotFound)?,
        processes: processes.to_vec(),
    };
    let path = file(runtime_dir, root);
    let fresh = path.with_extension("fresh");
    let mut out = BufWriter::new(File::create(&fresh)?);
    serde_json::to_writer(&mut out, &published)?;
    out.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .flush()?;
    fs::rename(fresh, path)
}

/// The numbers of the job that process `pid` is in: those left for it or for the nearest of its ancestors.
#[must_use]
pub fn find(runtime_dir: &Path, pid: i32) -> Option<Vec<ProcessNumbers>> {
    let mut next = pid;
    while next > 0 {
        if let Some(published) = read(&file(runtime_dir, next))
            && start_of(next).is_some_and(|start| start.is(&published.root_started))
        {
            return Some(published.processes);
        }
        next = parent_of(next)?;
    }
    None
}

fn read(path: &Path) -> Option<Published> {
    let file = File::open(path).ok()?;
    match serde_json::from_reader(BufReader::new(file)) {
        Ok(published) => Some(published),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "the numbers of the job cannot be read");
            None
        }
    }
}

fn remove_old(runtime_dir: &Path) {
    for entry in fs::read_dir(runtime_dir).into_iter().flatten().flatten() {
        let root = entry.file_name().to_str().and_then(|name| {
            let number = name.strip_prefix("job-")?.strip_suffix(SUFFIX)?;
            number.parse().ok()
        });
        let Some(root) = root else { continue };
        let lives = start_of(root)
            .zip(read(&entry.path()))
            .is_some_and(|(start, published)| start.is(&published.root_started));
        if !lives {
            // A leftover does no harm.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn parent_of(pid: i32) -> Option<i32> {
    stat(pid, 4)?.parse().ok()
}

/// When a process started, the same from within every time namespace: CRIU gives what it restores one of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Start {
    /// Since boot, by the clock outside of time namespaces; less than a tick too little.
    nanoseconds: u64,
    boot: String,
}

impl Start {
    /// `ticks` as `/proc/PID/stat` shows them where the clock since boot is ahead by what `offsets` (`timens_offsets`) says.
    fn new(ticks: u64, offsets: &str, boot: &str) -> Self {
        let ahead = offsets
            .lines()
            .find_map(|line| line.strip_prefix("boottime"))
            .and_then(|line| {
                let mut numbers = line.split_whitespace().map(str::parse::<i64>);
                let seconds = numbers.next()?.ok()?;
                let nanoseconds = numbers.next()?.ok()?;
                Some(seconds * 1_000_000_000 + nanoseconds)
            });
        Self {
            // Who started before the namespace's clock did is shown wrapped below zero.
            nanoseconds: ticks
                .wrapping_mul(tick())
                .wrapping_sub(ahead.unwrap_or(0).cast_unsigned()),
            boot: boot.trim().to_owned(),
        }
    }

    fn is(&self, other: &Self) -> bool {
        let apart = self.nanoseconds.wrapping_sub(other.nanoseconds);
        self.boot == other.boot && apart.cast_signed().unsigned_abs() < tick()
    }
}

/// Nanoseconds of a tick of the clock in `/proc/PID/stat`.
fn tick() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second()
}

fn start_of(pid: i32) -> Option<Start> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    // Not there on a kernel without time namespaces.
    let offsets = fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
    Some(Start::new(stat(pid, 22)?.parse().ok()?, &offsets, &boot))
}

/// A field of `/proc/PID/stat` after the second, counted as `proc_pid_stat(5)` does.
fn stat(pid: i32, field: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, may hold spaces and parentheses; it ends at the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    fields
        .split_whitespace()
        .nth(field - 3)
        .map(ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> i32 {
        std::process::id().cast_signed()
    }

    #[test]
    fn a_descendant_finds_what_was_left_for_its_root() {
        let folder = tempfile::tempdir().unwrap();
        let numbers = [ProcessNumbers {
            pid: 7,
            contexts: Vec::new(),
        }];
        assert_eq!(find(folder.path(), own()), None);
        publish(folder.path(), own(), &numbers).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        assert_eq!(find(folder.path(), pid).as_deref(), Some(&numbers[..]));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(find(folder.path(), pid), None);
    }

    #[test]
    fn what_another_process_of_that_id_left_is_not_found_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        publish(folder.path(), own(), &[]).unwrap();
        let path = file(folder.path(), own());
        let mut published = read(&path).unwrap();
        published.root_started.nanoseconds -= tick();
        fs::write(&path, serde_json::to_vec(&published).unwrap()).unwrap();
        assert_eq!(find(folder.path(), own()), None);
        publish(
            folder.path(),
            std::os::unix::process::parent_id().cast_signed(),
            &[],
        )
        .unwrap();
        assert!(!path.exists());
    }
    /// As seen of one process after a restart: from outside, and from within the namespace that CRIU made.
    #[test]
    fn a_start_is_the_same_from_within_a_time_namespace() {
        let outside = Start::new(1945, "monotonic 0 0\nboottime 0 0\n", "boot\n");
        let within = "monotonic         -10 503000001\nboottime          -10 503000000\n";
        assert!(Start::new(995, within, "boot\n").is(&outside));
        assert!(Start::new(996, within, "boot\n").is(&outside));
        assert!(!Start::new(994, within, "boot\n").is(&outside));
        assert!(!Start::new(997, within, "boot\n").is(&outside));
        assert!(!Start::new(995, within, "other boot\n").is(&outside));
        let older = Start::new(300, "", "boot");
        assert!(Start::new(1_844_674_406_721, within, "boot").is(&older));
    }
}
