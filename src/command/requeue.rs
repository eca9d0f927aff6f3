//! Jobs that outlive their time limit under Slurm: saved before it ends them, put back into the queue, and restarted from the
//! newest image when they start again.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

use reverbs::image::JobImage;

use super::checkpoint::save;
use super::cli::{CheckpointOptions, Devices, MovedNode, Outside, RestartOptions, RunOptions};
use super::files::FilePolicy;
use super::restart::{Restarted, restart_job};

const JOB: &str = "SLURM_JOB_ID";
const NODES: &str = "SLURM_JOB_NODELIST";

/// Where images of the job go, and what is in the queue.
#[derive(Clone, Debug)]
pub(crate) struct Requeue {
    images: PathBuf,
    job: String,
    quiet: bool,
    /// Whether this turn is over. Locked while it is being ended.
    over: Arc<Mutex<bool>>,
}

impl Requeue {
    /// # Errors
    /// This is no job of Slurm, or it has no folder for images.
    pub(crate) fn of(options: &RunOptions, quiet: bool) -> Result<Self> {
        let images = options
            .images
            .clone()
            .context("--requeue needs --images, a folder of this job alone")?;
        let job = std::env::var(JOB)
            .with_context(|| format!("--requeue is for jobs of Slurm: {JOB} is not set"))?;
        Ok(Self {
            images,
            job,
            quiet,
            over: Arc::default(),
        })
    }

    /// Saves the job whose root is process `root`, ends it, and puts it back into the queue.
    ///
    /// # Errors
    /// It could not be saved, and runs on; or not be put back.
    fn save_and_requeue(&self, root: i32) -> Result<()> {
        let options = CheckpointOptions {
            pid: root,
            images: Some(self.images.clone()),
            stop: true,
            outside: Outside { allowed: false },
            largest_deleted: 1 << 30,
        };
        let image = save(&options, self.quiet)?;
        if !self.quiet {
            eprintln!("reverbs: saved into {}", image.display());
        }
        // Slurm ends what is left of this turn, us included.
        let done = Command::new("scontrol")
            .args(["requeue", &self.job])
            .stdin(Stdio::null())
            .output()
            .context("cannot start `scontrol`")?;
        ensure!(
            done.status.success(),
            "the job is saved, but `scontrol requeue {}` failed: {}; submit it again, it goes on from the image",
            self.job,
            String::from_utf8_lossy(&done.stderr).trim()
        );
        Ok(())
    }

    /// The newest complete image, if this is not the first turn.
    pub(crate) fn newest(&self) -> Option<PathBuf> {
        newest(&self.images)
    }

    /// Goes on from an image, until the job ends or is saved again.
    ///
    /// # Errors
    /// It could not be restarted.
    pub(crate) fn go_on(&self, image: &Path, options: &RunOptions) -> Result<ExitCode> {
        if !self.quiet {
            eprintln!("reverbs: going on from {}", image.display());
        }
        let mut signals = Signals::new([SIGTERM]).context("cannot watch for signals")?;
        let restart = RestartOptions {
            image: image.to_owned(),
            devices: Devices {
                choices: Vec::new(),
            },
            files: FilePolicy::default(),
            output: None,
            wait: true,
            nodes: moved_nodes(image)?,
            remote: options.remote.clone(),
        };
        let mut restarted: Restarted = restart_job(&restart, self.quiet)?;
        let (root, requeue) = (restarted.root(), self.clone());
        std::thread::spawn(move || {
            for _ in signals.forever() {
                requeue.on_signal(root);
            }
        });
        let status = restarted.wait()?;
        Ok(self.outcome(status))
    }

    /// At the time limit. What fails is said, and the job runs on as long as it may.
    pub(crate) fn on_signal(&self, root: i32) {
        let mut over = self.lock();
        if *over {
            return;
        }
        match self.save_and_requeue(root) {
            Ok(()) => *over = true,
            Err(error) => eprintln!("reverbs: {error:#}"),
        }
    }

