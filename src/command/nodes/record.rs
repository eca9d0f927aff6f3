//! Which nodes a job has: kept in the runtime folder of the first, from its start to its end.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use procfs::process::Process;
use serde::{Deserialize, Serialize};

use super::launcher::Launcher;
use crate::command::node::JOB_VARIABLE;

/// Begins the names of the files.
const PREFIX: &str = "job-";
const SUFFIX: &str = ".nodes";

/// As long as a launcher may take.
const START_LIMIT: Duration = Duration::from_secs(60);

const PAUSE: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JobRecord {
    pub(crate) id: String,
    pub(crate) launcher: Launcher,
    /// The first is this one.
    pub(crate) nodes: Vec<RecordedNode>,
    /// Nodes on which processes are just being started: they may run already, and are not known yet.
    #[serde(default)]
    pub(crate) starting: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecordedNode {
    /// As the launcher calls it.
    pub(crate) name: String,
    /// Root of the processes there.
    pub(crate) root: i32,
}

impl JobRecord {
    /// That of the job whose root is process `root`, if it has more nodes than this one. Waits while it is being started on
    /// some.
    ///
    /// # Errors
    /// The record cannot be read, or the start does not end.
    pub(crate) fn of(runtime_folder: &Path, root: i32) -> Result<Option<Self>> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let record = Self::read(runtime_folder, root)?;
            match &record {
                Some(record) if !record.starting.is_empty() => ensure!(
                    Instant::now() < deadline,
                    "the job is still being started on {}: try again later",
                    record.starting.join(", ")
                ),
                _ => return Ok(record.filter(|record| record.nodes.len() > 1)),
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn read(runtime_folder: &Path, root: i32) -> Result<Option<Self>> {
        let Some(id) = job_of(root) else {
            return Ok(None);
        };
        let path = file(runtime_folder, &id);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        let mut record: Self =
            serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        ensure!(record.id == id, "{} is that of another job", path.display());
        if let Some(first) = record.nodes.first_mut() {
            first.root = root;
        }
        Ok(Some(record))
    }

    /// # Errors
    /// It cannot be written.
    pub(crate) fn write(&self, runtime_folder: &Path) -> Result<()> {
        let path = file(runtime_folder, &self.id);
        let fresh = path.with_extension("fresh");
        std::fs::write(&fresh, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&fresh, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The job has ended.
    pub(crate) fn remove(runtime_folder: &Path, id: &str) {
        // A leftover does no harm: its job is looked up by what its processes have in their environment.
        let _ = std::fs::remove_file(file(runtime_folder, id));
    }
}

fn file(runtime_folder: &Path, id: &str) -> PathBuf {
    runtime_folder.join(format!("{PREFIX}{id}{SUFFIX}"))
}

/// The id of the job that a process was started for.
fn job_of(root: i32) -> Option<String> {
    let environment = Process::new(root).ok()?.environ().ok()?;
    let id = environment.get(std::ffi::OsStr::new(JOB_VARIABLE))?;
    let id = id.to_str()?;
    id.bytes()
        .all(|byte| byte.is_ascii_alphanumeric())
        .then(|| id.to_owned())
}
