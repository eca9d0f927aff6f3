//! What a package would install, laid out in a folder.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, paths};

/// The numbers in `libNAME-rdmavNN.so` of the rdma-core releases that the provider supports
/// (`IBVERBS_PABI_VERSION` in rdma-core's `CMakeLists.txt`).
const PRIVATE_ABIS: [u32; 5] = [34, 57, 59, 64, 65];

/// Builds the release artifacts and lays them out:
/// `bin/reverbs`, `lib/libreverbs-rdmavNN.so`, `etc/libibverbs.d/reverbs.driver`.
///
/// # Errors
/// When the build fails or a file cannot be written.
pub fn stage(folder: &Path) -> Result<()> {
    build()?;
    let built = paths::target()?.join("release");
    let program = built.join("reverbs");
    let provider = built.join("libreverbs_provider.so");
    let folder = paths::make(folder.to_owned())?;
    let bin = paths::make(folder.join("bin"))?;
    let lib = paths::make(folder.join("lib"))?;
    let etc = paths::make(folder.join("etc/libibverbs.d"))?;
    put(&program, &bin.join("reverbs"))?;
    let mut names = PRIVATE_ABIS.map(|abi| lib.join(format!("libreverbs-rdmav{abi}.so")));
    let (first, others) = names.split_first_mut().context("no private ABI")?;
    put(&provider, first)?;
    for other in others {
        link(first, other)?;
    }
    fs::write(etc.join("reverbs.driver"), "driver reverbs\n").context("cannot write reverbs.driver")
}

/// Compiles the programs of `tests/programs` into the folder, and returns the name of the runner of
/// the tests, which does so.
///
/// # Errors
/// When something does not compile.
pub fn programs(folder: &Path) -> Result<PathBuf> {
    command::run(cargo().args(["build", "--package", "reverbs-tests"]))?;
    let runner = paths::target()?.join("debug/guest-tests");
    command::run(Command::new(&runner).arg("--build").arg(folder))?;
    Ok(runner)
}

fn build() -> Result<()> {
    command::run(cargo().args([
        "build",
        "--release",
        "-p",
        "reverbs",
        "-p",
        "reverbs-provider",
    ]))
    .context("there is nothing to stage")
}

/// The cargo that runs us, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::workspace());
    command
}

/// Puts a new file in place by a rename: a running process may have the old one mapped.
fn put(from: &Path, to: &Path) -> Result<()> {
    let fresh = beside(to);
    fs::copy(from, &fresh)
        .and_then(|_| fs::rename(&fresh, to))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn link(from: &Path, to: &Path) -> Result<()> {
    let fresh = beside(to);
    // Left by a run that was killed in between.
    if fresh.exists() {
        fs::remove_file(&fresh)?;
    }
    fs::hard_link(from, &fresh)
        .and_then(|()| fs::rename(&fresh, to))
        .with_context(|| format!("cannot link {} to {}", from.display(), to.display()))
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".new");
    name.into()
}
