//! `reverbs checkpoint`: one image of the whole job.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use procfs::process::Process;

use reverbs::control::socket::runtime_dir;
use reverbs::image::{JobManifest, JobNode, NewImage};

use super::cli::CheckpointOptions;
use super::criu::Criu;
use super::interrupt::Interrupt;
use super::job::{Driver, NodeId, ProcessTree, new_session, root_of};
use super::node::{NodeReply, NodeRequest};
use super::nodes::{Direction, Ensemble, Launcher, Parcel, copy_all};
use super::progress::{Progress, bytes, count};

/// # Errors
/// No image was made, or the job could not be stopped; the job runs on.
#[expect(clippy::print_stdout)]
pub(crate) fn checkpoint(options: &CheckpointOptions, quiet: bool) -> Result<ExitCode> {
    println!("{}", save(options, quiet)?.display());
    Ok(ExitCode::SUCCESS)
}

/// Gives the path of the image.
///
/// # Errors
/// As [`checkpoint`].
pub(crate) fn save(options: &CheckpointOptions, quiet: bool) -> Result<PathBuf> {
    // Whatever is made from here on holds memory of the job.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let root = root_of(options.pid)?;
    ProcessTree::of(root)?.require_user()?;
    let interrupt = Interrupt::install()?;
    let mut job = Ensemble::attach(root, &[])?;
    // Without it there is no need to look at anything.
    Criu::find()?;
    let unfinished = Unfinished::of(root)?;
    let mut checkpoint = Checkpoint {
        options,
        image: NewImage::create(&image_parent(options, root), root)?,
        apart: BTreeSet::new(),
    };
    unfinished.note(checkpoint.image.folder())?;
    let mut progress = Progress::new(quiet);
    let taken = checkpoint.take(&mut job, &mut progress, &interrupt);
    unfinished.forget();
    taken?;
    Ok(checkpoint.image.path().to_owned())
}

/// Where asked; else where `reverbs run --images` said; else here.
fn image_parent(options: &CheckpointOptions, root: i32) -> PathBuf {
    options
        .images
        .clone()
        .or_else(|| {
            let environment = Process::new(root).ok()?.environ().ok()?;
            let folder = environment.get(std::ffi::OsStr::new(super::run::IMAGES_VARIABLE))?;
            Some(PathBuf::from(folder))
        })
        .unwrap_or_else(|| PathBuf::from("."))
}

#[derive(Debug)]
struct Checkpoint<'a> {
    options: &'a CheckpointOptions,
    image: NewImage,
    /// Nodes whose part has to be fetched.
    apart: BTreeSet<NodeId>,
}

