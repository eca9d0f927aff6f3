//! Parts of an image on disks that the first node does not see: they come to it after they were saved, and go to their nodes
//! before a restart. The launcher's channel carries them as tar archives, from and to the first node directly: all the bytes
//! are on its disk anyway.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use reverbs::image::Image;

use super::ensemble::FAN_OUT;
use super::launcher::{LastLine, Launcher};
use super::relay::MAGIC;
use super::stream::{Flow, read_line};
use crate::command::interrupt::Interrupt;
use crate::command::progress::{Progress, bytes, count};

const LONGEST_LINE: usize = 1 << 20;
/// What the other end says when it has brought everything to its disk.
const TAKEN: &str = "taken";

/// A part, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parcel {
    pub(crate) node: String,
    pub(crate) there: PathBuf,
    /// On the first node.
    pub(crate) here: PathBuf,
    /// About as many.
    pub(crate) bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// To the first node: complete and on disk when it is done.
    Fetch,
    /// From the first node. The other checks it before it uses it.
    Send,
}

impl Direction {
    /// For people.
    fn phase(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Send => "send",
        }
    }
}

/// What to do, in the first line of the input of `reverbs node --copy`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    Give(PathBuf),
    Take(PathBuf),
}

/// Copies all, several at the same time.
///
/// # Errors
/// One cannot be copied; its node is named.
pub(crate) fn copy_all(
    launcher: &Launcher,
    direction: Direction,
    parcels: &[Parcel],
    progress: &mut Progress,
    interrupt: &Interrupt,
) -> Result<()> {
    if parcels.is_empty() {
        return Ok(());
    }
    let began = Instant::now();
    let copied = Arc::new(AtomicU64::new(0));
    let expected = parcels.iter().map(|parcel| parcel.bytes).sum();
    let watch = progress.watch(direction.phase(), expected, {
        let copied = Arc::clone(&copied);
        move || copied.load(Ordering::Relaxed)
    });
    let done = copy_each(launcher, direction, parcels, interrupt, &copied);
    drop(watch);
    done?;
    let detail = format!(
        "{}, {}",
        count(parcels.len(), "part", "parts"),
        bytes(copied.load(Ordering::Relaxed))
    );
    progress.phase(direction.phase(), began.elapsed(), &detail);
    Ok(())
}

fn copy_each(
    launcher: &Launcher,
    direction: Direction,
    parcels: &[Parcel],
    interrupt: &Interrupt,
    copied: &AtomicU64,
) -> Result<()> {
    for together in parcels.chunks(FAN_OUT) {
        std::thread::scope(|scope| {
            let copying: Vec<_> = together
                .iter()
                .map(|parcel| {
                    scope.spawn(move || match direction {
                        Direction::Fetch => fetch(launcher, parcel, interrupt, copied),
                        Direction::Send => send(launcher, parcel, interrupt, copied),
                    })
                })
                .collect();
            // The others end, too: nothing of ours may be at work when the folders are removed.
            let ended: Vec<_> = copying.into_iter().map(|one| one.join()).collect();
            for (ended, parcel) in ended.into_iter().zip(together) {
                ended
                    .unwrap_or_else(|_| Err(anyhow!("copying panicked")))
                    .with_context(|| match direction {
                        Direction::Fetch => {
                            format!("the part of node {} cannot be fetched", parcel.node)
                        }
                        Direction::Send => format!("node {} cannot be given its part", parcel.node),
                    })?;
            }
            Ok::<(), anyhow::Error>(())
        })?;
    }
    Ok(())
}

fn fetch(
    launcher: &Launcher,
    parcel: &Parcel,
    interrupt: &Interrupt,
    copied: &AtomicU64,
) -> Result<()> {
    let order = Order::Give(parcel.there.clone());
    let mut remote = Remote::start(launcher, &parcel.node, &order)?;
    let outcome = remote.output().and_then(|output| {
        unpack(Flow::over(output, interrupt, copied)?, &parcel.here)?;
        Image::open(&parcel.here)?.settle()
    });
    remote.end(outcome)
}

fn send(
    launcher: &Launcher,
    parcel: &Parcel,
    interrupt: &Interrupt,
    copied: &AtomicU64,
) -> Result<()> {
    let order = Order::Take(parcel.there.clone());
    let mut remote = Remote::start(launcher, &parcel.node, &order)?;
    let outcome = remote.input().and_then(|input| {
        pack(&parcel.here, Flow::over(input, interrupt, copied)?)?;
        let said = read_line(&mut remote.output()?, LONGEST_LINE)?;
        match said == TAKEN {
            true => Ok(()),
            false => bail!("it answers {said:?}"),
        }
    });
    remote.end(outcome)
}

