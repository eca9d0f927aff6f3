//! Checkpoints that cannot succeed: the command says why, leaves nothing behind, and the job does
//! not notice anything but the time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::case::{Action, Case, Job, Needs};
use crate::jobs::{COMMAND_LIMIT, Kind, Started};
use crate::process::{Running, the_line};

/// The time limit of each of these cases.
const LIMIT: Duration = Duration::from_secs(600);

/// A way to fail.
#[derive(Debug)]
pub struct Failing {
    name: &'static str,
    why: Why,
}

#[derive(Debug)]
enum Why {
    /// The folder for images can be neither made nor written to.
    Unwritable,
    /// There is no CRIU.
    NoCriu,
    /// The file system for images is far too small.
    DiskFull,
    /// The job has something that cannot be saved; the error says this of it.
    Holds {
        what: &'static str,
        said: &'static str,
    },
    /// Another checkpoint of the same job is under way.
    Another,
}

const FAILING: &[Failing] = &[
    Failing {
        name: "fail-images-unwritable",
        why: Why::Unwritable,
    },
    Failing {
        name: "fail-no-criu",
        why: Why::NoCriu,
    },
    Failing {
        name: "fail-disk-full",
        why: Why::DiskFull,
    },
    Failing {
        name: "fail-foreign-descriptor",
        why: Why::Holds {
            what: "uverbs",
            said: "/dev/infiniband/uverbs0",
        },
    },
    Failing {
        name: "fail-system-v",
        why: Why::Holds {
            what: "sysv",
            said: "system v shared memory",
        },
    },
    Failing {
        name: "fail-terminal",
        why: Why::Holds {
            what: "console",
            said: "/dev/console",
        },
    },
    Failing {
        name: "two-checkpoints",
        why: Why::Another,
    },
];

/// The cases of this module.
pub fn cases() -> Vec<Case> {
    FAILING
        .iter()
        .map(|failing| Case {
            name: failing.name.to_owned(),
            needs: Needs::Provider,
            limit: LIMIT,
            action: Action::Failing(failing),
        })
        .collect()
}

/// Lets a checkpoint fail under a running job. The remark has the command's error.
///
/// # Errors
/// When the command does not fail as it should, leaves anything, or the job suffers.
pub fn run(failing: &Failing, job: &Job<'_>) -> Result<String> {
    let kind = match failing.why {
        Why::Holds { what, .. } => Kind::Beside { what },
        _ => Kind::TRAFFIC,
    };
    let mut started = Started::start(job, kind)?;
    started.wait_for_traffic()?;
    let images = job.folder.join("images");
    let remark = match failing.why {
        // Not even root can make a folder there.
        Why::Unwritable => fail(&started, job, Path::new("/proc/nope"), None, "/proc/nope"),
        Why::NoCriu => {
            let none = "/nonexistent/criu";
            fail(&started, job, &images, Some(none), none)
        }
        Why::DiskFull => {
            let small = SmallDisk::mount(job.folder.join("small"))?;
            let said = fail(&started, job, &small.0, None, "space");
            small.unmount()?;
            said
        }
        Why::Holds { said, .. } => fail(&started, job, &images, None, said),
        Why::Another => two_at_once(&started, job),
    }?;
    started.wait_for_traffic()?;
    let done = started.finish()?;
    Ok(format!("{done}; {remark}"))
}

/// Runs a checkpoint that must fail; gives the one line it writes, which has to contain `reason`.
fn fail(
    started: &Started<'_>,
    job: &Job<'_>,
    images: &Path,
    criu: Option<&str>,
    reason: &str,
) -> Result<String> {
    let mut command = started.checkpoint_command(images)?;
    command.arg("--quiet");
    if let Some(criu) = criu {
        command.env("REVERBS_CRIU", criu);
    }
    let mut checkpoint = Running::start(command, &job.folder, "checkpoint")?;
    let status = checkpoint.wait(job.deadline.at_most(COMMAND_LIMIT))?;
    let errors = checkpoint.errors()?;
    ensure!(!status.success(), "the checkpoint succeeded");
    ensure!(
        status.code() == Some(1),
        "{status} instead of exit status 1"
    );
    ensure!(
        checkpoint.output()?.is_empty(),
        "a failed checkpoint names an image"
    );
    let line = the_line(&errors)?;
    ensure!(
        line.to_lowercase().contains(reason),
        "no word of \"{reason}\" in: {line}"
    );
    let left = entries(images)?;
    ensure!(left.is_empty(), "left in the image folder: {left:?}");
    Ok(line.to_owned())
}

/// Two checkpoints of one job: none, or one of them, is refused because of the other.
fn two_at_once(started: &Started<'_>, job: &Job<'_>) -> Result<String> {
    let images = job.folder.join("images");
    let start = |name: &str| {
        let mut command = started.checkpoint_command(&images)?;
        command.arg("--quiet");
        Running::start(command, &job.folder, name)
    };
    let mut both = [start("checkpoint-1")?, start("checkpoint-2")?];
    let mut made = Vec::new();
    let mut remark = "both succeeded".to_owned();
    for which in 0..2 {
        let other = both[1 - which].pid();
        let checkpoint = &mut both[which];
        let status = checkpoint.wait(job.deadline.at_most(COMMAND_LIMIT))?;
        if status.success() {
            let image = PathBuf::from(checkpoint.output()?.trim_end());
            ensure!(
                image.join("manifest.json").is_file(),
                "no image at \"{}\"",
                image.display()
            );
            made.push(image);
        } else {
            let errors = checkpoint.errors()?;
            let line = the_line(&errors)?;
            ensure!(
                line.contains(&format!("process {other}")),
                "refused, but not because of process {other}: {line}"
            );
            remark = line.to_owned();
        }
    }
    ensure!(!made.is_empty(), "both checkpoints were refused");
    let left = entries(&images)?;
    ensure!(
        left.len() == made.len(),
        "{} images were made, {left:?} is there",
        made.len()
    );
    Ok(remark)
}

/// What is in a folder, hidden or not; nothing in one that does not exist.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

/// A file system of one megabyte, as long as this lives.
#[derive(Debug)]
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: PathBuf) -> Result<Self> {
        fs::create_dir(&folder)?;
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]);
        succeed(command.arg(&folder))?;
        Ok(Self(folder))
    }

    fn unmount(self) -> Result<()> {
        succeed(Command::new("umount").arg(&self.0))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Only for a case that has failed; otherwise nothing is mounted there any more.
        let _ = Command::new("umount")
            .args(["-q", "-l"])
            .arg(&self.0)
            .status();
    }
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
