//! The Debian packages that building and testing need.

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::command;

/// What a Debian 12 with Rust (and so with a linker) still lacks.
const PACKAGES: &[&str] = &[
    // to build C programs and to look at what they do
    "gcc",
    // libFuzzer, which is C++
    "g++",
    "libc6-dev",
    "libibverbs-dev",
    "librdmacm-dev",
    "valgrind",
    // the stock RDMA programs and MPI
    "hpcc",
    "ibverbs-providers",
    "ibverbs-utils",
    "libfabric-bin",
    "libmpich-dev",
    "libopenmpi-dev",
    "libucx0",
    "mpich",
    "openmpi-bin",
    "perftest",
    "python3-pyverbs",
    "qperf",
    "rdma-core",
    "rdmacm-utils",
    "ucx-utils",
    // to fetch MPI libraries that Debian has not
    "python3-pip",
    // checkpoints of processes
    "criu",
    "iptables",
    // the test machine
    "busybox-static",
    // an ssh server that is only a program: no service starts by its being installed
    "dropbear-bin",
    "iproute2",
    "kmod",
    "nftables",
    "openssh-client",
    "procps",
    "qemu-system-x86",
    "util-linux",
    "xz-utils",
];

/// Sees to it that every package is there.
///
/// # Errors
/// When some are missing and we are not root (the error holds the line to run), or when
/// their installation fails.
pub fn ensure() -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root()? {
        bail!(
            "{} Debian packages are missing. Run this as root, then try again:\n\n    \
             apt-get update && apt-get install -y --no-install-recommends {}\n",
            missing.len(),
            missing.join(" ")
        );
    }
    eprintln!("xtask: installing {}", missing.join(" "));
    if install(&missing).is_err() {
        // The package lists may be old or absent: once more with fresh ones.
        update_lists()?;
        install(&missing)?;
    }
    Ok(())
}

/// Fetches the package lists if there are none (as in a fresh container).
///
/// # Errors
/// When they are needed and we are not root, or when fetching them fails.
pub fn ensure_lists() -> Result<()> {
    let empty = Path::new("/var/lib/apt/lists")
        .read_dir()
        .map(|entries| {
            !entries
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().contains("Packages"))
        })
        .unwrap_or(true);
    if empty { update_lists() } else { Ok(()) }
}

/// Fetches the package lists.
///
/// # Errors
/// When we are not root or fetching them fails.
pub fn update_lists() -> Result<()> {
    if !is_root()? {
        bail!("the Debian package lists are missing or old: run `apt-get update` as root");
    }
    command::run(apt_get().args(["-q", "update"]).stdout(Stdio::null()))
}

fn install(packages: &[&str]) -> Result<()> {
    command::run(
        apt_get()
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .args(packages)
            // ours is for results only
            .stdout(std::io::stderr()),
    )
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    command
}

fn missing() -> Result<Vec<&'static str>> {
    // dpkg-query exits with 1 when it knows nothing of one of them: its list still counts.
    let listed = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(PACKAGES)
        .stderr(Stdio::null())
        .output()?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    let installed: HashSet<&str> = listed
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    Ok(PACKAGES
        .iter()
        .copied()
        .filter(|package| !installed.contains(package))
        .collect())
}

/// # Errors
/// When that cannot be told.
pub fn is_root() -> Result<bool> {
    Ok(command::output(Command::new("id").arg("-u"))?.trim() == "0")
}
