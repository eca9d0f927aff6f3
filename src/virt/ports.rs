//! Ports as the application first saw them, beside the ports there are now.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use kmod_compat::ports::{DeviceFacts, Gid, GidEntry, GidType, PortFacts, read_device};
use kmod_compat::sysfs::Sysfs;
use rdma_core_sys::{IBV_GID_TYPE_ROCE_V2, ibv_ah_attr};

use super::context::Context;
use super::own_pair::OwnPair;
use super::process::{lock, process};
use crate::control::message::{PortAddress, PortNumbers};
use crate::device;
use crate::errno::{Errno, Verb};
use crate::handle::{HardwareGid, HardwareLid, HardwareQpn, VirtualGid, VirtualLid};
use crate::translate::Address;

/// One port, then and now.
#[derive(Clone, Debug)]
pub struct PortMap {
    pub numbers: PortNumbers,
    /// Entries of the GID table the application knows.
    pub(crate) table_length: i32,
    /// For each index the application may name, the index to name now.
    gid_indexes: Vec<u8>,
    /// The port that stands for it.
    now: PortNow,
}

impl PortMap {
    /// Every address by which peers may know the port.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = Address> + '_ {
        let lid = self.numbers.lid.0;
        let gids = self.numbers.gids.iter().map(|(gid, _)| Address::Gid(*gid));
        gids.chain((lid.0 != 0).then_some(Address::Lid(lid)))
    }
}

/// Where facts are read; the host's own sysfs if nobody said otherwise.
static FACTS: OnceLock<Sysfs> = OnceLock::new();

/// Reads what there is to know of devices in `tree`, laid out like `/sys`: for devices below that the kernel does not know.
/// Once in a process, before the first checkpoint; a later call changes nothing.
pub fn read_facts_in(tree: Sysfs) {
    let _ = FACTS.set(tree);
}

/// A port of the device below, as it is now.
#[derive(Clone, Debug, Default)]
pub(crate) struct PortNow {
    pub(crate) lid: u16,
    /// log2 of the largest path MTU in bytes.
    pub(crate) mtu: u8,
    /// By index; entries that are not there are zero.
    pub(crate) gids: Vec<GidEntry>,
}

/// Asks the device below for its ports. The kernel's files would tell the same, a thousand times slower.
pub(crate) fn ports_now(context: &Context, ports: &[u8]) -> Verb<Vec<PortNow>> {
    // SAFETY: the gate is closed and the hardware there; zero is valid for the attributes.
    let table = unsafe { context.verbs.gid_table(context.hardware())? };
    let port_now = |number: &u8| {
        // SAFETY: as above.
        let attr = unsafe { device::port_attributes(context.hardware(), *number)? };
        let mut gids = Vec::new();
        for entry in table
            .iter()
            .filter(|entry| entry.port_num == u32::from(*number))
        {
            let index = entry.gid_index as usize;
            if gids.len() <= index {
                gids.resize(
                    index + 1,
                    GidEntry {
                        gid: Gid([0; 16]),
                        gid_type: None,
                        network_interface: None,
                    },
                );
            }
            let roce_v2 = entry.gid_type == IBV_GID_TYPE_ROCE_V2;
            let gid_type = if roce_v2 {
                GidType::RoceV2
            } else {
                GidType::InfinibandOrRoceV1
            };
            // SAFETY: both views of a GID are plain bytes.
            let gid = Gid(unsafe { entry.gid.raw });
            gids[index] = GidEntry {
                gid,
                gid_type: Some(gid_type),
                network_interface: None,
            };
        }
        Ok(PortNow {
            lid: attr.lid,
            mtu: device::mtu_bits(&attr),
            gids,
        })
    };
    ports.iter().map(port_now).collect()
}

/// Bytes of the largest packet of a port (its path MTU); 0 while the hardware is released.
pub(crate) fn mtu(context: &Context, port: u8) -> u32 {
    if context.hardware().is_null() {
        return 0;
    }
    // SAFETY: the hardware is there.
    let attributes = unsafe { device::port_attributes(context.hardware(), port) };
    attributes.map_or(0, |port| 1 << device::mtu_bits(&port))
}

/// Where the GID of a device of this process leads. The job's tables do not have it if the device was not open at the last restart.
pub(crate) fn own_gid(gid: VirtualGid) -> Option<HardwareGid> {
    own_port(|port| {
        let known = port.gids.iter().find(|(known, _)| *known == gid)?;
        Some(known.1)
    })
}

/// As [`own_gid`].
pub(crate) fn own_lid(lid: VirtualLid) -> Option<HardwareLid> {
    own_port(|port| (port.lid.0 == lid).then_some(port.lid.1))
}

fn own_port<T>(look: impl Fn(&PortNumbers) -> Option<T>) -> Option<T> {
    let look_at = |context: Arc<Context>| {
        let ports = lock(&context.ports);
        ports.iter().find_map(|port| look(&port.numbers))
    };
    process().contexts().into_iter().find_map(look_at)
}

