//! Queue pairs.

mod address;
mod attributes;
pub mod builder;
mod datagram;
mod doorbell;
mod executed;
mod hardware;
mod multicast;
mod needs;
mod post;
mod post_general;
mod send_queue;
mod settle;

pub(crate) use address::{leads_to_a_port, translate_address};
pub(super) use attributes::{RC_TO_INIT, RC_TO_RTR, RC_TO_RTS};
pub(crate) use datagram::rewrite_datagram;
pub use multicast::{attach, detach};
pub use post::{post_receive, post_send};
pub(crate) use settle::Fate;

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rdma_core_sys::{
    IBV_QP_CAP, IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP, IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD,
    IBV_QP_EX_WITH_BIND_MW, IBV_QP_EX_WITH_LOCAL_INV, IBV_QP_EX_WITH_RDMA_READ,
    IBV_QP_EX_WITH_RDMA_WRITE, IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM, IBV_QP_EX_WITH_SEND,
    IBV_QP_EX_WITH_SEND_WITH_IMM, IBV_QP_EX_WITH_SEND_WITH_INV, IBV_QP_INIT_ATTR_CREATE_FLAGS,
    IBV_QP_INIT_ATTR_PD, IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, IBV_QP_PATH_MTU, IBV_QP_STATE,
    IBV_QPS_INIT, IBV_QPS_RESET, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD,
    ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_qp_init_attr_ex, ibv_qp_type,
};

use self::attributes::Attributes;
pub(crate) use self::hardware::{Connected, hardware_post_send};
use self::multicast::Group;
use self::send_queue::SendQueue;
use super::AppQp;
use super::channel::wait_until_acknowledged;
use super::completion_queue::CompletionQueue;
use super::context::Context;
use super::ports::PortMap;
use super::process::{Registered, lock, process};
use super::protection_domain::ProtectionDomain;
use super::receive_queue::ReceiveQueue;
use super::shared_receive_queue::SharedReceiveQueue;
use crate::errno::{Errno, Verb};
use crate::handle::{HardwareQpn, Psn, VirtualQpn};

/// A queue pair; the application's object is its first field.
#[derive(Debug)]
#[repr(C)]
pub struct QueuePair {
    app: AppQp,
    send: SendQueue,
    receive: ReceiveQueue,
    pub(crate) context: Arc<Context>,
    domain: *const ProtectionDomain,
    pub(crate) send_completions: *const CompletionQueue,
    pub(crate) receive_completions: *const CompletionQueue,
    shared: *const SharedReceiveQueue,
    kind: ibv_qp_type,
    signal_all: bool,
    /// `None` for one that was made with `ibv_create_qp`.
    extended: Option<Extended>,
    number: VirtualQpn,
    hardware: AtomicPtr<ibv_qp>,
    /// What was granted.
    capacity: ibv_qp_cap,
    attributes: Mutex<Attributes>,
    /// Multicast groups that it is attached to.
    groups: Mutex<Vec<Group>>,
    /// Asynchronous events written for it. Changed under `Process::events` only.
    pub(crate) delivered: AtomicU32,
    index: AtomicUsize,
}

/// What an extended queue pair was made with besides.
#[derive(Clone, Copy, Debug)]
struct Extended {
    comp_mask: u32,
    create_flags: u32,
    send_ops: u64,
}

// SAFETY: the pointers are only followed under the gate, which keeps what they point at; the queues have their locks.
unsafe impl Sync for QueuePair {}