impl Checkpoint<'_> {
    fn take(
        &mut self,
        job: &mut Ensemble,
        progress: &mut Progress,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let began = Instant::now();
        let largest_deleted = self.options.largest_deleted;
        let (mut processes, mut memory) = (0, 0);
        for (_, reply) in job.all(NodeRequest::Examine { largest_deleted })? {
            if let NodeReply::Examined {
                processes: here,
                bytes,
            } = reply
            {
                processes += here;
                memory += bytes;
            }
        }
        let mut driver = Driver::new(job, progress, interrupt.clone(), new_session()?, Vec::new());
        driver.allow_outside(self.options.outside.allowed);
        driver.attach()?;
        driver.say("examine", began, processes);

        let saved = driver.release().and_then(|()| {
            let (job, progress) = driver.parts();
            self.save(job, progress, interrupt, memory)
        });
        if let Err(error) = saved {
            driver.agents().tell(NodeRequest::Decide { done: false });
            return Err(driver.recover(error, "no image was made, the job runs on"));
        }
        if self.options.stop {
            return driver
                .agents()
                .all(NodeRequest::Decide { done: true })
                .map(drop)
                .with_context(|| {
                    let image = self.image.path().display();
                    format!("the image {image} is complete, but the job was not stopped")
                });
        }
        let resumed = driver
            .agents()
            .all(NodeRequest::Decide { done: true })
            .and_then(|_| driver.restore_service());
        if let Err(error) = resumed {
            return Err(driver.recover(error, "the image is dropped, the job runs on"));
        }
        let (job, progress) = driver.parts();
        self.publish(job, progress, interrupt)
            .context("no image was made, the job runs on")
    }

    /// All processes are frozen afterwards. Where they shall end, the image is there: what cannot be brought to disk must not
    /// cost the job.
    fn save(
        &mut self,
        job: &mut Ensemble,
        progress: &mut Progress,
        interrupt: &Interrupt,
        memory: u64,
    ) -> Result<()> {
        let began = Instant::now();
        let watch = progress.watch_growth(self.image.folder(), memory);
        let saved = job.all(NodeRequest::Save {
            parts: self.image.folder().to_owned(),
            image: self.image.path().to_owned(),
            divided: job.has_others(),
            stop: self.options.stop,
        });
        drop(watch);
        let (mut processes, mut carried) = (0, 0);
        for (node, reply) in saved? {
            if let NodeReply::Saved {
                processes: here,
                carried: files,
                apart,
            } = reply
            {
                processes += here;
                carried += files;
                if apart {
                    self.apart.insert(node);
                }
            }
        }
        progress.phase(
            "save",
            began.elapsed(),
            &format!(
                "{}, {} carried",
                count(processes, "process", "processes"),
                count(carried, "file", "files")
            ),
        );
        if self.options.stop {
            self.publish(job, progress, interrupt)?;
        }
        Ok(())
    }

    /// Every node's part is on disk before the image appears.
    fn publish(
        &mut self,
        job: &mut Ensemble,
        progress: &mut Progress,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let began = Instant::now();
        let phases = progress.times().to_vec();
        let mut parts = Vec::new();
        for (node, reply) in job.all(NodeRequest::Seal { phases })? {
            if let NodeReply::Sealed { bytes } = reply {
                parts.push((node, bytes));
            }
        }
        let size = parts.iter().map(|(_, bytes)| bytes).sum();
        if let Some(record) = job.record() {
            let nodes = parts
                .iter()
                .zip(&record.nodes)
                .map(|((node, bytes), known)| JobNode {
                    name: known.name.clone(),
                    folder: PathBuf::from(node.0.to_string()),
                    root: known.root,
                    bytes: *bytes,
                });
            let nodes: Vec<JobNode> = nodes.collect();
            self.fetch(&record.launcher, &nodes, progress, interrupt)?;
            require_parts(self.image.folder(), &nodes)?;
            JobManifest::new(record.id.clone(), self.options.stop, nodes)
                .write(self.image.folder())?;
        }
        self.image.publish()?;
        progress.phase("publish", began.elapsed(), &bytes(size));
        Ok(())
    }

    /// Brings here what nodes have saved on disks of their own.
    fn fetch(
        &self,
        launcher: &Launcher,
        nodes: &[JobNode],
        progress: &mut Progress,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let apart = (0..)
            .zip(nodes)
            .filter(|(place, _)| self.apart.contains(&NodeId(*place)));
        let parcels = apart.map(|(_, node)| {
            let part = self.image.folder().join(&node.folder);
            Parcel {
                node: node.name.clone(),
                there: part.clone(),
                here: part,
                bytes: node.bytes,
            }
        });
        let parcels: Vec<Parcel> = parcels.collect();
        copy_all(launcher, Direction::Fetch, &parcels, progress, interrupt)
    }
}

/// Remembers an image in the making, for `reverbs resume` after this command was killed.
#[derive(Debug)]
pub(crate) struct Unfinished {
    note: PathBuf,
}

impl Unfinished {
    /// # Errors
    /// There is no runtime folder.
    pub(crate) fn of(root: i32) -> Result<Self> {
        let note = runtime_dir()?.join(format!("job-{root}.unfinished"));
        Ok(Self { note })
    }

    fn note(&self, folder: &Path) -> Result<()> {
        std::fs::write(&self.note, folder.as_os_str().as_encoded_bytes())
            .with_context(|| format!("cannot write {}", self.note.display()))
    }

    fn forget(&self) {
        // The next note takes its place.
        let _ = std::fs::remove_file(&self.note);
    }

    /// Removes what a killed command has left. The caller has the lock of the job.
    pub(crate) fn remove(&self) {
        use std::os::unix::ffi::OsStringExt;
        let Ok(path) = std::fs::read(&self.note) else {
            return;
        };
        let folder = PathBuf::from(std::ffi::OsString::from_vec(path));
        let hidden = folder
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(".reverbs-"));
        if hidden {
            // Gone, if the image was published in that very moment.
            let _ = std::fs::remove_dir_all(folder);
        }
        self.forget();
    }
}

/// Every node has written into the same folder.
fn require_parts(folder: &Path, nodes: &[JobNode]) -> Result<()> {
    for node in nodes {
        anyhow::ensure!(
            folder.join(&node.folder).is_dir(),
            "node {} saw the folder of the image, but what it has saved there is not to be seen here",
            node.name
        );
    }
    Ok(())
}
