//! `cargo xtask fuzz`: the fuzz targets of `tests/fuzz`, each for a while, from the corpus that is kept with them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::stage::cargo;
use crate::{command, paths};

/// The release that is installed if there is none.
const CARGO_FUZZ: &str = "0.13.2";

/// Longest input, in bytes: a few dozen requests.
const LONGEST: u32 = 2048;

/// What one input may take, in seconds: an agent waits up to ten for a frame that has begun.
const TIMEOUT: u32 = 60;

/// Names of the targets.
///
/// # Errors
/// cargo-fuzz cannot be installed or run.
pub fn targets() -> Result<Vec<String>> {
    let listed = command::output(cargo_fuzz()?.arg("list").args(folder_option()))?;
    let targets: Vec<String> = listed.lines().map(|line| line.trim().to_owned()).collect();
    if targets.is_empty() {
        bail!("there are no fuzz targets");
    }
    Ok(targets)
}

/// Builds all targets, with AddressSanitizer.
///
/// # Errors
/// One cannot be built.
pub fn build() -> Result<()> {
    command::run(&mut of_targets("build")?)
}

/// Runs a target for so many seconds. What it finds new lies in `fuzz/corpus` of the build folder, and an input that makes it
/// fail in `fuzz/artifacts`.
///
/// # Errors
/// It failed.
pub fn run(target: &str, seconds: u64) -> Result<()> {
    let found = paths::make(found(target)?)?;
    let artifacts = paths::make(paths::target()?.join("fuzz/artifacts"))?;
    let mut command = of_targets("run")?;
    command.arg(target).arg(&found);
    let kept = folder().join("corpus").join(target);
    if kept.is_dir() {
        command.arg(kept);
    }
    command.args([
        "--".to_owned(),
        format!("-max_total_time={seconds}"),
        format!("-max_len={LONGEST}"),
        format!("-timeout={TIMEOUT}"),
        // Long inputs from the start: a minute is short.
        "-len_control=0".to_owned(),
        "-print_final_stats=1".to_owned(),
        format!("-artifact_prefix={}/{target}-", artifacts.display()),
    ]);
    command::run(&mut command).with_context(|| format!("fuzz target {target}"))
}

/// Puts into the kept corpus what a run has found beyond it, and no more than covers as much.
///
/// # Errors
/// A file cannot be written, or a target fails.
pub fn keep(target: &str) -> Result<()> {
    let kept = paths::make(folder().join("corpus").join(target))?;
    let mut command = of_targets("run")?;
    command.arg(target).arg(kept).arg(found(target)?);
    command.args(["--", "-merge=1"]);
    command::run(&mut command)
}

fn found(target: &str) -> Result<PathBuf> {
    Ok(paths::target()?.join("fuzz/corpus").join(target))
}

fn folder() -> PathBuf {
    paths::workspace().join("tests/fuzz")
}

fn folder_option() -> [PathBuf; 2] {
    ["--fuzz-dir".into(), folder()]
}

/// A subcommand that builds.
fn of_targets(subcommand: &str) -> Result<Command> {
    let mut command = cargo_fuzz()?;
    command
        .arg(subcommand)
        .args(folder_option())
        .arg("--target-dir")
        .arg(paths::target()?.join("fuzz/build"))
        .args(["--sanitizer", "address"])
        // Sanitizers come with every toolchain, but the option that asks for one is not stable.
        .env("RUSTC_BOOTSTRAP", "1");
    Ok(command)
}

/// `cargo fuzz` in the workspace; installed into the build folder if it is not there.
fn cargo_fuzz() -> Result<Command> {
    let tools = paths::target()?.join("tools");
    let program = tools.join("bin/cargo-fuzz");
    if !program.is_file() {
        install(&tools)?;
    }
    let mut command = Command::new(program);
    command.current_dir(paths::workspace());
    Ok(command)
}

fn install(tools: &Path) -> Result<()> {
    eprintln!("xtask: installing cargo-fuzz {CARGO_FUZZ}");
    command::run(
        cargo()
            .args(["install", "--quiet", "--locked", "--version", CARGO_FUZZ])
            .arg("--root")
            .arg(tools)
            .arg("cargo-fuzz"),
    )
}