/// Old and new numbers of the ports of a context; before the first restart the hardware's own stand for both.
pub(crate) fn numbers(context: &Context) -> Vec<PortNumbers> {
    let known: Vec<_> = lock(&context.ports)
        .iter()
        .map(|port| port.numbers.clone())
        .collect();
    if !known.is_empty() || context.hardware().is_null() {
        return known;
    }
    let attributes = context.attributes.as_ref();
    let count = attributes.map_or(0, |attributes| attributes.orig_attr.phys_port_cnt);
    let numbers: Vec<u8> = (1..=count).collect();
    let now = ports_now(context, &numbers).unwrap_or_default();
    let identity = |(port, now): (&u8, &PortNow)| PortNumbers {
        port: *port,
        lid: (VirtualLid(now.lid), HardwareLid(now.lid)),
        gids: now
            .gids
            .iter()
            .filter(|entry| !entry.gid.is_zero())
            .map(|entry| (VirtualGid(entry.gid.0), HardwareGid(entry.gid.0)))
            .collect(),
    };
    numbers.iter().zip(&now).map(identity).collect()
}

/// What the kernel says of a device.
pub(crate) fn facts(name: &str) -> Verb<DeviceFacts> {
    read_device(FACTS.get_or_init(Sysfs::host), name).map_err(|error| {
        tracing::error!(device = name, %error, "cannot read what the kernel says of the device");
        Errno::NO_DEVICE
    })
}

/// The device as the application first saw it; noted now if it was never noted. The application goes on seeing this.
pub(crate) fn first_seen(context: &Context) -> Verb<Arc<DeviceFacts>> {
    if let Some(facts) = &*lock(&context.first_seen) {
        return Ok(Arc::clone(facts));
    }
    // Reading a large GID table takes long: another context on the same device may have done it.
    let name = context.hardware_name();
    let known = process().contexts().into_iter().find_map(|other| {
        let facts = lock(&other.first_seen).clone()?;
        (facts.name == name && other.hardware_name() == name).then_some(facts)
    });
    let facts = match known {
        Some(facts) => facts,
        None => Arc::new(facts(&name)?),
    };
    *lock(&context.first_seen) = Some(Arc::clone(&facts));
    Ok(facts)
}

/// Sets the ports as the application first saw them beside those of the device below.
pub(crate) fn map_ports(context: &Context, first_seen: &DeviceFacts) -> Verb<()> {
    let numbers: Vec<u8> = first_seen
        .ports
        .iter()
        .map(|port| port.number as u8)
        .collect();
    let now = ports_now(context, &numbers)?;
    let maps = first_seen.ports.iter().zip(&now);
    *lock(&context.ports) = maps.map(|(then, now)| map_port(then, now)).collect();
    Ok(())
}

/// The addresses of a port in the application's terms.
pub(crate) fn port_address(facts: &PortFacts) -> PortAddress {
    let gids = facts
        .gids
        .iter()
        .filter(|entry| !entry.gid.is_zero())
        .map(|entry| VirtualGid(entry.gid.0))
        .collect();
    PortAddress {
        gids,
        lid: VirtualLid(facts.lid as u16),
    }
}

/// Matches a port with the one that stands for it: each GID with one of the same type and role.
pub(crate) fn map_port(then: &PortFacts, now: &PortNow) -> PortMap {
    let mut gids = Vec::new();
    let mut gid_indexes = vec![0; then.gids.len()];
    for (index, entry) in then
        .gids
        .iter()
        .enumerate()
        .filter(|(_, entry)| !entry.gid.is_zero())
    {
        let rank = then.gids[..index]
            .iter()
            .filter(|other| other.has_role_of(entry))
            .count();
        let Some(matched) = stand_in(entry, rank, &now.gids) else {
            continue;
        };
        gid_indexes[index] = u8::try_from(matched).unwrap_or(u8::MAX);
        gids.push((
            VirtualGid(entry.gid.0),
            HardwareGid(now.gids[matched].gid.0),
        ));
    }
    PortMap {
        numbers: PortNumbers {
            port: then.number as u8,
            lid: (VirtualLid(then.lid as u16), HardwareLid(now.lid)),
            gids,
        },
        table_length: i32::try_from(then.gids.len()).unwrap_or(i32::MAX),
        gid_indexes,
        now: now.clone(),
    }
}

/// The same address if it is there; else the entry of the same rank among those of its type and role; else the first.
fn stand_in(entry: &GidEntry, rank: usize, table: &[GidEntry]) -> Option<usize> {
    let same = |other: &GidEntry| other.gid == entry.gid && other.gid_type == entry.gid_type;
    let alike = || {
        table
            .iter()
            .enumerate()
            .filter(|(_, other)| other.has_role_of(entry))
            .map(|(index, _)| index)
    };
    table
        .iter()
        .position(same)
        .or_else(|| alike().nth(rank))
        .or_else(|| alike().next())
}

