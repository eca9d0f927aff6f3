//! Network namespaces: a job that came back on other hosts lives in one of its own, in which it keeps its addresses.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command::criu::system_path;

/// Where the processes of a job have their sockets.
#[derive(Debug, Default)]
pub(crate) struct Namespace {
    /// `None` for our own.
    file: Option<PathBuf>,
    /// Keeps a fresh one until somebody lives in it.
    keeper: Option<Child>,
}

impl Namespace {
    /// That of a process.
    ///
    /// # Errors
    /// There is no such process, or it is another user's.
    pub(crate) fn of(pid: i32) -> Result<Self> {
        let file = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let theirs = identity(&file)
            .with_context(|| format!("cannot find the network namespace of process {pid}"))?;
        let ours = identity(Path::new("/proc/self/ns/net"))?;
        Ok(Self {
            file: (theirs != ours).then_some(file),
            keeper: None,
        })
    }

    /// A fresh one. It goes when the last process in it ends.
    ///
    /// # Errors
    /// It cannot be made: that needs the privilege that CRIU needs, too.
    pub(crate) fn fresh() -> Result<Self> {
        const LIMIT: Duration = Duration::from_secs(5);
        let mut keeper = Command::new("unshare")
            .args(["--net", "--kill-child", "cat"])
            .env("PATH", system_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start `unshare` (Debian: `apt install util-linux`)")?;
        let file = PathBuf::from(format!("/proc/{}/ns/net", keeper.id()));
        let ours = identity(Path::new("/proc/self/ns/net"))?;
        let began = Instant::now();
        while identity(&file).is_ok_and(|theirs| theirs == ours) {
            if keeper.try_wait()?.is_some() || began.elapsed() > LIMIT {
                let _ = keeper.kill();
                let _ = keeper.wait();
                bail!("cannot make a network namespace: that needs root");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Self {
            file: Some(file),
            keeper: Some(keeper),
        })
    }

    /// The process that keeps a fresh one.
    pub(super) fn keeper(&self) -> Option<u32> {
        self.keeper.as_ref().map(Child::id)
    }

    /// A command that will run in it.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match &self.file {
            None => Command::new(program),
            Some(file) => {
                let mut net = std::ffi::OsString::from("--net=");
                net.push(file);
                let mut command = Command::new("nsenter");
                command.arg(net).arg("--").arg(program);
                command
            }
        };
        command.env("PATH", system_path());
        command
    }

    /// Runs a command in it that has to succeed.
    pub(super) fn run(&self, program: &str, arguments: &[&str]) -> Result<()> {
        let done = self
            .command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start `{program}`"))?;
        if !done.status.success() {
            bail!(
                "`{program} {}` failed: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&done.stderr).trim()
            );
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.kill();
            let _ = keeper.wait();
        }
    }
}

fn identity(file: &Path) -> std::io::Result<(u64, u64)> {
    let found = std::fs::metadata(file)?;
    Ok((found.dev(), found.ino()))
}