/// `ibv_create_qp`.
///
/// # Safety
/// `pd` and the queues in `init` must come from us. The capacities are updated to what was granted.
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` for a transport that is not RC, UC or UD.
pub unsafe fn create(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> Verb<*mut ibv_qp> {
    // SAFETY: as the caller vouches.
    unsafe { make(pd, &mut *init, None) }
}

/// The operations that can be logged.
const SEND_OPS: u32 = IBV_QP_EX_WITH_RDMA_WRITE
    | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | IBV_QP_EX_WITH_SEND
    | IBV_QP_EX_WITH_SEND_WITH_IMM
    | IBV_QP_EX_WITH_RDMA_READ
    | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD
    | IBV_QP_EX_WITH_LOCAL_INV
    | IBV_QP_EX_WITH_BIND_MW
    | IBV_QP_EX_WITH_SEND_WITH_INV;

/// `ibv_create_qp_ex`. The functions of the object are left to the caller.
///
/// # Safety
/// What `init` names must come from us. The capacities are updated to what was granted.
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` for what is not in docs/verbs.md.
pub unsafe fn create_extended(init: &mut ibv_qp_init_attr_ex) -> Verb<*mut ibv_qp> {
    let known =
        IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
    let mask = init.comp_mask;
    let send_ops = match mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS {
        0 => 0,
        _ => init.send_ops_flags,
    };
    if mask & !known != 0 || send_ops & !u64::from(SEND_OPS) != 0 {
        return Err(Errno::NOT_SUPPORTED);
    }
    if mask & IBV_QP_INIT_ATTR_PD == 0 {
        return Err(Errno::INVALID);
    }
    let extended = Extended {
        comp_mask: mask,
        create_flags: init.create_flags,
        send_ops,
    };
    let pd = init.pd;
    // SAFETY: as the caller vouches. It begins with the fields of the other, in their order.
    unsafe {
        let init = &mut *ptr::from_mut(init).cast::<ibv_qp_init_attr>();
        make(pd, init, Some(extended))
    }
}

/// Makes a queue pair of either kind.
unsafe fn make(
    pd: *mut ibv_pd,
    init: &mut ibv_qp_init_attr,
    extended: Option<Extended>,
) -> Verb<*mut ibv_qp> {
    // SAFETY: as the caller vouches.
    let domain = unsafe { ProtectionDomain::of(pd) };
    let _inside = domain.context.enter()?;
    if ![IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD].contains(&init.qp_type) {
        return Err(Errno::NOT_SUPPORTED);
    }
    if init.send_cq.is_null() || init.recv_cq.is_null() {
        return Err(Errno::INVALID);
    }
    let context = Arc::clone(&domain.context);
    // SAFETY: as the caller vouches.
    let mut pair = unsafe {
        Box::new(QueuePair {
            app: AppQp::default(),
            send: SendQueue::new(init.qp_type),
            receive: ReceiveQueue::default(),
            context: Arc::clone(&context),
            domain,
            send_completions: CompletionQueue::of(init.send_cq),
            receive_completions: CompletionQueue::of(init.recv_cq),
            shared: init.srq.cast(),
            kind: init.qp_type,
            signal_all: init.sq_sig_all != 0,
            extended,
            number: VirtualQpn(0),
            hardware: AtomicPtr::default(),
            capacity: init.cap,
            attributes: Mutex::default(),
            groups: Mutex::default(),
            delivered: AtomicU32::new(0),
            index: AtomicUsize::new(0),
        })
    };
    pair.create_hardware(|number| collides(&context, number))?;
    init.cap = pair.capacity;
    pair.number = VirtualQpn(pair.hardware_number().map_or(0, |number| number.0));
    // SAFETY: the hardware's object was made just now; `app` is ours until it is returned.
    unsafe {
        let public = &mut pair.app.public;
        public.context = context.app();
        public.qp_context = init.qp_context;
        public.pd = pd;
        public.send_cq = init.send_cq;
        public.recv_cq = init.recv_cq;
        public.srq = init.srq;
        public.handle = (*pair.hardware.load(Ordering::Relaxed)).handle;
        public.qp_num = pair.number.0;
        public.state = IBV_QPS_RESET;
        public.qp_type = init.qp_type;
        libc::pthread_mutex_init(&raw mut public.mutex, std::ptr::null());
        libc::pthread_cond_init(&raw mut public.cond, std::ptr::null());
    }
    let pair = Box::leak(pair);
    let index = context
        .objects()
        .queue_pairs
        .insert(Registered((&*pair).into()));
    pair.index.store(index, Ordering::Relaxed);
    Ok(pair.app())
}

