//! What a process really uses: read from the kernel, not from what the process says.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::process::Running;
use crate::setup::{Deadline, Mode};

/// How long a program may take to open its device under emulation.
const TIME_TO_OPEN: Duration = Duration::from_secs(120);

/// Whether the process has an RDMA device open.
pub fn has_device_open(pid: u32) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    entries.flatten().any(|entry| {
        fs::read_link(entry.path()).is_ok_and(|target| {
            target
                .to_string_lossy()
                .starts_with("/dev/infiniband/uverbs")
        })
    })
}

/// Waits until a program that is certain to open its device has done so, and checks how.
///
/// # Errors
/// When it ends first, or does not drive the device as `mode` says.
pub fn wait_for_mode(program: &mut Running, mode: &Mode, deadline: Deadline) -> Result<()> {
    let mut found = Ok(());
    let opened = program.wait_until(
        deadline.at_most(TIME_TO_OPEN),
        "it opened the device",
        |pid| {
            if !has_device_open(pid) {
                return Ok(None);
            }
            // The file is open a little before the provider gets to drive it.
            found = check_mode(pid, mode);
            Ok(found.is_ok().then_some(()))
        },
    );
    found.and(opened)
}

/// Checks that a process with an open device drives it as `mode` says.
///
/// With the provider two things must be mapped: the provider of exactly this stage folder, and a
/// *second* libibverbs. The second one is loaded by the provider when it opens the device below
/// (its own link namespace), so being merely loaded, or refusing the device, does not pass.
///
/// # Errors
/// When the maps show otherwise, or cannot be read.
pub fn check_mode(pid: u32, mode: &Mode) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .with_context(|| format!("maps of process {pid}"))?;
    match mode {
        Mode::Bare if maps.contains("libreverbs") => {
            bail!("process {pid} has the provider mapped in a bare run")
        }
        Mode::Bare => Ok(()),
        Mode::Provider { stage } => check_provider(pid, stage, &maps),
    }
}

fn check_provider(pid: u32, stage: &Path, maps: &str) -> Result<()> {
    let library = stage.join("lib/libreverbs-rdmav34.so");
    let library = library
        .canonicalize()
        .with_context(|| library.display().to_string())?;
    let code = code_mappings(maps);
    if !code.iter().any(|(_, path)| Path::new(path) == library) {
        bail!(
            "process {pid} runs without the provider: {} is not mapped",
            library.display()
        );
    }
    let copies = code.iter().filter(|(_, path)| is_libibverbs(path)).count();
    if copies < 2 {
        bail!("process {pid} has the provider loaded, but no device opened through it");
    }
    Ok(())
}

/// Start address and file of each executable mapping.
fn code_mappings(maps: &str) -> BTreeSet<(&str, &str)> {
    maps.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (start, _) = fields.next()?.split_once('-')?;
            let executable = fields.next()?.contains('x');
            let path = fields.nth(3)?;
            (executable && path.starts_with('/')).then_some((start, path))
        })
        .collect()
}

fn is_libibverbs(path: &str) -> bool {
    path.rsplit('/')
        .next()
        .is_some_and(|name| name.starts_with("libibverbs.so"))
}

/// Whether some process of this network namespace listens on a TCP port.
///
/// # Errors
/// When /proc/net cannot be read.
pub fn is_listening(port: u16) -> Result<bool> {
    // Local address in hex, then the remote one, then the state: 0A is LISTEN.
    let wanted = format!(":{port:04X}");
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // Absent without IPv6.
        let Ok(text) = fs::read_to_string(table) else {
            continue;
        };
        let listens = text.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.len() > 3 && fields[1].ends_with(&wanted) && fields[3] == "0A"
        });
        if listens {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWICE: &str = "\
7f0000000000-7f0000001000 r-xp 00000000 00:17 11 /STAGE/lib/libreverbs-rdmav34.so
7f0000002000-7f0000003000 r-xp 00000000 00:17 12 /usr/lib/libibverbs.so.1.14.44.0
7f0000004000-7f0000005000 r--p 00000000 00:17 12 /usr/lib/libibverbs.so.1.14.44.0
7f0000006000-7f0000007000 r-xp 00000000 00:17 12 /usr/lib/libibverbs.so.1.14.44.0
";

    fn check(edit: impl Fn(&str) -> String) -> Result<()> {
        let stage = tempfile::tempdir()?;
        fs::create_dir(stage.path().join("lib"))?;
        fs::write(stage.path().join("lib/libreverbs-rdmav34.so"), "")?;
        let root = stage.path().canonicalize()?;
        check_provider(
            1,
            stage.path(),
            &edit(TWICE).replace("/STAGE", root.to_str().unwrap()),
        )
    }

    #[test]
    fn provider_with_an_inner_libibverbs_passes() {
        check(str::to_owned).unwrap();
    }

    #[test]
    fn provider_that_only_lies_there_fails() {
        let error = check(|maps| maps.lines().take(3).collect::<Vec<_>>().join("\n")).unwrap_err();
        assert!(error.to_string().contains("no device opened"), "{error}");
    }

    #[test]
    fn provider_of_another_folder_fails() {
        let error = check(|maps| maps.replace("/STAGE", "/elsewhere")).unwrap_err();
        assert!(
            error.to_string().contains("without the provider"),
            "{error}"
        );
    }
}
