//! What the processes of a tree hold open, mapped, or bound.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use procfs::process::{FDTarget, MMapPath, Process};

/// Everything of interest that a tree holds.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Files, fifos and folders that have a name, by it.
    pub(crate) named: BTreeMap<PathBuf, HeldFile>,
    /// Files without a name any more, by device and inode.
    pub(crate) deleted: BTreeMap<(u64, u64), HeldFile>,
    /// Character devices: terminals, RDMA devices and others.
    pub(crate) devices: Vec<HeldDevice>,
    /// Ends of pipes, by inode.
    pub(crate) pipes: Vec<HeldPipe>,
    /// Numbers of the pseudo-terminals whose master is held.
    pub(crate) terminal_masters: Vec<u32>,
    /// Processes that map System V shared memory.
    pub(crate) system_v: Vec<i32>,
    /// Inodes of sockets.
    pub(crate) sockets: Vec<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct HeldFile {
    pub(crate) process: i32,
    pub(crate) path: PathBuf,
    /// Open for writing, or mapped shared and writable.
    pub(crate) written: bool,
    pub(crate) found: Metadata,
}

#[derive(Clone, Debug)]
pub(crate) struct HeldDevice {
    pub(crate) process: i32,
    pub(crate) descriptor: i32,
    pub(crate) path: PathBuf,
}

#[derive(Clone, Debug)]
pub(crate) struct HeldPipe {
    pub(crate) process: i32,
    pub(crate) descriptor: i32,
    pub(crate) inode: u64,
    pub(crate) written: bool,
}

/// Looks at all of `processes`. What ends or changes meanwhile is skipped: the survey that counts is made while the tree is frozen.
pub(crate) fn survey(processes: &[i32]) -> Held {
    let mut held = Held::default();
    for pid in processes {
        if let Ok(process) = Process::new(*pid) {
            held.descriptors(&process);
            held.mappings(&process);
            held.name(*pid, process.cwd().ok(), false);
        }
    }
    held.bound_sockets();
    held
}

impl Held {
    fn descriptors(&mut self, process: &Process) {
        let Ok(descriptors) = process.fd() else {
            return;
        };
        for descriptor in descriptors.flatten() {
            let pid = process.pid;
            let number = descriptor.fd;
            let writes = descriptor
                .mode()
                .contains(procfs::process::FDPermissions::WRITE);
            match descriptor.target {
                FDTarget::Path(path) => self.path(pid, number, path, writes),
                FDTarget::Pipe(inode) => self.pipes.push(HeldPipe {
                    process: pid,
                    descriptor: number,
                    inode,
                    written: writes,
                }),
                FDTarget::Socket(inode) => self.sockets.push(inode),
                _ => {}
            }
        }
    }

    fn path(&mut self, pid: i32, number: i32, path: PathBuf, writes: bool) {
        let link = format!("/proc/{pid}/fd/{number}");
        let Ok(found) = std::fs::metadata(&link) else {
            return;
        };
        let kind = found.file_type();
        if kind.is_char_device() || kind.is_block_device() {
            if path.ends_with("ptmx") {
                self.terminal_masters.extend(terminal_index(pid, number));
            }
            self.devices.push(HeldDevice {
                process: pid,
                descriptor: number,
                path,
            });
        } else {
            self.file(pid, path, found, writes);
        }
    }

    fn mappings(&mut self, process: &Process) {
        let Ok(maps) = process.maps() else { return };
        for map in maps {
            match map.pathname {
                MMapPath::Vsys(_) => self.system_v.push(process.pid),
                MMapPath::Path(path) => {
                    if path.to_string_lossy().starts_with("/SYSV") {
                        self.system_v.push(process.pid);
                        continue;
                    }
                    let link = format!(
                        "/proc/{}/map_files/{:x}-{:x}",
                        process.pid, map.address.0, map.address.1
                    );
                    // Without the privilege to follow that link, the name has to do.
                    let found = std::fs::metadata(&link).or_else(|_| std::fs::metadata(&path));
                    let writes = map.perms.contains(
                        procfs::process::MMPermissions::WRITE
                            | procfs::process::MMPermissions::SHARED,
                    );
                    if let Ok(found) = found
                        && !found.file_type().is_char_device()
                    {
                        self.file(process.pid, path, found, writes);
                    }
                }
                _ => {}
            }
        }
    }

    fn file(&mut self, process: i32, path: PathBuf, found: Metadata, written: bool) {
        let named = std::fs::symlink_metadata(&path)
            .is_ok_and(|now| now.ino() == found.ino() && now.dev() == found.dev());
        if named {
            self.name(process, Some(path), written);
        } else if found.is_file() && path.is_absolute() {
            self.deleted
                .entry((found.dev(), found.ino()))
                .or_insert(HeldFile {
                    process,
                    path,
                    written,
                    found,
                })
                .written |= written;
        }
    }

    fn name(&mut self, process: i32, path: Option<PathBuf>, written: bool) {
        let Some(path) = path else { return };
        let Ok(found) = std::fs::symlink_metadata(&path) else {
            return;
        };
        self.named
            .entry(path.clone())
            .or_insert(HeldFile {
                process,
                path,
                written,
                found,
            })
            .written |= written;
    }

    /// Unix sockets of the tree that are bound to a name: the folder that has it must be there.
    fn bound_sockets(&mut self) {
        let Ok(table) = procfs::net::unix() else {
            return;
        };
        for entry in table {
            if let Some(path) = entry.path
                && path.is_absolute()
                && self.sockets.contains(&entry.inode)
                && let Some(folder) = path.parent()
            {
                self.name(0, Some(folder.to_owned()), false);
            }
        }
    }
}

/// The N of /dev/pts/N whose master this descriptor is.
fn terminal_index(pid: i32, number: i32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("tty-index:"))?
        .trim()
        .parse()
        .ok()
}

/// Every folder on the way to `path`, the highest first, without the root.
pub(super) fn folders_above(path: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = path
        .ancestors()
        .skip(1)
        .filter(|folder| folder.parent().is_some())
        .map(Path::to_owned)
        .collect();
    folders.reverse();
    folders
}
