//! Starting a command on another node, by what the user has for that: ssh, or srun inside an allocation.

use std::io::BufRead;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use reverbs::control::socket::runtime_dir;

use crate::command::job::JobLock;

/// Names the program, as the option `--rsh` does.
pub(crate) const RSH_VARIABLE: &str = "REVERBS_RSH";

/// A step beside the others of its allocation: one process that may use all that the node has, and is no rank of MPI.
const STEP: &str = "--overlap --mpi=none --cpu-bind=none --nodes=1 --ntasks=1 --quiet --unbuffered \
                    --nodelist";

/// A program that is called like ssh: with a host and a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Launcher {
    words: Vec<String>,
    /// A step of the cluster's engine: what it has started ends with it.
    pub(crate) is_step: bool,
}

impl Launcher {
    /// The one asked for; else, inside a Slurm allocation, srun; else ssh.
    pub(crate) fn find(asked: Option<&str>) -> Self {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        let variable = std::env::var(RSH_VARIABLE).ok();
        let asked = asked
            .or(variable.as_deref())
            .filter(|text| !text.trim().is_empty());
        match (asked, std::env::var("SLURM_JOB_ID")) {
            (Some(text), _) => Self {
                words: words(text),
                is_step: text.split_whitespace().next() == Some("srun"),
            },
            // With the number, since later commands may be used outside of the allocation.
            (None, Ok(job)) => Self {
                words: words(&format!("srun --jobid={job} {STEP}")),
                is_step: true,
            },
            (None, Err(_)) => Self {
                words: words("ssh -o BatchMode=yes -o ConnectTimeout=15"),
                is_step: false,
            },
        }
    }

    /// What runs this very command, with `arguments`, on `host`.
    ///
    /// # Errors
    /// We do not know where we are.
    pub(crate) fn command(&self, host: &str, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(
            self.words
                .first()
                .context("no program to reach other nodes by")?,
        );
        command
            .args(&self.words[1..])
            .arg(host)
            .arg(executable()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    /// To be used before the end of what keeps steps, when the job has ended: a command that has ended it, or is at work on it
    /// otherwise, may have steps of its own, which end with the batch script. Waits for that command.
    pub(crate) fn let_command_finish(&self, root: i32) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(60);
        if self.is_step {
            // Whoever takes longer has nothing left to save.
            let _ = JobLock::take_within(LIMIT, &runtime_dir()?, root);
        }
        Ok(())
    }

    /// For messages.
    pub(crate) fn name(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }
}

/// This command is at the same place on all nodes.
fn executable() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find this command itself")
}

/// The last line that a launcher has written to its standard error.
#[derive(Debug)]
pub(super) struct LastLine {
    line: Arc<Mutex<String>>,
    thread: std::thread::JoinHandle<()>,
}

impl LastLine {
    pub(super) fn of(stream: Option<std::process::ChildStderr>) -> Self {
        let line = Arc::new(Mutex::new(String::new()));
        let thread = std::thread::spawn({
            let line = Arc::clone(&line);
            move || {
                let stream = stream.map(std::io::BufReader::new);
                for said in stream
                    .into_iter()
                    .flat_map(BufRead::lines)
                    .map_while(Result::ok)
                {
                    tracing::info!(said, "another node");
                    if !said.trim().is_empty() {
                        *line.lock().unwrap_or_else(PoisonError::into_inner) =
                            said.trim().to_owned();
                    }
                }
            }
        });
        Self { line, thread }
    }

    /// When the stream has ended, or so long has passed.
    pub(super) fn within(&self, limit: Duration) -> String {
        let until = Instant::now() + limit;
        while !self.thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.clone()
    }

    pub(super) fn wait(self) -> String {
        let Self { line, thread } = self;
        let _ = thread.join();
        let line = line.lock().unwrap_or_else(PoisonError::into_inner);
        line.clone()
    }
}
