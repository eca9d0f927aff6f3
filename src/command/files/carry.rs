//! Carrying volatile files in the image, and putting them back.

use std::collections::BTreeMap;
use std::fs::{File, Metadata, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use reverbs::image::{Carried, CarriedKind};

use super::held::folders_above;
use super::written::create_beside;
use super::{FilePolicy, Held, Volatility};

const CHUNK: usize = 64 << 10;

/// Copies every volatile file that `held` names into `folder`, and notes the folders on the way to them. To be called while
/// the processes are frozen: shared memory would change under the copy.
///
/// # Errors
/// A file cannot be read, or the copy not be written.
pub(crate) fn carry(
    held: &Held,
    volatility: &mut Volatility,
    folder: &Path,
) -> Result<Vec<Carried>> {
    // Sorted by path, so that folders come before what is in them.
    let mut carried: BTreeMap<PathBuf, Carried> = BTreeMap::new();
    for file in held.named.values() {
        if !volatility.is_volatile(&file.path, &file.found, file.written) {
            continue;
        }
        for above in folders_above(&file.path) {
            let Ok(found) = std::fs::symlink_metadata(&above) else {
                continue;
            };
            if found.is_dir() {
                carried
                    .entry(above.clone())
                    .or_insert_with(|| carried_as(above, CarriedKind::Folder, &found));
            }
        }
        let kind = if file.found.is_dir() {
            CarriedKind::Folder
        } else if file.found.file_type().is_fifo() {
            CarriedKind::Fifo
        } else if file.found.is_file() {
            let stored = format!("{:06}", carried.len());
            let size = copy_sparse(&file.path, &folder.join(&stored)).with_context(|| {
                format!(
                    "cannot carry {} (held by process {})",
                    file.path.display(),
                    file.process
                )
            })?;
            CarriedKind::File { stored, size }
        } else {
            continue;
        };
        carried.insert(
            file.path.clone(),
            carried_as(file.path.clone(), kind, &file.found),
        );
    }
    Ok(carried.into_values().collect())
}

/// Puts everything back that is not there.
///
/// # Errors
/// Something else is in its place that `policy` does not allow to be replaced, or it cannot be written.
pub(crate) fn put_back(
    carried: &[Carried],
    folder: &Path,
    policy: FilePolicy,
    image: &str,
    notes: &mut Vec<String>,
) -> Result<usize> {
    let mut restored = 0;
    for item in carried {
        let put = put_back_one(item, folder, policy, image, notes)
            .with_context(|| format!("cannot put {} back", item.path.display()))?;
        restored += usize::from(put);
    }
    Ok(restored)
}

fn carried_as(path: PathBuf, kind: CarriedKind, found: &Metadata) -> Carried {
    Carried {
        path,
        kind,
        mode: found.mode() & 0o7777,
        user: found.uid(),
        group: found.gid(),
        modified: (found.mtime(), found.mtime_nsec()),
    }
}

/// Whether anything had to be done.
fn put_back_one(
    item: &Carried,
    folder: &Path,
    policy: FilePolicy,
    image: &str,
    notes: &mut Vec<String>,
) -> Result<bool> {
    let found = match std::fs::symlink_metadata(&item.path) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    match (&item.kind, found) {
        (CarriedKind::Folder, Some(found)) if found.is_dir() => return Ok(false),
        (CarriedKind::Fifo, Some(found)) if found.file_type().is_fifo() => return Ok(false),
        (CarriedKind::Folder, None) => std::fs::create_dir(&item.path)?,
        (CarriedKind::Fifo, None) => {
            mknodat(
                CWD,
                &item.path,
                FileType::Fifo,
                Mode::from_raw_mode(0o600),
                0,
            )?;
        }
        (CarriedKind::File { stored, size }, found) => {
            let source = folder.join(stored);
            if let Some(found) = found {
                if found.is_file() && found.len() == *size && same(&source, &item.path)? {
                    return Ok(false);
                }
                if !make_way(item, &found, policy, image, notes)? {
                    return Ok(false);
                }
            }
            copy_sparse(&source, &item.path)?;
        }
        (_, Some(_)) => bail!("something else is there; remove it"),
    }
    dress(item)?;
    Ok(true)
}

/// Moves what is there out of the way. `false`: it stays.
fn make_way(
    item: &Carried,
    found: &Metadata,
    policy: FilePolicy,
    image: &str,
    notes: &mut Vec<String>,
) -> Result<bool> {
    let path = item.path.display();
    match policy {
        FilePolicy::Refuse => bail!(
            "it is there and is not as it was at the checkpoint: `--files cut` replaces it and keeps a copy"
        ),
        FilePolicy::Keep => {
            notes.push(format!(
                "{path} is not as it was at the checkpoint; left as it is"
            ));
            Ok(false)
        }
        // Shared memory of processes that have ended is nobody's data.
        FilePolicy::Cut if item.path.starts_with("/dev/shm") && found.is_file() => {
            std::fs::remove_file(&item.path)?;
            Ok(true)
        }
        FilePolicy::Cut => {
            let (aside, _) = create_beside(&item.path, &format!("reverbs-kept-{image}"))?;
            std::fs::rename(&item.path, &aside)?;
            notes.push(format!(
                "{path} was not as it was at the checkpoint: it is put back, what was there is in {}",
                aside.display()
            ));
            Ok(true)
        }
    }
}

/// Owner, mode and time, in this order: a change of owner clears mode bits.
fn dress(item: &Carried) -> Result<()> {
    let us = rustix::process::geteuid().as_raw();
    if us == 0 {
        chown(&item.path, Some(item.user), Some(item.group))?;
    }
    std::fs::set_permissions(&item.path, Permissions::from_mode(item.mode))?;
    if let (CarriedKind::File { .. }, (Ok(seconds), Ok(nanoseconds))) = (
        &item.kind,
        (
            u64::try_from(item.modified.0),
            u32::try_from(item.modified.1),
        ),
    ) {
        let time = SystemTime::UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .and_then(|time| time.checked_add(Duration::from_nanos(nanoseconds.into())))
            .context("its time of modification is out of range")?;
        // Without write permission bits it cannot be opened, and then does not need the time either.
        if let Ok(file) = File::open(&item.path) {
            file.set_modified(time)?;
        }
    }
    Ok(())
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    loop {
        let read = one.read(&mut left)?;
        if read == 0 {
            return Ok(other.read(&mut right)? == 0);
        }
        match other.read_exact(&mut right[..read]) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        if left[..read] != right[..read] {
            return Ok(false);
        }
    }
}

/// Copies a file; runs of zeroes become holes, as they mostly were in shared memory segments. Returns its size.
fn copy_sparse(from: &Path, to: &Path) -> Result<u64> {
    let mut source = File::open(from)?;
    let mut target = File::create_new(to)?;
    let mut buffer = vec![0; CHUNK];
    let mut size: u64 = 0;
    loop {
        let read = source.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        let chunk = &buffer[..read];
        if chunk.iter().all(|byte| *byte == 0) {
            target.seek(SeekFrom::Current(i64::try_from(read)?))?;
        } else {
            target.write_all(chunk)?;
        }
        size += read as u64;
    }
    target.set_len(size)?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::{CarriedKind, carry, put_back};
    use crate::command::files::{FilePolicy, Volatility, survey};
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};

    #[test]
    fn files_fifos_and_folders_come_back_as_they_were() {
        let job = tempfile::tempdir_in("/tmp").unwrap();
        let image = tempfile::tempdir().unwrap();
        let session = job.path().join("session");
        std::fs::create_dir(&session).unwrap();
        let (file, fifo) = (session.join("segment"), session.join("fifo"));
        let mut contents = vec![0; 300_000];
        contents[200_000] = 7;
        std::fs::write(&file, &contents).unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let open = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&file)
            .unwrap();
        let open_fifo = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&fifo)
            .unwrap();
        let held = survey(&[std::process::id().cast_signed()]);
        let carried = carry(&held, &mut Volatility::new(), image.path()).unwrap();
        drop((open, open_fifo));
        let ours: Vec<_> = carried
            .into_iter()
            .filter(|item| item.path.starts_with(job.path()))
            .collect();
        assert_eq!(ours.len(), 4, "{ours:#?}");
        assert!(matches!(ours[0].kind, CarriedKind::Folder));

        std::fs::remove_dir_all(job.path()).unwrap();
        let mut notes = Vec::new();
        let mut put = |policy| put_back(&ours, image.path(), policy, "i", &mut notes);
        assert_eq!(put(FilePolicy::Refuse).unwrap(), 4);
        assert_eq!(std::fs::read(&file).unwrap(), contents);
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
        assert!(std::fs::metadata(&fifo).unwrap().file_type().is_fifo());
        assert_eq!(put(FilePolicy::Refuse).unwrap(), 0);

        std::fs::write(&file, "another").unwrap();
        assert!(put(FilePolicy::Refuse).is_err());
        assert_eq!(put(FilePolicy::Keep).unwrap(), 0);
        assert_eq!(put(FilePolicy::Cut).unwrap(), 1);
        assert_eq!(std::fs::read(&file).unwrap(), contents);
        let kept = session.join("segment.reverbs-kept-i");
        assert_eq!(std::fs::read(kept).unwrap(), b"another");
    }
}
