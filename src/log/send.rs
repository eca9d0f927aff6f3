//! The send log of a queue pair.
//!
//! A ring of twice the queue. `cursor` is where the next request goes, `completed` the entry of the last completion seen;
//! what lies between is outstanding (a completion retires the unsignaled requests before it, IBTA 10.8.3.1).
//! `limit` is as far as the cursor may go without looking again, so that one compare covers wrap and full. Nothing is
//! retired one by one.

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use rdma_core_sys::{
    IBV_SEND_INLINE, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_BIND_MW,
    IBV_WR_LOCAL_INV, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM,
    IBV_WR_SEND_WITH_INV, ibv_send_wr, ibv_sge, ibv_wr_opcode,
};

use super::SlotHead;
use super::ring::{Memory, stride};
use crate::errno::{Errno, Verb};
use crate::handle::Psn;

/// One request. Its scatter/gather elements follow it in memory.
#[repr(C)]
pub struct SendSlot {
    /// What the device is given. `wr_id`, `sg_list` and (but during the post of a chain) `next` never change.
    pub wr: ibv_send_wr,
    pub head: SlotHead,
    /// Room for the bytes of an inline request, `max_inline` of them.
    pub(super) inline: *mut u8,
    /// The PSN after this request's last packet.
    pub psn_after: u32,
    /// Messages up to and including this one that use up a receive at the peer. Only where they are counted:
    /// [`SendRing::count_receives`].
    pub receives_after: u32,
}

impl fmt::Debug for SendSlot {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("SendSlot")
            .field("opcode", &self.wr.opcode)
            .field("head", &self.head)
            .finish_non_exhaustive()
    }
}

/// Does a request use up one of the peer's receives (IBTA 9.4.1, 9.4.3)?
#[must_use]
pub fn takes_receive(opcode: ibv_wr_opcode) -> bool {
    [
        IBV_WR_SEND,
        IBV_WR_SEND_WITH_IMM,
        IBV_WR_SEND_WITH_INV,
        IBV_WR_RDMA_WRITE_WITH_IMM,
    ]
    .contains(&opcode)
}

/// Is a request done by the sender's device alone? It sends no packet.
#[inline(always)]
#[must_use]
pub fn is_local(opcode: ibv_wr_opcode) -> bool {
    [IBV_WR_LOCAL_INV, IBV_WR_BIND_MW].contains(&opcode)
}

/// Bytes of a message (IBTA 9.7.8). One that is held back is refused like one that the device sees at once.
pub(super) const LONGEST_MESSAGE: u32 = 1 << 31;

/// The ring. All methods need the queue's lock, but for `completed`, which pollers move.
#[derive(Debug)]
pub struct SendRing {
    pub(super) cursor: *mut SendSlot,
    limit: *mut SendSlot,
    pub(super) stride: usize,
    pub(super) psn: u32,
    mtu_mask: u32,
    mtu_shift: u32,
    /// The longest message that is surely one packet.
    one_packet: u32,
    /// Address of the [`SlotHead`] last seen completed; in a ring that never completed any, of the last entry.
    completed: Box<AtomicU64>,
    pub(super) base: *mut SendSlot,
    pub(super) end: *mut SendSlot,
    pub(super) max_sge: u32,
    pub(super) max_inline: u32,
    memory: Option<(Memory, Memory)>,
}

impl Default for SendRing {
    /// A ring with no room, where no request can be logged.
    fn default() -> Self {
        Self {
            cursor: ptr::null_mut(),
            limit: ptr::null_mut(),
            stride: 0,
            psn: 0,
            mtu_mask: 0,
            mtu_shift: 0,
            one_packet: 0,
            completed: Box::default(),
            base: ptr::null_mut(),
            end: ptr::null_mut(),
            max_sge: 0,
            max_inline: 0,
            memory: None,
        }
    }
}