/// Is a fresh number one by which a queue pair of this device is known in the job, to the applications or to the hardware? It must
/// not be handed out again before the next restart, as peers keep their tables until then, also of queue pairs that are gone.
fn collides(context: &Context, number: HardwareQpn) -> bool {
    process().directory().is_some_and(|directory| {
        let ports = lock(&context.ports);
        ports.iter().flat_map(PortMap::addresses).any(|address| {
            directory.peer(address, VirtualQpn(number.0)).is_some()
                || directory.has_hardware_at(address, number)
        })
    })
}

/// `ibv_destroy_qp`: waits, as the hardware's does, until every event that was handed out is acknowledged.
///
/// # Safety
/// `app` must come from [`create`] and not be used after success.
///
/// # Errors
/// What the device answers.
pub unsafe fn destroy(app: *mut ibv_qp) -> Verb<()> {
    // SAFETY: as the caller vouches.
    let pair = unsafe { QueuePair::of(app) };
    let delivered = {
        let _inside = pair.context.enter()?;
        let _events = process().events();
        // SAFETY: the device's own; null only if a rebuild could not make it.
        unsafe {
            if !pair.hardware().is_null() {
                Errno::check((pair.context.verbs.ibv_destroy_qp)(pair.hardware()))?;
            }
        }
        pair.context
            .objects()
            .queue_pairs
            .remove(pair.index.load(Ordering::Relaxed));
        if lock(&pair.attributes).state != IBV_QPS_RESET {
            // Completions that the hardware still holds name entries of the logs that are about to go.
            pair.each_completion_queue(|queue| {
                queue.drain(|_| false);
            });
        }
        let unread = purge_events(&pair.context, app.expose_provenance());
        pair.delivered.load(Ordering::Relaxed).wrapping_sub(unread)
    };
    // SAFETY: initialized in `create`; `ibv_ack_async_event` uses both.
    unsafe {
        wait_until_acknowledged(
            &raw mut (*app).mutex,
            &raw mut (*app).cond,
            &raw const (*app).events_completed,
            delivered,
        );
        drop(Box::from_raw(app.cast::<QueuePair>()));
    }
    Ok(())
}

/// Takes back the unread asynchronous events that name an object; gives their number.
pub(crate) fn purge_events(context: &Context, object: usize) -> u32 {
    let name = (object as u64).to_ne_bytes();
    context.events.purge(|event| event.starts_with(&name))
}

/// `ibv_query_qp`.
///
/// # Safety
/// `app` must come from [`create`]; `attr` and `init` must be valid for writes.
///
/// # Errors
/// What the device answers.
pub unsafe fn query(
    app: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    mask: i32,
    init: *mut ibv_qp_init_attr,
) -> Verb<()> {
    // SAFETY: as the caller vouches; the gate is held, so the hardware is there.
    unsafe {
        let pair = QueuePair::of(app);
        let _inside = pair.context.enter()?;
        Errno::check((pair.context.verbs.ibv_query_qp)(
            pair.hardware(),
            attr,
            mask,
            init,
        ))?;
        let attributes = lock(&pair.attributes);
        if process().translates() {
            attributes.show(&mut *attr);
        }
        // What the first hardware answered. A queue pair that was never released still has it.
        let capacity = attributes.shown_capacity.unwrap_or((*init).cap);
        drop(attributes);
        (*attr).cap = capacity;
        let public = &*app;
        *init = ibv_qp_init_attr {
            qp_context: public.qp_context,
            send_cq: public.send_cq,
            recv_cq: public.recv_cq,
            srq: public.srq,
            cap: capacity,
            qp_type: pair.kind,
            sq_sig_all: i32::from(pair.signal_all),
        };
    }
    Ok(())
}