impl Context {
    /// The GID index to use now for one that the application names.
    pub(crate) fn hardware_gid_index(&self, port: u8, index: u8) -> u8 {
        let ports = lock(&self.ports);
        let known = ports.iter().find(|known| known.numbers.port == port);
        known
            .and_then(|known| known.gid_indexes.get(usize::from(index)).copied())
            .unwrap_or(index)
    }

    /// log2 of the largest path MTU of a port, in bytes.
    pub(crate) fn largest_mtu(&self, port: u8) -> u8 {
        lock(&self.ports)
            .iter()
            .find(|known| known.numbers.port == port)
            .map_or(12, |known| known.now.mtu)
    }

    /// The address and number of a queue pair in RESET, which answers nobody.
    pub(crate) fn dead_end(&self, vector: &ibv_ah_attr) -> Verb<(ibv_ah_attr, HardwareQpn)> {
        let address = self.to_itself(vector)?;
        let mut dead_end = lock(&self.dead_end);
        if dead_end.is_none() {
            *dead_end = Some(OwnPair::new(self)?);
        }
        let number = dead_end.as_ref().map(OwnPair::number);
        Ok((address, number.ok_or(Errno::INVALID)?))
    }

    /// The address vector that leads from a port to itself. The port and the source address are those of an application's
    /// vector.
    ///
    /// # Errors
    /// What the device answers.
    pub(super) fn to_itself(&self, vector: &ibv_ah_attr) -> Verb<ibv_ah_attr> {
        let port = vector.port_num;
        let known = lock(&self.ports)
            .iter()
            .find(|known| known.numbers.port == port)
            .map(|known| known.now.clone());
        let now = match known {
            Some(now) => now,
            None => ports_now(self, &[port])?.pop().ok_or(Errno::INVALID)?,
        };
        let mut own = *vector;
        own.grh.sgid_index = self.hardware_gid_index(port, vector.grh.sgid_index);
        let gid = now.gids.get(usize::from(own.grh.sgid_index));
        own.grh.dgid.raw = gid.map(|entry| entry.gid.0).unwrap_or_default();
        own.dlid = now.lid;
        Ok(own)
    }

    /// Where the private device tree of this context is written.
    pub(crate) fn tree_folder(&self) -> Verb<PathBuf> {
        let runtime = crate::control::socket::runtime_dir().map_err(|error| {
            tracing::error!(%error, "no folder for the device tree");
            Errno::IO
        })?;
        Ok(runtime.join(format!("{}.sys", std::process::id())))
    }
}

#[cfg(test)]
mod tests {
    use kmod_compat::ports::{
        Gid, GidEntry, GidType, LinkLayer, PhysicalState, PortFacts, PortState,
    };

    use super::{PortNow, map_port};

    fn now(port: PortFacts) -> PortNow {
        PortNow {
            lid: 0,
            mtu: 10,
            gids: port.gids,
        }
    }

    fn entry(text: &str, gid_type: GidType) -> GidEntry {
        let address: std::net::Ipv6Addr = text.parse().unwrap();
        GidEntry {
            gid: Gid(address.octets()),
            gid_type: Some(gid_type),
            network_interface: None,
        }
    }

    fn port(gids: Vec<GidEntry>) -> PortFacts {
        PortFacts {
            number: 1,
            state: PortState::ACTIVE,
            physical_state: PhysicalState(5),
            link_layer: LinkLayer::Ethernet,
            lid: 0,
            lid_mask_count: 0,
            subnet_manager_lid: 0,
            subnet_manager_service_level: 0,
            capability_mask: 0,
            rate: None,
            gids,
            pkeys: vec![0xffff],
        }
    }

    #[test]
    fn gids_are_matched_by_type_and_role_wherever_they_stand() {
        let then = port(vec![
            entry("fe80::1", GidType::RoceV2),
            entry("::ffff:10.77.0.1", GidType::InfinibandOrRoceV1),
            entry("::ffff:10.77.0.1", GidType::RoceV2),
        ]);
        let here = port(vec![
            entry("::ffff:10.99.0.1", GidType::RoceV2),
            entry("::ffff:10.99.0.1", GidType::InfinibandOrRoceV1),
            entry("fe80::9", GidType::RoceV2),
        ]);
        assert_eq!(map_port(&then, &now(here)).gid_indexes, [2, 1, 0]);
    }

    #[test]
    fn an_address_that_is_still_there_stands_for_itself() {
        let table = vec![
            entry("::ffff:10.0.0.1", GidType::RoceV2),
            entry("::ffff:10.0.0.2", GidType::RoceV2),
        ];
        let swapped = vec![table[1].clone(), table[0].clone()];
        assert_eq!(
            map_port(&port(table), &now(port(swapped))).gid_indexes,
            [1, 0]
        );
    }
}
