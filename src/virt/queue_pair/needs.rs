//! What a queue pair asks of its device.

use rdma_core_sys::{
    IBV_ACCESS_REMOTE_ATOMIC, IBV_QP_ACCESS_FLAGS, IBV_QP_AV, IBV_QP_MAX_DEST_RD_ATOMIC,
    IBV_QP_MAX_QP_RD_ATOMIC,
};

use super::QueuePair;
use crate::control::needs::QueuePairNeeds;
use crate::virt::process::lock;

impl QueuePair {
    pub(crate) fn needs(&self) -> QueuePairNeeds {
        let (attr, mask) = lock(&self.attributes).all();
        // Beside a shared receive queue the numbers mean nothing (IBTA 10.2.9.1).
        let own_receives = |number| if self.shared.is_null() { number } else { 0 };
        let set = |flag, value| if mask & flag == 0 { 0 } else { value };
        QueuePairNeeds {
            transport: self.transport().into(),
            send_requests: self.capacity.max_send_wr,
            receive_requests: own_receives(self.capacity.max_recv_wr),
            send_elements: self.capacity.max_send_sge,
            receive_elements: own_receives(self.capacity.max_recv_sge),
            inline_bytes: self.capacity.max_inline_data,
            reads_asked: set(IBV_QP_MAX_QP_RD_ATOMIC, attr.max_rd_atomic),
            reads_answered: set(IBV_QP_MAX_DEST_RD_ATOMIC, attr.max_dest_rd_atomic),
        }
    }

    /// Do peers' atomics come in?
    pub(crate) fn lets_atomics_in(&self) -> bool {
        let (attr, mask) = lock(&self.attributes).all();
        mask & IBV_QP_ACCESS_FLAGS != 0 && attr.qp_access_flags & IBV_ACCESS_REMOTE_ATOMIC != 0
    }

    /// Port and index of the address that packets leave from, where the application has named one.
    pub(crate) fn source(&self) -> Option<(u8, u8)> {
        let (attr, mask) = lock(&self.attributes).all();
        let vector = &attr.ah_attr;
        (mask & IBV_QP_AV != 0 && vector.is_global != 0)
            .then_some((vector.port_num, vector.grh.sgid_index))
    }
}
