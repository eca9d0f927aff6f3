//! What the application has set on a queue pair, in its own terms.

use rdma_core_sys::{
    IBV_QP_ACCESS_FLAGS, IBV_QP_ALT_PATH, IBV_QP_AV, IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC,
    IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER, IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT,
    IBV_QP_QKEY, IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE,
    IBV_QP_TIMEOUT, IBV_QPS_RESET, ibv_qp_attr, ibv_qp_cap, ibv_qp_state,
};

use crate::handle::{Psn, VirtualQpn};
use crate::translate::Address;

/// What a reliable connection must be told on its way to ready (IBTA 11.2.5.2, table of required attributes).
pub(in crate::virt) const RC_TO_INIT: u32 =
    IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
pub(in crate::virt) const RC_TO_RTR: u32 =
    UC_TO_RTR | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
pub(in crate::virt) const RC_TO_RTS: u32 =
    UC_TO_RTS | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
/// An unreliable connection is told less.
pub(super) const UC_TO_RTR: u32 =
    IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
pub(super) const UC_TO_RTS: u32 = IBV_QP_STATE | IBV_QP_SQ_PSN;

/// The sum of all successful `ibv_modify_qp`.
#[derive(Clone, Copy)]
pub(super) struct Attributes {
    attr: ibv_qp_attr,
    mask: u32,
    /// The state the application brought it to. The hardware's may be SQE or ERR on its own account.
    pub(super) state: ibv_qp_state,
    /// State of the hardware when it was released, for the rebuild.
    pub(super) released_state: ibv_qp_state,
    /// What a query answers, which may be more than create granted (rxe rounds up): as the first hardware answered.
    pub(super) shown_capacity: Option<ibv_qp_cap>,
    /// The PSN that the rebuilt queue pair starts with, as its peers are told; `None` before the first restart. Stays when the
    /// queue pair is reset: whoever connects to it again has the same table.
    pub(super) fresh_psn: Option<Psn>,
    /// The path MTU below, which may be less than what the application has set.
    pub(super) mtu_below: u32,
    /// Bringing this hardware to its state has begun. Whoever finds that has failed before.
    pub(super) connecting: bool,
    /// Has this hardware been ready to receive? If not, it has executed nothing.
    pub(super) was_ready: bool,
}

impl std::fmt::Debug for Attributes {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Attributes")
            .field("mask", &self.mask)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Default for Attributes {
    fn default() -> Self {
        // SAFETY: plain numbers; zero is what a fresh queue pair has.
        let attr = unsafe { std::mem::zeroed() };
        Self {
            attr,
            mask: 0,
            state: IBV_QPS_RESET,
            released_state: IBV_QPS_RESET,
            shown_capacity: None,
            fresh_psn: None,
            mtu_below: 0,
            connecting: false,
            was_ready: false,
        }
    }
}

macro_rules! merge {
    ($self:ident, $attr:ident, $mask:ident; $($flag:ident => $($field:ident),+;)*) => {
        $(if $mask & $flag != 0 {
            $($self.attr.$field = $attr.$field;)+
        })*
    };
}

impl Attributes {
    pub(super) fn merge(&mut self, attr: &ibv_qp_attr, mask: u32) {
        merge! { self, attr, mask;
            IBV_QP_PKEY_INDEX => pkey_index;
            IBV_QP_PORT => port_num;
            IBV_QP_QKEY => qkey;
            IBV_QP_ACCESS_FLAGS => qp_access_flags;
            IBV_QP_AV => ah_attr;
            IBV_QP_ALT_PATH => alt_ah_attr, alt_pkey_index, alt_port_num, alt_timeout;
            IBV_QP_PATH_MTU => path_mtu;
            IBV_QP_DEST_QPN => dest_qp_num;
            IBV_QP_RQ_PSN => rq_psn;
            IBV_QP_SQ_PSN => sq_psn;
            IBV_QP_MAX_DEST_RD_ATOMIC => max_dest_rd_atomic;
            IBV_QP_MAX_QP_RD_ATOMIC => max_rd_atomic;
            IBV_QP_MIN_RNR_TIMER => min_rnr_timer;
            IBV_QP_TIMEOUT => timeout;
            IBV_QP_RETRY_CNT => retry_cnt;
            IBV_QP_RNR_RETRY => rnr_retry;
        }
        self.mask |= mask;
        if mask & IBV_QP_STATE != 0 {
            self.state = attr.qp_state;
        }
    }

    /// The queue pair was reset.
    pub(super) fn forget(&mut self) {
        *self = Self {
            shown_capacity: self.shown_capacity,
            fresh_psn: self.fresh_psn,
            was_ready: self.was_ready,
            ..Self::default()
        };
    }

    /// Everything set so far, and which of it was.
    pub(super) fn all(&self) -> (ibv_qp_attr, u32) {
        (self.attr, self.mask)
    }

    /// Puts what the application knows into the answer of a query.
    pub(super) fn show(&self, attr: &mut ibv_qp_attr) {
        let known = &self.attr;
        if self.mask & IBV_QP_AV != 0 {
            attr.ah_attr = known.ah_attr;
        }
        if self.mask & IBV_QP_DEST_QPN != 0 {
            attr.dest_qp_num = known.dest_qp_num;
        }
        if self.mask & IBV_QP_PATH_MTU != 0 {
            attr.path_mtu = known.path_mtu;
        }
        if self.mask & IBV_QP_PORT != 0 {
            attr.port_num = known.port_num;
        }
        if self.mask & IBV_QP_PKEY_INDEX != 0 {
            attr.pkey_index = known.pkey_index;
        }
        if self.mask & IBV_QP_SQ_PSN != 0 {
            attr.sq_psn = known.sq_psn;
        }
        if self.mask & IBV_QP_RQ_PSN != 0 {
            attr.rq_psn = known.rq_psn;
        }
    }

    pub(super) fn port(&self) -> u8 {
        self.attr.port_num
    }

    /// Where the peer is, once the queue pair has been told.
    pub(super) fn peer(&self) -> Option<(Address, VirtualQpn)> {
        (self.mask & IBV_QP_DEST_QPN != 0).then(|| {
            let address = crate::virt::address_handle::address_of(&self.attr.ah_attr);
            (address, VirtualQpn(self.attr.dest_qp_num))
        })
    }

    /// The path MTU that the application has set, as log2 of bytes; `None` before it is connected.
    pub(super) fn mtu(&self) -> Option<u8> {
        (self.mask & IBV_QP_PATH_MTU != 0).then(|| mtu_bits(self.attr.path_mtu))
    }
}

/// log2 of the bytes of an `enum ibv_mtu`, which counts from 256 bytes, log2 8, as 1.
pub(super) fn mtu_bits(mtu: u32) -> u8 {
    mtu.clamp(1, 5) as u8 + 7
}

/// The opposite of [`mtu_bits`].
pub(super) fn path_mtu(bits: u8) -> u32 {
    u32::from(bits.clamp(8, 12) - 7)
}
