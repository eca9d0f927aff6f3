//! Debian packages, fetched and unpacked, not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use xtask::{command, paths, setup};

/// Where packages come from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Suite {
    /// The machine's own, with what else they need and is not installed.
    Own,
    /// Debian's newest, with all that they need.
    Unstable,
}

/// Where all sets are.
///
/// # Errors
/// When it cannot be made.
pub fn folder() -> Result<PathBuf> {
    paths::make(paths::target()?.join("packages"))
}

/// The folder of the unpacked packages, which is made when it is not there yet. `name` is that of the set.
///
/// # Errors
/// When they cannot be found, fetched or unpacked.
pub fn get(name: &str, suite: Suite, packages: &[&str]) -> Result<PathBuf> {
    let sets = folder()?;
    let folder = sets.join(name);
    if folder.exists() {
        return Ok(folder);
    }
    eprintln!("node-tests: fetching {}", packages.join(" "));
    setup::ensure_lists()?;
    let scratch = tempfile::tempdir_in(&sets)?;
    let unpacked = scratch.path().join("unpacked");
    fs::create_dir(&unpacked)?;
    let archives = download(scratch.path(), suite, packages)
        .or_else(|_| {
            // A list that names a version the archive no longer has.
            setup::update_lists()?;
            download(scratch.path(), suite, packages)
        })
        .with_context(|| format!("cannot fetch {}", packages.join(" ")))?;
    for archive in archives {
        command::run(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(archive)
                .arg(&unpacked),
        )?;
    }
    match fs::rename(&unpacked, &folder) {
        Err(_) if folder.exists() => {} // somebody else was faster
        done => done.with_context(|| format!("cannot rename to {}", folder.display()))?,
    }
    Ok(folder)
}

/// apt with folders of its own: its lists, its cache, and for another suite an empty idea of what is installed.
fn download(scratch: &Path, suite: Suite, packages: &[&str]) -> Result<Vec<PathBuf>> {
    let archives = scratch.join("archives");
    fs::create_dir_all(archives.join("partial"))?;
    let mut text = format!(
        "Dir::Cache \"{0}\";\nDir::Cache::archives \"{1}\";\nAPT::Install-Recommends \"false\";\n\
         Debug::NoLocking \"true\";\nAPT::Sandbox::User \"root\";\n",
        scratch.display(),
        archives.display()
    );
    if suite == Suite::Unstable {
        let sources = scratch.join("sources.list");
        let lists = scratch.join("lists");
        fs::create_dir_all(lists.join("partial"))?;
        fs::write(
            &sources,
            format!("deb [signed-by={KEYS}] {} sid main\n", mirror()?),
        )?;
        text.push_str(&format!(
            "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"-\";\nDir::State::lists \"{}\";\n\
             Dir::State::status \"/dev/null\";\nAcquire::Languages \"none\";\n",
            sources.display(),
            lists.display()
        ));
    }
    let configuration = scratch.join("apt.conf");
    fs::write(&configuration, text)?;
    let apt_get = |arguments: &[&str]| {
        command::output(
            Command::new("apt-get")
                .env("APT_CONFIG", &configuration)
                .args(["-q", "-y"])
                .args(arguments),
        )
    };
    if suite == Suite::Unstable {
        apt_get(&["update"])?;
    }
    let install = [&["install", "--download-only", "--reinstall"], packages].concat();
    apt_get(&install)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(&archives)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            found.push(path);
        }
    }
    ensure!(!found.is_empty(), "nothing to unpack");
    Ok(found)
}

const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where the machine gets its own Debian from.
fn mirror() -> Result<String> {
    let listed = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Label: Debian",
    ]))?;
    let first = listed.lines().next();
    Ok(first.context("apt knows no Debian mirror")?.to_owned())
}
