//! The file descriptors and mappings of a process that lead to RDMA.
//!
//! A process checkpointer can carry none of them, so each has to be known before.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};

use crate::sysfs::Sysfs;

/// The folder of RDMA's char devices.
const DEVICE_FOLDER: &str = "/dev/infiniband/";
/// What the kernel calls the anonymous files for completion events and for async events alike
/// (ib_uverbs), and for the two kinds of DEVX files (mlx5_ib).
const ANONYMOUS_NAMES: [(&str, DescriptorKind); 3] = [
    ("[infinibandevent]", DescriptorKind::Events),
    ("[devx_async_cmd]", DescriptorKind::Devx),
    ("[devx_async_event]", DescriptorKind::Devx),
];

/// Which process to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// The calling one.
    Own,
    /// The one with this id, as the caller's PID namespace numbers it.
    Id(u32),
}

/// One descriptor of RDMA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaDescriptor {
    /// The descriptor's number in its process.
    pub number: RawFd,
    /// What it is open on.
    pub kind: DescriptorKind,
    /// What `/proc/PID/fd` shows, for messages.
    pub target: String,
}

/// What an RDMA descriptor is open on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DescriptorKind {
    /// A device's verbs: `uverbs0`.
    Verbs {
        /// The char device's name.
        device: String,
    },
    /// The connection manager, `rdma_cm`.
    ConnectionManager,
    /// Completion events or async events; the kernel gives both the same name.
    Events,
    /// An event file of mlx5's DEVX.
    Devx,
    /// Another char device of RDMA: `umad0`, `issm0`, `ucm0`.
    Other {
        /// The char device's name.
        device: String,
    },
}

/// A mapping of an RDMA device into a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaMapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// The mapped file.
    pub path: String,
}

/// Why the descriptors of a process are not known.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// A folder or file of `/proc` could not be read.
    #[error("cannot read {}; is the process there, and the caller its user?", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// What the system call answered.
        source: io::Error,
    },
    /// A descriptor could not be held while it is looked at.
    #[error("cannot duplicate file descriptor {number}; is the limit on open files reached?")]
    Duplicate {
        /// The descriptor.
        number: RawFd,
        /// What the system call answered.
        source: io::Error,
    },
    /// Two descriptors could not be compared.
    #[error("cannot compare file descriptors {first} and {second}")]
    Compare {
        /// One number.
        first: RawFd,
        /// The other.
        second: RawFd,
        /// What the system call answered.
        source: io::Error,
    },
}

impl Process {
    /// Its folder in `/proc`. The own one is the thread's: a process whose first thread has
    /// ended has empty folders under its process id.
    fn folder(self) -> PathBuf {
        match self {
            Self::Own => PathBuf::from("/proc/thread-self"),
            Self::Id(pid) => PathBuf::from(format!("/proc/{pid}")),
        }
    }
}

/// All descriptors of RDMA that a process holds, by number.
///
/// A char device is known by its path or, where its node is elsewhere, by its device number in
/// `sysfs`. Descriptors that close meanwhile are left out; that a process opens no new ones while
/// it is looked at is the caller's business.
///
/// # Errors
/// When the process is gone or belongs to somebody else.
pub fn rdma_descriptors(sysfs: &Sysfs, process: Process) -> Result<Vec<RdmaDescriptor>, FdError> {
    let mut found = Vec::new();
    for (number, target) in open_files(process)? {
        let path = process.folder().join("fd").join(number.to_string());
        let kind = kind_by_name(&target).or_else(|| kind_by_number(sysfs, &path));
        if let Some(kind) = kind {
            found.push(RdmaDescriptor {
                number,
                kind,
                target,
            });
        }
    }
    Ok(found)
}

/// All mappings of RDMA char devices in a process, by address.
///
/// # Errors
/// When the process is gone or belongs to somebody else.
pub fn rdma_mappings(process: Process) -> Result<Vec<RdmaMapping>, FdError> {
    let path = process.folder().join("maps");
    let maps = fs::read(&path).map_err(|source| FdError::Read { path, source })?;
    Ok(String::from_utf8_lossy(&maps)
        .lines()
        .filter_map(parse_mapping)
        .collect())
}

/// The numbers under which this process holds the same open file as `number`, other than itself.
///
/// An event file stays alive, with its epoll entries, until the last of them is replaced.
///
/// # Errors
/// When `number` is not open or the kernel cannot compare files.
pub fn duplicates(number: RawFd) -> Result<Vec<RawFd>, FdError> {
    let mut found = Vec::new();
    for (other, _) in open_files(Process::Own)? {
        match same_open_file(number, other) {
            _ if other == number => {}
            Ok(true) => found.push(other),
            Ok(false) => {}
            // `other` was closed meanwhile; that `number` is open is tried below.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
            Err(source) => {
                return Err(FdError::Compare {
                    first: number,
                    second: other,
                    source,
                });
            }
        }
    }
    match same_open_file(number, number) {
        Ok(_) => Ok(found),
        Err(source) => Err(FdError::Compare {
            first: number,
            second: number,
            source,
        }),
    }
}

