//! The send queue of a queue pair: its state, and the gate of its data path.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use rdma_core_sys::{
    IBV_QPT_UD, IBV_WR_BIND_MW, ibv_qp, ibv_qp_cap, ibv_qp_type, ibv_send_wr, ibv_sge,
};

use super::builder::Batch;
use crate::errno::Verb;
use crate::handle::Psn;
use crate::log::{SendRing, SendSlot};
use crate::translate::KeyTable;
use crate::virt::context::Context;
use crate::virt::local_key::LastKey;
use crate::virt::lock::{self, QueueLock};
use crate::virt::process::process;

/// Why a request cannot simply be logged and posted. Zero is the fast path.
pub(super) const HOLD: u32 = 1;
pub(super) const TRANSLATE: u32 = 2;
/// Datagrams name our address handle, the hardware wants its own.
pub(super) const DATAGRAM: u32 = 4;
/// The device below cannot tell how far a responder came, so entries note how many receives of the peer they use up.
pub(super) const COUNTED: u32 = 16;

/// Equals no key: keys have 32 bits.
const NO_KEY: (u64, u32) = (u64::MAX, 0);

/// `ibv_post_send` of the hardware.
pub(crate) type PostSend =
    unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int;

#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct SendQueue {
    pub(super) lock: QueueLock,
    /// Changed under the lock, but for [`lock::WANTED`].
    pub(super) general: AtomicU32,
    pub(super) state: UnsafeCell<State>,
}

#[derive(Debug)]
#[repr(C)]
pub(super) struct State {
    pub(super) hardware: *mut ibv_qp,
    pub(super) post: PostSend,
    /// The request being posted and where to say that it is bad; kept here, not in registers saved on every call.
    pub(super) request: *mut ibv_send_wr,
    pub(super) bad: *mut *mut ibv_send_wr,
    pub(super) ring: SendRing,
    /// The first entry that was held; null if none is.
    pub(super) held_from: *mut SendSlot,
    /// The PSN that the first held request will start with.
    pub(super) held_psn: u32,
    /// Where the count of the peer's receives stood when the connection was made.
    pub(super) counted_from: u32,
    pub(super) capacity: u32,
    /// Room for the elements of one translated request.
    pub(super) elements: Box<[ibv_sge]>,
    /// A translated request of one element, with `sg_list` at `elements` and no next.
    pub(super) copy: ibv_send_wr,
    /// Remote keys of the peer; `None` before the first restart, or for a peer that is younger.
    pub(super) peer_keys: Option<Arc<KeyTable>>,
    /// The translations used last, which the next request most likely needs again.
    pub(super) last_local: LastKey,
    pub(super) last_remote: (u64, u32),
    /// What is being built with `ibv_wr_*`.
    pub(super) batch: Batch,
}

unsafe extern "C" fn refuse(
    _: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: only called by us, with a place for the answer.
    unsafe { *bad = request };
    libc::EINVAL
}

impl SendQueue {
    pub(super) fn new(kind: ibv_qp_type) -> Self {
        let state = State {
            hardware: std::ptr::null_mut(),
            post: refuse,
            request: std::ptr::null_mut(),
            bad: std::ptr::null_mut(),
            ring: SendRing::default(),
            held_from: std::ptr::null_mut(),
            held_psn: 0,
            counted_from: 0,
            capacity: 0,
            elements: Box::default(),
            // SAFETY: zero is a valid request.
            copy: unsafe { std::mem::zeroed() },
            peer_keys: None,
            last_local: LastKey::NONE,
            last_remote: NO_KEY,
            batch: Batch::default(),
        };
        Self {
            lock: QueueLock::default(),
            general: AtomicU32::new(if kind == IBV_QPT_UD { DATAGRAM } else { 0 }),
            state: UnsafeCell::new(state),
        }
    }

    pub(super) fn allocate(&self, capacity: &ibv_qp_cap, owner: *mut c_void) -> Verb<()> {
        self.with(|state| {
            if !state.ring.is_allocated() {
                state.ring = SendRing::new(
                    capacity.max_send_wr,
                    capacity.max_send_sge,
                    capacity.max_inline_data,
                    owner,
                )?;
                state.capacity = capacity.max_send_wr;
                let room = capacity.max_send_sge.max(1) as usize;
                state.elements = vec![
                    ibv_sge {
                        addr: 0,
                        length: 0,
                        lkey: 0
                    };
                    room
                ]
                .into();
                state.copy.sg_list = state.elements.as_mut_ptr();
                if process().translates() {
                    self.general.fetch_or(TRANSLATE, Ordering::Relaxed);
                }
            }
            Ok(())
        })
    }

