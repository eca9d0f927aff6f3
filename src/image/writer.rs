//! An image in the making.

use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::Serialize;

use super::checksum::{self, Durability};
use super::manifest::Manifest;
use super::{CRIU_FOLDER, FILES_FOLDER, MANIFEST, MANIFEST_SUM};

/// A hidden folder beside where the image will appear. Removed when dropped, unless it was published.
#[derive(Debug)]
pub struct NewImage {
    parent: PathBuf,
    hidden: PathBuf,
    path: PathBuf,
    published: bool,
}

impl NewImage {
    /// Makes the hidden folder in `parent`, which is made if it is not there. The caller holds the lock of the job.
    ///
    /// # Errors
    /// `parent` cannot be made or written to.
    pub fn create(parent: &Path, root: i32) -> Result<Self> {
        std::fs::create_dir_all(parent)
            .with_context(|| format!("cannot make the image folder {}", parent.display()))?;
        let parent = parent
            .canonicalize()
            .with_context(|| format!("cannot enter the image folder {}", parent.display()))?;
        let host = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        remove_abandoned(&parent, &format!(".reverbs-{root}-"), &format!("@{host}"));
        let name = format!("reverbs-{root}-{}", compact(now()));
        let hidden = parent.join(format!(".{name}@{host}"));
        make_private(&hidden)
            .with_context(|| format!("cannot write to the image folder {}", parent.display()))?;
        let mut image = Self {
            path: PathBuf::new(),
            parent,
            hidden,
            published: false,
        };
        let mut names = (1..1000).map(|number| image.parent.join(format!("{name}-{number}")));
        image.path = names.find(|path| !path.exists()).with_context(|| {
            format!(
                "{} has too many images of this second",
                image.parent.display()
            )
        })?;
        Ok(image)
    }

    /// Where it is made.
    pub fn folder(&self) -> &Path {
        &self.hidden
    }

    /// Where it will appear.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the image appear: the one step that makes one of it. All that is in it is on disk already. An existing one is never
    /// replaced.
    ///
    /// # Errors
    /// No image appears.
    pub fn publish(&mut self) -> Result<()> {
        let renamed =
            match renameat_with(CWD, &self.hidden, CWD, &self.path, RenameFlags::NOREPLACE) {
                // File systems without that flag (9p, NFS): one orchestrator a job and a name with its root make it safe.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !self.path.exists() => {
                    std::fs::rename(&self.hidden, &self.path)
                }
                other => other.map_err(std::io::Error::from),
            };
        renamed.with_context(|| format!("cannot make {}", self.path.display()))?;
        self.published = true;
        sync_folder(&self.parent)
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        if !self.published {
            // Nothing better can be done here; the folder is hidden and private.
            let _ = std::fs::remove_dir_all(&self.hidden);
        }
    }
}

/// What one node puts into an image: its processes, and a manifest that describes them.
#[derive(Debug)]
pub struct NewPart {
    folder: PathBuf,
}

impl NewPart {
    /// In `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// It cannot be made or written to.
    pub fn create(folder: &Path) -> Result<Self> {
        let part = Self {
            folder: folder.to_owned(),
        };
        let make = || -> std::io::Result<()> {
            if !folder.is_dir() {
                make_private(folder)?;
            }
            make_private(&part.criu_folder())?;
            make_private(&part.files_folder())
        };
        make().with_context(|| format!("cannot write to {}", folder.display()))?;
        Ok(part)
    }

    pub fn criu_folder(&self) -> PathBuf {
        self.folder.join(CRIU_FOLDER)
    }

    pub fn files_folder(&self) -> PathBuf {
        self.folder.join(FILES_FOLDER)
    }

    /// Measures everything, brings it to disk, and writes the manifest. Returns the bytes described by it.
    ///
    /// # Errors
    /// Reading or writing fails.
    pub fn seal(&self, mut manifest: Manifest) -> Result<u64> {
        let paths = checksum::list(&self.folder)?;
        manifest.contents = checksum::measure(&self.folder, &paths, Durability::Sync)
            .context("cannot bring the image to disk")?;
        write_guarded(&self.folder, MANIFEST, MANIFEST_SUM, &manifest)?;
        for folder in [&self.criu_folder(), &self.files_folder(), &self.folder] {
            sync_folder(folder)?;
        }
        Ok(manifest.bytes())
    }
}

/// Writes a description beside its checksum, and brings both to disk.
pub(super) fn write_guarded<T: Serialize>(
    folder: &Path,
    name: &str,
    sum_name: &str,
    description: &T,
) -> Result<()> {
    let text = serde_json::to_vec_pretty(description)?;
    let sum = format!("{:08x} {}\n", crc32fast::hash(&text), text.len());
    for (name, text) in [(name, text.as_slice()), (sum_name, sum.as_bytes())] {
        let path = folder.join(name);
        let write = || -> std::io::Result<()> {
            let mut file = File::create_new(&path)?;
            file.write_all(text)?;
            file.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

pub(super) fn make_private(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// What a checkpoint of this job has left that was killed half-way. Nobody works on it: the caller holds the job's lock.
pub(super) fn remove_abandoned(parent: &Path, beginning: &str, end: &str) {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name
            .to_str()
            .is_some_and(|name| name.starts_with(beginning) && name.ends_with(end))
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

pub(super) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .or_else(|error| {
            // Some network file systems cannot; their renames are as durable as they get.
            if error.raw_os_error() == Some(libc::EINVAL) {
                Ok(())
            } else {
                Err(error)
            }
        })
        .with_context(|| format!("cannot bring {} to disk", path.display()))
}

/// Seconds since 1970.
fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        })
}

/// The time of now, as the manifest has it: 2026-01-31T23:59:59Z.
pub fn timestamp() -> String {
    let (year, month, day, hour, minute, second) = civil(now());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// As the name of an image has it: 20260131T235959Z.
fn compact(seconds: i64) -> String {
    let (year, month, day, hour, minute, second) = civil(seconds);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

/// Year, month, day, hour, minute, second of the Gregorian calendar in UTC: days are counted in eras of 400 years
/// that begin on 1 March.
fn civil(seconds: i64) -> (i64, i64, i64, i64, i64, i64) {
    let days = seconds.div_euclid(86_400) + 719_468;
    let of_day = seconds.rem_euclid(86_400);
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (
        year,
        month,
        day,
        of_day / 3_600,
        of_day / 60 % 60,
        of_day % 60,
    )
}

#[cfg(test)]
mod tests {
    use super::compact;

    #[test]
    fn times_are_those_of_the_calendar() {
        // From `date -u -d @N +%Y%m%dT%H%M%SZ`.
        for (seconds, text) in [
            (0, "19700101T000000Z"),
            (951_782_399, "20000228T235959Z"),
            (951_782_400, "20000229T000000Z"),
            (1_735_689_599, "20241231T235959Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(compact(seconds), text);
        }
    }
}
