//! Posting: the hot path. docs/work-logs.md has the argument and the budget.

use std::arch::asm;
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use rdma_core_sys::{
    IBV_QPT_UD, IBV_SEND_INLINE, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM,
    ibv_qp, ibv_qp_cap, ibv_qp_type, ibv_recv_wr, ibv_send_wr, ibv_sge,
};

use super::QueuePair;
use crate::errno::{Errno, Verb};
use crate::handle::{Psn, VirtualKey};
use crate::log::{SendRing, SendSlot, copy_payload};
use crate::translate::{Directory, KeyTable};
use crate::virt::address_handle::AddressHandle;
use crate::virt::context::Context;
use crate::virt::lock::{QueueGuard, QueueLock};
use crate::virt::process::process;
use crate::virt::receive_queue::local_key;

/// Why a request cannot simply be logged and posted. Zero is the fast path.
const HOLD: u32 = 1;
const TRANSLATE: u32 = 2;
/// Datagrams name our address handle, the hardware wants its own.
const DATAGRAM: u32 = 4;
/// The agent wants the lock. A thread that posts all the time would hardly ever leave it free.
const WANTED: u32 = 8;

/// Equals no key: keys have 32 bits.
const NO_KEY: (u64, u32) = (u64::MAX, 0);

type PostSend = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int;

/// The two kinds of SEND, which name no remote key, differ in the lowest bit.
const _: () = assert!(IBV_WR_SEND & 1 == 0 && IBV_WR_SEND_WITH_IMM == IBV_WR_SEND | 1);

#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct SendQueue {
    lock: QueueLock,
    /// Changed under the lock, but for [`WANTED`].
    general: AtomicU32,
    state: UnsafeCell<State>,
}

#[derive(Debug)]
#[repr(C)]
pub(super) struct State {
    hardware: *mut ibv_qp,
    post: PostSend,
    /// The request being posted and where to say that it is bad; kept here, not in registers saved on every call.
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
    pub(super) ring: SendRing,
    /// The first entry that was held; null if none is.
    held_from: *mut SendSlot,
    /// The PSN that the first held request will start with.
    held_psn: u32,
    capacity: u32,
    /// Room for the elements of one translated request.
    elements: Box<[ibv_sge]>,
    /// A translated request of one element, with `sg_list` at `elements` and no next.
    copy: ibv_send_wr,
    /// Remote keys of the peer; `None` before the first restart, or for a peer that is younger.
    peer_keys: Option<Arc<KeyTable>>,
    /// The translations used last, which the next request most likely needs again.
    last_local: LastLocal,
    last_remote: (u64, u32),
}

/// A local key, good as long as no region has been deregistered since: its number may be given to another then.
#[derive(Clone, Copy, Debug)]
struct LastLocal {
    key: u32,
    hardware: u32,
    /// Of the table; [`u64::MAX`] is none it ever has.
    generation: u64,
}

impl LastLocal {
    #[inline(always)]
    fn is(&self, context: &Context, key: u32) -> bool {
        self.key == key && self.generation == context.lkeys.generation()
    }
}

const NO_LOCAL: LastLocal = LastLocal {
    key: 0,
    hardware: 0,
    generation: u64::MAX,
};

/// `ibv_post_send`.
///
/// # Safety
/// As `ibv_post_send` demands.
#[inline]
pub unsafe fn post_send(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: as the caller vouches.
    let pair = unsafe { QueuePair::of(app) };
    let queue = &pair.send;
    // Whatever is not the plain case is left to a function that is not come back from and does not unwind: so this one has
    // next to nothing in registers that it would have to save.
    let Some(guard) = queue.lock.try_lock() else {
        // SAFETY: as the caller vouches.
        return unsafe { post_contended(app, request, bad) };
    };
    // SAFETY: as the caller vouches; `state` is only touched under the lock. By pointer: the device is called in between,
    // and what is needed after it is read again. Nothing here unwinds, so no guard has to be kept for that.
    unsafe {
        std::mem::forget(guard);
        let state = queue.state.get();
        if queue.general.load(Ordering::Relaxed) != 0 {
            return post_translated(app, request, bad);
        }
        let wr = &*request;
        if !(*state).ring.takes_plain(wr) {
            return post_slowly(app, request, bad);
        }
        let element = wr.sg_list;
        if !(*state).ring.is_one_packet((*element).length) {
            return post_large(app, request, bad);
        }
        post_plain(app, request, element, 1, bad)
    }
}

