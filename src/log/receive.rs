//! The receive log of a queue pair or of a shared receive queue.
//!
//! A ring of twice the queue. Each entry knows by itself whether it is posted: completions of a shared queue come in any
//! order, so an entry is free again when its own completion was seen. At most half of the ring is posted, so the search
//! for the next free entry is short: a lap over the ring passes as many free entries as posted ones.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::Ordering;

use rdma_core_sys::{ibv_recv_wr, ibv_sge};

use super::SlotHead;
use super::ring::{Memory, stride};
use crate::errno::{Errno, Verb};

/// One request. Its scatter/gather elements follow it in memory.
#[derive(Debug)]
#[repr(C)]
pub struct ReceiveSlot {
    /// What the device is given. `wr_id`, `sg_list` and (but during the post of a chain) `next` never change.
    pub wr: ibv_recv_wr,
    pub head: SlotHead,
}

impl ReceiveSlot {
    /// Is it with the device (or held for it)?
    #[inline(always)]
    #[must_use]
    pub fn is_posted(&self) -> bool {
        self.head.mark.load(Ordering::Acquire) & 1 == 1
    }

    /// The slot a head belongs to.
    ///
    /// # Safety
    /// `head` must be that of a receive entry.
    #[must_use]
    pub unsafe fn of(head: &SlotHead) -> *mut Self {
        ptr::from_ref(head)
            .cast_mut()
            .wrapping_byte_sub(std::mem::offset_of!(Self, head))
            .cast()
    }

    /// The elements it was posted with.
    #[must_use]
    pub fn elements(&self) -> &[ibv_sge] {
        let count = usize::try_from(self.wr.num_sge).unwrap_or(0);
        // SAFETY: `sg_list` points at the room behind the entry, of which `num_sge` elements were written when it was logged.
        unsafe { std::slice::from_raw_parts(self.wr.sg_list, count) }
    }
}

/// The ring. All methods need the queue's lock; completions only touch the entries' marks.
#[derive(Debug)]
pub struct ReceiveRing {
    cursor: *mut ReceiveSlot,
    end: *mut ReceiveSlot,
    base: *mut ReceiveSlot,
    stride: usize,
    sequence: u64,
    /// Requests that were committed and then refused by the device.
    undone: u64,
    max_sge: u32,
    slots: usize,
    memory: Option<Memory>,
}

impl Default for ReceiveRing {
    /// A ring with no room, where no request can be logged.
    fn default() -> Self {
        Self {
            cursor: ptr::null_mut(),
            end: ptr::null_mut(),
            base: ptr::null_mut(),
            stride: 0,
            sequence: 0,
            undone: 0,
            max_sge: 0,
            slots: 0,
            memory: None,
        }
    }
}

