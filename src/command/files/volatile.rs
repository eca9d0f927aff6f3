//! Which files will not be there after a reboot.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// `f_type` of statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6_u32 as i64;
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;

/// Cleared at boot, or private to a host, whatever file system they are on.
const VOLATILE_FOLDERS: [&str; 5] = ["/tmp", "/var/tmp", "/run", "/var/run", "/dev/shm"];

/// Decides, and remembers what it found out about mounts.
#[derive(Debug)]
pub(crate) struct Volatility {
    /// Seconds since 1970 at which this machine was booted.
    booted: i64,
    /// Overlay mounts by device number: whether their upper layer is known to last.
    lasting_overlays: BTreeMap<u64, bool>,
}

impl Volatility {
    pub(crate) fn new() -> Self {
        let booted = procfs::boot_time_secs()
            .map_or(0, |seconds| i64::try_from(seconds).unwrap_or(i64::MAX));
        Self {
            booted,
            lasting_overlays: BTreeMap::new(),
        }
    }

    /// Whether the file at `path` has to travel in the image. `written`: a process has it open for writing.
    ///
    /// On an overlay (a container, a test machine) nothing says which layer a file is in, and the lower layers come back
    /// on their own: what is written, or was changed since boot, is taken to be in the upper layer.
    pub(crate) fn is_volatile(&mut self, path: &Path, found: &Metadata, written: bool) -> bool {
        if VOLATILE_FOLDERS
            .iter()
            .any(|folder| path.starts_with(folder))
        {
            return true;
        }
        let Ok(system) = rustix::fs::statfs(path) else {
            return false;
        };
        match system.f_type {
            TMPFS_MAGIC | RAMFS_MAGIC => true,
            OVERLAYFS_MAGIC => {
                (written || found.ctime() >= self.booted) && !self.overlay_lasts(path)
            }
            _ => false,
        }
    }

    /// Whether the upper layer of the overlay that `path` is on can be seen, and is on a disk.
    fn overlay_lasts(&mut self, path: &Path) -> bool {
        let Some(mount) = mount_of(path) else {
            return false;
        };
        let Ok(device) = std::fs::metadata(&mount.point).map(|found| found.dev()) else {
            return false;
        };
        *self.lasting_overlays.entry(device).or_insert_with(|| {
            mount
                .upper
                .and_then(|upper| rustix::fs::statfs(upper).ok())
                .is_some_and(|system| {
                    !matches!(system.f_type, TMPFS_MAGIC | RAMFS_MAGIC | OVERLAYFS_MAGIC)
                })
        })
    }
}

#[derive(Debug)]
struct Mount {
    point: PathBuf,
    upper: Option<PathBuf>,
}

/// The mount of the longest matching mount point; of several on one point, the last is on top.
fn mount_of(path: &Path) -> Option<Mount> {
    let mounts = procfs::process::Process::myself().ok()?.mountinfo().ok()?;
    mounts
        .into_iter()
        .filter(|mount| path.starts_with(&mount.mount_point))
        .max_by_key(|mount| mount.mount_point.as_os_str().len())
        .map(|mount| Mount {
            upper: mount
                .super_options
                .get("upperdir")
                .and_then(|upper| upper.as_ref().map(PathBuf::from)),
            point: mount.mount_point,
        })
}

#[cfg(test)]
mod tests {
    use super::Volatility;
    use std::path::Path;

    #[test]
    fn shared_memory_and_tmp_do_not_last_and_the_system_does() {
        let mut volatility = Volatility::new();
        let mut is = |path: &str, written| {
            let found = std::fs::metadata("/bin/sh").unwrap();
            volatility.is_volatile(Path::new(path), &found, written)
        };
        assert!(is("/dev/shm", true));
        assert!(is("/tmp", false));
        assert!(!is("/proc", false));
        assert!(!is("/bin/sh", false));
        // Not by the beginning of the name alone.
        assert!(!is("/tmpfoo", false));
    }
}