impl SendRing {
    /// Room for a queue of `capacity` requests, of at most `max_sge` elements or `max_inline` bytes each.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(
        capacity: u32,
        max_sge: u32,
        max_inline: u32,
        owner: *mut std::ffi::c_void,
    ) -> Verb<Self> {
        let max_sge = max_sge.max(1);
        let stride = stride(size_of::<SendSlot>(), max_sge);
        let slots = (capacity as usize).max(8) * 2;
        let memory = Memory::new(slots.checked_mul(stride).ok_or(Errno::NO_MEMORY)?)?;
        let inline = Memory::new(
            slots
                .checked_mul(max_inline as usize)
                .ok_or(Errno::NO_MEMORY)?,
        )?;
        let base: *mut SendSlot = memory.base().cast();
        let end = base.wrapping_byte_add(slots * stride);
        let mut ring = Self {
            cursor: base,
            stride,
            base,
            end,
            max_sge,
            max_inline,
            ..Self::default()
        };
        for index in 0..slots {
            let slot = base.wrapping_byte_add(index * stride);
            // SAFETY: the entry lies within `memory`, which is zeroed and aligned; nobody else has it yet.
            unsafe {
                (*slot).head.retire = &raw const *ring.completed;
                (*slot).head.owner = owner;
                (*slot).wr.wr_id = (*slot).head.wr_id();
                (*slot).wr.sg_list = slot.add(1).cast();
                (*slot).inline = inline.base().wrapping_add(index * max_inline as usize);
            }
        }
        ring.memory = Some((memory, inline));
        ring.forget_all();
        Ok(ring)
    }

    /// Is there memory behind it?
    #[must_use]
    pub fn is_allocated(&self) -> bool {
        self.memory.is_some()
    }

    /// Drops every entry: the queue was reset.
    pub fn forget_all(&mut self) {
        if self.is_allocated() {
            self.cursor = self.base;
            let last = self.end.wrapping_byte_sub(self.stride);
            // SAFETY: the last entry of an allocated ring.
            self.completed
                .store(unsafe { (*last).head.wr_id() }, Ordering::Release);
            self.limit = last;
        }
    }

    /// The PSN of the next request's first packet, and the path MTU in bytes (a power of two).
    pub fn start(&mut self, psn: Psn, mtu: u32) {
        self.psn = psn.0;
        self.mtu_shift = mtu.trailing_zeros();
        self.mtu_mask = mtu - 1;
        self.one_packet = mtu;
    }

    /// Is the room up to the known limit used up? Then [`Self::make_room`] must look again.
    #[inline(always)]
    #[must_use]
    pub fn is_at_limit(&self) -> bool {
        self.cursor == self.limit
    }

    /// Can [`Self::log_one`] take this request as it stands: alone, of one element, not inline, of an opcode that
    /// [`is_simple`], with room in the ring?
    #[inline(always)]
    #[must_use]
    pub fn takes_plain(&self, wr: &ibv_send_wr) -> bool {
        wr.num_sge == 1
            && wr.next.is_null()
            && wr.send_flags & IBV_SEND_INLINE == 0
            && is_simple(wr)
            && !self.is_at_limit()
    }

    /// Is a message surely one packet? Most are.
    #[inline(always)]
    #[must_use]
    pub fn is_one_packet(&self, length: u32) -> bool {
        length <= self.one_packet
    }

    /// Moves the limit on, around the end if need be.
    ///
    /// # Errors
    /// `ENOMEM` if the ring is full, as the hardware answers for a full queue.
    pub fn make_room(&mut self) -> Verb<()> {
        if !self.is_allocated() {
            return Err(Errno::INVALID);
        }
        if self.cursor == self.end {
            self.cursor = self.base;
        }
        let completed = self.completed_slot();
        // The completed entry itself is not written to, so that full and empty differ.
        self.limit = if completed >= self.cursor {
            completed
        } else {
            self.end
        };
        if self.cursor == self.limit {
            Err(Errno::NO_MEMORY)
        } else {
            Ok(())
        }
    }

    /// Logs a request of one element, not inline, whose opcode [`is_simple`]. It is not part of the log until
    /// [`Self::commit`].
    ///
    /// # Safety
    /// [`Self::takes_plain`] must hold for `wr`, `element` be its element and `packets` what
    /// [`Self::packets`] says of that.
    #[inline(always)]
    pub unsafe fn log_one(
        &mut self,
        wr: *const ibv_send_wr,
        element: *const ibv_sge,
        packets: u32,
    ) -> *mut SendSlot {
        let slot = self.cursor;
        // SAFETY: the cursor is before the limit, hence in the ring; the caller vouches for `wr`.
        unsafe {
            copy_request(wr, slot);
            // Where `sg_list` of an entry always points.
            ptr::write(slot.add(1).cast(), ptr::read(element));
            (*slot).psn_after = self.psn.wrapping_add(packets);
        }
        slot
    }

    /// Logs any request, but for what only requests to bind say. `next` is left null.
    ///
    /// # Safety
    /// `wr` must be a valid request as `ibv_post_send` demands. The ring must not be at its limit.
    ///
    /// # Errors
    /// `EINVAL`: more elements or inline bytes than the queue has room for. `EOPNOTSUPP`: an opcode we do not have.
    #[inline(always)]
    pub unsafe fn log(&mut self, wr: *const ibv_send_wr) -> Verb<*mut SendSlot> {
        // SAFETY: as above.
        unsafe {
            if (*wr).opcode > IBV_WR_SEND_WITH_INV {
                return Err(Errno::NOT_SUPPORTED);
            }
            let count = u32::try_from((*wr).num_sge).map_err(|_| Errno::INVALID)?;
            if count > self.max_sge {
                return Err(Errno::INVALID);
            }
            let slot = self.cursor;
            copy_request(wr, slot);
            let from: &[ibv_sge] = match count {
                // The list of a request without elements may be null.
                0 => &[],
                count => std::slice::from_raw_parts((*wr).sg_list, count as usize),
            };
            let length = from
                .iter()
                .fold(0_u32, |sum, sge| sum.saturating_add(sge.length));
            if length > LONGEST_MESSAGE {
                return Err(Errno::INVALID);
            }
            if (*wr).send_flags & IBV_SEND_INLINE != 0 {
                if length > self.max_inline {
                    return Err(Errno::INVALID);
                }
                self.copy_inline(from, slot);
            } else {
                ptr::copy_nonoverlapping(from.as_ptr(), (*slot).wr.sg_list, from.len());
            }
            (*slot).psn_after = self.psn.wrapping_add(self.packets((*wr).opcode, length));
            Ok(slot)
        }
    }

    /// The buffer of an inline request may be used again when the post returns, so its bytes are kept here.
    unsafe fn copy_inline(&self, from: &[ibv_sge], slot: *mut SendSlot) {
        // SAFETY: `inline` has room for `max_inline` bytes and the caller checked the sum; the elements describe memory
        // of the application that is valid for reads, as `IBV_SEND_INLINE` demands.
        unsafe {
            let mut to = (*slot).inline;
            for sge in from {
                ptr::copy_nonoverlapping(
                    ptr::with_exposed_provenance::<u8>(sge.addr as usize),
                    to,
                    sge.length as usize,
                );
                to = to.wrapping_add(sge.length as usize);
            }
            let length = from.iter().map(|sge| sge.length).sum();
            let addr = (*slot).inline.expose_provenance() as u64;
            ptr::write(
                (*slot).wr.sg_list,
                ibv_sge {
                    addr,
                    length,
                    lkey: 0,
                },
            );
            (*slot).wr.num_sge = i32::from(!from.is_empty());
        }
    }

    /// Makes the entry at the cursor part of the log.
    ///
    /// # Safety
    /// `slot` is what the last `log` returned.
    #[inline(always)]
    pub unsafe fn commit(&mut self, slot: *mut SendSlot) {
        // SAFETY: as the caller vouches.
        self.psn = unsafe { (*slot).psn_after };
        self.cursor = slot.wrapping_byte_add(self.stride);
    }

    /// Takes `slot` and all after it out of the log again: the device refused them.
    ///
    /// # Safety
    /// `slot` must be an outstanding entry; `psn` the one before it.
    pub unsafe fn undo(&mut self, slot: *mut SendSlot, psn: u32) {
        self.cursor = slot;
        self.psn = psn;
        // The cursor may have gone around; the old limit is then behind it. At the limit, the next post looks again.
        self.limit = slot;
    }

    /// Takes the entry that was committed last out of the log again.
    ///
    /// # Safety
    /// [`Self::commit`] must be what was called last.
    pub unsafe fn undo_last(&mut self) {
        // The cursor only goes around in `make_room`, so the entry is right before it.
        let slot = self.cursor.wrapping_byte_sub(self.stride);
        // SAFETY: as the caller vouches.
        unsafe {
            let packets = self.packets_of(slot);
            self.undo(slot, self.psn.wrapping_sub(packets));
        }
    }

    /// Goes on with this PSN.
    pub fn continue_at(&mut self, psn: u32) {
        self.psn = psn;
    }

    /// Numbers an entry that goes down only now, possibly on another connection than it was logged for.
    ///
    /// # Safety
    /// `slot` must be an entry of this ring.
    pub unsafe fn renumber(&mut self, slot: *mut SendSlot) {
        // SAFETY: as the caller vouches.
        unsafe {
            self.psn = self.psn.wrapping_add(self.packets_of(slot));
            (*slot).psn_after = self.psn;
        }
    }

    /// Notes how many receives of the peer are used up by the time an entry is executed.
    ///
    /// # Safety
    /// `slot` must be an entry of this ring, and the one before it be counted, if that is of the same connection.
    #[cold]
    pub unsafe fn count_receives(&self, slot: *mut SendSlot) {
        // SAFETY: as the caller vouches.
        unsafe {
            let one = u32::from(takes_receive((*slot).wr.opcode));
            (*slot).receives_after = self.receives_before(slot).wrapping_add(one);
        }
    }

    /// The count before an entry, or before the next one to be logged.
    ///
    /// # Safety
    /// `slot` must be an entry of this ring, or null for the next one.
    #[must_use]
    pub unsafe fn receives_before(&self, slot: *mut SendSlot) -> u32 {
        if !self.is_allocated() {
            return 0;
        }
        let slot = self.wrapped(if slot.is_null() { self.cursor } else { slot });
        let after = if slot == self.base { self.end } else { slot };
        // SAFETY: as the caller vouches; entries follow each other around the ring.
        unsafe { (*after.wrapping_byte_sub(self.stride)).receives_after }
    }

    /// Packets of an entry.
    ///
    /// # Safety
    /// `slot` must be an entry of this ring.
    #[must_use]
    pub unsafe fn packets_of(&self, slot: *const SendSlot) -> u32 {
        // SAFETY: as the caller vouches; `sg_list` has `num_sge` elements.
        let elements =
            unsafe { std::slice::from_raw_parts((*slot).wr.sg_list, (*slot).wr.num_sge as usize) };
        let length = elements
            .iter()
            .fold(0_u32, |sum, element| sum.saturating_add(element.length));
        // SAFETY: as above.
        self.packets(unsafe { (*slot).wr.opcode }, length)
    }

    /// The PSN sum as it is, to go back to with [`Self::undo`].
    #[must_use]
    pub fn raw_psn(&self) -> u32 {
        self.psn
    }

    /// Outstanding entries, oldest first.
    pub fn outstanding(&self) -> impl Iterator<Item = *mut SendSlot> + use<> {
        let (base, end, stride, cursor) =
            (self.base, self.end, self.stride, self.wrapped(self.cursor));
        let mut at = match self.is_allocated() {
            true => self.wrapped(self.completed_slot().wrapping_byte_add(stride)),
            false => cursor,
        };
        std::iter::from_fn(move || {
            if at == cursor {
                return None;
            }
            let slot = at;
            at = at.wrapping_byte_add(stride);
            if at == end {
                at = base;
            }
            Some(slot)
        })
    }

    /// Retires everything up to and including `slot`.
    pub fn retire(&self, slot: &SendSlot) {
        self.completed.store(slot.head.wr_id(), Ordering::Release);
    }

    pub(super) fn completed_slot(&self) -> *mut SendSlot {
        let head = self.completed.load(Ordering::Acquire) as usize;
        ptr::with_exposed_provenance_mut::<SendSlot>(head - std::mem::offset_of!(SendSlot, head))
    }

    pub(super) fn wrapped(&self, slot: *mut SendSlot) -> *mut SendSlot {
        if slot == self.end { self.base } else { slot }
    }

    /// Packets of a message: a message of no bytes takes one (IBTA 9.7.1); a READ takes as many as its response. An atomic
    /// takes one, however long the memory is that its 8 bytes come back to; what the device does by itself takes none.
    #[inline]
    #[must_use]
    pub fn packets(&self, opcode: u32, length: u32) -> u32 {
        if opcode >= IBV_WR_ATOMIC_CMP_AND_SWP && opcode != IBV_WR_SEND_WITH_INV {
            return u32::from(!is_local(opcode));
        }
        let packets = (u64::from(length) + u64::from(self.mtu_mask)) >> self.mtu_shift;
        (packets as u32).max(1)
    }
}

