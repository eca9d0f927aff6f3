//! What a device has to know of requests and completions.

use rdma_core_sys::{
    IBV_QPT_RC, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE,
    IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, ibv_qp_type, ibv_sge, ibv_wc,
};

/// Has a transport this operation?
pub(crate) fn is_offered(kind: ibv_qp_type, opcode: u32) -> bool {
    kind == IBV_QPT_RC || [IBV_WR_SEND, IBV_WR_SEND_WITH_IMM].contains(&opcode)
}

/// `ibv_post_send(3)`: inline data is for SEND and WRITE.
#[must_use]
pub fn takes_inline(opcode: u32) -> bool {
    [
        IBV_WR_SEND,
        IBV_WR_SEND_WITH_IMM,
        IBV_WR_RDMA_WRITE,
        IBV_WR_RDMA_WRITE_WITH_IMM,
    ]
    .contains(&opcode)
}

pub(crate) fn brings_back(opcode: u32) -> bool {
    opcode == IBV_WR_RDMA_READ || opcode >= IBV_WR_ATOMIC_CMP_AND_SWP
}

/// # Safety
/// `list` must have `count` elements that live as long as they are used.
pub(crate) unsafe fn elements<'a>(list: *const ibv_sge, count: i32) -> &'a [ibv_sge] {
    match usize::try_from(count) {
        Err(_) | Ok(0) => &[],
        // SAFETY: as the caller vouches.
        Ok(count) => unsafe { std::slice::from_raw_parts(list, count) },
    }
}

/// # Safety
/// The memory must be readable.
pub(crate) unsafe fn gather(elements: &[ibv_sge]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for element in elements {
        let from = std::ptr::with_exposed_provenance::<u8>(element.addr as usize);
        for index in 0..element.length as usize {
            // SAFETY: as the caller vouches.
            bytes.push(unsafe { from.add(index).read() });
        }
    }
    bytes
}

pub(crate) fn completion(wr_id: u64, status: u32, opcode: u32, qp_num: u32) -> ibv_wc {
    // SAFETY: zero is a valid completion.
    let mut completion: ibv_wc = unsafe { std::mem::zeroed() };
    completion.wr_id = wr_id;
    completion.status = status;
    completion.opcode = opcode;
    completion.qp_num = qp_num;
    completion
}
