//! A private copy of a device's sysfs folder, for libibverbs to read.
//!
//! libibverbs answers `ibv_query_gid`, `ibv_query_gid_ex`, `ibv_query_gid_table`,
//! `ibv_query_pkey` and `ibv_get_pkey_index` past the provider, from files under the device's
//! sysfs path. A context that is led to such a copy keeps the addresses that the application saw
//! first. The texts are those of the kernel, with two differences that the reading functions of
//! libibverbs (`query_sysfs_gid_type`, `query_sysfs_gid_ndev_ifindex` in cmd_device.c) demand:
//!
//! - the type of an empty GID entry is written out. The kernel answers EINVAL there, which a
//!   plain file cannot, and any other failure makes libibverbs give up the whole table;
//! - a network interface that does not exist here is left out: its name would fail the whole
//!   table, a missing file means "no interface".

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::ports::{DeviceFacts, GidType, PortFacts};

/// libibverbs keeps the path in an array of 256 bytes (IBV_SYSFS_PATH_MAX), end included.
pub const LONGEST_PATH: usize = 255;
/// Device names have 64 bytes in the kernel (IB_DEVICE_NAME_MAX), end included.
const LONGEST_DEVICE_NAME: usize = 63;
/// Interface names have 16 bytes (IF_NAMESIZE), end included.
const LONGEST_INTERFACE_NAME: usize = 15;

/// Why a tree was not written. An older tree of the same name is then still complete.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Somebody else could read or change what is in the folder.
    #[error("{} is not a private folder of this user (wanted: mode 0700, own user)",
            path.display())]
    NotPrivate {
        /// The folder.
        path: PathBuf,
    },
    /// libibverbs has no room for the path.
    #[error("the path {} is longer than {LONGEST_PATH} bytes; choose a shorter folder",
            path.display())]
    PathTooLong {
        /// The device's path in the tree.
        path: PathBuf,
    },
    /// The facts come from an image and hold a name that is none.
    #[error("{name:?} cannot be the name of {what}")]
    BadName {
        /// The name.
        name: String,
        /// What should be called that.
        what: &'static str,
    },
    /// The file system refused.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system call answered.
        source: io::Error,
    },
}

/// Writes the tree of `device` as `folder/NAME` and returns that path.
///
/// `folder` is made with mode 0700 if it does not exist; its parent must. A tree that is already
/// there is replaced as a whole, so that a reader finds the old one or the new one.
/// `interface_exists` tells whether this host has a network interface of a name
/// ([`host_has_interface`]).
///
/// # Errors
/// When the folder is not private, the path is too long for libibverbs, a name in `device` is
/// not one, or the file system refuses.
pub fn write(
    folder: &Path,
    device: &DeviceFacts,
    interface_exists: impl Fn(&str) -> bool,
) -> Result<PathBuf, TreeError> {
    check_name(&device.name, LONGEST_DEVICE_NAME, "an RDMA device")?;
    let path = folder.join(&device.name);
    if path.as_os_str().len() > LONGEST_PATH {
        return Err(TreeError::PathTooLong { path });
    }
    make_private(folder)?;
    // A dot cannot start a device's name, so this collides with no tree.
    let draft = folder.join(format!(".{}.{}", device.name, std::process::id()));
    remove_if_there(&draft)?;
    let written =
        write_device(&draft, device, &interface_exists).and_then(|()| exchange(&draft, &path));
    // What is left of the draft: nothing, the tree that was there before, or a failed attempt.
    let removed = remove_if_there(&draft);
    written?;
    removed?;
    Ok(path)
}

/// Whether the network namespace of the caller has an interface called `name`.
pub fn host_has_interface(name: &str) -> bool {
    rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        None,
    )
    .and_then(|socket| rustix::net::netdevice::name_to_index(&socket, name))
    .is_ok()
}

fn write_device(
    folder: &Path,
    device: &DeviceFacts,
    interface_exists: &impl Fn(&str) -> bool,
) -> Result<(), TreeError> {
    make(folder)?;
    let node_type = format!("{}: {}", device.node_type.0, device.node_type.name());
    put(folder, "node_type", &node_type)?;
    put(folder, "node_guid", &device.node_guid)?;
    put(folder, "sys_image_guid", &device.system_image_guid)?;
    if let Some(text) = &device.node_description {
        put(folder, "node_desc", text)?;
    }
    if let Some(text) = &device.firmware_version {
        put(folder, "fw_ver", text)?;
    }
    let ports = folder.join("ports");
    make(&ports)?;
    for port in &device.ports {
        write_port(&ports.join(port.number.to_string()), port, interface_exists)?;
    }
    Ok(())
}