    /// What to end with when the job has ended, by itself with `status` or because it is saved: then after it is in the queue.
    pub(crate) fn outcome(&self, status: ExitCode) -> ExitCode {
        match *self.lock() {
            true => ExitCode::SUCCESS,
            false => status,
        }
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By time and number, which are the last parts of their names.
fn newest(images: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(images).ok()?;
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?.to_owned();
            let complete = ["job.json", "manifest.json"]
                .iter()
                .any(|manifest| path.join(manifest).exists());
            if !complete {
                return None;
            }
            let mut parts = name.strip_prefix("reverbs-")?.splitn(3, '-').skip(1);
            let time = parts.next()?.to_owned();
            let number: u32 = parts.next()?.parse().ok()?;
            Some((time, number, path))
        })
        .max()
        .map(|(_, _, path)| path)
}

/// Which node of the allocation takes the place of which in the image. Those that are still there stay.
fn moved_nodes(image: &Path) -> Result<Vec<MovedNode>> {
    if !JobImage::is_at(image) {
        return Ok(Vec::new());
    }
    let image = JobImage::open(image)?;
    let nodes = image.manifest.nodes.iter().map(|node| node.name.clone());
    let system = rustix::system::uname();
    let here = system.nodename().to_string_lossy().into_owned();
    place(&nodes.collect::<Vec<_>>(), &allocated()?, &here)
}

fn allocated() -> Result<Vec<String>> {
    let list = std::env::var(NODES).with_context(|| format!("{NODES} is not set"))?;
    let listed = Command::new("scontrol")
        .args(["show", "hostnames", &list])
        .stdin(Stdio::null())
        .output()
        .context("cannot start `scontrol`")?;
    ensure!(listed.status.success(), "`scontrol show hostnames` failed");
    let text = String::from_utf8(listed.stdout)?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn place(then: &[String], now: &[String], here: &str) -> Result<Vec<MovedNode>> {
    // The first is where the batch script runs, and so where we are.
    let others = then.get(1..).unwrap_or_default();
    let mut free: Vec<&String> = now
        .iter()
        .filter(|name| *name != here && !others.contains(name))
        .collect();
    let mut moved = Vec::new();
    for name in others {
        if now.contains(name) && name != here {
            continue;
        }
        let Some(to) = free.pop() else {
            bail!(
                "the job had {} nodes, and the allocation has {}: ask for as many",
                then.len(),
                now.len()
            );
        };
        moved.push(MovedNode {
            from: name.clone(),
            to: to.clone(),
        });
    }
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::{newest, place};

    #[test]
    fn the_newest_complete_image_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str, complete: bool| {
            let path = folder.path().join(name);
            std::fs::create_dir(&path).unwrap();
            if complete {
                std::fs::write(path.join("job.json"), "{}").unwrap();
            }
            path
        };
        assert_eq!(newest(folder.path()), None);
        make("reverbs-900-20260101T000000Z-1", true);
        make("reverbs-7-20260102T000000Z-2", true);
        let last = make("reverbs-7-20260102T000000Z-10", true);
        make("reverbs-7-20260103T000000Z-1", false);
        make(".reverbs-7-20260104T000000Z@n1", true);
        assert_eq!(newest(folder.path()), Some(last));
    }

    #[test]
    fn nodes_that_are_there_stay_and_others_are_replaced() {
        let names = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let moved = |then: &str, now: &str, here: &str| {
            let placed = place(&names(then), &names(now), here);
            placed.map(|moved| {
                let each = moved.iter().map(|one| format!("{}={}", one.from, one.to));
                each.collect::<Vec<_>>().join(" ")
            })
        };
        assert_eq!(moved("a b c", "a b c", "a").unwrap(), "");
        assert_eq!(moved("a b c", "b c d", "d").unwrap(), "");
        // Its second node is the first now.
        assert_eq!(moved("a b c", "b c d", "b").unwrap(), "b=d");
        assert_eq!(moved("a b c", "x y z", "x").unwrap(), "b=z c=y");
        assert!(moved("a b c", "a b", "a").is_err());
    }
}