/// Logs a plain request and posts it as it is. Gives the lock back.
#[inline(always)]
unsafe fn post_plain(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    element: *const ibv_sge,
    packets: u32,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    let request = forget_origin(request);
    // SAFETY: the lock is held; the caller vouches for the rest. By pointer, as above.
    unsafe {
        let state = QueuePair::of(app).send.state.get();
        (*state).request = request;
        (*state).bad = bad;
        let slot = (*state).ring.log_one(request, element, packets);
        (*state).ring.commit(slot);
        let code = ((*state).post)((*state).hardware, &raw mut (*slot).wr, bad);
        if code != 0 {
            return take_back(app, code);
        }
        QueuePair::of(forget_origin(app)).send.lock.give_back();
        code
    }
}

/// The same pointer. The compiler no longer knows that addresses behind it were computed before, and so folds them into the
/// instructions that use them instead of keeping them: three instructions less.
#[inline(always)]
#[allow(
    clippy::pointers_in_nomem_asm_block,
    reason = "no memory is touched: there is no instruction in it"
)]
fn forget_origin<T>(mut pointer: *mut T) -> *mut T {
    // SAFETY: there is no instruction in it.
    unsafe {
        asm!("/* {0} */", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags));
    }
    pointer
}

/// A plain request of any number of packets.
unsafe extern "C" fn post_large(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the rest.
    unsafe {
        let ring = &(*QueuePair::of(app).send.state.get()).ring;
        let element = (*request).sg_list;
        let packets = ring.packets((*element).length);
        post_plain(app, request, element, packets, bad)
    }
}

/// The lock was taken when it was wanted.
#[cold]
unsafe extern "C" fn post_contended(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe {
        std::mem::forget(QueuePair::of(app).send.lock.lock());
        post_slowly(app, request, bad)
    }
}

/// The device refused the request that was logged last. Gives the lock back.
#[cold]
unsafe extern "C" fn take_back(app: *mut ibv_qp, code: c_int) -> c_int {
    // SAFETY: the lock is held; the caller has just logged and posted one request, and kept where it came from.
    unsafe {
        let queue = &QueuePair::of(app).send;
        let _guard = queue.lock.adopt();
        let state = &mut *queue.state.get();
        state.ring.undo_last();
        *state.bad = state.request;
    }
    code
}

/// After a restart a plain request is logged as it is, and posted as a copy with the hardware's keys. Gives the lock back.
unsafe extern "C" fn post_translated(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the request. By pointer, as above.
    unsafe {
        let pair = QueuePair::of(app);
        let state = pair.send.state.get();
        let element = (*request).sg_list;
        if pair.send.general.load(Ordering::Relaxed) != TRANSLATE
            || !(*state).ring.takes_plain(&*request)
        {
            return post_slowly(app, request, bad);
        }
        if !(*state).last_local.is(pair.context, (*element).lkey) {
            return look_up_local(app, request, bad);
        }
        let remote = (*request).opcode & !1 != IBV_WR_SEND;
        if remote && u64::from(*remote_key(request)) != (*state).last_remote.0 {
            return look_up_remote(app, request, bad);
        }
        (*state).request = request;
        (*state).bad = bad;
        let packets = match (*state).ring.is_one_packet((*element).length) {
            true => 1,
            false => (*state).ring.packets((*element).length),
        };
        let slot = (*state).ring.log_one(request, element, packets);
        (*state).ring.commit(slot);
        let copy = &raw mut (*state).copy;
        (*copy).wr_id = (*slot).wr.wr_id;
        copy_payload(request, copy);
        let translated = (*copy).sg_list;
        *translated = *element;
        (*translated).lkey = (*state).last_local.hardware;
        if remote {
            *remote_key(copy) = (*state).last_remote.1;
        }
        let code = ((*state).post)((*state).hardware, copy, bad);
        if code != 0 {
            return take_back(app, code);
        }
        pair.send.lock.give_back();
        code
    }
}

