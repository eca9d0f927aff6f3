//! What a device and its ports say about themselves in sysfs.
//!
//! These facts are what an application first saw; they are serialized into images and written
//! out again by [`crate::sysfs_tree`].

use std::fmt;
use std::net::Ipv6Addr;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::devices::NodeType;
use crate::sysfs::{self, Sysfs, SysfsError};

/// A device with all its ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// The kernel's name of the device.
    pub name: String,
    /// What the device is on its fabric.
    pub node_type: NodeType,
    /// Node GUID in the form `0002:c903:0000:1234`.
    pub node_guid: String,
    /// System image GUID, same form.
    pub system_image_guid: String,
    /// Free text set by the administrator.
    pub node_description: Option<String>,
    /// Version of the firmware, where the driver has one.
    pub firmware_version: Option<String>,
    /// Ports in the order of their numbers.
    pub ports: Vec<PortFacts>,
}

impl DeviceFacts {
    /// Every address of every port.
    pub fn gids(&self) -> impl Iterator<Item = Gid> + '_ {
        let entries = self.ports.iter().flat_map(|port| &port.gids);
        entries.map(|entry| entry.gid).filter(|gid| !gid.is_zero())
    }
}

/// One port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortFacts {
    /// Port number, from 1.
    pub number: u32,
    /// Logical state, IBTA 14.2.5.6 (PortInfo: PortState).
    pub state: PortState,
    /// Physical state, IBTA 14.2.5.6 (PortInfo: PortPhysicalState).
    pub physical_state: PhysicalState,
    /// What carries the port's packets.
    pub link_layer: LinkLayer,
    /// Local identifier, 0 on Ethernet.
    pub lid: u32,
    /// How many low bits of the LID are free for paths.
    pub lid_mask_count: u32,
    /// LID of the subnet manager.
    pub subnet_manager_lid: u32,
    /// Service level of the subnet manager.
    pub subnet_manager_service_level: u32,
    /// PortInfo: CapabilityMask.
    pub capability_mask: u32,
    /// Speed and width as text.
    pub rate: Option<String>,
    /// The GID table, one entry per index, empty ones too.
    pub gids: Vec<GidEntry>,
    /// The P_Key table, one entry per index.
    pub pkeys: Vec<u16>,
}

/// One entry of a GID table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GidEntry {
    /// The address; all zeros if the entry is empty.
    pub gid: Gid,
    /// `None` for an empty entry.
    pub gid_type: Option<GidType>,
    /// The network interface that the entry belongs to (RoCE).
    pub network_interface: Option<String>,
}

impl GidEntry {
    /// Whether the entry holds no address.
    pub fn is_empty(&self) -> bool {
        self.gid.is_zero() && self.gid_type.is_none() && self.network_interface.is_none()
    }

    /// Whether it can stand for another: it has the same type and addresses alike (both IPv4, both link-local, or both neither).
    pub fn has_role_of(&self, other: &GidEntry) -> bool {
        let role = |entry: &GidEntry| {
            let gid = &entry.gid.0;
            (
                gid[..10] == [0; 10] && gid[10..12] == [0xff, 0xff],
                gid[..2] == [0xfe, 0x80],
            )
        };
        !self.gid.is_zero() && self.gid_type == other.gid_type && role(self) == role(other)
    }
}

/// A 128-bit port address, in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Gid(pub [u8; 16]);

/// A text that is not a GID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a GID (eight groups of four hexadecimal digits)")]
pub struct ParseGidError(String);

impl Gid {
    /// Whether the entry that shows this GID is empty.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }
}

impl FromStr for Gid {
    type Err = ParseGidError;

    fn from_str(text: &str) -> Result<Self, ParseGidError> {
        text.parse::<Ipv6Addr>()
            .map(|address| Self(address.octets()))
            .map_err(|_| ParseGidError(text.to_owned()))
    }
}

impl TryFrom<String> for Gid {
    type Error = ParseGidError;

    fn try_from(text: String) -> Result<Self, ParseGidError> {
        text.parse()
    }
}

impl From<Gid> for String {
    fn from(gid: Gid) -> Self {
        gid.to_string()
    }
}

impl fmt::Display for Gid {
    /// The unabbreviated form of sysfs; libibverbs reads it by position.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, group) in self.0.chunks_exact(2).enumerate() {
            let separator = if index == 0 { "" } else { ":" };
            write!(f, "{separator}{:02x}{:02x}", group[0], group[1])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How packets with a GID travel; sysfs does not tell InfiniBand from RoCE version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GidType {
    /// InfiniBand, or RoCE in Ethernet frames of its own type.
    InfinibandOrRoceV1,
    /// RoCE in UDP packets.
    RoceV2,
}

impl GidType {
    /// The text in sysfs.
    pub fn name(self) -> &'static str {
        match self {
            Self::InfinibandOrRoceV1 => "IB/RoCE v1",
            Self::RoceV2 => "RoCE v2",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::InfinibandOrRoceV1, Self::RoceV2]
            .into_iter()
            .find(|known| known.name() == name)
    }
}

/// What carries a port's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LinkLayer {
    /// The driver does not say.
    Unspecified,
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RoCE or iWARP.
    Ethernet,
}

impl LinkLayer {
    /// The text in sysfs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "Unknown",
            Self::InfiniBand => "InfiniBand",
            Self::Ethernet => "Ethernet",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Unspecified, Self::InfiniBand, Self::Ethernet]
            .into_iter()
            .find(|known| known.name() == name)
    }
}

/// Logical state of a port (`enum ibv_port_state`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PortState(pub u8);

