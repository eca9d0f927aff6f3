//! What became of the sends that did not complete. docs/checkpoint.md, "Settling", has the argument.

use std::collections::HashSet;

use rdma_core_sys::{
    IBV_SEND_SIGNALED, IBV_WC_COMP_SWAP, IBV_WC_FETCH_ADD, IBV_WC_RDMA_READ, IBV_WC_RDMA_WRITE,
    IBV_WC_SEND, IBV_WC_SUCCESS, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, ibv_wc, ibv_wr_opcode,
};

use super::QueuePair;
use super::send_queue::State;
use crate::handle::Psn;
use crate::log::SendSlot;

/// How a queue pair came out of settling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Every request is known to be executed (and completed) or not (and goes down again).
    Known { again: u64 },
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
    /// `flushed` are the entries (by the `wr_id` they went down with) that came back as flushed; `expected` is the next PSN
    /// the peer's responder waits for.
    pub(crate) fn settle(&self, flushed: &HashSet<u64>, expected: Option<Psn>) -> Fate {
        self.send.with(|state| {
            let held = state.held_from();
            let slots: Vec<_> = state.ring.outstanding().take_while(|slot| *slot != held).collect();
            // SAFETY: entries of the ring, under its lock.
            let slots: Vec<&SendSlot> = slots.into_iter().map(|slot| unsafe { &*slot }).collect();
            let Some(last) = slots.last() else { return Fate::Known { again: 0 } };
            let first_flushed =
                slots.iter().position(|slot| flushed.contains(&slot.head.wr_id())).unwrap_or(slots.len());
            let executed = match expected {
                Some(expected) if self.is_reliable() => {
                    // All of the outstanding lies within half of the PSN space (IBTA 9.7.2), so the distance tells.
                    let behind = Psn(0).advance(last.psn_after).since(expected);
                    let executed = slots
                        .iter()
                        .take_while(|slot| Psn(0).advance(last.psn_after).since(Psn(0).advance(slot.psn_after)) >= behind)
                        .count();
                    if behind > 1 << 23 || executed < first_flushed {
                        let why = format!(
                            "the peer expects PSN {:#x}, which does not fit the {} requests outstanding",
                            expected.0,
                            slots.len()
                        );
                        return state.flush_again(slots[0], why);
                    }
                    executed
                }
                None if self.is_reliable() && first_flushed < slots.len() => {
                    let why = "the peer did not say how far it came".into();
                    return state.flush_again(slots[first_flushed], why);
                }
                // Unreliable transports are done with a request when it has left; what was flushed has not.
                _ => first_flushed,
            };
            let needs_response = |slot: &&&SendSlot| response_carries_data(slot.wr.opcode);
            let lost = slots[first_flushed.min(executed)..executed].iter().position(|slot| needs_response(&slot));
            let again_from = match lost.map(|index| first_flushed + index) {
                None => executed,
                // A READ that nothing follows may be asked again: the peer's memory has not moved.
                Some(index) if index + 1 == executed && slots[index].wr.opcode == IBV_WR_RDMA_READ => index,
                Some(index) => {
                    let why =
                        format!("the response to an executed request (opcode {}) was lost", slots[index].wr.opcode);
                    return state.flush_again(slots[first_flushed], why);
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
                state.hold_from(std::ptr::from_ref(*first).cast_mut());
            }
            Fate::Known { again: (slots.len() - again_from) as u64 }
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
            _ => IBV_WC_SEND,
        };
        completion.qp_num = self.number.0;
        // SAFETY: completion queues outlive their queue pairs, and the gate is closed.
        let queue = unsafe { &*self.send_completions };
        queue.hold(completion);
    }
}

impl State {
    /// What became of `first` and those behind it cannot be told. They go down again on a queue pair in the error state, so
    /// that the application gets them flushed.
    fn flush_again(&mut self, first: &SendSlot, why: String) -> Fate {
        self.hold_from(std::ptr::from_ref(first).cast_mut());
        Fate::Unknown { why }
    }
}

fn response_carries_data(opcode: ibv_wr_opcode) -> bool {
    [
        IBV_WR_RDMA_READ,
        IBV_WR_ATOMIC_CMP_AND_SWP,
        IBV_WR_ATOMIC_FETCH_AND_ADD,
    ]
    .contains(&opcode)
}