/// `ibv_modify_qp`.
///
/// # Safety
/// `app` must come from [`create`]; `attr` must be valid for what `mask` names.
///
/// # Errors
/// What the device answers; `EOPNOTSUPP` for changing the capacities.
pub unsafe fn modify(app: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: i32) -> Verb<()> {
    // SAFETY: as the caller vouches; the gate is held, so the hardware is there.
    unsafe {
        let pair = QueuePair::of(app);
        let _inside = pair.context.enter()?;
        if mask as u32 & IBV_QP_CAP != 0 {
            return Err(Errno::NOT_SUPPORTED);
        }
        let wanted = &*attr;
        if mask as u32 & IBV_QP_STATE != 0 && wanted.qp_state == IBV_QPS_INIT {
            pair.allocate_logs()?;
        }
        if mask as u32 & IBV_QP_STATE != 0 && wanted.qp_state == IBV_QPS_RTR {
            pair.receive.start_counting();
        }
        let mut translated = pair.translate_attributes(wanted, mask as u32)?;
        Errno::check((pair.context.verbs.ibv_modify_qp)(
            pair.hardware(),
            &raw mut translated,
            mask,
        ))?;
        pair.modified(wanted, &translated, mask as u32);
    }
    Ok(())
}

impl QueuePair {
    /// # Safety
    /// `app` must come from [`create`] and not be destroyed while the reference is used.
    #[inline(always)]
    pub(crate) unsafe fn of<'a>(app: *mut ibv_qp) -> &'a Self {
        // SAFETY: as the caller vouches; `app` is the first field.
        unsafe { &*app.cast::<Self>() }
    }

    pub(crate) fn app(&self) -> *mut ibv_qp {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    #[must_use]
    pub fn number(&self) -> VirtualQpn {
        self.number
    }

    /// The hardware's queue pair; null while released.
    pub(crate) fn hardware(&self) -> *mut ibv_qp {
        self.hardware.load(Ordering::Acquire)
    }

    #[must_use]
    pub fn hardware_number(&self) -> Option<HardwareQpn> {
        // SAFETY: null or the device's own, alive under the gate.
        unsafe { self.hardware().as_ref() }.map(|pair| HardwareQpn(pair.qp_num))
    }

    pub(crate) fn is_datagram(&self) -> bool {
        self.kind == IBV_QPT_UD
    }

    pub(crate) fn is_reliable(&self) -> bool {
        self.kind == IBV_QPT_RC
    }

    #[must_use]
    pub fn transport(&self) -> &'static str {
        match self.kind {
            IBV_QPT_RC => "RC",
            IBV_QPT_UC => "UC",
            _ => "UD",
        }
    }

    pub(crate) fn each_completion_queue(&self, mut visit: impl FnMut(&CompletionQueue)) {
        // SAFETY: completion queues outlive the queue pairs that use them (`EBUSY`), and the gate is held or closed.
        unsafe {
            visit(&*self.send_completions);
            if self.send_completions != self.receive_completions {
                visit(&*self.receive_completions);
            }
        }
    }

    fn owner(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// Logs are made when the queue pair leaves RESET: many are created only to learn what the device can do.
    fn allocate_logs(&self) -> Verb<()> {
        let capacity = &self.capacity;
        self.send.allocate(capacity, self.owner())?;
        if self.shared.is_null() {
            self.receive
                .allocate(capacity.max_recv_wr, capacity.max_recv_sge, self.owner())?;
            self.attach_receive_queue()?;
        }
        self.attach_send_queue()
    }

    /// The application's change took place: keep it for the next rebuild. `below` is what the hardware was told.
    fn modified(&self, attr: &ibv_qp_attr, below: &ibv_qp_attr, mask: u32) {
        let mut attributes = lock(&self.attributes);
        attributes.merge(attr, mask);
        if mask & IBV_QP_PATH_MTU != 0 {
            attributes.mtu_below = below.path_mtu;
        }
        if mask & IBV_QP_STATE == 0 {
            return;
        }
        match attr.qp_state {
            IBV_QPS_RESET => {
                // Completions that the hardware still holds name entries that are about to be used anew.
                self.each_completion_queue(|queue| {
                    queue.drain(|_| false);
                });
                self.send.forget_all();
                self.receive.forget_all();
                attributes.forget();
            }
            IBV_QPS_RTS if mask & rdma_core_sys::IBV_QP_SQ_PSN != 0 => {
                let mtu = 1 << attributes::mtu_bits(attributes.mtu_below);
                self.send.start(Psn(0).advance(below.sq_psn), mtu);
            }
            IBV_QPS_RTR => {
                attributes.was_ready = true;
                self.learn_peer(&attributes);
                self.choose_counting(&attributes);
            }
            _ => {}
        }
    }
}