impl ReceiveRing {
    /// Room for a queue of `capacity` requests of at most `max_sge` elements each.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(capacity: u32, max_sge: u32, owner: *mut c_void) -> Verb<Self> {
        let stride = stride(size_of::<ReceiveSlot>(), max_sge.max(1));
        let slots = (capacity as usize).max(8) * 2;
        let memory = Memory::new(slots.checked_mul(stride).ok_or(Errno::NO_MEMORY)?)?;
        let base: *mut ReceiveSlot = memory.base().cast();
        for index in 0..slots {
            let slot = base.wrapping_byte_add(index * stride);
            // SAFETY: the entry lies within `memory`, zeroed and aligned; nobody else has it yet.
            unsafe {
                (*slot).head.retire = &raw const (*slot).head.mark;
                (*slot).head.owner = owner;
                (*slot).wr.wr_id = (*slot).head.wr_id();
                (*slot).wr.sg_list = slot.add(1).cast();
            }
        }
        Ok(Self {
            cursor: base,
            end: base.wrapping_byte_add(slots * stride),
            base,
            stride,
            sequence: 0,
            undone: 0,
            max_sge,
            slots,
            memory: Some(memory),
        })
    }

    /// Is there memory behind it?
    #[must_use]
    pub fn is_allocated(&self) -> bool {
        self.memory.is_some()
    }

    /// Frees every entry: the queue was reset.
    pub fn forget_all(&mut self) {
        for slot in self.entries() {
            // SAFETY: an entry of this ring.
            unsafe { (*slot).head.mark.store(0, Ordering::Release) };
        }
    }

    /// Can [`Self::log_one`] take this chain as it stands: one request of one element, and the entry at the cursor free?
    ///
    /// # Safety
    /// `wr` must be null or valid as `ibv_post_recv` demands.
    #[inline(always)]
    #[must_use]
    pub unsafe fn takes_plain(&self, wr: *const ibv_recv_wr) -> bool {
        // SAFETY: the cursor is an entry unless it is the end, which is where it is in a ring without room.
        unsafe {
            !wr.is_null()
                && (*wr).num_sge == 1
                && (*wr).next.is_null()
                && self.cursor != self.end
                && !(*self.cursor).is_posted()
        }
    }

    /// Logs a request of one element. It is not part of the log until [`Self::commit`].
    ///
    /// # Safety
    /// [`Self::takes_plain`] must hold for `wr`.
    #[inline(always)]
    pub unsafe fn log_one(&mut self, wr: *const ibv_recv_wr) -> *mut ReceiveSlot {
        let slot = self.cursor;
        // SAFETY: as the caller vouches. Elements follow their entry.
        unsafe {
            (*slot).head.app_wr_id = (*wr).wr_id;
            (*slot).wr.num_sge = 1;
            ptr::write(slot.add(1).cast(), ptr::read((*wr).sg_list));
        }
        slot
    }

    /// Logs a request; `next` is left null. It is not part of the log until [`Self::commit`].
    ///
    /// # Safety
    /// `wr` must be a valid request as `ibv_post_recv` demands.
    ///
    /// # Errors
    /// `ENOMEM` if the ring is full; `EINVAL` for more elements than the queue has room for.
    #[inline(always)]
    pub unsafe fn log(&mut self, wr: *const ibv_recv_wr) -> Verb<*mut ReceiveSlot> {
        let mut slot = self.cursor;
        // SAFETY: `slot` is null or an entry; the caller vouches for `wr`.
        unsafe {
            if slot == self.end || (*slot).is_posted() {
                slot = self.find_free()?;
            }
            let count = (*wr).num_sge as u32;
            if count > self.max_sge {
                return Err(Errno::INVALID);
            }
            (*slot).head.app_wr_id = (*wr).wr_id;
            (*slot).wr.num_sge = (*wr).num_sge;
            for index in 0..count as usize {
                *(*slot).wr.sg_list.add(index) = *(*wr).sg_list.add(index);
            }
        }
        Ok(slot)
    }

    #[cold]
    fn find_free(&mut self) -> Verb<*mut ReceiveSlot> {
        let mut at = self.cursor;
        for _ in 0..self.slots {
            if at == self.end {
                at = self.base;
            }
            // SAFETY: an entry of this ring.
            if !unsafe { (*at).is_posted() } {
                return Ok(at);
            }
            at = at.wrapping_byte_add(self.stride);
        }
        Err(if self.is_allocated() {
            Errno::NO_MEMORY
        } else {
            Errno::INVALID
        })
    }

    /// Makes an entry part of the log, before it is posted: its completion may come while the post is still under way.
    ///
    /// # Safety
    /// `slot` is what the last `log` returned.
    #[inline(always)]
    pub unsafe fn commit(&mut self, slot: *mut ReceiveSlot) {
        self.sequence += 1;
        // SAFETY: as the caller vouches.
        unsafe {
            (*slot)
                .head
                .mark
                .store(self.sequence << 1 | 1, Ordering::Release)
        };
        self.cursor = slot.wrapping_byte_add(self.stride);
    }

    /// The entry that was committed last, until the next [`Self::log`].
    #[must_use]
    pub fn last(&self) -> *mut ReceiveSlot {
        self.cursor.wrapping_byte_sub(self.stride)
    }

    /// Takes an entry out of the log again: the device refused it.
    ///
    /// # Safety
    /// `slot` must be an entry of this ring that the device does not have.
    pub unsafe fn undo(&mut self, slot: *mut ReceiveSlot) {
        // SAFETY: as the caller vouches.
        unsafe { (*slot).head.mark.store(0, Ordering::Release) };
        self.undone += 1;
    }

    /// How many requests have completed since the queue was made or reset.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.sequence - self.undone - self.count_posted() as u64
    }

    /// The next request is none that [`Self::takes_plain`]: it is looked at more closely.
    pub fn leave_plain_path(&mut self) {
        self.cursor = self.end;
    }

    /// How many entries are posted.
    #[must_use]
    pub fn count_posted(&self) -> usize {
        // SAFETY: entries of this ring.
        self.entries()
            .filter(|slot| unsafe { (**slot).is_posted() })
            .count()
    }

    /// Posted entries, in the order in which they were posted.
    #[must_use]
    pub fn posted(&self) -> Vec<*mut ReceiveSlot> {
        // SAFETY: entries of this ring.
        let mut posted: Vec<_> = self
            .entries()
            .filter(|slot| unsafe { (**slot).is_posted() })
            .collect();
        // SAFETY: as above.
        posted.sort_by_key(|slot| unsafe { (**slot).head.mark.load(Ordering::Acquire) });
        posted
    }

    fn entries(&self) -> impl Iterator<Item = *mut ReceiveSlot> + use<> {
        let (base, stride) = (self.base, self.stride);
        (0..self.slots).map(move |index| base.wrapping_byte_add(index * stride))
    }
}

const _: () = assert!(size_of::<ReceiveSlot>().is_multiple_of(align_of::<ibv_sge>()));
