//! The RDMA devices of this host.
//!
//! sysfs names the devices and their char devices; only netlink knows the kernel's index and
//! driver id. [`list`] reads the first and works without netlink, [`identify`] adds the second.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::netlink::{Command, Connection, NetlinkError, attribute};
use crate::sysfs::{self, Sysfs, SysfsError};

/// One RDMA device as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaDevice {
    /// The kernel's name, such as `mlx5_0` or `rxe0`; an administrator can change it.
    pub name: String,
    /// What the device is on its fabric.
    pub node_type: NodeType,
    /// Port numbers, from 1.
    pub ports: Vec<u32>,
    /// The char device for verbs; `None` while `ib_uverbs` is not loaded.
    pub uverbs: Option<UverbsDevice>,
    /// The kernel's index, filled in by [`identify`]; never reused while the kernel runs.
    pub index: Option<u32>,
    /// The kernel's number of the driver, filled in by [`identify`].
    pub driver: Option<DriverId>,
}

/// The char device through which user space reaches a device's verbs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UverbsDevice {
    /// The name in `/dev/infiniband`, such as `uverbs0`.
    pub name: String,
    /// Major device number.
    pub major: u32,
    /// Minor device number.
    pub minor: u32,
    /// Version of the driver's own part of the interface.
    pub abi_version: u32,
}

/// A driver as `enum rdma_driver_id` of `rdma/ib_user_ioctl_verbs.h` numbers it.
///
/// A context must carry its device's number, or the kernel refuses every ioctl that libibverbs
/// makes on it with EINVAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DriverId(pub u32);

/// Names in the order of `enum rdma_driver_id`.
const DRIVER_NAMES: [&str; 21] = [
    "unknown",
    "mlx5",
    "mlx4",
    "cxgb3",
    "cxgb4",
    "mthca",
    "bnxt_re",
    "ocrdma",
    "nes",
    "irdma",
    "vmw_pvrdma",
    "qedr",
    "hns",
    "usnic",
    "rxe",
    "hfi1",
    "qib",
    "efa",
    "siw",
    "erdma",
    "mana",
];

impl DriverId {
    /// Soft-RoCE.
    pub const RXE: Self = Self(14);

    /// The driver's usual name, `None` for one that is newer than this table.
    pub fn name(self) -> Option<&'static str> {
        DRIVER_NAMES.get(usize::try_from(self.0).ok()?).copied()
    }
}

impl fmt::Display for DriverId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "driver {}", self.0),
        }
    }
}

/// A node type as sysfs numbers it (`enum rdma_node_type` of the kernel).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeType(pub u8);

impl NodeType {
    /// A channel adapter: InfiniBand or RoCE.
    pub const CHANNEL_ADAPTER: Self = Self(1);
    /// An iWARP adapter.
    pub const RNIC: Self = Self(4);

    /// The text that the kernel puts after the number.
    pub fn name(self) -> &'static str {
        match self.0 {
            1 => "CA",
            2 => "switch",
            3 => "router",
            4 => "RNIC",
            5 => "usNIC",
            6 => "usNIC UDP",
            7 => "unspecified",
            _ => "<unknown>",
        }
    }
}

/// All RDMA devices that `sysfs` shows, in the order of their names.
///
/// A kernel without RDMA has none: that is an empty list. Index and driver stay `None`.
///
/// # Errors
/// When an attribute of a listed device is missing or not understood; the error names its path.
/// A device may also vanish while it is read.
pub fn list(sysfs: &Sysfs) -> Result<Vec<RdmaDevice>, SysfsError> {
    let uverbs = list_uverbs(sysfs)?;
    let folder = sysfs.path("class/infiniband");
    let mut devices = Vec::new();
    for name in sysfs::read_names(&folder)? {
        let folder = folder.join(&name);
        devices.push(RdmaDevice {
            node_type: NodeType(sysfs::read_parsed(
                &folder.join("node_type"),
                "a node type such as '1: CA'",
                sysfs::parse_numbered_name,
            )?),
            ports: sysfs::read_numbers(&folder.join("ports"))?,
            uverbs: uverbs
                .iter()
                .find(|(of, _)| *of == name)
                .map(|(_, device)| device.clone()),
            index: None,
            driver: None,
            name,
        });
    }
    Ok(devices)
}

/// Asks the kernel for index and driver id of each device in `devices`, matched by name.
///
/// A device that netlink does not show (it has gone, or belongs to another network namespace)
/// stays as it is.
///
/// # Errors
/// When the kernel cannot be asked; see [`Connection`].
pub fn identify(
    devices: &mut [RdmaDevice],
    connection: &mut Connection,
) -> Result<(), NetlinkError> {
    for (index, name) in indexes(connection)? {
        let Some(device) = devices.iter_mut().find(|device| device.name == name) else {
            continue;
        };
        device.index = Some(index);
        if device.uverbs.is_some() {
            device.driver = driver_of(index, connection)?;
        }
    }
    Ok(())
}

/// Index and name of every device that the kernel shows to this network namespace.
pub(crate) fn indexes(connection: &mut Connection) -> Result<Vec<(u32, String)>, NetlinkError> {
    let mut found = Vec::new();
    for answer in connection.dump(Command::DeviceGet, None)? {
        let attributes = answer.attributes();
        if let (Some(index), Some(name)) = (
            attributes.u32(attribute::DEVICE_INDEX),
            attributes.text(attribute::DEVICE_NAME),
        ) {
            found.push((index, name));
        }
    }
    Ok(found)
}

/// The driver id that goes with the uverbs char device of device `index`.
fn driver_of(index: u32, connection: &mut Connection) -> Result<Option<DriverId>, NetlinkError> {
    let answer = match connection.character_device(index, "uverbs") {
        Ok(answer) => answer,
        // The device went between the two questions.
        Err(NetlinkError::Refused { source, .. })
            if source.raw_os_error() == Some(libc::EINVAL) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(answer
        .attributes()
        .u32(attribute::UVERBS_DRIVER_ID)
        .map(DriverId))
}

/// Every uverbs char device with the name of the RDMA device behind it.
fn list_uverbs(sysfs: &Sysfs) -> Result<Vec<(String, UverbsDevice)>, SysfsError> {
    let folder = sysfs.path("class/infiniband_verbs");
    let mut found = Vec::new();
    for name in sysfs::read_names(&folder)? {
        let folder = folder.join(&name);
        // The class folder also has a file `abi_version` of its own.
        if !folder.is_dir() {
            continue;
        }
        let (major, minor) = sysfs::read_parsed(
            &folder.join("dev"),
            "device numbers such as '231:192'",
            parse_device_numbers,
        )?;
        let abi_version =
            sysfs::read_parsed(&folder.join("abi_version"), "a version number", |text| {
                text.parse().ok()
            })?;
        let device = sysfs::read_text(&folder.join("ibdev"))?;
        found.push((
            device,
            UverbsDevice {
                name,
                major,
                minor,
                abi_version,
            },
        ));
    }
    Ok(found)
}

fn parse_device_numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
