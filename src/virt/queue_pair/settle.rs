//! What became of the sends that did not complete. docs/checkpoint.md, "Settling", has the argument.

use std::collections::HashSet;
use std::ptr;

use rdma_core_sys::{
    IBV_SEND_SIGNALED, IBV_WC_BIND_MW, IBV_WC_COMP_SWAP, IBV_WC_FETCH_ADD, IBV_WC_LOCAL_INV,
    IBV_WC_RDMA_READ, IBV_WC_RDMA_WRITE, IBV_WC_SEND, IBV_WC_SUCCESS, IBV_WR_ATOMIC_CMP_AND_SWP,
    IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_BIND_MW, IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ,
    IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, ibv_wc,
};

use super::QueuePair;
use super::executed::{Outstanding, executed};
use super::send_queue::State;
use crate::control::message::Progress;
use crate::handle::Psn;
use crate::log::SendSlot;

/// How a queue pair came out of settling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Every request is known to be executed (and completed) or not (and goes down again).
    Known { again: u64 },
    /// So many were in the device and may or may not have left. Their transport may lose a message, but must not double it.
    MayBeLost { count: u64 },
    /// It cannot be told: the queue pair comes back in the error state.
    Unknown { why: String },
}

impl QueuePair {
    /// Requests posted to the hardware that have not completed.
    pub(crate) fn outstanding(&self) -> u64 {
        self.send.with(|state| {
            let held = state.held_from();
            state
                .ring
                .outstanding()
                .take_while(|slot| *slot != held)
                .count() as u64
        })
    }

    /// Decides each outstanding request, after the hardware has been stopped and emptied.
    ///
    /// `flushed` are the entries (by the `wr_id` they went down with) that came back as flushed; `responder` is what the
    /// peer says of how far it came.
    pub(crate) fn settle(&self, flushed: &HashSet<u64>, responder: Option<Progress>) -> Fate {
        let counted = self.send.counts_receives();
        self.send.with(|state| {
            let held = state.held_from();
            let slots: Vec<_> = state
                .ring
                .outstanding()
                .take_while(|slot| *slot != held)
                .collect();
            // SAFETY: entries of the ring, under its lock.
            let slots: Vec<&SendSlot> = slots.into_iter().map(|slot| unsafe { &*slot }).collect();
            let first_flushed = slots
                .iter()
                .position(|slot| flushed.contains(&slot.head.wr_id()))
                .unwrap_or(slots.len());
            let reliable = self.is_reliable();
            let fate = if reliable {
                let requests: Vec<_> = slots
                    .iter()
                    .map(|slot| state.describe(slot, counted))
                    .collect();
                executed(&requests, first_flushed, responder)
                    .and_then(|executed| first_to_repeat(&requests, first_flushed, executed))
            } else {
                Ok(slots.len())
            };
            let again_from = match fate {
                Ok(again_from) => again_from,
                Err(why) => {
                    // They go down again on a queue pair in the error state, so that the application gets them flushed.
                    let first = slots.get(first_flushed).or(slots.first());
                    state.hold_from(first.map_or(held, |first| ptr::from_ref(*first).cast_mut()));
                    return Fate::Unknown { why };
                }
            };
            for slot in &slots[..again_from] {
                if self.signal_all || slot.wr.send_flags & IBV_SEND_SIGNALED != 0 {
                    self.complete(slot);
                }
            }
            if let Some(done) = again_from.checked_sub(1) {
                state.ring.retire(slots[done]);
            }
            if let Some(first) = slots.get(again_from) {
                state.hold_from(ptr::from_ref(*first).cast_mut());
            }
            match slots.len() - first_flushed {
                count @ 1.. if !reliable => Fate::MayBeLost {
                    count: count as u64,
                },
                _ => Fate::Known {
                    again: (slots.len() - again_from) as u64,
                },
            }
        })
    }

    /// The completion the hardware would have given.
    fn complete(&self, slot: &SendSlot) {
        // SAFETY: zero is a valid completion.
        let mut completion: ibv_wc = unsafe { std::mem::zeroed() };
        completion.wr_id = slot.head.app_wr_id;
        completion.status = IBV_WC_SUCCESS;
        completion.opcode = match slot.wr.opcode {
            IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => IBV_WC_RDMA_WRITE,
            IBV_WR_RDMA_READ => IBV_WC_RDMA_READ,
            IBV_WR_ATOMIC_CMP_AND_SWP => IBV_WC_COMP_SWAP,
            IBV_WR_ATOMIC_FETCH_AND_ADD => IBV_WC_FETCH_ADD,
            IBV_WR_LOCAL_INV => IBV_WC_LOCAL_INV,
            IBV_WR_BIND_MW => IBV_WC_BIND_MW,
            _ => IBV_WC_SEND,
        };
        completion.qp_num = self.number.0;
        // SAFETY: completion queues outlive their queue pairs, and the gate is closed.
        let queue = unsafe { &*self.send_completions };
        queue.hold(completion);
    }
}

impl State {
    fn describe(&self, slot: &SendSlot, counted: bool) -> Outstanding {
        Outstanding {
            opcode: slot.wr.opcode,
            // SAFETY: an entry of the ring.
            packets: unsafe { self.ring.packets_of(slot) },
            psn_after: Psn(0).advance(slot.psn_after),
            receives_after: counted.then(|| slot.receives_after.wrapping_sub(self.counted_from)),
        }
    }
}

/// The first request to go down again: behind those that were executed, but for READs at their end whose data were lost. They may
/// be asked again, as nothing was executed after them that could have changed what they read.
fn first_to_repeat(
    requests: &[Outstanding],
    first_flushed: usize,
    executed: usize,
) -> Result<usize, String> {
    let unacknowledged = &requests[first_flushed.min(executed)..executed];
    let Some(lost) = unacknowledged
        .iter()
        .position(|request| request.is_answered())
    else {
        return Ok(executed);
    };
    match unacknowledged[lost..]
        .iter()
        .all(|request| request.is_read())
    {
        true => Ok(first_flushed + lost),
        false => Err(format!(
            "the answer to an executed request (opcode {}) was lost",
            unacknowledged[lost].opcode
        )),
    }
}
