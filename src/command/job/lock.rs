//! One orchestrator a job.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// Held while a command drives a job; let go when dropped, or when the process dies.
#[derive(Debug)]
pub(crate) struct JobLock {
    path: PathBuf,
    /// Keeps the lock.
    _file: File,
}

impl JobLock {
    /// # Errors
    /// Another command holds it: its process id is named.
    pub(crate) fn take(runtime_dir: &Path, root: i32) -> Result<Self> {
        let path = runtime_dir.join(format!("job-{root}.lock"));
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
                    let mut owner = String::new();
                    file.read_to_string(&mut owner)?;
                    bail!(
                        "job {root} is being checkpointed by another reverbs, process {}: wait until it is done",
                        owner.trim()
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
}