/// Where a request that is not a SEND has the peer's key.
#[inline(always)]
unsafe fn remote_key(request: *mut ibv_send_wr) -> *mut u32 {
    // SAFETY: only places are computed; the opcode says which of the union's fields it is.
    unsafe {
        if (*request).opcode < IBV_WR_ATOMIC_CMP_AND_SWP {
            &raw mut (*request).wr.rdma.rkey
        } else {
            &raw mut (*request).wr.atomic.rkey
        }
    }
}

/// [`post_translated`] with another remote key than last time.
unsafe extern "C" fn look_up_remote(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the request, which is not a SEND.
    unsafe {
        let pair = QueuePair::of(app);
        (*pair.send.state.get()).remote(*remote_key(request));
        post_translated(app, request, bad)
    }
}

/// [`post_translated`] with another local key than last time.
unsafe extern "C" fn look_up_local(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the request.
    unsafe {
        let pair = QueuePair::of(app);
        let key = (*(*request).sg_list).lkey;
        // Before the table: what is removed meanwhile makes the answer stale.
        let generation = pair.context.lkeys.generation();
        match pair.context.lkeys.get(key) {
            Some(hardware) => {
                (*pair.send.state.get()).last_local = LastLocal {
                    key,
                    hardware,
                    generation,
                };
                post_translated(app, request, bad)
            }
            // Refused, or of no length.
            None => post_slowly(app, request, bad),
        }
    }
}

/// Everything else. Gives the lock back.
unsafe extern "C" fn post_slowly(
    app: *mut ibv_qp,
    request: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the lock is held; the caller vouches for the chain.
    unsafe {
        let queue = &QueuePair::of(app).send;
        let ring = &mut (*queue.state.get()).ring;
        // Once or twice in a lap over the ring there is room after all. Each of these leads here again only if this is not so.
        if ring.is_at_limit() && ring.make_room().is_ok() {
            return match queue.general.load(Ordering::Relaxed) {
                0 if ring.takes_plain(&*request) => post_large(app, request, bad),
                _ => post_translated(app, request, bad),
            };
        }
    }
    // SAFETY: as above.
    let posted = catch_unwind(AssertUnwindSafe(|| unsafe {
        let pair = QueuePair::of(app);
        pair.send
            .post_slowly(pair.send.lock.adopt(), pair.context, request, bad)
    }));
    posted.unwrap_or(libc::EIO)
}

/// `ibv_post_recv`.
///
/// # Safety
/// As `ibv_post_recv` demands.
#[inline]
pub unsafe fn post_receive(
    app: *mut ibv_qp,
    request: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as the caller vouches.
    unsafe {
        let pair = QueuePair::of(app);
        pair.receive.post(pair.context, request, bad)
    }
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
    unsafe fn post_slowly(
        &self,
        guard: QueueGuard<'_>,
        context: &Context,
        first: *mut ibv_send_wr,
        bad: *mut *mut ibv_send_wr,
    ) -> c_int {
        let mut guard = guard;
        while self.general.load(Ordering::Relaxed) & WANTED != 0 {
            drop(guard);
            std::thread::yield_now();
            guard = self.lock.lock();
        }
        let general = self.general.load(Ordering::Relaxed);
        // SAFETY: the lock is held; the caller vouches for the chain.
        unsafe { (*self.state.get()).post_general(general, context, first, bad) }
    }
}

