//! `reverbs restart`: a job from its image.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use reverbs::control::message::{PROTOCOL_VERSION, Phase, Reply, Request};
use reverbs::control::socket::{agent_socket, runtime_dir};

use super::addresses::ForeignBinds;
use super::cli::RestartOptions;
use super::criu::{Criu, RestoreFailure, WorkFolder};
use super::files::{cut_back, put_back};
use super::interrupt::Interrupt;
use super::job::{Driver, JobLock, ProcessTree, SocketAgents, ask_once, new_session};
use super::progress::{Progress, bytes, count};
use reverbs::image::{Image, Manifest};

/// What is in the way passes within about a second where init is slow to reap; a few more for a busy machine.
const ATTEMPTS: u32 = 8;
const BETWEEN_ATTEMPTS: Duration = Duration::from_secs(1);

/// # Errors
/// The image is refused, or the job could not be brought back. The image stays as it is.
#[expect(clippy::print_stdout)]
pub(crate) fn restart(options: &RestartOptions, quiet: bool) -> Result<ExitCode> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let mut progress = Progress::new(quiet);
    let began = Instant::now();
    let image = Image::open(&options.image)?;
    let manifest = &image.manifest;
    image.verify()?;
    progress.phase(
        "verify",
        began,
        &format!(
            "{}, {}",
            bytes(manifest.bytes()),
            count(manifest.contents.len(), "file", "files")
        ),
    );
    let criu = Criu::find()?;
    let runtime_folder = runtime_dir()?;
    if runtime_folder != manifest.runtime_folder {
        bail!(
            "the job's agents listen in {}: set REVERBS_RUNTIME_DIR to that",
            manifest.runtime_folder.display()
        );
    }
    let lock = JobLock::take(&runtime_folder, manifest.root)?;
    let interrupt = Interrupt::install()?;
    refuse_half_restored(manifest, &runtime_folder)?;
    wait_for_ids(&manifest.ids())?;
    let foreign_binds = ForeignBinds::allow(&manifest.addresses, &progress)?;

    let began = Instant::now();
    cut_back(
        &manifest.written_files,
        options.files,
        &image.name(),
        &progress,
    )?;
    let restored = put_back(
        &manifest.carried,
        &image.files_folder(),
        options.files,
        &image.name(),
        &progress,
    )?;
    progress.phase(
        "files",
        began,
        &format!("{restored} of {} carried put back", manifest.carried.len()),
    );
    for process in &manifest.processes {
        // Left by a process of that id; the restored one binds the name again.
        let _ = std::fs::remove_file(agent_socket(&runtime_folder, process.pid));
    }
    interrupt.check()?;

    let began = Instant::now();
    let work = WorkFolder::create(&runtime_folder, manifest.root)?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context("cannot become the parent of the restored job")?;
    let copiers = restore(&criu, &image, &work, options).inspect_err(|_| {
        // A CRIU that was killed leaves what it had begun.
        kill(manifest);
    })?;
    drop(foreign_binds);
    progress.phase(
        "restore",
        began,
        &count(manifest.processes.len(), "process", "processes"),
    );

    let mut agents = SocketAgents::new(manifest.root, runtime_folder);
    let mut driver = Driver::new(
        &mut agents,
        &mut progress,
        Interrupt::default(),
        new_session()?,
        options.devices.choices.clone(),
    );
    let expected = manifest
        .processes
        .iter()
        .filter(|process| process.rdma.is_some())
        .count();
    let resumed = driver.attach_abandoned().and_then(|found| {
        if found < expected {
            bail!("only {found} of {expected} processes that used RDMA answer");
        }
        driver.restore_service()
    });
    if let Err(error) = resumed {
        kill(manifest);
        return Err(error.context("the job was not restarted; the image is as it was"));
    }
    // From here on the job can be checkpointed again, while we wait for it.
    drop(lock);
    println!("{}", manifest.root);
    if options.wait {
        let code = wait(manifest.root)?;
        for mut copier in copiers {
            copier.wait()?;
        }
        return Ok(code);
    }
    Ok(ExitCode::SUCCESS)
}

/// A restart that was killed behind CRIU's back has left the whole job, waiting for its hardware.
fn refuse_half_restored(manifest: &Manifest, runtime_folder: &Path) -> Result<()> {
    let hello = Request::Hello {
        version: PROTOCOL_VERSION,
    };
    for process in manifest.processes.iter().filter(|one| one.rdma.is_some()) {
        // Whoever does not answer is in the way of the restart as any other process of that id.
        if let Ok(Some(Reply::Hello { phase, .. })) = ask_once(runtime_folder, process.pid, &hello)
            && phase != Phase::Running
        {
            bail!(
                "process {} of the image is there already, in phase {phase:?}: after a restart that was killed, \
                 `reverbs resume {}` lets the job run on",
                process.pid,
                manifest.root
            );
        }
    }
    Ok(())
}

