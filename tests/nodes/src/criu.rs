//! A CRIU that knows new kernels.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use reverbs_tests::process::{self, Running};
use reverbs_tests::setup::Deadline;

use crate::debian::{self, Suite};
use crate::node::Node;

const LIMIT: Duration = Duration::from_secs(60);

/// Options of dump and restore alike.
const COMMON: [&str; 4] = ["-v4", "--tcp-established", "--ext-unix-sk", "--file-locks"];

/// The command, fetched when it is not there yet. It runs with its own loader and libraries, since it is of a newer Debian
/// than the machine.
///
/// # Errors
/// When it cannot be fetched, or does not start.
pub fn get() -> Result<PathBuf> {
    let folder = debian::get("criu", Suite::Unstable, &["criu"])?;
    let libraries = folder.join("usr/lib/x86_64-linux-gnu");
    let script = folder.join("criu");
    let fresh = tempfile::NamedTempFile::new_in(&folder)?;
    fs::write(
        &fresh,
        format!(
            "#!/bin/sh\nexec '{0}/ld-linux-x86-64.so.2' --library-path '{0}' '{1}/usr/sbin/criu' \"$@\"\n",
            libraries.display(),
            folder.display()
        ),
    )?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
    fresh.into_temp_path().persist(&script)?;
    xtask::command::output(Command::new(&script).arg("--version"))
        .context("the fetched CRIU does not start")?;
    Ok(script)
}

/// Dumps a tree by hand and ends it. `root` is its root's id in the node.
///
/// # Errors
/// When CRIU fails.
pub fn dump(node: &Node, root: u32, images: &Path) -> Result<Running> {
    fs::create_dir_all(images)?;
    let mut command = Command::new("criu");
    command
        .args([
            "dump",
            "-t",
            &root.to_string(),
            "-o",
            "dump.log",
            "--link-remap",
            "-D",
        ])
        .arg(images)
        .args(COMMON);
    node.start(&command, images, "dump")
}

/// Restores it.
///
/// # Errors
/// When CRIU fails.
pub fn restore(node: &Node, images: &Path) -> Result<()> {
    // Connections that were closed in the last minute keep their ports.
    node.shell("ss -K -tan state time-wait >/dev/null")?;
    let mut command = node.command("criu", Path::new("/"));
    command
        .args(["restore", "-d", "-o", "restore.log", "-D"])
        .arg(images)
        .args(COMMON);
    process::run(command, images, "restore", Deadline::after(LIMIT)).map(drop)
}
