//! Registered memory of the application.

use rdma_core_sys::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_ATOMIC, IBV_ACCESS_REMOTE_READ,
    IBV_ACCESS_REMOTE_WRITE, ibv_mr, ibv_pd, ibv_sge,
};
use reverbs::virt::memory_region;

/// Bytes that each message has for itself.
pub(super) const SLOT: usize = 4096;
/// Message buffers, more than can be under way.
pub(super) const SLOTS: usize = 64;

/// Memory and its region.
#[derive(Debug)]
pub(super) struct Arena {
    memory: Box<[u8]>,
    region: *mut ibv_mr,
}

impl Arena {
    /// # Safety
    /// `domain` must come from the virtual device.
    pub(super) unsafe fn new(domain: *mut ibv_pd, length: usize) -> Self {
        let memory: Box<[u8]> = vec![0; length].into();
        let start = memory.as_ptr().cast_mut();
        let access = IBV_ACCESS_LOCAL_WRITE
            | IBV_ACCESS_REMOTE_WRITE
            | IBV_ACCESS_REMOTE_READ
            | IBV_ACCESS_REMOTE_ATOMIC;
        let iova = start.expose_provenance() as u64;
        // SAFETY: as the caller vouches; the memory lives as long as the region.
        let region = unsafe {
            memory_region::register(domain, start.cast(), length, iova, access as i32)
                .expect("reg_mr")
        };
        Self { memory, region }
    }

    pub(super) fn address(&self, at: usize) -> u64 {
        self.memory.as_ptr().expose_provenance() as u64 + at as u64
    }

    pub(super) fn key(&self) -> u32 {
        // SAFETY: registered until `deregister`.
        unsafe { (*self.region).lkey }
    }

    pub(super) fn remote_key(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.region).rkey }
    }

    pub(super) fn fill(&mut self, at: usize, bytes: &[u8]) {
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn word(&self, at: usize) -> u64 {
        let place = self.memory[at..].as_ptr().cast::<u64>();
        // SAFETY: within the memory; the fabric writes there behind the compiler's back.
        unsafe { place.read_unaligned() }
    }

    pub(super) fn bytes(&self, at: usize, length: usize) -> Vec<u8> {
        (at..at + length)
            // SAFETY: as in `word`.
            .map(|at| unsafe { (&raw const self.memory[at]).read_volatile() })
            .collect()
    }

    /// What is at a place, in `count` elements.
    pub(super) fn elements(&self, at: usize, length: u32, count: u32) -> Vec<ibv_sge> {
        let count = count.clamp(1, length.max(1));
        let part = length / count;
        (0..count)
            .map(|index| ibv_sge {
                addr: self.address(at) + u64::from(index * part),
                length: match index + 1 == count {
                    true => length - index * part,
                    false => part,
                },
                lkey: self.key(),
            })
            .collect()
    }

    pub(super) fn deregister(&self) {
        // SAFETY: registered, and not used any more.
        unsafe { memory_region::deregister(self.region).expect("dereg_mr") };
    }
}
