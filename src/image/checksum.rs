//! Sizes and checksums of the files of an image, read by two threads.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};

use super::manifest::ImageFile;

const THREADS: usize = 2;
const CHUNK: usize = 1 << 20;

/// Whether what is read shall also be on disk before it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    ReadOnly,
    Sync,
}

/// Reads all files of `paths` below `folder`.
///
/// # Errors
/// A file cannot be read, or not be brought to disk; it is named.
pub(super) fn measure(
    folder: &Path,
    paths: &[PathBuf],
    durability: Durability,
) -> Result<Vec<ImageFile>> {
    let next = AtomicUsize::new(0);
    let measured = Mutex::new(Vec::with_capacity(paths.len()));
    let work = || -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            let file = measure_one(folder, path, durability, &mut buffer)
                .with_context(|| path.display().to_string())?;
            measured
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .push(file);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a reader panicked")))
            })
            .collect::<Result<Vec<()>>>()
    })?;
    let mut measured = measured
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    measured.sort_unstable_by(|one, other| one.path.cmp(&other.path));
    Ok(measured)
}

fn measure_one(
    folder: &Path,
    path: &Path,
    durability: Durability,
    buffer: &mut [u8],
) -> Result<ImageFile> {
    let mut file = File::open(folder.join(path))?;
    let mut hasher = crc32fast::Hasher::new();
    let mut size = 0;
    loop {
        let read = file.read(buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
    }
    if durability == Durability::Sync {
        file.sync_all()?;
    }
    Ok(ImageFile {
        path: path.to_owned(),
        size,
        crc32: hasher.finalize(),
    })
}

/// Every regular file below `folder`, by its path there.
///
/// # Errors
/// A folder cannot be listed, or there is something else than files and folders.
pub(super) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(below) = folders.pop() {
        let here = folder.join(&below);
        for entry in std::fs::read_dir(&here).with_context(|| here.display().to_string())? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                found.push(path);
            } else {
                anyhow::bail!(
                    "{} is neither a file nor a folder",
                    here.join(path).display()
                );
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}
