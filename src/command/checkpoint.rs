//! `reverbs checkpoint`: one image of the whole process tree.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use procfs::process::Process;

use reverbs::control::message::ProcessStatus;
use reverbs::control::socket::runtime_dir;

use super::addresses;
use super::cli::CheckpointOptions;
use super::criu::{Criu, Dump, WorkFolder};
use super::files::{Held, Volatility, carry, record, survey};
use super::interrupt::Interrupt;
use super::job::{Driver, JobLock, ProcessTree, SocketAgents, new_session, root_of};
use super::preflight::{self, Findings};
use super::progress::{Progress, bytes, count};
use reverbs::image::{CriuFacts, ImageProcess, Manifest, NewImage, timestamp};

/// # Errors
/// No image was made, or the job could not be stopped; the job runs on.
#[expect(clippy::print_stdout)]
pub(crate) fn checkpoint(options: &CheckpointOptions, quiet: bool) -> Result<ExitCode> {
    // Whatever is made from here on holds memory of the job.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let root = root_of(options.pid)?;
    let tree = ProcessTree::of(root)?;
    tree.require_user()?;
    let runtime_folder = runtime_dir()?;
    let _lock = JobLock::take(&runtime_folder, root)?;
    let interrupt = Interrupt::install()?;
    let tools = Tools {
        criu: Criu::find()?,
        work: WorkFolder::create(&runtime_folder, root)?,
    };
    let mut checkpoint = Checkpoint {
        root,
        stop: options.stop,
        allow_outside: options.outside.allowed,
        largest_deleted: options.largest_deleted,
        criu_version: tools.criu.version.clone(),
        image: NewImage::create(&image_parent(options, root), root)?,
        runtime_folder: runtime_folder.clone(),
        findings: Findings::default(),
    };
    let mut progress = Progress::new(quiet);
    let mut agents = SocketAgents::new(root, runtime_folder);
    let path = checkpoint.take(&tools, &mut agents, &mut progress, &interrupt)?;
    println!("{}", path.display());
    Ok(ExitCode::SUCCESS)
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
struct Tools {
    criu: Criu,
    work: WorkFolder,
}

#[derive(Debug)]
struct Checkpoint {
    root: i32,
    stop: bool,
    allow_outside: bool,
    largest_deleted: u64,
    criu_version: String,
    image: NewImage,
    runtime_folder: PathBuf,
    findings: Findings,
}

impl Checkpoint {
    fn take(
        &mut self,
        tools: &Tools,
        agents: &mut SocketAgents,
        progress: &mut Progress,
        interrupt: &Interrupt,
    ) -> Result<PathBuf> {
        let began = Instant::now();
        let tree = ProcessTree::of(self.root)?;
        let held = survey(&tree.pids());
        self.findings = preflight::examine(&tree, &held, self.largest_deleted)?;
        let mut driver = Driver::new(
            agents,
            progress,
            interrupt.clone(),
            new_session()?,
            Vec::new(),
        );
        driver.allow_outside(self.allow_outside);
        driver.attach()?;
        let statuses = driver.statuses()?;
        let members: Vec<i32> = statuses.iter().map(|status| status.pid).collect();
        preflight::require_agents(&held, &members)?;
        driver.say("examine", began, tree.members.len());

        let saved = driver.release().and_then(|()| {
            driver.agents().hang_up()?;
            self.save(tools, &statuses, driver.progress())
        });
        let saved = match saved {
            Ok(saved) => saved,
            Err(error) => {
                return Err(driver.recover(error, "no image was made, the job runs on"));
            }
        };
        match saved {
            Saved::Published(path) => {
                wait_for_end(&tree);
                Ok(path)
            }
            Saved::Written(manifest) => {
                if let Err(error) = driver.restore_service() {
                    return Err(driver.recover(error, "the image is dropped, the job runs on"));
                }
                let progress = driver.progress();
                self.publish(*manifest, progress)
                    .context("no image was made, the job runs on")
            }
        }
    }

    /// CRIU, and what has to be done while it holds the processes.
    fn save(
        &mut self,
        tools: &Tools,
        statuses: &[ProcessStatus],
        progress: &mut Progress,
    ) -> Result<Saved> {
        let began = Instant::now();
        let held = survey(&ProcessTree::of(self.root)?.pids());
        preflight::require_no_rdma(&held)?;
        // Processes may have opened files since the first look.
        let tree = ProcessTree::of(self.root)?;
        self.findings = preflight::examine(&tree, &held, self.largest_deleted)?;
        let criu_folder = self.image.criu_folder();
        let options = self.findings.options.clone();
        let dump = Dump {
            root: self.root,
            images: &criu_folder,
            work: &tools.work,
            stop: self.stop,
            ghost_limit: self.findings.ghost_limit,
            options: &options,
        };
        let watch = progress.watch_growth(&criu_folder, resident_bytes(&tree));
        let mut saved = None;
        let dumped = tools.criu.dump(&dump, || {
            let manifest = self.describe(statuses)?;
            drop(watch);
            progress.phase(
                "save",
                began,
                &format!(
                    "{}, {} carried",
                    count(manifest.processes.len(), "process", "processes"),
                    count(manifest.carried.len(), "file", "files")
                ),
            );
            saved = Some(if self.stop {
                // Before CRIU kills them: an image that cannot be brought to disk must not cost the job.
                Saved::Published(self.publish(manifest, progress)?)
            } else {
                Saved::Written(Box::new(manifest))
            });
            Ok(())
        });
        match (dumped, saved) {
            (Ok(()), Some(saved)) => Ok(saved),
            (Err(error), Some(Saved::Published(path))) => Err(error.context(format!(
                "the image {} is complete, but the job was not stopped",
                path.display()
            ))),
            (Err(error), _) => Err(error),
            (Ok(()), None) => Err(anyhow!("CRIU ended before it had written everything")),
        }
    }

    /// While the processes are frozen: what they hold is copied or noted as it is now.
    fn describe(&self, statuses: &[ProcessStatus]) -> Result<Manifest> {
        let tree = ProcessTree::of(self.root)?;
        let held = survey(&tree.pids());
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
                    rdma: statuses
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
            root: self.root,
            stopped: self.stop,
            processes,
            criu: CriuFacts {
                version: self.criu_version.clone(),
                options: self.findings.options.clone(),
            },
            runtime_folder: self.runtime_folder.clone(),
            listening_ports: listening_ports(&held),
            addresses: addresses::of_tree(&held),
            outside_pipes: self.findings.outside_pipes.clone(),
            carried: carry(&held, &mut volatility, &self.image.files_folder())?,
            written_files: record(&held, &mut volatility),
            phases: Vec::new(),
            contents: Vec::new(),
        })
    }

    fn publish(&mut self, mut manifest: Manifest, progress: &mut Progress) -> Result<PathBuf> {
        let began = Instant::now();
        manifest.phases = progress.times().to_vec();
        let path = self.image.publish(manifest)?;
        let size = image_bytes(&path);
        progress.phase("publish", began, &bytes(size));
        Ok(path)
    }
}

/// How far the image is when CRIU is done.
#[derive(Debug)]
enum Saved {
    /// It is there.
    Published(PathBuf),
    /// Everything is written, but not yet on disk.
    Written(Box<Manifest>),
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

/// What CRIU will roughly have to write.
fn resident_bytes(tree: &ProcessTree) -> u64 {
    tree.pids()
        .into_iter()
        .filter_map(|pid| Process::new(pid).ok()?.status().ok())
        .map(|status| (status.rssanon.unwrap_or(0) + status.rssshmem.unwrap_or(0)) * 1024)
        .sum()
}

fn listening_ports(held: &Held) -> Vec<u16> {
    let tables = [procfs::net::tcp(), procfs::net::tcp6()];
    let mut ports: Vec<u16> = tables
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry.state == procfs::net::TcpState::Listen && held.sockets.contains(&entry.inode)
        })
        .map(|entry| entry.local_address.port())
        .collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn image_bytes(folder: &Path) -> u64 {
    super::progress::bytes_below(folder)
}
