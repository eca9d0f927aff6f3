//! Memory of a ring: zeroed, aligned to a cache line, of entries whose size is known when the queue is made.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::errno::{Errno, Verb};

/// Bytes in a cache line.
pub(super) const LINE: usize = 64;

#[derive(Debug)]
pub(super) struct Memory {
    base: NonNull<u8>,
    layout: Layout,
}

impl Memory {
    /// # Errors
    /// `ENOMEM`; `EINVAL` if the size overflows.
    pub(super) fn new(bytes: usize) -> Verb<Self> {
        let layout = Layout::from_size_align(bytes.max(LINE), LINE).map_err(|_| Errno::INVALID)?;
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Errno::NO_MEMORY)?;
        Ok(Self { base, layout })
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`, freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// The size of an entry of `fixed` bytes and `sges` scatter/gather elements, rounded up to whole cache lines.
pub(super) fn stride(fixed: usize, sges: u32) -> usize {
    (fixed + sges as usize * size_of::<rdma_core_sys::ibv_sge>()).next_multiple_of(LINE)
}
