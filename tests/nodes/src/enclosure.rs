//! The namespaces of the run, around those of its nodes.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use rustix::mount::{MountFlags, mount, mount_bind};
use rustix::process::{geteuid, getpid};

/// Tells the second start of this program that it is inside.
pub const INSIDE: &str = "NODE_TESTS_INSIDE";

/// Whether this process is the first one of a run's namespaces.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some() && getpid().is_init()
}

/// Starts this program once more, with the same arguments, in namespaces of its own, and waits for it. If this process ends,
/// whatever ends it, the kernel ends the one inside, and with it every process of every node.
///
/// # Errors
/// Without root, or where the kernel has no namespaces.
pub fn enter() -> Result<ExitCode> {
    if !geteuid().is_root() {
        bail!("nodes are namespaces: only root can make them");
    }
    keep_descriptors_here();
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .args(["unshare", "--mount", "--net", "--pid", "--ipc", "--uts"])
        .args(["--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        // Ctrl-C is for this process: the first one inside cannot hear it.
        .process_group(0);
    let status = command.status().context("cannot start `setpriv unshare`")?;
    Ok(ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(2),
    ))
}

/// Where the folders of a run are, for all nodes: as on a shared file system, whatever they are called outside. Some places,
/// /tmp above all, are taken to be private to a node.
const SHARED: &str = "/mnt";

/// Shows a folder to this process and to all nodes as `SHARED/NAME`, and gives that.
///
/// # Errors
/// When it is not there.
pub fn share(folder: &Path, name: &str) -> Result<PathBuf> {
    let at = Path::new(SHARED).join(name);
    if fs::metadata(SHARED)?.dev() == fs::metadata("/")?.dev() {
        mount("tmpfs", SHARED, "tmpfs", MountFlags::NOSUID, c"mode=0755").context(SHARED)?;
    }
    fs::create_dir(&at)?;
    mount_bind(folder, &at).with_context(|| folder.display().to_string())?;
    Ok(at)
}

/// What the caller has left open is not for any process of a node: CRIU would find files of other mount namespaces.
fn keep_descriptors_here() {
    // SAFETY: the call touches no memory, and closes nothing: it sets a flag.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
}
