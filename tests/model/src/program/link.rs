//! Two queue pairs that speak with each other.

use std::collections::VecDeque;
use std::ffi::c_int;

use rdma_core_sys::{
    IBV_ACCESS_REMOTE_ATOMIC, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE, IBV_MTU_1024,
    IBV_QP_AV, IBV_QP_DEST_QPN, IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_QKEY,
    IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QPS_ERR, IBV_QPS_INIT, IBV_QPS_RTR,
    IBV_QPS_RTS, IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD, ibv_ah, ibv_ah_attr, ibv_cq, ibv_pd, ibv_qp,
    ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_srq,
};
use reverbs::virt::{address_handle, queue_pair};
use reverbs_benches::application::CONNECT;
use reverbs_benches::null_device::GID;

use super::arena::{Arena, SLOT, SLOTS};
use super::builders;
use super::queues::Receives;
use super::{DEPTH, ELEMENTS, INLINE, Operation, TARGETS};

/// What a link's messages travel by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Reliable,
    Unreliable,
    Datagram,
}

/// What a link is like.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub transport: Transport,
    /// Receives come from the queue that all such links of a side share.
    pub shared: bool,
    pub signal_all: bool,
    /// Requests are built with `ibv_wr_*`.
    pub extended: bool,
    /// How far each end gets at first: RESET, INIT, RTR, RTS.
    pub stages: [usize; 2],
}

// An end's memory: message buffers, targets, results, counter and constant bytes.
pub(super) const OUT: usize = 0;
pub(super) const TARGET: usize = OUT + SLOTS * SLOT;
pub(super) const RESULT: usize = TARGET + TARGETS * SLOT;
pub(super) const COUNTER: usize = RESULT + SLOTS * SLOT;
const MEMORY: usize = COUNTER + SLOT;

/// What datagrams name.
pub(super) const QKEY: u32 = 0x1234;
/// The first PSN of each end; the second one's soon go around.
const PSN: [u32; 2] = [100, 0xff_fff0];

/// One end.
#[derive(Debug)]
pub(super) struct End {
    pub(super) pair: *mut ibv_qp,
    pub(super) arena: Arena,
    /// 0 to 3: RESET, INIT, RTR, RTS.
    pub(super) stage: usize,
    pub(super) next: u64,
    /// Posted and not seen to be done.
    pub(super) posted: VecDeque<Operation>,
    /// What the other's counter is, once all that was posted is executed.
    pub(super) counter: u64,
    /// Its own receives.
    pub(super) receives: Receives,
    /// What the other has sent that takes a receive, in order.
    pub(super) due: VecDeque<Operation>,
    /// The last WRITE to each target of the other.
    pub(super) written: [Option<Operation>; TARGETS],
    /// All messages posted, by name.
    pub(super) names: Vec<u64>,
    /// The program has moved it to the error state.
    pub(super) failed: bool,
    /// A checkpoint has: an answer was lost.
    pub(super) broken: bool,
    /// Sends have begun to come back flushed.
    pub(super) flushed: bool,
}

/// Two ends.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) plan: Plan,
    /// No other link of the program has or had it.
    pub(super) serial: u64,
    pub(super) ends: [End; 2],
    /// How each end reaches the other's port.
    pub(super) handle: *mut ibv_ah,
}

/// What the ends of one side have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Below {
    pub(super) domain: *mut ibv_pd,
    pub(super) send_queue: *mut ibv_cq,
    pub(super) receive_queue: *mut ibv_cq,
    pub(super) shared: *mut ibv_srq,
}

impl Link {
    /// # Safety
    /// What is below must come from the virtual device.
    pub(super) unsafe fn new(plan: Plan, serial: u64, below: [Below; 2]) -> Self {
        // SAFETY: as the caller vouches; zero is valid.
        unsafe {
            let mut attr: ibv_ah_attr = std::mem::zeroed();
            attr.is_global = 1;
            attr.port_num = 1;
            attr.grh.dgid.raw = GID;
            Self {
                plan,
                serial,
                ends: below.map(|below| End::new(plan, serial, below)),
                handle: address_handle::create(below[0].domain, &raw mut attr).expect("create_ah"),
            }
        }
    }

    /// An end is in the error state, so the other gets no answers.
    pub(super) fn is_down(&self) -> bool {
        self.ends.iter().any(End::is_down)
    }

