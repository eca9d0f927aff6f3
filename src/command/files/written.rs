//! Files that are written to, and that last: their length at the checkpoint is what the restored process expects.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use reverbs::image::WrittenFile;

use super::{FilePolicy, Held, Volatility};

/// The lengths of all files that are open for writing and are not carried.
pub(crate) fn record(held: &Held, volatility: &mut Volatility) -> Vec<WrittenFile> {
    held.named
        .values()
        .filter(|file| file.written && file.found.is_file())
        .filter(|file| !volatility.is_volatile(&file.path, &file.found, true))
        .map(|file| WrittenFile {
            path: file.path.clone(),
            length: file.found.len(),
        })
        .collect()
}

/// Before a restart: makes every file as long as it was. `image` names the file that a tail is kept in.
///
/// # Errors
/// A file is missing or shorter than it was; or has grown, under [`FilePolicy::Refuse`]; or cannot be cut.
pub(crate) fn cut_back(
    files: &[WrittenFile],
    policy: FilePolicy,
    image: &str,
    notes: &mut Vec<String>,
) -> Result<()> {
    // All are looked at before one is touched.
    let mut grown = Vec::new();
    for file in files {
        let path = file.path.display();
        let length = match std::fs::metadata(&file.path) {
            Ok(found) => found.len(),
            Err(error) if policy == FilePolicy::Keep => {
                notes.push(format!("{path}: {error}; left to CRIU"));
                continue;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("{path}, which the job was writing to"));
            }
        };
        match length.cmp(&file.length) {
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater if policy == FilePolicy::Cut => grown.push((file, length)),
            _ if policy == FilePolicy::Keep => notes.push(format!(
                "{path} has {length} bytes and had {} at the checkpoint; left as it is",
                file.length
            )),
            std::cmp::Ordering::Greater => bail!(
                "{path} has grown from {} to {length} bytes since the checkpoint: `--files cut` cuts it back and keeps the rest",
                file.length
            ),
            std::cmp::Ordering::Less => bail!(
                "{path} has {length} bytes and had {} at the checkpoint: what the job wrote is lost",
                file.length
            ),
        }
    }
    for (file, length) in grown {
        let tail = cut(file, image)?;
        notes.push(format!(
            "{} cut back from {length} to {} bytes, the rest is in {}",
            file.path.display(),
            file.length,
            tail.display()
        ));
    }
    Ok(())
}

/// The tail is on disk before the file is cut.
fn cut(file: &WrittenFile, image: &str) -> Result<PathBuf> {
    let path = &file.path;
    let act = || -> Result<PathBuf> {
        let mut source = OpenOptions::new().read(true).write(true).open(path)?;
        source.seek(SeekFrom::Start(file.length))?;
        let (tail, mut kept) = create_beside(path, &format!("reverbs-tail-{image}"))?;
        std::io::copy(&mut Read::by_ref(&mut source), &mut kept)?;
        kept.sync_all()?;
        source.set_len(file.length)?;
        source.sync_all()?;
        Ok(tail)
    };
    act().with_context(|| {
        format!(
            "cannot cut {} back to the {} bytes it had at the checkpoint",
            path.display(),
            file.length
        )
    })
}

/// A new file NAME.SUFFIX beside `path`, or NAME.SUFFIX.2 and so on where an earlier restart has left one.
pub(super) fn create_beside(path: &std::path::Path, suffix: &str) -> Result<(PathBuf, File)> {
    for number in 1..10_000 {
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(suffix);
        if number > 1 {
            name.push(format!(".{number}"));
        }
        let beside = PathBuf::from(name);
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)
        {
            Ok(file) => return Ok((beside, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| beside.display().to_string()),
        }
    }
    bail!("too many {suffix} files beside {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::{WrittenFile, cut_back};
    use crate::command::files::FilePolicy;

    #[test]
    fn what_has_grown_is_cut_and_kept_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let files = [WrittenFile {
            path: path.clone(),
            length: 4,
        }];
        let mut notes = Vec::new();
        std::fs::write(&path, "headtail").unwrap();
        let refused = cut_back(&files, FilePolicy::Refuse, "i", &mut notes).unwrap_err();
        assert!(refused.to_string().contains("from 4 to 8"), "{refused}");
        cut_back(&files, FilePolicy::Keep, "i", &mut notes).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"headtail");
        for kept in ["log.reverbs-tail-i", "log.reverbs-tail-i.2"] {
            std::fs::write(&path, "headtail").unwrap();
            cut_back(&files, FilePolicy::Cut, "i", &mut notes).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"head");
            assert_eq!(std::fs::read(dir.path().join(kept)).unwrap(), b"tail");
        }
        std::fs::write(&path, "he").unwrap();
        assert!(cut_back(&files, FilePolicy::Cut, "i", &mut notes).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"he");
    }
}
