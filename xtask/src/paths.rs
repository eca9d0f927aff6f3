//! Where things lie on the host.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the workspace this command was built from.
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// The build folder: `CARGO_TARGET_DIR`, or `target` in the workspace; made if it is not there.
///
/// # Errors
/// When the folder cannot be made.
pub fn target() -> Result<PathBuf> {
    let folder = match env::var_os("CARGO_TARGET_DIR").filter(|name| !name.is_empty()) {
        Some(name) => env::current_dir()
            .context("the current folder is gone")?
            .join(name),
        None => workspace().join("target"),
    };
    make(folder)
}

/// What the test machine keeps between runs: the unpacked kernel and the default share.
///
/// # Errors
/// When the folder cannot be made.
pub fn machine() -> Result<PathBuf> {
    make(target()?.join("vm"))
}

/// Makes a folder with its parents and returns its absolute, resolved name.
///
/// # Errors
/// When it cannot be made.
pub fn make(folder: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir_all(&folder)
        .and_then(|()| folder.canonicalize())
        .with_context(|| format!("cannot make the folder {}", folder.display()))
}