    pub(super) fn forget_all(&self) {
        self.with(|state| {
            state.ring.forget_all();
            state.held_from = std::ptr::null_mut();
        });
    }

    /// Sending starts at `psn`, in packets of at most `mtu` bytes.
    pub(super) fn start(&self, psn: Psn, mtu: u32) {
        self.with(|state| {
            state.ring.start(psn, mtu);
            state.held_psn = state.ring.raw_psn();
            // SAFETY: what is held is an entry of the ring.
            state.counted_from = unsafe { state.ring.receives_before(state.held_from) };
        });
    }

    /// Whether entries note how many receives of the peer they use up.
    pub(super) fn count_receives(&self, count: bool) {
        self.with(|_| match count {
            true => self.general.fetch_or(COUNTED, Ordering::Relaxed),
            false => self.general.fetch_and(!COUNTED, Ordering::Relaxed),
        });
    }

    pub(super) fn counts_receives(&self) -> bool {
        self.general.load(Ordering::Relaxed) & COUNTED != 0
    }

    pub(super) fn set_peer_keys(&self, keys: Option<Arc<KeyTable>>) {
        self.with(|state| {
            state.peer_keys = keys;
            (state.last_local, state.last_remote) = (LastKey::NONE, NO_KEY);
        });
    }

    pub(super) fn attach(&self, hardware: *mut ibv_qp, post: PostSend) {
        self.with(|state| (state.hardware, state.post) = (hardware, post));
    }

    pub(super) fn detach(&self) {
        self.attach(std::ptr::null_mut(), refuse);
        self.with(|state| {
            for slot in state.ring.outstanding() {
                // SAFETY: an entry of the ring. The window that it names goes with the hardware, or has gone.
                unsafe {
                    if (*slot).wr.opcode == IBV_WR_BIND_MW {
                        (*slot).wr.__bindgen_anon_2.bind_mw.mw = std::ptr::null_mut();
                    }
                }
            }
        });
    }

    /// Closes the gate of this queue: from here on requests are logged and held.
    pub(super) fn close(&self, limit: Instant) -> bool {
        lock::close(&self.lock, &self.general, HOLD, limit, || {
            // SAFETY: the lock is held.
            let state = unsafe { &mut *self.state.get() };
            state.held_psn = state.ring.raw_psn();
        })
    }

    /// Opens it, after what was held went down. If a request cannot be given to the device, `stop` must move the queue pair to
    /// the error state; that request and those after it come back flushed, in order.
    ///
    /// # Errors
    /// Why the first of them was refused.
    pub(super) fn open(&self, context: &Context, stop: impl Fn() -> Verb<()>) -> Verb<()> {
        self.with(|state| {
            let general = self.general.fetch_and(!HOLD, Ordering::Relaxed) & !HOLD;
            let held = std::mem::replace(&mut state.held_from, std::ptr::null_mut());
            let waiting = state.ring.outstanding().skip_while(|slot| *slot != held);
            state.ring.continue_at(state.held_psn);
            let mut outcome = Ok(());
            for slot in waiting {
                // SAFETY: an entry of the ring that the hardware does not have.
                unsafe {
                    state.ring.renumber(slot);
                    if general & COUNTED != 0 {
                        state.ring.count_receives(slot);
                    }
                    if let Err(error) = state.post_slot(general, context, slot) {
                        if outcome.is_ok() {
                            stop()?;
                            outcome = Err(error);
                        }
                        state.post_empty(general, slot)?;
                    }
                }
            }
            outcome
        })
    }

    /// From the first restart on, requests go down as translated copies.
    pub(super) fn translate(&self) {
        self.with(|state| {
            self.general.fetch_or(TRANSLATE, Ordering::Relaxed);
            (state.last_local, state.last_remote) = (LastKey::NONE, NO_KEY);
        });
    }

    pub(super) fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let _guard = self.lock.lock();
        // SAFETY: the lock is held.
        work(unsafe { &mut *self.state.get() })
    }
}

impl State {
    /// From here on the entry, and those after it, count as held: they go down when the gate opens.
    pub(super) fn hold_from(&mut self, slot: *mut SendSlot) {
        self.held_from = slot;
    }

    pub(super) fn held_from(&self) -> *mut SendSlot {
        self.held_from
    }
}
