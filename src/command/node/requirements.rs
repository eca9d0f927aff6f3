//! What a part of an image expects of the node it comes to, beyond its own files: looked at on all nodes before anything is
//! restored on one.

use std::path::Path;

use anyhow::{Result, bail};

use reverbs::image::Manifest;

/// # Errors
/// A program, a folder or a tool is missing.
pub(super) fn check(manifest: &Manifest, several_nodes: bool) -> Result<()> {
    let mut missing = Vec::new();
    for process in &manifest.processes {
        let executable = process.executable.iter().map(|path| (path, "program"));
        let folder = process.working_folder.iter().map(|path| (path, "folder"));
        for (path, what) in executable.chain(folder) {
            let carried = manifest.carried.iter().any(|item| item.path == *path);
            let said = format!("the {what} {}", path.display());
            if !carried && !deleted(path) && !path.exists() && !missing.contains(&said) {
                missing.push(said);
            }
        }
    }
    if several_nodes && !manifest.connections.is_empty() && !is_installed("nft") {
        missing.push("`nft` (Debian: `apt install nftables`)".to_owned());
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "this node lacks {}: install it here as it was where the job ran",
        missing.join(", ")
    )
}

/// The kernel says so of a file without a name; CRIU has it in the image.
fn deleted(path: &Path) -> bool {
    path.to_string_lossy().ends_with(" (deleted)")
}

fn is_installed(program: &str) -> bool {
    crate::command::criu::system_path()
        .split(':')
        .any(|folder| Path::new(folder).join(program).exists())
}