/// Is this one of the operations a queue pair has had from the start (write, send, read, atomics)?
#[inline(always)]
#[must_use]
pub fn is_simple(wr: &ibv_send_wr) -> bool {
    wr.opcode <= IBV_WR_ATOMIC_FETCH_AND_ADD
}

/// Copies all of a request but `next`, `sg_list` and what only other opcodes use.
#[inline(always)]
unsafe fn copy_request(wr: *const ibv_send_wr, slot: *mut SendSlot) {
    // SAFETY: both are valid.
    unsafe {
        (*slot).head.app_wr_id = (*wr).wr_id;
        copy_payload(wr, &raw mut (*slot).wr);
    }
}

/// Copies what a request says: all but `wr_id`, `next`, `sg_list` and what only opcodes use that are not [`is_simple`].
///
/// # Safety
/// Both must be valid.
#[inline(always)]
pub unsafe fn copy_payload(from: *const ibv_send_wr, to: *mut ibv_send_wr) {
    // SAFETY: num_sge, opcode, flags, immediate (16 bytes) and the union `wr` (32 bytes) are next to each other.
    unsafe {
        ptr::copy_nonoverlapping(
            (&raw const (*from).num_sge).cast::<[u8; 48]>(),
            (&raw mut (*to).num_sge).cast(),
            1,
        );
    }
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(ibv_send_wr, num_sge) + 16 == offset_of!(ibv_send_wr, wr));
    assert!(offset_of!(ibv_send_wr, wr) + 32 == offset_of!(ibv_send_wr, qp_type));
    assert!(size_of::<SendSlot>().is_multiple_of(align_of::<ibv_sge>()));
};
