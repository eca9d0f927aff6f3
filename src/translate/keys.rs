//! A table of 32-bit numbers that is read on the data path without a lock.
//!
//! Open addressing over atomic words. Writers are serialized. A table that became too small, or full of removed entries, is
//! replaced. The old one is kept, as a reader may still be in it, and used for the next replacement of its size: so there are at
//! most two of each size, and sizes double. A reader that was in one that is being used again looks once more.

use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Never a valid entry: no key has the virtual number 0 and the hardware number 0.
const EMPTY: u64 = 0;
/// An entry that was removed; searches go past it.
const REMOVED: u64 = u64::MAX;

#[derive(Debug)]
pub struct KeyTable {
    current: AtomicPtr<Slots>,
    /// How often an old table was used again; raised before it is written to.
    reuses: AtomicU64,
    /// How often a pair was removed or replaced.
    removals: AtomicU64,
    writer: Mutex<Writer>,
}

#[derive(Debug, Default)]
struct Writer {
    /// Boxed, as those below: readers have their addresses.
    current: Option<Box<Slots>>,
    /// Those that were current before.
    #[allow(
        clippy::vec_box,
        reason = "the addresses are shared with readers and must not move"
    )]
    idle: Vec<Box<Slots>>,
    /// Entries of the current one that are not empty.
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
            reuses: AtomicU64::new(0),
            removals: AtomicU64::new(0),
            writer: Mutex::default(),
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
        loop {
            let reuses = self.reuses.load(Ordering::Acquire);
            // SAFETY: one that the writer owns; none is freed before the whole is.
            let found = unsafe { &*self.current.load(Ordering::Acquire) }.find(key);
            // With the fence in `grow`: whoever read what was written since sees the number raised.
            fence(Ordering::Acquire);
            if self.reuses.load(Ordering::Relaxed) == reuses {
                return found;
            }
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
            .current
            .as_ref()
            .map_or(0, |slots| slots.entries.len());
        if (writer.used + 1) * 2 > room {
            self.grow(&mut writer, room * 2);
        }
        writer.put(u64::from(key) << 32 | u64::from(value));
    }

    /// Removes a pair.
    pub fn remove(&self, key: u32) {
        let writer = self.lock();
        let Some(slots) = &writer.current else {
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
        let live: Vec<u64> = writer.current.as_ref().map_or_else(Vec::new, |slots| {
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
        let slots = self.take_idle(writer, size).unwrap_or_else(|| {
            Box::new(Slots {
                shift: 32 - size.trailing_zeros(),
                entries: (0..size).map(|_| AtomicU64::new(EMPTY)).collect(),
            })
        });
        let newest = &raw const *slots;
        let before = writer.current.replace(slots);
        writer.idle.extend(before);
        writer.used = 0;
        for entry in live {
            writer.put(entry);
        }
        self.current.store(newest.cast_mut(), Ordering::Release);
    }

    /// An empty one of this size that readers may still be in.
    fn take_idle(&self, writer: &mut Writer, size: usize) -> Option<Box<Slots>> {
        let at = writer
            .idle
            .iter()
            .position(|slots| slots.entries.len() == size)?;
        let slots = writer.idle.swap_remove(at);
        self.reuses.fetch_add(1, Ordering::Release);
        fence(Ordering::Release);
        for entry in &slots.entries {
            entry.store(EMPTY, Ordering::Relaxed);
        }
        Some(slots)
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    fn put(&mut self, entry: u64) {
        let Some(slots) = &self.current else {
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
    #[inline(always)]
    fn find(&self, key: u32) -> Option<u32> {
        let mask = self.entries.len() - 1;
        let mut at = self.home(key);
        loop {
            let entry = self.entries[at & mask].load(Ordering::Relaxed);
            if entry == EMPTY {
                return None;
            }
            if (entry >> 32) as u32 == key && entry != REMOVED {
                return Some(entry as u32);
            }
            at += 1;
        }
    }

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
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::KeyTable;

    #[test]
    fn memory_is_bounded_and_readers_miss_nothing_while_keys_come_and_go() {
        let table = KeyTable::default();
        let over = AtomicBool::new(false);
        for key in 1..=20 {
            table.insert(key, key + 1);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    for key in 1..=20 {
                        assert_eq!(table.get(key), Some(key + 1));
                    }
                }
            });
            for key in 100..200_000 {
                table.insert(key, key);
                assert_eq!(table.get(key), Some(key));
                table.remove(key);
            }
            over.store(true, Ordering::Relaxed);
        });
        let writer = table.lock();
        let words: usize = writer.idle.iter().map(|slots| slots.entries.len()).sum();
        assert!(words < 1024, "{words} words for 20 keys");
    }

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
