//! The first process of a node: makes the node's own folders, and runs what comes by the remote shell, as sshd does.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::process::{WaitOptions, wait};
use rustix::system::sethostname;
use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::Signals;

use crate::remote::{self, BROKEN, Kind, PORT};

/// What the node says when it is up.
pub const UP: &str = "up";

/// What is not the same on all nodes.
#[derive(Debug, Parser)]
pub struct Options {
    /// Host name
    #[arg(long)]
    pub name: String,
    /// A folder to work in; it is not to be seen from inside if it is below /tmp
    #[arg(long)]
    pub scratch: PathBuf,
    /// What takes the place of /etc/hosts
    #[arg(long)]
    pub hosts: PathBuf,
    /// What takes the place of the `criu` command
    #[arg(long)]
    pub criu: PathBuf,
    /// Folders that are there even if they are below /tmp
    #[arg(long)]
    pub bind: Vec<PathBuf>,
}

/// Runs the node until somebody kills this process, and with it all others of the node.
///
/// # Errors
/// When the namespaces of this process are not its own, or nobody can listen.
pub fn run(options: &Options) -> Result<()> {
    if std::process::id() != 1 {
        bail!("a node is started with namespaces of its own");
    }
    let mut signals = Signals::new([SIGCHLD])?;
    let children = Arc::new(Children::default());
    let reaped = Arc::clone(&children);
    std::thread::spawn(move || {
        for _ in &mut signals {
            reaped.reap();
        }
    });
    make_folders(options).context("cannot make the node's folders")?;
    sethostname(options.name.as_bytes())?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    writeln!(std::io::stdout(), "{UP}")?;
    for stream in listener.incoming() {
        let (stream, children) = (stream?, Arc::clone(&children));
        std::thread::spawn(move || {
            if let Err(error) = serve(stream, &children) {
                eprintln!("node-init: {error:#}");
            }
        });
    }
    Ok(())
}

/// Whoever uses the mount namespace that the caller has seen to.
fn make_folders(options: &Options) -> Result<()> {
    let folder = |kind: &str, at: &Path, data: &std::ffi::CStr| {
        mount(kind, at, kind, MountFlags::NOSUID, data)
            .with_context(|| format!("{kind} on {}", at.display()))
    };
    folder("proc", Path::new("/proc"), c"")?;
    folder("tmpfs", Path::new("/dev/shm"), c"mode=1777")?;
    // Process trees with terminals can be restored only where these have their old numbers.
    folder(
        "devpts",
        Path::new("/dev/pts"),
        c"newinstance,ptmxmode=0666",
    )?;
    // Locks of iptables, what CRIU knows of the kernel, daemons' sockets.
    folder("tmpfs", Path::new("/run"), c"mode=0755")?;
    mount_bind(&options.hosts, "/etc/hosts").context("/etc/hosts")?;
    mount_bind(&options.criu, CRIU).context(CRIU)?;
    // Made aside, since what is bound into it may be below the old one.
    folder("tmpfs", &options.scratch, c"mode=1777")?;
    for bound in &options.bind {
        let Ok(inside) = bound.strip_prefix("/tmp") else {
            continue;
        };
        let at = options.scratch.join(inside);
        fs::create_dir_all(&at)?;
        mount_bind(bound, &at).with_context(|| bound.display().to_string())?;
    }
    mount_move(&options.scratch, "/tmp").context("/tmp")
}

/// Where Debian has it.
const CRIU: &str = "/usr/sbin/criu";

/// Who waits for which process. Everybody else's end is noted by nobody.
#[derive(Debug, Default)]
struct Children(Mutex<HashMap<i32, Sender<u8>>>);

impl Children {
    /// Starts a process; its status comes through the channel.
    fn start(&self, command: &mut Command) -> Result<(Child, Receiver<u8>)> {
        let (sender, receiver) = channel();
        // Held until it is entered: it may end before.
        let mut waited_for = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        waited_for.insert(child.id().cast_signed(), sender);
        Ok((child, receiver))
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let mut waited_for = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(sender) = waited_for.remove(&pid.as_raw_nonzero().get()) {
                let status = status
                    .exit_status()
                    .and_then(|code| u8::try_from(code).ok());
                // As ssh answers for a command that a signal has ended. Whoever asked may be gone.
                let _ = sender.send(status.unwrap_or(BROKEN));
            }
        }
    }
}

/// One command, with an environment and descriptors of its own.
fn serve(mut stream: TcpStream, children: &Children) -> Result<()> {
    stream.set_nodelay(true)?;
    let (Kind::Command, text) = remote::receive(&mut stream)? else {
        bail!("no command");
    };
    let mut command = Command::new("/usr/bin/setsid");
    command
        .args(["/bin/sh", "-c"])
        .arg(String::from_utf8(text)?)
        .current_dir("/root")
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .envs([
            ("HOME", "/root"),
            ("USER", "root"),
            ("LOGNAME", "root"),
            ("SHELL", "/bin/sh"),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (mut child, status) = children.start(&mut command)?;
    let (Some(mut input), Some(output), Some(errors)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        bail!("a process without pipes");
    };
    let answers = Mutex::new(stream.try_clone()?);
    let answer = |kind, bytes: &[u8]| {
        let mut stream = answers.lock().unwrap_or_else(PoisonError::into_inner);
        remote::send(&mut *stream, kind, bytes)
    };
    let mut requests = stream.try_clone()?;
    std::thread::spawn(move || {
        // Ends with the input, the caller, or the command.
        while let Ok((Kind::Input, bytes)) = remote::receive(&mut requests) {
            if bytes.is_empty() || input.write_all(&bytes).is_err() {
                break;
            }
        }
    });
    std::thread::scope(|scope| {
        // A caller that is gone breaks them; then the command gets SIGPIPE, as below sshd.
        scope.spawn(|| remote::pump(output, Kind::Output, answer));
        scope.spawn(|| remote::pump(errors, Kind::Errors, answer));
    });
    let status = status.recv().context("nobody reaps")?;
    answer(Kind::Status, &[status])?;
    stream.shutdown(std::net::Shutdown::Both)?;
    Ok(())
}
