//! What a part of an image expects of the node it comes to, beyond its own files: looked at on all nodes before anything is
//! restored on one.

use std::path::Path;

use anyhow::{Result, bail};

use reverbs::image::Manifest;

/// In an error at most.
const MOST_NAMED: usize = 5;

/// # Errors
/// A program, a library, a folder or a tool is missing.
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
    for library in &manifest.libraries {
        let path = library.path.display();
        let carried = manifest
            .carried
            .iter()
            .any(|item| item.path == library.path);
        match std::fs::metadata(&library.path) {
            _ if carried => {}
            Ok(found) if found.len() == library.size => {}
            Ok(found) => missing.push(format!(
                "{path} as it was ({} bytes; here it has {})",
                library.size,
                found.len()
            )),
            Err(_) => missing.push(path.to_string()),
        }
    }
    missing.dedup();
    if several_nodes && !manifest.connections.is_empty() && !is_installed("nft") {
        missing.push("`nft` (Debian: `apt install nftables`)".to_owned());
    }
    if missing.is_empty() {
        return Ok(());
    }
    let more = missing.len().saturating_sub(MOST_NAMED);
    missing.truncate(MOST_NAMED);
    let more = match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    bail!(
        "this node lacks {}{more}: install here what was where the job ran",
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use reverbs::image::{CriuFacts, Library, Manifest};

    use super::check;

    fn manifest(libraries: Vec<Library>) -> Manifest {
        Manifest {
            format: Manifest::format(),
            version: Manifest::version(),
            reverbs: String::new(),
            created: String::new(),
            host: String::new(),
            kernel: String::new(),
            user: 0,
            root: 1,
            stopped: true,
            processes: vec![],
            libraries,
            criu: CriuFacts {
                version: String::new(),
                options: vec![],
            },
            runtime_folder: PathBuf::new(),
            listening_ports: vec![],
            addresses: vec![],
            connections: vec![],
            outside_pipes: vec![],
            carried: vec![],
            written_files: vec![],
            phases: vec![],
            contents: vec![],
        }
    }

    #[test]
    fn libraries_that_are_missing_or_differ_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("libone.so");
        std::fs::write(&there, "four").unwrap();
        let library = |path: PathBuf, size| Library { path, size };
        assert!(check(&manifest(vec![library(there.clone(), 4)]), false).is_ok());
        let differs = check(&manifest(vec![library(there, 5)]), false);
        let said = differs.unwrap_err().to_string();
        assert!(
            said.contains("libone.so as it was (5 bytes; here it has 4)"),
            "{said}"
        );
        let absent = library(folder.path().join("libtwo.so"), 1);
        let said = check(&manifest(vec![absent]), false)
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("lacks") && said.contains("libtwo.so"),
            "{said}"
        );
    }
}