/// Number and link text of every open descriptor, by number.
pub(crate) fn open_files(process: Process) -> Result<Vec<(RawFd, String)>, FdError> {
    let folder = process.folder().join("fd");
    let failed = |source| FdError::Read {
        path: folder.clone(),
        source,
    };
    let listing = rustix::fs::open(
        &folder,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .map_err(|error| failed(error.into()))?;
    let own_listing = (process == Process::Own).then(|| listing.as_raw_fd());
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::new(listing).map_err(|error| failed(error.into()))? {
        let entry = entry.map_err(|error| failed(error.into()))?;
        let name = entry.file_name().to_str().ok();
        let Some(number) = name.and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        if own_listing == Some(number) {
            continue;
        }
        // A descriptor may close between the listing and this.
        if let Ok(target) = fs::read_link(folder.join(number.to_string())) {
            found.push((number, target.to_string_lossy().into_owned()));
        }
    }
    found.sort_by_key(|(number, _)| *number);
    Ok(found)
}

fn kind_by_name(target: &str) -> Option<DescriptorKind> {
    if let Some(name) = target.strip_prefix("anon_inode:") {
        return ANONYMOUS_NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, kind)| kind.clone());
    }
    let name = target.strip_prefix(DEVICE_FOLDER)?;
    Some(kind_of_device(
        name.strip_suffix(" (deleted)").unwrap_or(name),
    ))
}

fn kind_of_device(name: &str) -> DescriptorKind {
    if name.starts_with("uverbs") {
        DescriptorKind::Verbs {
            device: name.to_owned(),
        }
    } else if name == "rdma_cm" {
        DescriptorKind::ConnectionManager
    } else {
        DescriptorKind::Other {
            device: name.to_owned(),
        }
    }
}

/// Knows a char device by its number: `/sys/dev/char/MAJOR:MINOR` links to the folder of the
/// device, whose parent is named after its class.
fn kind_by_number(sysfs: &Sysfs, path: &Path) -> Option<DescriptorKind> {
    // Without DONT_SYNC a file on a dead network file system would hold us up.
    let status = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    if FileType::from_raw_mode(status.stx_mode.into()) != FileType::CharacterDevice {
        return None;
    }
    let numbers = format!(
        "dev/char/{}:{}",
        status.stx_rdev_major, status.stx_rdev_minor
    );
    let target = fs::read_link(sysfs.path(numbers)).ok()?;
    let name = target.file_name()?.to_str()?;
    match target.parent()?.file_name()?.to_str()? {
        "infiniband_verbs" | "infiniband_mad" | "infiniband_cm" => Some(kind_of_device(name)),
        "misc" if name == "rdma_cm" => Some(DescriptorKind::ConnectionManager),
        _ => None,
    }
}

/// Understands one line of `/proc/PID/maps` if it is about RDMA.
fn parse_mapping(line: &str) -> Option<RdmaMapping> {
    let path = &line[line.find(DEVICE_FOLDER)?..];
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    // Address, permissions, offset, device, inode, then the path: which must start there.
    if !fields.nth(4)?.starts_with(DEVICE_FOLDER) {
        return None;
    }
    Some(RdmaMapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        path: path.to_owned(),
    })
}

/// Whether two numbers of this process stand for one open file (`kcmp`, KCMP_FILE).
fn same_open_file(first: RawFd, second: RawFd) -> io::Result<bool> {
    const KCMP_FILE: libc::c_int = 0;
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    // SAFETY: kcmp takes five integers and touches no memory of ours; bad ones give an error.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            thread,
            thread,
            KCMP_FILE,
            first as u32,
            second as u32,
        )
    };
    match answer {
        0 => Ok(true),
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_texts_are_told_apart() {
        let verbs = |name: &str| {
            Some(DescriptorKind::Verbs {
                device: name.to_owned(),
            })
        };
        assert_eq!(kind_by_name("/dev/infiniband/uverbs3"), verbs("uverbs3"));
        assert_eq!(
            kind_by_name("/dev/infiniband/uverbs3 (deleted)"),
            verbs("uverbs3")
        );
        assert_eq!(
            kind_by_name("/dev/infiniband/rdma_cm"),
            Some(DescriptorKind::ConnectionManager)
        );
        assert_eq!(
            kind_by_name("/dev/infiniband/umad0"),
            Some(DescriptorKind::Other {
                device: "umad0".to_owned()
            })
        );
        assert_eq!(
            kind_by_name("anon_inode:[infinibandevent]"),
            Some(DescriptorKind::Events)
        );
        assert_eq!(
            kind_by_name("anon_inode:[devx_async_cmd]"),
            Some(DescriptorKind::Devx)
        );
        assert_eq!(kind_by_name("anon_inode:[eventpoll]"), None);
        assert_eq!(kind_by_name("/tmp/infiniband/uverbs0"), None);
        assert_eq!(kind_by_name("socket:[123]"), None);
    }

    #[test]
    fn mappings_of_rdma_are_picked_out() {
        let line = "7f12a0000000-7f12a0001000 -w-s 00001000 00:05 421    /dev/infiniband/uverbs0";
        assert_eq!(
            parse_mapping(line),
            Some(RdmaMapping {
                start: 0x7f12_a000_0000,
                end: 0x7f12_a000_1000,
                path: "/dev/infiniband/uverbs0".to_owned(),
            })
        );
        assert_eq!(
            parse_mapping("7f1-7f2 r--p 00000000 fe:00 9 /home/a/dev/infiniband/uverbs0"),
            None
        );
        assert_eq!(parse_mapping("7f1-7f2 rw-p 00000000 00:00 0 "), None);
    }
}