impl State {
    /// Chains, inline bytes, several elements, datagrams, translated and held requests, a ring at its limit.
    unsafe fn post_general(
        &mut self,
        general: u32,
        context: &Context,
        first: *mut ibv_send_wr,
        bad: *mut *mut ibv_send_wr,
    ) -> c_int {
        // A whole chain goes down in one call where its entries can go down as they are.
        let together = general & !WANTED == 0;
        let psn_before = self.ring.raw_psn();
        let mut head: *mut SendSlot = std::ptr::null_mut();
        let mut tail: *mut SendSlot = std::ptr::null_mut();
        let mut failed: Option<(*mut ibv_send_wr, Errno)> = None;
        let mut request = first;
        // SAFETY: the caller vouches for the chain; entries are the ring's.
        unsafe {
            while !request.is_null() {
                match self.log(general, request) {
                    Ok(slot) if together => {
                        self.ring.commit(slot);
                        match tail.is_null() {
                            true => head = slot,
                            false => (*tail).wr.next = &raw mut (*slot).wr,
                        }
                        tail = slot;
                    }
                    Ok(slot) => {
                        if let Err(error) = self.post_or_hold(general, context, slot) {
                            failed = Some((request, error));
                        }
                    }
                    Err(error) => failed = Some((request, error)),
                }
                if failed.is_some() {
                    break;
                }
                request = (*request).next;
            }
            if !head.is_null() {
                failed = self.post_chain(head, first, psn_before).or(failed);
            }
            match failed {
                Some((request, error)) => {
                    *bad = request;
                    error.0
                }
                None => 0,
            }
        }
    }

    unsafe fn log(&mut self, general: u32, request: *const ibv_send_wr) -> Verb<*mut SendSlot> {
        if general & HOLD != 0 && self.ring.outstanding().count() >= self.capacity as usize {
            return Err(Errno::NO_MEMORY);
        }
        if self.ring.is_at_limit() {
            self.ring.make_room()?;
        }
        // SAFETY: as the caller vouches; there is room.
        unsafe { self.ring.log(request) }
    }

    /// Posts linked entries; says which of the application's requests was refused.
    unsafe fn post_chain(
        &mut self,
        head: *mut SendSlot,
        first: *mut ibv_send_wr,
        psn_before: u32,
    ) -> Option<(*mut ibv_send_wr, Errno)> {
        let mut refused = std::ptr::null_mut();
        // SAFETY: the entries from `head` on were logged just now, in the order of the application's chain.
        unsafe {
            let code = (self.post)(self.hardware, &raw mut (*head).wr, &raw mut refused);
            let (mut slot, mut request, mut psn) = (head, first, psn_before);
            let mut failed = None;
            loop {
                let next = std::mem::replace(&mut (*slot).wr.next, std::ptr::null_mut());
                if code != 0
                    && failed.is_none()
                    && (&raw mut (*slot).wr == refused || refused.is_null())
                {
                    failed = Some((request, Errno(code)));
                    self.ring.undo(slot, psn);
                }
                if next.is_null() {
                    return failed;
                }
                psn = (*slot).psn_after;
                slot = next.cast();
                request = (*request).next;
            }
        }
    }

    unsafe fn post_or_hold(
        &mut self,
        general: u32,
        context: &Context,
        slot: *mut SendSlot,
    ) -> Verb<()> {
        // SAFETY: the entry was logged just now.
        unsafe {
            if general & HOLD != 0 {
                if self.held_from.is_null() {
                    self.held_from = slot;
                }
            } else {
                self.post_slot(general, context, slot)?;
            }
            self.ring.commit(slot);
        }
        Ok(())
    }

