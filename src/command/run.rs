//! `reverbs run`: starts a job that can be checkpointed.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use super::cli::RunOptions;
use super::job::new_session;
use super::nodes::Launcher;
use super::nodes::start::Starter;
use super::requeue::Requeue;

/// Tells `reverbs checkpoint` where the images of this job go.
pub(crate) const IMAGES_VARIABLE: &str = "REVERBS_IMAGES";

/// # Errors
/// The provider is not installed, or the command cannot be started.
pub(crate) fn run(options: &RunOptions, quiet: bool) -> Result<ExitCode> {
    let requeue = match options.requeue {
        true => Some(Requeue::of(options, quiet)?),
        false => None,
    };
    if let Some(requeue) = &requeue
        && let Some(image) = requeue.newest()
    {
        return requeue.go_on(&image, options);
    }
    let environment = environment(options)?;
    let launcher = Launcher::find(options.remote.program.as_deref());
    let starter = Starter::listen(launcher.clone(), job_id()?, environment.clone())?;
    let mut command = Command::new(&options.command[0]);
    command.args(&options.command[1..]);
    command.envs(environment).envs(starter.variables()?);
    if !options.stdin {
        command.stdin(Stdio::null());
    }
    leave_low_ids();
    // Before the job exists: none of its signals is to be missed.
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2])
        .context("cannot watch for signals")?;
    let mut copiers = Vec::new();
    if std::io::stdout().is_terminal() {
        let (reader, writer) = std::io::pipe()?;
        command.stdout(writer);
        copiers.push(copier(reader.into(), std::io::stdout()));
    }
    if std::io::stderr().is_terminal() {
        let (reader, writer) = std::io::pipe()?;
        command.stderr(writer);
        copiers.push(copier(reader.into(), std::io::stderr()));
    }
    // SAFETY: setsid is async-signal-safe and touches no memory; it cannot fail in a child that was just forked.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", options.command[0].display()))?;
    // The job holds the writing ends now, and we must not, or its end would never be seen.
    drop(command);
    let root = child.id().cast_signed();
    if let Some(file) = &options.pid_file {
        std::fs::write(file, format!("{root}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    if !quiet {
        eprintln!("reverbs: job {root}");
    }
    let forwarding = signals.handle();
    let at_limit = requeue.clone();
    std::thread::spawn(move || {
        for signal in signals.forever() {
            match &at_limit {
                Some(requeue) if signal == SIGTERM => requeue.on_signal(root),
                _ => forward(root, signal),
            }
        }
    });
    let status = child.wait()?;
    launcher.let_command_finish(root)?;
    forwarding.close();
    for copier in copiers {
        // A copier that panicked has lost output, not the job's result.
        let _ = copier.join();
    }
    let status = exit_code(status);
    Ok(requeue.map_or(status, |requeue| requeue.outcome(status)))
}

/// Random, and short: it is part of the path of a socket.
fn job_id() -> Result<String> {
    let mut id = new_session()?.id;
    id.truncate(16);
    Ok(id)
}

/// What the job gets from us on every node.
fn environment(options: &RunOptions) -> Result<Vec<(String, String)>> {
    let mut environment = vec![("RDMAV_DRIVERS".to_owned(), driver_list(&provider()?)?)];
    let tls = std::env::var("UCX_TLS");
    // Everything but System V shared memory, which CRIU saves only with an IPC namespace of its own.
    let tls = tls.unwrap_or_else(|_| "^sysv".to_owned());
    environment.push(("UCX_TLS".to_owned(), tls));
    if let Ok(folder) = std::env::var("REVERBS_RUNTIME_DIR") {
        environment.push(("REVERBS_RUNTIME_DIR".to_owned(), folder));
    }
    if let Some(images) = &options.images {
        let images = std::fs::create_dir_all(images)
            .and_then(|()| images.canonicalize())
            .with_context(|| format!("cannot make the image folder {}", images.display()))?;
        let images = images
            .into_os_string()
            .into_string()
            .map_err(|_| anyhow!("the path of the image folder is not UTF-8"))?;
        environment.push((IMAGES_VARIABLE.to_owned(), images));
    }
    Ok(environment)
}

fn forward(root: i32, signal: i32) {
    if let (Some(root), Some(signal)) = (
        rustix::process::Pid::from_raw(root),
        rustix::process::Signal::from_named_raw(signal),
    ) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(root, signal);
    }
}

/// As a shell gives it: 128 and the signal for a job that was killed.
pub(crate) fn exit_code(status: std::process::ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn copier(from: OwnedFd, mut to: impl Write + Send + 'static) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut from = File::from(from);
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            // A terminal that is gone must not end the job by a broken pipe: what it says is dropped.
            let _ = to.write_all(&buffer[..read]).and_then(|()| to.flush());
        }
    })
}

/// `/path/libreverbs`, to which libibverbs adds `-rdmavNN.so`: beside this command (`DIR/bin`, `DIR/lib`), else where the
/// distribution keeps providers.
fn provider() -> Result<PathBuf> {
    let executable = std::env::current_exe().context("cannot find this command itself")?;
    let beside = executable
        .parent()
        .and_then(Path::parent)
        .map(|prefix| prefix.join("lib"));
    let installed = [
        "/usr/lib/x86_64-linux-gnu/libibverbs",
        "/usr/lib/aarch64-linux-gnu/libibverbs",
        "/usr/lib64/libibverbs",
        "/usr/lib/libibverbs",
    ];
    let folders: Vec<PathBuf> = beside
        .into_iter()
        .chain(installed.map(PathBuf::from))
        .collect();
    for folder in &folders {
        let Ok(entries) = std::fs::read_dir(folder) else {
            continue;
        };
        let found = entries.flatten().any(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with("libreverbs-rdmav") && name.ends_with(".so"))
        });
        if found {
            return Ok(folder.join("libreverbs"));
        }
    }
    bail!(
        "the provider libreverbs-rdmavNN.so is neither in {} nor among the system's: install reverbs, or `cargo xtask \
         stage DIR` and use DIR/bin/reverbs",
        folders[0].display()
    )
}

/// Ours first; what the user has asked for stays.
fn driver_list(provider: &Path) -> Result<String> {
    let mut list = provider.as_os_str().to_owned();
    if let Some(others) = std::env::var_os("RDMAV_DRIVERS").filter(|others| !others.is_empty())
        && !others.to_string_lossy().contains("libreverbs")
    {
        list.push(":");
        list.push(others);
    }
    list.into_string()
        .map_err(|_| anyhow!("the path of the provider is not UTF-8"))
}

/// A restored process gets its old id back. Just after a boot, low ids are those of the system's own processes; a job that
/// was started with high ones finds them free. Needs a privilege and is not worth an error.
pub(crate) fn leave_low_ids() {
    const LAST: &str = "/proc/sys/kernel/ns_last_pid";
    let read =
        |path: &str| -> Option<u32> { std::fs::read_to_string(path).ok()?.trim().parse().ok() };
    let (Some(last), Some(most)) = (read(LAST), read("/proc/sys/kernel/pid_max")) else {
        return;
    };
    let floor = most / 4;
    if last < floor {
        // Different jobs of one boot, or of two, shall not all begin at the same id.
        let spread = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.subsec_micros());
        let _ = std::fs::write(LAST, (floor + spread % (most / 2)).to_string());
    }
}
