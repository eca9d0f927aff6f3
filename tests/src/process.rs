//! Starting programs with their output in files, and waiting for them with a limit.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::setup::Deadline;
use crate::tree;

/// How often a condition is looked at for which the kernel offers no event.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A started program. Dropping it ends it and everything below it.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    output: PathBuf,
    errors: PathBuf,
    status: Option<ExitStatus>,
}

impl Running {
    /// Starts `command` with its output in `FOLDER/NAME.out` and `FOLDER/NAME.err`.
    ///
    /// # Errors
    /// When the program or the files cannot be opened.
    pub fn start(mut command: Command, folder: &Path, name: &str) -> Result<Self> {
        let output = folder.join(format!("{name}.out"));
        let errors = folder.join(format!("{name}.err"));
        fs::write(
            folder.join(format!("{name}.command")),
            format!("{command:?}\n"),
        )?;
        command
            .stdin(Stdio::null())
            .stdout(File::create(&output).with_context(|| output.display().to_string())?)
            .stderr(File::create(&errors).with_context(|| errors.display().to_string())?);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let pidfd = pidfd_open(as_pid(child.id()), PidfdFlags::empty())?;
        Ok(Self {
            name: name.to_owned(),
            child,
            pidfd,
            output,
            errors,
            status: None,
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end of the program.
    ///
    /// # Errors
    /// When the deadline passes first.
    pub fn wait(&mut self, deadline: Deadline) -> Result<ExitStatus> {
        if let Some(status) = self.wait_until_ended(deadline)? {
            return Ok(status);
        }
        bail!("{} (process {}) did not end in time", self.name, self.pid())
    }

    /// Waits for the end of the program and wants status 0.
    ///
    /// # Errors
    /// When the deadline passes first, or the status is another; the error has the last lines of
    /// the output.
    pub fn wait_for_success(&mut self, deadline: Deadline) -> Result<()> {
        let status = self.wait(deadline)?;
        if !status.success() {
            bail!("{}: {status}", self.name);
        }
        Ok(())
    }

    /// The exit status if the program has ended.
    ///
    /// # Errors
    /// When waiting fails.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Looks at `condition` until it gives something.
    ///
    /// # Errors
    /// When the program ends first, or the deadline passes; `what` names the condition.
    pub fn wait_until<T>(
        &mut self,
        deadline: Deadline,
        what: &str,
        mut condition: impl FnMut(u32) -> Result<Option<T>>,
    ) -> Result<T> {
        loop {
            // The order matters: what it did just before it ended counts.
            let ended = self.ended()?;
            if let Some(value) = condition(self.pid())? {
                return Ok(value);
            }
            if let Some(status) = ended {
                bail!("{} ended ({status}) before {what}", self.name);
            }
            if deadline.passed() {
                bail!(
                    "{} (process {}): time ran out before {what}",
                    self.name,
                    self.pid()
                );
            }
            self.wait_until_ended(deadline.at_most(LOOK_AGAIN))?;
        }
    }

    /// Waits until the program has written a line that starts with `text`, and gives that line.
    ///
    /// # Errors
    /// When the program ends first, or the deadline passes.
    pub fn wait_for_line(&mut self, deadline: Deadline, text: &str) -> Result<String> {
        let output = self.output.clone();
        self.wait_until(deadline, &format!("it wrote \"{text}\""), |_| {
            let written = fs::read_to_string(&output)?;
            Ok(written
                .lines()
                .find(|line| line.starts_with(text))
                .map(str::to_owned))
        })
    }

    /// Sends a signal to the program (not to its children).
    ///
    /// # Errors
    /// When it has ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(as_pid(self.pid()), signal)
            .with_context(|| format!("{}: cannot send {signal:?}", self.name))
    }

    /// The file that has its standard output.
    pub fn output_file(&self) -> &Path {
        &self.output
    }

    /// What it wrote to its standard output so far.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn output(&self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.output)?).into_owned())
    }

    /// What it wrote to its standard error so far.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn errors(&self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.errors)?).into_owned())
    }

    fn wait_until_ended(&mut self, deadline: Deadline) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let timeout = Timespec::try_from(deadline.remaining())?;
            let mut entry = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut entry, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.ended()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.ended(), Ok(Some(_))) {
            return;
        }
        let below = tree::descendants(self.pid());
        for pid in std::iter::once(self.pid()).chain(below) {
            // Not finding it means that it has ended.
            let _ = kill_process(as_pid(pid), Signal::KILL);
        }
        // Only an interrupted wait can fail here, and then the child is reaped with the strays.
        let _ = self.child.wait();
    }
}

/// Runs a command to its end and gives its standard output.
///
/// # Errors
/// When it fails or takes longer than the deadline allows.
pub fn run(command: Command, folder: &Path, name: &str, deadline: Deadline) -> Result<String> {
    let mut running = Running::start(command, folder, name)?;
    let waited = running.wait_for_success(deadline);
    let errors = running.errors()?;
    let last = errors.lines().last().unwrap_or_default().to_owned();
    waited.context(last)?;
    Ok(running.output()?)
}

/// Runs a command that must fail with status 1, and gives the one line in which it says why.
///
/// # Errors
/// When it succeeds, says more or less than that, or takes longer than the deadline allows.
pub fn fail(command: Command, folder: &Path, name: &str, deadline: Deadline) -> Result<String> {
    let mut running = Running::start(command, folder, name)?;
    let status = running.wait(deadline)?;
    let errors = running.errors()?;
    ensure!(status.code() == Some(1), "{name}: {status}: {errors}");
    ensure!(running.output()?.is_empty(), "{name} failed and has output");
    Ok(the_line(&errors)?.to_owned())
}

/// The only line of an error output.
///
/// # Errors
/// When there is none or more, or it does not say who it is.
pub fn the_line(errors: &str) -> Result<&str> {
    let mut lines = errors.lines();
    let line = lines.next().context("it failed without a word")?;
    ensure!(lines.next().is_none(), "more than one line: {errors}");
    ensure!(
        line.starts_with("reverbs: "),
        "it does not say who it is: {line}"
    );
    Ok(line)
}

/// Sends a signal to each process; one that has ended is passed over.
pub fn signal_each(pids: &[u32], signal: Signal) {
    for pid in pids {
        let _ = kill_process(as_pid(*pid), signal);
    }
}

/// What each thread of some processes waits for in the kernel; for people who look at a hang.
pub fn describe_threads(pids: &[u32]) -> String {
    let mut text = String::new();
    for pid in pids {
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for thread in threads.flatten().map(|entry| entry.path()) {
            // A thread can end at any time; then there is nothing to say about it.
            let read = |name| fs::read_to_string(thread.join(name)).unwrap_or_default();
            text.push_str(&format!(
                "{} {}: wchan {}, syscall {}\n{}",
                thread.display(),
                read("comm").trim(),
                read("wchan").trim(),
                read("syscall").trim(),
                read("stack")
            ));
        }
    }
    text
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).expect("the kernel gives no process the number 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_says_who_it_is() {
        the_line("reverbs: no space\n").unwrap();
        the_line("").unwrap_err();
        the_line("reverbs: no space\nmore\n").unwrap_err();
        the_line("no space\n").unwrap_err();
    }
}