fn write_port(
    folder: &Path,
    port: &PortFacts,
    interface_exists: &impl Fn(&str) -> bool,
) -> Result<(), TreeError> {
    make(folder)?;
    put(
        folder,
        "state",
        &format!("{}: {}", port.state.0, port.state.name()),
    )?;
    let physical_state = format!("{}: {}", port.physical_state.0, port.physical_state.name());
    put(folder, "phys_state", &physical_state)?;
    put(folder, "link_layer", port.link_layer.name())?;
    put(folder, "lid", &format!("{:#x}", port.lid))?;
    put(folder, "lid_mask_count", &port.lid_mask_count.to_string())?;
    put(folder, "sm_lid", &format!("{:#x}", port.subnet_manager_lid))?;
    put(
        folder,
        "sm_sl",
        &port.subnet_manager_service_level.to_string(),
    )?;
    put(
        folder,
        "cap_mask",
        &format!("{:#010x}", port.capability_mask),
    )?;
    if let Some(rate) = &port.rate {
        put(folder, "rate", rate)?;
    }

    let [gids, attributes, pkeys] = ["gids", "gid_attrs", "pkeys"].map(|name| folder.join(name));
    let [types, interfaces] = ["types", "ndevs"].map(|name| attributes.join(name));
    for table in [&gids, &attributes, &types, &interfaces, &pkeys] {
        make(table)?;
    }
    let mut first_empty = None;
    for (index, entry) in port.gids.iter().enumerate() {
        let index = index.to_string();
        // Tables have up to 1,024 entries, nearly all empty: these share two files.
        if let Some(first) = entry
            .is_empty()
            .then(|| first_empty.get_or_insert(index.clone()))
            && *first != index
        {
            link(&gids, first, &index)?;
            link(&types, first, &index)?;
            continue;
        }
        put(&gids, &index, &entry.gid.to_string())?;
        let gid_type = entry.gid_type.unwrap_or(GidType::InfinibandOrRoceV1);
        put(&types, &index, gid_type.name())?;
        if let Some(name) = &entry.network_interface {
            check_name(name, LONGEST_INTERFACE_NAME, "a network interface")?;
            if interface_exists(name) {
                put(&interfaces, &index, name)?;
            }
        }
    }
    for (index, pkey) in port.pkeys.iter().enumerate() {
        put(&pkeys, &index.to_string(), &format!("{pkey:#06x}"))?;
    }
    Ok(())
}

/// A name that stays inside its folder.
fn check_name(name: &str, longest: usize, what: &'static str) -> Result<(), TreeError> {
    let plain = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if name.is_empty() || name.starts_with('.') || name.len() > longest || !plain {
        return Err(TreeError::BadName {
            name: name.to_owned(),
            what,
        });
    }
    Ok(())
}

/// Makes `folder`, or checks that it belongs to this user alone.
fn make_private(folder: &Path) -> Result<(), TreeError> {
    let failed = |source| TreeError::Write {
        path: folder.to_owned(),
        source,
    };
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    let metadata = fs::symlink_metadata(folder).map_err(failed)?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw();
    if metadata.is_dir() && own && metadata.mode() & 0o077 == 0 {
        Ok(())
    } else {
        Err(TreeError::NotPrivate {
            path: folder.to_owned(),
        })
    }
}

/// Moves the finished draft to its place; what was there becomes the draft.
fn exchange(draft: &Path, path: &Path) -> Result<(), TreeError> {
    let failed = |source: io::Error| TreeError::Write {
        path: path.to_owned(),
        source,
    };
    match rustix::fs::renameat_with(CWD, draft, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(Errno::NOENT) => fs::rename(draft, path).map_err(failed),
        // A file system that cannot exchange, such as NFS.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            remove_if_there(path)?;
            fs::rename(draft, path).map_err(failed)
        }
        Err(error) => Err(failed(error.into())),
    }
}

fn remove_if_there(path: &Path) -> Result<(), TreeError> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(TreeError::Write {
            path: path.to_owned(),
            source,
        }),
    }
}

fn make(folder: &Path) -> Result<(), TreeError> {
    DirBuilder::new()
        .mode(0o700)
        .create(folder)
        .map_err(|source| TreeError::Write {
            path: folder.to_owned(),
            source,
        })
}

fn put(folder: &Path, name: &str, text: &str) -> Result<(), TreeError> {
    let path = folder.join(name);
    fs::write(&path, format!("{text}\n")).map_err(|source| TreeError::Write { path, source })
}

/// Gives `name` the text of `first`.
fn link(folder: &Path, first: &str, name: &str) -> Result<(), TreeError> {
    let path = folder.join(name);
    let original = folder.join(first);
    // Some file systems have no links.
    fs::hard_link(&original, &path)
        .or_else(|_| fs::copy(&original, &path).map(drop))
        .map_err(|source| TreeError::Write { path, source })
}
