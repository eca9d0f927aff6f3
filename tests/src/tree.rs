//! Process trees: who descends from whom, and ending all of them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait, waitpid};

use crate::setup::Deadline;

/// Between two looks at processes that are being ended.
const PAUSE: Duration = Duration::from_millis(10);

/// Makes this process the parent of every orphan below it, so that nothing a case started can
/// escape `end_all`. A tree restored by a detached CRIU lands here as well.
///
/// # Errors
/// When the kernel refuses `PR_SET_CHILD_SUBREAPER`.
pub fn adopt_orphans() -> rustix::io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
}

/// All live processes below `root`, parents before children; `root` itself is not among them.
pub fn descendants(root: u32) -> Vec<u32> {
    let parents = parents();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found.remove(0);
    found
}

/// Ends everything below this process, and reaps it. Returns how many processes had to be ended.
///
/// Processes can fork while they are being ended, so this goes on until none is left.
pub fn end_all() -> usize {
    let mut ended = 0;
    loop {
        reap_all();
        let left = descendants(std::process::id());
        if left.is_empty() {
            return ended;
        }
        for pid in left
            .iter()
            .filter_map(|pid| Pid::from_raw(pid.cast_signed()))
        {
            // A process that has ended in the meantime is what is wanted.
            if kill_process(pid, Signal::KILL).is_ok() {
                ended += 1;
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Waits until none of these processes is there any more.
///
/// # Errors
/// When one stays until the deadline.
pub fn wait_until_gone(pids: &[u32], deadline: Deadline) -> Result<()> {
    while let Some(pid) = pids.iter().find(|pid| exists(**pid)) {
        ensure!(!deadline.passed(), "process {pid} does not end");
        reap(pids);
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Whether there is such a process, or what is left of one.
pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Takes note of the end of those that are our children by now.
pub fn reap(pids: &[u32]) {
    for pid in pids
        .iter()
        .filter_map(|pid| Pid::from_raw(pid.cast_signed()))
    {
        // Not our child, or not at its end: then it is not for us to do anything.
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Collects every child that has ended, also those of other process groups (which `waitpid` of
/// "any" leaves out).
fn reap_all() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// Every process with its parent.
fn parents() -> Vec<(u32, u32)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| Some((pid, parent_of(pid)?)))
        .collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may itself contain blanks and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}
