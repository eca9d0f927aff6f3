//! Entries of a send log that are written piece by piece, as `ibv_wr_*` say what they are.

use std::ptr;

use rdma_core_sys::{
    IBV_SEND_INLINE, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD, ibv_sge,
};

use super::send::{LONGEST_MESSAGE, SendRing, SendSlot, is_simple};
use crate::errno::{Errno, Verb};

/// Atomics are on 8 bytes, at an address that is a multiple of 8 (IBTA 9.4.5).
const ATOMIC_BYTES: u32 = 8;

impl SendRing {
    /// Begins the entry at the cursor: a request without elements. It is not part of the log until [`Self::finish`].
    ///
    /// # Safety
    /// The ring must not be at its limit.
    #[inline(always)]
    pub unsafe fn begin(&mut self, wr_id: u64, opcode: u32, flags: u32) -> *mut SendSlot {
        let slot = self.cursor;
        // SAFETY: the cursor is before the limit, hence in the ring.
        unsafe {
            (*slot).head.app_wr_id = wr_id;
            (*slot).wr.num_sge = 0;
            (*slot).wr.opcode = opcode;
            // Whether bytes are inline is said by how they are given.
            (*slot).wr.send_flags = flags & !IBV_SEND_INLINE;
        }
        slot
    }

    /// The elements of the entry that was begun last.
    ///
    /// # Safety
    /// `slot` is what the last `begin` returned; `from` is valid for `count` elements.
    ///
    /// # Errors
    /// `EINVAL`: more than the queue has room for.
    #[inline(always)]
    pub unsafe fn set_elements(
        &self,
        slot: *mut SendSlot,
        from: *const ibv_sge,
        count: usize,
    ) -> Verb<()> {
        if count > self.max_sge as usize {
            return Err(Errno::INVALID);
        }
        // SAFETY: as the caller vouches; the entry has room for `max_sge`.
        unsafe {
            match count {
                // One is what there mostly is, and needs no call.
                1 => ptr::write((*slot).wr.sg_list, ptr::read(from)),
                _ => ptr::copy_nonoverlapping(from, (*slot).wr.sg_list, count),
            }
            (*slot).wr.num_sge = count as i32;
        }
        Ok(())
    }

    /// The bytes of the entry that was begun last, which are kept in the entry: the pieces one after the other.
    ///
    /// # Safety
    /// `slot` is what the last `begin` returned; each piece is valid for reads.
    ///
    /// # Errors
    /// `EINVAL`: more than the queue has room for.
    pub unsafe fn set_inline(
        &self,
        slot: *mut SendSlot,
        pieces: impl Iterator<Item = (*const u8, usize)>,
    ) -> Verb<()> {
        // SAFETY: as the caller vouches; the entry has room for `max_inline` bytes.
        unsafe {
            let bytes = (*slot).inline;
            let mut filled = 0_usize;
            for (from, length) in pieces {
                if length > self.max_inline as usize - filled {
                    return Err(Errno::INVALID);
                }
                ptr::copy_nonoverlapping(from, bytes.wrapping_add(filled), length);
                filled += length;
            }
            let element = ibv_sge {
                addr: bytes.expose_provenance() as u64,
                length: filled as u32,
                lkey: 0,
            };
            ptr::write((*slot).wr.sg_list, element);
            (*slot).wr.num_sge = 1;
            (*slot).wr.send_flags |= IBV_SEND_INLINE;
        }
        Ok(())
    }

    /// Makes the entry that was begun last part of the log.
    ///
    /// # Safety
    /// `slot` is what the last `begin` returned, with all fields that its opcode has.
    ///
    /// # Errors
    /// `EINVAL`: an atomic that no device executes. Some say so only when part of a batch has gone down.
    #[inline(always)]
    pub unsafe fn finish(&mut self, slot: *mut SendSlot) -> Verb<()> {
        // SAFETY: as the caller vouches.
        unsafe {
            let request = &(*slot).wr;
            let length = match request.num_sge {
                1 => (*request.sg_list).length,
                count => {
                    let elements = std::slice::from_raw_parts(request.sg_list, count as usize);
                    elements
                        .iter()
                        .fold(0, |sum: u32, element| sum.saturating_add(element.length))
                }
            };
            if length > LONGEST_MESSAGE {
                return Err(Errno::INVALID);
            }
            let is_atomic =
                [IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD].contains(&request.opcode);
            let multiple = u64::from(ATOMIC_BYTES);
            if is_atomic
                && (length < ATOMIC_BYTES
                    || !request.wr.atomic.remote_addr.is_multiple_of(multiple))
            {
                return Err(Errno::INVALID);
            }
            let packets = match self.is_one_packet(length) && is_simple(request) {
                true => 1,
                false => self.packets(request.opcode, length),
            };
            (*slot).psn_after = self.psn.wrapping_add(packets);
            self.commit(slot);
        }
        Ok(())
    }

    /// The entry after one that is part of the log.
    #[inline(always)]
    #[must_use]
    pub fn after(&self, slot: *mut SendSlot) -> *mut SendSlot {
        self.wrapped(slot.wrapping_byte_add(self.stride))
    }

    /// Is more outstanding than a queue of `capacity` takes?
    #[must_use]
    pub fn exceeds(&self, capacity: u32) -> bool {
        // From the last completed entry to the cursor; the former is not outstanding.
        let (cursor, completed) = (self.wrapped(self.cursor), self.completed_slot());
        let size = self.end.addr() - self.base.addr();
        let bytes = match cursor > completed {
            true => cursor.addr() - completed.addr(),
            false => size - (completed.addr() - cursor.addr()),
        };
        bytes > (capacity as usize + 1) * self.stride
    }
}
