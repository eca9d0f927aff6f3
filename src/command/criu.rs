//! Stock CRIU, as a command.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::job::ProcessTree;
use super::network::{Namespace, tcp_lock};

/// Names another command than `criu`; words are split at spaces.
const OVERRIDE: &str = "REVERBS_CRIU";

/// Options of dump and restore alike: TCP connections, sockets whose other end is outside (syslog), and file locks are kept.
const COMMON: [&str; 3] = ["--tcp-established", "--ext-unix-sk", "--file-locks"];

/// CRIU calls it at every stage. The one that matters is after everything was written and before the processes are let go
/// or killed: then it reports through one pipe of ours, and waits for leave to go on at another. If we are not there any
/// more, it finds no pipe or reads an end of file, and fails; then CRIU lets the processes run on. The pipes go by their
/// names in /proc since CRIU closes every descriptor that it inherits.
fn hook(report: &impl AsRawFd, answer: &impl AsRawFd) -> String {
    format!(
        "#!/bin/sh
[ \"$CRTOOLS_SCRIPT_ACTION\" = post-dump ] || exit 0
cd /proc/{}/fd || exit 1
[ -p {report} ] && echo frozen > {report} || exit 1
read -r answer < {answer} && [ \"$answer\" = go ]
",
        std::process::id(),
        report = report.as_raw_fd(),
        answer = answer.as_raw_fd()
    )
}

/// A CRIU that can be started.
#[derive(Debug)]
pub(crate) struct Criu {
    command: Vec<OsString>,
    namespace: Namespace,
    pub(crate) version: String,
}

/// What to dump, and where to.
#[derive(Debug)]
pub(crate) struct Dump<'a> {
    pub(crate) root: i32,
    pub(crate) images: &'a Path,
    /// Logs and scripts.
    pub(crate) work: &'a WorkFolder,
    pub(crate) stop: bool,
    /// Bytes that a deleted file may have.
    pub(crate) ghost_limit: u64,
    /// As [`Criu::restore`] needs them too.
    pub(crate) options: &'a [String],
}

/// A private folder for one run of CRIU, removed afterwards.
#[derive(Debug)]
pub(crate) struct WorkFolder {
    folder: tempfile::TempDir,
    /// Where the log goes if CRIU fails.
    kept_log: PathBuf,
}

/// How a restore ended that did not succeed.
#[derive(Debug)]
pub(crate) struct RestoreFailure {
    pub(crate) reason: String,
    /// Something that passes may be in the way: an id or an address that is about to be free.
    pub(crate) may_pass: bool,
}

impl Criu {
    /// # Errors
    /// There is none, or it does not start.
    pub(crate) fn find() -> Result<Self> {
        Self::find_in(Namespace::default())
    }

    /// It will run in `namespace`, where the sockets of the job are.
    ///
    /// # Errors
    /// As [`Criu::find`].
    pub(crate) fn find_in(namespace: Namespace) -> Result<Self> {
        let command: Vec<OsString> = match std::env::var(OVERRIDE) {
            Ok(text) if !text.trim().is_empty() => {
                text.split_whitespace().map(OsString::from).collect()
            }
            _ => vec!["criu".into()],
        };
        let name = command[0].to_string_lossy().into_owned();
        let mut criu = Self {
            command,
            namespace,
            version: String::new(),
        };
        let output = match criu.start().arg("--version").output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
                "there is no `{name}`: install CRIU (Debian: `apt install criu`), or name one in {OVERRIDE}"
            ),
            Err(error) => return Err(error).with_context(|| format!("cannot start `{name}`")),
        };
        ensure!(
            output.status.success(),
            "`{name} --version` failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let text = String::from_utf8_lossy(&output.stdout);
        criu.version = text
            .lines()
            .find_map(|line| line.strip_prefix("Version:"))
            .map_or_else(|| "unknown".to_owned(), |version| version.trim().to_owned());
        Ok(criu)
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    fn start(&self) -> Command {
        let mut command = self.namespace.command(&self.command[0]);
        command.args(&self.command[1..]);
        command
    }

    /// Dumps the tree. `while_frozen` runs once everything is written and before the processes run on or are killed; if
    /// it fails, they run on.
    ///
    /// # Errors
    /// CRIU failed, or `while_frozen` did. The processes run on.
    pub(crate) fn dump(
        &self,
        dump: &Dump<'_>,
        while_frozen: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (report_read, report_write) = std::io::pipe()?;
        let (answer_read, mut answer_write) = std::io::pipe()?;
        let hook_file = dump.work.path().join("hook.sh");
        std::fs::write(&hook_file, hook(&report_write, &answer_read))?;
        std::fs::set_permissions(&hook_file, PermissionsExt::from_mode(0o700))?;
        let mut command = self.start();
        command
            .args(["dump", "-t", &dump.root.to_string(), "-o", "dump.log"])
            .arg(verbosity())
            .arg("-D")
            .arg(dump.images)
            .arg("-W")
            .arg(dump.work.path())
            .args(COMMON)
            .args([
                "--link-remap",
                "--ghost-limit",
                &dump.ghost_limit.to_string(),
            ])
            .arg("--action-script")
            .arg(&hook_file)
            .args(dump.options);
        if !dump.stop {
            command.arg("--leave-running");
        }
        // In a group of its own: Ctrl-C is for us. A CRIU that is killed half-way leaves its code inside the processes.
        let mut child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(dump.work.output()?)
            .spawn()
            .context("cannot start CRIU")?;
        // When CRIU has ended, nobody can report any more: then we read an end of file.
        let waiting = std::thread::spawn(move || {
            let status = child.wait();
            drop(report_write);
            status
        });
        let mut lines = BufReader::new(report_read).lines();
        let reached = lines.any(|line| line.is_ok_and(|line| line == "frozen"));
        let mut outcome = Err(anyhow!("CRIU ended before it had written everything"));
        if reached {
            outcome = while_frozen();
            let answer: &[u8] = if outcome.is_ok() { b"go\n" } else { b"no\n" };
            // If CRIU is gone, its status says so.
            let _ = answer_write.write_all(answer);
        }
        drop(answer_write);
        let status = waiting
            .join()
            .map_err(|_| anyhow!("waiting for CRIU panicked"))??;
        if status.signal().is_some()
            && let Ok(tree) = ProcessTree::of(dump.root)
        {
            tcp_lock::release(dump.root, &tree.pids());
        }
        match outcome {
            Err(error) if reached => Err(error),
            _ if status.success() => Ok(()),
            _ => bail!(dump.work.explain("dump.log", &status.to_string())),
        }
    }

    /// Restores the tree. `inherit` leads objects of the image, by CRIU's names for them, to descriptors of ours.
    ///
    /// # Errors
    /// CRIU failed; nothing of the tree is left running.
    pub(crate) fn restore(
        &self,
        images: &Path,
        work: &WorkFolder,
        options: &[String],
        inherit: &[(String, BorrowedFd<'_>)],
    ) -> Result<(), RestoreFailure> {
        let mut command = self.start();
        command
            .args(["restore", "-d", "-o", "restore.log"])
            .arg(verbosity())
            .arg("-D")
            .arg(images)
            .arg("-W")
            .arg(work.path())
            .args(COMMON)
            .args(options);
        let failed = |reason: String| RestoreFailure {
            reason,
            may_pass: false,
        };
        let mut copies = Vec::new();
        for (name, descriptor) in inherit {
            let copy = inheritable(*descriptor)
                .map_err(|error| failed(format!("cannot copy a descriptor: {error}")))?;
            command.args(["--inherit-fd", &format!("fd[{}]:{name}", copy.as_raw_fd())]);
            copies.push(copy);
        }
        let output = work
            .output()
            .map_err(|error| failed(format!("{error:#}")))?;
        let status = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .status()
            .map_err(|error| failed(format!("cannot start CRIU: {error}")))?;
        if status.success() {
            return Ok(());
        }
        let log = std::fs::read_to_string(work.path().join("restore.log")).unwrap_or_default();
        Err(RestoreFailure {
            reason: work.explain("restore.log", &status.to_string()),
            may_pass: [
                "File exists",
                "Address already in use",
                "Cannot assign requested address",
            ]
            .iter()
            .any(|passing| log.contains(passing)),
        })
    }
}

/// /usr/sbin is not on every user's path, and CRIU itself looks for iptables there.
pub(crate) fn system_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin")
}

/// A copy that survives an exec, out of the way of what CRIU opens for itself.
fn inheritable(descriptor: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    const FIRST: i32 = 100;
    let copy = rustix::io::fcntl_dupfd_cloexec(descriptor, FIRST)?;
    rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty())?;
    Ok(copy)
}

/// Everything under REVERBS_LOG=debug, else errors and warnings.
fn verbosity() -> &'static str {
    if tracing::enabled!(tracing::Level::DEBUG) {
        "-v4"
    } else {
        "-v2"
    }
}

