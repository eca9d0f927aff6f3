//! Saving the processes of this node: CRIU, and what has to be done while it holds them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use procfs::process::{MMPermissions, MMapPath, Process};

use reverbs::control::message::ProcessStatus;
use reverbs::control::socket::runtime_dir;
use reverbs::image::{
    CriuFacts, ImageProcess, Library, Manifest, NewPart, PhaseTime, ScratchFolder, timestamp,
};

use super::message::NodeReply;
use super::part::examine;
use crate::command::criu::{Criu, Dump, WorkFolder};
use crate::command::files::{Volatility, carry, record, survey};
use crate::command::job::ProcessTree;
use crate::command::network::tcp_lock::HeldConnections;
use crate::command::network::{self, Namespace, Tables};
use crate::command::preflight;

/// What stands in no way of a checkpoint, and what it will need.
#[derive(Debug)]
pub(super) struct Findings {
    root: i32,
    largest_deleted: u64,
    statuses: Vec<ProcessStatus>,
    tree: ProcessTree,
    criu: Criu,
    runtime_folder: PathBuf,
    work: WorkFolder,
}

impl Findings {
    /// # Errors
    /// Something stands in the way: each with its process and the remedy.
    pub(super) fn of(
        root: i32,
        largest_deleted: u64,
        statuses: Vec<ProcessStatus>,
    ) -> Result<Self> {
        let (tree, held, _) = examine(root, largest_deleted)?;
        let members: Vec<i32> = statuses.iter().map(|status| status.pid).collect();
        preflight::require_agents(&held, &members)?;
        let runtime_folder = runtime_dir()?;
        Ok(Self {
            root,
            largest_deleted,
            statuses,
            tree,
            criu: Criu::find_in(Namespace::of(root)?)?,
            work: WorkFolder::create(&runtime_folder, root)?,
            runtime_folder,
        })
    }

    pub(super) fn processes(&self) -> usize {
        self.tree.members.len()
    }

    /// What CRIU will roughly have to write.
    pub(super) fn resident_bytes(&self) -> u64 {
        self.tree
            .pids()
            .into_iter()
            .filter_map(|pid| Process::new(pid).ok()?.status().ok())
            .map(|status| (status.rssanon.unwrap_or(0) + status.rssshmem.unwrap_or(0)) * 1024)
            .sum()
    }
}

/// A tree that is saved: frozen until it is decided what becomes of it. It runs on when this is dropped, unless the image is
/// there of a job that was to end.
#[derive(Debug)]
pub(super) struct Saving {
    tree: ProcessTree,
    connections: HeldConnections,
    stop: bool,
    image: PathBuf,
    part: NewPart,
    /// The folder above it, where it is not that of the first node: removed with this.
    _apart: Option<ScratchFolder>,
    manifest: Manifest,
    decision: Option<Sender<bool>>,
    criu: Option<JoinHandle<Result<()>>>,
}

impl Saving {
    /// Saves the tree into `folder`, which may be below `parts`; it is frozen then.
    ///
    /// # Errors
    /// It cannot be saved; it runs on.
    pub(super) fn begin(
        findings: Findings,
        parts: &Path,
        folder: &Path,
        image: &Path,
        stop: bool,
    ) -> Result<(Self, NodeReply)> {
        // Whatever is made from here on holds memory of the job.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        // Its name is new, so that no cache of a shared file system knows better.
        let apart = match parts.is_dir() {
            true => None,
            false => Some(ScratchFolder::create(parts)?),
        };
        // Processes may have opened files since the first look.
        let (tree, held, preflight) = examine(findings.root, findings.largest_deleted)?;
        preflight::require_no_rdma(&held)?;
        let part = NewPart::create(folder)?;
        let (frozen, is_frozen) = channel();
        let (decision, decided) = channel();
        let (criu_folder, files_folder) = (part.criu_folder(), part.files_folder());
        let criu = std::thread::spawn(move || {
            let dump = Dump {
                root: findings.root,
                images: &criu_folder,
                work: &findings.work,
                stop,
                ghost_limit: preflight.ghost_limit,
                options: &preflight.options,
            };
            let dumped = findings.criu.dump(&dump, || {
                let manifest = describe(&findings, &preflight, &files_folder, stop)?;
                wait_for_decision(&frozen, manifest, &decided)
            });
            match dumped {
                Err(error) if error.is::<GivenUp>() => Ok(()),
                other => other,
            }
        });
        let Ok(manifest) = is_frozen.recv() else {
            return Err(match join(criu) {
                Err(error) => error,
                Ok(()) => anyhow!("CRIU ended before it had written everything"),
            });
        };
        let saved = NodeReply::Saved {
            processes: manifest.processes.len(),
            carried: manifest.carried.len(),
            apart: apart.is_some(),
        };
        let saving = Self {
            connections: HeldConnections::of(tree.root(), &tree.pids()),
            tree,
            stop,
            image: image.to_owned(),
            part,
            _apart: apart,
            manifest,
            decision: Some(decision),
            criu: Some(criu),
        };
        Ok((saving, saved))
    }