impl PortState {
    /// Data can flow.
    pub const ACTIVE: Self = Self(4);

    /// The text in sysfs.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 6] = ["NOP", "DOWN", "INIT", "ARMED", "ACTIVE", "ACTIVE_DEFER"];
        NAMES.get(usize::from(self.0)).copied().unwrap_or("UNKNOWN")
    }
}

/// Physical state of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PhysicalState(pub u8);

impl PhysicalState {
    /// The text in sysfs.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 8] = [
            "<unknown>",
            "Sleep",
            "Polling",
            "Disabled",
            "PortConfigurationTraining",
            "LinkUp",
            "LinkErrorRecovery",
            "Phy Test",
        ];
        NAMES
            .get(usize::from(self.0))
            .copied()
            .unwrap_or("<unknown>")
    }
}

/// Reads all facts of device `name`.
///
/// # Errors
/// When the device does not exist or one of its attributes is missing or not understood.
pub fn read_device(sysfs: &Sysfs, name: &str) -> Result<DeviceFacts, SysfsError> {
    let folder = sysfs.path("class/infiniband").join(name);
    let mut ports = Vec::new();
    for number in sysfs::read_numbers(&folder.join("ports"))? {
        ports.push(read_port(
            &folder.join("ports").join(number.to_string()),
            number,
        )?);
    }
    Ok(DeviceFacts {
        name: name.to_owned(),
        node_type: NodeType(sysfs::read_parsed(
            &folder.join("node_type"),
            "a node type such as '1: CA'",
            sysfs::parse_numbered_name,
        )?),
        node_guid: sysfs::read_text(&folder.join("node_guid"))?,
        system_image_guid: sysfs::read_text(&folder.join("sys_image_guid"))?,
        node_description: sysfs::read_optional_text(&folder.join("node_desc"))?,
        firmware_version: sysfs::read_optional_text(&folder.join("fw_ver"))?,
        ports,
    })
}

fn read_port(folder: &Path, number: u32) -> Result<PortFacts, SysfsError> {
    let numbered = |name: &str| {
        sysfs::read_parsed(
            &folder.join(name),
            "a state such as '4: ACTIVE'",
            sysfs::parse_numbered_name,
        )
    };
    let hexadecimal = |name: &str| {
        sysfs::read_parsed(
            &folder.join(name),
            "a hexadecimal number",
            sysfs::parse_hexadecimal,
        )
    };
    let decimal = |name: &str| {
        sysfs::read_parsed(&folder.join(name), "a decimal number", |text| {
            text.parse().ok()
        })
    };
    Ok(PortFacts {
        number,
        state: PortState(numbered("state")?),
        physical_state: PhysicalState(numbered("phys_state")?),
        link_layer: sysfs::read_parsed(
            &folder.join("link_layer"),
            "a link layer such as 'Ethernet'",
            LinkLayer::from_name,
        )?,
        lid: hexadecimal("lid")?,
        lid_mask_count: decimal("lid_mask_count")?,
        subnet_manager_lid: hexadecimal("sm_lid")?,
        subnet_manager_service_level: decimal("sm_sl")?,
        capability_mask: hexadecimal("cap_mask")?,
        rate: sysfs::read_optional_text(&folder.join("rate"))?,
        gids: read_gids(folder)?,
        pkeys: read_pkeys(folder)?,
    })
}

fn read_gids(folder: &Path) -> Result<Vec<GidEntry>, SysfsError> {
    let gids = folder.join("gids");
    let attributes = folder.join("gid_attrs");
    let mut entries = Vec::new();
    for index in table_indexes(&gids)? {
        let gid: Gid = sysfs::read_parsed(&gids.join(&index), "a GID", |text| text.parse().ok())?;
        // Empty entries have neither a type nor an interface. They are nearly all of the table,
        // and each question to sysfs costs.
        if gid.is_zero() {
            entries.push(GidEntry {
                gid,
                gid_type: None,
                network_interface: None,
            });
            continue;
        }
        let type_path = attributes.join("types").join(&index);
        let gid_type = match sysfs::read_optional_text(&type_path)? {
            None => None,
            Some(text) => match GidType::from_name(&text) {
                Some(known) => Some(known),
                None => {
                    let expected = "'IB/RoCE v1' or 'RoCE v2'";
                    return Err(SysfsError::Unexpected {
                        path: type_path,
                        text,
                        expected,
                    });
                }
            },
        };
        let network_interface = sysfs::read_optional_text(&attributes.join("ndevs").join(&index))?;
        entries.push(GidEntry {
            gid,
            gid_type,
            network_interface,
        });
    }
    Ok(entries)
}

fn read_pkeys(folder: &Path) -> Result<Vec<u16>, SysfsError> {
    let pkeys = folder.join("pkeys");
    table_indexes(&pkeys)?
        .iter()
        .map(|index| {
            sysfs::read_parsed(&pkeys.join(index), "a P_Key such as '0xffff'", |text| {
                sysfs::parse_hexadecimal(text).and_then(|value| u16::try_from(value).ok())
            })
        })
        .collect()
}

/// The names of a table's entries, which must be 0, 1, 2, ... without a gap.
fn table_indexes(folder: &Path) -> Result<Vec<String>, SysfsError> {
    let numbers = sysfs::read_numbers(folder)?;
    if let Some(gap) = (0..)
        .zip(&numbers)
        .find(|(expected, number)| expected != *number)
    {
        return Err(SysfsError::Unexpected {
            path: folder.to_owned(),
            text: format!("entry {}", gap.1),
            expected: "entries numbered from 0 without a gap",
        });
    }
    Ok(numbers.iter().map(u32::to_string).collect())
}
