//! Posting what is not plain: chains, inline bytes, several elements, datagrams, held requests.

use std::ffi::c_int;
use std::mem::offset_of;

use rdma_core_sys::{
    IBV_SEND_INLINE, IBV_SEND_SIGNALED, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_BIND_MW, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, IBV_WR_SEND_WITH_INV, ibv_send_wr, ibv_sge,
};

use super::send_queue::{COUNTED, DATAGRAM, HOLD, State, TRANSLATE};
use crate::errno::{Errno, Verb};
use crate::handle::VirtualKey;
use crate::log::{SendSlot, is_local};
use crate::translate::Directory;
use crate::virt::address_handle::AddressHandle;
use crate::virt::context::Context;
use crate::virt::local_key::local_key;
use crate::virt::lock::WANTED;
use crate::virt::memory_window;

/// The two kinds of SEND, which name no remote key, differ in the lowest bit.
const _: () = assert!(IBV_WR_SEND & 1 == 0 && IBV_WR_SEND_WITH_IMM == IBV_WR_SEND | 1);

/// Where a request that is not a SEND has the peer's key: the opcode says which of the union's fields it is. In bytes.
#[inline(always)]
pub(super) const fn remote_key_place(opcode: u32) -> usize {
    match opcode {
        IBV_WR_ATOMIC_CMP_AND_SWP | IBV_WR_ATOMIC_FETCH_AND_ADD => {
            offset_of!(ibv_send_wr, wr.atomic.rkey)
        }
        IBV_WR_SEND_WITH_INV => offset_of!(ibv_send_wr, __bindgen_anon_1.invalidate_rkey),
        _ => offset_of!(ibv_send_wr, wr.rdma.rkey),
    }
}

/// The peer's key in a request that is not a SEND.
pub(super) unsafe fn remote_key(request: *mut ibv_send_wr) -> *mut u32 {
    // SAFETY: as the caller vouches.
    unsafe { request.byte_add(remote_key_place((*request).opcode)).cast() }
}