    pub(super) fn number(&self, end: usize) -> u32 {
        // SAFETY: the queue pair is there until `destroy`.
        unsafe { (*self.ends[end].pair).qp_num }
    }

    /// Takes an end to the next state, if it has not got to the last.
    pub(super) fn advance(&mut self, end: usize) {
        let stage = self.ends[end].stage;
        if stage == 3 || self.ends[end].is_down() {
            return;
        }
        let (state, mut mask) = CONNECT[stage];
        match (self.plan.transport, state) {
            (Transport::Datagram, IBV_QPS_INIT) => {
                mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY;
            }
            (Transport::Datagram, IBV_QPS_RTR) => mask = IBV_QP_STATE,
            (Transport::Unreliable, IBV_QPS_RTR) => {
                mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
            }
            (Transport::Unreliable | Transport::Datagram, IBV_QPS_RTS) => {
                mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
            }
            _ => {}
        }
        // SAFETY: zero is valid.
        let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = state;
        attr.port_num = 1;
        attr.qkey = QKEY;
        attr.qp_access_flags =
            IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
        attr.path_mtu = IBV_MTU_1024;
        attr.dest_qp_num = self.number(1 - end);
        (attr.sq_psn, attr.rq_psn) = (PSN[end], PSN[1 - end]);
        attr.ah_attr.is_global = 1;
        attr.ah_attr.port_num = 1;
        attr.ah_attr.grh.dgid.raw = GID;
        self.ends[end].modify(&mut attr, mask);
        self.ends[end].stage += 1;
    }

    /// Moves an end to the error state.
    pub(super) fn fail(&mut self, end: usize) {
        // SAFETY: zero is valid.
        let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = IBV_QPS_ERR;
        self.ends[end].modify(&mut attr, IBV_QP_STATE);
        self.ends[end].failed = true;
    }

    /// The rest in the order of use.
    pub(super) fn destroy(&self) {
        // SAFETY: made by `new`; not used any more.
        unsafe {
            for end in &self.ends {
                queue_pair::destroy(end.pair).expect("destroy_qp");
                end.arena.deregister();
                end.receives.arena.deregister();
            }
            address_handle::destroy(self.handle).expect("destroy_ah");
        }
    }
}

impl End {
    unsafe fn new(plan: Plan, serial: u64, below: Below) -> Self {
        let mut init = ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: below.send_queue,
            recv_cq: below.receive_queue,
            srq: match plan.shared {
                true => below.shared,
                false => std::ptr::null_mut(),
            },
            cap: ibv_qp_cap {
                max_send_wr: DEPTH,
                max_recv_wr: DEPTH,
                max_send_sge: ELEMENTS,
                max_recv_sge: 2,
                max_inline_data: INLINE,
            },
            qp_type: match plan.transport {
                Transport::Reliable => IBV_QPT_RC,
                Transport::Unreliable => IBV_QPT_UC,
                Transport::Datagram => IBV_QPT_UD,
            },
            sq_sig_all: i32::from(plan.signal_all),
        };
        // SAFETY: as the caller vouches.
        unsafe {
            let mut arena = Arena::new(below.domain, MEMORY);
            arena.fill(COUNTER + 8, &constant());
            Self {
                pair: match plan.extended {
                    true => builders::create(below.domain, &init),
                    false => queue_pair::create(below.domain, &raw mut init).expect("create_qp"),
                },
                arena,
                stage: 0,
                next: 0,
                posted: VecDeque::new(),
                counter: 0,
                receives: Receives::new(below.domain, serial),
                due: VecDeque::new(),
                written: [None; TARGETS],
                names: Vec::new(),
                failed: false,
                broken: false,
                flushed: false,
            }
        }
    }

    pub(super) fn is_down(&self) -> bool {
        self.failed || self.broken
    }

    fn modify(&self, attr: &mut ibv_qp_attr, mask: u32) {
        // SAFETY: the queue pair is there.
        unsafe { queue_pair::modify(self.pair, attr, mask as c_int).expect("modify_qp") };
    }
}

/// What is behind the counter and never changes.
pub(super) fn constant() -> Vec<u8> {
    (0..SLOT - 8).map(|index| (index * 13) as u8).collect()
}
