//! The test machine: the stock Debian kernel under QEMU's software emulation, over the host's
//! own root file system, with Soft-RoCE devices.
//!
//! `docs/test-machine.md` tells why it is made this way.

use std::env;
use std::fmt;
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::device::{self, Device};
use crate::guest_io::{self, CABLE, Channels, Event, Relay, Sink};
use crate::kernel::Kernel;
use crate::network::Card;
use crate::{initramfs, paths, setup};

/// Where the guest sees the share.
pub const SHARE: &str = "/mnt/share";

/// How long a guest that has reported its status may take to power off.
const POWER_OFF: Duration = Duration::from_secs(20);

/// How often a boot is tried when QEMU itself crashes.
const ATTEMPTS: u32 = 3;

/// Where the job's output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// To our own stdout and stderr, as it comes.
    Inherit,
    /// Into [`Outcome::stdout`] and [`Outcome::stderr`].
    Capture,
    /// Both.
    Both,
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// The job ended with this status (128 + signal when one killed it).
    Exit(u8),
    /// The time was over; the guest was stopped.
    Timeout,
    /// Ctrl-C or SIGTERM; the guest was stopped.
    Interrupted,
}

/// What a run left.
#[derive(Debug)]
pub struct Outcome {
    pub end: End,
    /// From the start of QEMU to the start of the job.
    pub boot: Option<Duration>,
    /// From the start of QEMU to its end.
    pub total: Duration,
    /// Empty with [`Output::Inherit`].
    pub stdout: Vec<u8>,
    /// Empty with [`Output::Inherit`].
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// Whether the job ran to its end and exited with 0.
    pub fn success(&self) -> bool {
        matches!(self.end, End::Exit(0))
    }

    /// The status for a shell: the job's own, 124 for a timeout, 130 for an interrupt.
    pub fn status(&self) -> u8 {
        match self.end {
            End::Exit(status) => status,
            End::Timeout => 124,
            End::Interrupted => 130,
        }
    }
}

/// A machine to be booted for one job, and off again afterwards.
#[derive(Clone, Debug)]
pub struct Machine {
    devices: Vec<Device>,
    share: Option<PathBuf>,
    cpus: usize,
    memory: u32,
    timeout: Duration,
    counted: bool,
    console: bool,
    output: Output,
    folder: Option<PathBuf>,
    environment: Vec<(String, String)>,
    binds: Vec<PathBuf>,
    name: String,
    hosts: String,
    card: Option<Card>,
}

impl Default for Machine {
    fn default() -> Machine {
        Machine {
            devices: device::defaults(),
            share: None,
            cpus: thread::available_parallelism().map_or(1, |count| count.get().min(4)),
            memory: 3072,
            timeout: Duration::from_secs(600),
            counted: false,
            console: false,
            output: Output::Inherit,
            folder: None,
            environment: Vec::new(),
            binds: Vec::new(),
            name: "node1".to_owned(),
            hosts: "127.0.1.1 node1\n".to_owned(),
            card: None,
        }
    }
}

impl Machine {
    /// The RDMA devices, in place of the default two.
    pub fn devices(mut self, devices: Vec<Device>) -> Machine {
        self.devices = devices;
        self
    }

    /// The host folder that the guest writes to, seen there as [`SHARE`]; `vm/share` of the
    /// build folder unless told otherwise.
    pub fn share(mut self, folder: &Path) -> Machine {
        self.share = Some(folder.to_owned());
        self
    }

    /// Processors of the guest.
    pub fn cpus(mut self, cpus: usize) -> Machine {
        self.cpus = cpus;
        self
    }

    /// Memory of the guest, in MiB; what it writes outside the share is part of it.
    pub fn memory(mut self, mebibytes: u32) -> Machine {
        self.memory = mebibytes;
        self
    }

    /// The longest a run may take, boot and power-off included.
    pub fn timeout(mut self, timeout: Duration) -> Machine {
        self.timeout = timeout;
        self
    }

    /// Guest time counts instructions (one processor, 2 ns each), whatever the host does.
    pub fn counted(mut self, counted: bool) -> Machine {
        self.counted = counted;
        self
    }

    /// Shows the kernel's console on our stderr.
    pub fn console(mut self, console: bool) -> Machine {
        self.console = console;
        self
    }

    /// Where the job's output goes.
    pub fn output(mut self, output: Output) -> Machine {
        self.output = output;
        self
    }

    /// The job's current folder, in place of ours.
    pub fn folder(mut self, folder: &Path) -> Machine {
        self.folder = Some(folder.to_owned());
        self
    }

