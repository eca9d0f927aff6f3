//! Programs that PyPI has and Debian 12 has not, fetched and unpacked, not installed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use xtask::command;

use crate::debian;

/// One file there.
#[derive(Debug)]
pub struct Wheel {
    pub name: &'static str,
    pub version: &'static str,
    pub sha256: &'static str,
}

/// Debian's, which knows pip; the first in the PATH may be another.
const PYTHON: &str = "/usr/bin/python3";

/// Where its `bin`, `lib` and so on are.
///
/// # Errors
/// When there is no place for it.
pub fn folder(wheel: &Wheel) -> Result<PathBuf> {
    Ok(debian::folder()?.join(format!("{}-{}", wheel.name, wheel.version)))
}

/// The same folder, which is made when it is not there yet.
///
/// # Errors
/// When the wheel cannot be fetched or unpacked, or is not the one that is known.
pub fn get(wheel: &Wheel) -> Result<PathBuf> {
    let folder = folder(wheel)?;
    if folder.exists() {
        return Ok(folder);
    }
    let Wheel {
        name,
        version,
        sha256,
    } = wheel;
    eprintln!("node-tests: fetching {name} {version}");
    let scratch = tempfile::tempdir_in(debian::folder()?)?;
    let wanted = scratch.path().join("wanted");
    fs::write(
        &wanted,
        format!("{name}=={version} --hash=sha256:{sha256}\n"),
    )?;
    command::output(
        Command::new(PYTHON)
            .args(["-m", "pip", "download", "--quiet", "--no-deps"])
            .args(["--require-hashes", "--only-binary", ":all:", "--dest"])
            .arg(scratch.path())
            .arg("--requirement")
            .arg(&wanted),
    )
    .with_context(|| format!("cannot fetch {name} {version}"))?;
    fs::remove_file(&wanted)?;
    let entry = fs::read_dir(scratch.path())?.next();
    let wheel = entry.context("nothing was fetched")??.path();
    command::run(
        Command::new(PYTHON)
            .args(["-m", "zipfile", "-e"])
            .arg(&wheel)
            .arg(scratch.path()),
    )?;
    // What an installation would put below its prefix.
    let name = name.replace('-', "_");
    let data = scratch.path().join(format!("{name}-{version}.data/data"));
    for program in fs::read_dir(data.join("bin"))? {
        fs::set_permissions(program?.path(), fs::Permissions::from_mode(0o755))?;
    }
    match fs::rename(&data, &folder) {
        Err(_) if folder.exists() => {} // somebody else was faster
        done => done.with_context(|| format!("cannot rename to {}", folder.display()))?,
    }
    Ok(folder)
}