/// `reverbs node --copy` on another node.
struct Remote {
    child: Child,
    errors: LastLine,
    input: Option<File>,
    output: Option<File>,
}

impl Remote {
    fn start(launcher: &Launcher, node: &str, order: &Order) -> Result<Self> {
        let mut child = launcher
            .command(node, &["node", "--copy"])?
            .spawn()
            .with_context(|| format!("cannot start `{}`", launcher.name()))?;
        let mut remote = Self {
            errors: LastLine::of(child.stderr.take()),
            input: child.stdin.take().map(|input| OwnedFd::from(input).into()),
            output: child
                .stdout
                .take()
                .map(|output| OwnedFd::from(output).into()),
            child,
        };
        let begun = remote.begin(order);
        match begun {
            Ok(()) => Ok(remote),
            Err(error) => Err(remote
                .end(Err(error))
                .err()
                .unwrap_or_else(|| anyhow!("it ended"))),
        }
    }

    fn begin(&mut self, order: &Order) -> Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        let input = self.input.as_mut().context("no pipe to it")?;
        input.write_all(&line)?;
        let output = self.output.as_mut().context("no pipe from it")?;
        // A login shell may print lines before.
        while !read_line(output, LONGEST_LINE)?.starts_with(MAGIC) {}
        Ok(())
    }

    fn input(&mut self) -> Result<File> {
        self.input.take().context("no pipe to it")
    }

    fn output(&mut self) -> Result<File> {
        self.output.take().context("no pipe from it")
    }

    /// What went wrong is best said by the other end, if it said anything.
    fn end(mut self, outcome: Result<()>) -> Result<()> {
        (self.input, self.output) = (None, None);
        let Err(error) = outcome else {
            let _ = self.child.wait();
            return Ok(());
        };
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.errors.wait();
        Err(match said.is_empty() {
            true => error,
            false => anyhow!(said),
        })
    }
}

/// `reverbs node --copy`.
///
/// # Errors
/// There is no such part, no room, or nobody at the other end any more.
pub(crate) fn serve_copy() -> Result<ExitCode> {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut output = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let order = read_line(&mut input, LONGEST_LINE).context("nobody has said what to copy")?;
    let order: Order = serde_json::from_str(&order)
        .context("this is started by `reverbs` on another node, not by hand")?;
    let (interrupt, count) = (Interrupt::default(), AtomicU64::new(0));
    if let Order::Give(folder) = &order {
        std::fs::metadata(folder).with_context(|| folder.display().to_string())?;
    }
    output.write_all(format!("{MAGIC}\n").as_bytes())?;
    match order {
        Order::Give(folder) => pack(&folder, Flow::over(output, &interrupt, &count)?)?,
        Order::Take(folder) => {
            unpack(Flow::over(input, &interrupt, &count)?, &folder)?;
            output.write_all(format!("{TAKEN}\n").as_bytes())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn pack(folder: &Path, to: impl Write) -> Result<()> {
    let mut archive = tar::Builder::new(BufWriter::with_capacity(1 << 20, to));
    archive.follow_symlinks(false);
    archive
        .append_dir_all("", folder)
        .with_context(|| format!("cannot copy {}", folder.display()))?;
    archive.into_inner()?.flush()?;
    Ok(())
}

fn unpack(from: impl Read, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let mut archive = tar::Archive::new(from);
    archive.set_preserve_permissions(true);
    archive
        .unpack(folder)
        .with_context(|| format!("cannot copy to {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_unpacked_is_what_was_packed() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        std::fs::create_dir_all(from.join("criu")).unwrap();
        let path = from.join("criu/pages-1.img");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let (interrupt, count) = (Interrupt::default(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let stream = File::from(OwnedFd::from(writer));
                let flow = Flow::over(stream, &interrupt, &count).unwrap();
                pack(&from, flow).unwrap();
            });
            unpack(File::from(OwnedFd::from(reader)), &to).unwrap();
        });
        let copied = to.join("criu/pages-1.img");
        assert_eq!(std::fs::read(&copied).unwrap(), vec![7; 3 << 20]);
        let mode = std::fs::metadata(&copied).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(count.into_inner() > 3 << 20);
    }

    #[test]
    fn an_interrupt_ends_a_copy_that_nobody_takes() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("large"), vec![7; 3 << 20]).unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        let (interrupt, count) = (Interrupt::default(), AtomicU64::new(0));
        interrupt.raise();
        let stream = File::from(OwnedFd::from(writer));
        let error = pack(
            folder.path(),
            Flow::over(stream, &interrupt, &count).unwrap(),
        );
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("interrupted"), "{error}");
    }
}