impl State {
    /// Chains, inline bytes, several elements, datagrams, translated and held requests, a ring at its limit.
    pub(super) unsafe fn post_general(
        &mut self,
        general: u32,
        context: &Context,
        first: *mut ibv_send_wr,
        bad: *mut *mut ibv_send_wr,
    ) -> c_int {
        // A whole chain goes down in one call where its entries can go down as they are.
        let together = general & !(WANTED | COUNTED) == 0;
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
                let refused = self.post_chain(head, psn_before);
                let request = |(index, error)| (nth(first, index), error);
                failed = refused.map(request).or(failed);
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

    #[inline(always)]
    unsafe fn log(&mut self, general: u32, request: *const ibv_send_wr) -> Verb<*mut SendSlot> {
        if general & HOLD != 0 && self.ring.outstanding().count() >= self.capacity as usize {
            return Err(Errno::NO_MEMORY);
        }
        if self.ring.is_at_limit() {
            self.ring.make_room()?;
        }
        // SAFETY: as the caller vouches; there is room.
        unsafe {
            let slot = self.ring.log(request)?;
            if (*slot).wr.opcode == IBV_WR_BIND_MW {
                let bind = memory_window::below(&(*request).__bindgen_anon_2.bind_mw)?;
                (*slot).wr.__bindgen_anon_2.bind_mw = bind;
            }
            if general & COUNTED != 0 {
                self.ring.count_receives(slot);
            }
            Ok(slot)
        }
    }

    /// Posts linked entries, and unlinks them; says which of them was refused.
    pub(super) unsafe fn post_chain(
        &mut self,
        head: *mut SendSlot,
        psn_before: u32,
    ) -> Option<(usize, Errno)> {
        let mut refused = std::ptr::null_mut();
        // SAFETY: the entries from `head` on were logged just now.
        unsafe {
            let code = (self.post)(self.hardware, &raw mut (*head).wr, &raw mut refused);
            let (mut slot, mut psn, mut index) = (head, psn_before, 0);
            let mut failed = None;
            loop {
                let next = std::mem::replace(&mut (*slot).wr.next, std::ptr::null_mut());
                if code != 0
                    && failed.is_none()
                    && (&raw mut (*slot).wr == refused || refused.is_null())
                {
                    failed = Some((index, Errno(code)));
                    self.ring.undo(slot, psn);
                }
                if next.is_null() {
                    return failed;
                }
                psn = (*slot).psn_after;
                slot = next.cast();
                index += 1;
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
                self.check(general, context, &(*slot).wr)?;
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

    /// Refuses a request that is to be held where [`Self::post_slot`] would.
    pub(super) unsafe fn check(
        &self,
        general: u32,
        context: &Context,
        request: &ibv_send_wr,
    ) -> Verb<()> {
        if general & DATAGRAM != 0 {
            names_address_handle(request)?;
        }
        if general & TRANSLATE != 0 && is_local(request.opcode) {
            check_local(context, request)?;
        }
        if general & TRANSLATE != 0 && request.send_flags & IBV_SEND_INLINE == 0 {
            for index in 0..request.num_sge as usize {
                // SAFETY: the request is that of an entry.
                local_key(context, unsafe { &*request.sg_list.add(index) })?;
            }
        }
        Ok(())
    }

    /// Gives a copy of an entry to the hardware, in the hardware's terms. The log stays in the application's.
    pub(super) unsafe fn post_slot(
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
                address(&mut copy)?;
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
                    if is_local(copy.opcode) {
                        check_local(context, &copy)?;
                    } else {
                        let key = remote_key(&mut copy);
                        *key = self.remote(*key);
                    }
                }
            }
            let mut refused = std::ptr::null_mut();
            Errno::check((self.post)(self.hardware, &raw mut copy, &raw mut refused))
        }
    }

    /// Gives the hardware an empty request in place of an entry that it cannot be given. The queue pair is in the error state, so
    /// that it comes back flushed, after those before it.
    pub(super) unsafe fn post_empty(&mut self, general: u32, slot: *mut SendSlot) -> Verb<()> {
        // SAFETY: an entry of the ring, under the lock.
        unsafe {
            let mut empty = (*slot).wr;
            // Where it goes must be valid even so.
            if general & DATAGRAM != 0 {
                address(&mut empty)?;
            }
            empty.next = std::ptr::null_mut();
            empty.num_sge = 0;
            empty.opcode = IBV_WR_SEND;
            empty.send_flags = IBV_SEND_SIGNALED;
            let mut refused = std::ptr::null_mut();
            Errno::check((self.post)(self.hardware, &raw mut empty, &raw mut refused))
        }
    }

    /// A key that is not in the peer's table is younger than the restart and means itself.
    pub(super) fn remote(&mut self, key: u32) -> u32 {
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

/// A request of the application's chain.
unsafe fn nth(first: *mut ibv_send_wr, index: usize) -> *mut ibv_send_wr {
    // SAFETY: the chain is longer than that.
    (0..index).fold(first, |request, _| unsafe { (*request).next })
}

/// Puts where a datagram goes into the hardware's terms.
///
/// # Safety
/// It must be a request as `ibv_post_send` demands.
unsafe fn address(datagram: &mut ibv_send_wr) -> Verb<()> {
    names_address_handle(datagram)?;
    // SAFETY: a SEND on a datagram queue pair names an address handle of ours.
    unsafe {
        let handle = AddressHandle::of(datagram.wr.ud.ah);
        datagram.wr.ud.ah = handle.hardware();
        datagram.wr.ud.remote_qpn = handle.remote_qpn(datagram.wr.ud.remote_qpn);
        match datagram.wr.ud.ah.is_null() {
            true => Err(Errno::INVALID),
            false => Ok(()),
        }
    }
}

/// After a restart a key to invalidate that is no window's may be another region's below; and the hardware that a window was to
/// be bound on may have gone.
#[cold]
fn check_local(context: &Context, request: &ibv_send_wr) -> Verb<()> {
    // SAFETY: the opcode says which of the union's fields is meant.
    let sound = unsafe {
        match request.opcode {
            IBV_WR_BIND_MW => !request.__bindgen_anon_2.bind_mw.mw.is_null(),
            _ => memory_window::is_window(context, request.__bindgen_anon_1.invalidate_rkey),
        }
    };
    match sound {
        true => Ok(()),
        false => Err(Errno::INVALID),
    }
}

/// Others have something else in that place.
#[inline(always)]
fn names_address_handle(request: &ibv_send_wr) -> Verb<()> {
    match request.opcode & !1 {
        IBV_WR_SEND => Ok(()),
        _ => Err(Errno::INVALID),
    }
}