    /// Gives a copy of an entry to the hardware, in the hardware's terms. The log stays in the application's.
    unsafe fn post_slot(
        &mut self,
        general: u32,
        context: &Context,
        slot: *mut SendSlot,
    ) -> Verb<()> {
        // SAFETY: an entry of the ring, under the lock; `elements` has room for as many as an entry.
        unsafe {
            let mut copy = (*slot).wr;
            copy.next = std::ptr::null_mut();
            if general & DATAGRAM != 0 {
                let handle = AddressHandle::of(copy.wr.ud.ah);
                copy.wr.ud.ah = handle.hardware();
                copy.wr.ud.remote_qpn = handle.remote_qpn(copy.wr.ud.remote_qpn);
                if copy.wr.ud.ah.is_null() {
                    return Err(Errno::INVALID);
                }
            }
            if general & TRANSLATE != 0 {
                if copy.send_flags & IBV_SEND_INLINE == 0 {
                    for index in 0..copy.num_sge as usize {
                        let element = *copy.sg_list.add(index);
                        self.elements[index] = ibv_sge {
                            lkey: local_key(context, &element)?,
                            ..element
                        };
                    }
                    copy.sg_list = self.elements.as_mut_ptr();
                }
                if copy.opcode & !1 != IBV_WR_SEND {
                    let key = remote_key(&mut copy);
                    *key = self.remote(*key);
                }
            }
            let mut refused = std::ptr::null_mut();
            Errno::check((self.post)(self.hardware, &raw mut copy, &raw mut refused))
        }
    }

    /// A key that is not in the peer's table is younger than the restart and means itself.
    fn remote(&mut self, key: u32) -> u32 {
        if u64::from(key) != self.last_remote.0 {
            let found = self
                .peer_keys
                .as_ref()
                .map_or(key, |keys| Directory::remote_key(keys, VirtualKey(key)));
            self.last_remote = (u64::from(key), found);
        }
        self.last_remote.1
    }
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
            capacity: 0,
            elements: Box::default(),
            // SAFETY: zero is a valid request.
            copy: unsafe { std::mem::zeroed() },
            peer_keys: None,
            last_local: NO_LOCAL,
            last_remote: NO_KEY,
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
        });
    }

    pub(super) fn set_peer_keys(&self, keys: Option<Arc<KeyTable>>) {
        self.with(|state| {
            state.peer_keys = keys;
            (state.last_local, state.last_remote) = (NO_LOCAL, NO_KEY);
        });
    }

    pub(super) fn attach(&self, hardware: *mut ibv_qp, post: PostSend) {
        self.with(|state| (state.hardware, state.post) = (hardware, post));
    }

    pub(super) fn detach(&self) {
        self.attach(std::ptr::null_mut(), refuse);
    }

    /// Closes the gate of this queue: from here on requests are logged and held.
    pub(super) fn close(&self, limit: Instant) -> bool {
        self.general.fetch_or(WANTED, Ordering::Relaxed);
        let guard = self.lock.lock_before(limit);
        if guard.is_some() {
            self.general.fetch_or(HOLD, Ordering::Relaxed);
            // SAFETY: the lock is held.
            let state = unsafe { &mut *self.state.get() };
            state.held_psn = state.ring.raw_psn();
        }
        self.general.fetch_and(!WANTED, Ordering::Relaxed);
        guard.is_some()
    }

    /// Opens it, after what was held went down.
    ///
    /// # Errors
    /// The device refused a request that it would have taken; that one and those after it stay held.
    pub(super) fn open(&self, context: &Context) -> Verb<()> {
        self.with(|state| {
            let general = self.general.fetch_and(!HOLD, Ordering::Relaxed) & !HOLD;
            let held = std::mem::replace(&mut state.held_from, std::ptr::null_mut());
            let mut waiting = state.ring.outstanding().skip_while(|slot| *slot != held);
            state.ring.continue_at(state.held_psn);
            waiting.try_for_each(|slot| {
                // SAFETY: an entry of the ring that the hardware does not have.
                unsafe {
                    state.ring.renumber(slot);
                    state.post_slot(general, context, slot)
                }
            })
        })
    }

    /// From the first restart on, requests go down as translated copies.
    pub(super) fn translate(&self) {
        self.with(|state| {
            self.general.fetch_or(TRANSLATE, Ordering::Relaxed);
            (state.last_local, state.last_remote) = (NO_LOCAL, NO_KEY);
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