impl WorkFolder {
    /// # Errors
    /// It cannot be made in the runtime folder. The caller holds the lock of the job.
    pub(crate) fn create(runtime_folder: &Path, root: i32) -> Result<Self> {
        // A command that was killed has left its own; the caller holds the job's lock.
        let prefix = format!("criu-{root}-");
        for entry in std::fs::read_dir(runtime_folder)
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(&prefix))
            {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let folder = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir_in(runtime_folder)
            .with_context(|| format!("cannot make a folder in {}", runtime_folder.display()))?;
        Ok(Self {
            folder,
            kept_log: runtime_folder.join(format!("criu-{root}.log")),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    fn output(&self) -> Result<File> {
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.path().join("output"))
            .context("cannot keep the output of CRIU")
    }

    /// One line: what CRIU's log says went wrong first, and where the whole of it is kept.
    fn explain(&self, log: &str, status: &str) -> String {
        let log = self.path().join(log);
        let text = std::fs::read(&log).unwrap_or_default();
        let output = std::fs::read(self.path().join("output")).unwrap_or_default();
        let first = first_error(&String::from_utf8_lossy(&text)).or_else(|| {
            let output = String::from_utf8_lossy(&output);
            Some(output.lines().next_back()?.trim().to_owned())
        });
        let mut line = format!("CRIU failed ({status})");
        if let Some(first) = first {
            line.push_str(": ");
            line.push_str(&first);
        }
        if std::fs::copy(&log, &self.kept_log).is_ok() {
            line.push_str(&format!(" (log: {})", self.kept_log.display()));
        }
        line
    }
}

/// The first error of a log, which is the cause of the others, without its time and source line, and not longer than a
/// line should be.
fn first_error(log: &str) -> Option<String> {
    const LONGEST: usize = 160;
    // Said by every CRIU that may not raise its own limits, and no cause of anything.
    const HARMLESS: &str = "rlimit: Can't setup RLIMIT_NOFILE";
    let text = log.lines().find_map(|line| {
        let (_, error) = line.split_once("Error (")?;
        let (_, text) = error.split_once("): ")?;
        Some(text.trim()).filter(|text| !text.starts_with(HARMLESS))
    })?;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => Some(format!("{}...", &text[..end])),
        None => Some(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::first_error;

    #[test]
    fn the_first_error_is_quoted_without_noise() {
        let log = "(00.012) Dumping\n\
            (00.012) Error (criu/rlimit.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: no\n\
            (00.013)     13: Error (criu/tty.c:100): tty: Don't have tty to inherit session from\n\
            (00.014) Error (criu/cr-dump.c:1780): Dumping FAILED.\n";
        assert_eq!(
            first_error(log).as_deref(),
            Some("tty: Don't have tty to inherit session from")
        );
        assert_eq!(first_error(""), None);
        let long = format!("(00.1) Error (a.c:1): {}", "\u{e9}".repeat(500));
        assert_eq!(first_error(&long).unwrap().chars().count(), 163);
    }
}
