//! Addresses in the job's terms and in the hardware's.

use std::sync::Arc;

use rdma_core_sys::{
    IBV_QP_AV, IBV_QP_DEST_QPN, IBV_QP_PATH_MTU, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, ibv_ah_attr,
    ibv_qp_attr,
};

use super::QueuePair;
use super::attributes::{Attributes, mtu_bits, path_mtu};
use crate::errno::{Errno, Verb};
use crate::handle::{VirtualGid, VirtualLid, VirtualQpn};
use crate::translate::{Address, Directory};
use crate::virt::address_handle::address_of;
use crate::virt::context::Context;
use crate::virt::ports;
use crate::virt::process::{lock, process};

/// The address vector that reaches today what this one reached when the application made it. `None` if no process of the
/// job is there: an old address may belong to somebody else by now and is never used as it stands.
pub(crate) fn translate_address(
    context: &Context,
    directory: &Directory,
    attr: &ibv_ah_attr,
) -> Option<ibv_ah_attr> {
    let mut translated = *attr;
    if attr.is_global != 0 {
        // SAFETY: both views of a GID are plain bytes.
        let gid = VirtualGid(unsafe { attr.grh.dgid.raw });
        translated.grh.dgid.raw = if is_multicast(&gid) {
            gid.0
        } else {
            directory.gid(gid).or_else(|| ports::own_gid(gid))?.0
        };
        translated.grh.sgid_index = context.hardware_gid_index(attr.port_num, attr.grh.sgid_index);
    }
    if attr.dlid != 0 && attr.dlid < MULTICAST_LID {
        let lid = VirtualLid(attr.dlid);
        translated.dlid = match directory.lid(lid).or_else(|| ports::own_lid(lid)) {
            Some(lid) => lid.0,
            // RoCE has no LIDs; UCX puts a hash of the address there.
            None if attr.is_global != 0 => attr.dlid,
            None => return None,
        };
    }
    Some(translated)
}

/// Multicast LIDs start here (IBTA 4.1.3).
const MULTICAST_LID: u16 = 0xc000;

/// And not to a multicast group.
pub(crate) fn leads_to_a_port(attr: &ibv_ah_attr) -> bool {
    // SAFETY: both views of a GID are plain bytes.
    let gid = VirtualGid(unsafe { attr.grh.dgid.raw });
    match attr.is_global {
        0 => attr.dlid < MULTICAST_LID,
        _ => !is_multicast(&gid),
    }
}

fn is_multicast(gid: &VirtualGid) -> bool {
    gid.0[0] == 0xff
}

impl QueuePair {
    /// The application's attributes as the hardware must get them.
    ///
    /// A queue pair that was rebuilt before it was connected is known to its peers by the PSN and the MTU that it was given
    /// then. It keeps to them, and it expects the same of a peer that was rebuilt.
    pub(super) fn translate_attributes(&self, attr: &ibv_qp_attr, mask: u32) -> Verb<ibv_qp_attr> {
        let mut translated = *attr;
        let Some(directory) = process().directory() else {
            return Ok(translated);
        };
        let attributes = *lock(&self.attributes);
        let known = attributes.all().0;
        let vector = if mask & IBV_QP_AV != 0 {
            &attr.ah_attr
        } else {
            &known.ah_attr
        };
        if mask & IBV_QP_AV != 0 {
            translated.ah_attr =
                translate_address(&self.context, &directory, vector).ok_or(Errno::INVALID)?;
        }
        if mask & IBV_QP_DEST_QPN != 0 {
            // A number that is in no table is younger than the restart and means itself.
            let peer = directory.peer(address_of(vector), VirtualQpn(attr.dest_qp_num));
            translated.dest_qp_num = peer.map_or(attr.dest_qp_num, |peer| peer.qpn.0);
            if let Some(peer) = peer {
                if mask & IBV_QP_RQ_PSN != 0 {
                    translated.rq_psn = peer.first_psn.0;
                }
                if mask & IBV_QP_PATH_MTU != 0 {
                    let most = self.context.largest_mtu(known.port_num).min(peer.mtu);
                    translated.path_mtu = path_mtu(mtu_bits(attr.path_mtu).min(most));
                }
            }
        }
        if mask & IBV_QP_SQ_PSN != 0
            && let Some(first) = attributes.fresh_psn
        {
            translated.sq_psn = first.0;
        }
        Ok(translated)
    }

    /// Remote keys are the peer's.
    pub(super) fn learn_peer(&self, attributes: &Attributes) {
        let keys = process().directory().and_then(|directory| {
            let (address, qpn) = attributes.peer()?;
            match directory.peer(address, qpn) {
                Some(peer) => Some(Arc::clone(&peer.keys)),
                None => directory.keys_at(address),
            }
        });
        self.send.set_peer_keys(keys);
    }

    /// How this queue pair is addressed: every address of its port.
    pub(crate) fn peer_name(&self) -> Option<(Address, VirtualQpn)> {
        lock(&self.attributes).peer()
    }

    #[must_use]
    pub fn port(&self) -> u8 {
        lock(&self.attributes).port()
    }
}
