//! What all processes of a job learn of each other at a restart.

use std::collections::HashMap;
use std::sync::Arc;

use crate::control::message::ProcessNumbers;
use crate::handle::{
    HardwareGid, HardwareLid, HardwareQpn, Psn, VirtualGid, VirtualKey, VirtualLid, VirtualQpn,
};

use super::KeyTable;

/// How a peer is addressed: by GID where the address vector is global, else by LID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    Gid(VirtualGid),
    Lid(VirtualLid),
}

/// A queue pair of the job, as a peer needs to know it.
#[derive(Clone, Debug)]
pub struct Peer {
    pub qpn: HardwareQpn,
    pub first_psn: Psn,
    /// log2 of the path MTU in bytes.
    pub mtu: u8,
    /// Remote keys of its process and device. One that is not here is younger than the restart and means itself.
    pub keys: Arc<KeyTable>,
}

/// Old and new numbers of the whole job. Never changes; the next restart makes another.
#[derive(Debug, Default)]
pub struct Directory {
    gids: HashMap<VirtualGid, HardwareGid>,
    gids_back: HashMap<HardwareGid, VirtualGid>,
    lids: HashMap<VirtualLid, HardwareLid>,
    lids_back: HashMap<HardwareLid, VirtualLid>,
    peers: HashMap<(Address, VirtualQpn), Peer>,
    qpns: HashMap<Address, Arc<KeyTable>>,
    keys: HashMap<Address, Arc<KeyTable>>,
    qpns_back: HashMap<(Address, HardwareQpn), VirtualQpn>,
}

impl Directory {
    #[must_use]
    pub fn new(processes: &[ProcessNumbers]) -> Self {
        let mut directory = Self::default();
        for context in processes.iter().flat_map(|process| &process.contexts) {
            let keys: Arc<KeyTable> = Arc::new(
                context
                    .rkeys
                    .iter()
                    .map(|(old, new)| (old.0, new.0))
                    .collect(),
            );
            for port in &context.ports {
                for (old, new) in &port.gids {
                    directory.gids.insert(*old, *new);
                    directory.gids_back.insert(*new, *old);
                }
                if port.lid.0.0 != 0 {
                    directory.lids.insert(port.lid.0, port.lid.1);
                    directory.lids_back.insert(port.lid.1, port.lid.0);
                }
                let gids = port.gids.iter().map(|(old, _)| Address::Gid(*old));
                let lid = (port.lid.0.0 != 0).then_some(Address::Lid(port.lid.0));
                for address in gids.chain(lid) {
                    let all = directory.keys.entry(address).or_default();
                    context
                        .rkeys
                        .iter()
                        .for_each(|(old, new)| all.insert(old.0, new.0));
                    let qpns = directory.qpns.entry(address).or_default();
                    for pair in context
                        .queue_pairs
                        .iter()
                        .filter(|pair| pair.port == port.port)
                    {
                        qpns.insert(pair.virtual_qpn.0, pair.hardware_qpn.0);
                        directory
                            .qpns_back
                            .insert((address, pair.hardware_qpn), pair.virtual_qpn);
                        let peer = Peer {
                            qpn: pair.hardware_qpn,
                            first_psn: pair.first_psn,
                            mtu: pair.mtu,
                            keys: Arc::clone(&keys),
                        };
                        directory.peers.insert((address, pair.virtual_qpn), peer);
                    }
                }
            }
        }
        directory
    }

    /// The queue pair that `qpn` at `address` names, if it predates the restart.
    #[must_use]
    pub fn peer(&self, address: Address, qpn: VirtualQpn) -> Option<&Peer> {
        self.peers.get(&(address, qpn))
    }

    /// Where to send what is addressed to a GID; `None` if no process of the job has it. One that only the hardware has is told
    /// by a process that is younger than the restart, and means itself.
    #[must_use]
    pub fn gid(&self, gid: VirtualGid) -> Option<HardwareGid> {
        let as_it_is = HardwareGid(gid.0);
        let known = self.gids.get(&gid).copied();
        known.or_else(|| self.gids_back.contains_key(&as_it_is).then_some(as_it_is))
    }

    /// The GID that the application knows for one that the hardware shows.
    #[must_use]
    pub fn gid_back(&self, gid: HardwareGid) -> Option<VirtualGid> {
        self.gids_back.get(&gid).copied()
    }

    #[must_use]
    pub fn lid(&self, lid: VirtualLid) -> Option<HardwareLid> {
        self.lids.get(&lid).copied()
    }

    #[must_use]
    pub fn lid_back(&self, lid: HardwareLid) -> Option<VirtualLid> {
        self.lids_back.get(&lid).copied()
    }

    /// Queue pair numbers at one address, for datagrams. One that is not in the table is younger than the restart and
    /// means itself.
    #[must_use]
    pub fn qpns_at(&self, address: Address) -> Option<Arc<KeyTable>> {
        self.qpns.get(&address).cloned()
    }

    /// The number under which the application knows the sender of a datagram. One that is not in the table is younger
    /// than the restart and means itself.
    #[must_use]
    pub fn qpn_back(&self, address: Address, qpn: HardwareQpn) -> VirtualQpn {
        self.qpns_back
            .get(&(address, qpn))
            .copied()
            .unwrap_or(VirtualQpn(qpn.0))
    }

    /// Was this the hardware's number of a queue pair of the job at the restart?
    #[must_use]
    pub fn has_hardware_at(&self, address: Address, qpn: HardwareQpn) -> bool {
        self.qpns_back.contains_key(&(address, qpn))
    }

    /// Remote keys of all processes on the device at an address: what a queue pair that is younger than the restart may be
    /// given for memory that is older. One device hands out a key once, and none of these is handed out again
    /// before the next restart.
    #[must_use]
    pub fn keys_at(&self, address: Address) -> Option<Arc<KeyTable>> {
        self.keys.get(&address).cloned()
    }

    /// Is a remote key one that the job knows at an address?
    #[must_use]
    pub fn has_key_at(&self, address: Address, key: VirtualKey) -> bool {
        self.keys
            .get(&address)
            .is_some_and(|keys| keys.get(key.0).is_some())
    }

    /// Virtual remote keys do not come from here: [`Peer::keys`].
    #[must_use]
    pub fn remote_key(peer: &KeyTable, key: VirtualKey) -> u32 {
        peer.get(key.0).unwrap_or(key.0)
    }
}