/// Every id of the image must be free. One of a process that is just ending may take a moment.
fn wait_for_ids(ids: &[i32]) -> Result<()> {
    let us = std::process::id().cast_signed();
    if ids.contains(&us) {
        bail!(
            "process id {us} of the image is that of this very command: run it once more, it will get another"
        );
    }
    let taken = |id: &i32| std::path::Path::new(&format!("/proc/{id}")).exists();
    for attempt in 1..=ATTEMPTS {
        let Some(id) = ids.iter().find(|id| taken(id)) else {
            break;
        };
        if attempt == ATTEMPTS {
            let name = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            bail!(
                "process id {id} of the image is taken by \"{}\": end it (does the job still run, or is it just being \
                 restored?), or restart on another host",
                name.trim()
            );
        }
        std::thread::sleep(BETWEEN_ATTEMPTS);
    }
    if let Some(highest) = ids.iter().max() {
        // So that CRIU's own helpers do not take ids of the image. Needs the same privilege as CRIU does.
        let last = "/proc/sys/kernel/ns_last_pid";
        let now = std::fs::read_to_string(last)
            .ok()
            .and_then(|text| text.trim().parse::<i32>().ok());
        let range = ids.first().copied().unwrap_or(0) - 100..=*highest;
        if now.is_none_or(|now| range.contains(&now)) {
            let _ = std::fs::write(last, highest.to_string());
        }
    }
    Ok(())
}

fn restore(
    criu: &Criu,
    image: &Image,
    work: &WorkFolder,
    options: &RestartOptions,
) -> Result<Vec<Child>> {
    let manifest = &image.manifest;
    let outputs = (!manifest.outside_pipes.is_empty())
        .then(|| Outputs::open(options))
        .transpose()?;
    let inherit: Vec<(String, BorrowedFd<'_>)> = outputs
        .iter()
        .flat_map(|outputs| {
            manifest.outside_pipes.iter().map(|pipe| {
                let to = match (pipe.written, pipe.descriptor) {
                    (false, _) => &outputs.nothing,
                    (true, 2) => &outputs.error,
                    (true, _) => &outputs.output,
                };
                (format!("pipe:[{}]", pipe.inode), to.as_fd())
            })
        })
        .collect();
    let mut attempt = 1;
    loop {
        forget_closed_connections(&manifest.listening_ports);
        match criu.restore(&image.criu_folder(), work, &manifest.criu.options, &inherit) {
            Ok(()) => {
                return Ok(outputs.map_or_else(Vec::new, |outputs| outputs.copiers));
            }
            Err(RestoreFailure { may_pass: true, .. }) if attempt < ATTEMPTS => {
                attempt += 1;
                std::thread::sleep(BETWEEN_ATTEMPTS);
            }
            Err(failure) => bail!(
                "{}; the job was not restarted, the image is as it was",
                failure.reason
            ),
        }
    }
}

/// Where what the job wrote to pipes goes from now on. Pipes again, since CRIU opens anew what it inherits, which only a
/// pipe survives: a file would be written from its beginning. `cat` empties them for as long as the job lives.
#[derive(Debug)]
struct Outputs {
    output: File,
    error: File,
    nothing: File,
    copiers: Vec<Child>,
}

impl Outputs {
    fn open(options: &RestartOptions) -> Result<Self> {
        let (output, error) = match &options.output {
            Some(path) => {
                let file = OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(path)
                    .with_context(|| format!("cannot write to {}", path.display()))?;
                (file.try_clone()?, file)
            }
            None => (
                std::io::stdout().as_fd().try_clone_to_owned()?.into(),
                std::io::stderr().as_fd().try_clone_to_owned()?.into(),
            ),
        };
        let mut copiers = Vec::new();
        let (output, error) = (
            pipe_to(output, &mut copiers)?,
            pipe_to(error, &mut copiers)?,
        );
        Ok(Self {
            output,
            error,
            nothing: OpenOptions::new().read(true).open("/dev/null")?,
            copiers,
        })
    }
}

fn pipe_to(target: File, copiers: &mut Vec<Child>) -> Result<File> {
    let (reader, writer) = std::io::pipe()?;
    let copier = Command::new("cat")
        .stdin(reader)
        .stdout(target)
        .stderr(Stdio::null())
        // Ctrl-C ends this command, and not the output of the job.
        .process_group(0)
        .spawn()
        .context("cannot start `cat` for the output of the job")?;
    copiers.push(copier);
    Ok(OwnedFd::from(writer).into())
}

/// Connections in TIME-WAIT keep the ports of the image's listening sockets for a minute. Without `ss` or the privilege,
/// CRIU's own message about the address has to do.
fn forget_closed_connections(ports: &[u16]) {
    for port in ports {
        let _ = Command::new("ss")
            .args([
                "-K",
                "-tan",
                "state",
                "time-wait",
                "sport",
                "=",
                &port.to_string(),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

/// Ends what was restored, and what that has started. It is below us, as we are the nearest subreaper; another process that
/// happens to have an id of the image is not.
fn kill(manifest: &Manifest) {
    let Ok(tree) = ProcessTree::of(std::process::id().cast_signed()) else {
        return;
    };
    let mut restored: BTreeSet<i32> = manifest.ids().into_iter().collect();
    // Parents come before their children.
    for member in &tree.members {
        if restored.contains(&member.parent) {
            restored.insert(member.pid);
        }
        if restored.contains(&member.pid)
            && let Some(pid) = rustix::process::Pid::from_raw(member.pid)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// We are the nearest subreaper of what CRIU restored, so it is our child now.
fn wait(root: i32) -> Result<ExitCode> {
    let root = rustix::process::Pid::from_raw(root).context("process id 0")?;
    loop {
        match rustix::process::waitpid(Some(root), rustix::process::WaitOptions::empty()) {
            Ok(Some((_, status))) => {
                let code = status
                    .exit_status()
                    .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
                    .unwrap_or(1);
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the job"),
        }
    }
}
