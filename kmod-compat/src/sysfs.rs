//! Reading attributes of sysfs, from the host's `/sys` or from a copy elsewhere.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A mounted sysfs, or a folder that looks like one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysfs {
    root: PathBuf,
}

/// Why an attribute could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// The kernel (or the file system) refused.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system call answered.
        source: io::Error,
    },
    /// The text is not what the kernel's documentation says it should be.
    #[error("{} holds {text:?}, not {expected}; is this kernel newer than this program?",
            path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What was found there.
        text: String,
        /// What would have been understood.
        expected: &'static str,
    },
}

impl Sysfs {
    /// The host's own sysfs, `/sys`.
    pub fn host() -> Self {
        Self::at("/sys")
    }

    /// The tree under `root`, laid out like `/sys`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The path of `relative` in this tree.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }
}

/// The text of one attribute without its line end.
pub(crate) fn read_text(path: &Path) -> Result<String, SysfsError> {
    let text = fs::read_to_string(path).map_err(|source| SysfsError::Read {
        path: path.to_owned(),
        source,
    })?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// Like [`read_text`], with `None` where the attribute is absent, empty or answers EINVAL: the
/// kernel's ways to say that an entry has no such fact.
pub(crate) fn read_optional_text(path: &Path) -> Result<Option<String>, SysfsError> {
    match read_text(path) {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => Ok(Some(text)),
        Err(SysfsError::Read { source, .. })
            if source.kind() == io::ErrorKind::NotFound
                || source.raw_os_error() == Some(libc::EINVAL) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// One attribute, understood by `parse`.
pub(crate) fn read_parsed<T>(
    path: &Path,
    expected: &'static str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, SysfsError> {
    let text = read_text(path)?;
    match parse(&text) {
        Some(value) => Ok(value),
        None => Err(SysfsError::Unexpected {
            path: path.to_owned(),
            text,
            expected,
        }),
    }
}

/// Names in a folder, sorted; none if the folder does not exist.
pub(crate) fn read_names(path: &Path) -> Result<Vec<String>, SysfsError> {
    let wrap = |source| SysfsError::Read {
        path: path.to_owned(),
        source,
    };
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(wrap(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        // The kernel's names are ASCII; whatever is not cannot be a device.
        if let Ok(name) = entry.map_err(wrap)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Names in a folder that are numbers, in numeric order; none if the folder does not exist.
pub(crate) fn read_numbers(path: &Path) -> Result<Vec<u32>, SysfsError> {
    let mut numbers: Vec<u32> = read_names(path)?
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// `0x1f` or `1f`, as the kernel writes LIDs, keys and masks.
pub(crate) fn parse_hexadecimal(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

/// The number in front of the colon of `4: ACTIVE`.
pub(crate) fn parse_numbered_name(text: &str) -> Option<u8> {
    text.split_once(':')?.0.trim().parse().ok()
}