    /// Brings it to disk. Gives the bytes of this part.
    ///
    /// # Errors
    /// It cannot be brought there.
    pub(super) fn seal(&mut self, phases: &[PhaseTime]) -> Result<u64> {
        let mut manifest = self.manifest.clone();
        manifest.phases = phases.to_vec();
        self.part.seal(manifest)
    }

    /// The processes end, if that was asked for and it is `done`; else they run on.
    ///
    /// # Errors
    /// CRIU could not end them, or did not let go of them.
    pub(super) fn decide(&mut self, done: bool) -> Result<()> {
        if let Some(decision) = self.decision.take() {
            // Without CRIU, joining says why.
            let _ = decision.send(done);
        }
        let Some(criu) = self.criu.take() else {
            return Ok(());
        };
        join(criu)?;
        if self.stop && done {
            wait_for_end(&self.tree);
            self.connections.remove_rules();
        }
        Ok(())
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        // Whoever was to decide is gone. The image is either there, and then others have ended, or will never be.
        let done = self.stop && self.image.exists();
        if let Err(error) = self.decide(done) {
            tracing::error!(%error, "CRIU failed after the connection was lost");
        }
    }
}

/// Nobody wants it any more: not a failure of CRIU.
#[derive(Debug, thiserror::Error)]
#[error("the checkpoint was given up")]
struct GivenUp;

fn wait_for_decision(
    frozen: &Sender<Manifest>,
    manifest: Manifest,
    decided: &Receiver<bool>,
) -> Result<()> {
    frozen.send(manifest).map_err(|_| GivenUp)?;
    match decided.recv() {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => bail!(GivenUp),
    }
}

fn join(criu: JoinHandle<Result<()>>) -> Result<()> {
    criu.join().map_err(|_| anyhow!("running CRIU panicked"))?
}

/// While the processes are frozen: what they hold is copied or noted as it is now.
fn describe(
    findings: &Findings,
    preflight: &preflight::Findings,
    files_folder: &Path,
    stop: bool,
) -> Result<Manifest> {
    let tree = ProcessTree::of(findings.root)?;
    let held = survey(&tree.pids());
    let tables = Tables::of(findings.root);
    let mut volatility = Volatility::new();
    let processes = tree
        .members
        .iter()
        .map(|member| {
            let process = Process::new(member.pid).ok();
            let process = process.as_ref();
            ImageProcess {
                pid: member.pid,
                parent: member.parent,
                group: member.group,
                session: member.session,
                name: member.name.clone(),
                threads: process.map(threads).unwrap_or_default(),
                executable: process.and_then(|process| process.exe().ok()),
                command_line: process
                    .and_then(|process| process.cmdline().ok())
                    .unwrap_or_default(),
                working_folder: process.and_then(|process| process.cwd().ok()),
                rdma: findings
                    .statuses
                    .iter()
                    .find(|status| status.pid == member.pid)
                    .cloned(),
            }
        })
        .collect();
    let system = rustix::system::uname();
    Ok(Manifest {
        format: Manifest::format(),
        version: Manifest::version(),
        reverbs: env!("CARGO_PKG_VERSION").to_owned(),
        created: timestamp(),
        host: system.nodename().to_string_lossy().into_owned(),
        kernel: system.release().to_string_lossy().into_owned(),
        user: rustix::process::geteuid().as_raw(),
        root: findings.root,
        stopped: stop,
        processes,
        libraries: libraries(&tree.pids()),
        criu: CriuFacts {
            version: findings.criu.version.clone(),
            options: preflight.options.clone(),
        },
        runtime_folder: findings.runtime_folder.clone(),
        listening_ports: tables.listening_ports(&held),
        addresses: network::of_tree(&tables, &held),
        connections: tables.connections(&held),
        outside_pipes: preflight.outside_pipes.clone(),
        carried: carry(&held, &mut volatility, files_folder)?,
        written_files: record(&held, &mut volatility),
        phases: Vec::new(),
        contents: Vec::new(),
    })
}

/// Files with a name that they map to execute.
fn libraries(processes: &[i32]) -> Vec<Library> {
    let maps = processes
        .iter()
        .filter_map(|pid| Process::new(*pid).ok()?.maps().ok())
        .flatten()
        .filter(|map| map.perms.contains(MMPermissions::EXECUTE));
    let paths: BTreeSet<PathBuf> = maps
        .filter_map(|map| match map.pathname {
            MMapPath::Path(path) => Some(path),
            _ => None,
        })
        .collect();
    let sized = paths.into_iter().filter_map(|path| {
        // One that was deleted is in the image.
        let size = std::fs::metadata(&path).ok()?.len();
        Some(Library { path, size })
    });
    sized.collect()
}

/// CRIU has killed them; a restart needs their ids, so give them a moment to be gone.
fn wait_for_end(tree: &ProcessTree) {
    for _ in 0..100 {
        let left = tree.pids().into_iter().any(|pid| Process::new(pid).is_ok());
        if !left {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn threads(process: &Process) -> Vec<i32> {
    process
        .tasks()
        .map(|tasks| tasks.flatten().map(|task| task.tid).collect())
        .unwrap_or_default()
}
