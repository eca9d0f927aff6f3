//! One node, and what can be done to it.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reverbs_tests::process::{self, Running};
use reverbs_tests::setup::Deadline;

use crate::processes::{self, Process};

/// The time limit of a command of the shell.
const SHELL_LIMIT: Duration = Duration::from_secs(60);

/// The interface of each node.
pub const INTERFACE: &str = "eth0";

/// A node that is up. Its first process and all others of it end when this is dropped, as at power-off: whoever was
/// talking to them is told nothing.
#[derive(Debug)]
pub struct Node {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    /// The bridge's end of its cable.
    pub(crate) port: String,
    /// Its first process, in our eyes.
    pub(crate) init: u32,
    /// Names of processes that run as long as it does.
    pub(crate) daemons: &'static [&'static str],
    /// What started it, and ends with it.
    pub(crate) runner: Running,
}

impl Node {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command that runs in the node, in `folder`.
    pub fn command(&self, program: impl AsRef<OsStr>, folder: &Path) -> Command {
        let mut command = self.nsenter(folder);
        command.arg(program);
        command
    }

    fn nsenter(&self, folder: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.to_string()])
            .args(["--mount", "--uts", "--ipc", "--net", "--pid"])
            .arg(format!("--wdns={}", folder.display()));
        command
    }

    /// Starts a command in the node, with its output in `FOLDER/NAME.out` and `.err`, which it opens there itself: CRIU
    /// cannot save files of mounts that the node does not have.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, command: &Command, folder: &Path, name: &str) -> Result<Running> {
        let mut inside = self.nsenter(folder);
        inside.args([
            "sh",
            "-c",
            "exec \"$@\" </dev/null >>\"$0.out\" 2>>\"$0.err\"",
        ]);
        inside.arg(folder.join(name));
        inside.arg(command.get_program()).args(command.get_args());
        for (variable, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(variable, value),
                None => inside.env_remove(variable),
            };
        }
        Running::start(inside, folder, name)
    }

    /// Runs a command of the shell in the node to its end, and gives its output.
    ///
    /// # Errors
    /// When it fails or does not end; the error has the last line of what it said.
    pub fn shell(&self, text: &str) -> Result<String> {
        let mut command = self.command("sh", Path::new("/"));
        command.args(["-c", text]);
        let folder = tempfile::tempdir()?;
        process::run(
            command,
            folder.path(),
            "shell",
            Deadline::after(SHELL_LIMIT),
        )
        .with_context(|| format!("{}: `{text}`", self.name))
    }

    /// Its processes, without the first and without daemons.
    pub fn processes(&self) -> Vec<Process> {
        let Some(own) = processes::namespace(self.init) else {
            return Vec::new();
        };
        processes::all()
            .into_iter()
            .filter(|pid| processes::namespace(*pid).as_ref() == Some(&own))
            .filter_map(Process::read)
            .filter(|process| process.inner != 1 && !self.daemons.contains(&&*process.name))
            .collect()
    }

    /// Those that the kernel calls `name`.
    pub fn called(&self, name: &str) -> Vec<Process> {
        let mut found = self.processes();
        found.retain(|process| process.name == name && !process.is_zombie());
        found
    }

    /// Lets process ids begin at `first`: restored processes need their old ones, which those of the tools that restore them
    /// must not be.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn leave_low_ids(&self, first: u32) -> Result<()> {
        self.shell(&format!("echo {first} > /proc/sys/kernel/ns_last_pid"))
            .map(drop)
    }

    /// Lets this node write so much to `folder`, and no more; it still sees what the others write.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn limit_room(&self, folder: &Path, kilobytes: u32) -> Result<()> {
        let folder = folder.display();
        self.shell(&format!(
            "mkdir /run/room && mount -t tmpfs -o size={kilobytes}k room /run/room && \
             mkdir /run/room/upper /run/room/work && mount -t overlay \
             -o lowerdir='{folder}',upperdir=/run/room/upper,workdir=/run/room/work room '{folder}'"
        ))
        .map(drop)
    }

    /// Sends a signal to those processes of the node that `chosen` picks, and says how many there were.
    pub fn signal(
        &self,
        signal: rustix::process::Signal,
        chosen: impl Fn(&Process) -> bool,
    ) -> usize {
        let pids: Vec<u32> = self
            .processes()
            .iter()
            .filter(|process| chosen(process))
            .map(|process| process.pid)
            .collect();
        process::signal_each(&pids, signal);
        pids.len()
    }

    /// Waits until it has as many processes of this name.
    ///
    /// # Errors
    /// When it has not in time.
    pub fn wait_for(&self, name: &str, count: usize, deadline: Deadline) -> Result<Vec<Process>> {
        loop {
            let found = self.called(name);
            if found.len() == count {
                return Ok(found);
            }
            ensure!(
                !deadline.passed(),
                "{} has {} processes called {name} instead of {count}",
                self.name,
                found.len()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
