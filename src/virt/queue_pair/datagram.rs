//! Received datagrams, after a restart: sender and addresses as the application knows them.
//!
//! The first 40 bytes of the buffer are the GRH (IBTA 11.4.1.1). With RoCE v2 over IPv4 its last 20 bytes are the IPv4 header
//! and the first 20 mean nothing (annex A17).

use rdma_core_sys::{IBV_WC_GRH, ibv_wc};

use crate::handle::{HardwareGid, HardwareLid, HardwareQpn, VirtualGid, VirtualLid};
use crate::log::{ReceiveSlot, SlotHead};
use crate::translate::{Address, Directory};
use crate::virt::process::process;

const GRH_BYTES: usize = 40;
const IPV4_AT: usize = 20;

/// Puts sender and addresses of a received datagram into the application's terms.
///
/// # Safety
/// `head` must be that of the receive it completed, not retired yet.
pub(crate) unsafe fn rewrite_datagram(completion: &mut ibv_wc, head: &SlotHead) {
    let Some(directory) = process().directory() else {
        return;
    };
    let mut source = None;
    if completion.wc_flags & IBV_WC_GRH != 0 {
        // SAFETY: the entry is not retired, so its elements are those of this receive, whose memory the device has just
        // written: at least the GRH, as the completion says.
        let mut header = unsafe { GrhBytes::read(head) };
        source = rewrite_grh(&mut header.bytes, &directory).map(Address::Gid);
        // SAFETY: as above.
        unsafe { header.write_back(head) };
    }
    let lid = directory.lid_back(HardwareLid(completion.slid));
    if let Some(VirtualLid(lid)) = lid {
        completion.slid = lid;
    }
    if let Some(address) = source.or(lid.map(Address::Lid)) {
        completion.src_qp = directory
            .qpn_back(address, HardwareQpn(completion.src_qp))
            .0;
    }
}

/// Puts the job's GIDs into a GRH; gives that of the sender.
fn rewrite_grh(grh: &mut [u8; GRH_BYTES], directory: &Directory) -> Option<VirtualGid> {
    if grh[0] >> 4 != 6 && grh[IPV4_AT] >> 4 == 4 {
        let source = rewrite_ipv4(grh, 32, directory);
        rewrite_ipv4(grh, 36, directory);
        let header: [u8; 20] = std::array::from_fn(|index| grh[IPV4_AT + index]);
        grh[30..32].copy_from_slice(&ipv4_checksum(&header).to_be_bytes());
        return source;
    }
    let source = rewrite_gid(grh, 8, directory);
    rewrite_gid(grh, 24, directory);
    source
}

fn rewrite_gid(grh: &mut [u8; GRH_BYTES], at: usize, directory: &Directory) -> Option<VirtualGid> {
    let gid = directory.gid_back(HardwareGid(std::array::from_fn(|index| grh[at + index])))?;
    grh[at..at + 16].copy_from_slice(&gid.0);
    Some(gid)
}

fn rewrite_ipv4(grh: &mut [u8; GRH_BYTES], at: usize, directory: &Directory) -> Option<VirtualGid> {
    let mut mapped = [0; 16];
    mapped[10..12].copy_from_slice(&[0xff, 0xff]);
    mapped[12..].copy_from_slice(&grh[at..at + 4]);
    let gid = directory.gid_back(HardwareGid(mapped))?;
    if gid.0[..12] == mapped[..12] {
        grh[at..at + 4].copy_from_slice(&gid.0[12..]);
    }
    Some(gid)
}

/// RFC 791: the ones' complement sum of the header, its own field taken as zero.
fn ipv4_checksum(header: &[u8; 20]) -> u16 {
    let words = header
        .chunks_exact(2)
        .enumerate()
        .filter(|(index, _)| *index != 5);
    let sum: u32 = words
        .map(|(_, word)| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) as u16 + (folded >> 16) as u16)
}

/// The GRH, gathered from the elements of a receive.
struct GrhBytes {
    bytes: [u8; GRH_BYTES],
}

impl GrhBytes {
    unsafe fn read(head: &SlotHead) -> Self {
        let mut bytes = [0; GRH_BYTES];
        // SAFETY: as the caller vouches.
        unsafe {
            each_part(head, |at, part, length| {
                bytes[at..at + length].as_mut_ptr().copy_from(part, length)
            })
        };
        Self { bytes }
    }

    unsafe fn write_back(&self, head: &SlotHead) {
        // SAFETY: as the caller vouches.
        unsafe {
            each_part(head, |at, part, length| {
                part.copy_from(self.bytes[at..at + length].as_ptr(), length)
            })
        };
    }
}

/// Visits the memory of the first 40 bytes of a receive, element by element.
unsafe fn each_part(head: &SlotHead, mut visit: impl FnMut(usize, *mut u8, usize)) {
    // SAFETY: the head is that of a receive entry.
    let slot = unsafe { &*ReceiveSlot::of(head) };
    let mut at = 0;
    for element in slot.elements() {
        let length = (element.length as usize).min(GRH_BYTES - at);
        visit(
            at,
            std::ptr::with_exposed_provenance_mut(element.addr as usize),
            length,
        );
        at += length;
    }
}

#[cfg(test)]
mod tests {
    use super::{GRH_BYTES, ipv4_checksum, rewrite_grh};
    use crate::control::message::{ContextNumbers, PortNumbers, ProcessNumbers};
    use crate::handle::{HardwareGid, HardwareLid, VirtualGid, VirtualLid};
    use crate::translate::Directory;

    fn mapped(last: u8, net: u8) -> [u8; 16] {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, net, 0, last]
    }

    fn directory() -> Directory {
        let port = |last| PortNumbers {
            port: 1,
            lid: (VirtualLid(0), HardwareLid(0)),
            gids: vec![(VirtualGid(mapped(last, 77)), HardwareGid(mapped(last, 99)))],
        };
        let context = |last| ContextNumbers {
            device: "rxe0".into(),
            hardware_device: "rdma9".into(),
            ports: vec![port(last)],
            queue_pairs: Vec::new(),
            rkeys: Vec::new(),
        };
        Directory::new(&[ProcessNumbers {
            pid: 1,
            contexts: vec![context(1), context(2)],
        }])
    }

    #[test]
    fn an_ipv4_header_gets_the_old_addresses_and_a_valid_checksum() {
        let mut grh = [0; GRH_BYTES];
        grh[20..40].copy_from_slice(&[
            0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 99, 0, 1, 10, 99, 0, 2,
        ]);
        assert_eq!(
            rewrite_grh(&mut grh, &directory()),
            Some(VirtualGid(mapped(1, 77)))
        );
        assert_eq!(grh[32..40], [10, 77, 0, 1, 10, 77, 0, 2]);
        let words = grh[20..40]
            .chunks(2)
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        let sum: u32 = words.sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn the_checksum_is_that_of_a_known_header() {
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
            0xc7,
        ];
        assert_eq!(ipv4_checksum(&header), 0xb861);
    }

    #[test]
    fn a_full_grh_gets_both_gids() {
        let mut grh = [0; GRH_BYTES];
        grh[0] = 0x60;
        grh[8..24].copy_from_slice(&mapped(2, 99));
        grh[24..40].copy_from_slice(&mapped(1, 99));
        assert_eq!(
            rewrite_grh(&mut grh, &directory()),
            Some(VirtualGid(mapped(2, 77)))
        );
        assert_eq!(grh[24..40], mapped(1, 77));
    }
}
