//! One orchestrator a job.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// So long the holder of a lock may take to write its id down.
const NAMING_LIMIT: Duration = Duration::from_secs(1);

/// Held while a command drives a job; let go when dropped, or when the process dies.
#[derive(Debug)]
pub(crate) struct JobLock {
    path: PathBuf,
    /// Keeps the lock.
    _file: File,
}

impl JobLock {
    /// As [`JobLock::take`], but waits a while for one that is letting go: the part of a command whose first node is gone.
    ///
    /// # Errors
    /// It is still held then.
    pub(crate) fn take_within(limit: Duration, runtime_dir: &Path, root: i32) -> Result<Self> {
        const LOOK: Duration = Duration::from_millis(100);
        let began = Instant::now();
        loop {
            match Self::take(runtime_dir, root) {
                Err(_) if began.elapsed() < limit => std::thread::sleep(LOOK),
                taken => return taken,
            }
        }
    }

    /// # Errors
    /// Another command holds it: its process id is named.
    fn take(runtime_dir: &Path, root: i32) -> Result<Self> {
        let path = runtime_dir.join(format!("job-{root}.lock"));
        let began = Instant::now();
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .with_context(|| format!("cannot open {}", path.display()))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let owner = owner(&mut file)?;
                    if owner.is_none() && began.elapsed() < NAMING_LIMIT {
                        std::thread::sleep(Duration::from_millis(5));
                        continue;
                    }
                    let owner = owner.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
                    bail!(
                        "job {root} is being driven by another reverbs, process {owner}: wait until it is done"
                    );
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot lock {}", path.display()));
                }
            }
            // The last owner may have removed the file between our open and our lock.
            let ours = file.metadata()?;
            if std::fs::metadata(&path)
                .is_ok_and(|now| now.ino() == ours.ino() && now.dev() == ours.dev())
            {
                file.set_len(0)?;
                write!(file, "{}", std::process::id())?;
                return Ok(Self { path, _file: file });
            }
        }
    }
}

/// Who holds the lock. It has the lock before its id is in the file, where until then an owner may be named that was killed.
fn owner(file: &mut File) -> Result<Option<i32>> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let owner = text.trim().parse().ok();
    Ok(owner.filter(|pid| Path::new(&format!("/proc/{pid}")).exists()))
}

impl Drop for JobLock {
    fn drop(&mut self) {
        // Before the lock goes with the file; a leftover does no harm.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::JobLock;

    #[test]
    fn a_second_command_is_refused_by_name_and_a_third_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = JobLock::take(dir.path(), 7).unwrap();
        let refused = JobLock::take(dir.path(), 7).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {}", std::process::id())),
            "{refused}"
        );
        let _other_job = JobLock::take(dir.path(), 8).unwrap();
        drop(first);
        JobLock::take(dir.path(), 7).unwrap();
    }

    #[test]
    fn a_lock_that_was_left_is_taken_and_its_dead_owner_not_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job-7.lock");
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        std::fs::write(&path, dead.id().to_string()).unwrap();
        drop(JobLock::take(dir.path(), 7).unwrap());
        assert!(!path.exists());

        // Another has the lock and has not yet written who it is.
        std::fs::write(&path, dead.id().to_string()).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        file.lock().unwrap();
        let writing = path.clone();
        let owner = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(100));
            std::fs::write(writing, std::process::id().to_string()).unwrap();
        });
        let refused = JobLock::take(dir.path(), 7).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("process {}:", std::process::id())),
            "{refused}"
        );
        owner.join().unwrap();
    }
}
