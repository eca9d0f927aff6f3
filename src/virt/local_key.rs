//! The hardware's keys for the elements of a request.

use rdma_core_sys::ibv_sge;

use super::context::Context;
use crate::errno::{Errno, Verb};

/// The hardware's key for an element; its length decides whether the key means anything (IBTA 10.8.2.1).
///
/// # Errors
/// `EINVAL` for a key that is not one of this context's: never passed on as it is.
#[inline]
pub(super) fn local_key(context: &Context, element: &ibv_sge) -> Verb<u32> {
    match context.lkeys.get(element.lkey) {
        Some(key) => Ok(key),
        None if element.length == 0 => Ok(element.lkey),
        None => Err(Errno::INVALID),
    }
}

/// The key that a queue translated last, which the next request most likely needs again. Good as long as no region has been
/// deregistered since: its number may be given to another then.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastKey {
    key: u32,
    pub(super) hardware: u32,
    /// Of the table; [`u64::MAX`] is none it ever has.
    generation: u64,
}

impl LastKey {
    pub(super) const NONE: Self = Self {
        key: 0,
        hardware: 0,
        generation: u64::MAX,
    };

    #[inline(always)]
    pub(super) fn is(&self, context: &Context, key: u32) -> bool {
        self.key == key && self.generation == context.lkeys.generation()
    }

    /// Looks a key up; `false` if there is no such key, and then nothing has changed.
    pub(super) fn look_up(&mut self, context: &Context, key: u32) -> bool {
        // Before the table: what is removed meanwhile makes the answer stale.
        let generation = context.lkeys.generation();
        let Some(hardware) = context.lkeys.get(key) else {
            return false;
        };
        *self = Self {
            key,
            hardware,
            generation,
        };
        true
    }
}