    /// A variable for the job, which otherwise has PATH, HOME, USER, LOGNAME, LANG and what lets mpirun run as root.
    pub fn environment(mut self, name: &str, value: &str) -> Machine {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A host folder to be seen in the guest although it lies under `/tmp`, `/run` or
    /// `/dev/shm`, which are the guest's own. The current folder, the workspace and the build
    /// folder are seen in any case.
    pub fn bind(mut self, folder: &Path) -> Machine {
        self.binds.push(folder.to_owned());
        self
    }

    /// The host name.
    pub fn name(mut self, name: &str) -> Machine {
        self.name = name.to_owned();
        self
    }

    /// The lines of `/etc/hosts` beside that of localhost.
    pub fn hosts(mut self, lines: &str) -> Machine {
        self.hosts = lines.to_owned();
        self
    }

    /// A network card for the RDMA device, of which there is one only then.
    pub fn card(mut self, card: Card) -> Machine {
        self.card = Some(card);
        self
    }

    /// Boots, runs one program with its arguments, powers off.
    ///
    /// # Errors
    /// When the machine cannot be started or ends (a kernel panic, say) before the job does.
    pub fn run<S: AsRef<str>>(&self, program: &[S]) -> Result<Outcome> {
        let words: Vec<String> = program.iter().map(|word| quote(word.as_ref())).collect();
        self.run_script(&format!("exec {}\n", words.join(" ")))
    }

    /// As [`Machine::run`], for the text of a script for the host's `/bin/sh`.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn run_script(&self, script: &str) -> Result<Outcome> {
        setup::ensure()?;
        let kernel = Kernel::get()?;
        let share = match &self.share {
            Some(folder) => folder.clone(),
            None => paths::machine()?.join("share"),
        };
        let share = paths::make(share)?;
        let settings = self.settings(&kernel)?;
        guest_io::watch_signals()?;
        for _ in 1..ATTEMPTS {
            match self.boot(&kernel, &share, &settings, script) {
                Err(error) if error.is::<EmulatorCrash>() => eprintln!("xtask: {error}; again"),
                done => return done,
            }
        }
        self.boot(&kernel, &share, &settings, script)
    }

    fn boot(&self, kernel: &Kernel, share: &Path, settings: &str, job: &str) -> Result<Outcome> {
        // Without a name: nothing is left, however we end.
        let mut archive = tempfile::tempfile()?;
        initramfs::write(BufWriter::new(&archive), kernel, settings, job)?;
        archive.rewind()?;
        let begin = Instant::now();
        let mut command = self.qemu(kernel, share);
        let cable = match &self.card {
            Some(card) => Some(card.cable.try_clone()?),
            None => None,
        };
        let channels = Channels::attach(&mut command, archive, cable)?;
        let child = command.spawn().context("cannot start QEMU")?;
        // The command holds the guest's ends of the channels: without them, the end of QEMU
        // is the end of the streams.
        drop(command);
        self.attend(Guest(child), channels, begin)
    }

    fn settings(&self, kernel: &Kernel) -> Result<String> {
        let current = env::current_dir().context("the current folder is gone")?;
        let folder = self.folder.clone().unwrap_or(current);
        let modules = kernel.all_modules();
        let mut seen = vec![folder.clone(), paths::workspace(), paths::target()?];
        seen.extend(self.binds.iter().cloned());
        let mut hidden = Vec::new();
        for folder in hidden_folders(seen) {
            hidden.push(quote(text(&folder)?));
        }
        let devices: Vec<String> = self.devices.iter().map(Device::to_string).collect();
        let mut environment = String::new();
        for (name, value) in &self.environment {
            ensure!(
                !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
                "`{name}` is no name for a variable"
            );
            environment += &format!("export {name}={}\n", quote(value));
        }
        let mut settings = String::new();
        for (name, value) in [
            ("devices", devices.join(" ")),
            ("environment", environment),
            ("folder", text(&folder)?.to_owned()),
            ("hidden", hidden.join(" ")),
            ("hosts", self.hosts.clone()),
            ("modules", text(&modules)?.to_owned()),
            ("name", self.name.clone()),
            (
                "network",
                if self.card.is_some() { "yes" } else { "" }.to_owned(),
            ),
        ] {
            settings += &format!("{name}={}\n", quote(&value));
        }
        Ok(settings)
    }

