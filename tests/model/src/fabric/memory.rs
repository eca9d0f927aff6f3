//! What the fabric does to the program's memory.

use std::collections::BTreeMap;

use rdma_core_sys::ibv_sge;

/// A memory region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) address: u64,
    pub(crate) length: u64,
}

/// An access is within a region of that key.
pub(super) fn check(
    regions: &BTreeMap<u32, Region>,
    key: u32,
    address: u64,
    length: u64,
) -> Result<(), String> {
    let inside = regions.get(&key).is_some_and(|region| {
        address >= region.address && address + length <= region.address + region.length
    });
    inside
        .then_some(())
        .ok_or_else(|| format!("no region of key {key:#x} has {length} bytes at {address:#x}"))
}

/// # Safety
/// `elements` must have `count` elements.
pub(super) unsafe fn list(elements: *const ibv_sge, count: i32) -> Vec<ibv_sge> {
    (0..usize::try_from(count).unwrap_or(0))
        // SAFETY: as the caller vouches.
        .map(|index| unsafe { *elements.add(index) })
        .collect()
}

pub(super) fn length(elements: &[ibv_sge]) -> u32 {
    elements.iter().map(|element| element.length).sum()
}

pub(super) fn get(address: u64, length: usize) -> Vec<u8> {
    let from = std::ptr::with_exposed_provenance::<u8>(address as usize);
    // SAFETY: memory of the program, which waits meanwhile.
    unsafe { std::slice::from_raw_parts(from, length).to_vec() }
}

pub(super) fn put(address: u64, bytes: &[u8]) {
    let to = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
    // SAFETY: as in `get`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
}

pub(super) fn gather(elements: &[ibv_sge]) -> Vec<u8> {
    elements
        .iter()
        .flat_map(|element| get(element.addr, element.length as usize))
        .collect()
}

/// Puts bytes at an offset into what the elements describe.
pub(super) fn scatter(elements: &[ibv_sge], offset: usize, bytes: &[u8]) {
    let (mut skip, mut left) = (offset, bytes);
    for element in elements {
        let length = element.length as usize;
        if skip >= length {
            skip -= length;
            continue;
        }
        let now = left.len().min(length - skip);
        put(element.addr + skip as u64, &left[..now]);
        (skip, left) = (0, &left[now..]);
    }
}
