//! A table of 32-bit numbers that is read on the data path without a lock.
//!
//! Open addressing over atomic words. Writers are serialized; a table that became too small is replaced, and the old one
//! kept until the whole is dropped, as a reader may still be in it (sizes double, so that is at most as much again).

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Never a valid entry: no key has the virtual number 0 and the hardware number 0.
const EMPTY: u64 = 0;
/// An entry that was removed; searches go past it.
const REMOVED: u64 = u64::MAX;

#[derive(Debug)]
pub struct KeyTable {
    current: AtomicPtr<Slots>,
    /// How often a pair was removed or replaced.
    removals: AtomicU64,
    writer: Mutex<Writer>,
}

#[derive(Debug, Default)]
struct Writer {
    /// Every generation of the table; the last is the current one. Boxed: readers have their addresses.
    #[allow(
        clippy::vec_box,
        reason = "the addresses are shared with readers and must not move"
    )]
    generations: Vec<Box<Slots>>,
    /// Entries of the current generation that are not empty.
    used: usize,
}

#[derive(Debug)]
struct Slots {
    shift: u32,
    entries: Box<[AtomicU64]>,
}

impl Default for KeyTable {
    fn default() -> Self {
        let table = Self {
            current: AtomicPtr::default(),
            removals: AtomicU64::new(0),
            writer: Mutex::new(Writer {
                generations: Vec::new(),
                used: 0,
            }),
        };
        table.grow(&mut table.lock(), 16);
        table
    }
}

impl KeyTable {
    /// The hardware's number for a virtual one, if the table has it.
    #[inline]
    #[must_use]
    pub fn get(&self, key: u32) -> Option<u32> {
        // SAFETY: points into `generations`, which is only ever added to.
        let slots = unsafe { &*self.current.load(Ordering::Acquire) };
        let mask = slots.entries.len() - 1;
        let mut at = slots.home(key);
        loop {
            let entry = slots.entries[at & mask].load(Ordering::Relaxed);
            if entry == EMPTY {
                return None;
            }
            if (entry >> 32) as u32 == key && entry != REMOVED {
                return Some(entry as u32);
            }
            at += 1;
        }
    }

    /// What [`Self::get`] answered stays true as long as this does not change.
    #[inline]
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.removals.load(Ordering::Acquire)
    }

    /// Adds a pair, or replaces that of the same virtual number.
    pub fn insert(&self, key: u32, value: u32) {
        self.remove(key);
        let mut writer = self.lock();
        let room = writer
            .generations
            .last()
            .map_or(0, |slots| slots.entries.len());
        if (writer.used + 1) * 2 > room {
            self.grow(&mut writer, room * 2);
        }
        writer.put(u64::from(key) << 32 | u64::from(value));
    }

    /// Removes a pair.
    pub fn remove(&self, key: u32) {
        let writer = self.lock();
        let Some(slots) = writer.generations.last() else {
            return;
        };
        let mask = slots.entries.len() - 1;
        let mut at = slots.home(key);
        loop {
            let entry = &slots.entries[at & mask];
            let found = entry.load(Ordering::Relaxed);
            if found == EMPTY {
                return;
            }
            if (found >> 32) as u32 == key && found != REMOVED {
                entry.store(REMOVED, Ordering::Relaxed);
                self.removals.fetch_add(1, Ordering::Release);
                return;
            }
            at += 1;
        }
    }

    fn grow(&self, writer: &mut Writer, size: usize) {
        let live: Vec<u64> = writer.generations.last().map_or_else(Vec::new, |slots| {
            let entries = slots
                .entries
                .iter()
                .map(|entry| entry.load(Ordering::Relaxed));
            entries
                .filter(|entry| *entry != EMPTY && *entry != REMOVED)
                .collect()
        });
        // Many removed entries alone are no reason to double.
        let size = size
            .max(16)
            .min((live.len() * 4).next_power_of_two().max(16));
        let slots = Box::new(Slots {
            shift: 32 - size.trailing_zeros(),
            entries: (0..size).map(|_| AtomicU64::new(EMPTY)).collect(),
        });
        writer.generations.push(slots);
        writer.used = 0;
        for entry in live {
            writer.put(entry);
        }
        let newest = writer
            .generations
            .last()
            .map_or(std::ptr::null(), |slots| &raw const **slots);
        self.current.store(newest.cast_mut(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    fn put(&mut self, entry: u64) {
        let Some(slots) = self.generations.last() else {
            return;
        };
        let mask = slots.entries.len() - 1;
        let mut at = slots.home((entry >> 32) as u32);
        while slots.entries[at & mask].load(Ordering::Relaxed) != EMPTY {
            at += 1;
        }
        slots.entries[at & mask].store(entry, Ordering::Relaxed);
        self.used += 1;
    }
}

impl Slots {
    /// Fibonacci hashing: the top bits of the product.
    fn home(&self, key: u32) -> usize {
        (key.wrapping_mul(0x9e37_79b9) >> self.shift) as usize
    }
}

impl FromIterator<(u32, u32)> for KeyTable {
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(pairs: I) -> Self {
        let table = Self::default();
        for (key, value) in pairs {
            table.insert(key, value);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::KeyTable;

    #[test]
    fn agrees_with_a_map_through_inserts_removals_and_growth() {
        let table = KeyTable::default();
        let mut map = HashMap::new();
        let mut random = 1_u32;
        for round in 0..20_000_u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let key = random >> 22 | 1;
            if round % 3 == 0 {
                table.remove(key);
                map.remove(&key);
            } else {
                table.insert(key, round);
                map.insert(key, round);
            }
        }
        for key in 0..1_100 {
            assert_eq!(table.get(key), map.get(&key).copied(), "key {key}");
        }
    }
}