    fn qemu(&self, kernel: &Kernel, share: &Path) -> Command {
        // The guest must not outlive us, even when we are killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args("-nodefaults -no-user-config -display none -no-reboot".split(' '));
        // Never /dev/kvm: results must not depend on whether a host has it.
        if self.counted {
            command.args("-icount shift=1,sleep=off -accel tcg,thread=single -smp 1".split(' '));
        } else {
            command.args(["-accel", "tcg,thread=multi", "-smp"]);
            command.arg(self.cpus.to_string());
        }
        command.args(["-machine", "q35", "-cpu", PROCESSOR, "-m"]);
        command.arg(format!("{}M", self.memory));
        command.arg("-kernel").arg(kernel.image());
        command.args(["-append", KERNEL_ARGUMENTS]);
        let shared = |folder: &Path, tag: &str, access: &str| {
            // QEMU's own escape for commas
            let folder = folder.to_string_lossy().replace(',', ",,");
            format!(
                "local,path={folder},mount_tag={tag},security_model=none,multidevs=remap{access}"
            )
        };
        command.arg("-virtfs");
        command.arg(shared(Path::new("/"), "root", ",readonly=on"));
        command.arg("-virtfs").arg(shared(share, "share", ""));
        if let Some(card) = &self.card {
            let card = format!("virtio-net-pci,netdev={CABLE},mac={},romfile=", card.mac);
            command.args(["-device", &card]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// Stays with the guest to its end.
    fn attend(&self, mut guest: Guest, channels: Channels, begin: Instant) -> Result<Outcome> {
        let stdout = Relay::start(channels.out, self.sink(io::stdout()));
        let stderr = Relay::start(channels.err, self.sink(io::stderr()));
        let console = Relay::start(channels.console, Sink::tail(self.console));
        let events = guest_io::listen(channels.control);

        let mut boot = None;
        let mut end = None;
        let mut deadline = begin + self.timeout;
        loop {
            if guest_io::interrupted() {
                end = Some(End::Interrupted);
                guest.kill()?;
                break;
            }
            if Instant::now() >= deadline {
                end = end.or(Some(End::Timeout));
                guest.kill()?;
                break;
            }
            match events.recv_timeout(Duration::from_millis(50)) {
                Ok(Event::Up) => boot = Some(begin.elapsed()),
                Ok(Event::Exit(status)) => {
                    end = Some(End::Exit(status));
                    deadline = Instant::now() + POWER_OFF;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = guest.0.wait().context("cannot wait for QEMU")?;
        let total = begin.elapsed();
        let (stdout, stderr, console) = (stdout.join(), stderr.join(), console.join());
        let Some(end) = end else {
            if boot.is_none() && status.signal().is_some() {
                return Err(EmulatorCrash(status).into());
            }
            bail!(
                "the guest ended before its job did (QEMU: {status}); the end of its console:\n{}",
                String::from_utf8_lossy(&console).trim_end()
            );
        };
        Ok(Outcome {
            end,
            boot,
            total,
            stdout,
            stderr,
        })
    }

    fn sink(&self, inherited: impl Write + Send + 'static) -> Sink {
        match self.output {
            Output::Inherit => Sink::through(inherited),
            Output::Capture => Sink::keep(None),
            Output::Both => Sink::keep(Some(Box::new(inherited))),
        }
    }
}

/// Without "enhanced rep movsb", which emulation does byte by byte: copies are seven times
/// faster, RDMA writes twice.
const PROCESSOR: &str = "max,-erms";

/// An oops must be seen at once; the rest makes the boot shorter.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off \
     rcupdate.rcu_expedited=1 cryptomgr.notests swiotlb=noforce audit=0 tsc=reliable";

/// QEMU itself crashed before the job was started: nothing has happened, so it may be tried
/// again. Debian 12's did so once in the first sixty boots.
#[derive(Debug)]
struct EmulatorCrash(ExitStatus);

impl fmt::Display for EmulatorCrash {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "QEMU crashed while the machine booted ({})", self.0)
    }
}

impl std::error::Error for EmulatorCrash {}

/// A running QEMU, which does not survive this value.
struct Guest(Child);

impl Guest {
    fn kill(&mut self) -> Result<()> {
        self.0.kill().context("cannot stop QEMU")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Ended and waited for already, unless an error came between: nothing to report.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The folders that the guest's own volatile file systems would hide, outermost only.
fn hidden_folders(mut folders: Vec<PathBuf>) -> Vec<PathBuf> {
    folders.sort();
    let mut kept: Vec<PathBuf> = Vec::new();
    for folder in folders {
        let hidden = ["/tmp", "/run", "/dev/shm"]
            .iter()
            .any(|volatile| folder.starts_with(volatile) && folder != Path::new(volatile));
        if hidden && !kept.iter().any(|outer| folder.starts_with(outer)) {
            kept.push(folder);
        }
    }
    kept
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("the name {} is not UTF-8", path.display()))
}

/// One word for a POSIX shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_a_shell() {
        let word = "it's $HOME \\ \"x\" \n*";
        let echoed = crate::command::output(
            Command::new("sh").args(["-c", &format!("printf %s {}", quote(word))]),
        );
        assert_eq!(echoed.expect("a shell"), word);
    }

    #[test]
    fn only_outermost_hidden_folders_are_bound() {
        let folders = ["/tmp/a/b", "/home/x", "/tmp/a", "/tmp", "/run/c"].map(PathBuf::from);
        let kept = hidden_folders(folders.to_vec());
        assert_eq!(kept, ["/run/c", "/tmp/a"].map(PathBuf::from));
    }
}
